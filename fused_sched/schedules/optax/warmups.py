"""A linear warm-up, and what follows it."""

from __future__ import annotations

from dataclasses import dataclass

from ...program import Tree
from .base import OptaxSchedule, joined
from .transitions import Decay, cosine, exponential, negative_decay, odd_decay, odd_exponent, polynomial


@dataclass(frozen=True, repr=False)
class warmup_constant_schedule(OptaxSchedule):
    """A line to a constant: `f(t) = (init_value - peak_value) * (1 - min(t, W) / W) + peak_value`.

    init_value: first rate. peak_value: rate from t = W on. warmup_steps: W, in updates; with W <= 0 the rate is
    init_value for ever, as a ScheduleWarning says. Raises TypeError or ValueError for anything but finite numbers.

    >>> warmup_constant_schedule(0.0, 1.0, 4)([0, 1, 4, 9]).tolist()
    [0.0, 0.25, 1.0, 1.0]

    Source: optax 0.2.8.
    """

    init_value: float
    peak_value: float
    warmup_steps: int

    def oddity(self) -> str | None:
        if self.warmup_steps > 0 or self.init_value == self.peak_value:
            return None
        return (
            f"warmup_steps={self.warmup_steps} keeps the rate at init_value={self.init_value}, which is not the peak; "
            f"use constant_schedule({self.peak_value}) for no warm-up"
        )

    def lower(self) -> Tree:
        return polynomial(self.init_value, self.peak_value, 1.0, self.warmup_steps)


@dataclass(frozen=True, repr=False)
class warmup_cosine_decay_schedule(OptaxSchedule):
    """A linear warm-up from init_value to peak_value over W updates, then half a cosine to end_value at t = T.

    `f(t) = peak_value * ((1 - a) * c^exponent + a)` for t >= W, a = end_value / peak_value,
    c = (1 + cos(pi * min(t - W, T - W) / (T - W))) / 2.

    init_value, peak_value, end_value: rates. warmup_steps: W, in updates; with W = 0 the rate starts at its peak.
    decay_steps: T, the warm-up included, more than W. exponent: of the cosine.
    Raises ValueError for T <= W, TypeError or ValueError for anything but finite numbers; warns for a negative
    exponent, for W < 0 and for an end_value that a peak of 0 makes 0.

    >>> warmup_cosine_decay_schedule(0.0, 1.0, 4, 12, end_value=0.5)([0, 1, 4, 8, 12, 99]).tolist()
    [0.0, 0.25, 1.0, 0.75, 0.5, 0.5]

    Source: optax 0.2.8.
    """

    init_value: float
    peak_value: float
    warmup_steps: int
    decay_steps: int
    end_value: float = 0.0
    exponent: float = 1.0

    def check(self) -> None:
        super().check()
        if not self.decay_steps > self.warmup_steps:
            raise ValueError(
                f"{self.word}: decay_steps must be more than warmup_steps, got {self.decay_steps} and "
                f"{self.warmup_steps}; decay_steps counts the warm-up as well"
            )

    def oddity(self) -> str | None:
        if self.warmup_steps < 0:
            return f"warmup_steps={self.warmup_steps} begins inside the decay; use 0 for no warm-up"
        if self.peak_value == 0 != self.end_value:
            return f"with peak_value=0 the rate ends at 0 and not at end_value={self.end_value}; use linear_schedule"
        return odd_exponent(self.exponent)

    def lower(self) -> Tree:
        peak, w = self.peak_value, self.warmup_steps
        alpha = 0.0 if peak == 0 else self.end_value / peak
        decay = cosine(peak, self.decay_steps - w, alpha, self.exponent)
        return joined([polynomial(self.init_value, peak, 1.0, w), decay], [w])


@dataclass(frozen=True, repr=False)
class warmup_exponential_decay_schedule(OptaxSchedule):
    """A linear warm-up from init_value to peak_value, then `exponential_decay(peak_value, ...)(t - W)`.

    init_value, peak_value: rates. warmup_steps: W, in updates; with W = 0 the rate starts at its peak.
    transition_steps, decay_rate, transition_begin, staircase, end_value: as in exponential_decay, transition_begin
    being counted from W.
    Raises TypeError or ValueError for anything but finite numbers; warns for W < 0 and as exponential_decay does.

    >>> s = warmup_exponential_decay_schedule(0.0, 1.0, 4, transition_steps=10, decay_rate=0.5)
    >>> s([0, 1, 4, 14]).tolist()
    [0.0, 0.25, 1.0, 0.5]

    Source: optax 0.2.8.
    """

    init_value: float
    peak_value: float
    warmup_steps: int
    transition_steps: int
    decay_rate: float
    transition_begin: int = 0
    staircase: bool = False
    end_value: float | None = None

    @property
    def _decay(self) -> Decay:
        begin, end = self.transition_begin, self.end_value
        return self.peak_value, self.transition_steps, self.decay_rate, begin, self.staircase, end

    def negative_rate(self) -> str | None:
        return negative_decay(*self._decay) or super().negative_rate()

    def oddity(self) -> str | None:
        if self.warmup_steps < 0:
            return f"warmup_steps={self.warmup_steps} begins inside the decay; use 0 for no warm-up"
        return odd_decay(*self._decay)

    def lower(self) -> Tree:
        w = self.warmup_steps
        return joined([polynomial(self.init_value, self.peak_value, 1.0, w), exponential(*self._decay)], [w])
