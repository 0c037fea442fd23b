"""Schedules people train with, written with the words of the other files: a recipe is its `expand`."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import KW_ONLY, dataclass
from functools import cached_property
from typing import ClassVar

from ..program import Tree
from . import checks
from .base import Schedule, set_fields
from .combinators import join
from .curves import Transition, constant, cosine, linear


class Recipe(Schedule, abstract=True):
    """A schedule that is a composition of others."""

    @abstractmethod
    def expand(self) -> Schedule:
        """The composition."""

    @cached_property
    def _expanded(self) -> Schedule:
        return self.expand()

    def lower(self) -> Tree:
        return self._expanded.lower()


def _after_warmup(peak: float, warmup_steps: int, then: Schedule) -> Schedule:
    """Warm-up peak * (t+1) / warmup_steps, so that the first update already has a rate; then the rest."""
    if warmup_steps == 0:
        return then
    return join([linear(0.0, peak, warmup_steps).shifted(-1), then], [warmup_steps])


@dataclass(frozen=True)
class _WarmupRecipe(Recipe, abstract=True):
    """Linear warm-up, then the subclass's curve from peak to end."""

    _decay: ClassVar[type[Transition]]

    peak: float
    _: KW_ONLY
    warmup_steps: int
    total_steps: int
    end: float = 0.0

    def __post_init__(self) -> None:
        word = self.word
        set_fields(
            self,
            peak=checks.number(word, "peak", self.peak),
            warmup_steps=checks.step_count(word, "warmup_steps", self.warmup_steps, at_least=0),
            total_steps=checks.step_count(word, "total_steps", self.total_steps),
            end=checks.number(word, "end", self.end),
        )
        checks.longer(word, self.total_steps, "warmup_steps", self.warmup_steps)

    def expand(self) -> Schedule:
        decay = self._decay(self.peak, self.end, self.total_steps - self.warmup_steps)
        return _after_warmup(self.peak, self.warmup_steps, decay)


@dataclass(frozen=True)
class warmup_linear(_WarmupRecipe):
    """Linear warm-up, linear decay: `peak * (t+1) / W` for t < W, then `linear(peak, end, N - W)(t - W)`.

    peak: largest rate. warmup_steps: W, 0 or more. total_steps: N, more than W; the rate is `end` from t = N on.
    end: last rate. Raises ValueError where these rules are broken.

    >>> warmup_linear(1.0, warmup_steps=4, total_steps=12)([0, 3, 4, 8, 12]).tolist()
    [0.25, 1.0, 1.0, 0.5, 0.0]
    """

    _decay = linear


@dataclass(frozen=True)
class warmup_cosine(_WarmupRecipe):
    """Linear warm-up, cosine decay: `peak * (t+1) / W` for t < W, then `cosine(peak, end, N - W)(t - W)`.

    peak: largest rate. warmup_steps: W, 0 or more. total_steps: N, more than W; the rate is `end` from t = N on.
    end: last rate. Raises ValueError where these rules are broken.

    >>> warmup_cosine(1.0, warmup_steps=4, total_steps=12)([0, 3, 4, 8, 12]).tolist()
    [0.25, 1.0, 1.0, 0.5, 0.0]
    """

    _decay = cosine


@dataclass(frozen=True)
class _SqrtDecay(Transition, word="sqrt_decay"):
    """`start + (end - start) * sqrt(t / steps)`, then end: the "1-sqrt" decay of warmup_stable_decay."""

    def lower(self) -> Tree:
        return self._from_start("power", 0.5)


_DECAYS: dict[str, type[Transition]] = {"linear": linear, "cosine": cosine, "sqrt": _SqrtDecay}


