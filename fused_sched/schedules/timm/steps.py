"""timm's staircases: equal steps, and milestones."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import KW_ONLY, dataclass
from math import floor

from ...program import Tree
from ...reference_schedule import power
from .. import checks
from ..base import set_fields
from ..nodes import bounded, geometric, levels
from .base import TimmSchedule, floor_divisor


class _Staircase(TimmSchedule, abstract=True):
    """`base_lr * decay_rate^n` after n steps down."""

    decay_rate: float

    def check_arguments(self) -> None:
        self.make_plain("decay_rate")

    def negative_decay(self) -> str | None:
        if self.decay_rate < 0.0:
            return f"with decay_rate={self.decay_rate!r} every other step has a negative rate; pass 0.0 or more"
        return None

    def odd_decay(self) -> str | None:
        if self.decay_rate > 1.0:
            return f"with decay_rate={self.decay_rate!r} the rate grows at every step; pass 1.0 or less"
        return None


@dataclass(frozen=True, repr=False)
class StepLRScheduler(_Staircase):
    """timm's equal steps: `f = base_lr * decay_rate^floor(x / decay_t)`, x = t, or t - warmup_t with warmup_prefix.

    decay_t: length of a step. decay_rate: factor from one to the next. The others: `fused_sched.schedules.timm`.
    decay_t=0 is an error of timm's first step, not of the constructor.

    >>> timm.StepLRScheduler(30, 0.5, t_in_epochs=False, base_lr=1.0)([29, 30, 60]).tolist()
    [1.0, 0.5, 0.25]

    Source: timm 1.0.31, scheduler/step_lr.py.
    """

    decay_t: int
    decay_rate: float = 1.0
    warmup_t: int = 0
    warmup_lr_init: float = 0.0
    warmup_prefix: bool = True
    t_in_epochs: bool = True
    noise_range_t: None = None
    noise_pct: float = 0.67
    noise_std: float = 1.0
    noise_seed: int = 42
    initialize: bool = True
    _: KW_ONLY
    base_lr: float
    updates_per_epoch: int | None = None

    def check_arguments(self) -> None:
        super().check_arguments()
        self.make_plain("decay_t")

    def failing(self) -> tuple[int, str] | None:
        if self.decay_t == 0:
            return self.first_call, "it divides by decay_t=0"
        if self.decay_t < 0 and self.decay_rate == 0.0:
            return max(self.first_call, floor(self.decay_begin) + 1), "it divides by decay_rate=0.0"
        return None

    def odd_decay(self) -> str | None:
        if self.decay_t < 0 and self.decay_rate != 1.0:
            return f"decay_t={self.decay_t!r} divides by decay_rate at every step; pass more than 0"
        return super().odd_decay()

    def decay(self) -> Tree:
        return geometric(self.base_lr, self.decay_rate, floor_divisor(self.decay_t or 1))


@dataclass(frozen=True, repr=False)
class MultiStepLRScheduler(_Staircase):
    """timm's milestones: `f = base_lr * decay_rate^n`, n of them being at most x + 1.

    x = t, or t - warmup_t with warmup_prefix. A milestone m acts at x = m - 1, one step before torch's MultiStepLR; one
    of 1 not at t = 0, which uses base_lr.

    decay_t: milestones in ascending order. decay_rate: factor at each. The others: `fused_sched.schedules.timm`.

    >>> timm.MultiStepLRScheduler([30, 60], 0.5, t_in_epochs=False, base_lr=1.0)([28, 29, 58, 59]).tolist()
    [1.0, 0.5, 0.5, 0.25]

    Source: timm 1.0.31, scheduler/multistep_lr.py.
    """

    decay_t: tuple[float, ...]
    decay_rate: float = 1.0
    warmup_t: int = 0
    warmup_lr_init: float = 0.0
    warmup_prefix: bool = True
    t_in_epochs: bool = True
    noise_range_t: None = None
    noise_pct: float = 0.67
    noise_std: float = 1.0
    noise_seed: int = 42
    initialize: bool = True
    _: KW_ONLY
    base_lr: float
    updates_per_epoch: int | None = None

    def check_arguments(self) -> None:
        super().check_arguments()
        if not isinstance(self.decay_t, Iterable) or isinstance(self.decay_t, str):
            raise TypeError(
                f"{self.word}: decay_t must be a list of milestones, got {self.decay_t!r}; pass [milestone]"
            )
        milestones = tuple(checks.duration(self.word, f"decay_t[{i}]", m) for i, m in enumerate(self.decay_t))
        set_fields(self, decay_t=milestones)

    def odd_decay(self) -> str | None:
        if list(self.decay_t) != sorted(self.decay_t):
            return f"decay_t={list(self.decay_t)!r} is not in order, and timm's bisection misses some; sort it"
        return super().odd_decay()

    def decay(self) -> Tree:
        ends = sorted(set(self.decay_t))
        passed = [0, *(bisect_right(self.decay_t, end) for end in ends)]
        values = [bounded(self.base_lr * power(self.decay_rate, n)) if self.base_lr else 0.0 for n in passed]
        return levels(values, [end - 1 for end in ends])
