"""Values at given steps: constant, linear or cosine between them, and the one-cycle schedules made of those."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import accumulate, pairwise
from operator import mul
from typing import Any

from ...program import Curve, Product, Sum, Tree
from .. import checks
from ..base import set_fields
from ..nodes import flat, half_cosine, levels, line, phases
from .base import MOST_NODES, OptaxSchedule, small

#: A step and the factor that acts there.
Scale = tuple[float, float]

#: As one node each, with the last value's and the join's. More lines are looked up in three tables.
_MOST_PIECES = MOST_NODES - 2


def as_scales(who: str, got: Mapping[Any, float] | Iterable[Scale] | None) -> tuple[Scale, ...] | None:
    """A dict of scales by step, in order; None for none.

    Raises ValueError for a negative scale, as optax.
    """
    if got is None:
        return None
    scales = []
    for boundary, scale in sorted(dict(got).items()):
        name = f"boundaries_and_scales[{boundary!r}]"
        scale = checks.number(who, name, scale, at_least=0.0)
        scales.append((checks.duration(who, "a boundary", boundary), scale))
    return tuple(scales)


def knots(init_value: float, scales: Iterable[Scale]) -> list[float]:
    """The values at the boundaries: cumulative products, init_value first."""
    return list(accumulate((scale for _, scale in scales), mul, initial=init_value))


def interpolated(kind: str, init_value: float, scales: tuple[Scale, ...], who: str) -> Tree:
    """From knot to knot; the first lies at step 0, the last value is held."""
    values = knots(init_value, scales)
    ends = [boundary for boundary, _ in scales]
    starts = [0, *ends][:-1]
    lengths = [max(end - start, 1) for start, end in zip(starts, ends, strict=True)]
    if kind == "linear" and len(lengths) > _MOST_PIECES:
        return _line_from_levels(values, starts, lengths, ends)
    piece = line if kind == "linear" else half_cosine
    pieces: list[Tree] = [
        piece(values[i], values[i + 1], length, start)
        for i, (length, start) in enumerate(zip(lengths, starts, strict=True))
    ]
    return small(phases([*pieces, flat(values[-1])], ends), who)


def _line_from_levels(values: list[float], starts: list[float], lengths: list[float], ends: list[float]) -> Tree:
    """value + slope * (t - start), all three looked up."""
    slopes = [(end - start) / length for (start, end), length in zip(pairwise(values), lengths, strict=True)]
    since_start = Sum((Curve("power", limit=ends[-1]), levels([-start for start in (*starts, ends[-1])], ends)))
    return Sum((levels(values, ends), Product((levels([*slopes, 0.0], ends), since_start))))


@dataclass(frozen=True, repr=False)
class piecewise_constant_schedule(OptaxSchedule):
    """Steps: `f(t) = init_value * (product of the scales whose boundary is t or less)`.

    init_value: first rate. boundaries_and_scales: {step: scale}, scales 0 or more; kept as pairs in order.
    Raises ValueError for a negative scale, TypeError or ValueError for anything but finite numbers; warns for a scale
    of 0, after which every rate is 0.

    >>> piecewise_constant_schedule(1.0, {10: 0.5, 20: 0.5})([0, 9, 10, 20]).tolist()
    [1.0, 1.0, 0.5, 0.25]

    Source: optax 0.2.8.
    """

    init_value: float
    boundaries_and_scales: Mapping[int, float] | tuple[Scale, ...] | None = None

    def check(self) -> None:
        super().check()
        set_fields(self, boundaries_and_scales=as_scales(self.word, self.boundaries_and_scales))

    @property
    def _scales(self) -> Any:
        return self.boundaries_and_scales or ()

    def oddity(self) -> str | None:
        zero = next((boundary for boundary, scale in self._scales[:-1] if scale == 0), None)
        return None if zero is None else _zero_scale(zero)

    def lower(self) -> Tree:
        values = knots(self.init_value, self._scales)
        return levels(values, [boundary for boundary, _ in self._scales]) if self._scales else flat(values[0])


@dataclass(frozen=True, repr=False)
class piecewise_interpolate_schedule(OptaxSchedule):
    """Lines or half cosines from knot to knot, the last of which is held.

    `v_i + (v_j - v_i) * u` or `v_j + (v_i - v_j) * (1 + cos(pi * u)) / 2`, u = (t - b_i) / (b_j - b_i), j = i + 1. The
    first knot is b = 0, v = init_value; then v_j = v_i * scale_j. Cosines of more than 29 pieces are tabulated, 8
    bytes per update.

    interpolate_type: "linear" or "cosine". init_value: first rate. boundaries_and_scales: {step: scale}, scales 0 or
    more; kept as pairs in order.
    Raises ValueError for another type, a negative scale, or more than 29 cosine pieces beyond 2^20 updates; TypeError
    or ValueError for anything but finite numbers. Warns for a boundary of 0 or less, whose value comes at once, and
    for a scale of 0, after which every rate is 0.

    >>> piecewise_interpolate_schedule("linear", 1.0, {10: 0.5, 20: 0.0})([0, 5, 10, 15, 20, 99]).tolist()
    [1.0, 0.75, 0.5, 0.25, 0.0, 0.0]

    Source: optax 0.2.8.
    """

    interpolate_type: str
    init_value: float
    boundaries_and_scales: Mapping[int, float] | tuple[Scale, ...] | None = None

    def check(self) -> None:
        super().check()
        if self.interpolate_type not in ("linear", "cosine"):
            raise ValueError(
                f"{self.word}: interpolate_type must be 'linear' or 'cosine', got {self.interpolate_type!r}"
            )
        set_fields(self, boundaries_and_scales=as_scales(self.word, self.boundaries_and_scales))
        _ = self.tree  # refuses what is too long for a table

    @property
    def _scales(self) -> Any:
        return self.boundaries_and_scales or ()

    def oddity(self) -> str | None:
        for i, (boundary, scale) in enumerate(self._scales):
            if boundary <= 0:
                return (
                    f"the scale of boundary {boundary} acts at once, before the first update; scale init_value instead"
                )
            if scale == 0 and i + 1 < len(self._scales):
                return _zero_scale(boundary)
        return None

    def lower(self) -> Tree:
        return interpolated(self.interpolate_type, self.init_value, self._scales, self.word)


def _zero_scale(boundary: float) -> str:
    return f"the scale of 0 at step {boundary} makes every later rate 0; leave the later boundaries out"
