"""Checks of constructor arguments. Each raises with what, got, rule and remedy, or returns the plain value."""

from __future__ import annotations

import math
import operator
from numbers import Real
from typing import Any

_LARGEST_STEP = 2**53  # every integer below is a double


def number(who: str, name: str, got: Any, *, above: float | None = None, at_least: float | None = None) -> float:
    """A finite float."""
    if isinstance(got, bool) or not isinstance(got, Real):
        raise TypeError(f"{who}: {name} must be a number, got {got!r}; convert it with float(...)")
    value = float(got)
    if not math.isfinite(value):
        raise ValueError(f"{who}: {name} must be finite, got {got!r}; check the arithmetic it came from")
    if above is not None and not value > above:
        raise ValueError(f"{who}: {name} must be more than {above:g}, got {got!r}")
    if at_least is not None and not value >= at_least:
        raise ValueError(f"{who}: {name} must be at least {at_least:g}, got {got!r}")
    return value


def step_count(who: str, name: str, got: Any, *, at_least: int | None = 1, remedy: str = "") -> int:
    """An integer number of steps."""
    try:
        if isinstance(got, bool):
            raise TypeError
        value = operator.index(got)
    except TypeError:
        raise TypeError(f"{who}: {name} must be an integer number of steps, got {got!r}; use int(...)") from None
    if at_least is not None and value < at_least:
        end = f"; {remedy}" if remedy else ""
        raise ValueError(f"{who}: {name} must be at least {at_least}, got {value}{end}")
    if abs(value) > _LARGEST_STEP:
        raise ValueError(f"{who}: {name} must be below 2**53 steps, got {value}; count in larger units")
    return value


def duration(who: str, name: str, got: Any) -> float:
    """A finite number of steps that need not be whole, nor positive; an int where it is whole, as people write it."""
    steps = number(who, name, got)
    return int(steps) if steps.is_integer() else steps


def longer(who: str, total_steps: int, name: str, part_steps: int) -> None:
    """total_steps leaves at least one step after a part."""
    if total_steps <= part_steps:
        raise ValueError(
            f"{who}: total_steps must be more than {name}, got total_steps={total_steps} and {name}={part_steps}; "
            "total_steps counts the warm-up as well"
        )
