"""DeepSpeed's warm-ups, followed by a constant rate, a line or a cosine."""

from __future__ import annotations

import math
from dataclasses import KW_ONLY, dataclass

from ...program import Curve, Tree
from .. import checks
from ..nodes import flat, phases
from .common import DeepSpeedSchedule


@dataclass(frozen=True, repr=False)
class WarmupLR(DeepSpeedSchedule):
    """A warm-up, then a constant rate.

    With N = max(2, warmup_num_steps) and g(k) = ln(k + 1) / ln(N) ("log") or k / N ("linear")::

        f(0) = min_lr
        f(t) = min_lr + (max_lr - min_lr) * g(t - 1)    t <= N
             = max_lr                                   later

    warmup_min_lr, warmup_max_lr: rates; warmup_max_lr=None is the optimizer's, base_lr. warmup_num_steps: updates, an
    int above 0. warmup_type: "log" or "linear"; DeepSpeed takes anything else for "log". base_lr: the optimizer's rate
    when DeepSpeed's scheduler is constructed.
    Raises ValueError for warmup_num_steps that is not an int or below 1, or if there is neither warmup_max_lr nor
    base_lr; TypeError for a rate that is no number.

    >>> deepspeed.WarmupLR(0.0, 1.0, warmup_num_steps=10, warmup_type="linear")([0, 1, 2, 10, 11]).tolist()
    [0.0, 0.0, 0.1, 0.9, 1.0]

    Source: DeepSpeed 0.19.8, runtime/lr_schedules.py.
    """

    warmup_min_lr: float = 0.0
    warmup_max_lr: float | None = None
    warmup_num_steps: int = 1000
    warmup_type: str = "log"
    _: KW_ONLY
    base_lr: float | None = None

    group_arguments = ("warmup_min_lr", "warmup_max_lr")

    def check(self) -> None:
        _check_warmup(self)

    def negative_rate(self) -> str | None:
        return _negative_rates(self.warmup_min_lr, _peak(self))

    def oddity(self) -> str | None:
        return _odd_rates(self.warmup_min_lr, _peak(self)) or _odd_warmup(self)

    def lower(self) -> Tree:
        low, swing = self.warmup_min_lr, _peak(self) - self.warmup_min_lr
        warmup, end = _warmup(self, low, swing)
        # The sum is what DeepSpeed computes; it may differ from warmup_max_lr in the last bit.
        return phases((flat(low), warmup, flat(low + swing)), (1.0, end))


@dataclass(frozen=True, repr=False)
class WarmupDecayLR(DeepSpeedSchedule):
    """A warm-up, then a line down to the rate it began with.

    As WarmupLR while t <= N; then, with T = total_num_steps::

        f(t) = min_lr + (max_lr - min_lr) * max(0, (T - (t - 1)) / max(1, T - N))

    total_num_steps: T, updates, the warm-up included; min_lr is reached at update T + 1. warmup_min_lr,
    warmup_max_lr: rates; None is the optimizer's, base_lr, but the default is 0.001. warmup_num_steps: updates, an int
    above 0. warmup_type: "log" or "linear"; DeepSpeed takes anything else for "log". base_lr: the optimizer's rate.
    Raises ValueError for warmup_num_steps that is not an int or below 1, or if there is neither warmup_max_lr nor
    base_lr; TypeError for a rate or total_num_steps that is no number.

    >>> deepspeed.WarmupDecayLR(110, 0.0, 1.0, warmup_num_steps=10)([0, 1, 11, 61, 111]).tolist()
    [0.0, 0.0, 1.0, 0.5, 0.0]

    Source: DeepSpeed 0.19.8, runtime/lr_schedules.py.
    """

    total_num_steps: int
    warmup_min_lr: float = 0.0
    warmup_max_lr: float | None = 0.001
    warmup_num_steps: int = 1000
    warmup_type: str = "log"
    _: KW_ONLY
    base_lr: float | None = None

    group_arguments = ("warmup_min_lr", "warmup_max_lr")

    def check(self) -> None:
        _check_warmup(self)

    def negative_rate(self) -> str | None:
        return _negative_rates(self.warmup_min_lr, _peak(self))

    def oddity(self) -> str | None:
        return _odd_rates(self.warmup_min_lr, _peak(self)) or _odd_total(self) or _odd_warmup(self)

    def lower(self) -> Tree:
        low, swing = self.warmup_min_lr, _peak(self) - self.warmup_min_lr
        warmup, end = _warmup(self, low, swing)
        length = max(1.0, float(self.total_num_steps - _num_steps(self)))
        decay = Curve("power", origin=self.total_num_steps + 1.0, limit=0.0, divisor=-length, offset=low, scale=swing)
        return phases((flat(low), warmup, decay), (1.0, end))


