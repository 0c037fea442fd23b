"""What an optimizer says of a schedule before it takes it: its range, and what its reference is."""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import example, given, settings
from samples import param
from test_schedules_properties import any_schedule

from fused_sched import FusedScheduledAdam, ScheduleWarning, hyperparameters, schedules
from fused_sched.schedules import Schedule, constant, exponential, linear
from fused_sched.schedules.torch import CosineAnnealingLR, LambdaLR, LinearLR, OneCycleLR, StepLR


def warned(function: Callable[[], object]) -> set[str]:
    """What a call warns of; the optimizer looks at a schedule for its defaults and for its group."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ScheduleWarning)
        function()
    return {str(warning.message) for warning in caught}


# Rates that turn negative.


@pytest.mark.parametrize(
    ("schedule", "lr"),
    [
        (lambda: LambdaLR(lambda t: 1 - t / 50, num_steps=200, base_lr=0.1), 0.1),
        (
            lambda: OneCycleLR(
                1.0, 1, anneal_strategy="linear", cycle_momentum=False, three_phase=True, div_factor=10.0
            ),
            1e-5,
        ),
        (lambda: linear(-0.1, 0.001, 171), 0.001),
        (lambda: schedules.table([-0.1, 0.5, -2.0, 0.0]), 0.5),
    ],
)
def test_a_negative_side_that_is_larger_is_not_the_peak(schedule: Callable[[], Schedule], lr: float) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ScheduleWarning)
        built = schedule()
        opt = FusedScheduledAdam([param()], lr=built)
    assert opt.param_groups[0]["lr"] == built.reference == pytest.approx(lr, rel=1e-9)
    assert opt.last_lr() == [built(0)]


@pytest.mark.parametrize("never_positive", [constant(-0.1), linear(0.0, -0.1, 10), linear(-0.1, 0.0, 10)])
def test_a_rate_that_is_never_positive_is_refused(never_positive: Schedule) -> None:
    message = r"lr must be above 0 at some update, got -0\.\d+ at update [01] .* use schedule\.scaled\(-1\.0\)"
    opt = FusedScheduledAdam([param()], lr=0.1)
    with pytest.raises(ValueError, match=message):
        FusedScheduledAdam([param()], lr=never_positive)
    with pytest.raises(ValueError, match=message):
        opt.set_schedule(never_positive)
    assert opt.param_groups[0]["lr"] == 0.1


@pytest.mark.filterwarnings("ignore::fused_sched.ScheduleWarning")
def test_a_peak_that_is_not_finite_is_refused_as_such() -> None:
    with pytest.raises(ValueError, match="lr must stay finite at every update, got inf at update 10; end it before"):
        FusedScheduledAdam([param()], lr=schedules.optax.polynomial_schedule(1.0, 0.0, -1, 10))
    with pytest.raises(ValueError, match="got inf at update 0; use another one"):
        FusedScheduledAdam([param()], lr=schedules.optax.polynomial_schedule(1.0, 0.0, -1, 1).shifted(-1))


def test_what_the_schedule_has_said_is_not_said_again() -> None:
    with pytest.warns(ScheduleWarning, match="negative"):
        stairs = StepLR(3, -0.5, base_lr=0.1)
    assert warned(lambda: FusedScheduledAdam([param()], lr=stairs)) == set()


def test_another_oddity_does_not_hide_a_negative_rate() -> None:
    with pytest.warns(ScheduleWarning, match="comes back to base_lr"):
        wave = CosineAnnealingLR(10, eta_min=-0.01, base_lr=0.1)
    (message,) = warned(lambda: FusedScheduledAdam([param()], lr=wave))
    assert "turns negative: -0.0" in message


# Updates at which a schedule is looked at.


@settings(deadline=None, max_examples=100)
@given(any_schedule)
@example(exponential(0.0, 1.01, steps=1))  # 0 times infinity, which 4,000 updates do not reach
def test_probes_find_the_range(schedule: Schedule) -> None:
    probed, shown = schedule(hyperparameters._probes(schedule)), schedule(np.arange(4000))
    # The crests of a wave may differ by rounding.
    rounding = 1e-12 * np.abs(shown).max()
    assert np.nanmin(probed) <= shown.min() + rounding
    assert np.nanmax(probed) >= shown.max() - rounding


def test_nothing_is_looked_at_after_the_end() -> None:
    assert hyperparameters._probes(linear(1.0, 0.0, 1000)).max() == 1000
    assert len(hyperparameters._probes(constant(0.1))) < 5


def test_an_end_after_all_probes_is_looked_at() -> None:
    late = schedules.join([constant(0.1), constant(-0.1)], [2**45])
    (message,) = warned(lambda: FusedScheduledAdam([param()], lr=late))
    assert f"at update {2**45};" in message
    FusedScheduledAdam([param()], lr=LinearLR(total_iters=1e300, base_lr=0.1))  # an end at no whole double


def test_an_endless_growth_is_looked_at_until_probes_end() -> None:
    slow = schedules.exponential(0.1, 1.0 + 1e-10)
    assert math.isinf(slow(2**53))
    FusedScheduledAdam([param()], lr=slow)
    with pytest.raises(ValueError, match=f"got inf at update {2**40 - 1}"):
        FusedScheduledAdam([param()], lr=schedules.exponential(0.1, 1.0 + 7e-10))


@pytest.mark.parametrize(
    ("name", "length", "ratio"),
    [
        ("StepLRScheduler", 3, 2.0),
        ("StepLRScheduler", 3, -2.0),
        ("StepLRScheduler", -3, 0.5),
        ("MultiStepLRScheduler", range(2000), 2.0),
        ("MultiStepLRScheduler", range(2000), -2.0),
    ],
)
@pytest.mark.filterwarnings("ignore::fused_sched.ScheduleWarning")
def test_growing_stairs_of_timm_end_at_the_largest_double(name: str, length: object, ratio: float) -> None:
    """timm ends in an OverflowError."""
    stairs = getattr(schedules.timm, name)(length, ratio, t_in_epochs=False, base_lr=0.1)
    FusedScheduledAdam([param()], lr=stairs)
    assert (np.abs(stairs([10**4, 2**40, 2**40 + 3])) == sys.float_info.max).all()
    stairs_until_8 = {"StepLRScheduler": 8 // 3 if length == 3 else 3, "MultiStepLRScheduler": 10}[name]
    assert abs(stairs(8)) == pytest.approx(0.1 * 2.0**stairs_until_8, rel=1e-15)
