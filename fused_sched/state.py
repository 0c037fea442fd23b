"""Optimizer state as users see it: dicts that notice being written to, and how their values get into arenas."""

from __future__ import annotations

import copy
import math
import weakref
from collections import defaultdict
from collections.abc import ItemsView, Iterable, Iterator, Mapping, ValuesView
from typing import Any

import numpy as np
import torch

from . import dtensors
from .arena import Entry, Layout, allocate
from .conversion import CODES, FLOATS, check_source, fill


class ParamState(dict[str, Any]):
    """One parameter's state: a dict that knows when somebody else wrote to it or looked at it, and tells its map."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.entry: Entry | None = None
        self.owner: StateMap | None = None
        self.changed = True

    def mark(self) -> None:
        """Somebody wrote to it."""
        self.changed = True
        if self.owner is not None:
            self.owner.changed = True

    def publish(self, entry: Entry, param: torch.Tensor) -> None:
        """Show this entry's tensors, keeping keys that are not ours."""
        super().update(dtensors.shown(param, entry.tensors))
        for key in (*FLOATS, *CODES):
            if key not in entry.tensors:
                super().pop(key, None)
        self.entry = entry
        self.changed = False

    def _show(self) -> None:
        if self.entry is not None and self.owner is not None:
            self.entry.shown = True
            self.owner.shown[id(self.entry)] = weakref.ref(self.entry)

    def __getitem__(self, key: str) -> Any:
        self._show()
        return super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        self._show()
        return super().get(key, default)

    def items(self) -> ItemsView[str, Any]:  # type: ignore[override]
        self._show()
        return super().items()

    def values(self) -> ValuesView[Any]:  # type: ignore[override]
        self._show()
        return super().values()

    def __iter__(self) -> Iterator[str]:
        # What copies a dict (`dict(state)`, `{**state}`) goes by `__getitem__` because this method is here.
        return super().__iter__()

    def __setitem__(self, key: str, value: Any) -> None:
        self.mark()
        super().__setitem__(key, value)

    def __delitem__(self, key: str) -> None:
        self.mark()
        super().__delitem__(key)

    def update(self, *args: Any, **kwargs: Any) -> None:
        self.mark()
        super().update(*args, **kwargs)

    def __ior__(self, other: Any) -> ParamState:  # type: ignore[override, misc]
        self.update(other)
        return self

    def pop(self, *args: Any) -> Any:
        self.mark()
        return super().pop(*args)

    def popitem(self) -> tuple[str, Any]:
        self.mark()
        return super().popitem()

    def clear(self) -> None:
        self.mark()
        super().clear()

    def setdefault(self, key: str, default: Any = None) -> Any:
        if key not in self:
            self[key] = default
        return self[key]

    def discard(self, key: str) -> None:
        """Remove a key that means nothing to the kernels, if it is there."""
        super().pop(key, None)

    def __reduce__(self) -> tuple[Any, ...]:
        return ParamState, (dict(self),)

    def __deepcopy__(self, memo: dict[int, Any]) -> ParamState:
        return ParamState(copy.deepcopy(dict(self), memo))


class StateMap(defaultdict[Any, Any]):
    """`optimizer.state`: a missing parameter gets an empty ParamState; assigned dicts become one."""

    def __init__(self, items: Mapping[Any, Any] | None = None) -> None:
        super().__init__()
        self.changed = True  # somebody wrote to it: values are to be taken in
        self.memory = object()  # another one whenever a parameter's state may lie elsewhere than before
        self.shown: dict[int, weakref.ref[Entry]] = {}  # what was looked at since the last step, by id
        for key, value in (items or {}).items():
            self[key] = value

    def __missing__(self, key: Any) -> ParamState:
        self[key] = {}
        value: ParamState = self[key]
        return value

    def _replace(self) -> None:
        self.changed = True
        self.memory = object()

    def __setitem__(self, key: Any, value: Any) -> None:
        self._replace()
        if isinstance(value, dict):
            # A state that another map owns stays that map's: its memory cannot be updated by two optimizers.
            if not isinstance(value, ParamState) or not (value.owner is None or value.owner is self):
                value = ParamState(value)
            value.owner = self
        super().__setitem__(key, value)

    def __delitem__(self, key: Any) -> None:
        self._replace()
        super().__delitem__(key)

    def pop(self, *args: Any) -> Any:
        self._replace()
        return super().pop(*args)

    def popitem(self) -> tuple[Any, Any]:
        self._replace()
        return super().popitem()

    def clear(self) -> None:
        self._replace()
        super().clear()

    def update(self, *args: Any, **kwargs: Any) -> None:
        for key, value in dict(*args, **kwargs).items():
            self[key] = value

    def setdefault(self, key: Any, default: Any = None) -> Any:
        if key not in self:
            self[key] = default
        return self[key]

    def __ior__(self, other: Any) -> StateMap:  # type: ignore[misc]
        self.update(other)
        return self

    def copy(self) -> StateMap:
        return StateMap(self)

    __copy__ = copy

    def take_shown(self) -> list[Entry]:
        """The entries that somebody looked at since the last call."""
        entries = [entry for reference in self.shown.values() if (entry := reference()) is not None]
        self.shown.clear()
        return entries

    def has_state(self, param: torch.Tensor) -> bool:
        """Whether the parameter has state that the kernels work on; looking at `state[p]` makes none."""
        return self.entry_of(param) is not None

    def entry_of(self, param: torch.Tensor) -> Entry | None:
        """What the kernels work on for a parameter; None before it has any."""
        value = self.get(param)
        return value.entry if isinstance(value, ParamState) else None

    def __reduce__(self) -> tuple[Any, ...]:
        return StateMap, (dict(self),)


