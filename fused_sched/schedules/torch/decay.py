"""Rates that torch multiplies step by step: StepLR, MultiStepLR, ConstantLR, LinearLR, ExponentialLR, PolynomialLR.

torch's recursion drifts from these closed forms by up to 4e-14 of the peak in 1e5 steps (LinearLR: 5e-13).
"""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable
from dataclasses import KW_ONLY, dataclass, replace
from fractions import Fraction
from math import floor, lcm

from ...program import Tree
from ...reference_schedule import power
from .. import checks
from ..base import set_fields
from ..library import Failure
from ..nodes import bounded, falling, flat, geometric, levels, line
from .base import Chainable, is_reached
from .restarts import Restarts


@dataclass(frozen=True, repr=False)
class StepLR(Chainable):
    """A staircase: `f(t) = base_lr * gamma^floor(t / step_size)`.

    step_size: updates per stair. gamma: ratio of one stair to the one before. base_lr: the group's rate.
    Raises TypeError or ValueError for what is not a finite number.
    step_size = 0 fails at the step to update 1; a fraction is a stair where `t % step_size == 0`.

    >>> StepLR(30, base_lr=0.5)([0, 29, 30, 60]).tolist()
    [0.5, 0.5, 0.05, 0.005]

    Source: torch.optim.lr_scheduler.StepLR, torch 2.13.
    """

    step_size: int
    gamma: float = 0.1
    _: KW_ONLY
    base_lr: float

    @property
    def _stair_steps(self) -> int:
        """The first t > 0 with t % step_size == 0, which floats compute exactly; also for fractions and below 0."""
        return abs(Fraction(self.step_size).numerator)

    def failure(self) -> Failure | None:
        return Failure(1, "ZeroDivisionError", "use step_size >= 1") if self.step_size == 0 else None

    def failure_restarted(self) -> Failure | None:
        return Failure(0, "ZeroDivisionError", "use step_size >= 1") if self.step_size == 0 else None

    def negative_rate(self) -> str | None:
        return _changes_sign(self.gamma, "stair") if self.gamma < 0.0 and self.step_size else None

    def oddity(self) -> str | None:
        if self.step_size == 0 or self._stair_steps == self.step_size:
            return None
        return (
            f"torch decays where t % step_size == 0, with step_size={self.step_size!r} every {self._stair_steps} "
            "updates; use an integer above 0"
        )

    def lower_from(self, base_lr: float) -> Tree:
        if self.step_size == 0:
            return flat(base_lr)
        return geometric(base_lr, self.gamma, self._stair_steps)

    def lower_factors(self, restarts: Restarts) -> Tree:
        if self.step_size == 0 or self.gamma == 1.0:
            return flat(1.0)
        steps = self._stair_steps
        return restarts.of_equal_stairs(self.gamma, steps, period=lcm(steps, restarts.every))


@dataclass(frozen=True, repr=False)
class MultiStepLR(Chainable):
    """Stairs at given updates: `f(t) = base_lr * gamma^(number of milestones <= t)`.

    milestones: updates at which the rate is multiplied, in any order; repeated ones count. gamma: the factor.
    base_lr: the group's rate. Raises TypeError or ValueError for what is not a finite number.
    Milestones that no update equals (fractions, below 0) are without effect.

    >>> MultiStepLR([30, 80], base_lr=0.5)([29, 30, 79, 80]).tolist()
    [0.5, 0.05, 0.05, 0.005000000000000001]

    Source: torch.optim.lr_scheduler.MultiStepLR, torch 2.13, by its recursion.
    """

    milestones: tuple[int, ...]
    gamma: float = 0.1
    _: KW_ONLY
    base_lr: float

    def check(self) -> None:
        if not isinstance(self.milestones, Iterable):
            raise TypeError(f"{self.word}: milestones must be a list of steps, got {self.milestones!r}")
        milestones = (checks.duration(self.word, f"milestones[{i}]", m) for i, m in enumerate(self.milestones))
        set_fields(self, milestones=tuple(milestones))
        super().check()

    def negative_rate(self) -> str | None:
        turns = self.gamma < 0.0 and any(is_reached(m, first=0) for m in self.milestones)
        return _changes_sign(self.gamma, "milestone") if turns else None

    def oddity(self) -> str | None:
        missed = [m for m in self.milestones if not is_reached(m, first=0)]
        if not missed:
            return None
        return f"no update equals the milestones {missed}, which torch passes over; use integers from 0 on"

    def lower_from(self, base_lr: float) -> Tree:
        return self._stairs(base_lr, self.milestones.count(0))

    def lower_restarted(self) -> Tree:
        return self._stairs(self.base_lr, bisect_right(sorted(self.milestones), 0))  # the closed form at epoch 0

    def lower_factors(self, restarts: Restarts) -> Tree:
        return restarts.of_stairs({int(m): bounded(power(self.gamma, n)) for m, n in self._counts.items()})

    @property
    def _counts(self) -> Counter[float]:
        return Counter(m for m in self.milestones if is_reached(m))

    def _stairs(self, base_lr: float, count_at_zero: int) -> Tree:
        counts = self._counts
        values = [base_lr * self.gamma**count_at_zero]
        for milestone in sorted(counts):
            values.append(bounded(values[-1] * self.gamma ** counts[milestone]))
        return levels(values, sorted(counts)) if counts else flat(values[0])


