"""Random schedules against torch's own schedulers, stepped: every class, compositions, momenta, errors."""

from __future__ import annotations

import math
import pickle
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from live_torch import COMPOSITIONS, TOLERANCE, Config, assert_same, build, optimizer, ours, quietly, run
from torch.optim import lr_scheduler

from fused_sched import schedules
from fused_sched._warnings import ScheduleWarning
from fused_sched.schedules import Schedule

UPDATES = 130


def examples(number: int) -> settings:
    return settings(max_examples=number, deadline=None, suppress_health_check=[HealthCheck.too_slow])


rates = st.floats(1e-6, 10.0)
fractions = st.floats(0.0, 1.0, allow_subnormal=False)
factors = st.one_of(st.sampled_from([0.0, 0.1, 0.5, 1.0]), st.floats(0.2, 1.05), st.floats(-1.0, -0.2))
lengths = st.one_of(st.integers(1, 60), st.sampled_from([-3, 0, 1, 2, UPDATES - 2, UPDATES - 1, UPDATES, 2.5, 7.0]))
whole_lengths = st.integers(1, 60)
powers = st.one_of(st.sampled_from([0.0, 0.5, 1.0, 2.0, -1.0]), st.floats(0.1, 4.0))


def functions() -> st.SearchStrategy[Any]:
    return st.sampled_from(
        [lambda t: 0.95**t, lambda t: 1 / (t + 1), lambda t: 0.5 * (1 + math.cos(t / 9)), lambda t: 1 if t < 50 else 0]
    )


def config(name: str, **arguments: st.SearchStrategy[Any]) -> st.SearchStrategy[Config]:
    """Any of the arguments may be left at its default."""
    required = {"lr_lambda", "step_size", "milestones", "gamma_", "T_max", "T_0", "base_lr", "max_lr", "total_steps"}
    given_always = {key.rstrip("_"): value for key, value in arguments.items() if key in required}
    optional = {key: value for key, value in arguments.items() if key not in required}
    return st.tuples(st.just(name), st.fixed_dictionaries(given_always, optional=optional))


STEP = config("StepLR", step_size=lengths, gamma=factors)
MULTI_STEP = config("MultiStepLR", milestones=st.lists(st.integers(-2, 140), max_size=12), gamma=factors)
CONSTANT = config("ConstantLR", factor=fractions, total_iters=lengths)
LINEAR = config("LinearLR", start_factor=st.floats(1e-4, 1.0), end_factor=fractions, total_iters=lengths)
EXPONENTIAL = config("ExponentialLR", gamma_=factors)
POLYNOMIAL = config("PolynomialLR", total_iters=lengths, power=powers)
COSINE = config("CosineAnnealingLR", T_max=st.integers(-5, 200), eta_min=st.floats(0.0, 0.5))
LAMBDA = config("LambdaLR", lr_lambda=functions())
MULTIPLICATIVE = config("MultiplicativeLR", lr_lambda=functions())
RESTARTS = config(
    "CosineAnnealingWarmRestarts", T_0=whole_lengths, T_mult=st.integers(1, 4), eta_min=st.floats(0.0, 0.5)
)
momenta = {"base_momentum": st.floats(0.5, 0.85), "max_momentum": st.floats(0.85, 0.99)}
CYCLIC = config(
    "CyclicLR",
    base_lr=rates,
    max_lr=rates,
    step_size_up=whole_lengths,
    step_size_down=st.integers(0, 60),
    mode=st.sampled_from(["triangular", "triangular2", "exp_range"]),
    gamma=st.floats(0.9, 1.01),
    cycle_momentum=st.booleans(),
    **momenta,
)
ONE_CYCLE = config(
    "OneCycleLR",
    max_lr=rates,
    total_steps=st.one_of(st.integers(1, UPDATES + 5), st.sampled_from([UPDATES - 2, UPDATES - 1, UPDATES])),
    pct_start=st.one_of(fractions, st.sampled_from([0.0, 0.25, 0.5, 1.0])),
    anneal_strategy=st.sampled_from(["cos", "linear"]),
    cycle_momentum=st.booleans(),
    div_factor=st.floats(1.0, 100.0),
    final_div_factor=st.floats(1.0, 1e5),
    three_phase=st.booleans(),
    **momenta,
)
FACTORS = st.one_of(STEP, MULTI_STEP, CONSTANT, LINEAR, EXPONENTIAL, POLYNOMIAL, MULTIPLICATIVE)
SETTERS = st.one_of(COSINE, LAMBDA, RESTARTS, CYCLIC, ONE_CYCLE)


