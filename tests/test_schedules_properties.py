"""Laws of the combinators, over schedules that hypothesis composes."""

from __future__ import annotations

import pickle

import numpy as np
from core_library import core
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from fused_sched import reference_schedule, schedules
from fused_sched.schedules import Schedule

EPS = np.finfo(float).eps
values = st.floats(-10.0, 10.0, allow_subnormal=False).map(lambda x: 0.0 if abs(x) < 1e-9 else x)
steps = st.integers(1, 60)
SHOWN = np.arange(150)


def _recipe(recipe: type[Schedule]) -> st.SearchStrategy[Schedule]:
    return st.builds(
        lambda peak, warmup, rest, end: recipe(peak, warmup_steps=warmup, total_steps=warmup + rest, end=end),
        values,
        st.integers(0, 20),
        steps,
        values,
    )


leaves: st.SearchStrategy[Schedule] = st.one_of(
    st.builds(schedules.constant, values),
    st.builds(schedules.linear, values, values, steps),
    st.builds(schedules.cosine, values, values, steps),
    st.builds(schedules.polynomial, values, values, steps, power=st.floats(0.3, 3.0)),
    st.builds(schedules.exponential, values, st.floats(0.9, 1.01), steps),
    st.builds(schedules.inverse_sqrt, values, steps),
    st.builds(schedules.step_decay, values, st.floats(0.1, 1.0), steps),
    st.builds(schedules.table, st.lists(values, min_size=1, max_size=20)),
    _recipe(schedules.warmup_linear),
    _recipe(schedules.warmup_cosine),
)


@st.composite
def joins(draw: st.DrawFn, phases: st.SearchStrategy[Schedule]) -> Schedule:
    children = draw(st.lists(phases, min_size=1, max_size=4))
    lengths = [draw(steps) for _ in children[1:]]
    return schedules.join(children, [int(b) for b in np.cumsum(lengths)])


def retimed(inner: st.SearchStrategy[Schedule]) -> st.SearchStrategy[Schedule]:
    return st.one_of(
        joins(inner),
        st.builds(lambda s, n: s.shifted(n), inner, st.integers(-50, 50)),
        st.builds(lambda s, p, n: s.repeat(p, n), inner, steps, st.none() | st.integers(1, 5)),
    )


def combined(inner: st.SearchStrategy[Schedule]) -> st.SearchStrategy[Schedule]:
    return st.one_of(
        retimed(inner),
        st.builds(lambda a, b: a * b, inner, inner),
        st.builds(lambda s, c: s.scaled(c), inner, values),
    )


retimed_leaves = st.recursive(leaves, retimed, max_leaves=8)
any_schedule = st.recursive(leaves, combined, max_leaves=8)
# The first call compiles, and a machine under load is slow: neither is what these tests are about.
property_test = settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow])


@property_test
@given(any_schedule)
def test_every_way_of_storing_a_schedule_rebuilds_it(schedule: Schedule) -> None:
    namespace = {name: getattr(schedules, name) for name in schedules.__all__}
    for other in (
        eval(repr(schedule), namespace),
        Schedule.from_dict(schedule.to_dict()),
        pickle.loads(pickle.dumps(schedule)),
    ):
        assert other == schedule
        assert hash(other) == hash(schedule)
        assert other(SHOWN).tolist() == schedule(SHOWN).tolist()


@property_test
@given(joins(any_schedule))
def test_phases_begin_and_end_at_their_boundaries(joined: Schedule) -> None:
    assert isinstance(joined, schedules.join)
    begins = (0, *joined.boundaries)
    for phase, begin, end in zip(joined.schedules, begins, (*joined.boundaries, begins[-1] + 99), strict=True):
        for t in {begin, begin + 1, end - 1} & set(range(begin, end)):
            assert joined(t) == phase(t - begin)


@property_test
@given(any_schedule, st.integers(-50, 50))
def test_shifted(schedule: Schedule, n: int) -> None:
    assert schedule.shifted(n)(SHOWN).tolist() == schedule(np.maximum(0, SHOWN - n)).tolist()


@property_test
@given(any_schedule, values)
def test_scaled(schedule: Schedule, factor: float) -> None:
    assert schedule.scaled(factor)(SHOWN).tolist() == (factor * schedule(SHOWN) + 0.0).tolist()


@property_test
@given(any_schedule, any_schedule, any_schedule)
def test_products_multiply_left_to_right(a: Schedule, b: Schedule, c: Schedule) -> None:
    assert (a * b)(SHOWN).tolist() == (a(SHOWN) * b(SHOWN)).tolist()
    assert ((a * b) * c)(SHOWN).tolist() == (a(SHOWN) * b(SHOWN) * c(SHOWN)).tolist()
    assert (a * (b * c))(SHOWN).tolist() == (a(SHOWN) * (b(SHOWN) * c(SHOWN))).tolist()


@property_test
@given(any_schedule, steps, st.none() | st.integers(1, 5))
def test_repeat(schedule: Schedule, period: int, times: int | None) -> None:
    repeated = schedule.repeat(period, times)
    over = period * times <= SHOWN if times is not None else np.zeros(SHOWN.shape, bool)
    assert repeated(SHOWN).tolist() == schedule(np.where(over, period, SHOWN % period)).tolist()


@property_test
@given(any_schedule)
def test_a_held_value_does_not_change(schedule: Schedule) -> None:
    end = schedule.held_from()
    assume(end is not None)
    last = schedule(end)
    assert schedule([end + 1, end + 63, end + 10**6]).tolist() == [last] * 3


@property_test
@given(any_schedule)
def test_the_reference_is_a_value_of_the_schedule(schedule: Schedule) -> None:
    shown = schedule(np.arange(4000))
    assert schedule.reference in shown


@property_test
@given(joins(leaves))
def test_the_reference_of_phases_is_their_peak(schedule: Schedule) -> None:
    last = schedule.schedules[-1]  # type: ignore[attr-defined]
    assume(last.held_from() is not None)
    shown = schedule(np.arange(400))
    assert schedule.reference == (shown.max() if (shown > 0.0).any() else shown.min())


@property_test
@given(retimed_leaves)
def test_the_plain_python_evaluator_agrees_with_the_core(schedule: Schedule) -> None:
    tree = schedule.lower()
    compiled = core().evaluate(schedule.program, SHOWN)
    plain = np.array([reference_schedule.value(tree, float(t)) for t in SHOWN])
    # An ulp of each side's pow or cos, through one multiplication and one addition of numbers up to 20, or
    # relative to an exponential that has grown beyond.
    assert np.abs(plain - compiled).max() <= 2 * EPS * max(20.0, float(np.abs(compiled).max()))
