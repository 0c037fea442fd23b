"""The flight recorder: what the latest steps used, kept on the device and written by the step itself."""

from __future__ import annotations

import math
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

#: Steps that are kept (kHistoryLength of `csrc/core/history.h`).
LENGTH = 4096

#: Columns of a row before those of the groups, in the order of `csrc/core/history.h`.
COLUMNS = ("clock", "grad_norm", "clip", "skipped")

_ROWS, _ROW_LENGTH, _NUM_GROUPS, _COUNT, _ROW = range(5)  # words of the header, `History` there

History = npt.NDArray[np.void]


class Recorder:
    """A ring of rows of float64 on one device, 4096 * (32 + 16 * groups) bytes, and its header."""

    def __init__(self) -> None:
        self._rows = torch.zeros(LENGTH, 0, dtype=torch.float64)
        self._header = torch.zeros(5, dtype=torch.int64)
        self._retired: list[torch.Tensor] = []  # which a captured graph may be writing until it sees the new header

    def prepare(self, device: torch.device, num_groups: int) -> None:
        """Be on this device with columns for so many groups; what is recorded stays."""
        if device.type == "mps":
            device = torch.device("cpu")  # MPS has no float64
        old = self._rows
        width = max(old.shape[1], len(COLUMNS) + 2 * num_groups)
        if old.device == device and old.shape[1] == width:
            return
        self._rows = torch.full((LENGTH, width), math.nan, dtype=torch.float64, device=device)
        self._rows[:, : old.shape[1]].copy_(old)
        if self._header.device != device:
            self._header, self._retired = self._header.to(device), []
        elif old.numel() > 0:
            self._retired.append(old)
        words = [self._rows.data_ptr(), width, (width - len(COLUMNS)) // 2]
        self._header[: len(words)].copy_(torch.tensor(words))

    @property
    def address(self) -> int:
        return self._header.data_ptr()

    def write(
        self, tick: bool, clock: int, skipped: bool, norm: float, clip: float, used: Sequence[tuple[float, float]]
    ) -> None:
        """What `csrc/core/history.h` does, for the engine without compiled code; `used`: rate and decay by group."""
        count = int(self._header[_COUNT].item()) + tick
        self._header[_COUNT].fill_(count)
        row = self._rows[(count - 1) % LENGTH]
        if count == 0 or (not tick and skipped and row[COLUMNS.index("skipped")].item() == 0.0):
            return
        values = [float(clock), norm, math.nan if skipped else clip, float(skipped)]
        for lr, weight_decay in used:
            values += [math.nan, math.nan] if skipped else [lr, weight_decay]
        row.fill_(math.nan)
        row[: len(values)].copy_(torch.tensor(values, dtype=torch.float64))

    def read(self, num_groups: int) -> History:
        """The steps there are, oldest first, for at least so many groups; waits for the device."""
        return _structured(self._header.cpu(), self._rows.cpu(), num_groups)

    def read_asynchronously(self, num_groups: int) -> Future[History]:
        """The steps enqueued so far, when the device has come to them."""
        if self._rows.device.type != "cuda":
            future: Future[History] = Future()
            future.set_result(self.read(num_groups))
            return future
        header, rows = (
            torch.empty(part.shape, dtype=part.dtype, pin_memory=True).copy_(part, non_blocking=True)
            for part in (self._header, self._rows)
        )
        copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
        copied.record(torch.cuda.current_stream(self._rows.device))

        def wait() -> History:
            copied.synchronize()
            return _structured(header, rows, num_groups)

        return _waiter().submit(wait)


@cache
def _waiter() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(1, "fused_sched.history")


def dtype_of(num_groups: int) -> np.dtype[Any]:
    return np.dtype(
        [
            ("clock", np.int64),
            ("lr", np.float64, (num_groups,)),
            ("weight_decay", np.float64, (num_groups,)),
            ("grad_norm", np.float64),
            ("clip", np.float64),
            ("skipped", np.bool_),
        ]
    )


def _structured(header: torch.Tensor, rows: torch.Tensor, num_groups: int) -> History:
    count = int(header[_COUNT])
    if count == 0:
        return np.zeros(0, dtype_of(num_groups))
    values = rows.numpy()[np.arange(max(0, count - LENGTH), count) % LENGTH]
    missing = len(COLUMNS) + 2 * num_groups - values.shape[1]  # columns of groups added since
    values = np.pad(values, ((0, 0), (0, max(0, missing))), constant_values=math.nan)
    groups = values[:, len(COLUMNS) :]
    records = np.zeros(len(values), dtype_of(groups.shape[1] // 2))
    for index, name in enumerate(COLUMNS):
        records[name] = values[:, index]
    records["lr"], records["weight_decay"] = groups[:, 0::2], groups[:, 1::2]
    return records
