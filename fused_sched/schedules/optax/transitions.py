"""Single transitions: constant, polynomial, linear, exponential, cosine; and their trees, which others join."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from math import inf

from ...program import Clock, Curve, Tree
from ..nodes import flat
from .base import OptaxSchedule

#: Start, steps, rate, begin, staircase and end of an exponential decay.
Decay = tuple[float, float, float, float, bool, float | None]


def polynomial(start: float, end: float, power: float, steps: float, begin: float = 0) -> Tree:
    """(start - end) * (1 - clip(t - begin, 0, steps) / steps)^power + end; `start` for ever where steps <= 0."""
    if steps <= 0:
        return flat(start)
    curve = Curve("power", limit=steps, divisor=steps, complement=True, p=power, offset=end, scale=start - end)
    return delayed(curve, begin)


def exponential(
    start: float, steps: float, rate: float, begin: float = 0, staircase: bool = False, end: float | None = None
) -> Tree:
    """start * rate^((t - begin) / steps), not past `end`; `start` for ever where steps <= 0 or rate == 0."""
    if steps <= 0 or rate == 0:
        return flat(start)
    # A rate that grows would be infinite one day, which the optimizer refuses from the start.
    largest = sys.float_info.max if abs(rate) > 1.0 else inf
    low = end if end is not None and rate < 1.0 else -largest
    high = end if end is not None and rate >= 1.0 else largest
    return delayed(
        Curve("exponential", divisor=steps, stairs=float(staircase), p=rate, scale=start, low=low, high=high), begin
    )


def cosine(start: float, steps: float, alpha: float = 0.0, exponent: float = 1.0) -> Tree:
    """start * ((1 - alpha) * (0.5 (1 + cos(pi min(t, steps) / steps)))^exponent + alpha)."""
    end = start * alpha
    return Curve("cosine", limit=steps, divisor=steps, q=exponent, offset=end, scale=start - end)


def delayed(tree: Tree, begin: float) -> Tree:
    """The tree at max(0, t - begin). optax takes a negative begin for 0."""
    return Clock(tree, addend=-begin) if begin > 0 else tree


@dataclass(frozen=True, repr=False)
class constant_schedule(OptaxSchedule):
    """The same value at every step: `f(t) = value`.

    value: the rate. Raises TypeError or ValueError if it is not a finite number.

    >>> constant_schedule(0.5)(100)
    0.5

    Source: optax 0.2.8.
    """

    value: float

    def lower(self) -> Tree:
        return flat(self.value)


@dataclass(frozen=True, repr=False)
class polynomial_schedule(OptaxSchedule):
    """A power: `f(t) = (init_value - end_value) * (1 - u)^power + end_value`, u = clip(t - B, 0, T) / T.

    init_value, end_value: rates. power: exponent. transition_steps: T, in updates; with T <= 0 the rate is
    init_value for ever. transition_begin: B, the update after which it changes; less than 0 is 0.
    Raises TypeError or ValueError for anything but finite numbers; warns for T <= 0, B < 0 and a negative power,
    where the rate is infinite from B + T on.

    >>> polynomial_schedule(1.0, 0.0, 2, transition_steps=4)([0, 2, 4, 9]).tolist()
    [1.0, 0.25, 0.0, 0.0]

    Source: optax 0.2.8.
    """

    init_value: float
    end_value: float
    power: float
    transition_steps: int
    transition_begin: int = 0

    def oddity(self) -> str | None:
        odd = odd_transition(self.transition_steps, self.transition_begin, self.init_value)
        if odd is None and self.power < 0:
            odd = f"power={self.power}: the rate is infinite once it should be end_value; use a positive power"
        return odd

    def lower(self) -> Tree:
        return polynomial(self.init_value, self.end_value, self.power, self.transition_steps, self.transition_begin)


@dataclass(frozen=True, repr=False)
class linear_schedule(OptaxSchedule):
    """A straight line: `f(t) = (init_value - end_value) * (1 - u) + end_value`, u = clip(t - B, 0, T) / T.

    init_value, end_value: rates. transition_steps: T, in updates; with T <= 0 the rate is init_value for ever.
    transition_begin: B, the update after which it changes; less than 0 is 0.
    Raises TypeError or ValueError for anything but finite numbers; warns for T <= 0 and B < 0.

    >>> linear_schedule(0.0, 1.0, transition_steps=4, transition_begin=2)([0, 2, 3, 6, 9]).tolist()
    [0.0, 0.0, 0.25, 1.0, 1.0]

    Source: optax 0.2.8.
    """

    init_value: float
    end_value: float
    transition_steps: int
    transition_begin: int = 0

    def oddity(self) -> str | None:
        return odd_transition(self.transition_steps, self.transition_begin, self.init_value)

    def lower(self) -> Tree:
        return polynomial(self.init_value, self.end_value, 1.0, self.transition_steps, self.transition_begin)


@dataclass(frozen=True, repr=False)
class exponential_decay(OptaxSchedule):
    """Geometric decay: `f(t) = init_value * decay_rate^(max(0, t - B) / T)`, not past end_value.

    init_value: first rate. transition_steps: T, in updates. decay_rate: factor per T updates. transition_begin: B;
    less than 0 is 0. staircase: the exponent is rounded down. end_value: the least rate if decay_rate < 1, else the
    largest, at t <= B as well; None for no bound. With T <= 0 or decay_rate = 0 the rate is init_value for ever.
    Raises TypeError or ValueError for anything but finite numbers; warns for T <= 0, B < 0, decay_rate <= 0, and
    an init_value that is already past end_value.

    >>> exponential_decay(1.0, 10, 0.5, end_value=0.125)([0, 10, 20, 90]).tolist()
    [1.0, 0.5, 0.25, 0.125]

    Source: optax 0.2.8.
    """

    init_value: float
    transition_steps: int
    decay_rate: float
    transition_begin: int = 0
    staircase: bool = False
    end_value: float | None = None

    @property
    def _decay(self) -> Decay:
        begin, end = self.transition_begin, self.end_value
        return self.init_value, self.transition_steps, self.decay_rate, begin, self.staircase, end

    def negative_rate(self) -> str | None:
        return negative_decay(*self._decay) or super().negative_rate()

    def oddity(self) -> str | None:
        return odd_decay(*self._decay)

    def lower(self) -> Tree:
        return exponential(*self._decay)


@dataclass(frozen=True, repr=False)
class cosine_decay_schedule(OptaxSchedule):
    """Half a cosine: `f(t) = init_value * ((1 - alpha) * c^exponent + alpha)`, c = (1 + cos(pi * min(t, T) / T)) / 2.

    init_value: first rate. decay_steps: T, in updates, more than 0. alpha: last rate, as a part of the first.
    exponent: of the cosine. Raises ValueError for T <= 0, TypeError or ValueError for anything but finite numbers;
    warns for a negative exponent, where the rate is infinite from T on.

    >>> cosine_decay_schedule(1.0, 4, alpha=0.5)([0, 2, 4, 9]).tolist()
    [1.0, 0.75, 0.5, 0.5]

    Source: optax 0.2.8.
    """

    init_value: float
    decay_steps: int
    alpha: float = 0.0
    exponent: float = 1.0

    def check(self) -> None:
        super().check()
        if not self.decay_steps > 0:
            raise ValueError(
                f"{self.word}: decay_steps must be more than 0, got {self.decay_steps}; use constant_schedule for "
                "a rate that does not decay"
            )

    def oddity(self) -> str | None:
        return odd_exponent(self.exponent)

    def lower(self) -> Tree:
        return cosine(self.init_value, self.decay_steps, self.alpha, self.exponent)


def odd_transition(steps: float, begin: float, stays: float) -> str | None:
    """What is odd about the length of a transition."""
    if steps <= 0:
        return f"transition_steps={steps} keeps the rate at {stays} for ever; use 1 or more"
    if begin < 0:
        return f"transition_begin={begin} counts as 0; use schedule.shifted({begin}) to begin inside the transition"
    return None


def negative_decay(
    start: float, steps: float, rate: float, begin: float, staircase: bool, end: float | None
) -> str | None:
    """What turns an exponential decay negative."""
    if rate >= 0 or steps <= 0:
        return None
    between = "" if staircase or steps == 1 else ", and is not a number in between"
    return f"decay_rate={rate}: the rate changes its sign every {steps} updates{between}; use a positive one"


def odd_decay(start: float, steps: float, rate: float, begin: float, staircase: bool, end: float | None) -> str | None:
    """What is odd about an exponential decay."""
    if rate == 0:
        return f"decay_rate=0 keeps the rate at {start} for ever; use schedules.step_decay for one that drops to 0"
    odd = odd_transition(steps, begin, start)
    if odd is not None:
        return odd
    if end is not None and (start < end if rate < 1 else start > end):
        return (
            f"end_value={end} is a bound that the rate {start} is past from the start, with decay_rate={rate}: it "
            "never changes; leave end_value out, or turn it round"
        )
    return None


def odd_exponent(exponent: float) -> str | None:
    """What is odd about a cosine's exponent."""
    return f"exponent={exponent}: the rate is infinite at its end; use 0 or more" if exponent < 0 else None
