"""csrc/step.h seen from NumPy and ctypes, for tests that call a backend without the package.

The structures are written down a second time, so that a change of layout is noticed: `test_kernels.py` compares
them with what the binding reports.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

PADDING = 256
FORMATS = {"fp32": 0, "bf16": 1, "fp16": 2, "fp64": 3}
STORAGE = {"fp32": np.float32, "bf16": np.uint16, "fp16": np.uint16, "fp64": np.float64}
MASTERS = {"none": 0, "fp32": 1, "split16": 2, "split8": 3, "stochastic": 4}
MASTER_STORAGE = {"fp32": np.float32, "split16": np.int16, "split8": np.int8}
MOMENTS = {"fp32": 0, "bf16": 1, "8bit": 2}
MOMENT_STORAGE = {"fp32": np.float32, "bf16": np.uint16, "8bit": np.uint8}
SCALE_GROUP = 16  # elements per scale of 8-bit moments
SLOTS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "master", "exp_avg_scale", "exp_avg_sq_scale")
GROUP_DECOUPLED, GROUP_MAXIMIZE = 1, 2
SKIP, DECOUPLED_DECAY, L2_DECAY, FIRST_FROM_GRAD, SECOND_FROM_GRAD = 1, 2, 4, 8, 16


def aligned(fields: list[tuple[str, object]]) -> np.dtype:
    return np.dtype(fields, align=True)


TENSOR = aligned(
    [
        ("param", "<u8"),
        ("grad", "<u8"),
        ("step", "<u8"),
        ("numel", "<i8"),
        ("state_offset", "<i8"),
        ("arena", "<i4"),
        ("group", "<i4"),
        ("ordinal", "<u4"),
        ("param_format", "u1"),
        ("grad_format", "u1"),
        ("master", "u1"),
        ("moments", "u1"),
        ("amsgrad", "u1"),
        ("reserved", "u1", 7),
    ]
)
ARENA = aligned([("slot", "<u8", len(SLOTS))])
CLOCK = aligned([("step", "<i8"), ("tick_pending", "<i4"), ("skipped", "<i4")])
STEP_RECORD = aligned([("count", "<i8"), ("mirror", "<f4"), ("reserved", "<i4")])
HYPERPARAMETER = aligned(
    [("scale", "<f8"), ("program", "<u8"), ("tensor", "<u8"), ("tensor_format", "<i4"), ("reserved", "<i4")]
)
HYPERPARAMETERS = ("lr", "beta1", "beta2", "weight_decay")
GROUP = aligned(
    [
        *((name, HYPERPARAMETER) for name in HYPERPARAMETERS),
        ("eps", "<f8"),
        ("grad_divisor", "<f8"),
        ("flags", "<i4"),
        ("reserved", "<i4"),
    ]
)
VALUES = aligned([(name, "<f8") for name in HYPERPARAMETERS])
SQUARE_SUM = aligned([("middle", "<f8"), ("large", "<f8"), ("small", "<f8")])
NORM = aligned(
    [
        *((name, "<f8") for name in ("max_norm", "grad_divisor", "squares", "sum_root", "norm", "clip")),
        ("skip_nonfinite", "<i4"),
        ("blocks_done", "<u4"),
    ]
)
HISTORY = aligned([("rows", "<u8"), ("row_length", "<i8"), ("num_groups", "<i8"), ("count", "<i8"), ("row", "<u8")])
HISTORY_LENGTH, HISTORY_COLUMNS = 4096, 4
SCALAR_FIELDS = ("grad_factor", "decay", "first_rate", "second_rate", "step_size", "inv_sqrt_bias2", "eps")
SCALARS = {
    "<f4": aligned([*((name, "<f4") for name in SCALAR_FIELDS), ("flags", "<i4")]),
    "<f8": aligned([*((name, "<f8") for name in SCALAR_FIELDS), ("flags", "<i4")]),
}
SCALAR_SLOT_BYTES = SCALARS["<f8"].itemsize + 8  # and a random key of two words


class Call(ctypes.Structure):
    _fields_ = (
        ("tensors", ctypes.c_uint64),
        ("num_tensors", ctypes.c_int64),
        ("arenas", ctypes.c_uint64),
        ("num_arenas", ctypes.c_int64),
        ("clock", ctypes.c_uint64),
        ("groups", ctypes.c_uint64),
        ("values", ctypes.c_uint64),
        ("num_groups", ctypes.c_int64),
        ("scalars", ctypes.c_uint64),
        ("found_inf", ctypes.c_uint64),
        ("grad_scale", ctypes.c_uint64),
        ("norm", ctypes.c_uint64),
        ("chunk_sums", ctypes.c_uint64),
        ("history", ctypes.c_uint64),
        ("seed", ctypes.c_uint64),
        ("norm_is_reduced", ctypes.c_int32),
        ("tick", ctypes.c_int32),
        ("device", ctypes.c_int32),
        ("stream", ctypes.c_uint64),
        ("num_threads", ctypes.c_int32),
        ("launches", ctypes.c_int32),
    )


METRIC_RULES = {"plateau": 0, "greedy": 1}
METRIC_RULE = aligned(
    [
        *((name, "<i4") for name in ("kind", "maximize", "relative", "window")),
        *((name, "<f8") for name in ("base_lr", "factor", "patience", "threshold", "cooldown", "warmup")),
        *((name, "<f8") for name in ("min_lr", "max_lr", "eps", "reset_start")),
    ]
)
METRIC_RECORD = aligned([("rule", METRIC_RULE), ("state", "<u8")])
PLATEAU_STATE = aligned([(name, "<f8") for name in ("lr", "best", "num_bad", "cooldown_left")])
GREEDY_STATE = aligned(
    [
        *((name, "<f8") for name in ("lr", "best", "num_bad", "cooldown_left", "num_good", "warmup_left")),
        *((name, "<f8") for name in ("resets_left", "window_sum", "window_length", "window_oldest")),
    ]
)


class Report(ctypes.Structure):
    _fields_ = (
        ("metric", ctypes.c_uint64),
        ("records", ctypes.c_uint64),
        ("num_records", ctypes.c_int64),
        ("stream", ctypes.c_uint64),
        ("device", ctypes.c_int32),
    )


class BackendError(Exception):
    """What a function of csrc/step.h wrote into `error`."""


class StepLibrary:
    """The functions of csrc/step.h."""

    def __init__(self, path: Path) -> None:
        self.functions = ctypes.CDLL(str(path))

    def norm(self, call: Call) -> None:
        self._run(self.functions.fs_norm, ctypes.byref(call))

    def clock(self, call: Call) -> None:
        self._run(self.functions.fs_clock, ctypes.byref(call))

    def update(self, call: Call) -> None:
        self._run(self.functions.fs_update, ctypes.byref(call))

    def report_metric(self, report: Report) -> None:
        self._run(self.functions.fs_report_metric, ctypes.byref(report))

    def device_count(self) -> int:
        count = ctypes.c_int(-1)
        self._run(self.functions.fs_device_count, ctypes.byref(count))
        return count.value

    def _run(self, function: ctypes._CFuncPtr, argument: object) -> None:
        error = ctypes.create_string_buffer(512)
        if function(argument, error) != 0:
            raise BackendError(error.value.decode())


class CpuLibrary(StepLibrary):
    """The CPU backend, and what tests/cuda_on_cpu/cpu_exports.cpp adds to it."""

    def each_of(self, instruction_sets: Iterable[str]) -> Iterator[str]:
        """Those that this machine has, each chosen until the next."""
        return (name for name in instruction_sets if self.functions.cpu_set_instruction_set(name.encode()))


class Library(StepLibrary):
    """The CUDA backend, and the settings of tests/cuda_on_cpu/cuda_on_cpu.cpp."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.functions.cuda_on_cpu_stream.restype = ctypes.c_uint64

    def set_machine(self, num_devices: int = 2, num_sms: int = 2, blocks_per_sm: int = 2) -> None:
        self.functions.cuda_on_cpu_set_machine(num_devices, num_sms, blocks_per_sm)

    def set_seed(self, seed: int) -> None:
        """Not 0: blocks, and threads between barriers, run in a random order."""
        self.functions.cuda_on_cpu_set_seed(ctypes.c_uint(seed))

    def set_driver(self, version: int = 13000) -> None:
        """As the runtime tells it: 12010 for CUDA 12.1; 0 for none."""
        self.functions.cuda_on_cpu_set_driver(version)

    def fail(self, call: str) -> None:
        """From now on this call of the runtime ("launch" for a kernel) returns an error; "" for none."""
        self.functions.cuda_on_cpu_fail(call.encode())