def step_counts(param_states: Iterable[Any]) -> list[int]:
    """How many updates each parameter's state has seen, with one wait per device; 0 where it says nothing.

    Where `step` and `step_int64` disagree, another optimizer went on with the one that it knows, and `step` is right.
    """
    numbers: list[Any] = []
    for state in param_states:
        known = state if isinstance(state, dict) else {}
        numbers += [known.get("step_int64", known.get("step", 0)), known.get("step", known.get("step_int64", 0))]
    positions: dict[torch.device, list[int]] = {}
    for position, number in enumerate(numbers):
        if isinstance(number, torch.Tensor):
            positions.setdefault(number.device, []).append(position)
    for of_device in positions.values():
        on_device = torch.stack([numbers[i].reshape(()).to(torch.int64) for i in of_device])  # a NaN becomes negative
        for position, number in zip(of_device, on_device.tolist(), strict=True):
            numbers[position] = number
    counts = [int(number) if math.isfinite(number) else -1 for number in numbers]
    return [
        max(0, step if step >= 0 and np.float32(count) != np.float32(step) else count)
        for count, step in zip(counts[::2], counts[1::2], strict=True)
    ]


def clocks_of(param_states: Iterable[Any]) -> list[int]:
    """The clocks that `checkpoint.export` has written into the states of parameters."""
    return [int(s["clock"]) for s in param_states if isinstance(s, dict) and "clock" in s]


def ensure(state: StateMap, params: Iterable[torch.Tensor], layouts: Iterable[Layout]) -> None:
    """Give every parameter state of its layout, keeping the values it has.

    Written values are taken over, tensors that were put in place of ours are copied in, and state of another
    layout (the parameter changed its dtype, device or memory order) is converted. Nothing has been changed when
    this raises. Whether all written state was among it, and `state.changed` can be taken back, the caller knows.
    """
    pending: list[tuple[torch.Tensor, ParamState, Layout]] = []
    for param, layout in zip(params, layouts, strict=True):
        param_state = state.get(param)
        if param_state is None:
            param_state = ParamState()
        entry = param_state.entry
        if param_state.changed or entry is None or entry.layout != layout or entry.moved:
            check_source(dtensors.local(param), dtensors.local_state(param, param_state))
            pending.append((param, param_state, layout))
    sources = _sources(pending)
    by_device: dict[torch.device, list[tuple[ParamState, Layout]]] = {}
    for _, param_state, layout in pending:
        if param_state.entry is None or param_state.entry.layout != layout:
            by_device.setdefault(layout.device, []).append((param_state, layout))
    fresh = {
        id(param_state): entry
        for items in by_device.values()
        for (param_state, _), entry in zip(items, allocate([layout for _, layout in items]), strict=True)
    }
    if fresh:
        state.memory = object()
    for (param, param_state, _), source in zip(pending, sources, strict=True):
        entry = fresh.get(id(param_state)) or param_state.entry
        assert entry is not None
        if entry.arena is not None:
            entry.reclaim()
        fill(entry, dtensors.local(param), source)
        param_state.publish(entry, param)
        if state.get(param) is not param_state:
            state[param] = param_state


def _sources(pending: Iterable[tuple[torch.Tensor, ParamState, Layout]]) -> list[dict[str, Any]]:
    """What each state is to be filled from, as it is before any of them is filled.

    A value may lie in another one's memory: two parameters' states swapped, or a transposed view put in place.
    """
    items = list(pending)
    states = [param_state for _, param_state, _ in items]
    arenas = {id(s.entry.arena): s.entry.arena for s in states if s.entry is not None and s.entry.arena is not None}
    written = [(buffer.data_ptr(), buffer.nbytes) for arena in arenas.values() for buffer in arena.all_buffers]

    def detached(value: Any, own: Mapping[str, torch.Tensor], key: str) -> Any:
        if not isinstance(value, torch.Tensor) or value is own.get(key) or value.is_meta:
            return value
        inside = any(start <= value.data_ptr() < start + length for start, length in written)
        return value.clone() if inside else value

    return [
        {
            key: detached(value, {} if s.entry is None else s.entry.tensors, key)
            for key, value in dtensors.local_state(param, s).items()
        }
        for param, s, _ in items
    ]