def outcome(function: Any, *args: Any) -> Any:
    """The result or, if it raises, the exception."""
    try:
        return function(*args)
    except Exception as error:
        return error


def assert_same_as_torch(config: Config, base_lr: float, tolerance: float = TOLERANCE) -> None:
    live = outcome(build, config, optimizer(base_lr))
    schedule = outcome(quietly, ours, config, base_lr, UPDATES)
    if isinstance(live, Exception) or isinstance(schedule, Exception):
        assert type(schedule) is type(live), (schedule, live)
        return
    done = run(live, UPDATES)
    assert_same(schedule, done, UPDATES, tolerance)
    failure = schedule.failure()
    if failure is not None and failure.update < UPDATES:
        assert (failure.update, failure.error) == (len(done.rates), type(done.error).__name__)
    else:
        assert done.error is None
    assert_survives(schedule)


def assert_survives(schedule: Schedule) -> None:
    """Storage, and what is written about it."""
    again = (
        quietly(Schedule.from_dict, schedule.to_dict()),
        quietly(eval, repr(schedule), vars(schedules) | {"inf": math.inf}),
        pickle.loads(pickle.dumps(schedule)),
    )
    for other in again:
        assert other == schedule
        assert other.program == schedule.program


@examples(300)
@given(st.one_of(FACTORS, SETTERS), rates)
def test_every_class(config: Config, base_lr: float) -> None:
    assert_same_as_torch(config, base_lr)


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


@pytest.mark.parametrize("three_phase", [False, True])
@pytest.mark.parametrize("pct_start", [0.0, 0.05, 0.1, 0.3, 0.5, 0.55, 0.6, 0.75, 0.95, 1.0])
@pytest.mark.parametrize("total_steps", [1, 2, 3, 10, 20, 40])
def test_the_ends_of_one_cycle(total_steps: int, pct_start: float, three_phase: bool) -> None:
    """Among them a first phase of no length, which the constructor refuses, and a last one, which fails at its step."""
    for strategy in ("cos", "linear"):
        arguments = {"max_lr": 0.1, "total_steps": total_steps, "pct_start": pct_start, "three_phase": three_phase}
        assert_same_as_torch(("OneCycleLR", {**arguments, "anneal_strategy": strategy}), 0.1)


@pytest.mark.parametrize("name", ["ConstantLR", "LinearLR", "PolynomialLR", "StepLR", "CosineAnnealingLR", "CyclicLR"])
@pytest.mark.parametrize("steps", [-2, -1, 0, 1, 2, 3, 2.5])
def test_degenerate_lengths(name: str, steps: float) -> None:
    length = {"StepLR": "step_size", "CosineAnnealingLR": "T_max", "CyclicLR": "step_size_up"}.get(name, "total_iters")
    arguments = {length: steps} | ({"base_lr": 0.1, "max_lr": 0.2} if name == "CyclicLR" else {})
    if name == "CyclicLR" and steps < 0:
        with pytest.raises(ValueError, match="from_callable"):
            ours((name, arguments), 0.1, 1)
        return
    assert_same_as_torch((name, arguments), 0.1)
    if name == "PolynomialLR":
        assert_same_as_torch((name, {**arguments, "power": -1.0}), 0.1)
    if name == "ConstantLR":
        assert_same_as_torch((name, {**arguments, "factor": 0.0}), 0.1)


@pytest.mark.parametrize(
    "config",
    [
        ("StepLR", {"step_size": 1, "gamma": 0.9999}),
        ("ExponentialLR", {"gamma": 0.99999}),
        ("MultiStepLR", {"milestones": list(range(0, 100_000, 1000)), "gamma": 0.9}),
        ("ConstantLR", {"factor": 0.3, "total_iters": 50_000}),
        ("LinearLR", {"start_factor": 0.001, "total_iters": 100_000}),
        ("LinearLR", {"start_factor": 1.0, "end_factor": 0.0, "total_iters": 99_999}),
        ("PolynomialLR", {"total_iters": 100_000, "power": 0.5}),
        ("CosineAnnealingLR", {"T_max": 100_000}),
        ("CosineAnnealingLR", {"T_max": 30_000}),
        ("CosineAnnealingWarmRestarts", {"T_0": 7, "T_mult": 3}),
        ("CyclicLR", {"base_lr": 0.001, "max_lr": 0.1, "mode": "triangular2", "step_size_up": 1000}),
        ("OneCycleLR", {"max_lr": 0.1, "total_steps": 99_999}),
    ],
    ids=lambda config: config[0],
)
def test_a_hundred_thousand_steps(config: Config) -> None:
    schedule = quietly(ours, config, 0.1, 1)
    assert_same(schedule, run(build(config, optimizer()), 100_001), 100_001)


