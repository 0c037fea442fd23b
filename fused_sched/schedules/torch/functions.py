"""Rates by a user's function, tabulated once: LambdaLR and MultiplicativeLR.

Functions can be neither compared nor stored nor evaluated on the device; their values can.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, InitVar, dataclass
from itertools import accumulate

import numpy as np

from ...program import Curve, Tree
from .. import checks
from ..base import set_fields
from ..nodes import bounded
from .base import Chainable, TorchSchedule
from .restarts import Restarts

Factors = Callable[[int], float] | Sequence[float]


@dataclass(frozen=True, repr=False)
class LambdaLR(TorchSchedule):
    """A function times the rate: `f(t) = base_lr * lr_lambda(min(t, num_steps - 1))`.

    lr_lambda: takes the update's index, returns a factor; called num_steps times, here and never again. Or its values
        in a list, which is what the schedule keeps.
    num_steps: updates to tabulate, with a function only. base_lr: the group's rate.
    Raises TypeError for something that cannot be called, ValueError for num_steps < 1 or an infinite value.

    >>> LambdaLR(lambda t: 0.5**t, num_steps=3, base_lr=0.1)
    torch.LambdaLR(lr_lambda=(1.0, 0.5, 0.25), base_lr=0.1)

    Source: torch.optim.lr_scheduler.LambdaLR, torch 2.13.
    """

    lr_lambda: tuple[float, ...] | Factors
    _: KW_ONLY
    base_lr: float
    num_steps: InitVar[int | None] = None

    def __post_init__(self, num_steps: int | None) -> None:
        set_fields(self, lr_lambda=_tabulated(self.word, self.lr_lambda, num_steps, first=0))
        super().__post_init__()

    @property
    def factors(self) -> tuple[float, ...]:
        """The values of lr_lambda."""
        assert isinstance(self.lr_lambda, tuple)
        return self.lr_lambda

    def negative_rate(self) -> str | None:
        return _turns_negative(self.factors, self.base_lr)

    def lower(self) -> Tree:
        return Curve("table", scale=self.base_lr, table=self.factors)


@dataclass(frozen=True, repr=False)
class MultiplicativeLR(Chainable):
    """A running product: `f(t) = base_lr * lr_lambda(1) * ... * lr_lambda(min(t, num_steps - 1))`.

    lr_lambda: takes the update's index, returns the factor on the rate before; called for 1, ..., num_steps - 1, here
        and never again. Or its values in a list, which is what the schedule keeps; the first is not used.
    num_steps: updates to tabulate, with a function only. base_lr: the group's rate.
    Raises TypeError for something that cannot be called, ValueError for num_steps < 1 or an infinite value.

    >>> MultiplicativeLR(lambda t: 1 / t, num_steps=4, base_lr=0.5)([0, 1, 2]).tolist()
    [0.5, 0.5, 0.25]

    Source: torch.optim.lr_scheduler.MultiplicativeLR, torch 2.13.
    """

    lr_lambda: tuple[float, ...] | Factors
    _: KW_ONLY
    base_lr: float
    num_steps: InitVar[int | None] = None

    def __post_init__(self, num_steps: int | None) -> None:
        set_fields(self, lr_lambda=_tabulated(self.word, self.lr_lambda, num_steps, first=1))
        super().__post_init__()

    @property
    def factors(self) -> tuple[float, ...]:
        """The values of lr_lambda; the first is not used."""
        assert isinstance(self.lr_lambda, tuple)
        return self.lr_lambda

    @property
    def repeats_epoch_zero(self) -> bool:
        return False

    def negative_rate(self) -> str | None:
        return _turns_negative(self._products(1.0), self.base_lr)

    def lower_from(self, base_lr: float) -> Tree:
        return Curve("table", table=self._products(base_lr))

    def lower_factors(self, restarts: Restarts) -> Tree:
        return restarts.of_stairs(dict(enumerate(self.factors[1:], start=1)))

    def _products(self, base_lr: float) -> tuple[float, ...]:
        return tuple(accumulate(self.factors[1:], lambda lr, factor: bounded(lr * factor), initial=base_lr))


def _tabulated(word: str, lr_lambda: Factors, num_steps: int | None, first: int) -> tuple[float, ...]:
    if callable(lr_lambda):
        if num_steps is None:
            raise TypeError(f"{word}: num_steps is missing; say for how many updates to tabulate lr_lambda")
        count = checks.step_count(word, "num_steps", num_steps)
        values = [1.0] * first + [lr_lambda(t) for t in range(first, count)]
    elif isinstance(lr_lambda, list | tuple):
        values = list(lr_lambda)
        if num_steps is not None and num_steps != len(values):
            raise ValueError(f"{word}: num_steps must be left out or {len(values)}, the values given, got {num_steps}")
    else:
        raise TypeError(f"{word}: lr_lambda must be a function or its values in a list, got {lr_lambda!r}")
    if not values:
        raise ValueError(f"{word}: lr_lambda must have at least one value, got none")
    # A condition is a factor, as in torch: `lambda t: t < 100`.
    numbers = (float(value) if isinstance(value, bool | np.bool_) else value for value in values)
    return tuple(checks.number(word, f"lr_lambda({t})", value) for t, value in enumerate(numbers))


def _turns_negative(factors: tuple[float, ...], base_lr: float) -> str | None:
    update = next((t for t, factor in enumerate(factors) if factor * base_lr < 0.0), None)
    return None if update is None else f"the rate is negative at update {update}; use max(0.0, ...) in lr_lambda"
