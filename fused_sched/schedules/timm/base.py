"""What timm's schedulers share: the warm-up, the clock, what update 0 uses, and how they fail."""

from __future__ import annotations

import math
from abc import abstractmethod
from fractions import Fraction
from math import ceil
from typing import Any, ClassVar

from ...program import Clock, Join, Tree, evaluate_at, pack
from .. import checks
from ..base import set_fields
from ..library import Failure, LibrarySchedule
from ..nodes import flat, line, phases, until

#: Of base_lr: a fall at the end of the warm-up that is worth a warning. timm's own recipes, which warm up for 5 of
#: 300 epochs with warmup_prefix=False, fall by 0.07 percent.
_LARGE_FALL = 0.1


class TimmSchedule(LibrarySchedule, library="timm", abstract=True):
    """A schedule of timm."""

    #: What its constructor raises.
    refusal: ClassVar[type[Exception]] = AssertionError

    warmup_t: int
    warmup_lr_init: float
    warmup_prefix: bool
    t_in_epochs: bool
    noise_range_t: Any
    base_lr: float
    updates_per_epoch: int | None

    # What a subclass says about itself.

    @abstractmethod
    def decay(self) -> Tree:
        """The rate without warm-up, on the decay's own clock."""

    def check_arguments(self) -> None:
        """Raise what timm's constructor raises, and give the fields their plain types."""

    def negative_decay(self) -> str | None:
        """What turns the decay negative, and what to do about it."""
        return None

    def odd_decay(self) -> str | None:
        """What is odd about the decay, and what to do about it."""
        return None

    def failing(self) -> tuple[int, str] | None:
        """The first t for which timm's step raises, and why."""
        return None

    @property
    def warmup_target(self) -> float:
        """The rate that the warm-up aims at."""
        return self.base_lr

    @property
    def decay_begin(self) -> float:
        """When the decay's clock is 0."""
        return self.warmup_t if self.warmup_prefix else 0

    # What they share.

    @property
    def first_call(self) -> int:
        """The first t for which timm's formula of the decay is evaluated."""
        return max(1, ceil(self.warmup_t))

    @property
    def unit(self) -> str:
        return "epoch" if self.t_in_epochs else "update"

    def check(self) -> None:
        set_fields(self, base_lr=checks.number(self.word, "base_lr", self.base_lr, at_least=0.0))
        self.make_plain("warmup_t", "warmup_lr_init", "warmup_prefix", "t_in_epochs")
        self._check_clock()
        if self.noise_range_t is not None:
            raise ValueError(
                f"{self.word}: noise_range_t must be None, got {self.noise_range_t!r}: random rates are no formula; "
                "tabulate timm's own with from_callable(function, num_steps)"
            )
        self.check_arguments()

    def require(self, holds: bool, rule: str, name: str, remedy: str) -> None:
        """A rule of timm's constructor for the named field."""
        if not holds:
            raise self.refusal(f"{self.word}: {rule}, got {getattr(self, name)!r}; {remedy}")

    def _check_clock(self) -> None:
        if self.updates_per_epoch is not None:
            count = checks.step_count(self.word, "updates_per_epoch", self.updates_per_epoch)
            set_fields(self, updates_per_epoch=count)
        if self.t_in_epochs and self.updates_per_epoch is None:
            raise ValueError(
                f"{self.word}: t_in_epochs=True, timm's default, needs updates_per_epoch, got None; pass the number of "
                "updates between two calls of timm's step, or t_in_epochs=False where t counts updates"
            )
        if not self.t_in_epochs and self.updates_per_epoch is not None:
            raise ValueError(
                f"{self.word}: updates_per_epoch must be None with t_in_epochs=False, where t counts updates, got "
                f"{self.updates_per_epoch}; leave one of the two out"
            )

    def negative_rate(self) -> str | None:
        if self.warmup_t > 0 and self.warmup_lr_init < 0.0:
            return f"the rate is negative at first, as warmup_lr_init={self.warmup_lr_init!r} is; pass 0.0 or more"
        return self.negative_decay()

    def oddity(self) -> str | None:
        if self.failing() is not None:
            return None  # which is more than odd
        if self.warmup_t > 0:
            landing = evaluate_at(pack(self.decay()), float(self.warmup_t - self.decay_begin))
            if self.warmup_target - landing > _LARGE_FALL * self.warmup_target:
                return (
                    f"the decay runs during the warm-up, at whose end the rate falls from {self.warmup_target:g} to "
                    f"{landing:g}; pass warmup_prefix=True"
                )
        return self.odd_decay()

    def failure(self) -> Failure | None:
        failing = self.failing()
        if failing is None:
            return None
        t, reason = failing
        update = t if self.updates_per_epoch is None else t * self.updates_per_epoch
        return Failure(update, f"an error, because {reason},", "stop before, or pass another number")

    def lower(self) -> Tree:
        tree = self._with_warmup()
        # Nobody asks the formula for the first rate: the constructor sets this one.
        first = self.warmup_lr_init if self.warmup_t else self.base_lr
        if not math.isclose(evaluate_at(pack(tree), 0.0), first, rel_tol=1e-15):
            tree = phases((flat(first), tree), (1.0,))
        failing = self.failing()
        if failing is not None:
            tree = until(tree, failing[0])
        return tree if self.updates_per_epoch is None else Clock(tree, every=float(self.updates_per_epoch))

    def _with_warmup(self) -> Tree:
        decay, begin, end = self.decay(), float(self.decay_begin), float(self.warmup_t)
        if end <= 0.0:
            return Join((decay,), ends=(), origins=(begin,)) if begin else decay
        warmup = line(self.warmup_lr_init, self.warmup_target, end)
        return Join((warmup, decay), ends=(end,), origins=(0.0, begin))


def floor_divisor(divisor: float) -> float:
    """A divisor d for which floor(t / d), rounded as quotients are, is Python's exact t // divisor.

    21 // 2.1 is 9, as the double is more than the decimal; 21 / 2.1 rounds up to 10, but not with the next double.
    """
    return math.nextafter(divisor, math.inf) if exceeds_decimal(divisor) else divisor


def exceeds_decimal(x: float) -> bool:
    """Is a double more than the decimal, or other fraction, that was rounded to it?"""
    return x > Fraction(x).limit_denominator(10**6)
