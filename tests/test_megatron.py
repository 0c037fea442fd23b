"""Megatron-LM's schedule of rate and weight decay against its published formulas, written out in Python."""

from __future__ import annotations

import copy
import json
import math
import pickle
import warnings
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tolerances import ROUNDING

from fused_sched import schedules
from fused_sched._warnings import ScheduleWarning
from fused_sched.schedules import Schedule
from fused_sched.schedules.megatron import OptimizerParamScheduler

PLAIN: dict[str, Any] = {
    "init_lr": 0.0,
    "max_lr": 1e-3,
    "min_lr": 1e-5,
    "lr_warmup_steps": 20,
    "lr_decay_steps": 200,
    "lr_decay_style": "cosine",
    "start_wd": 0.01,
    "end_wd": 0.1,
    "wd_incr_steps": 150,
    "wd_incr_style": "cosine",
}
WSD = {"lr_decay_style": "WSD", "wsd_decay_steps": 50, "lr_wsd_decay_style": "minus_sqrt"}
ANNEALS = ("linear", "cosine", "exponential", "minus_sqrt")


def schedule(**changes: Any) -> OptimizerParamScheduler:
    return OptimizerParamScheduler(**{**PLAIN, **changes})


# The formulas.


def rate(n: float, c: dict[str, Any]) -> float:
    """The rate after n samples: warm-up, hold or decay, floor."""
    top, bottom, warmup, end = c["max_lr"], c["min_lr"], c["lr_warmup_steps"], c["lr_decay_steps"]
    if warmup > 0 and n <= warmup:
        return c["init_lr"] + (top - c["init_lr"]) * (n / warmup)
    if c["lr_decay_style"] == "constant":
        return top
    if n > end:
        return bottom
    if c["lr_decay_style"] == "inverse-square-root":
        return max(bottom, top * math.sqrt(max(warmup, 1)) / math.sqrt(max(n, 1)))
    if c["lr_decay_style"] == "WSD":
        begin, shape = end - c["wsd_decay_steps"], c["lr_wsd_decay_style"]
        if n <= begin:
            return top
    else:
        begin, shape = warmup, c["lr_decay_style"]
    u = (n - begin) / (end - begin)
    remaining = {
        "linear": lambda: 1.0 - u,
        "cosine": lambda: (math.cos(math.pi * u) + 1.0) / 2.0,
        "exponential": lambda: 2.0 * 0.5**u - 1.0,
        "minus_sqrt": lambda: 1.0 - u**0.5,
    }[shape]()
    return bottom + (top - bottom) * remaining


def weight_decay(n: float, c: dict[str, Any]) -> float:
    start, end, steps = c["start_wd"], c["end_wd"], c["wd_incr_steps"]
    if n > steps or c["wd_incr_style"] == "constant":
        return end
    u = n / steps
    return start + (end - start) * (u if c["wd_incr_style"] == "linear" else (1.0 - math.cos(math.pi * u)) / 2.0)


def assert_formulas(ours: OptimizerParamScheduler, config: dict[str, Any], updates: list[int]) -> None:
    for got, formula in ((ours, rate), (ours.companions["weight_decay"], weight_decay)):
        expected = np.array([formula(t * ours.increment, config) for t in updates])
        assert np.abs(got(updates) - expected).max() <= ROUNDING * np.abs(expected).max()


def silently(**changes: Any) -> OptimizerParamScheduler:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ScheduleWarning)
        return schedule(**changes)


fractions = st.integers(0, 100).map(lambda percent: percent / 100)  # no subnormal rates, which have few digits


@st.composite
def configs(draw: st.DrawFn) -> dict[str, Any]:
    end = draw(st.integers(1, 300))
    warmup = draw(st.integers(-5, end - 1) | st.floats(0.0, end - 0.5) | st.just(0.05 * end))
    top, bottom = draw(st.floats(1e-6, 10.0)), draw(st.just(0.0) | fractions)
    style = draw(st.sampled_from(["constant", "linear", "cosine", "inverse-square-root", "WSD"]))
    wd_style = draw(st.sampled_from(["constant", "linear", "cosine"]))
    start_wd = draw(fractions)
    return {
        "init_lr": draw(st.just(0.0) | fractions) * top,
        "max_lr": top,
        "min_lr": bottom * top,
        "lr_warmup_steps": warmup,
        "lr_decay_steps": end,
        "lr_decay_style": style,
        "start_wd": start_wd,
        "end_wd": start_wd if wd_style == "constant" else start_wd + draw(fractions),
        "wd_incr_steps": draw(st.integers(-1, 400)) if wd_style == "constant" else draw(st.integers(1, 400)),
        "wd_incr_style": wd_style,
        "wsd_decay_steps": draw(st.integers(1, end + 20)) if style == "WSD" else None,
        "lr_wsd_decay_style": draw(st.sampled_from(ANNEALS)) if style == "WSD" else None,
    }