@pytest.mark.parametrize(
    ("T_max", "eta_min", "tolerance"),
    [
        # cos(math.pi * t / T) has lost the digits of math.pi * t / T by then: measured 3.5e-11 and 4.5e-11.
        (10, 0.0, 1e-10),
        (1000, 0.0, 1e-10),
        # torch rises from lr - eta_min, which at its first step is 3e-9 of the rate: measured 2.7e-10.
        (30_000, 1e-4, 1e-9),
    ],
)
def test_a_cosine_after_its_minimum(T_max: int, eta_min: float, tolerance: float) -> None:
    config = ("CosineAnnealingLR", {"T_max": T_max, "eta_min": eta_min})
    schedule = quietly(ours, config, 0.1, 1)
    live = run(build(config, optimizer()), 100_001)
    assert_same(schedule, live, 100_001, tolerance)


# Compositions.


@st.composite
def sequences(draw: st.DrawFn) -> Config:
    later = st.one_of(STEP, MULTI_STEP, CONSTANT, LINEAR, EXPONENTIAL, POLYNOMIAL, SETTERS)
    children: list[Config] = [draw(st.one_of(FACTORS, SETTERS)), *draw(st.lists(later, max_size=3))]
    # One of those that keep their bounds in the group, where they overwrite each other's.
    keepers = [child for child in children if child[0] in ("OneCycleLR", "CyclicLR")]
    assume(len(keepers) < 2)
    milestones = sorted(draw(st.integers(-1, 120)) for _ in children[1:])
    started = sum(m <= 0 for m in milestones)
    assume(all(child[0] != "MultiplicativeLR" for child in children[:1]) or started == 0)
    return "SequentialLR", {"schedulers": children, "milestones": milestones}


def initial_lr(config: Config, lr: float) -> float:
    """What the children read: CyclicLR, constructed first, sets the rate; OneCycleLR always."""
    children = config[1]["schedulers"]
    live = outcome(build, config, opt := optimizer(lr))
    assume(not isinstance(live, Exception))
    # A child before a OneCycleLR has read another rate than those after: one number would not do.
    assume(all(name != "OneCycleLR" for name, _ in children[1:]) or len(children) == 1)
    return float(opt.param_groups[0]["initial_lr"])


@examples(150)
@given(sequences(), rates)
def test_sequences(config: Config, lr: float) -> None:
    base_lr = initial_lr(config, lr)
    live = build(config, optimizer(lr))
    schedule = quietly(ours, config, base_lr, UPDATES)
    done = run(live, UPDATES)
    assert_same(schedule, done, UPDATES)
    assert_survives(schedule)
    failure = schedule.failure()
    assert (done.error is None) == (failure is None or failure.update >= UPDATES)
    if done.error is not None:
        assert (failure.update, failure.error) == (len(done.rates), type(done.error).__name__)


def test_one_cycle_after_a_warmup() -> None:
    """torch begins at the initial_lr that OneCycleLR has put into the group."""
    warmup, cycle = ("LinearLR", {"total_iters": 5}), ("OneCycleLR", {"max_lr": 0.5, "total_steps": 50})
    config = ("SequentialLR", {"schedulers": [warmup, cycle], "milestones": [5]})
    live = run(build(config, optimizer(0.1)), 60)
    assert_same(quietly(ours, config, 0.5 / 25, 1), live, 60)
    with pytest.raises(ValueError, match=r"base_lr=0\.02, got 0\.1; torch begins at the group's initial_lr"):
        quietly(ours, config, 0.1, 1)


def test_a_momentum_stays_where_its_phase_left_it() -> None:
    cyclic = ("CyclicLR", {"base_lr": 0.1, "max_lr": 0.3, "step_size_up": 7})
    for children, milestones in (
        ([cyclic, ("ExponentialLR", {"gamma": 0.9})], [10]),
        ([("ExponentialLR", {"gamma": 0.9}), cyclic, ("StepLR", {"step_size": 3})], [10, 15]),
    ):
        config = ("SequentialLR", {"schedulers": children, "milestones": milestones})
        live = run(build(config, optimizer(0.1)), 40)
        assert len(set(live.momenta)) > 3
        assert_same(ours(config, 0.1, 1), live, 40)


