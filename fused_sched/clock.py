"""When a call of `step()` begins a new update of the schedule clock.

The clock T counts applied updates. An engine such as ZeRO calls the optimizer several times per update, with
its groups swapped or emptied; a plain loop calls it once, with all of them, and may alternate parameters.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from typing import Any

import torch


class TickRule:
    """Decides, without asking the device, whether a call ticks.

    While the groups hold every parameter they were ever seen to hold, every call ticks. When some are missing
    (swapped or emptied groups), a call ticks when one of its parameters was already stepped since the last
    tick. Counting calls would run ZeRO-3's schedule as many times too fast as there are sub-groups; counting
    repeats alone would run a loop that alternates disjoint parameters at half speed.
    """

    def __init__(self) -> None:
        self._seen: dict[int, weakref.ref[torch.Tensor]] = {}
        self._num_ever_seen = 0
        self._held_ids: list[int] = []
        self._holds_all = True
        self._stepped_since_tick: AbstractSet[int] = frozenset()

    def observe(self, groups: Sequence[dict[str, Any]]) -> None:
        """Take note of what the groups hold now."""
        ids = [id(p) for group in groups for p in group["params"]]
        if ids == self._held_ids:
            return
        for group in groups:
            for p in group["params"]:
                known = self._seen.get(id(p))
                if known is None or known() is not p:
                    self._seen[id(p)] = weakref.ref(p)
                    self._num_ever_seen += 1
        self._held_ids = ids
        self._holds_all = len(set(ids)) == self._num_ever_seen

    def should_tick(self, stepped: AbstractSet[int]) -> bool:
        """Whether the call that is about to step the parameters of these ids begins a new update."""
        return self._holds_all or not self._stepped_since_tick or not self._stepped_since_tick.isdisjoint(stepped)

    def record(self, stepped: AbstractSet[int], tick: bool) -> None:
        """Take note of a call that was made."""
        self._stepped_since_tick = stepped if tick else self._stepped_since_tick | stepped

    def forget_round(self) -> None:
        """The next call begins a new update (after a checkpoint was loaded or the clock was set)."""
        self._stepped_since_tick = frozenset()
