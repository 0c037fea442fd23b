"""What the schedules of optax share, and how joined ones become trees."""

from __future__ import annotations

from collections.abc import Sequence
from math import inf

import numpy as np

from ... import landmarks
from ...program import Curve, Tree, describe, evaluate, pack
from ..library import LibrarySchedule
from ..nodes import in_turn

#: A program is at most 4 KB, tables aside: a header of 24 bytes and 128 per node.
MOST_NODES = 31
#: 8 MiB of values.
_LONGEST_TABLE = 1 << 20


class OptaxSchedule(LibrarySchedule, library="optax", abstract=True):
    """A schedule of optax."""

    def negative_rate(self) -> str | None:
        steps = sorted(landmarks.extremes(self.tree))
        values = self(steps)
        low = int(np.argmin(values))
        if values[low] >= 0.0 or not np.isfinite(values).all():  # the latter is said by itself
            return None
        return f"the rate turns negative, down to {float(values[low])!r} at update {steps[low]}; keep it at 0.0 or more"


def joined(children: Sequence[Tree], boundaries: Sequence[float]) -> Tree:
    """join_schedules: of all boundaries that t has reached, the last in the list decides, whatever their order.

    Surplus children or boundaries are left out.
    """
    pairs = list(zip(children[1:], boundaries, strict=False))
    reached: list[tuple[Tree, float]] = []
    next_start = inf
    for child, start in reversed(pairs):
        if start < next_start:
            reached.append((child, start))
            next_start = start
    reached.reverse()
    return in_turn([children[0], *(child for child, _ in reached)], [start for _, start in reached])


def small(tree: Tree, who: str) -> Tree:
    """The tree, or its values one by one where it has too many nodes for a program."""
    if describe(pack(tree)).count("\n") <= MOST_NODES:
        return tree
    end = landmarks.held_from(tree)
    if end is None or end >= _LONGEST_TABLE:
        raise ValueError(
            f"{who}: a schedule of more than {MOST_NODES} pieces must end before step {_LONGEST_TABLE}, got "
            f"{'no end' if end is None else end}; split it with schedules.join, or tabulate the updates you need with "
            "schedules.from_callable"
        )
    return Curve("table", table=tuple(evaluate(pack(tree), np.arange(end + 1)).tolist()))
