"""Where optimizer state lives: arenas owned by the optimizer, seen by users as `state[p]`.

A batch of parameters shares one allocation per slot; each parameter's tensors have storages of their own over
their part of it. Saving, copying or keeping one of them takes its elements and nothing else, and the memory of
a batch is freed when the last of its tensors is.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from . import precision

#: Slots of `fs_arena` in `csrc/step.h`, in its order.
SLOTS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "master")

#: Elements to which each parameter's state is padded: whole vectors, whole quantisation groups.
PADDING = 256

#: Devices whose storages can be sliced; elsewhere every state tensor is an allocation of its own.
_DEVICES_WITH_ARENAS = ("cpu", "cuda")

#: Bytes of a StepRecord (`csrc/core/clock.h`): int64 count, float32 mirror, padding.
STEP_RECORD_BYTES = 16


@dataclass(frozen=True)
class Layout:
    """What decides whether existing state still fits its parameter."""

    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    master: str
    moments: str
    amsgrad: bool

    @classmethod
    def of(cls, param: torch.Tensor, group: Mapping[str, Any]) -> Layout:
        return cls(
            shape=param.shape,
            stride=dense_stride(param),
            dtype=param.dtype,
            device=param.device,
            master=precision.resolve_master(group["master"], param.dtype),
            moments=group["moments"],
            amsgrad=bool(group["amsgrad"]),
        )

    @property
    def slots(self) -> tuple[str, ...]:
        wanted = {"max_exp_avg_sq": self.amsgrad, "master": self.master == "fp32"}
        return tuple(slot for slot in SLOTS if wanted.get(slot, True))

    @property
    def compute_dtype(self) -> torch.dtype:
        return precision.compute_dtype(self.dtype)

    @property
    def numel(self) -> int:
        return self.shape.numel()

    @property
    def padded_numel(self) -> int:
        return -(-self.numel // PADDING) * PADDING


@dataclass(frozen=True)
class Arena:
    """Addresses of a batch's slots; 0 where it has none. Owns nothing."""

    slots: tuple[int, ...]


@dataclass(eq=False)
class Entry:
    """The state the kernels work on for one parameter."""

    layout: Layout
    tensors: dict[str, torch.Tensor]
    arena: Arena
    offset: int
    step_address: int

    @property
    def allocated_bytes(self) -> int:
        return bytes_of(self.layout)


def bytes_of(layout: Layout) -> int:
    """Persistent bytes of one parameter's state, padding included."""
    return layout.padded_numel * layout.compute_dtype.itemsize * len(layout.slots)


class ParamState(dict[str, Any]):
    """One parameter's state: a dict that knows when somebody else wrote to it, and tells its map."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.entry: Entry | None = None
        self.owner: StateMap | None = None
        self.changed = True

    def _mark(self) -> None:
        self.changed = True
        if self.owner is not None:
            self.owner.changed = True

    def publish(self, entry: Entry) -> None:
        """Show this entry's tensors, keeping keys that are not ours."""
        super().update(entry.tensors)
        for slot in SLOTS:
            if slot not in entry.tensors:
                super().pop(slot, None)
        self.entry = entry
        self.changed = False

    def __setitem__(self, key: str, value: Any) -> None:
        self._mark()
        super().__setitem__(key, value)

    def __delitem__(self, key: str) -> None:
        self._mark()
        super().__delitem__(key)

    def update(self, *args: Any, **kwargs: Any) -> None:
        self._mark()
        super().update(*args, **kwargs)

    def __ior__(self, other: Any) -> ParamState:  # type: ignore[override, misc]
        self.update(other)
        return self

    def pop(self, *args: Any) -> Any:
        self._mark()
        return super().pop(*args)

    def popitem(self) -> tuple[str, Any]:
        self._mark()
        return super().popitem()

    def clear(self) -> None:
        self._mark()
        super().clear()

    def setdefault(self, key: str, default: Any = None) -> Any:
        if key not in self:
            self[key] = default
        return self[key]

    def __reduce__(self) -> tuple[Any, ...]:
        return ParamState, (dict(self),)

    def __deepcopy__(self, memo: dict[int, Any]) -> ParamState:
        import copy

        return ParamState(copy.deepcopy(dict(self), memo))


