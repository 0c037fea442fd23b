"""What is read off a tree (peak, end, phases) against walking through the steps."""

from __future__ import annotations

from math import inf

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import ROUNDING

from fused_sched import landmarks
from fused_sched.program import Clamp, Clock, Curve, Join, Product, Repeat, Sum, Tree, evaluate, pack
from fused_sched.schedules.nodes import after, falling, flat, half_cosine, in_turn, levels, line, phases

SHOWN = np.arange(400)
rates = st.floats(-1.0, 1.0).map(lambda x: round(x, 6))
steps = st.integers(1, 60)


def _monotone(start: float, end: float, length: int, curve: str) -> Curve:
    return Curve(curve, limit=float(length), divisor=float(length), p=0.5, offset=start, scale=end - start)


leaves: st.SearchStrategy[Tree] = st.one_of(
    st.builds(flat, rates),
    st.builds(_monotone, rates, rates, steps, st.sampled_from(["power", "cosine", "exponential"])),
    st.builds(half_cosine, rates, rates, steps),  # which rises again
    st.lists(rates, min_size=1, max_size=9).map(lambda values: Curve("table", table=tuple(values))),
    st.lists(rates, min_size=1, max_size=6).map(lambda values: levels(values, range(5, 5 * len(values), 5))),
)


def _composed(inner: st.SearchStrategy[Tree]) -> st.SearchStrategy[Tree]:
    def joined(children: list[Tree], lengths: list[int]) -> Tree:
        return in_turn(children, np.cumsum(lengths[: len(children) - 1]).tolist())

    return st.one_of(
        st.builds(joined, st.lists(inner, min_size=1, max_size=3), st.lists(steps, min_size=3, max_size=3)),
        st.builds(Clock, inner, addend=st.integers(-30, 30).map(float)),
        st.builds(Clock, inner, every=st.integers(2, 7).map(float)),
        st.builds(Repeat, inner, period=steps.map(float), times=st.integers(0, 4).map(float)),
        st.builds(Clamp, inner, scale=rates),
    )


trees = st.recursive(leaves, _composed, max_leaves=6)
property_test = settings(deadline=None, max_examples=150)


@property_test
@given(trees)
def test_the_largest_and_the_smallest_value_are_among_the_extremes(tree: Tree) -> None:
    program = pack(tree)
    candidates = sorted(landmarks.extremes(tree, len(SHOWN)))
    assert set(candidates) <= set(SHOWN.tolist())
    # The crests of a wave differ by the rounding of t / length, t being 400 at most.
    found, shown = evaluate(program, candidates), evaluate(program, SHOWN)
    rounding = ROUNDING * np.abs(shown).max()
    assert found.max() >= shown.max() - rounding
    assert found.min() <= shown.min() + rounding


def test_a_wave_in_a_cycle_entered_in_the_middle_has_turns_left() -> None:
    """Random trees find this once in some thousand."""
    wave = Repeat(half_cosine(0.0, 1.0, 2), period=12.0, times=1.0)
    for addend in (3.0, 7.0):
        shifted = Clock(wave, addend=addend)
        assert evaluate(pack(shifted), sorted(landmarks.extremes(shifted, 40))).max() == 1.0


def test_landmarks_beyond_all_whole_doubles_are_at_the_last_of_them() -> None:
    assert landmarks.extremes(line(0.0, 1.0, 1e300, origin=1e300)) == {0, 2**53}


@property_test
@given(trees)
def test_nothing_changes_after_the_end(tree: Tree) -> None:
    end = landmarks.held_from(tree)
    if end is not None:
        values = evaluate(pack(tree), [end, end + 1, end + 50, 10**9])
        assert (values == values[0]).all()


@property_test
@given(trees)
def test_values_jump_at_phases_only_if_at_all(tree: Tree) -> None:
    starts = landmarks.phase_starts(tree, len(SHOWN))
    assert starts == sorted(set(starts))
    assert all(0 < start < len(SHOWN) for start in starts)


@pytest.mark.parametrize(
    ("tree", "expected"),
    [
        (phases([line(0.0, 1.0, 10.0), flat(1.0), falling(1.0, 0.0, 20.0, origin=50.0)], [10.0, 50.0]), [10, 50]),
        (phases([line(0.0, 1.0, 10.0), flat(1.0)], [after(10.0)]), [11]),  # its last step is 10
        (Clock(phases([flat(1.0), flat(2.0)], [30.0]), multiplier=8.0), [4]),  # 8 samples per update
        (Clock(phases([flat(1.0), flat(2.0)], [3.0]), every=10.0), [30]),
        (Clock(phases([flat(1.0), flat(2.0)], [2.5]), every=10.0), [30]),  # the first epoch past 2.5
        (Repeat(line(0.0, 1.0, 100.0), period=100.0, growth=2.0), [100, 300]),
        (Product((flat(1.0), phases([flat(1.0), flat(2.0)], [7.0]))), [7]),
        (flat(1.0), []),
    ],
)
def test_where_phases_begin(tree: Tree, expected: list[int]) -> None:
    assert landmarks.phase_starts(tree, 400) == expected


@pytest.mark.parametrize(
    ("tree", "expected"),
    [
        (flat(0.5), 0),
        (line(0.0, 1.0, 10.0), None),
        (_monotone(0.0, 1.0, 10, "power"), 10),
        (levels([1.0, 0.5, 0.25], [30, 80]), 80),
        (Curve("table", table=(3.0, 2.0, 1.0)), 2),
        (Sum((_monotone(0.0, 1.0, 10, "power"), _monotone(0.0, 1.0, 30, "power"))), 30),
        (Repeat(_monotone(0.0, 1.0, 10, "power"), period=10.0, growth=2.0, times=3.0), 70),
        (Repeat(flat(1.0), period=10.0, gain=0.5), None),
        (Clock(_monotone(0.0, 1.0, 10, "power"), multiplier=4.0), 3),
        (Clock(_monotone(0.0, 1.0, 10, "power"), multiplier=0.0), 0),
        (Clock(phases([flat(1.0), flat(2.0)], [2.5]), every=10.0), 30),
        (Join((flat(1.0), _monotone(0.0, 1.0, 10, "power")), ends=(100.0,), origins=(0.0, 100.0)), 110),
        (Curve("exponential", stairs=1.0, divisor=30.0, p=0.0), 30),
        (Curve("exponential", p=0.9, limit=inf), None),
    ],
)
def test_where_values_are_held(tree: Tree, expected: int | None) -> None:
    assert landmarks.held_from(tree) == expected


def test_phases_of_no_length_are_left_out() -> None:
    assert phases([line(0.0, 1.0, 1.0), flat(2.0)], [0.0]) == flat(2.0)
    tree = phases([flat(1.0), flat(2.0), flat(3.0)], [5.0, 5.0])
    assert tree == Join((flat(1.0), flat(3.0)), ends=(5.0,), origins=(0.0, 0.0))
