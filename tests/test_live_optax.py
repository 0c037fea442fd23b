"""schedules.optax against the installed library, eager and in double precision, on random configurations."""

from __future__ import annotations

import inspect
import json
import os
import warnings
from collections.abc import Callable
from typing import Any

# XLA divides by a number by multiplying with its reciprocal, which is not what optax's formula says.
os.environ.setdefault("XLA_FLAGS", "--xla_disable_hlo_passes=algsimp")

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import ROUNDING

from fused_sched import schedules
from fused_sched._warnings import ScheduleWarning
from fused_sched.schedules import Schedule
from fused_sched.schedules import optax as ours

try:
    enable_x64 = jax.enable_x64
except AttributeError:  # the newest jax for Python 3.10
    from jax.experimental import enable_x64

Config = dict[str, Any]

NAMES = [name for name in ours.__all__ if name != "OptaxSchedule"]

#: One shape for all, so that jax compiles its operations once.
COUNTS = np.arange(200)

rates = st.floats(1e-6, 1.0)
ends = st.one_of(st.just(0.0), st.floats(-0.1, 1.0))
lengths = st.integers(-1, 90)
begins = st.integers(-3, 40)
factors = st.one_of(st.sampled_from([0.0, 1.0, 0.5, -0.5]), st.floats(0.2, 1.2))
powers = st.one_of(st.sampled_from([1.0, 2.0, 0.0, -1.0]), st.floats(0.5, 3.0))
# None negative: near its end they make a large number of the last digits of a cosine.
exponents = st.one_of(st.sampled_from([1.0, 2.0, 0.0]), st.floats(0.5, 3.0))
# Boundaries next to each other, at the start and before it.
boundaries_and_scales = st.dictionaries(
    st.one_of(st.integers(-3, 5), st.integers(0, 150)), st.one_of(st.just(0.0), st.floats(0.1, 2.0)), max_size=8
)


def given_or_not(required: Config, optional: Config) -> st.SearchStrategy[Config]:
    return st.fixed_dictionaries(required, optional=optional)


decay = {"transition_begin": begins, "staircase": st.booleans(), "end_value": st.one_of(st.none(), rates)}
warmup = {"init_value": rates, "peak_value": st.one_of(st.just(0.0), rates), "warmup_steps": st.integers(-2, 60)}
parts = st.one_of(st.sampled_from([0.0, 0.3, 1.0]), st.floats(0.0, 1.1))
cycle = {"transition_steps": st.integers(0, 120), "peak_value": rates}
dividers = st.floats(0.5, 50.0)
CONFIGS: dict[str, st.SearchStrategy[Config]] = {
    "constant_schedule": given_or_not({"value": rates}, {}),
    "linear_schedule": given_or_not(
        {"init_value": rates, "end_value": ends, "transition_steps": lengths}, {"transition_begin": begins}
    ),
    "polynomial_schedule": given_or_not(
        {"init_value": rates, "end_value": ends, "power": powers, "transition_steps": lengths},
        {"transition_begin": begins},
    ),
    "exponential_decay": given_or_not({"init_value": rates, "transition_steps": lengths, "decay_rate": factors}, decay),
    "cosine_decay_schedule": given_or_not(
        {"init_value": rates, "decay_steps": lengths}, {"alpha": ends, "exponent": exponents}
    ),
    "piecewise_constant_schedule": given_or_not(
        {"init_value": rates}, {"boundaries_and_scales": boundaries_and_scales}
    ),
    "piecewise_interpolate_schedule": given_or_not(
        {"interpolate_type": st.sampled_from(["linear", "cosine"]), "init_value": rates},
        {"boundaries_and_scales": boundaries_and_scales},
    ),
    "linear_onecycle_schedule": given_or_not(
        cycle, {"pct_start": parts, "pct_final": parts, "div_factor": dividers, "final_div_factor": dividers}
    ),
    "cosine_onecycle_schedule": given_or_not(
        cycle, {"pct_start": parts, "div_factor": dividers, "final_div_factor": dividers}
    ),
    "warmup_constant_schedule": given_or_not(warmup, {}),
    "warmup_cosine_decay_schedule": given_or_not(
        warmup | {"decay_steps": st.integers(0, 120)}, {"end_value": ends, "exponent": exponents}
    ),
    "warmup_exponential_decay_schedule": given_or_not(
        warmup | {"transition_steps": lengths, "decay_rate": factors}, decay
    ),
}
CONFIGS["sgdr_schedule"] = st.fixed_dictionaries(
    {"cosine_kwargs": st.lists(CONFIGS["warmup_cosine_decay_schedule"], min_size=1, max_size=4)}
)
children = st.sampled_from(sorted(CONFIGS)).flatmap(lambda name: st.tuples(st.just(name), CONFIGS[name]))
CONFIGS["join_schedules"] = st.fixed_dictionaries(
    {
        "schedules": st.lists(children, min_size=1, max_size=4),
        "boundaries": st.one_of(st.lists(st.integers(-2, 150), max_size=4).map(sorted), st.lists(begins, max_size=4)),
    }
)


