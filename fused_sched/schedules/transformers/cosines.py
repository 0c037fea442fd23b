"""Cosines after a linear warm-up. All but the one with restarts go on past num_training_steps."""

from __future__ import annotations

import math
from dataclasses import KW_ONLY, dataclass

from ...program import Curve, Tree
from ..nodes import flat, line, phases
from .base import ReadsTheDefaultRate, TransformersSchedule, warmup


class Wave(TransformersSchedule, abstract=True):
    """A cosine that nothing stops."""

    num_warmup_steps: int
    num_training_steps: int
    num_cycles: float

    @property
    def floor(self) -> float:
        """Least factor."""
        return 0.0

    def oddity(self) -> str | None:
        w, n = self.num_warmup_steps, self.num_training_steps
        if self.num_cycles == 0 or self.floor == 1.0:
            return None
        if n <= w:
            return (
                f"num_training_steps={n} leaves no decay after num_warmup_steps={w}: the rate then goes through "
                f"num_cycles={self.num_cycles} waves per update; num_training_steps counts the warm-up as well"
            )
        return (
            f"the rate follows the cosine past num_training_steps={n}, up again; stop there, or append "
            f"schedules.constant(...) to it with schedules.join([...], [{math.ceil(n)}])"
        )

    def wave(self, origin: float) -> Curve:
        """The factor after the warm-up, its clock being 0 at `origin`."""
        return Curve(
            "cosine",
            origin=origin,
            divisor=max(1, self.num_training_steps - self.num_warmup_steps),
            p=2.0 * self.num_cycles,
            offset=self.floor,
            scale=1.0 - self.floor,
            low=0.0,
        )


