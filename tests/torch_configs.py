"""Random configurations of torch's schedulers, degenerate ones among them."""

from __future__ import annotations

import math
from typing import Any

from hypothesis import HealthCheck, assume, settings
from hypothesis import strategies as st
from live_torch import Config

UPDATES = 130


def examples(number: int) -> settings:
    return settings(max_examples=number, deadline=None, suppress_health_check=[HealthCheck.too_slow])


rates = st.floats(1e-6, 10.0)
# Not 1e-200: rates that underflow have no digits left to compare.
fractions = st.one_of(st.sampled_from([0.0, 1.0]), st.floats(1e-4, 1.0))
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
