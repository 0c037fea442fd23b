"""The norm of all gradients: what is asked of it, the memory a device keeps for it, and its sum over devices."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import torch

from . import packing


class NormSettings(NamedTuple):
    """One for the whole optimizer; equal settings need no upload."""

    max_norm: float | None = None
    skip_nonfinite: bool = False
    grad_divisor: float = 1.0

    @property
    def wanted(self) -> bool:
        """Whether a step has to know the norm."""
        return self.max_norm is not None or self.skip_nonfinite


class NormMemory:
    """`NormState` of `csrc/core/norm.h` and the scratch beside it, on one device."""

    def __init__(self, module: ModuleType, device: torch.device) -> None:
        self._dtype: np.dtype[Any] = packing.layout_dtype(module, "norm")
        self._sum_bytes: int = module.LAYOUTS["square_sum"][0]
        self._state = torch.full((self._dtype.itemsize // 8,), math.nan, dtype=torch.float64, device=device)
        self._state[self._word("skip_nonfinite")].zero_()  # and blocks_done
        self._sums = torch.empty(0, dtype=torch.uint8, device=device)
        self._retired: list[torch.Tensor] = []  # which a captured graph still writes

    def _word(self, field: str) -> int:
        return int(self._dtype.fields[field][1]) // 8  # type: ignore[index]

    @property
    def address(self) -> int:
        return self._state.data_ptr()

    @property
    def sums_address(self) -> int:
        return self._sums.data_ptr()

    def write(self, settings: NormSettings, to_device: Callable[[bytes], torch.Tensor]) -> None:
        """Put settings in place, where a captured graph reads them."""
        record = np.zeros((), self._dtype)
        record["max_norm"] = math.inf if settings.max_norm is None else settings.max_norm
        record["grad_divisor"] = settings.grad_divisor
        record["skip_nonfinite"] = settings.skip_nonfinite
        content = to_device(record.tobytes())
        for field in ("max_norm", "grad_divisor", "skip_nonfinite"):  # no byte beside them: a launch may be counting
            dtype, offset = self._dtype.fields[field][:2]  # type: ignore[index]
            place = slice(offset, offset + dtype.itemsize)
            self._state.view(torch.uint8)[place].copy_(content[place], non_blocking=True)

    def reserve(self, num_chunks: int) -> None:
        """Make room for the sums of this many chunks."""
        if self._sums.numel() < num_chunks * self._sum_bytes:
            self._retired.append(self._sums)
            self._sums = torch.empty(2 * num_chunks * self._sum_bytes, dtype=torch.uint8, device=self._state.device)

    @property
    def squares(self) -> torch.Tensor:
        """The sum of squares of this device's gradients, 0-d float64; what is written here is what counts."""
        return self._state[self._word("squares")]

    @property
    def norm(self) -> torch.Tensor:
        """The norm of the latest step, 0-d float64."""
        return self._state[self._word("norm")]


def reduce(squares: Sequence[torch.Tensor], hook: Callable[[torch.Tensor], object] | None) -> None:
    """Make every device's sum that of all devices and, through the hook, of all processes.

    Between CUDA devices the streams wait for each other, not the host; it does where a CPU takes part.
    """
    first, *others = squares
    for other in others:
        first.add_(_moved(other, first.device))
    if hook is not None:
        hook(first)
    for other in others:
        other.copy_(_moved(first, other.device))


def _moved(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    return tensor.to(device, non_blocking=tensor.device.type == device.type == "cuda")
