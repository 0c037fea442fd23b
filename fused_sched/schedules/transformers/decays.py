"""Constant, linear, polynomial and inverse square root, each after a linear warm-up."""

from __future__ import annotations

import math
from dataclasses import KW_ONLY, dataclass
from math import inf

from ...program import Curve, Tree
from ..library import Failure
from ..nodes import after, flat, phases
from .base import ReadsTheDefaultRate, TransformersSchedule, warmup


@dataclass(frozen=True, repr=False)
class get_constant_schedule(TransformersSchedule):
    """The group's rate: `f(t) = base_lr`.

    base_lr: the group's rate. Raises TypeError or ValueError if it is not a finite number.

    >>> get_constant_schedule(base_lr=0.5)(100)
    0.5

    Source: transformers 5.23.0, optimization.py.
    """

    _: KW_ONLY
    base_lr: float

    def factor(self) -> Tree:
        return flat(1.0)


@dataclass(frozen=True, repr=False)
class get_constant_schedule_with_warmup(TransformersSchedule):
    """A linear warm-up, then the group's rate: `base_lr * t / W` for t < W, then `base_lr`.

    num_warmup_steps: W, in updates; 0 or less is no warm-up. base_lr: the group's rate.
    Raises TypeError or ValueError for anything but finite numbers.

    >>> get_constant_schedule_with_warmup(4, base_lr=1.0)([0, 1, 4, 100]).tolist()
    [0.0, 0.25, 1.0, 1.0]

    Source: transformers 5.23.0, optimization.py.
    """

    num_warmup_steps: int
    _: KW_ONLY
    base_lr: float

    def factor(self) -> Tree:
        return phases((warmup(self.num_warmup_steps), flat(1.0)), (self.num_warmup_steps,))


@dataclass(frozen=True, repr=False)
class get_linear_schedule_with_warmup(TransformersSchedule):
    """A linear warm-up and decay: `base_lr * t / W` for t < W, then `base_lr * max(0, (N - t) / max(1, N - W))`.

    num_warmup_steps: W, in updates. num_training_steps: N, in updates, the warm-up included; the rate is 0 from
    t = N on. base_lr: the group's rate. Raises TypeError or ValueError for anything but finite numbers; warns if
    N <= W, where the rate drops from the warm-up to 0.

    >>> get_linear_schedule_with_warmup(4, 12, base_lr=1.0)([0, 1, 4, 8, 12, 20]).tolist()
    [0.0, 0.25, 1.0, 0.5, 0.0, 0.0]

    Source: transformers 5.23.0, optimization.py.
    """

    num_warmup_steps: int
    num_training_steps: int
    _: KW_ONLY
    base_lr: float

    def oddity(self) -> str | None:
        if self.num_training_steps > self.num_warmup_steps:
            return None
        return (
            f"num_training_steps={self.num_training_steps} leaves no decay after num_warmup_steps="
            f"{self.num_warmup_steps}: the rate drops to 0 where the warm-up ends; num_training_steps counts the "
            "warm-up as well"
        )

    def factor(self) -> Tree:
        w, n = self.num_warmup_steps, self.num_training_steps
        decay = Curve("power", origin=n, divisor=-max(1, n - w), limit=0.0)
        return phases((warmup(w), decay), (w,))