@dataclass(frozen=True)
class warmup_stable_decay(Recipe):
    """Linear warm-up, a plateau, and a decay over the last steps (WSD, trapezoidal).

    `peak * (t+1) / W` for t < W; `peak` for t < N - D; then from peak to end over D updates.

    peak: rate of the plateau. warmup_steps: W, 0 or more. total_steps: N; the rate is `end` from t = N on.
    decay_steps: D, at least 1; W + D must not exceed N. end: last rate.
    decay: "linear", "cosine", or "sqrt": end + (peak - end) * (1 - sqrt(u)), u = (t - N + D) / D.
    Raises ValueError where these rules are broken.

    >>> s = warmup_stable_decay(1.0, warmup_steps=4, total_steps=20, decay_steps=8)
    >>> s([0, 3, 4, 12, 16, 20]).tolist()
    [0.25, 1.0, 1.0, 1.0, 0.5, 0.0]

    Source: Hu et al. 2024, MiniCPM; Hägele et al. 2024, Scaling laws and compute-optimal training beyond
    fixed training durations (1-sqrt).
    """

    peak: float
    _: KW_ONLY
    warmup_steps: int
    total_steps: int
    decay_steps: int
    end: float = 0.0
    decay: str = "linear"

    def __post_init__(self) -> None:
        word = self.word
        set_fields(
            self,
            peak=checks.number(word, "peak", self.peak),
            warmup_steps=checks.step_count(word, "warmup_steps", self.warmup_steps, at_least=0),
            total_steps=checks.step_count(word, "total_steps", self.total_steps),
            decay_steps=checks.step_count(word, "decay_steps", self.decay_steps),
            end=checks.number(word, "end", self.end),
        )
        if self.warmup_steps + self.decay_steps > self.total_steps:
            raise ValueError(
                f"{word}: warmup_steps + decay_steps must not exceed total_steps, got {self.warmup_steps} + "
                f"{self.decay_steps} > {self.total_steps}; total_steps counts all three phases"
            )
        if self.decay not in _DECAYS:
            raise ValueError(f"{word}: decay must be one of {', '.join(map(repr, _DECAYS))}, got {self.decay!r}")

    def expand(self) -> Schedule:
        decay = _DECAYS[self.decay](self.peak, self.end, self.decay_steps)
        stable_steps = self.total_steps - self.decay_steps - self.warmup_steps
        then = join([constant(self.peak), decay], [stable_steps]) if stable_steps else decay
        return _after_warmup(self.peak, self.warmup_steps, then)


@dataclass(frozen=True)
class one_cycle(Recipe):
    """Up and down along cosines: `cosine(start, peak, W)(t)` for t < W, then `cosine(peak, end, N - W)(t - W)`.

    peak: largest rate, at t = W. total_steps: N; the rate is `end` from t = N on. warmup_steps: W, at least 1
    and less than N; by default 30% of N. start: first rate, by default peak / 25. end: last rate, by default
    start / 10000. Raises ValueError where these rules are broken.

    >>> one_cycle(1.0, total_steps=100)([0, 30, 100]).tolist()
    [0.04, 1.0, 4e-06]

    Source: Smith and Topin 2018, Super-convergence; the defaults are torch.optim.lr_scheduler.OneCycleLR's,
    whose own phases end one update earlier.
    """

    peak: float
    _: KW_ONLY
    total_steps: int
    warmup_steps: int | None = None
    start: float | None = None
    end: float | None = None

    def __post_init__(self) -> None:
        word = self.word
        peak = checks.number(word, "peak", self.peak)
        total_steps = checks.step_count(word, "total_steps", self.total_steps, at_least=2)
        warmup_steps = max(1, round(0.3 * total_steps)) if self.warmup_steps is None else self.warmup_steps
        start = peak / 25.0 if self.start is None else checks.number(word, "start", self.start)
        set_fields(
            self,
            peak=peak,
            total_steps=total_steps,
            warmup_steps=checks.step_count(word, "warmup_steps", warmup_steps),
            start=start,
            end=start / 10000.0 if self.end is None else checks.number(word, "end", self.end),
        )
        checks.longer(word, self.total_steps, "warmup_steps", warmup_steps)

    def expand(self) -> Schedule:
        assert self.warmup_steps is not None  # __post_init__ has filled in the defaults
        assert self.start is not None
        assert self.end is not None
        up = cosine(self.start, self.peak, self.warmup_steps)
        down = cosine(self.peak, self.end, self.total_steps - self.warmup_steps)
        return join([up, down], [self.warmup_steps])
