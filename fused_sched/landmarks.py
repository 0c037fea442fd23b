"""What can be told about a schedule's curve from its tree, without walking through its steps.

Where its largest value may be, from when on it no longer changes, and where its phases begin: for a group's
reference rate, for pictures, and for the checks of a schedule's range.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import islice
from math import inf, nextafter
from operator import itemgetter

from .program import Clamp, Clock, Curve, Join, Product, Repeat, Sum, Tree
from .reference_schedule import power

#: Beyond it not every whole number is a double, and a schedule no longer steps.
LAST_STEP = 2**53

#: Turns of a wave that are looked at: its first crest and trough come before the third.
_TURNS = 3


def held_from(tree: Tree) -> int | None:
    """The first step from which the value no longer changes; None for a tree without an end.

    An end that only a bound brings about (`low`, `high`) is not seen.
    """
    end = _held_from(tree)
    return None if end == inf else math.ceil(max(0.0, end))


def extremes(tree: Tree, length: int | None = None) -> set[int]:
    """Steps in [0, length) among which the largest and the smallest value are; length None: there is no last step.

    Of a product or a sum they are those of its children, of a wave its first turns.
    """
    last = LAST_STEP if length is None else length - 1
    steps = set()
    for t in filter(math.isfinite, _extremes(tree, 0.0, inf if length is None else last)):
        # A turn between two steps, or the end of a phase, which the step before it is the last of.
        steps |= {math.floor(t) - 1, math.floor(t), math.ceil(t)}
    return {int(min(max(step, 0), last)) for step in steps}


def phase_starts(tree: Tree, length: int, most_cycles: int | None = None) -> list[int]:
    """Steps in (0, length) at which one child of a join, or one cycle, gives way to the next, in order.

    A repeat of which more than `most_cycles` end before `length` counts as one phase.
    """
    starts = {math.ceil(t) for t in _phase_starts(tree, 0.0, length - 1.0, most_cycles)}
    return sorted(step for step in starts if 0 < step < length)


def _held_from(node: Tree) -> float:
    match node:
        case Curve():
            return _curve_held_from(node)
        case Join():
            last = _held_from(node.children[-1])
            if not node.ends:
                return last + node.origins[0]
            return max(node.ends[-1], last + node.origins[-1])
        case Product() | Sum():
            return max(map(_held_from, node.children))
        case Repeat():
            if node.gain == 1.0 and _held_from(node.child) <= 0.0:
                return -inf
            return _length(node)
        case Clock():
            return _before_clock(node, _held_from(node.child))
        case Clamp():
            return _held_from(node.child)  # also where scale is 0: 0 times a value that overflows is NaN


def _curve_held_from(node: Curve) -> float:
    still = {"constant": True, "power": node.p == 0.0, "exponential": node.p == 1.0}.get(node.curve, False)
    overflows = node.curve == "exponential" and node.p > 1.0  # and 0 times infinity is no longer 0
    if still or (node.scale == 0.0 and not overflows):
        return -inf
    if node.curve == "exponential" and node.p == 0.0 and node.stairs:
        return node.origin + node.divisor / node.stairs
    end = node.origin + node.limit
    if node.curve == "table" and node.divisor > 0.0:
        end = min(end, node.origin + (len(node.table) - 1) * node.divisor)
    elif node.curve == "levels" and node.divisor > 0.0:
        ends = node.table[: len(node.table) // 2]
        end = min(end, node.origin + ends[-1] * node.divisor) if ends else -inf
    return end


def _length(node: Repeat) -> float:
    """Of all cycles of a repeat."""
    if node.times == 0.0:
        return inf
    if node.growth == 1.0:
        return node.period * node.times
    return node.period * float(sum(power(node.growth, cycle) for cycle in range(int(node.times))))


def _before_clock(node: Clock, t: float) -> float:
    """The first time at which a clock shows its child t or more."""
    if t == -inf or node.multiplier == 0.0:
        return -inf
    if node.multiplier < 0.0:
        return inf if t > 0.0 else -inf
    if node.every and t < inf:
        t = math.ceil(t) * node.every  # the child sees whole numbers only
    return (t - node.addend) / node.multiplier


def _extremes(node: Tree, begin: float, end: float) -> Iterator[float]:
    """Times in [begin, end], on the node's own clock, where a value may be largest or smallest."""
    yield begin
    if end < inf:
        yield end
    match node:
        case Curve():
            yield from (t for t in _curve_extremes(node, begin, end) if begin <= t <= end)
        case Join():
            for child, origin, start, stop in _phases(node, begin, end):
                yield from (t + origin for t in _extremes(child, start - origin, stop - origin))
        case Product() | Sum():
            for child in node.children:
                yield from _extremes(child, begin, end)
        case Repeat():
            yield from _repeat_extremes(node, begin, end)
        case Clock():
            yield from _clock_extremes(node, begin, end)
        case Clamp():
            yield from _extremes(node.child, begin, end)