@dataclass(frozen=True, repr=False)
class get_polynomial_decay_schedule_with_warmup(ReadsTheDefaultRate):
    """A linear warm-up, then a power of what remains, down to a rate that is then held.

    `base_lr * t / W` for t < W, then `base_lr * ((L - lr_end) * (1 - (t-W) / (N-W))^power + lr_end) / L`.

    num_warmup_steps: W, in updates. num_training_steps: N, in updates, the warm-up included. lr_end: rate from
    t = N on, of a group whose rate is L; others end in proportion. power: exponent. base_lr: the group's rate.
    default_lr: L, `optimizer.defaults["lr"]`, by default base_lr.
    Raises ValueError if L <= lr_end, ZeroDivisionError if N = W = 0, where the library's first update divides by 0;
    TypeError or ValueError for anything but finite numbers. Warns if the library divides by 0 later (N = W, or
    a negative power), and holds the last value before.

    >>> get_polynomial_decay_schedule_with_warmup(0, 10, lr_end=0.0, power=2.0, base_lr=1.0)([0, 5, 10]).tolist()
    [1.0, 0.25, 0.0]

    Source: transformers 5.23.0, optimization.py.
    """

    num_warmup_steps: int
    num_training_steps: int
    lr_end: float = 1e-7
    power: float = 1.0
    _: KW_ONLY
    base_lr: float
    default_lr: float | None = None

    @property
    def _error_step(self) -> float:
        """Where the library divides by zero."""
        w, n = self.num_warmup_steps, self.num_training_steps
        is_used = n >= w and n >= 0 and float(n).is_integer()
        return n if is_used and (n == w or self.power < 0) else inf

    def check(self) -> None:
        super().check()
        if not self.initial_lr > self.lr_end:
            raise ValueError(
                f"{self.word}: lr_end must be less than the optimizer's rate, got lr_end={self.lr_end} and "
                f"{self.initial_lr}; give the optimizer's default rate as default_lr if base_lr is a group's own"
            )
        if self._error_step == 0:
            raise ZeroDivisionError(
                f"{self.word}: num_training_steps must be more than num_warmup_steps, got {self.num_training_steps} "
                f"and {self.num_warmup_steps}, with power={self.power}; the first update divides by zero"
            )

    def failure(self) -> Failure | None:
        if self._error_step == inf:
            return None
        rule = f"let num_training_steps exceed num_warmup_steps={self.num_warmup_steps}"
        return Failure(int(self._error_step), "ZeroDivisionError", f"{rule}, and power={self.power} be more than 0")

    def negative_rate(self) -> str | None:
        return f"the rate turns negative, down to lr_end={self.lr_end}; use 0.0" if self.lr_end < 0 else None

    def oddity(self) -> str | None:
        w, n = self.num_warmup_steps, self.num_training_steps
        if n < w:
            return (
                f"num_training_steps={n} lies inside num_warmup_steps={w}: the rate drops to lr_end={self.lr_end} "
                "where the warm-up ends; num_training_steps counts the warm-up as well"
            )
        return None

    def factor(self) -> Tree:
        w, n = self.num_warmup_steps, self.num_training_steps
        end = self.lr_end / self.initial_lr
        last = self._error_step - 1
        if last < w:
            return warmup(w, held_from=last)
        # As the library, 1 - u and then the power: (N - t) / (N - W) would differ where the power is negative.
        decay = Curve(
            "power",
            origin=w,
            limit=last - w,
            divisor=n - w if n > w else 1,
            complement=True,
            p=self.power,
            offset=end,
            scale=1.0 - end,
        )
        if last < inf:
            return phases((warmup(w), decay), (w,))
        # 0^0 is 1: for power = 0 only the step after N is the end.
        return phases((warmup(w), decay, flat(end)), (w, n if self.power > 0 else after(n)))


@dataclass(frozen=True, repr=False)
class get_inverse_sqrt_schedule(TransformersSchedule):
    """A linear warm-up, then one over a square root, without an end.

    `base_lr * t / W` for t < W, then `base_lr / sqrt((t + timescale - W) / timescale)`.

    num_warmup_steps: W, in updates. timescale: updates, counted from W - timescale on, per halving of the squared
    rate; by default W, or 10000 if W = 0. base_lr: the group's rate.
    Raises ZeroDivisionError or ValueError where the library's first update does (timescale = 0 and W = 0, ...);
    TypeError or ValueError for anything but finite numbers. Warns if the library raises later (timescale <= 0), and
    holds the last value before.

    >>> get_inverse_sqrt_schedule(4, base_lr=1.0)([0, 1, 4, 16, 64]).tolist()
    [0.0, 0.25, 1.0, 0.5, 0.25]

    Source: transformers 5.23.0, optimization.py.
    """

    num_warmup_steps: int
    timescale: int | None = None
    _: KW_ONLY
    base_lr: float

    @property
    def _timescale(self) -> float:
        return (self.num_warmup_steps or 10_000) if self.timescale is None else self.timescale

    @property
    def _error_step(self) -> float:
        """Where the library takes the root of nothing, or of something negative."""
        w, scale = self.num_warmup_steps, self._timescale
        return inf if scale > 0 else max(0, math.ceil(w), math.ceil(w - scale))

    def check(self) -> None:
        super().check()
        if self._error_step > 0:
            return
        message = (
            f"{self.word}: timescale must be more than 0, got {self._timescale} with num_warmup_steps="
            f"{self.num_warmup_steps}; timescale=None is num_warmup_steps"
        )
        divides_by_zero = self._timescale == 0 or self._timescale == self.num_warmup_steps
        raise ZeroDivisionError(message) if divides_by_zero else ValueError(message)

    def failure(self) -> Failure | None:
        if self._error_step == inf:
            return None
        error = f"an arithmetic error, as timescale={self._timescale},"
        return Failure(int(self._error_step), error, "use a positive timescale")

    def factor(self) -> Tree:
        w, scale = self.num_warmup_steps, self._timescale
        last = self._error_step - 1
        if last < w:
            return warmup(w, held_from=last)
        origin = w - scale
        decay = Curve("power", origin=origin, limit=last - origin, divisor=scale, p=-0.5)
        return phases((warmup(w), decay), (w,))