@dataclass(frozen=True, repr=False)
class ConstantLR(Chainable):
    """A fraction of the rate for a while: `f(t) = base_lr * factor for t < total_iters, then base_lr`.

    factor: in [0, 1]. total_iters: length of the first part, in updates. base_lr: the group's rate.
    Raises ValueError for a factor outside of [0, 1], as torch does.
    torch divides by factor at t = total_iters, which fails for factor = 0 and never happens for total_iters <= 0.

    >>> ConstantLR(0.5, 3, base_lr=0.1)([0, 2, 3]).tolist()
    [0.05, 0.05, 0.1]

    Source: torch.optim.lr_scheduler.ConstantLR, torch 2.13.
    """

    factor: float = 1.0 / 3
    total_iters: int = 5
    _: KW_ONLY
    base_lr: float

    def check(self) -> None:
        super().check()
        _check_fraction(self.word, "factor", self.factor)

    def failure(self) -> Failure | None:
        if self.factor == 0.0 and is_reached(self.total_iters):
            return Failure(int(self.total_iters), "ZeroDivisionError", "use a factor above 0")
        return None

    def oddity(self) -> str | None:
        if is_reached(self.total_iters) or self.factor == 1.0:
            return None
        return (
            f"torch applies the factor at update 0 and takes it back at update total_iters={self.total_iters!r}, which "
            "never comes; use total_iters >= 1"
        )

    def lower_from(self, base_lr: float) -> Tree:
        low = base_lr * self.factor
        if self.factor == 0.0 or not is_reached(self.total_iters):
            return flat(low)
        return levels([low, bounded(low * (1.0 / self.factor))], [self.total_iters])

    def lower_factors(self, restarts: Restarts) -> Tree:
        ends = self.factor != 0.0 and is_reached(self.total_iters)
        return restarts.of_stairs({int(self.total_iters): bounded(1.0 / self.factor)} if ends else {})

    def lower_restarted(self) -> Tree:
        return flat(self.base_lr) if self.total_iters <= 0 else self.lower()


@dataclass(frozen=True, repr=False)
class LinearLR(Chainable):
    """A line: `f(t) = base_lr * (start_factor + (end_factor - start_factor) * min(t, total_iters) / total_iters)`.

    start_factor: in (0, 1]. end_factor: in [0, 1]. total_iters: updates from one to the other. base_lr: the group's
    rate. Raises ValueError for factors outside of these ranges, as torch does.
    For total_iters <= 0 torch stays at start_factor.

    >>> LinearLR(0.5, total_iters=4, base_lr=0.1)([0, 2, 4, 9]).tolist()
    [0.05, 0.07500000000000001, 0.1, 0.1]

    Source: torch.optim.lr_scheduler.LinearLR, torch 2.13.
    """

    start_factor: float = 1.0 / 3
    end_factor: float = 1.0
    total_iters: int = 5
    _: KW_ONLY
    base_lr: float

    def check(self) -> None:
        super().check()
        _check_fraction(self.word, "start_factor", self.start_factor)
        _check_fraction(self.word, "end_factor", self.end_factor)
        if self.start_factor == 0.0:
            raise ValueError(f"{self.word}: start_factor must be above 0, got 0; torch multiplies by the next factors")

    def failure_restarted(self) -> Failure | None:
        return Failure(0, "ZeroDivisionError", "use total_iters >= 1") if self.total_iters == 0 else None

    def oddity(self) -> str | None:
        if self.total_iters > 0 or self.start_factor == self.end_factor:
            return None
        return f"torch stays at start_factor for total_iters={self.total_iters!r}; use total_iters >= 1"

    def lower_from(self, base_lr: float) -> Tree:
        start, end, steps = base_lr * self.start_factor, base_lr * self.end_factor, self.total_iters
        if steps < 1:
            return flat(start)
        # From the end that is nearer to zero, where relative accuracy is worth having. torch stops at a whole epoch.
        if self.start_factor < self.end_factor:
            return replace(line(start, end, steps), limit=float(floor(steps)))
        return replace(falling(start, end, steps), limit=float(floor(steps) - steps))

    def lower_restarted(self) -> Tree:
        return flat(self.base_lr * self.end_factor) if self.total_iters < 0 else self.lower()