@dataclass(frozen=True, repr=False)
class WarmupCosineLR(DeepSpeedSchedule):
    """A warm-up, then half a cosine, both as parts of the optimizer's rate.

    With N = max(2, warmup_num_steps), T = total_num_steps, r = warmup_min_ratio, c = cos_min_ratio and g as in
    WarmupLR::

        f(0) = 0
        f(t) = base_lr * (r + (1 - r) * g(t - 1))                               t <= N
             = base_lr * max(0, c + (1 - c) * (1 + cos(pi * u)) / 2)            u = min(1, (t - N) / max(1, T - N))

    total_num_steps: updates, the warm-up included. warmup_min_ratio, cos_min_ratio: parts of base_lr.
    warmup_num_steps: updates, an int above 0. warmup_type: "log" or "linear"; DeepSpeed takes anything else for "log".
    base_lr: the optimizer's rate when DeepSpeed's scheduler is constructed, at least 0. The rate of update 0 is 0
    whatever r is, and after a linear warm-up base_lr itself is never used.
    Raises ValueError for warmup_num_steps that is not an int or below 1 or a negative base_lr, TypeError for a ratio,
    total_num_steps or base_lr that is no number (DeepSpeed finds a list of ratios at the first update only).

    >>> lr = deepspeed.WarmupCosineLR(110, warmup_num_steps=10, cos_min_ratio=0.0, base_lr=0.1)
    >>> lr([0, 1, 10, 60, 110]).round(3).tolist()
    [0.0, 0.0, 0.1, 0.05, 0.0]

    Source: DeepSpeed 0.19.8, runtime/lr_schedules.py.
    """

    total_num_steps: int
    warmup_min_ratio: float = 0.0
    warmup_num_steps: int = 1000
    cos_min_ratio: float = 0.0001
    warmup_type: str = "log"
    _: KW_ONLY
    base_lr: float

    def check(self) -> None:
        self.check_count("warmup_num_steps")
        self.make_plain()
        checks.number(self.word, "base_lr", self.base_lr, at_least=0.0)

    def negative_rate(self) -> str | None:
        return _negative_rates(self.base_lr * self.warmup_min_ratio, self.base_lr)

    def oddity(self) -> str | None:
        odd = _odd_rates(self.base_lr * self.warmup_min_ratio, self.base_lr) or _odd_total(self)
        if odd is None and self.cos_min_ratio > 1.0:
            return f"the rate rises after the warm-up, got cos_min_ratio={self.cos_min_ratio!r}; make it 1 or less"
        return odd or _odd_warmup(self)

    def lower(self) -> Tree:
        ratio, floor = self.warmup_min_ratio, self.cos_min_ratio
        warmup, end = _warmup(self, self.base_lr * ratio, self.base_lr * (1.0 - ratio))
        steps = _num_steps(self)
        length = max(1.0, float(self.total_num_steps - steps))
        decay = Curve(
            "cosine",
            origin=float(steps),
            limit=length,
            divisor=length,
            offset=self.base_lr * floor,
            scale=self.base_lr * (1.0 - floor),
            low=0.0,
        )
        return phases((flat(0.0), warmup, decay), (1.0, end))


# What the three warm-ups share.

_WarmsUp = WarmupLR | WarmupDecayLR | WarmupCosineLR


def _check_warmup(schedule: WarmupLR | WarmupDecayLR) -> None:
    schedule.check_count("warmup_num_steps")
    if schedule.warmup_max_lr is None and schedule.base_lr is None:
        raise ValueError(
            f"{schedule.word}: warmup_max_lr=None is the optimizer's rate; pass it as base_lr=..., got None for both"
        )
    schedule.make_plain()


def _peak(schedule: WarmupLR | WarmupDecayLR) -> float:
    peak = schedule.base_lr if schedule.warmup_max_lr is None else schedule.warmup_max_lr
    assert peak is not None  # _check_warmup
    return peak


def _num_steps(schedule: _WarmsUp) -> int:
    return max(2, schedule.warmup_num_steps)  # 1 / ln(1) would be infinite


def _warmup(schedule: _WarmsUp, low: float, swing: float) -> tuple[Curve, float]:
    """low + swing * g(t - 1), and the end of its phase."""
    steps = _num_steps(schedule)
    if schedule.warmup_type == "linear":
        curve = Curve("power", origin=1.0, divisor=float(steps), offset=low, scale=swing)
    else:
        curve = Curve("logarithm", p=1.0 / math.log(steps), offset=low, scale=swing)
    return curve, steps + 1.0


def _negative_rates(low: float, peak: float) -> str | None:
    if min(low, peak) >= 0.0:
        return None
    return f"the rate turns negative: the warm-up goes from {low!r} to {peak!r}; make both 0 or more"


def _odd_rates(low: float, peak: float) -> str | None:
    if peak == 0.0 and low == 0.0:
        return (
            "the rate is 0 at every update: the warm-up ends at the optimizer's rate, which another scheduler may have "
            "set to 0 before; set it to the peak you want"
        )
    if low > peak:
        return f"the rate falls during the warm-up, from {low!r} to {peak!r}; swap them, or set warmup_max_lr"
    return None


def _odd_total(schedule: WarmupDecayLR | WarmupCosineLR) -> str | None:
    total, steps = schedule.total_num_steps, _num_steps(schedule)
    if total > steps:
        return None
    return (
        f"the rate jumps to its lowest after the warm-up, without a decay, got total_num_steps={total!r} and "
        f"{steps} steps of warm-up; total_num_steps counts the warm-up as well"
    )


def _odd_warmup(schedule: _WarmsUp) -> str | None:
    if schedule.warmup_type not in {"log", "linear"}:
        return f'warmup_type={schedule.warmup_type!r} is taken for "log"; write "log" or "linear"'
    if schedule.warmup_num_steps == 1:
        return "warmup_num_steps=1 is taken for 2, of which the first has the lowest rate; write 2"
    return None
