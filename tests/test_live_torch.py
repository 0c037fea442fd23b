"""Random schedules against torch's own schedulers, stepped: every class, compositions, momenta, errors."""

from __future__ import annotations

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from live_torch import (
    COMPOSITIONS,
    Config,
    assert_same,
    assert_survives,
    build,
    optimizer,
    ours,
    outcome,
    quietly,
    run,
)
from tolerances import TORCH_COSINE_DRIFT
from torch_configs import (
    CONSTANT,
    FACTORS,
    LINEAR,
    MULTI_STEP,
    SETTERS,
    STEP,
    UPDATES,
    examples,
    rates,
    sequences,
)

from fused_sched import schedules
from fused_sched._warnings import ScheduleWarning


def assert_same_as_torch(config: Config, base_lr: float) -> None:
    live = outcome(build, config, optimizer(base_lr))
    schedule = outcome(quietly, ours, config, base_lr, UPDATES)
    if isinstance(live, Exception) or isinstance(schedule, Exception):
        assert type(schedule) is type(live), (schedule, live)
        return
    done = run(live, UPDATES)
    assert_same(schedule, done, UPDATES)
    failure = schedule.failure()
    if failure is not None and failure.update < UPDATES:
        assert (failure.update, failure.error) == (len(done.rates), type(done.error).__name__)
    else:
        assert done.error is None
    assert_survives(schedule)


@examples(300)
@given(st.one_of(FACTORS, SETTERS), rates)
def test_every_class(config: Config, base_lr: float) -> None:
    assert_same_as_torch(config, base_lr)


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


@pytest.mark.parametrize(("T_max", "eta_min"), TORCH_COSINE_DRIFT)
def test_a_cosine_after_its_minimum(T_max: int, eta_min: float) -> None:
    config = ("CosineAnnealingLR", {"T_max": T_max, "eta_min": eta_min})
    schedule = quietly(ours, config, 0.1, 1)
    live = run(build(config, optimizer()), 100_001)
    assert_same(schedule, live, 100_001, TORCH_COSINE_DRIFT[T_max, eta_min])


# Compositions.


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
@given(st.lists(FACTORS, min_size=1, max_size=3), st.integers(0, 3), st.integers(1, 2 * UPDATES), rates)
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


@pytest.mark.parametrize("cosine_is_first", [True, False])
@pytest.mark.parametrize(
    ("T_max", "others"),
    [
        (53, [("StepLR", {"step_size": 77})]),
        (219, [("ExponentialLR", {"gamma": 0.99})]),
        (50, [("StepLR", {"step_size": 7, "gamma": 0.0})]),
        (50, [("MultiStepLR", {"milestones": [9, 51, 51, 151, 700], "gamma": 0.0})]),
        (50, [("ConstantLR", {"factor": 0.25, "total_iters": 151})]),
        (50, [("ConstantLR", {"factor": 0.0, "total_iters": 301})]),
        (25, [("LinearLR", {"start_factor": 0.1, "end_factor": 0.0, "total_iters": 501})]),
        (10, [("PolynomialLR", {"total_iters": 333.5, "power": 0.5}), ("StepLR", {"step_size": 4, "gamma": -0.5})]),
        (30, [("MultiplicativeLR", {"lr_lambda": lambda t: 0.0 if t % 100 == 91 else 0.98})]),
    ],
)
def test_a_cosine_that_begins_anew_while_others_go_on(T_max: int, others: list[Config], cosine_is_first: bool) -> None:
    cosine = ("CosineAnnealingLR", {"T_max": T_max})
    chain = ("ChainedScheduler", {"schedulers": [cosine, *others] if cosine_is_first else [*others, cosine]})
    assert_same(quietly(ours, chain, 0.1, 1000), run(build(chain, optimizer()), 1000), 1000)


def test_a_cosine_that_begins_anew_while_others_go_on_is_said() -> None:
    parts = [
        quietly(ours, child, 0.1, 1) for child in (("CosineAnnealingLR", {"T_max": 20}), ("StepLR", {"step_size": 9}))
    ]
    with pytest.warns(ScheduleWarning, match="from update 21 on torch begins the cosine anew .* train for 20 updates"):
        schedules.torch.ChainedScheduler(parts)


def test_chains_in_a_chain_are_one() -> None:
    step, exponential = ("StepLR", {"step_size": 3}), ("ExponentialLR", {"gamma": 0.9})
    inner = ("ChainedScheduler", {"schedulers": [step, exponential]})
    assert_same_as_torch(("ChainedScheduler", {"schedulers": [exponential, inner]}), 0.1)


def test_a_chain_of_one_is_that() -> None:
    config = ("CyclicLR", {"base_lr": 0.1, "max_lr": 0.3, "step_size_up": 7})
    chain = ("ChainedScheduler", {"schedulers": [config]})
    assert_same_as_torch(chain, 0.1)
    assert_same_as_torch(
        ("SequentialLR", {"schedulers": [chain, ("StepLR", {"step_size": 9})], "milestones": [30]}), 0.1
    )
