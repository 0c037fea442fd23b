"""State for `adamw_`: moments and masters in one allocation, counts of updates on the device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ..arena import PADDING


class StepCounts:
    """Counts of updates on the device: the schedule clock T, and t of bias correction for each tensor.

    Args:
        num_tensors: how many parameters the calls will have.
        device: theirs.
        start: updates applied so far.

    Every applied call advances all of them there, in replays of a CUDA graph as well; `int(counts)` waits for the
    device and reads T. Raises ValueError for negative numbers.

    Example:
        >>> from fused_sched import ops
        >>> int(ops.StepCounts(2, "cpu", start=100))
        100
    """

    def __init__(self, num_tensors: int, device: torch.device | str, start: int = 0) -> None:
        if num_tensors < 0 or start < 0:
            raise ValueError(f"num_tensors and start must not be negative, got {num_tensors} and {start}")
        # Row 0 is the Clock, the others StepRecords (csrc/core/clock.h): a count beside its mirror in float32.
        rows = torch.zeros(1 + num_tensors, 2, dtype=torch.int64)
        rows[:, 0] = start
        rows.view(torch.float32)[1:, 2] = float(start)
        self.rows = rows.to(device)
        self.latest: Any = None  # adamw_'s

    @property
    def device(self) -> torch.device:
        return self.rows.device

    def __len__(self) -> int:
        return len(self.rows) - 1

    def __int__(self) -> int:
        return int(self.rows[0, 0].item())

    def __repr__(self) -> str:
        return f"StepCounts({len(self)}, {str(self.device)!r}, start={int(self)})"


def state_like(
    params: Sequence[torch.Tensor], dtype: torch.dtype | None = None, elements_per_entry: int = 1
) -> list[torch.Tensor]:
    """Zeroed state for parameters, each in its parameter's shape and strides, all in one allocation.

    Each begins at a multiple of 256 elements, so that kernels may move whole vectors at its end, and that a call finds
    the state of any number of tensors by one address.

    Args:
        params: dense tensors on one device.
        dtype: of the entries; float32 moments (float64 for float64 parameters) by default. bfloat16 and uint8 moments,
            float32, int16 (split16) and int8 (split8) masters are the others.
        elements_per_entry: 16 for the scales of uint8 moments, which are vectors of uint8.

    Example:
        >>> import torch
        >>> from fused_sched import ops
        >>> [tuple(s.shape) for s in ops.state_like([torch.zeros(4, 5), torch.zeros(33)])]
        [(4, 5), (33,)]
        >>> [tuple(s.shape) for s in ops.state_like([torch.zeros(33)], torch.uint8, elements_per_entry=16)]
        [(3,)]
    """
    if not params:
        return []
    if dtype is None:
        dtype = torch.float64 if params[0].dtype == torch.float64 else torch.float32
    padded = [-(-p.numel() // PADDING) * PADDING // elements_per_entry for p in params]
    memory = torch.zeros(sum(padded), dtype=dtype, device=params[0].device)
    parts = torch.split(memory, padded)
    if elements_per_entry > 1:
        return [part[: -(-p.numel() // elements_per_entry)] for p, part in zip(params, parts, strict=True)]
    return [part.as_strided(p.shape, p.stride()) for p, part in zip(params, parts, strict=True)]