STAIRS = st.lists(st.one_of(STEP, MULTI_STEP, CONSTANT, LINEAR), min_size=1, max_size=3)


@examples(60)
@given(st.lists(FACTORS, min_size=1, max_size=4), rates)
def test_products(children: list[Config], lr: float) -> None:
    assert_same_as_torch(("ChainedScheduler", {"schedulers": children}), lr)


@examples(60)
@given(STAIRS, SETTERS, st.integers(1, 100), rates)
def test_a_product_to_begin_with(children: list[Config], last: Config, milestone: int, lr: float) -> None:
    assume(last[0] not in ("OneCycleLR", "CyclicLR"))
    chain = ("ChainedScheduler", {"schedulers": children})
    assert_same_as_torch(("SequentialLR", {"schedulers": [chain, last], "milestones": [milestone]}), lr)


@pytest.mark.parametrize("composition", sorted(COMPOSITIONS))
def test_a_composition_later_fails_at_its_milestone(composition: str) -> None:
    child = ("StepLR", {"step_size": 3})
    inner = (composition, {"schedulers": [child], **({"milestones": []} if composition == "SequentialLR" else {})})
    assert_same_as_torch(("SequentialLR", {"schedulers": [child, inner], "milestones": [7]}), 0.1)


@examples(60)
@given(st.lists(FACTORS, min_size=1, max_size=3), st.integers(0, 3), st.integers(UPDATES - 1, 1000), rates)
def test_products_with_a_cosine(children: list[Config], at: int, T_max: int, lr: float) -> None:
    children.insert(at, ("CosineAnnealingLR", {"T_max": T_max}))
    assert_same_as_torch(("ChainedScheduler", {"schedulers": children}), lr)


@pytest.mark.parametrize("T_max", [1, 2, 20, 21, 50])
@pytest.mark.parametrize("at", [0, 1, 2])
def test_a_cosine_that_begins_anew_when_the_others_have_ended(T_max: int, at: int) -> None:
    length = {"total_iters": min(T_max, 20)}
    children: list[Config] = [("LinearLR", length), ("MultiStepLR", {"milestones": [1, T_max], "gamma": 0.5})]
    children.insert(at, ("CosineAnnealingLR", {"T_max": T_max}))
    assert_same_as_torch(("ChainedScheduler", {"schedulers": children}), 0.1)


def test_a_cosine_that_begins_anew_while_others_go_on_stays_at_zero() -> None:
    children = [("CosineAnnealingLR", {"T_max": 20}), ("ExponentialLR", {"gamma": 0.9})]
    chain = ("ChainedScheduler", {"schedulers": children})
    live = run(build(chain, optimizer()), 21)
    parts = [quietly(ours, child, 0.1, 1) for child in children]
    with pytest.warns(ScheduleWarning, match="from update 21 on torch adds .* stays at 0; train for 20 updates"):
        schedule = schedules.torch.ChainedScheduler(parts)
    assert_same(schedule, live, 21)
    assert schedule([20, 21, 1000]).tolist() == [0.0, 0.0, 0.0]


def test_chains_in_a_chain_are_one() -> None:
    step, exponential = ("StepLR", {"step_size": 3}), ("ExponentialLR", {"gamma": 0.9})
    inner = ("ChainedScheduler", {"schedulers": [step, exponential]})
    assert_same_as_torch(("ChainedScheduler", {"schedulers": [exponential, inner]}), 0.1)


def test_a_chain_of_one_is_that() -> None:
    config = ("CyclicLR", {"base_lr": 0.1, "max_lr": 0.3, "step_size_up": 7})
    assert_same_as_torch(("ChainedScheduler", {"schedulers": [config]}), 0.1)


# What is refused, and what is said.

T = schedules.torch
STEP_OURS = T.StepLR(3, base_lr=0.1)
TABLE = T.LambdaLR([1.0, 0.5], base_lr=0.1)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda: T.ChainedScheduler([TABLE, STEP_OURS]), "torch.LambdaLR.* which sets the rate; .*from_callable"),
        (lambda: T.ChainedScheduler([STEP_OURS, T.StepLR(3, base_lr=0.2)]), r"same base_lr, got \[0.1, 0.2\]"),
        (lambda: T.ChainedScheduler([]), "at least one schedule"),
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
        (lambda: T.ExponentialLR(-0.5, base_lr=0.1), "changes the rate's sign"),
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


def test_every_scheduler_of_torch_is_here() -> None:
    assert set(lr_scheduler.__all__) - {"LRScheduler"} <= set(T.__all__)
