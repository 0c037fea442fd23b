"""A scheduler that already drives another optimizer, as a schedule that goes on where it stands."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from math import inf, isclose
from typing import Any

from ...program import Clock, Tree
from .. import checks
from ..base import Schedule, set_fields
from ..combinators import join
from ..curves import constant
from ..library import LibrarySchedule
from ..metric import MetricSchedule
from .base import ELSE_TABULATE, Chainable
from .composition import ChainedScheduler, SequentialLR
from .readers import Live, full_name, plain, read

# A rate in the optimizer that is further from the schedule's was changed by somebody. torch's recursion drifts: at
# 1e5 steps by 2e-10 of the rate where that is not nearly 0, and by 5e-11 of the base rate for short cosines. A rate
# kept in a float32 tensor has 6e-8 from one rounding; what its recursion loses in addition stays like a change.
_RELATIVE, _RELATIVE_OF_TENSOR, _OF_BASE = 1e-9, 1e-6, 1e-10


def from_scheduler(live: Any, num_steps: int | None = None, *, group: int | None = None) -> Schedule:
    """The schedule that a live scheduler goes on with: `result(t)` is the rate of the update t after the next.

    live: an instance of any class of torch.optim.lr_scheduler, as far as the class of that name here expresses it; a
        LambdaLR of transformers' factories; an instance of deepspeed.runtime.lr_schedules. It may have stepped already,
        and is only read.
    num_steps: for a user's function (LambdaLR, MultiplicativeLR): the coming updates to tabulate it for, calling it for
        those before as well; the last value is held.
    group: index of the parameter group. By default all groups, which must then have the same schedule.
    Companions (beta1 of a one-cycle policy) come with it. A rate that somebody has changed in the group is kept where
    torch goes on from it, as a factor until the schedule sets the rate anew.
    Raises TypeError for another class, IndexError for a group there is not, ValueError for what is not exactly
    expressible (a user's function without num_steps, compositions, a changed rate that torch will overwrite) and for
    groups that differ.

    >>> import torch
    >>> optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.8)
    >>> live = torch.optim.lr_scheduler.StepLR(optimizer, step_size=2, gamma=0.5)
    >>> for _ in range(3):
    ...     optimizer.step()
    ...     live.step()
    >>> schedule = from_scheduler(live)
    >>> schedule, schedule([0, 1, 2]).tolist()
    (torch.StepLR(step_size=2, gamma=0.5, base_lr=0.8).shifted(-3), [0.4, 0.2, 0.2])

    Source: torch 2.13, transformers 5.23, DeepSpeed 0.19.8, which keep these attributes.
    """
    groups = getattr(getattr(live, "optimizer", None), "param_groups", None)
    if not isinstance(groups, list):
        raise TypeError(
            f"from_scheduler: the scheduler must be an instance with an optimizer, got {live!r}; {ELSE_TABULATE}"
        )
    if num_steps is not None:
        num_steps = checks.step_count("from_scheduler", "num_steps", num_steps)
    if group is not None:
        if not -len(groups) <= group < len(groups):
            raise IndexError(f"from_scheduler: group must be an index below {len(groups)}, got {group!r}")
        return _converted(live, group % len(groups), num_steps)
    converted = [_converted(live, index, num_steps) for index in range(len(groups))]
    if any(other != converted[0] for other in converted):
        raise ValueError(
            f"from_scheduler: the optimizer's {len(groups)} groups must have the same schedule, got {converted}; give "
            "group=0, group=1, ... one after the other, and each schedule to its group"
        )
    return converted[0]


@dataclass(frozen=True, repr=False)
class Resumed(LibrarySchedule, library="torch"):
    """A library's schedule from a later update on: `f(t) = scheduler(t + updates)`, its companions likewise.

    scheduler: the schedule from its beginning. updates: how many have been. `scheduler.shifted(-updates)` is the same
    rate without the companions. Raises TypeError for anything but a schedule with companions, ValueError for
    updates < 0.

    >>> from fused_sched.schedules.torch import CyclicLR
    >>> resumed = Resumed(CyclicLR(0.0, 0.4, step_size_up=4), 3)
    >>> resumed(0), resumed.companions["beta1"](1)
    (0.30000000000000004, 0.8)

    Source: a scheduler of torch 2.13 that has been stepped before it is converted.
    """

    scheduler: LibrarySchedule
    updates: int

    def check(self) -> None:
        if not isinstance(self.scheduler, LibrarySchedule):
            raise TypeError(
                f"{self.word}: scheduler must be one with companions, got {self.scheduler!r}; use .shifted(-updates)"
            )
        if isinstance(self.scheduler, MetricSchedule):
            self.scheduler.refuse(f"a part of {self.word}")
        set_fields(self, updates=checks.step_count(self.word, "updates", self.updates, at_least=0))

    def lower(self) -> Tree:
        return Clock(self.scheduler.lower(), addend=float(self.updates))

    def lower_companions(self) -> dict[str, Tree]:
        companions = self.scheduler.lower_companions()
        return {name: Clock(tree, addend=float(self.updates)) for name, tree in companions.items()}


def _converted(live: Any, group_index: int, num_steps: int | None) -> Schedule:
    position = _position(live)
    reader = Live(live, group_index, None if num_steps is None else position + num_steps)
    schedule = read(reader)
    if isinstance(schedule, MetricSchedule):
        return schedule  # its position is part of it
    in_group = reader.group["lr"]
    current, expected = float(plain(in_group)), schedule(position)
    relative = _RELATIVE if isinstance(in_group, float | int) else _RELATIVE_OF_TENSOR
    base_lr = abs(float(plain(reader.group.get("initial_lr", in_group))))
    if isclose(current, expected, rel_tol=relative, abs_tol=_OF_BASE * base_lr):
        return _resumed(schedule, position)
    return _with_change(schedule, position, current, expected)


def _position(live: Any) -> int:
    """The scheduler's epoch: the number of updates before the next."""
    name = full_name(type(live))
    if name.startswith("deepspeed."):
        return int(live.last_batch_iteration) + 1  # DeepSpeed's first update is number -1
    if name == "torch.optim.lr_scheduler.ChainedScheduler":
        positions = {_position(child) for child in live._schedulers}
        if len(positions) > 1:
            _refuse_clocks(name, f"epochs {sorted(positions)}")
        return positions.pop()
    position = int(getattr(live, "last_epoch", 0))
    if name == "torch.optim.lr_scheduler.SequentialLR":
        milestones = live._milestones
        running = bisect_right(milestones, position)
        begin = max(0, milestones[running - 1]) if running else 0
        child = _position(live._schedulers[running])
        if child != position - begin:
            _refuse_clocks(name, f"a child at epoch {child} that should be at {position - begin}")
    return position


