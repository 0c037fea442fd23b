"""DeepSpeed's range test and its one-cycle policy."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

from ...program import Curve, Repeat, Tree
from ..base import set_fields
from ..nodes import after, flat, line, phases
from .common import DeepSpeedSchedule

_BETA2 = 0.99  # what OneCycle writes beside its momentum


@dataclass(frozen=True, repr=False)
class LRRangeTest(DeepSpeedSchedule):
    """A rate that rises without an end: `f(t) = min_lr * (1 + step_rate * t / step_size)`.

    lr_range_test_min_lr: rate of update 0. lr_range_test_step_size: updates per rise by step_rate, an int above 0.
    lr_range_test_step_rate: rise per step_size, as a part of min_lr. lr_range_test_staircase: t / step_size is rounded
    down to an integer.
    Raises ValueError for a step size that is not an int or below 1, TypeError for a rate that is no number.

    >>> deepspeed.LRRangeTest(0.001, lr_range_test_step_size=10)([0, 10, 25]).tolist()
    [0.001, 0.002, 0.0035]

    Source: DeepSpeed 0.19.8, runtime/lr_schedules.py; Smith 2018, A disciplined approach to neural network
    hyper-parameters.
    """

    lr_range_test_min_lr: float = 1e-3
    lr_range_test_step_size: int = 2000
    lr_range_test_step_rate: float = 1.0
    lr_range_test_staircase: bool = False

    group_arguments = ("lr_range_test_min_lr",)

    def check(self) -> None:
        self.check_count("lr_range_test_step_size")
        self.make_plain()

    def negative_rate(self) -> str | None:
        low, rate = self.lr_range_test_min_lr, self.lr_range_test_step_rate
        if low < 0.0 or (low > 0.0 and rate < 0.0):
            return (
                "the rate turns negative, got "
                f"lr_range_test_min_lr={low!r} and lr_range_test_step_rate={rate!r}; make both positive"
            )
        return None

    def oddity(self) -> str | None:
        low, rate = self.lr_range_test_min_lr, self.lr_range_test_step_rate
        if low * rate == 0.0:
            return (
                f"the rate is {low!r} at every update, got lr_range_test_min_lr={low!r} and "
                f"lr_range_test_step_rate={rate!r}; make both positive"
            )
        return None

    def lower(self) -> Tree:
        low = self.lr_range_test_min_lr
        return Curve(
            "power",
            divisor=float(self.lr_range_test_step_size),
            stairs=float(self.lr_range_test_staircase),
            offset=low,
            scale=low * self.lr_range_test_step_rate,
        )


@dataclass(frozen=True, repr=False)
class OneCycle(DeepSpeedSchedule):
    """Up and down once, then an inverse decay, with a momentum that runs against the rate.

    With F and S the first and second step size, T = F + S::

        f(t) = min_lr + (max_lr - min_lr) * t / F               t <= F
             = min_lr + (max_lr - min_lr) * (T - t) / S         t <= T
             = min_lr / (1 + lr_rate * (t - T) / decay_step)    later

    cycle_min_lr, cycle_max_lr: rates. cycle_first_step_size: F, updates, above 0. cycle_second_step_size: S, updates,
    0 or more, as F unless given. cycle_first_stair_count, cycle_second_stair_count: stairs of each half (0: a line;
    the second as the first unless given). decay_step_size: updates per rise of the divisor by decay_lr_rate;
    0: cycle_min_lr for good.
    cycle_momentum: schedule beta1 too, in `companions`: cycle_min_mom at update 0, then cycle_max_mom where the rate is
    lowest, cycle_min_mom where it is highest, and cycle_max_mom * (1 + decay_mom_rate * (t - T) / decay_step) after
    the cycle. beta2 becomes 0.99, whatever the optimizer was given.
    Raises ValueError for a step size that is negative or no number (F: or 0), TypeError for a rate that is no number.

    >>> policy = deepspeed.OneCycle(0.1, 1.0, cycle_first_step_size=10)
    >>> policy([0, 5, 10, 15, 20, 99]).tolist()
    [0.1, 0.55, 1.0, 0.55, 0.1, 0.1]
    >>> policy.companions["beta1"]([0, 1, 10, 20]).tolist()
    [0.8, 0.89, 0.8, 0.9]
    >>> policy.companions["beta2"](0)
    0.99

    Source: DeepSpeed 0.19.8, runtime/lr_schedules.py; Smith 2018, A disciplined approach to neural network
    hyper-parameters.
    """

    cycle_min_lr: float
    cycle_max_lr: float
    decay_lr_rate: float = 0.0
    cycle_first_step_size: int = 2000
    cycle_second_step_size: int | None = None
    cycle_first_stair_count: int = 0
    cycle_second_stair_count: int | None = None
    decay_step_size: int = 0
    cycle_momentum: bool = True
    cycle_min_mom: float = 0.8
    cycle_max_mom: float = 0.9
    decay_mom_rate: float = 0.0

    group_arguments = ("cycle_min_lr", "cycle_max_lr", "cycle_min_mom", "cycle_max_mom")

    def check(self) -> None:
        for name in ("cycle_first_step_size", "cycle_second_step_size"):
            if getattr(self, name) is not None:
                set_fields(self, **{name: float(getattr(self, name))})
        if self.cycle_first_step_size <= 0:
            raise ValueError(
                f"{self.word}: cycle_first_step_size must be more than 0 updates, got {self.cycle_first_step_size!r}; "
                "cycle_second_step_size is the half that may be empty"
            )
        if self._halves[1] < 0:
            raise ValueError(
                f"{self.word}: cycle_second_step_size must be at least 0 updates, got {self.cycle_second_step_size!r}; "
                "leave it out for a half as long as the first"
            )
        unused = () if self.cycle_momentum else ("cycle_min_mom", "cycle_max_mom", "decay_mom_rate")
        self.make_plain(*(field.name for field in fields(self) if field.name not in unused))

    @property
    def _halves(self) -> tuple[float, float]:
        """F and S, in updates."""
        second = self.cycle_second_step_size
        return float(self.cycle_first_step_size), float(self.cycle_first_step_size if second is None else second)

    @property
    def _total(self) -> float:
        """T, in updates."""
        first, second = self._halves
        return first + second

    def negative_rate(self) -> str | None:
        if min(self.cycle_min_lr, self.cycle_max_lr) < 0.0:
            return (
                f"the rate turns negative, got cycle_min_lr={self.cycle_min_lr!r} and "
                f"cycle_max_lr={self.cycle_max_lr!r}; make both 0 or more"
            )
        if self.decay_lr_rate * self.decay_step_size < 0.0:
            pole = self._total - self.decay_step_size / self.decay_lr_rate
            if math.isinf(pole):
                return None
            return (
                f"after the cycle the rate grows, without bound near update {pole:g}, and is negative from there, got "
                f"decay_lr_rate={self.decay_lr_rate!r} and decay_step_size={self.decay_step_size!r}; make both positive"
            )
        return None

    def oddity(self) -> str | None:
        total = self._total
        if self.cycle_momentum and (last := self._momentum_lasts()) < math.inf:
            return (
                f"beta1 is outside [0, 1) after update {last:g}, got cycle_min_mom={self.cycle_min_mom!r}, "
                f"cycle_max_mom={self.cycle_max_mom!r} and decay_mom_rate={self.decay_mom_rate!r}; set "
                "decay_mom_rate=0, or cycle_momentum=False and betas of your own"
            )
        if self._halves[1] == 0.0:
            return (
                "cycle_max_lr is never used, got cycle_second_step_size=0: where the peak would be, the rate is "
                "cycle_min_lr again; set cycle_second_step_size=1"
            )
        if self.decay_step_size == 0 and (self.decay_lr_rate or (self.cycle_momentum and self.decay_mom_rate)):
            return "nothing decays after the cycle, got decay_step_size=0; set it, or the decay rates to 0"
        if self.cycle_min_lr > self.cycle_max_lr:
            return (
                f"the cycle goes down before it goes up, got cycle_min_lr={self.cycle_min_lr!r} above "
                f"cycle_max_lr={self.cycle_max_lr!r}; swap them"
            )
        if not total.is_integer():
            return (
                f"a second cycle begins at {total!r} and lasts for one update, got step sizes {self._halves}; make "
                "their sum an integer"
            )
        return None

    def _momentum_lasts(self) -> float:
        """Updates during which the momentum is in [0, 1)."""
        low, high = self.cycle_min_mom, self.cycle_max_mom
        if not (0.0 <= low < 1.0 and 0.0 <= high < 1.0):
            return 0.0
        growth = high * self.decay_mom_rate / self.decay_step_size if self.decay_step_size else 0.0
        if growth == 0.0:
            return math.inf
        return self._total + ((1.0 if growth > 0.0 else 0.0) - high) / growth

    def lower(self) -> Tree:
        low, high, total = self.cycle_min_lr, self.cycle_max_lr, self._total
        tail = flat(low)
        length = self.decay_step_size / self.decay_lr_rate if self.decay_lr_rate else 0.0
        # Beyond the largest double no update is late enough to tell the decay from none.
        if length and math.isfinite(length):
            # 1 - (t - T) / -length: from the other end, (t - T + length) / length would cancel where it is small.
            tail = Curve("power", origin=total, divisor=-length, complement=True, p=-1.0, scale=low)
        children, ends = self._cycle(low, high)
        return phases((*children, tail), ends)

    def lower_companions(self) -> dict[str, Tree]:
        if not self.cycle_momentum:
            return {}
        low, high, total = self.cycle_min_mom, self.cycle_max_mom, self._total
        tail = flat(high)
        if self.decay_mom_rate and self.decay_step_size:
            tail = line(high, high + high * self.decay_mom_rate, float(self.decay_step_size), origin=total)
        children, ends = self._cycle(high, low)
        # The constructor writes cycle_min_mom; the first step of the schedule already writes the cycle's momentum.
        beta1 = phases((flat(low), *children, tail), (1.0, *ends))
        return {"beta1": beta1, "beta2": flat(_BETA2)}

    def _cycle(self, edge: float, middle: float) -> tuple[tuple[Tree, ...], tuple[float, ...]]:
        """From edge to middle and back: the phases and their ends."""
        first, second = self._halves
        total = self._total
        first_stairs = self.cycle_first_stair_count
        second_stairs = first_stairs if self.cycle_second_stair_count is None else self.cycle_second_stair_count
        swing = middle - edge
        up = Curve("power", divisor=first, stairs=max(0.0, float(first_stairs)), offset=edge, scale=swing)
        if second == 0.0:
            # The update at F = T belongs to the next cycle, whose scale is 0.
            children: tuple[Tree, ...] = (up,)
            ends: tuple[float, ...] = (first,)
        else:
            down = Curve(
                "power", origin=total, divisor=-second, stairs=max(0.0, float(second_stairs)), offset=edge, scale=swing
            )
            children, ends = (up, down), (after(first), after(total))
        if not total.is_integer():
            # t is the last update before total + 1, and the cycle has begun again.
            again = Repeat(phases(children, ends[:-1]), period=total)
            children, ends = (*children, again), (*ends, total + 1.0)
        return children, ends
