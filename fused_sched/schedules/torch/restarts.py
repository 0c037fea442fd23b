"""What a chain's other schedules multiply after torch has begun its cosine anew.

CosineAnnealingLR is a factor on the rate like the others until it is at 0, where every product stays. At the next
update torch adds to the rate instead, half a cosine's first step of base_lr: whatever the others have multiplied is
gone, and what they multiply from there on counts. It is so again after every full turn.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import NamedTuple

from ... import landmarks
from ...program import Clock, Curve, Product, Repeat, Tree, evaluate_at, pack
from ..nodes import bounded, flat, geometric, levels, phases

#: 8 or 16 MiB of values.
_LONGEST_TABLE = 1 << 20


class Restarts(NamedTuple):
    """The updates `first + k * every`, from which on factors on the rate count.

    keeps_own: does the factor of that very update count? A cosine overwrites those of the schedules before it in the
    list only.
    """

    first: int
    every: int
    keeps_own: bool

    # Each gives the product of the factors since the latest restart, for updates from the first on.

    def of_power(self, ratio: float) -> Tree:
        """A factor at every update."""
        cycle = geometric(ratio if self.keeps_own else 1.0, ratio)
        return Clock(Repeat(cycle, period=float(self.every)), addend=-float(self.first))

    def of_stairs(self, factors: Mapping[int, float]) -> Tree:
        """Factors at some updates."""
        last = max(factors, default=0)
        values = self._stairs(factors, max(last + self.every, self.first) + 1)  # a restart comes after the last
        return levels([*values.values()], [*values][1:]) if len(values) > 1 else flat(1.0)

    def of_equal_stairs(self, factor: float, steps: int, period: int) -> Tree:
        """A factor at all multiples of `steps`; `period` is one of both them and the restarts."""
        end = self.first + period
        self._check_length(period // steps + period // self.every)
        values = self._stairs(dict.fromkeys(range(-(-self.first // steps) * steps, end, steps), factor), end)
        cycle = levels([*values.values()], [update - self.first for update in [*values][1:]])
        return Clock(Repeat(cycle, period=float(period)), addend=-float(self.first))

    def of_curve(self, curve: Tree) -> Tree:
        """The ratios of a curve that ends; at its end the factors are 1, also where the curve is then 0."""
        end = landmarks.held_from(curve)
        assert end is not None
        begins = range(self.first, end + self.keeps_own, self.every)
        if not begins:
            return flat(1.0)
        self._check_length(len(begins))
        program = pack(curve)
        since = [evaluate_at(program, float(begin - self.keeps_own)) for begin in begins]
        if min(since) < sys.float_info.min:
            self._refuse("a factor that has no digits left where the cosine begins anew")
        scale = Clock(
            Curve("table", table=tuple(1.0 / x for x in since)), addend=-float(self.first), every=float(self.every)
        )
        return phases([Product((curve, scale)), flat(1.0)], [float(begins[-1] + self.every)])

    def _stairs(self, factors: Mapping[int, float], end: int) -> dict[int, float]:
        """The product from each update on at which it changes, in [first, end)."""
        restarts = range(self.first, end, self.every)
        self._check_length(len(restarts))
        values, value = {}, 1.0
        for update in sorted({*restarts, *(t for t in factors if t >= self.first)}):
            if update in restarts:
                value = factors.get(update, 1.0) if self.keeps_own else 1.0
            else:
                value = bounded(value * factors[update])
            values[update] = value
        return values

    def _check_length(self, entries: int) -> None:
        if entries > _LONGEST_TABLE:
            self._refuse(f"{entries} changes of the rate, more than {_LONGEST_TABLE}, before they repeat")

    def _refuse(self, got: str) -> None:
        raise ValueError(
            f"torch.ChainedScheduler: what torch multiplies after CosineAnnealingLR's T_max={self.every // 2} must fit "
            f"into a table, got {got}; end the others by T_max, or tabulate the rates with "
            "schedules.from_callable(function, num_steps)"
        )