def _refuse_clocks(name: str, got: str) -> None:
    raise ValueError(
        f"from_scheduler: the children of {name} must have been stepped by it alone, got {got}; convert each of them, "
        f"or {ELSE_TABULATE}"
    )


def _resumed(schedule: Schedule, position: int) -> Schedule:
    if position == 0:
        return schedule
    if isinstance(schedule, LibrarySchedule) and schedule.companions:
        return Resumed(schedule, position)
    return schedule.shifted(-position)


def _with_change(schedule: Schedule, position: int, current: float, expected: float) -> Schedule:
    """The rest of a schedule whose present rate somebody has changed: torch multiplies on from there, if it does."""
    running, end = schedule, inf
    if isinstance(schedule, SequentialLR):
        running, end = schedule.running(position)
    keeps = isinstance(running, Chainable) or (isinstance(running, ChainedScheduler) and running.is_product)
    held_from = schedule.held_from()
    is_held = held_from is not None and held_from <= position
    if not keeps or schedule.companions or (expected == 0.0 and not is_held):
        raise ValueError(
            f"from_scheduler: the optimizer's rate must be the scheduler's, {expected!r} at its epoch {position}, got "
            f"{current!r}; {running!r} does not go on from a changed rate: set it back, or {ELSE_TABULATE}"
        )
    if expected == 0.0:
        return constant(current)
    rest = schedule.shifted(-position).scaled(current / expected)
    return rest if end == inf else join([rest, schedule.shifted(-int(end))], [int(end) - position])
