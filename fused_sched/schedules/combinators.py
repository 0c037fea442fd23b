"""Schedules made of schedules. Each is one node of the program; nesting is limited to 32 levels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from .. import program
from ..program import Clamp, Clock, Join, Repeat, Tree
from . import checks
from .base import Schedule, set_fields
from .metric import MetricSchedule


def _check_schedules(who: str, name: str, got: object) -> tuple[Schedule, ...]:
    if not isinstance(got, list | tuple) or not got:
        raise TypeError(f"{who}: {name} must be a list of at least one Schedule, got {got!r}")
    return tuple(_check_schedule(who, f"{name}[{i}]", item) for i, item in enumerate(got))


def _check_schedule(who: str, name: str, got: object) -> Schedule:
    if not isinstance(got, Schedule):
        raise TypeError(f"{who}: {name} must be a Schedule, got {got!r}; use constant(value) for a number")
    if isinstance(got, MetricSchedule):
        got.refuse(f"a part of {who}")
    return got


@dataclass(frozen=True, init=False)
class join(Schedule):
    """Phases one after the other: `f(t) = schedules[i](t - boundaries[i-1])` for boundaries[i-1] <= t < boundaries[i].

    schedules: at least one, each on its own clock, which starts at 0 when its phase does.
    boundaries: updates at which the next phase begins; one fewer than schedules, above 0, increasing.
    Raises TypeError or ValueError where these rules are broken.

    >>> join([linear(0.0, 1.0, 10), constant(1.0), linear(1.0, 0.0, 10)], [10, 90])([5, 50, 95, 100]).tolist()
    [0.5, 1.0, 0.5, 0.0]

    Source: optax.join_schedules; torch.optim.lr_scheduler.SequentialLR.
    """

    schedules: tuple[Schedule, ...]
    boundaries: tuple[int, ...]

    def __init__(self, schedules: Sequence[Schedule], boundaries: Sequence[int]) -> None:
        phases = _check_schedules("join", "schedules", schedules)
        if not isinstance(boundaries, list | tuple):
            raise TypeError(f"join: boundaries must be a list of steps, got {boundaries!r}")
        starts = tuple(
            checks.step_count("join", f"boundaries[{i}]", b, remedy="drop a phase of no steps")
            for i, b in enumerate(boundaries)
        )
        if len(starts) != len(phases) - 1:
            raise ValueError(
                f"join: boundaries must be one fewer than schedules, got {len(starts)} for {len(phases)}; "
                "the first phase begins at step 0 by itself"
            )
        if any(later <= earlier for earlier, later in pairwise(starts)):
            raise ValueError(
                f"join: boundaries must increase, got {list(starts)}; they are counted from step 0, not from the "
                "phase before"
            )
        set_fields(self, schedules=phases, boundaries=starts)

    def lower(self) -> Tree:
        ends = tuple(float(b) for b in self.boundaries)
        return Join(tuple(s.lower() for s in self.schedules), ends=ends, origins=(0.0, *ends))


@dataclass(frozen=True)
class Product(Schedule, word="product"):
    """`f(t) = factors[0](t) * factors[1](t) * ...`, left to right; written `a * b`."""

    factors: tuple[Schedule, ...]

    def __post_init__(self) -> None:
        set_fields(self, factors=_check_schedules("product", "factors", self.factors))

    def __repr__(self) -> str:
        return f"({' * '.join(map(repr, self.factors))})"

    def lower(self) -> Tree:
        return program.Product(tuple(s.lower() for s in self.factors))


@dataclass(frozen=True)
class Scaled(Schedule, word="scaled"):
    """`f(t) = factor * inner(t)`; written `s.scaled(c)`."""

    inner: Schedule
    factor: float

    def __post_init__(self) -> None:
        _check_schedule("scaled", "the schedule", self.inner)
        set_fields(self, factor=checks.number("scaled", "factor", self.factor))

    def __repr__(self) -> str:
        return f"{self.inner!r}.scaled({self.factor!r})"

    def lower(self) -> Tree:
        return Clamp(self.inner.lower(), scale=self.factor)


@dataclass(frozen=True)
class Shifted(Schedule, word="shifted"):
    """`f(t) = inner(max(0, t - steps))`; written `s.shifted(n)`."""

    inner: Schedule
    steps: int

    def __post_init__(self) -> None:
        _check_schedule("shifted", "the schedule", self.inner)
        set_fields(self, steps=checks.step_count("shifted", "steps", self.steps, at_least=None))

    def __repr__(self) -> str:
        return f"{self.inner!r}.shifted({self.steps!r})"

    def lower(self) -> Tree:
        return Clock(self.inner.lower(), addend=float(-self.steps))


@dataclass(frozen=True)
class Repeated(Schedule, word="repeat"):
    """`f(t) = inner(t mod period)`, after `times` periods `inner(period)`; written `s.repeat(period)`."""

    inner: Schedule
    period: int
    times: int | None = None

    def __post_init__(self) -> None:
        _check_schedule("repeat", "the schedule", self.inner)
        set_fields(self, period=checks.step_count("repeat", "period", self.period))
        if self.times is not None:
            remedy = "times=None repeats for good"
            set_fields(self, times=checks.step_count("repeat", "times", self.times, remedy=remedy))

    def __repr__(self) -> str:
        times = "" if self.times is None else f", times={self.times!r}"
        return f"{self.inner!r}.repeat({self.period!r}{times})"

    def lower(self) -> Tree:
        return Repeat(self.inner.lower(), period=float(self.period), times=float(self.times or 0))
