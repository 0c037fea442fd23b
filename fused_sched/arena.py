"""Memory for optimizer state: one allocation per slot and batch of parameters.

Each parameter's tensors have storages of their own over their part of it. Saving, copying or keeping one of them
takes its elements and nothing else, and the memory of a batch is freed when the last of its tensors is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from . import dtensors, precision
from .codec import Stream
from .pages import in_large_pages

#: Slots of `fs_arena` in `csrc/step.h`, in its order.
SLOTS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "master", "exp_avg_scale", "exp_avg_sq_scale")

#: Elements to which each parameter's state is padded: whole vectors, whole quantisation groups.
PADDING = 256

#: Devices whose storages can be sliced; elsewhere every state tensor is an allocation of its own.
_DEVICES_WITH_ARENAS = ("cpu", "cuda")

#: Bytes of a StepRecord (`csrc/core/clock.h`): int64 count, float32 mirror, padding.
STEP_RECORD_BYTES = 16
STEP_RECORD_OFFSETS = {"count": 0, "mirror": 8}


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
        param = dtensors.local(param)
        return cls(
            shape=param.shape,
            stride=dense_stride(param),
            dtype=param.dtype,
            device=param.device,
            master=precision.resolve_master(group["master"], param.dtype),
            moments=precision.resolve_moments(group["moments"], param.dtype),
            amsgrad=bool(group["amsgrad"]),
        )

    @property
    def streams(self) -> tuple[Stream, ...]:
        return precision.streams(self.dtype, self.master, self.moments, self.amsgrad)

    @property
    def compute_dtype(self) -> torch.dtype:
        return precision.compute_dtype(self.dtype)

    @property
    def numel(self) -> int:
        return self.shape.numel()

    @property
    def padded_numel(self) -> int:
        return -(-self.numel // PADDING) * PADDING


@dataclass(eq=False)
class Arena:
    """The memory of a batch of parameters: one buffer per slot, and one of step records."""

    buffers: dict[str, torch.Tensor]  # by slot
    records: torch.Tensor

    @property
    def all_buffers(self) -> tuple[torch.Tensor, ...]:
        return (*self.buffers.values(), self.records)

    @property
    def slots(self) -> tuple[int, ...]:
        """Addresses in the order of SLOTS; 0 where the batch has none."""
        return tuple(self.buffers[slot].data_ptr() if slot in self.buffers else 0 for slot in SLOTS)


@dataclass(eq=False)
class Entry:
    """The state the kernels work on for one parameter."""

    layout: Layout
    arena: Arena | None  # None: ordinary tensors, which no kernel addresses
    offset: int  # elements into the arena's buffers
    index: int  # into the arena's step records
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    pointers: tuple[int, ...] = ()
    shown: bool = False  # somebody was shown the tensors, and may have kept them

    def __post_init__(self) -> None:
        if self.arena is not None:
            names = (*(stream.name for stream in self.layout.streams), "step", "step_int64")
            self.tensors = {name: self.view(name) for name in names}
            self.pointers = self.current_pointers()

    @property
    def step_address(self) -> int:
        assert self.arena is not None
        return self.arena.records.data_ptr() + self.index * STEP_RECORD_BYTES

    def view(self, name: str) -> torch.Tensor:
        """A new tensor over this entry's part of the arena."""
        assert self.arena is not None
        if name in ("step", "step_int64"):
            field, dtype = ("mirror", torch.float32) if name == "step" else ("count", torch.int64)
            start = self.index * STEP_RECORD_BYTES + STEP_RECORD_OFFSETS[field]
            return _carve(self.arena.records, start, (), (), dtype)
        stream = next(stream for stream in self.layout.streams if stream.name == name)
        start = self.offset // stream.group * stream.dtype.itemsize
        return _carve(self.arena.buffers[stream.slot], start, *shape_of(self.layout, stream), stream.dtype)

    def current_pointers(self) -> tuple[int, ...]:
        """Where the visible tensors are; differs from `pointers` when one's `.data` was set."""
        return tuple(map(torch.Tensor.data_ptr, self.tensors.values()))

    def reclaim(self) -> None:
        """Show the arena again where a visible tensor was pointed elsewhere."""
        for name, address, current in zip(list(self.tensors), self.pointers, self.current_pointers(), strict=True):
            if address != current:
                self.tensors[name] = self.view(name)

    @property
    def moved(self) -> bool:
        return self.arena is not None and self.current_pointers() != self.pointers


def shape_of(layout: Layout, stream: Stream) -> tuple[Sequence[int], Sequence[int]]:
    """Shape and strides of one of a parameter's state tensors: the parameter's, or those of a vector of scales."""
    if stream.group == 1:
        return layout.shape, layout.stride
    return (-(-layout.numel // stream.group),), (1,)


def bytes_of(layout: Layout) -> int:
    """Persistent bytes of one parameter's state, padding included."""
    return sum(layout.padded_numel // stream.group * stream.dtype.itemsize for stream in layout.streams)


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
    buffer: torch.Tensor, start: int, shape: Sequence[int], stride: Sequence[int], dtype: torch.dtype
) -> torch.Tensor:
    """A tensor with its own storage over part of the buffer's, from byte `start`, which it keeps alive."""
    part = buffer.untyped_storage()[start : start + torch.Size(shape).numel() * dtype.itemsize]
    return torch.empty(0, dtype=dtype, device=buffer.device).set_(part, 0, tuple(shape), tuple(stride))


@dataclass
class _Batch:
    layouts: list[Layout] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)


def allocate(layouts: Sequence[Layout]) -> list[Entry]:
    """Zeroed state for parameters of one device, in one arena per kind of state."""
    entries: list[Entry | None] = [None] * len(layouts)
    batches: dict[tuple[Stream, ...], _Batch] = {}
    for position, layout in enumerate(layouts):
        batch = batches.setdefault(layout.streams, _Batch())
        batch.layouts.append(layout)
        batch.positions.append(position)
    for streams, batch in batches.items():
        for position, entry in zip(batch.positions, _allocate_batch(batch.layouts, streams), strict=True):
            entries[position] = entry
    return [entry for entry in entries if entry is not None]


def _allocate_batch(layouts: Sequence[Layout], streams: tuple[Stream, ...]) -> list[Entry]:
    device = layouts[0].device
    if device.type not in _DEVICES_WITH_ARENAS:
        return [_allocate_alone(layout, streams) for layout in layouts]
    padded_total = max(PADDING, sum(layout.padded_numel for layout in layouts))
    arena = Arena(
        buffers={
            s.slot: in_large_pages(torch.empty(padded_total // s.group, dtype=s.dtype, device=device)).zero_()
            for s in streams
        },
        records=torch.zeros(len(layouts) * STEP_RECORD_BYTES, dtype=torch.uint8, device=device),
    )
    entries = []
    offset = 0
    for index, layout in enumerate(layouts):
        entries.append(Entry(layout, arena, offset, index))
        offset += layout.padded_numel
    return entries


def _allocate_alone(layout: Layout, streams: tuple[Stream, ...]) -> Entry:
    """Ordinary tensors, for devices that only the reference backend serves."""
    tensors = {
        stream.name: torch.empty_strided(*shape_of(layout, stream), dtype=stream.dtype, device=layout.device).zero_()
        for stream in streams
    }
    tensors["step"] = torch.zeros((), dtype=torch.float32, device=layout.device)
    tensors["step_int64"] = torch.zeros((), dtype=torch.int64, device=layout.device)
    return Entry(layout, None, 0, 0, tensors)