@settings(deadline=None)
@given(configs(), st.integers(1, 40))
def test_every_update_of_any_configuration(config: dict[str, Any], increment: int) -> None:
    updates = list(range(max(config["lr_decay_steps"], config["wd_incr_steps"]) // increment + 4))
    assert_formulas(silently(**config, increment=increment), config, updates)


@settings(deadline=None, max_examples=30)
@given(
    st.sampled_from([*ANNEALS, "constant", "inverse-square-root"]),
    st.booleans(),
    st.integers(1, 4096),
    st.integers(0, 10**6),
    st.integers(1, 10**9),
    st.integers(1, 10**9),
)
def test_boundaries_of_long_trainings(
    style: str, wsd: bool, increment: int, warmup: int, length: int, anneal: int
) -> None:
    """A billion samples: one update before, at and after each end of a phase."""
    assume(wsd or style not in ("exponential", "minus_sqrt"))
    config: dict[str, Any] = PLAIN | {"lr_warmup_steps": warmup, "lr_decay_steps": warmup + length}
    config |= {"wd_incr_steps": length, "lr_decay_style": style}
    if wsd and style in ANNEALS:
        config |= {"lr_decay_style": "WSD", "lr_wsd_decay_style": style, "wsd_decay_steps": min(anneal, length)}
    ends = (warmup, warmup + length, length, warmup + length - min(anneal, length))
    updates = sorted({max(0, end // increment + k) for end in ends for k in (-1, 0, 1, 2)})
    assert_formulas(silently(**config, increment=increment), config, updates)


def test_both_ends_are_inclusive() -> None:
    """n = W still warms up, n = D still decays; the square root then jumps to min_lr, a constant never does."""
    assert schedule()([20, 200, 201]).tolist() == [1e-3, 1e-5, 1e-5]
    inverse = schedule(lr_decay_style="inverse-square-root")
    assert inverse([20, 80, 201]).tolist() == [1e-3, 5e-4, 1e-5]
    assert inverse(200) == pytest.approx(1e-3 * math.sqrt(0.1), rel=1e-15)
    assert schedule(lr_decay_style="constant")([20, 200, 10**9]).tolist() == [1e-3] * 3
    assert schedule(**WSD)([150, 200, 201]).tolist() == pytest.approx([1e-3, 1e-5, 1e-5], rel=1e-14)


def test_factors_of_a_group() -> None:
    plain, scaled = schedule(increment=3), schedule(increment=3, wd_mult=0.5, lr_mult=2.0)
    updates = range(80)
    assert scaled(updates).tolist() == (2.0 * plain(updates)).tolist()
    decays = [s.companions["weight_decay"](updates) for s in (plain, scaled)]
    np.testing.assert_allclose(decays[1], 0.5 * decays[0], rtol=1e-15)
    assert not schedule(wd_mult=0.0).companions["weight_decay"](updates).any()


@pytest.mark.parametrize("ours", [schedule(), schedule(**WSD, lr_warmup_steps=16.65, increment=4)])
def test_every_way_of_storing_it_rebuilds_it(ours: Schedule) -> None:
    rebuilt = eval(repr(ours), {"megatron": schedules.megatron})
    restored = Schedule.from_dict(json.loads(json.dumps(ours.to_dict())))
    for other in (rebuilt, restored, pickle.loads(pickle.dumps(ours)), copy.deepcopy(ours)):
        assert other == ours
        assert other.program == ours.program


# What its constructor refuses.


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"min_lr": -1e-9}, AssertionError, "min_lr must be at least 0, got min_lr=-1e-09; pass 0.0"),
        ({"min_lr": 2e-3}, AssertionError, "max_lr must be at least min_lr, got max_lr=0.001 and min_lr=0.002"),
        ({"init_lr": 2e-3}, AssertionError, "init_lr must be at most max_lr"),
        ({"lr_decay_steps": 0}, AssertionError, "lr_decay_steps must be more than 0"),
        ({"lr_warmup_steps": 200}, AssertionError, "lr_warmup_steps must be less than lr_decay_steps"),
        ({"lr_decay_style": "WSD"}, AssertionError, "needs wsd_decay_steps"),
        ({"start_wd": -0.1}, AssertionError, "start_wd must be at least 0"),
        ({"end_wd": 0.001}, AssertionError, "end_wd must not be below start_wd"),
        ({"override_opt_param_scheduler": True}, AssertionError, "use_checkpoint_opt_param_scheduler=False"),
        ({"wd_incr_style": "constant"}, AssertionError, "needs start_wd == end_wd, got start_wd=0.01 and end_wd=0.1"),
        ({"wd_incr_steps": 0}, ZeroDivisionError, "wd_incr_steps must not be 0"),
        ({"wd_incr_style": "square"}, Exception, "wd_incr_style must be one of 'constant', 'linear', 'cosine'"),
        ({"lr_decay_style": "step", "lr_warmup_steps": 0}, Exception, "lr_decay_style must be one of 'constant'"),
        (
            {**WSD, "lr_warmup_steps": 0, "wsd_decay_steps": 300, "lr_wsd_decay_style": None},
            AssertionError,
            "lr_wsd_decay_style must be one of",
        ),
        ({"increment": 0}, ValueError, "increment must be at least 1"),
        ({"max_lr": math.nan}, ValueError, "max_lr must be finite"),
        ({"lr_warmup_steps": None}, TypeError, "lr_warmup_steps must be a number"),
    ],
)
def test_what_the_constructor_raises(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error) as caught:
        schedule(**changes)
    assert type(caught.value) is error
    assert message in str(caught.value)


def test_what_the_constructor_does_not_reach() -> None:
    """step(0) asks neither for a decay style during a warm-up nor for a weight decay that has already ended."""
    assert schedule(wd_incr_steps=-1, wd_incr_style="square").companions["weight_decay"](0) == 0.1
    # Updates at 0, 190 and 380 samples: none in (200, 300], where the style is asked for.
    jumping = schedule(lr_decay_style="step", lr_warmup_steps=190.0, lr_decay_steps=300, increment=190)
    assert jumping([0, 1, 2]).tolist() == [0.0, 1e-3, 1e-5]


# What it says about odd arguments.


@pytest.mark.parametrize(
    ("changes", "failing", "held"),
    [
        ({"lr_decay_style": "step"}, 21, 1e-3),
        ({"lr_decay_style": "step", "increment": 8}, 3, 1e-3 * 16 / 20),
        ({**WSD, "lr_wsd_decay_style": None}, 151, 1e-3),
        ({**WSD, "lr_wsd_decay_style": "sqrt", "increment": 10}, 16, 1e-3),
        ({**WSD, "lr_wsd_decay_style": "sqrt", "wsd_decay_steps": 190}, 21, 1e-3),
    ],
)
def test_a_style_that_fails_in_training_is_held(changes: dict[str, Any], failing: int, held: float) -> None:
    with pytest.warns(ScheduleWarning, match=f"is unknown, at the step to update {failing},") as said:
        ours = schedule(**changes)
    assert len(said) == 1
    assert ours([failing - 1, failing, 10**6]).tolist() == pytest.approx([held] * 3, rel=1e-15)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"init_lr": -1e-4}, "the rate is negative at first"),
        ({"lr_decay_style": "inverse-square-root", "lr_warmup_steps": 0}, "without warm-up"),
        ({**WSD, "wsd_decay_steps": 190}, "the anneal starts at 10, before the end of the warm-up at 20"),
        ({**WSD, "wsd_decay_steps": 0}, "leaves no anneal"),
    ],
)
def test_odd_arguments_are_said_once(changes: dict[str, Any], message: str) -> None:
    with pytest.warns(ScheduleWarning, match=message) as said:
        schedule(**changes)
    assert len(said) == 1
