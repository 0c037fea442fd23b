"""What schedules refuse, and that they say why: what, got, rule, remedy."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

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

# Steps.


@pytest.mark.parametrize("step", [-1, np.int64(-3), [0, -1], np.array([[5], [-2]])])
def test_negative_steps_are_refused(step: Any) -> None:
    with pytest.raises(ValueError, match="must be 0 or more"):
        constant(1.0)(step)


@pytest.mark.parametrize("step", [1.0, "1", None, [0.5], np.array([1.0]), True])
def test_steps_must_be_integers(step: Any) -> None:
    with pytest.raises(TypeError, match="must be an integer"):
        constant(1.0)(step)


def test_steps_keep_their_shape() -> None:
    line = linear(0.0, 6.0, 6)
    assert isinstance(line(3), float)
    assert isinstance(line(np.int32(3)), float)
    assert isinstance(line(np.array(3)), float)
    assert line([]).shape == (0,)
    assert line(np.arange(6, dtype=np.uint8).reshape(2, 3)).tolist() == [[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]]


# Arguments.

REFUSED: list[tuple[Callable[[], object], type[Exception], str]] = [
    (lambda: constant(math.nan), ValueError, "constant: value must be finite, got nan"),
    (lambda: constant("1"), TypeError, "constant: value must be a number, got '1'"),
    (lambda: constant(True), TypeError, "must be a number"),
    (lambda: constant(constant(1.0)), TypeError, "must be a number"),
    (lambda: linear(math.inf, 0, 10), ValueError, "linear: start must be finite"),
    (lambda: linear(0, -math.inf, 10), ValueError, "linear: end must be finite"),
    (lambda: linear(0, 1, 0), ValueError, r"linear: steps must be at least 1, got 0; use constant\(end\)"),
    (lambda: linear(0, 1, -5), ValueError, "at least 1, got -5"),
    (lambda: linear(0, 1, 10.0), TypeError, r"linear: steps must be an integer.*use int\("),
    (lambda: linear(0, 1, True), TypeError, "must be an integer"),
    (lambda: linear(0, 1, 2**60), ValueError, "below 2\\*\\*53"),
    (lambda: linear(-1.7e308, 1.7e308, 10).program, ValueError, "apart"),
    (lambda: cosine(0, 1, 0), ValueError, "cosine: steps"),
    (lambda: polynomial(1, 0, 10, power=0), ValueError, "polynomial: power must be more than 0, got 0"),
    (lambda: polynomial(1, 0, 10, power=math.nan), ValueError, "power must be finite"),
    (lambda: exponential(1, 0.0), ValueError, "exponential: rate must be more than 0"),
    (lambda: exponential(1, -0.5), ValueError, "rate must be more than 0"),
    (lambda: exponential(1, 0.5, 0), ValueError, "exponential: steps must be at least 1"),
    (lambda: inverse_sqrt(1, 0), ValueError, "warmup_steps must be at least 1, got 0; 1 is a decay"),
    (lambda: step_decay(1, -0.1, 5), ValueError, "step_decay: factor must be at least 0"),
    (lambda: step_decay(1, 0.1, 0), ValueError, "step_decay: every must be at least 1"),
    (lambda: table([]), ValueError, "at least one entry"),
    (lambda: table([0.1, math.inf]), ValueError, r"table: values\[1\] must be finite"),
    (lambda: table(["a"]), TypeError, r"values\[0\] must be a number"),
    (lambda: table(0.5), TypeError, "values must be numbers in a list"),
    (lambda: from_callable(0.5, 10), TypeError, "must be callable"),
    (lambda: from_callable(lambda t: t, 0), ValueError, "num_steps must be at least 1"),
    (lambda: from_callable(lambda t: math.nan if t == 3 else 1.0, 10), ValueError, r"function\(3\) must be finite"),
    (lambda: join([], []), TypeError, "at least one Schedule"),
    (lambda: join(constant(1), []), TypeError, "must be a list"),
    (lambda: join([1.0, constant(1)], [5]), TypeError, r"schedules\[0\] must be a Schedule.*constant\(value\)"),
    (lambda: join([constant(1), constant(2)], []), ValueError, "one fewer than schedules, got 0 for 2"),
    (lambda: join([constant(1), constant(2)], [5, 6]), ValueError, "one fewer than schedules, got 2 for 2"),
    (lambda: join([constant(1)] * 3, [5, 5]), ValueError, r"must increase, got \[5, 5\]"),
    (lambda: join([constant(1)] * 3, [9, 5]), ValueError, "counted from step 0"),
    (lambda: join([constant(1)] * 2, [0]), ValueError, r"boundaries\[0\] must be at least 1"),
    (lambda: join([constant(1)] * 2, [1.5]), TypeError, "must be an integer"),
    (lambda: join([constant(1)] * 2, 5), TypeError, "boundaries must be a list"),
    (lambda: constant(1).scaled(math.nan), ValueError, "scaled: factor must be finite"),
    (lambda: constant(1).scaled(constant(2)), TypeError, "factor must be a number"),
    (lambda: constant(1).shifted(1.5), TypeError, "shifted: steps must be an integer"),
    (lambda: constant(1).repeat(0), ValueError, "repeat: period must be at least 1"),
    (lambda: constant(1).repeat(5, times=0), ValueError, "times must be at least 1, got 0; times=None"),
    (lambda: constant(1) * 2.0, TypeError, "unsupported operand"),
    (lambda: warmup_linear(1, warmup_steps=10, total_steps=10), ValueError, "total_steps must be more than warmup"),
    (lambda: warmup_cosine(1, warmup_steps=-1, total_steps=10), ValueError, "warmup_steps must be at least 0"),
    (lambda: warmup_cosine(math.nan, warmup_steps=1, total_steps=10), ValueError, "warmup_cosine: peak"),
    (lambda: warmup_cosine(1, 10, 100), TypeError, "positional"),
    (
        lambda: warmup_stable_decay(1, warmup_steps=5, total_steps=10, decay_steps=6),
        ValueError,
        r"must not exceed total_steps, got 5 \+ 6 > 10",
    ),
    (
        lambda: warmup_stable_decay(1, warmup_steps=5, total_steps=50, decay_steps=6, decay="log"),
        ValueError,
        "decay must be one of 'linear', 'cosine', 'sqrt', got 'log'",
    ),
    (lambda: one_cycle(1, total_steps=10, warmup_steps=10), ValueError, "total_steps must be more than"),
    (lambda: one_cycle(1, total_steps=1), ValueError, "total_steps must be at least 2"),
    (lambda: Schedule.from_dict({"schedule": "spiral"}), ValueError, "must be one of .*'cosine'.*got 'spiral'"),
    (lambda: Schedule.from_dict({"value": 1.0}), ValueError, "got None"),
    (lambda: Schedule.from_dict({"schedule": "constant", "rate": 1}), ValueError, "has the fields"),
]


@pytest.mark.parametrize(("construct", "error", "message"), REFUSED)
def test_bad_arguments_are_refused_with_the_rule(
    construct: Callable[[], object], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        construct()


def test_numpy_numbers_become_plain_ones() -> None:
    schedule = linear(np.float32(0.5), np.int64(0), np.int32(10))
    assert schedule == linear(0.5, 0.0, 10)
    assert repr(schedule) == "linear(start=0.5, end=0.0, steps=10)"
    json.dumps(schedule.to_dict())


def test_two_schedules_cannot_share_a_word() -> None:
    with pytest.raises(TypeError, match="two schedules are called 'linear'"):

        class Other(Schedule, word="linear"):
            pass


def test_a_field_cannot_have_the_key_of_the_word() -> None:
    with pytest.raises(TypeError, match=r"Wrapper must not have a field called 'schedule', .* to_dict\(\); rename it"):

        class Wrapper(Schedule):
            schedule: Schedule

    assert "Wrapper" not in Schedule._words
