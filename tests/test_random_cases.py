"""Groups, options and schedules drawn at random: within bounds of the oracle."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from cases import BETA1, BETA2, BETA_LOW, DECAY, LR, LR_STAIRS, Case, Tensors
from conftest import Backend
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle_check import check_against_oracle


@st.composite
def random_cases(draw: st.DrawFn) -> Case:
    beta = st.one_of(st.floats(0.0, 0.99), st.sampled_from([BETA1, BETA2, BETA_LOW]))
    options = st.fixed_dictionaries(
        {
            "lr": st.one_of(st.floats(1e-4, 1e-1), st.sampled_from([LR, LR_STAIRS])),
            "betas": st.tuples(beta, beta),
            "weight_decay": st.one_of(st.floats(0.0, 0.5), st.just(DECAY)),
            "eps": st.sampled_from([1e-8, 1e-4]),
            "decoupled_weight_decay": st.booleans(),
            "amsgrad": st.booleans(),
            "maximize": st.booleans(),
        }
    )
    shapes = st.lists(st.lists(st.integers(0, 9), max_size=3).map(tuple), min_size=1, max_size=4).map(tuple)
    kinds = st.builds(Tensors, shapes, st.sampled_from(["fp32", "fp64"]), st.sampled_from([None, "bf16", "fp64"]))
    groups = st.lists(st.tuples(st.lists(kinds, min_size=1, max_size=3).map(tuple), options), min_size=1, max_size=3)
    return Case(f"random {draw(st.integers(0, 999))}", tuple(draw(groups)))


@pytest.mark.parametrize("name", ["reference", "cpu"])
def test_random_groups_and_schedules_match_the_oracle(name: str, get_backend: Callable[[str], Backend]) -> None:
    backend = get_backend(name)

    @settings(max_examples=40, deadline=None, derandomize=True, database=None)
    @given(random_cases())
    def check(case: Case) -> None:
        check_against_oracle(case, backend)

    check()