class WaveWithFloor(Wave, ReadsTheDefaultRate, abstract=True):
    """A wave that ends at a least rate, given as such or as a ratio."""

    min_lr: float | None
    min_lr_rate: float | None

    def check(self) -> None:
        super().check()
        given = [name for name in ("min_lr", "min_lr_rate") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(
                f"{self.word}: exactly one of min_lr and min_lr_rate must be set, got {' and '.join(given) or 'none'};"
                " min_lr is a rate, min_lr_rate its ratio to the optimizer's"
            )
        if self.min_lr is not None and self.initial_lr == 0:
            raise ZeroDivisionError(
                f"{self.word}: min_lr={self.min_lr} is divided by the optimizer's rate, got 0; give min_lr_rate"
            )

    @property
    def floor(self) -> float:
        if self.min_lr_rate is not None:
            return self.min_lr_rate
        assert self.min_lr is not None  # one of them is
        return self.min_lr / self.initial_lr


@dataclass(frozen=True, repr=False)
class get_cosine_schedule_with_warmup(Wave):
    """A linear warm-up, then waves of a cosine, without an end.

    `base_lr * t / W` for t < W, then `base_lr * (1 + cos(2 pi * num_cycles * u)) / 2`, u = (t - W) / max(1, N - W).

    num_warmup_steps: W, in updates. num_training_steps: N, in updates, the warm-up included. num_cycles: waves up
    to N; 0.5 is one descent. base_lr: the group's rate.
    The wave does not stop at N, as a ScheduleWarning says. Raises TypeError or ValueError for anything but finite
    numbers.

    >>> import warnings; warnings.simplefilter("ignore")  # the rate rises again after step 12
    >>> get_cosine_schedule_with_warmup(4, 12, base_lr=1.0)([0, 1, 4, 8, 12, 16]).tolist()
    [0.0, 0.25, 1.0, 0.5, 0.0, 0.5]

    Source: transformers 5.23.0, optimization.py.
    """

    num_warmup_steps: int
    num_training_steps: int
    num_cycles: float = 0.5
    _: KW_ONLY
    base_lr: float

    def factor(self) -> Tree:
        w = self.num_warmup_steps
        return phases((warmup(w), self.wave(origin=w)), (w,))


@dataclass(frozen=True, repr=False)
class get_cosine_with_hard_restarts_schedule_with_warmup(TransformersSchedule):
    """A linear warm-up, then half cosines, each from the full rate to 0, then 0.

    `base_lr * t / W` for t < W, then `base_lr * (1 + cos(pi * frac(num_cycles * u))) / 2` with
    u = (t - W) / max(1, N - W), and 0 from u = 1 on. frac is rounded as the library rounds it, which
    puts some restarts one update late.

    num_warmup_steps: W, in updates. num_training_steps: N, in updates, the warm-up included. num_cycles: descents
    up to N. base_lr: the group's rate. Raises TypeError or ValueError for anything but finite numbers; warns
    if N <= W, where one update at base_lr is followed by 0.

    >>> s = get_cosine_with_hard_restarts_schedule_with_warmup(4, 12, num_cycles=2, base_lr=1.0)
    >>> s([0, 1, 4, 6, 8, 10, 12]).tolist()
    [0.0, 0.25, 1.0, 0.5, 1.0, 0.5, 0.0]

    Source: transformers 5.23.0, optimization.py.
    """

    num_warmup_steps: int
    num_training_steps: int
    num_cycles: int = 1
    _: KW_ONLY
    base_lr: float

    def oddity(self) -> str | None:
        if self.num_training_steps > self.num_warmup_steps:
            return None
        return (
            f"num_training_steps={self.num_training_steps} leaves no decay after num_warmup_steps="
            f"{self.num_warmup_steps}: the rate drops to 0 one update after; num_training_steps counts the warm-up "
            "as well"
        )

    def factor(self) -> Tree:
        w, n = self.num_warmup_steps, self.num_training_steps
        length = max(1, n - w)
        # A negative num_cycles saws the other way: the clock then counts down.
        teeth = Curve(
            "cosine", origin=w, divisor=-length if self.num_cycles < 0 else length, repeats=abs(self.num_cycles)
        )
        down = teeth if self.num_cycles else flat(1.0)
        return phases((warmup(w), down, flat(0.0)), (w, n if n - w >= 1 else w + 1))


@dataclass(frozen=True, repr=False)
class get_cosine_with_min_lr_schedule_with_warmup(WaveWithFloor):
    """As `get_cosine_schedule_with_warmup`, between base_lr and a floor: `base_lr * max(0, r + (1 - r) * wave(t))`.

    num_warmup_steps, num_training_steps: in updates, the second with the warm-up included. num_cycles: waves up to
    num_training_steps. min_lr or min_lr_rate, one of them: the floor of a group whose rate is default_lr, or its
    ratio r = min_lr / default_lr. base_lr: the group's rate. default_lr: `optimizer.defaults["lr"]`, by default
    base_lr.
    The wave does not stop at num_training_steps, as a ScheduleWarning says. Raises ValueError for both or neither of
    min_lr and min_lr_rate, ZeroDivisionError for min_lr with a default_lr of 0; TypeError or ValueError for anything
    but finite numbers.

    >>> import warnings; warnings.simplefilter("ignore")  # the rate rises again after step 12
    >>> get_cosine_with_min_lr_schedule_with_warmup(4, 12, min_lr=0.5, base_lr=1.0)([0, 4, 8, 12]).tolist()
    [0.0, 1.0, 0.75, 0.5]

    Source: transformers 5.23.0, optimization.py.
    """

    num_warmup_steps: int
    num_training_steps: int
    num_cycles: float = 0.5
    min_lr: float | None = None
    min_lr_rate: float | None = None
    _: KW_ONLY
    base_lr: float
    default_lr: float | None = None

    def factor(self) -> Tree:
        w = self.num_warmup_steps
        return phases((warmup(w), self.wave(origin=w)), (w,))


@dataclass(frozen=True, repr=False)
class get_cosine_with_min_lr_schedule_with_warmup_lr_rate(WaveWithFloor):
    """As `get_cosine_with_min_lr_schedule_with_warmup`, one update earlier, the warm-up starting above 0.

    Warm-up: `base_lr * (t + 1) / W`, or `base_lr * (v + (1 - v) * t / max(1, W - 1))` with v = warmup_lr_rate. The
    wave's u is (t - W + 1) / (N - W): its floor comes at t = N - 1.

    num_warmup_steps, num_training_steps: W and N, in updates. num_cycles: waves up to N. min_lr or min_lr_rate, one
    of them: the floor of a group whose rate is default_lr, or its ratio. warmup_lr_rate: ratio of the first rate,
    by default 1 / W. base_lr: the group's rate. default_lr: `optimizer.defaults["lr"]`, by default base_lr.
    The wave does not stop at N, as a ScheduleWarning says. Raises ValueError for both or neither of min_lr and
    min_lr_rate, ZeroDivisionError for min_lr with a default_lr of 0; TypeError or ValueError for anything but finite
    numbers.

    >>> import warnings; warnings.simplefilter("ignore")  # the rate rises again after step 12
    >>> s = get_cosine_with_min_lr_schedule_with_warmup_lr_rate(4, 12, min_lr_rate=0.5, base_lr=1.0)
    >>> s([0, 1, 3, 7, 11]).tolist()
    [0.25, 0.5, 1.0, 0.75, 0.5]

    Source: transformers 5.23.0, optimization.py.
    """

    num_warmup_steps: int
    num_training_steps: int
    num_cycles: float = 0.5
    min_lr: float | None = None
    min_lr_rate: float | None = None
    warmup_lr_rate: float | None = None
    _: KW_ONLY
    base_lr: float
    default_lr: float | None = None

    def negative_rate(self) -> str | None:
        if self.warmup_lr_rate is not None and self.warmup_lr_rate < 0 < self.num_warmup_steps:
            return f"warmup_lr_rate={self.warmup_lr_rate}: the rate starts negative; use 0.0"
        return None

    def factor(self) -> Tree:
        w = self.num_warmup_steps
        if self.warmup_lr_rate is None:
            up = Curve("power", origin=-1, divisor=max(1, w))
        else:
            up = line(self.warmup_lr_rate, 1.0, max(1, w - 1))
        return phases((up, self.wave(origin=w - 1)), (w,))
