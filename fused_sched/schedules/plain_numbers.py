"""Arguments of library schedules as plain numbers, which compare, print and store alike wherever they came from."""

from __future__ import annotations

from dataclasses import fields
from numbers import Integral
from typing import Any

from . import checks
from .base import Schedule, set_fields

_ANNOTATIONS = {"int", "float", "int | None", "float | None"}


def plain_number(who: str, name: str, got: Any) -> int | float:
    """An integer as an int, any other finite number as a float.

    The libraries take counts of steps that are not whole, as 0.1 * num_training_steps, and rates that are.
    Raises TypeError for anything but a number, ValueError for one that is not finite.
    """
    if isinstance(got, Integral) and not isinstance(got, bool):
        return checks.step_count(who, name, got, at_least=None)
    return checks.number(who, name, got)


def make_numbers_plain(schedule: Schedule) -> None:
    """`plain_number` for all fields that are annotated as numbers. None stays where it may be."""
    for field in fields(schedule):  # type: ignore[arg-type]
        got = getattr(schedule, field.name)
        is_unset = got is None and str(field.type).endswith("None")
        if field.type in _ANNOTATIONS and not is_unset:
            set_fields(schedule, **{field.name: plain_number(schedule.word, field.name, got)})