class StateMap(defaultdict[Any, Any]):
    """`optimizer.state`: a missing parameter gets an empty ParamState; assigned dicts become one."""

    def __init__(self, items: Mapping[Any, Any] | None = None) -> None:
        super().__init__()
        self.changed = True
        for key, value in (items or {}).items():
            self[key] = value

    def __missing__(self, key: Any) -> ParamState:
        self[key] = {}
        value: ParamState = self[key]
        return value

    def __setitem__(self, key: Any, value: Any) -> None:
        self.changed = True
        if isinstance(value, dict):
            if not isinstance(value, ParamState):
                value = ParamState(value)
            value.owner = self
        super().__setitem__(key, value)

    def __delitem__(self, key: Any) -> None:
        self.changed = True
        super().__delitem__(key)

    def pop(self, *args: Any) -> Any:
        self.changed = True
        return super().pop(*args)

    def popitem(self) -> tuple[Any, Any]:
        self.changed = True
        return super().popitem()

    def clear(self) -> None:
        self.changed = True
        super().clear()

    def update(self, *args: Any, **kwargs: Any) -> None:
        for key, value in dict(*args, **kwargs).items():
            self[key] = value

    def setdefault(self, key: Any, default: Any = None) -> Any:
        if key not in self:
            self[key] = default
        return self[key]

    def __reduce__(self) -> tuple[Any, ...]:
        return StateMap, (dict(self),)


def dense_stride(tensor: torch.Tensor) -> tuple[int, ...]:
    """The tensor's own strides where it fills its memory without gaps or overlap, else contiguous ones."""
    if tensor.is_contiguous():
        return tensor.stride()
    expected = 1
    for size, stride in sorted(
        ((n, s) for n, s in zip(tensor.shape, tensor.stride(), strict=True) if n != 1),
        key=lambda pair: pair[1],
    ):
        if stride != expected:
            return torch.empty(tensor.shape, device="meta").stride()
        expected *= size
    return tensor.stride()


def is_dense(tensor: torch.Tensor) -> bool:
    """Whether the kernels may walk the tensor's memory from its first element to its last."""
    return tensor.is_contiguous() or tensor.stride() == dense_stride(tensor)


def same_order(a: tuple[int, ...], b: tuple[int, ...], shape: Sequence[int]) -> bool:
    """Whether two strides visit memory alike: those of dimensions of size 1 do not count."""
    return all(x == y for x, y, n in zip(a, b, shape, strict=True) if n > 1)


def _carve(
    storage: torch.UntypedStorage,
    start: int,
    layout_shape: Sequence[int],
    stride: Sequence[int],
    dtype: torch.dtype,
) -> torch.Tensor:
    """A tensor with its own storage over part of another, which it keeps alive."""
    numel = torch.Size(layout_shape).numel()
    part = storage[start : start + numel * dtype.itemsize]
    return torch.empty(0, dtype=dtype, device=storage.device).set_(part, 0, tuple(layout_shape), tuple(stride))


@dataclass
class _Batch:
    layouts: list[Layout] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)


def allocate(layouts: Sequence[Layout]) -> list[Entry]:
    """Zeroed state for parameters of one device, in one arena per kind of state."""
    entries: list[Entry | None] = [None] * len(layouts)
    batches: dict[tuple[torch.dtype, tuple[str, ...]], _Batch] = {}
    for position, layout in enumerate(layouts):
        batch = batches.setdefault((layout.compute_dtype, layout.slots), _Batch())
        batch.layouts.append(layout)
        batch.positions.append(position)
    for (dtype, slots), batch in batches.items():
        for position, entry in zip(batch.positions, _allocate_batch(batch.layouts, dtype, slots), strict=True):
            entries[position] = entry
    return [entry for entry in entries if entry is not None]


def _allocate_batch(layouts: Sequence[Layout], dtype: torch.dtype, slots: tuple[str, ...]) -> list[Entry]:
    device = layouts[0].device
    if device.type not in _DEVICES_WITH_ARENAS:
        return [_allocate_alone(layout, dtype, slots) for layout in layouts]
    padded_total = max(PADDING, sum(layout.padded_numel for layout in layouts))
    buffers = {slot: torch.zeros(padded_total, dtype=dtype, device=device) for slot in slots}
    records = torch.zeros(len(layouts) * STEP_RECORD_BYTES, dtype=torch.uint8, device=device)
    arena = Arena(tuple(buffers[slot].data_ptr() if slot in buffers else 0 for slot in SLOTS))
    entries = []
    offset = 0
    for index, layout in enumerate(layouts):
        tensors = {
            slot: _carve(buffer.untyped_storage(), offset * dtype.itemsize, layout.shape, layout.stride, dtype)
            for slot, buffer in buffers.items()
        }
        start = index * STEP_RECORD_BYTES
        tensors["step"] = _carve(records.untyped_storage(), start + 8, (), (), torch.float32)
        tensors["step_int64"] = _carve(records.untyped_storage(), start, (), (), torch.int64)
        entries.append(Entry(layout, tensors, arena, offset, records.data_ptr() + start))
        offset += layout.padded_numel
    return entries