@dataclass(frozen=True, repr=False)
class ExponentialLR(Chainable):
    """A factor per update: `f(t) = base_lr * gamma^t`.

    gamma: the factor. base_lr: the group's rate. Raises TypeError or ValueError for what is not a finite number.
    A negative gamma makes every second rate negative.

    >>> ExponentialLR(0.5, base_lr=0.1)([0, 1, 2]).tolist()
    [0.1, 0.05, 0.025]

    Source: torch.optim.lr_scheduler.ExponentialLR, torch 2.13.
    """

    gamma: float
    _: KW_ONLY
    base_lr: float

    @property
    def repeats_epoch_zero(self) -> bool:
        return self.gamma == 1.0

    def negative_rate(self) -> str | None:
        return _changes_sign(self.gamma, "update") if self.gamma < 0.0 else None

    def lower_from(self, base_lr: float) -> Tree:
        return geometric(base_lr, self.gamma)

    def lower_factors(self, restarts: Restarts) -> Tree:
        return flat(1.0) if self.gamma == 1.0 else restarts.of_power(self.gamma)


@dataclass(frozen=True, repr=False)
class PolynomialLR(Chainable):
    """A power of what remains: `f(t) = base_lr * (1 - min(t, total_iters) / total_iters)^power`.

    total_iters: updates until the rate is 0. power: exponent. base_lr: the group's rate.
    Raises TypeError or ValueError for what is not a finite number.
    power < 0 rises and fails at the step to update total_iters; for total_iters <= 0 torch stays at base_lr.

    >>> PolynomialLR(4, power=2.0, base_lr=0.1)([0, 2, 4, 9]).tolist()
    [0.1, 0.025, 0.0, 0.0]

    Source: torch.optim.lr_scheduler.PolynomialLR, torch 2.13.
    """

    total_iters: int = 5
    power: float = 1.0
    _: KW_ONLY
    base_lr: float

    @property
    def repeats_epoch_zero(self) -> bool:
        return self.total_iters < 0 or self.power == 0.0

    def failure(self) -> Failure | None:
        if self.power < 0.0 and is_reached(self.total_iters):
            return Failure(int(self.total_iters), "ZeroDivisionError", "use a power above 0")
        return None

    def failure_restarted(self) -> Failure | None:
        if self.total_iters == 0 or (self.total_iters < 0 and self.power < 0.0):
            return Failure(0, "ZeroDivisionError", "use total_iters >= 1")
        return self.failure()

    def oddity(self) -> str | None:
        if self.total_iters > 0 or self.power == 0.0:
            return None
        return f"torch stays at base_lr for total_iters={self.total_iters!r}; use total_iters >= 1"

    def lower_from(self, base_lr: float) -> Tree:
        steps = self.total_iters
        if steps < 1:
            return flat(base_lr)
        last = steps - 1 if self.failure() else floor(steps)
        return replace(falling(base_lr, 0.0, steps, power=self.power), limit=float(last - steps))

    def lower_restarted(self) -> Tree:
        return flat(self.base_lr * 0.0**self.power) if self.total_iters < 0 else self.lower()


def _changes_sign(gamma: float, where: str) -> str:
    return f"the rate turns negative: gamma={gamma!r} changes its sign at every {where}; use a gamma above 0"


def _check_fraction(word: str, name: str, value: float) -> None:
    if not 0.0 <= value <= 1.0:
        raise ValueError(f"{word}: {name} must be in [0, 1], got {value!r}; a larger rate belongs into base_lr")