def _curve_extremes(node: Curve, begin: float, end: float) -> Iterator[float]:
    yield node.origin
    if node.limit < inf:
        yield node.origin + node.limit
    if node.curve == "cosine" and node.exponent == 1.0 and not node.stairs and not node.repeats and node.p:
        half_turn = abs(node.divisor / node.p)
        first = math.ceil((begin - node.origin) / half_turn)
        yield from (node.origin + half_turn * (first + k) for k in range(_TURNS))
    elif node.repeats:
        tooth = abs(node.divisor / node.repeats)
        first = math.ceil((begin - node.origin) / tooth)
        yield from (node.origin + tooth * (first + k) for k in range(_TURNS))
    elif node.curve in ("table", "levels"):
        num_ends = len(node.table) // 2 if node.curve == "levels" else 0
        values = node.table[num_ends:]
        starts = (-inf, *node.table[:num_ends]) if node.curve == "levels" else range(len(values))
        times = [node.origin + start * node.divisor for start in starts]
        # One that began before is still there at `begin`.
        here = [(v, t) for v, t in zip(values, times, strict=True) if begin < t <= end]
        if here:
            yield from (find(here, key=itemgetter(0))[1] for find in (max, min))


def _repeat_extremes(node: Repeat, begin: float, end: float) -> Iterator[float]:
    length = _length(node)
    yield from (t for t in (length,) if begin <= t <= end)
    cycles = [0, 1] if node.times == 0.0 else [0, 1, int(node.times) - 1]
    if node.growth == 1.0 and begin > 0.0:
        cycles.append(int(begin // node.period))
        cycles.append(cycles[-1] + 1)
    last = nextafter(node.period, 0.0)  # a cycle's own end belongs to the next one
    inner = list(islice(_extremes(node.child, 0.0, min(last, max(end, 0.0))), 64))
    for cycle in cycles:
        stretch = power(node.growth, cycle)
        start = node.period * cycle if node.growth == 1.0 else node.period * (stretch - 1.0) / (node.growth - 1.0)
        yield from (t for t in (start + stretch * x for x in inner) if begin <= t <= end)
    # A cycle entered in the middle: the turns that a wave in it still has.
    entered = begin % node.period if node.growth == 1.0 else begin
    if 0.0 < entered < node.period and begin < length:
        inside = islice(_extremes(node.child, entered, min(last, entered + end - begin)), 64)
        yield from (t for t in (begin - entered + x for x in inside) if begin <= t <= end)


def _clock_extremes(node: Clock, begin: float, end: float) -> Iterator[float]:
    if node.multiplier <= 0.0:
        return
    start, stop = (max(0.0, t * node.multiplier + node.addend) for t in (begin, end))
    if node.every:
        start, stop = start // node.every, (stop // node.every if stop < inf else inf)
    for t in _extremes(node.child, start, stop):
        yield min(max(_before_clock(node, t), begin), end)


def _phases(node: Join, begin: float, end: float) -> Iterator[tuple[Tree, float, float, float]]:
    """The children that [begin, end] meets: child, origin, and its part of the window."""
    starts = (-inf, *node.ends)
    stops = (*node.ends, inf)
    for child, origin, start, stop in zip(node.children, node.origins, starts, stops, strict=True):
        if start < stop and start <= end and stop > begin:
            yield child, origin, max(begin, start), end if stop > end else nextafter(stop, -inf)


def _phase_starts(node: Tree, begin: float, end: float, most_cycles: int | None) -> Iterator[float]:
    match node:
        case Join():
            for index, (child, origin, start, stop) in enumerate(_phases(node, begin, end)):
                if index:
                    yield start
                yield from (t + origin for t in _phase_starts(child, start - origin, stop - origin, most_cycles))
        case Product() | Sum():
            for child in node.children:
                yield from _phase_starts(child, begin, end, most_cycles)
        case Clamp():
            yield from _phase_starts(node.child, begin, end, most_cycles)
        case Clock() if node.multiplier > 0.0:
            start, stop = (max(0.0, t * node.multiplier + node.addend) for t in (begin, end))
            if node.every:
                start, stop = start // node.every, stop // node.every
            yield from (_before_clock(node, t) for t in _phase_starts(node.child, start, stop, most_cycles))
        case Repeat():
            starts = list(islice(_cycle_starts(node, end), None if most_cycles is None else most_cycles + 1))
            if most_cycles is None or len(starts) <= most_cycles:
                yield from starts


def _cycle_starts(node: Repeat, end: float) -> Iterator[float]:
    start, length, cycle = 0.0, node.period, 0
    while start + length <= end and (node.times == 0.0 or cycle < node.times):
        start += length
        length *= node.growth
        cycle += 1
        yield start
