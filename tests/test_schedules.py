"""Every public schedule against its formula written out in Python, and what all schedules have in common."""

from __future__ import annotations

import copy
import inspect
import json
import math
import pickle
from collections.abc import Callable
from dataclasses import FrozenInstanceError

import numpy as np
import pytest
from core_library import core

from fused_sched import program, schedules
from fused_sched.schedules import (
    Schedule,
    constant,
    cosine,
    exponential,
    from_callable,
    inverse_sqrt,
    join,
    linear,
    one_cycle,
    polynomial,
    step_decay,
    table,
    warmup_cosine,
    warmup_linear,
    warmup_stable_decay,
)

Formula = Callable[[int], float]


def _half_cosine(start: float, end: float, u: float) -> float:
    return end + (start - end) * 0.5 * (1.0 + math.cos(math.pi * min(u, 1.0)))


def _wsd(t: int, shape: Callable[[float], float]) -> float:
    return 3e-4 * min(1.0, (t + 1) / 10) if t < 60 else 1e-5 + (3e-4 - 1e-5) * shape(min(1.0, (t - 60) / 40))


# name, schedule, formula, peak (None: the first non-zero value is asked for), step from which it is constant.
CASES: list[tuple[str, Schedule, Formula, float, int | None]] = [
    ("constant", constant(0.3), lambda t: 0.3, 0.3, 0),
    ("constant", constant(0), lambda t: 0.0, 0.0, 0),
    ("linear", linear(1e-3, 1e-5, 70), lambda t: 1e-5 + (1e-3 - 1e-5) * max(0, 70 - t) / 70, 1e-3, 70),
    ("linear", linear(0.0, 0.1, 7), lambda t: 0.1 * min(t, 7) / 7, 0.1, 7),
    ("linear", linear(-0.2, 0.1, 9), lambda t: -0.2 + 0.3 * min(t, 9) / 9, 0.1, 9),
    ("linear", linear(-0.2, 0.0, 9), lambda t: -0.2 * max(0, 9 - t) / 9, -0.2, 9),
    ("linear", linear(0.4, 0.4, 3), lambda t: 0.4, 0.4, 0),
    ("cosine", cosine(0.5, 0.01, 64), lambda t: _half_cosine(0.5, 0.01, t / 64), 0.5, 64),
    ("cosine", cosine(0.0, 0.9, 33), lambda t: _half_cosine(0.0, 0.9, t / 33), 0.9, 33),
    ("polynomial", polynomial(1.0, 0.1, 50, 2.5), lambda t: 0.1 + 0.9 * (max(0, 50 - t) / 50) ** 2.5, 1.0, 50),
    ("polynomial", polynomial(0.0, 0.6, 50, 0.5), lambda t: 0.6 - 0.6 * (max(0, 50 - t) / 50) ** 0.5, 0.6, 50),
    ("exponential", exponential(0.1, 0.97), lambda t: 0.1 * 0.97**t, 0.1, None),
    ("exponential", exponential(1e-6, 10.0, 25), lambda t: 1e-6 * 10.0 ** (t / 25), 1e-6, None),
    ("inverse_sqrt", inverse_sqrt(0.2, 12), lambda t: 0.2 * min((t + 1) / 12, math.sqrt(12 / (t + 1))), 0.2, None),
    ("step_decay", step_decay(0.8, 0.5, 49), lambda t: 0.8 * 0.5 ** (t // 49), 0.8, None),
    ("step_decay", step_decay(0.8, 0.0, 5), lambda t: 0.8 if t < 5 else 0.0, 0.8, 5),
    ("table", table([0.0, 0.5, -0.7, 0.1]), lambda t: [0.0, 0.5, -0.7, 0.1][min(t, 3)], 0.5, 3),
    ("from_callable", from_callable(lambda t: 1 / (t + 1), 20), lambda t: 1 / (min(t, 19) + 1), 1.0, 19),
    (
        "join",
        join([linear(0.0, 1.0, 10), constant(1.0), linear(1.0, 0.5, 20)], [5, 40]),
        lambda t: t / 10 if t < 5 else 1.0 if t < 40 else 1.0 - 0.5 * min(1.0, (t - 40) / 20),
        1.0,
        60,
    ),
    ("join", join([linear(0.5, 1.0, 10)], []), lambda t: 0.5 + 0.05 * min(t, 10), 1.0, 10),
    (
        "warmup_linear",
        warmup_linear(2e-3, warmup_steps=16, total_steps=80, end=1e-4),
        lambda t: 2e-3 * (t + 1) / 16 if t < 16 else 1e-4 + 1.9e-3 * max(0, 80 - t) / 64,
        2e-3,
        80,
    ),
    (
        "warmup_cosine",
        warmup_cosine(2e-3, warmup_steps=16, total_steps=80),
        lambda t: 2e-3 * (t + 1) / 16 if t < 16 else _half_cosine(2e-3, 0.0, (t - 16) / 64),
        2e-3,
        80,
    ),
    (
        "warmup_cosine",
        warmup_cosine(2e-3, warmup_steps=0, total_steps=80),
        lambda t: _half_cosine(2e-3, 0.0, t / 80),
        2e-3,
        80,
    ),
    *(
        (
            "warmup_stable_decay",
            warmup_stable_decay(3e-4, warmup_steps=10, total_steps=100, decay_steps=40, end=1e-5, decay=decay),
            lambda t, shape=shape: _wsd(t, shape),
            3e-4,
            100,
        )
        for decay, shape in (
            ("linear", lambda u: 1.0 - u),
            ("cosine", lambda u: _half_cosine(1.0, 0.0, u)),
            ("sqrt", lambda u: 1.0 - math.sqrt(u)),
        )
    ),
    (
        "one_cycle",
        one_cycle(0.1, total_steps=100, warmup_steps=25, start=0.01, end=1e-4),
        lambda t: _half_cosine(0.01, 0.1, t / 25) if t < 25 else _half_cosine(0.1, 1e-4, (t - 25) / 75),
        0.1,
        100,
    ),
    # Methods and operators.
    ("scaled", linear(1.0, 0.0, 8).scaled(0.25), lambda t: 0.25 * max(0, 8 - t) / 8, 0.25, 8),
    ("shifted", linear(1.0, 0.0, 8).shifted(3), lambda t: min(1.0, max(0, 11 - t) / 8), 1.0, 11),
    ("shifted", linear(1.0, 0.0, 8).shifted(-3), lambda t: max(0, 5 - t) / 8, 0.625, 5),
    ("repeat", linear(1.0, 0.0, 8).repeat(8), lambda t: (8 - t % 8) / 8, 1.0, None),
    ("repeat", linear(1.0, 0.0, 8).repeat(8, times=3), lambda t: (8 - t % 8) / 8 if t < 24 else 0.0, 1.0, 24),
    ("repeat", constant(2.0).repeat(5), lambda t: 2.0, 2.0, 0),
    (
        "product",
        linear(0.0, 1.0, 10) * exponential(0.5, 0.9) * constant(2.0),
        lambda t: min(t, 10) / 10 * 0.5 * 0.9**t * 2.0,
        0.9**10,
        None,
    ),
]
WORDS = [n for n in schedules.__all__ if n != "Schedule" and not inspect.ismodule(getattr(schedules, n))]
IDS = [f"{name}-{i}" for i, (name, *_) in enumerate(CASES)]
all_cases = pytest.mark.parametrize(("name", "schedule", "formula", "peak", "held_from"), CASES, ids=IDS)
all_schedules = pytest.mark.parametrize("schedule", [case[1] for case in CASES], ids=IDS)


def test_every_public_constructor_is_in_the_table() -> None:
    covered = {name for name, *_ in CASES}
    assert covered >= set(WORDS)
    words = {type(schedule).word for _, schedule, *_ in CASES}
    # A phase of warmup_stable_decay(decay="sqrt"), never built by itself; and what library schedules carry along.
    nested = {"sqrt_decay", "companion"}
    assert words | nested == {word for word in Schedule._words if "." not in word}


@all_cases
def test_values_are_the_formulas(
    name: str, schedule: Schedule, formula: Formula, peak: float, held_from: int | None
) -> None:
    steps = range(200)
    expected = np.array([formula(t) for t in steps])
    # Four ulp of the largest value: the formulas round in another order than the program.
    bound = 4 * np.finfo(float).eps * np.abs(expected).max()
    assert np.abs(schedule(steps) - expected).max() <= bound
    assert [schedule(t) for t in steps] == schedule(steps).tolist()


@all_cases
def test_the_plain_python_evaluator_agrees(
    name: str, schedule: Schedule, formula: Formula, peak: float, held_from: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled = core().evaluate(schedule.program, np.arange(200.0))
    monkeypatch.setattr(program, "_cpu", None)
    # An ulp of each side's pow or cos, through one multiplication and one addition of the largest value.
    assert np.abs(schedule(range(200)) - compiled).max() <= 2 * np.finfo(float).eps * np.abs(compiled).max()


@all_cases
def test_reference_and_end(name: str, schedule: Schedule, formula: Formula, peak: float, held_from: int | None) -> None:
    assert schedule.reference == pytest.approx(peak, rel=4e-16, abs=0)
    assert schedule.held_from() == held_from
    if held_from is not None:
        last = schedule(held_from)
        assert schedule([held_from + 1, held_from + 17, 10**9, 2**53]).tolist() == [last] * 4


@all_schedules
def test_repr_dict_pickle_and_copies_rebuild_the_schedule(schedule: Schedule) -> None:
    assert schedule.program not in pickle.dumps(schedule), "a stored program would outlive its version"
    namespace = {name: getattr(schedules, name) for name in schedules.__all__}
    copies = [
        eval(repr(schedule), namespace),
        Schedule.from_dict(schedule.to_dict()),
        Schedule.from_dict(json.loads(json.dumps(schedule.to_dict()))),
        pickle.loads(pickle.dumps(schedule)),
        copy.deepcopy(schedule),
    ]
    for other in copies:
        assert other == schedule
        assert hash(other) == hash(schedule)
        assert repr(other) == repr(schedule)
        assert other.program == schedule.program
        assert type(other) is type(schedule)


@all_schedules
def test_schedules_are_immutable_and_their_programs_valid(schedule: Schedule) -> None:
    field = next(iter(schedule.__dataclass_fields__))  # type: ignore[attr-defined]
    with pytest.raises(FrozenInstanceError):
        setattr(schedule, field, 1.0)
    assert core().validate(schedule.program) == ""
    assert program.unpack(schedule.program) == schedule.lower()


def test_different_schedules_differ() -> None:
    distinct = {schedule for _, schedule, *_ in CASES}
    assert len(distinct) == len(CASES)
    assert linear(1, 0, 10) == linear(1.0, 0.0, 10)
    assert linear(1, 0, 10) != cosine(1, 0, 10)


def test_ends_are_exact_in_every_direction() -> None:
    values = [0.0, 1e-20, 1e-3, 0.1, 0.3, 1 / 3, 1.0, 7.1, -0.1, -5e3, 1.0 + 2**-52, 2**-53]
    for start in values:
        for end in values:
            for schedule in (linear(start, end, 49), cosine(start, end, 49), polynomial(start, end, 49, 2.2)):
                at = schedule([0, 49, 50, 1000])
                assert at.tolist() == [start, end, end, end], schedule
                inside = schedule(range(50))
                assert inside.min() >= min(start, end)
                assert inside.max() <= max(start, end)


def test_a_line_to_zero_keeps_its_digits() -> None:
    """1 - t/steps would have lost seven of them at the last step."""
    steps = 10**7
    last = linear(0.1, 0.0, steps)(np.arange(steps - 5, steps))
    assert last.tolist() == [0.1 * ((steps - t) / steps) for t in range(steps - 5, steps)]


def test_stairs_are_exact() -> None:
    for every in (1, 3, 49, 98, 103, 107, 1000):
        t = np.arange(20 * every + 1)
        stairs = step_decay(1.0, 0.5, every)(t)
        assert stairs.tolist() == (0.5 ** (t // every)).tolist()


def test_restarts_are_exact() -> None:
    for period in (3, 7, 49, 103, 1000):
        t = np.concatenate([np.arange(50 * period), 10**12 // period * period + np.arange(-2, 3)])
        ramp = table(range(period)).repeat(period)
        assert ramp(t).tolist() == (t % period).tolist()


def test_reference_searches_for_a_first_value_where_the_peaks_are_zero() -> None:
    hill = linear(0.0, 1.0, 10) * linear(1.0, 0.0, 10)
    assert hill([0, 10]).tolist() == [0.0, 0.0]
    assert hill.reference == hill(1)
    assert constant(0.0).reference == 0.0
    assert hill.scaled(-1.0).reference == -hill(1)
    # Falls without an end, and has no lowest value: the first one, not where the search for one stopped.
    assert exponential(1.0, 1.0078125).scaled(-1.0).reference == exponential(-1.0, 1.0078125).reference == -1.0


def test_phases_cut_short_do_not_count_their_peak() -> None:
    assert join([linear(0.0, 1.0, 100), constant(0.1)], [50]).reference == 0.49
    assert join([exponential(1e-6, 10.0), constant(0.0)], [3]).reference == pytest.approx(1e-4, rel=4e-16)
    assert linear(0.0, 1.0, 100).repeat(20).reference == 0.19
    assert linear(0.0, 1.0, 100).repeat(20, times=2).reference == 0.2
    assert join([linear(1.0, 2.0, 10).shifted(20), constant(0.5)], [5]).reference == 1.0
    assert join([inverse_sqrt(1.0, 10), constant(0.1)], [5]).reference == 0.5
    assert join([table([0.1, 0.3, 0.2, 0.9]), constant(0.1)], [3]).reference == 0.3


# Documentation.


@pytest.mark.parametrize("name", WORDS)
def test_every_public_constructor_documents_itself(name: str) -> None:
    constructor = getattr(schedules, name)
    text = inspect.getdoc(constructor) or ""
    assert text.count("`") >= 2, "the formula"
    assert ">>> " in text, "an example"
    assert "Raises" in text, "errors"
    for parameter in inspect.signature(constructor).parameters:
        assert f"{parameter}:" in text or f"{parameter}, " in text, parameter


def test_docstring_examples() -> None:
    import doctest

    from fused_sched.schedules import base, combinators, curves, recipes

    names = {name: getattr(schedules, name) for name in schedules.__all__}
    for module in (program, base, curves, combinators, recipes):
        results = doctest.testmod(module, extraglobs=names)
        assert results.failed == 0
        assert results.attempted > 0
