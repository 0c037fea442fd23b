"""Schedules one after the other."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

from ...program import Tree
from .. import checks
from ..base import Schedule, set_fields
from ..metric import MetricSchedule
from .base import OptaxSchedule, joined, small
from .warmups import warmup_cosine_decay_schedule


@dataclass(frozen=True, repr=False)
class join_schedules(OptaxSchedule):
    """One after the other: `f(t) = schedules[i](t - boundaries[i-1])`, of the last boundary that t has reached.

    schedules: any Schedules, each on its own clock. boundaries: updates at which the next one begins, one fewer than
    schedules; surplus ones are ignored.
    Raises TypeError for anything but Schedules and numbers, IndexError for no schedule, where optax's first update
    does. Warns for boundaries of another number, that do not increase, or that are not above 0: some schedules are
    then never used.

    >>> join_schedules([linear(0.0, 1.0, 4), constant(0.5)], [4])([0, 1, 4]).tolist()
    [0.0, 0.25, 0.5]

    Source: optax 0.2.8.
    """

    schedules: Sequence[Schedule]
    boundaries: Sequence[float]

    def check(self) -> None:
        for i, schedule in enumerate(self.schedules):
            if not isinstance(schedule, Schedule):
                raise TypeError(
                    f"{self.word}: schedules[{i}] must be a Schedule, got {schedule!r}; make one of a function with "
                    "schedules.from_callable"
                )
            if isinstance(schedule, MetricSchedule):
                schedule.refuse(f"a part of {self.word}")
        set_fields(
            self,
            schedules=tuple(self.schedules),
            boundaries=tuple(checks.duration(self.word, f"boundaries[{i}]", b) for i, b in enumerate(self.boundaries)),
        )
        if not self.schedules:
            raise IndexError(f"{self.word}: schedules must have at least one entry, got none; use constant_schedule")

    def negative_rate(self) -> str | None:
        return None  # as its parts have said, if they are not cut short before

    def oddity(self) -> str | None:
        if len(self.boundaries) != len(self.schedules) - 1:
            return (
                f"{len(self.boundaries)} boundaries for {len(self.schedules)} schedules: the surplus ones are ignored; "
                "give one boundary fewer than schedules"
            )
        if any(later <= earlier for earlier, later in pairwise((0, *self.boundaries))):
            return (
                f"boundaries={list(self.boundaries)}: some schedules are never used; boundaries should increase from "
                "above 0, and are counted from step 0"
            )
        return None

    def lower(self) -> Tree:
        return joined([schedule.lower() for schedule in self.schedules], self.boundaries)


@dataclass(frozen=True, repr=False)
class sgdr_schedule(OptaxSchedule):
    """Cosine cycles with warm-ups: `f(t) = cycle_k(t - T_0 - ... - T_(k-1))`, T being their decay_steps.

    cosine_kwargs: one dict of warmup_cosine_decay_schedule's arguments per cycle, kept as such schedules; the last
    one's end is held. More than ten cycles are tabulated, 8 bytes per update.
    Raises what warmup_cosine_decay_schedule raises, TypeError for arguments it does not have, IndexError for no cycle,
    where optax's first update does, and ValueError for more than ten cycles of more than 2^20 updates.

    >>> cycle = {"init_value": 0.0, "peak_value": 1.0, "warmup_steps": 4, "decay_steps": 12}
    >>> sgdr_schedule([cycle, cycle])([0, 4, 8, 12, 16, 24]).tolist()
    [0.0, 1.0, 0.5, 0.0, 1.0, 0.0]

    Source: optax 0.2.8.
    """

    cosine_kwargs: Iterable[Mapping[str, Any] | warmup_cosine_decay_schedule]

    def check(self) -> None:
        cycles = tuple(
            cycle if isinstance(cycle, warmup_cosine_decay_schedule) else warmup_cosine_decay_schedule(**cycle)
            for cycle in self.cosine_kwargs
        )
        if not cycles:
            raise IndexError(
                f"{self.word}: cosine_kwargs must have at least one cycle, got none; give one dict per cycle"
            )
        set_fields(self, cosine_kwargs=cycles)
        _ = self.tree  # refuses what is too long for a table

    def negative_rate(self) -> str | None:
        return None  # as its cycles have said

    def lower(self) -> Tree:
        cycles: Any = self.cosine_kwargs
        starts = list(accumulate(cycle.decay_steps for cycle in cycles))
        return small(joined([cycle.lower() for cycle in cycles], starts[:-1]), self.word)
