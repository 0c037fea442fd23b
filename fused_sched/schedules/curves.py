"""Single curves. Each is one node of the program; beyond its end it holds its last value.

Where a curve has two ends it is exactly `start` at step 0 and exactly `end` from its last step on: the scale
is rounded away from zero and the clamp takes back what is too much.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from math import inf, nextafter
from typing import Any

from ..program import Clock, Curve, Join, Tree
from . import checks
from .base import Schedule, set_fields


@dataclass(frozen=True)
class constant(Schedule):
    """The same value at every step: `f(t) = value`.

    value: the rate. Raises ValueError if it is not finite.

    >>> constant(1e-3)(12345)
    0.001
    """

    value: float

    def __post_init__(self) -> None:
        set_fields(self, value=checks.number("constant", "value", self.value))

    def lower(self) -> Tree:
        return Curve("constant", scale=self.value)


@dataclass(frozen=True)
class Transition(Schedule, abstract=True):
    """From start to end in a number of steps."""

    start: float
    end: float
    steps: int

    def __post_init__(self) -> None:
        word = self.word
        set_fields(
            self,
            start=checks.number(word, "start", self.start),
            end=checks.number(word, "end", self.end),
            steps=checks.step_count(word, "steps", self.steps, remedy="use constant(end) for no transition"),
        )

    def _from_start(self, curve: str, p: float = 1.0) -> Curve:
        """start + (end - start) * s(t / steps), for shapes with s(0) = 0 and s(1) = 1."""
        n = float(self.steps)
        return self._between(self.start, self.end, curve=curve, p=p, limit=n, divisor=n)

    def _from_end(self, curve: str, p: float = 1.0) -> Curve:
        """end + (start - end) * s((steps - t) / steps), for shapes with s(0) = 0 and s(1) = 1.

        (steps - t) / steps is exact to the last bit near the end, where 1 - t / steps would have cancelled.
        """
        n = float(self.steps)
        return self._between(self.end, self.start, curve=curve, p=p, origin=n, limit=0.0, divisor=-n)

    def _between(self, base: float, other: float, **knobs: Any) -> Curve:
        return Curve(offset=base, scale=_reaching(base, other), low=min(base, other), high=max(base, other), **knobs)


def _reaching(base: float, other: float) -> float:
    """The smallest scale for which base + scale is not short of other."""
    scale = other - base
    if abs(base + scale) == inf or abs(scale) == inf:
        raise ValueError(f"start and end must be less than 1.8e308 apart, got {base!r} and {other!r}")
    short = base + scale < other if other > base else base + scale > other
    return nextafter(scale, inf if other > base else -inf) if short else scale


@dataclass(frozen=True)
class linear(Transition):
    """A straight line: `f(t) = start + (end - start) * t / steps`, then `end`.

    start, end: rates. steps: updates from one to the other, at least 1.
    Exactly `start` at t = 0 and `end` at t >= steps, and accurate to a few units in the last place of f(t) on
    the way, also where f(t) is near 0. Raises ValueError for rates that are not finite or steps < 1.

    >>> linear(1e-3, 0.0, 1000)([0, 250, 1000, 5000]).tolist()
    [0.001, 0.00075, 0.0, 0.0]

    Source: torch.optim.lr_scheduler.LinearLR with factors start and end.
    """

    def lower(self) -> Tree:
        # From the end that is nearer to zero, where relative accuracy is worth having.
        return self._from_start("power") if abs(self.start) < abs(self.end) else self._from_end("power")


@dataclass(frozen=True)
class cosine(Transition):
    """Half a cosine: `f(t) = end + (start - end) * (1 + cos(pi * t / steps)) / 2`, then `end`.

    start, end: rates. steps: updates from one to the other, at least 1.
    Exactly `start` at t = 0 and `end` at t >= steps. Raises ValueError for rates that are not finite or
    steps < 1.

    >>> cosine(1.0, 0.0, 100)([0, 50, 100, 500]).tolist()
    [1.0, 0.5, 0.0, 0.0]

    Source: Loshchilov and Hutter 2017, SGDR, equation 5, without restarts; for those, `.repeat(steps)`.
    """

    def lower(self) -> Tree:
        n = float(self.steps)
        return self._between(self.end, self.start, curve="cosine", limit=n, divisor=n)


@dataclass(frozen=True)
class polynomial(Transition):
    """A power of what remains: `f(t) = end + (start - end) * (1 - t / steps)^power`, then `end`.

    start, end: rates. steps: updates from one to the other, at least 1. power: exponent, more than 0.
    Exactly `start` at t = 0 and `end` at t >= steps. Raises ValueError for numbers that are not finite,
    steps < 1 or power <= 0.

    >>> polynomial(1.0, 0.0, 10, power=2.0)([0, 5, 10]).tolist()
    [1.0, 0.25, 0.0]

    Source: torch.optim.lr_scheduler.PolynomialLR; optax.polynomial_schedule.
    """

    power: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        set_fields(self, power=checks.number("polynomial", "power", self.power, above=0.0))

    def lower(self) -> Tree:
        return self._from_end("power", self.power)


@dataclass(frozen=True)
class exponential(Schedule):
    """Geometric growth or decay without an end: `f(t) = start * rate^(t / steps)`.

    start: rate at step 0. rate: factor per `steps` updates, more than 0. steps: at least 1.
    Raises ValueError for numbers that are not finite, rate <= 0 or steps < 1.

    >>> exponential(1.0, 0.5, steps=10)([0, 10, 20]).tolist()
    [1.0, 0.5, 0.25]

    Source: torch.optim.lr_scheduler.ExponentialLR (steps=1); optax.exponential_decay.
    """

    start: float
    rate: float
    steps: int = 1

    def __post_init__(self) -> None:
        set_fields(
            self,
            start=checks.number("exponential", "start", self.start),
            rate=checks.number("exponential", "rate", self.rate, above=0.0),
            steps=checks.step_count("exponential", "steps", self.steps),
        )

    def lower(self) -> Tree:
        return Curve("exponential", divisor=float(self.steps), p=self.rate, scale=self.start)


@dataclass(frozen=True)
class inverse_sqrt(Schedule):
    """Linear warm-up, then one over the square root: `f(t) = peak * min((t+1) / W, sqrt(W / (t+1)))`.

    peak: largest rate, reached at t = W - 1. warmup_steps: W, at least 1.
    Raises ValueError for a peak that is not finite or warmup_steps < 1.

    >>> inverse_sqrt(1.0, warmup_steps=4)([0, 1, 3, 15, 63]).tolist()
    [0.25, 0.5, 1.0, 0.5, 0.25]

    Source: Vaswani et al. 2017, Attention is all you need, equation 3, its step_num being t + 1.
    """

    peak: float
    warmup_steps: int

    def __post_init__(self) -> None:
        set_fields(
            self,
            peak=checks.number("inverse_sqrt", "peak", self.peak),
            warmup_steps=checks.step_count(
                "inverse_sqrt", "warmup_steps", self.warmup_steps, remedy="1 is a decay from the first update on"
            ),
        )

    def lower(self) -> Tree:
        n = float(self.warmup_steps)
        warmup = Curve("power", divisor=n, scale=self.peak)
        decay = Curve("power", divisor=n, p=-0.5, scale=self.peak)
        return Clock(Join((warmup, decay), ends=(n,), origins=(0.0, 0.0)), addend=1.0)


@dataclass(frozen=True)
class step_decay(Schedule):
    """A staircase: `f(t) = start * factor^floor(t / every)`.

    start: rate of the first stair. factor: ratio of one stair to the one before, 0 or more. every: updates per
    stair, at least 1. Raises ValueError for numbers that are not finite, factor < 0 or every < 1.

    >>> step_decay(1.0, 0.5, every=10)([0, 9, 10, 25]).tolist()
    [1.0, 1.0, 0.5, 0.25]

    Source: torch.optim.lr_scheduler.StepLR.
    """

    start: float
    factor: float
    every: int

    def __post_init__(self) -> None:
        set_fields(
            self,
            start=checks.number("step_decay", "start", self.start),
            factor=checks.number("step_decay", "factor", self.factor, at_least=0.0),
            every=checks.step_count("step_decay", "every", self.every),
        )

    def lower(self) -> Tree:
        return Curve("exponential", divisor=float(self.every), stairs=1.0, p=self.factor, scale=self.start)


@dataclass(frozen=True)
class table(Schedule):
    """Values one by one: `f(t) = values[min(t, len(values) - 1)]`.

    values: at least one rate, in the order of updates; any iterable of numbers. 8 bytes each on the device.
    Raises ValueError for an empty table or values that are not finite.

    >>> table([0.1, 0.3, 0.2])([0, 1, 2, 7]).tolist()
    [0.1, 0.3, 0.2, 0.2]
    """

    values: tuple[float, ...]

    def __init__(self, values: Iterable[float]) -> None:
        if not isinstance(values, Iterable):
            raise TypeError(f"table: values must be numbers in a list, got {values!r}; use constant(...) for one")
        checked = tuple(checks.number("table", f"values[{i}]", value) for i, value in enumerate(values))
        if not checked:
            raise ValueError("table: values must have at least one entry, got none; use constant(0.0) for nothing")
        set_fields(self, values=checked)

    def lower(self) -> Tree:
        return Curve("table", table=self.values)


def from_callable(function: Callable[[int], float], num_steps: int) -> table:
    """Any Python function, tabulated once: `f(t) = function(min(t, num_steps - 1))`.

    function: takes an update's 0-based index, returns its rate; called num_steps times, here and never again.
    num_steps: length of the table, at least 1.
    Raises TypeError for something that cannot be called, ValueError for num_steps < 1 or a value that is not a
    finite number.

    >>> from_callable(lambda t: 0.5**t, 4)
    table(values=(1.0, 0.5, 0.25, 0.125))
    """
    if not callable(function):
        raise TypeError(f"from_callable: function must be callable, got {function!r}; use table(...) for values")
    num_steps = checks.step_count("from_callable", "num_steps", num_steps)
    return table(checks.number("from_callable", f"function({step})", function(step)) for step in range(num_steps))