def built(module: Any, name: str, config: Config) -> Any:
    config = dict(config)
    if name == "join_schedules":
        config["schedules"] = [built(module, *child) for child in config["schedules"]]
    return getattr(module, name)(**config)


def eager(schedule: Callable[[Any], Any]) -> np.ndarray[Any, Any]:
    """The library's formula in double precision: operation by operation, with an int64 count."""
    with enable_x64(True):
        return np.asarray(jax.vmap(schedule)(jnp.asarray(COUNTS, dtype=jnp.int64)), dtype=np.float64) + 0.0 * COUNTS


def test_the_library_is_asked_for_its_own_formula() -> None:
    """98 / 49 is 2, but not with a reciprocal: a staircase would then fall one update late."""
    stairs = eager(optax.exponential_decay(1.0, 49, 0.5, staircase=True))
    assert stairs.tolist() == (0.5 ** (COUNTS // 49)).tolist()


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_values_and_errors(name: str, data: st.DataObject) -> None:
    config = data.draw(CONFIGS[name])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ScheduleWarning)
        try:
            live = built(optax, name, config)
        except (ValueError, ArithmeticError) as refused:
            with pytest.raises(type(refused)):
                built(ours, name, config)
            return
        schedule = built(ours, name, config)
        names = {name: getattr(schedules, name) for name in schedules.__all__}
        assert eval(repr(schedule), names) == schedule
        stored = Schedule.from_dict(json.loads(json.dumps(schedule.to_dict())))
        assert (stored, hash(stored)) == (schedule, hash(schedule))
    expected, got = eager(live), schedule(COUNTS)
    finite = np.isfinite(expected)
    assert np.array_equal(got[~finite], expected[~finite], equal_nan=True)
    expected, got = expected[finite], got[finite]
    assert np.abs(got - expected).max(initial=0.0) <= ROUNDING * np.abs(expected).max(initial=0.0)


def test_names_arguments_and_defaults_are_the_librarys() -> None:
    theirs = {name for name, f in vars(optax.schedules).items() if inspect.isfunction(f) and "inject" not in name}
    assert set(NAMES) == theirs
    for name in NAMES:
        wanted = inspect.signature(getattr(optax, name)).parameters
        got = inspect.signature(getattr(ours, name)).parameters
        assert [(n, p.default) for n, p in got.items()] == [(n, p.default) for n, p in wanted.items()]


@pytest.mark.parametrize("kind", ["linear", "cosine"])
def test_any_number_of_pieces_fits_a_program(kind: str) -> None:
    generator = np.random.default_rng(0)
    for num_pieces in (29, 30):  # the most that are lines or half cosines of their own, and more
        steps = sorted(generator.choice(np.arange(1, 190), num_pieces, replace=False).tolist())
        scales = dict(zip(steps, generator.uniform(0.7, 1.4, num_pieces).tolist(), strict=True))
        schedule = ours.piecewise_interpolate_schedule(kind, 0.1, scales)
        expected = eager(optax.piecewise_interpolate_schedule(kind, 0.1, scales))
        assert np.abs(schedule(COUNTS) - expected).max() <= ROUNDING * expected.max()
        assert len(schedule.program) - table_bytes(schedule) <= 4096
        knots = 0.1 * np.cumprod([1.0, *scales.values()])
        assert schedule.reference == pytest.approx(knots.max(), rel=1e-15)
        assert schedule.held_from() == steps[-1]
        assert schedule(10**9) == schedule(steps[-1])


def test_any_number_of_cycles_fits_a_program() -> None:
    for num_cycles in (10, 11):
        cycles = [
            {"init_value": 0.0, "peak_value": 0.1 / (k + 1), "warmup_steps": 3, "decay_steps": 15 + k}
            for k in range(num_cycles)
        ]
        schedule = ours.sgdr_schedule(cycles)
        expected = eager(optax.sgdr_schedule(cycles))
        assert np.abs(schedule(COUNTS) - expected).max() <= ROUNDING * expected.max()
        assert len(schedule.program) - table_bytes(schedule) <= 4096
    with pytest.raises(ValueError, match="from_callable"):
        ours.sgdr_schedule([{**cycle, "decay_steps": 100_000} for cycle in cycles])


def table_bytes(schedule: Schedule) -> int:
    return 8 * int(np.frombuffer(schedule.program, np.int32)[3])


def test_long_lines_of_many_pieces_need_no_table_of_values() -> None:
    schedule = ours.piecewise_interpolate_schedule("linear", 1.0, {10**6 * k: 0.9 for k in range(1, 101)})
    assert len(schedule.program) < 6000
    assert schedule(10**6 * 50) == pytest.approx(0.9**50, rel=1e-14)


CYCLE = {"init_value": 0.0, "peak_value": 1.0, "warmup_steps": 2, "decay_steps": 9}


@pytest.mark.parametrize(
    ("name", "arguments", "says"),
    [
        ("cosine_decay_schedule", (0.1, 0), "decay_steps must be more than 0, got 0"),
        ("warmup_cosine_decay_schedule", (0.0, 0.1, 10, 10), "decay_steps must be more than warmup_steps, got 10"),
        ("piecewise_constant_schedule", (0.1, {3: -1.0}), "at least 0, got -1.0"),
        ("piecewise_interpolate_schedule", ("linear", 0.1, {3: -1.0}), "at least 0, got -1.0"),
        ("piecewise_interpolate_schedule", ("cubic", 0.1), "'linear' or 'cosine', got 'cubic'"),
        ("linear_onecycle_schedule", (0, 0.1), "transition_steps must be more than 0, got 0"),
        ("cosine_onecycle_schedule", (0, 0.1), "transition_steps must be more than 0, got 0"),
        ("linear_onecycle_schedule", (10, 0.1, 0.3, 0.8, 0.0), "div_factor"),
        ("linear_onecycle_schedule", (10, 0.1, 0.3, 0.8, 2.0, 0.0), "final_div_factor"),
        ("cosine_onecycle_schedule", (10, 0.1, 0.3, 2.0, 0.0), "final_div_factor"),
        ("cosine_onecycle_schedule", (10, 0.1, 0.3, -2.0), "at least 0"),
        ("sgdr_schedule", ([{"init_value": 0.0}],), "peak_value"),
        ("sgdr_schedule", ([CYCLE | {"decay_steps": 2}],), "decay_steps"),
    ],
)
def test_errors_are_the_librarys_and_say_what_to_do(name: str, arguments: tuple[Any, ...], says: str) -> None:
    with pytest.raises((ValueError, TypeError, ArithmeticError)) as theirs:
        getattr(optax, name)(*arguments)
    with pytest.raises(theirs.type) as raised:
        getattr(ours, name)(*arguments)
    assert raised.type is theirs.type
    assert says in str(raised.value)


def test_what_has_no_first_value_is_refused_as_the_library_refuses_its_first_step() -> None:
    for name, arguments in (("join_schedules", ([], [])), ("sgdr_schedule", ([],))):
        with pytest.raises(IndexError):
            getattr(optax, name)(*arguments)(0)
        with pytest.raises(IndexError, match="at least one"):
            getattr(ours, name)(*arguments)


def test_arguments_of_another_type_are_refused() -> None:
    with pytest.raises(TypeError, match=r"value must be a number, got '0\.1'"):
        ours.constant_schedule("0.1")
    with pytest.raises(TypeError, match="from_callable"):
        ours.join_schedules([optax.constant_schedule(0.1)], [])
    with pytest.raises(TypeError, match="a boundary must be a number"):
        ours.piecewise_constant_schedule(0.1, {"3": 0.5})
    plateau = schedules.torch.ReduceLROnPlateau(base_lr=0.1)
    with pytest.raises(TypeError, match="join_schedules"):
        ours.join_schedules([ours.constant_schedule(0.1), plateau], [5])


def test_any_schedule_can_be_joined() -> None:
    joined = ours.join_schedules([schedules.linear(0.0, 1.0, 4), schedules.constant(0.5)], [4])
    assert joined(range(6)).tolist() == [0.0, 0.25, 0.5, 0.75, 0.5, 0.5]


ODD = [
    ("linear_schedule", (0.0, 0.1, 0), r"for ever"),
    ("linear_schedule", (0.0, 0.1, 9, -2), r"transition_begin=-2 counts as 0; .*shifted\(-2\)"),
    ("polynomial_schedule", (0.0, 0.1, -1, 9), "infinite"),
    ("cosine_decay_schedule", (0.33, 2, -0.1), "turns negative, down to -0.033 at update 2"),
    ("linear_schedule", (-0.1, 0.001, 171), "turns negative, down to -0.1 at update 0"),
    ("piecewise_interpolate_schedule", ("linear", -0.1, {9: 2.0}), "turns negative, down to -0.2 at update 9"),
    ("warmup_exponential_decay_schedule", (-0.1, 0.1, 5, 9, 0.5), "turns negative, down to -0.1 at update 0"),
    ("sgdr_schedule", ([{"init_value": -0.1, "peak_value": 0.1, "warmup_steps": 2, "decay_steps": 9}],), "-0.1"),
    ("exponential_decay", (0.1, 0, 0.5), "for ever"),
    ("exponential_decay", (0.1, 9, 0), "decay_rate=0"),
    ("exponential_decay", (0.1, 9, -0.5), "not a number in between"),
    ("exponential_decay", (0.1, 9, -0.5, 0, True), "changes its sign every 9 updates; "),
    ("exponential_decay", (0.1, 9, 0.5, 0, False, 0.2), "never changes"),
    ("exponential_decay", (0.1, 9, 1.5, 0, False, 0.05), "never changes"),
    ("cosine_decay_schedule", (0.1, 9, 0.0, -1.0), "infinite"),
    ("piecewise_constant_schedule", (0.1, {3: 0.0, 5: 2.0}), "scale of 0 at step 3"),
    ("piecewise_interpolate_schedule", ("linear", 0.1, {3: 0.0, 5: 2.0}), "scale of 0 at step 3"),
    ("piecewise_interpolate_schedule", ("cosine", 0.1, {0: 0.5, 5: 2.0}), "boundary 0 acts at once"),
    ("linear_onecycle_schedule", (2, 0.1), "starts at its peak"),
    ("linear_onecycle_schedule", (10, 0.1, 0.5, 0.5), "never reaches peak_value"),
    ("linear_onecycle_schedule", (10, 0.1, 0.7, 0.5), "swapped"),
    ("cosine_onecycle_schedule", (10, 0.1, 1.0), "never reaches peak_value"),
    ("warmup_constant_schedule", (0.0, 0.1, 0), r"use constant_schedule\(0.1\)"),
    ("warmup_cosine_decay_schedule", (0.0, 0.1, -1, 9), "begins inside the decay"),
    ("warmup_cosine_decay_schedule", (0.0, 0.0, 1, 9, 0.1), "ends at 0"),
    ("warmup_cosine_decay_schedule", (0.0, 0.1, 1, 9, 0.0, -1.0), "infinite"),
    ("warmup_exponential_decay_schedule", (0.0, 0.1, -1, 9, 0.5), "begins inside the decay"),
    ("warmup_exponential_decay_schedule", (0.0, 0.1, 1, 0, 0.5), "for ever"),
    ("join_schedules", ([schedules.constant(0.1)] * 3, [5, 4]), "never used"),
    ("join_schedules", ([schedules.constant(0.1)] * 3, [0, 4]), "never used"),
    ("join_schedules", ([schedules.constant(0.1)] * 3, [5]), "surplus"),
]


@pytest.mark.parametrize(("name", "arguments", "says"), ODD)
def test_what_is_odd_is_said_at_the_callers_line(name: str, arguments: tuple[Any, ...], says: str) -> None:
    with pytest.warns(ScheduleWarning, match=says) as caught:
        getattr(ours, name)(*arguments)
    assert [w.filename for w in caught] == [__file__]


def test_what_grows_stays_finite() -> None:
    """A rate that is infinite one day is refused by the optimizer from the start."""
    growing = ours.exponential_decay(1e-6, 1, 10.0)
    assert growing([0, 1, 6]).tolist() == pytest.approx([1e-6, 1e-5, 1.0], rel=1e-15)
    assert np.isfinite(growing(10**9))
