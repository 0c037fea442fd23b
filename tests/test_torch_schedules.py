"""torch's schedules without torch: what they refuse, what they say is odd, where growth ends."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from live_torch import Config, build, optimizer, quietly, run
from torch.optim import lr_scheduler

from fused_sched import schedules
from fused_sched._warnings import ScheduleWarning

T = schedules.torch
STEP_OURS = T.StepLR(3, base_lr=0.1)
COSINE = quietly(T.CosineAnnealingLR, 4, base_lr=0.1)
TABLE = T.LambdaLR([1.0, 0.5], base_lr=0.1)


@pytest.mark.parametrize(
    "config",
    [
        ("ExponentialLR", {"gamma": 2.0}),
        ("StepLR", {"step_size": 3, "gamma": -9.0}),
        ("MultiStepLR", {"milestones": [*range(2000)], "gamma": 2.0}),
        ("MultiplicativeLR", {"lr_lambda": [2.0] * 3000}),
        ("CyclicLR", {"base_lr": 0.1, "max_lr": 0.2, "mode": "exp_range", "gamma": 2.0}),
    ],
    ids=lambda config: config[0],
)
def test_growth_ends_at_the_largest_double(config: Config) -> None:
    """torch goes on to infinity; an optimizer refuses a schedule that does, however late."""
    name, arguments = config
    extra = {} if name == "CyclicLR" else {"base_lr": 0.1}
    schedule = quietly(getattr(schedules.torch, name), **arguments, **extra)
    assert np.isfinite(schedule([0, 1, 2000, 4000, 2001, 10**6, 10**6 + 3, 2**40])).all()
    assert abs(schedule(2**40 - 2**40 % 4000 + 1999)) > 1e300


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda: T.ChainedScheduler([TABLE, STEP_OURS]), "torch.LambdaLR.* which sets the rate; .*from_callable"),
        (lambda: T.ChainedScheduler([STEP_OURS, T.StepLR(3, base_lr=0.2)]), r"same base_lr, got \[0.1, 0.2\]"),
        (lambda: T.ChainedScheduler([]), "at least one schedule"),
        (lambda: T.ChainedScheduler([COSINE, COSINE]), "at most one CosineAnnealingLR, got 2, .*from_callable"),
        (
            lambda: T.ChainedScheduler([COSINE, T.LinearLR(total_iters=2**24, base_lr=0.1)]),
            "T_max=4 must fit into a table, got 2097152 changes of the rate, more than 1048576, .*from_callable",
        ),
        (
            lambda: T.ChainedScheduler([COSINE, T.PolynomialLR(6, 900.0, base_lr=0.1)]),
            "a factor that has no digits left where the cosine begins anew; .*from_callable",
        ),
        (lambda: T.SequentialLR([], []), "at least one schedule"),
        (lambda: T.SequentialLR([STEP_OURS], [3]), "one fewer than schedulers, got 1 for 1"),
        (lambda: T.SequentialLR([STEP_OURS] * 3, [5, 3]), r"in order, got \[5, 3\]"),
        (
            lambda: T.SequentialLR([STEP_OURS, T.MultiplicativeLR([1.0, 0.5], base_lr=0.1)], [3]),
            "MultiplicativeLR must come first.*from_callable",
        ),
        (
            lambda: T.SequentialLR([T.SequentialLR([STEP_OURS] * 2, [3]), STEP_OURS], [9]),
            "must not be a SequentialLR.*from_callable",
        ),
        (
            lambda: T.SequentialLR([T.ChainedScheduler([T.ExponentialLR(0.9, base_lr=0.1)]), STEP_OURS], [9]),
            "torch takes the first step twice; .*from_callable",
        ),
        (
            lambda: T.SequentialLR([T.ReduceLROnPlateau(base_lr=0.1), STEP_OURS], [9]),
            r"schedulers\[0\] must not need a metric",
        ),
        (
            lambda: T.ChainedScheduler([schedules.transformers.GreedyLR(base_lr=0.1)]),
            r"schedulers\[0\] must not need a metric",
        ),
        (lambda: T.CyclicLR(0.1, 0.2, scale_fn=abs), "scale_fn must be None.*from_callable"),
        (lambda: T.CyclicLR(0.1, 0.2, mode="square"), "mode must be one of"),
        (lambda: T.ConstantLR(1.5, base_lr=0.1), r"factor must be in \[0, 1\], got 1.5"),
        (lambda: T.LinearLR(0.0, base_lr=0.1), "start_factor must be above 0"),
        (lambda: T.OneCycleLR(0.1), "total_steps, or epochs and steps_per_epoch"),
        (lambda: T.OneCycleLR(0.1, 10, pct_start=1), r"pct_start must be a float in \[0, 1\], got 1"),
        (lambda: T.OneCycleLR(0.1, 10.0), "total_steps must be an integer above 0, got 10.0"),
        (lambda: T.CosineAnnealingWarmRestarts(0, base_lr=0.1), "T_0 must be an integer of at least 1, got 0"),
        (lambda: T.CosineAnnealingWarmRestarts(2, 1.5, base_lr=0.1), "T_mult must be an integer of at least 1"),
        (lambda: T.CosineAnnealingWarmRestarts(2, eta_min=None, base_lr=0.1), "eta_min must be a float or int"),
        (lambda: T.LambdaLR([], base_lr=0.1), "at least one value"),
        (lambda: T.LambdaLR([1.0, 2.0], num_steps=3, base_lr=0.1), "num_steps must be left out or 2"),
        (lambda: T.LambdaLR(lambda t: math.inf, num_steps=3, base_lr=0.1), r"lr_lambda\(0\) must be finite"),
    ],
)
def test_refused(function: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        quietly(function)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda: T.LambdaLR(abs, base_lr=0.1), "num_steps is missing"),
        (lambda: T.LambdaLR(3, base_lr=0.1), "must be a function or its values in a list, got 3"),
        (lambda: T.MultiStepLR(3, base_lr=0.1), "milestones must be a list of steps, got 3"),
        (lambda: T.SequentialLR([0.1], []), r"schedulers\[0\] must be a schedule, got 0.1"),
        (lambda: T.StepLR(3, base_lr=None), "base_lr must be a number, got None"),
        (lambda: T.OneCycleLR([0.1, 0.2], 10), r"max_lr must be a number, got \[0.1, 0.2\]"),
    ],
)
def test_refused_types(function: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        function()


@pytest.mark.parametrize("condition", [lambda t: t < 2, lambda t: np.bool_(t < 2)])
def test_a_condition_is_a_factor(condition: Any) -> None:
    live = run(build(("LambdaLR", {"lr_lambda": condition}), optimizer(0.1)), 4)
    schedule = T.LambdaLR(condition, num_steps=4, base_lr=0.1)
    assert schedule(range(4)).tolist() == live.rates == [0.1, 0.1, 0.0, 0.0]
    assert schedule == T.LambdaLR([1.0, 1.0, 0.0, 0.0], base_lr=0.1)


def test_bounds_kept_in_the_group_are_overwritten() -> None:
    first = quietly(T.OneCycleLR, 0.1, 10)
    second = quietly(T.OneCycleLR, 0.2, 10)
    with pytest.raises(ValueError, match=r"keeps the bounds of .* in the parameter group"):
        T.SequentialLR([first, second], [10])
    assert quietly(T.SequentialLR, [first, first], [10])([0, 10]).tolist() == [first(0)] * 2


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda: T.StepLR(0, base_lr=0.1), "raises ZeroDivisionError at the step to update 1.*; use step_size >= 1"),
        (lambda: T.StepLR(2.5, base_lr=0.1), "every 5 updates; use an integer"),
        (lambda: T.MultiStepLR([-1, 3, 2.5], base_lr=0.1), r"no update equals the milestones \[-1, 2.5\]"),
        (lambda: T.ConstantLR(0.0, 4, base_lr=0.1), "ZeroDivisionError at the step to update 4"),
        (lambda: T.ConstantLR(0.5, 0, base_lr=0.1), "update total_iters=0, which never comes"),
        (lambda: T.LinearLR(0.5, total_iters=0, base_lr=0.1), "stays at start_factor for total_iters=0"),
        (lambda: T.PolynomialLR(0, base_lr=0.1), "stays at base_lr for total_iters=0"),
        (lambda: T.PolynomialLR(3, -1.0, base_lr=0.1), "ZeroDivisionError at the step to update 3"),
        (lambda: T.ExponentialLR(-0.5, base_lr=0.1), "turns negative: gamma=-0.5 .* at every update"),
        (lambda: T.StepLR(3, -0.5, base_lr=0.1), "turns negative: gamma=-0.5 .* at every stair"),
        (lambda: T.MultiStepLR([3], -0.5, base_lr=0.1), "turns negative: gamma=-0.5 .* at every milestone"),
        (lambda: T.CosineAnnealingLR(9, base_lr=0.1), "comes back to base_lr after update T_max=9"),
        (lambda: T.CosineAnnealingLR(0, base_lr=0.1), "ZeroDivisionError at the step to update 1"),
        (lambda: T.CyclicLR(0.1, 0.2, mode="exp_range", gamma=1.1), "cycles grow by gamma=1.1"),
        (lambda: T.OneCycleLR(0.1, 10), "ValueError at the step to update 11, .*; stop after 10 updates"),
        (lambda: T.OneCycleLR(0.1, 10, pct_start=1.0), "ZeroDivisionError at the step to update 10"),
        (lambda: T.OneCycleLR(0.1, 10, pct_start=0.7, three_phase=True), "never comes down"),
        (lambda: T.LambdaLR([1.0, -1.0], base_lr=0.1), "negative at update 1"),
        (lambda: T.MultiplicativeLR([9.0, 1.0, -1.0], base_lr=0.1), "negative at update 2"),
    ],
)
def test_odd_but_run_as_torch_runs_it(function: Any, message: str) -> None:
    with pytest.warns(ScheduleWarning, match=message) as caught:
        function()
    assert len(caught) == 1


def test_resumed_is_of_a_library() -> None:
    with pytest.raises(TypeError, match=r"use \.shifted\(-updates\)"):
        T.Resumed(schedules.constant(0.1), 3)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"ReduceLROnPlateau cannot be a part of torch\.Resumed"):
        T.Resumed(T.ReduceLROnPlateau(base_lr=0.1), 3)
    with pytest.raises(ValueError, match="updates must be at least 0, got -1"):
        T.Resumed(schedules.torch.CyclicLR(0.1, 0.2), -1)


def test_every_scheduler_of_torch_is_here() -> None:
    assert set(lr_scheduler.__all__) - {"LRScheduler"} <= set(T.__all__)