def _allocate_alone(layout: Layout, dtype: torch.dtype, slots: tuple[str, ...]) -> Entry:
    """Ordinary tensors, for devices that only the reference backend serves."""
    tensors = {
        slot: torch.empty_strided(layout.shape, layout.stride, dtype=dtype, device=layout.device).zero_()
        for slot in slots
    }
    tensors["step"] = torch.zeros((), dtype=torch.float32, device=layout.device)
    tensors["step_int64"] = torch.zeros((), dtype=torch.int64, device=layout.device)
    return Entry(layout, tensors, Arena((0,) * len(SLOTS)), 0, 0)


def check_source(param: torch.Tensor, source: Mapping[str, Any]) -> None:
    """Raise if values found in a state dict cannot be taken over for this parameter."""
    for slot in SLOTS:
        value = source.get(slot)
        if value is None:
            continue
        if not isinstance(value, torch.Tensor) or not value.is_floating_point():
            raise TypeError(f"state {slot!r} must be a floating-point tensor, got {_describe(value)}")
        if value.shape != param.shape:
            raise ValueError(
                f"state {slot!r} must have its parameter's shape {tuple(param.shape)}, got {tuple(value.shape)}; "
                "was the checkpoint made from another model?"
            )
    for key in ("step", "step_int64"):
        value = source.get(key, 0)
        if not isinstance(value, (int, float)) and not (isinstance(value, torch.Tensor) and value.numel() == 1):
            raise TypeError(f"state {key!r} must be a number or a tensor of one element, got {_describe(value)}")


def _describe(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"a {value.dtype} tensor of shape {tuple(value.shape)}"
    return f"{value!r} of type {type(value).__name__}"


@torch.no_grad()
def fill(entry: Entry, param: torch.Tensor, source: Mapping[str, Any]) -> None:
    """Copy values into the entry's own memory; what the source lacks starts fresh."""
    for slot in entry.layout.slots:
        target = entry.tensors[slot]
        value = source.get(slot)
        if value is target:
            continue
        if value is not None:
            target.copy_(value)
        elif slot == "master":
            target.copy_(param)
        else:
            target.zero_()
    _fill_step(entry, source)


def _fill_step(entry: Entry, source: Mapping[str, Any]) -> None:
    mirror, count = entry.tensors["step"], entry.tensors["step_int64"]
    new_mirror, new_count = source.get("step", 0), source.get("step_int64")
    if new_count is None or (new_mirror is not mirror and new_count is count):
        new_count = new_mirror  # only the mirror was written, or there never was a count
    for target, value in ((mirror, new_mirror), (count, new_count)):
        if value is target:
            continue
        if isinstance(value, torch.Tensor):
            target.copy_(value.reshape(()))
        else:
            target.fill_(value)


def ensure(state: StateMap, params: Iterable[torch.Tensor], layouts: Iterable[Layout]) -> None:
    """Give every parameter state of its layout, keeping the values it has.

    Written values are taken over, tensors that were put in place of ours are copied in, and state of another
    layout (the parameter changed its dtype, device, shape or memory order) is converted. Nothing has been
    changed when this raises.
    """
    pending: list[tuple[torch.Tensor, ParamState, Layout]] = []
    for param, layout in zip(params, layouts, strict=True):
        param_state = state.get(param)
        if param_state is None:
            param_state = ParamState()
        if param_state.changed or param_state.entry is None or param_state.entry.layout != layout:
            check_source(param, param_state)
            pending.append((param, param_state, layout))
    misfits = [item for item in pending if item[1].entry is None or item[1].entry.layout != item[2]]
    by_device: dict[torch.device, list[tuple[torch.Tensor, ParamState, Layout]]] = {}
    for item in misfits:
        by_device.setdefault(item[2].device, []).append(item)
    fresh = {
        id(item[1]): entry
        for items in by_device.values()
        for item, entry in zip(items, allocate([item[2] for item in items]), strict=True)
    }
    for param, param_state, _ in pending:
        entry = fresh.get(id(param_state)) or param_state.entry
        assert entry is not None
        fill(entry, param, param_state)
        param_state.publish(entry)
        if state.get(param) is not param_state:
            state[param] = param_state
    state.changed = False
