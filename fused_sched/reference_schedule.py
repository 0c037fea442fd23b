"""The evaluator of schedule programs in plain Python, for installations where no extension was compiled.

A deliberate second copy of csrc/core/schedule.h, with the same order of operations on the C library's
functions: the two agree to a few units in the last place, and tests hold them together.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from .program import CURVES, Clamp, Clock, Curve, Join, Product, Repeat, Sum, Tree, unpack

_MAX_CYCLES = 4096


def evaluate(program: bytes, steps: npt.NDArray[np.float64], values: npt.NDArray[np.float64]) -> None:
    """Write a program's values at `steps` (float64, shape [n]) into `values` (float64, shape [n])."""
    tree = _tree(program)
    for i, t in enumerate(steps.tolist()):
        values[i] = value(tree, t)


@lru_cache(maxsize=64)
def _tree(program: bytes) -> Tree:
    return unpack(program)


def value(node: Tree, t: float) -> float:
    """The value of a tree at time t."""
    match node:
        case Curve():
            shape = SHAPES[node.curve](node, _argument(node, t))
            return _clamp(node.offset + node.scale * shape, node.low, node.high)
        case Join():
            phase = 0
            while phase < len(node.ends) and not t < node.ends[phase]:
                phase += 1
            return value(node.children[phase], t - node.origins[phase])
        case Product():
            result = 1.0
            for child in node.children:
                result *= value(child, t)
            return result
        case Sum():
            result = 0.0
            for child in node.children:
                result += value(child, t)
            return result
        case Repeat():
            cycle, x = _cycle(node, t)
            result = value(node.child, x)
            return result if node.gain == 1.0 else result * power(node.gain, cycle)
        case Clock():
            t = max(0.0, node.multiplier * t + node.addend)
            return value(node.child, _floor(t / node.every) if node.every > 0.0 else t)
        case Clamp():
            return _clamp(node.offset + node.scale * value(node.child, t), node.low, node.high)


def _argument(node: Curve, t: float) -> float:
    x = min(t - node.origin, node.limit)
    u = _floor(x * node.stairs / node.divisor) / node.stairs if node.stairs > 0.0 else x / node.divisor
    if node.repeats > 0.0:
        u *= node.repeats
        u -= _floor(u)
    u = power(u, node.exponent)
    return 1.0 - u if node.complement else u


#: One formula per curve, as in csrc/core/schedule.h.
SHAPES: dict[str, Callable[[Curve, float], float]] = {
    "constant": lambda node, u: 1.0,
    "power": lambda node, u: power(u, node.p),
    "cosine": lambda node, u: power(0.5 * (1.0 + cos_pi(node.p * u)), node.q),
    "exponential": lambda node, u: power(node.p, u),
    "logarithm": lambda node, u: node.p * _logarithm(u),
    "tanh": lambda node, u: 0.5 * (1.0 - math.tanh(node.p + (node.q - node.p) * u)),
    "table": lambda node, u: node.table[int(min(u, len(node.table) - 1)) if u > 0.0 else 0],
    "levels": lambda node, u: node.table[len(node.table) // 2 + bisect_right(node.table, u, 0, len(node.table) // 2)],
}
if set(SHAPES) != set(CURVES):
    raise ImportError(f"reference_schedule has formulas for {sorted(SHAPES)}, program.py names {sorted(CURVES)}")


def _cycle(node: Repeat, t: float) -> tuple[float, float]:
    """The number of the cycle at time t, and the child's time inside it."""
    if node.growth == 1.0:
        cycle = _floor(t / node.period)
        x = t - cycle * node.period
        if x < 0.0:
            cycle, x = cycle - 1.0, x + node.period
        if node.times > 0.0 and cycle >= node.times:
            return node.times - 1.0, node.period
        return cycle, x
    last = node.times - 1.0 if node.times > 0.0 else _MAX_CYCLES
    cycle, x, length, stretch = 0.0, t, node.period, 1.0
    while x >= length and cycle < last:
        x -= length
        length *= node.growth
        stretch *= node.growth
        cycle += 1.0
    x /= stretch
    return cycle, (node.period if node.times > 0.0 and x > node.period else x)


def _floor(x: float) -> float:
    return float(math.floor(x)) if math.isfinite(x) else x


def _clamp(value: float, low: float, high: float) -> float:
    return low if value < low else (high if value > high else value)


def power(x: float, y: float) -> float:
    """x^y with C's special values, where Python's math.pow raises instead."""
    try:
        return math.pow(x, y)
    except OverflowError:
        return -math.inf if x < 0.0 and y % 2.0 == 1.0 else math.inf
    except ValueError:  # a negative base, or 0 to a negative power
        return math.nan if x < 0.0 else math.inf


def _logarithm(u: float) -> float:
    if u > 0.0:
        return math.log(u)
    return -math.inf if u == 0.0 else math.nan


def cos_pi(x: float) -> float:
    """cos(pi x) with an exact reduction: 0 at halves, +-1 at whole numbers."""
    if math.isinf(x):
        return math.nan
    a = math.fmod(abs(x), 2.0)
    if a > 1.0:
        a = 2.0 - a
    if a <= 0.25:
        return math.cos(math.pi * a)
    return math.sin(math.pi * (0.5 - a)) if a < 0.75 else -math.cos(math.pi * (1.0 - a))
