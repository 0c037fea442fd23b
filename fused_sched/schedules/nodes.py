"""Pieces of trees that the lowerings of library schedules are made of.

They leave no trace of clamping or rounding of their own, unlike the words in `curves`: the libraries' values depend
on the order of operations.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from math import inf, nextafter

from ..program import Curve, Join, Tree, evaluate_at, pack


def flat(value: float) -> Curve:
    """`value` at every step."""
    return Curve("constant", scale=value)


def line(start: float, end: float, steps: float, origin: float = 0.0) -> Curve:
    """`start + (end - start) * (t - origin) / steps`, without an end."""
    return Curve("power", origin=origin, divisor=steps, offset=start, scale=end - start)


def falling(start: float, end: float, steps: float, origin: float = 0.0, power: float = 1.0) -> Curve:
    """`end + (start - end) * ((origin + steps - t) / steps)^power`: exact at its end, where 1 - t/steps cancels."""
    return Curve("power", origin=origin + steps, divisor=-steps, p=power, offset=end, scale=start - end)


def half_cosine(start: float, end: float, steps: float, origin: float = 0.0, turns: float = 1.0) -> Curve:
    """`end + (start - end) * (1 + cos(pi * turns * (t - origin) / steps)) / 2`, without an end."""
    return Curve("cosine", origin=origin, divisor=steps, p=turns, offset=end, scale=start - end)


def bounded(value: float) -> float:
    """The nearest finite double: an optimizer refuses a schedule that is ever infinite, however late."""
    return max(-sys.float_info.max, min(sys.float_info.max, value))


def geometric(start: float, ratio: float, steps: float | None = None) -> Curve:
    """`start * ratio^t`, or on stairs of `steps` updates. Growth ends at the largest double, as for `bounded`."""
    if start == 0.0:
        return flat(0.0)
    divisor, stairs = (1.0, 0.0) if steps is None else (float(steps), 1.0)
    decays = abs(ratio) <= 1.0 if divisor > 0.0 else abs(ratio) >= 1.0
    low, high = (-inf, inf) if decays else (-sys.float_info.max, sys.float_info.max)
    return Curve("exponential", divisor=divisor, stairs=stairs, p=ratio, scale=start, low=low, high=high)


def held(tree: Tree, step: float) -> Curve:
    """The value of a tree at `step`, at every step."""
    return flat(evaluate_at(pack(tree), float(step)))


def levels(values: Sequence[float], starts: Sequence[float]) -> Curve:
    """`values[0]`, then `values[i]` from `starts[i-1]` on."""
    return Curve("levels", table=(*map(float, starts), *map(float, values)))


def phases(children: Sequence[Tree], ends: Sequence[float]) -> Tree:
    """Child i while t < ends[i], all on one clock. Phases of no length are left out, so that ends may repeat."""
    kept: list[tuple[Tree, float]] = []
    begin = 0.0
    for child, end in zip(children, (*ends, inf), strict=True):
        if end > begin:
            kept.append((child, end))
            begin = end
    if len(kept) == 1:
        return kept[0][0]
    return Join(tuple(c for c, _ in kept), ends=tuple(float(e) for _, e in kept[:-1]), origins=(0.0,) * len(kept))


def in_turn(children: Sequence[Tree], starts: Sequence[float]) -> Tree:
    """Child i+1 from starts[i] on, each on a clock of its own that is 0 there."""
    return Join(tuple(children), ends=tuple(map(float, starts)), origins=(0.0, *map(float, starts)))


def until(tree: Tree, end: float) -> Tree:
    """The tree while t < end; from there on what it is one step earlier."""
    return phases((tree, held(tree, end - 1)), (end,))


def after(bound: float) -> float:
    """The end of a phase that includes its bound: t <= bound is t < after(bound)."""
    return nextafter(bound, inf)
