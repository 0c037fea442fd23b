"""The launcher of the CUDA backend, run on the CPU (tests/cuda_on_cpu): what it refuses, and how it treats devices,
streams and errors of the runtime.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from cuda_on_cpu import abi, build
from cuda_on_cpu.memory import Problem, TensorSpec

pytest_plugins = ["cuda_on_cpu.fixtures"]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (TensorSpec(8, "fp64", "fp32"), 'fp64 parameters with fp32 gradients, master "none"'),
        (TensorSpec(8, "fp32", "fp64"), 'fp32 parameters with fp64 gradients, master "none"'),
        (TensorSpec(8, "fp32", "fp32", "fp32"), 'fp32 parameters with fp32 gradients, master "fp32"'),
    ],
)
def test_unsupported_combination_is_refused_before_anything_changes(
    library: abi.Library, spec: TensorSpec, message: str
) -> None:
    problem = Problem([TensorSpec(8), replace(spec, arena=1)])
    before = problem.snapshot()
    for function in (library.norm, library.clock, library.update):
        with pytest.raises(abi.BackendError, match=message):
            function(problem.call(norm=True))
    assert problem.snapshot() == before


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("param_format", 9, "unknown tag among parameter 9"),
        ("moments", 7, "unknown tag among .* moments 7"),
        ("moments", 2, "slot 4 of arena 0 must be a 16-byte aligned address, got 0x0"),
        ("master", 2, 'no update for fp32 parameters .* master "split16"'),
        ("group", 1, r"group must be in \[0, 1\), got 1"),
        ("arena", -1, r"arena must be in \[0, 1\), got -1"),
        ("state_offset", 128, r"state_offset must be a multiple of 256 .* got 128"),
        ("numel", -3, r"numel must be in \[0, 2\^39\), got -3"),
        ("numel", 2**39, r"numel must be in \[0, 2\^39\), got 549755813888"),
        ("amsgrad", 1, "slot 2 of arena 0 must be a 16-byte aligned address, got 0x0"),
    ],
)
def test_invalid_table_is_refused(library: abi.Library, field: str, value: int, message: str) -> None:
    problem = Problem([TensorSpec(8), TensorSpec(8)])
    before = problem.snapshot()
    call = problem.call(norm=True)
    problem.tensor_table[field][1] = value
    for function in (library.norm, library.clock, library.update):
        with pytest.raises(abi.BackendError, match=f"^tensor 1: .*{message}"):
            function(call)
    assert problem.snapshot() == before
    assert call.launches == 0


def test_device_and_stream_of_the_call(library: abi.Library) -> None:
    problem = Problem([TensorSpec(8)])
    call = problem.call(device=1)
    call.stream = 0x5EED
    library.update(call)
    assert library.functions.cuda_on_cpu_launch_device() == 1
    assert library.functions.cuda_on_cpu_current_device() == 0
    assert library.functions.cuda_on_cpu_stream() == 0x5EED


def test_kernels_are_loaded_with_capture_relaxed(library: abi.Library) -> None:
    library.set_machine(num_devices=8)
    library.clock(Problem([TensorSpec(8)]).call(device=7))  # a device no other test uses: loads there
    assert library.functions.cuda_on_cpu_capture_was_relaxed() == 1
    assert library.functions.cuda_on_cpu_capture_mode() == 0


@pytest.mark.parametrize(
    "failing_call",
    ["cudaGetDevice", "cudaSetDevice", "launch", "cudaFuncGetAttributes", "cudaDeviceGetAttribute",
     "cudaOccupancyMaxActiveBlocksPerMultiprocessor", "cudaThreadExchangeStreamCaptureMode"],
)  # fmt: skip
def test_error_names_call_place_and_cuda_error(library: abi.Library, failing_call: str) -> None:
    device = 4  # of which the runtime is only asked here, and only in failing calls: nothing is remembered
    library.set_machine(num_devices=8)
    library.fail(failing_call)
    pattern = rf"^{failing_call}.* failed at \w+\.\w+:\d+: cudaErrorInvalidValue: invalid argument$"
    problem = Problem([TensorSpec(8)])
    spared = problem.snapshot()
    with pytest.raises(abi.BackendError, match=pattern):
        library.update(problem.call(device=device if failing_call != "launch" else 5))
    assert problem.snapshot() == spared
    assert library.functions.cuda_on_cpu_current_device() == 0
    assert library.functions.cuda_on_cpu_capture_mode() == 0


def test_unknown_device(library: abi.Library) -> None:
    with pytest.raises(abi.BackendError, match=r"cudaSetDevice.*cudaErrorInvalidDevice: invalid device ordinal"):
        library.update(Problem([TensorSpec(8)]).call(device=99))


def test_device_count(library: abi.Library) -> None:
    assert library.device_count() == 2
    library.fail("cudaGetDeviceCount")
    with pytest.raises(abi.BackendError, match="cudaGetDeviceCount"):
        library.device_count()


def test_a_driver_that_takes_short_parameters_only_is_refused(library: abi.Library) -> None:
    library.set_driver(12000)
    with pytest.raises(
        abi.BackendError, match=r"driver is of CUDA 12\.0.*install a driver of CUDA 12\.1 \(R530\) or newer"
    ):
        library.device_count()
    for version in (12010, 0):  # the count says that there is no driver
        library.set_driver(version)
        assert library.device_count() == 2
    library.fail("cudaDriverGetVersion")
    with pytest.raises(abi.BackendError, match="cudaDriverGetVersion"):
        library.device_count()


def test_structures_are_those_of_the_binding() -> None:
    """The layouts these tests write down are the ones the compiler chose."""
    pytest.importorskip("pybind11")
    layouts = build.load().LAYOUTS
    mine = {
        "tensor": abi.TENSOR,
        "clock": abi.CLOCK,
        "step_record": abi.STEP_RECORD,
        "group": abi.GROUP,
        "values": abi.VALUES,
        "arena": abi.ARENA,
        "norm": abi.NORM,
        "square_sum": abi.SQUARE_SUM,
        "history": abi.HISTORY,
        "metric_rule": abi.METRIC_RULE,
        "plateau_state": abi.PLATEAU_STATE,
        "greedy_state": abi.GREEDY_STATE,
    }
    for name, dtype in mine.items():
        itemsize, fields = layouts[name]
        assert itemsize == dtype.itemsize, name
        for path, kind, offset in fields:
            outer, _, inner = path.partition(".")
            field, begin = dtype.fields[outer][:2]
            if inner:
                field, begin = field.fields[inner][0], begin + field.fields[inner][1]
            assert (field, begin) == (np.dtype(kind), offset), f"{name}.{path}"
    assert layouts["scalars"][0] == abi.SCALAR_SLOT_BYTES
