"""The CUDA kernels and their launcher, run on the CPU (tests/cuda_on_cpu): every compiled instance, to the last bit.

Needs NumPy and a C++ compiler only. test_sanitizers.py runs this file again under the sanitizers.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import struct
from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from math import inf, nan

import numpy as np
import pytest
from cuda_on_cpu import abi, build, emulation
from cuda_on_cpu.memory import Buffer, GroupSpec, Problem, TensorSpec, padded
from oracle import Options, Oracle, decode_codes
from tolerances import param_bound, state_bound, weight_bound

pytestmark = pytest.mark.skipif(shutil.which(build.COMPILER) is None, reason="no C++ compiler")

# Params, grads, master, amsgrad: all that is compiled.
INSTANCES = [
    *product(["fp32"], ["fp32", "bf16", "fp16"], ["none"], [False, True]),
    *product(["bf16", "fp16"], ["fp32", "bf16", "fp16"], ["none", "fp32"], [False, True]),
    *product(["fp64"], ["fp64"], ["none"], [False, True]),
]
UPDATE_CAPACITY = 1040  # tensors of one launch (UpdateTable::kCapacity)
CLOCK_CAPACITY = 2512  # ClockTable::kCapacity
ARENA_CAPACITY = 16  # kMaxArenas
CLOCK_THREADS = 128


def tile(param: str) -> int:
    """Elements a block takes at a time: 256 threads of 8 elements, of 2 in double."""
    return 512 if param == "fp64" else 2048


def instance_id(instance: tuple[str, str, str, bool]) -> str:
    param, grad, master, amsgrad = instance
    return f"{param}-{grad}" + ("-master" if master == "fp32" else "") + ("-amsgrad" if amsgrad else "")


every_instance = pytest.mark.parametrize("instance", INSTANCES, ids=instance_id)


@pytest.fixture(scope="session")
def library() -> abi.Library:
    return abi.Library(build.library(os.environ.get("FUSED_SCHED_TEST_SANITIZER", "")))


@pytest.fixture(autouse=True)
def default_machine(library: abi.Library) -> Iterator[None]:
    """Four blocks at a time, so that blocks walk over several tiles."""
    library.set_machine()
    yield
    library.set_machine()
    library.set_seed(0)
    library.fail("")


def assert_same_bits(actual: np.ndarray, expected: np.ndarray, what: str) -> None:
    """Bit for bit; any NaN equals any NaN."""
    same = actual.view(f"u{actual.itemsize}") == expected.view(f"u{expected.itemsize}")
    if actual.dtype.kind == "f":
        same |= np.isnan(actual) & np.isnan(expected)
    wrong = np.flatnonzero(~same)
    assert wrong.size == 0, f"{what}: element {wrong[0]} of {len(actual)}: {actual[wrong[0]]!r}, {expected[wrong[0]]!r}"


def expected_after_update(problem: Problem) -> list[dict[str, np.ndarray]]:
    """What the update must leave, from the scalars the clock wrote."""
    results = []
    for i, spec in enumerate(problem.specs):
        stored = {slot: values[: spec.numel].copy() for slot, values in problem.state(i).items()}
        stored["param"], stored["grad"] = problem.params[i].data.copy(), problem.grads[i].data.copy()
        emulation.update(stored, (spec.param, spec.grad), problem.scalars_of(i))
        results.append(stored)
    return results


def assert_updated(problem: Problem, expected: list[dict[str, np.ndarray]]) -> None:
    for i, (spec, stored) in enumerate(zip(problem.specs, expected, strict=True)):
        for slot, values in problem.state(i).items():
            assert_same_bits(values[: spec.numel], stored[slot], f"{spec}: {slot}")
            assert not values[spec.numel :].any(), f"{spec}: the padding of {slot} is not zero any more"
        actual, wanted = (emulation.decode(p, spec.param) for p in (problem.params[i].data, stored["param"]))
        assert_same_bits(actual, wanted, f"{spec}: param")
        assert (problem.grads[i].data.view(np.uint8) == stored["grad"].view(np.uint8)).all(), f"{spec}: grad written"
    for buffer in problem.buffers():
        buffer.assert_sentinels()


GROUPS = [
    GroupSpec(lr=1e-2, weight_decay=0.1),
    GroupSpec(lr=1e-2, weight_decay=0.1, flags=abi.GROUP_MAXIMIZE, grad_divisor=4.0),  # L2
    GroupSpec(lr=1e-3, beta1=0.3, beta2=0.4, weight_decay=0.0),
    GroupSpec(lr=1e-2, beta1=0.0, eps=0.0),
]


@every_instance
def test_update_matches_emulation_bit_for_bit(library: abi.Library, instance: tuple[str, str, str, bool]) -> None:
    param, grad, master, amsgrad = instance
    t = tile(param)
    sizes = [0, 1, 7, 8, 9, 31, 32, 33, 255, 256, 257, 4095, 4096, 4097, t - 1, t, t + 1, 3 * t + 5]
    rng = np.random.default_rng(INSTANCES.index(instance))
    common = TensorSpec(0, param, grad, master, amsgrad)
    specs = [replace(common, numel=n) for n in sizes]
    for numel in sizes:
        p, g = rng.integers(0, 8, 2)
        specs.append(replace(common, numel=numel, param_misalignment=int(p), grad_misalignment=int(g)))
    for p, g in product(range(8), range(8)):
        specs.append(replace(common, numel=int(rng.integers(1, 40)), param_misalignment=p, grad_misalignment=g))
    specs = [replace(spec, group=i % len(GROUPS)) for i, spec in enumerate(specs)]
    problem = Problem(specs, GROUPS)
    problem.randomize(rng)
    problem.steps[0].data["count"] = problem.steps[0].data["mirror"] = 10
    call = problem.call()
    library.clock(call)
    expected = expected_after_update(problem)
    library.update(call)
    assert_updated(problem, expected)
    assert call.launches == 2


@pytest.mark.parametrize("param", ["fp32", "bf16", "fp64"])
def test_result_does_not_depend_on_grid_or_order(library: abi.Library, param: str) -> None:
    grad = "fp64" if param == "fp64" else "fp32"
    specs = [TensorSpec(n, param, grad, param_misalignment=n % 3) for n in (1, 5000, 17, 2048, 9000, 300)]
    results = []
    # The launcher asks a device once for its size: a device for each.
    for device, num_sms, seed in ((10, 1, 0), (11, 2, 1), (12, 50, 2)):
        library.set_machine(num_devices=13, num_sms=num_sms, blocks_per_sm=1)
        library.set_seed(seed)
        problem = Problem(specs)
        problem.randomize(np.random.default_rng(7))
        call = problem.call(device=device)
        library.clock(call)
        library.update(call)
        tiles = sum(-(-spec.numel // tile(param)) for spec in specs)
        assert library.functions.cuda_on_cpu_num_blocks() == min(tiles, num_sms)
        results.append(b"".join(p.data.tobytes() + problem.state(i)["exp_avg"].tobytes()
                                for i, p in enumerate(problem.params)))
    assert results[0] == results[1] == results[2]


def test_formats_mixed_in_one_call(library: abi.Library) -> None:
    """Each combination has a launch of its own; rows keep their scalars wherever they are in the call."""
    specs = [
        TensorSpec(100 + 3 * i, param, grad, master, amsgrad, group=i % 2, arena=int(param == "fp64"))
        for i, (param, grad, master, amsgrad) in enumerate(INSTANCES * 2)
    ]
    problem = Problem(specs, GROUPS[:2])
    problem.randomize(np.random.default_rng(3))
    call = problem.call()
    library.clock(call)
    expected = expected_after_update(problem)
    library.update(call)
    assert_updated(problem, expected)
    assert call.launches == 1 + len(INSTANCES)


@pytest.mark.parametrize(("num_tensors", "clocks"), [(UPDATE_CAPACITY, 1), (CLOCK_CAPACITY, 1), (CLOCK_CAPACITY + 1, 2)])
def test_many_tensors_take_several_launches(library: abi.Library, num_tensors: int, clocks: int) -> None:
    rng = np.random.default_rng(num_tensors)
    specs = [TensorSpec(int(rng.integers(0, 40)), group=i * 3 // num_tensors) for i in range(num_tensors)]
    problem = Problem(specs, GROUPS[:3])
    problem.randomize(rng)
    for i, record in enumerate(problem.steps):
        record.data["count"] = record.data["mirror"] = i // 7  # neighbours share their step, and not always
    call = problem.call()
    library.clock(call)
    assert call.launches == clocks
    assert problem.clock.data["step"] == 1
    for i, record in enumerate(problem.steps):
        assert (record.data["count"][0], record.data["mirror"][0]) == (i // 7 + 1, i // 7 + 1)
        assert problem.scalars_of(i)["step_size"] == expected_scalars(GROUPS[specs[i].group], i // 7 + 1)["step_size"]
    expected = expected_after_update(problem)
    library.update(call)
    assert_updated(problem, expected)
    nonempty = sum(spec.numel > 0 for spec in specs)
    assert call.launches == clocks + -(-nonempty // UPDATE_CAPACITY)


def test_arenas_beyond_one_launch(library: abi.Library) -> None:
    specs = [TensorSpec(300 + i, arena=i % 20) for i in range(60)]
    problem = Problem(specs)
    problem.randomize(np.random.default_rng(5))
    call = problem.call()
    library.clock(call)
    expected = expected_after_update(problem)
    library.update(call)
    assert_updated(problem, expected)
    # Arenas come 0 .. 19, 0 .. 19, 0 .. 19: a launch ends where a 17th would enter.
    assert call.launches == 1 + -(-60 // ARENA_CAPACITY)


def test_eps_zero_leaves_padding_zero_and_neighbours_alone(library: abi.Library) -> None:
    """0/0 beyond the end of a tensor reaches neither the state's padding nor the next tensor."""
    for param, master in (("fp32", "none"), ("bf16", "fp32"), ("fp16", "fp32")):
        specs = [TensorSpec(n, param, param, master) for n in (1, 9, 255, 300)]
        problem = Problem(specs, [GroupSpec(eps=0.0)])
        for buffer in (*problem.params, *problem.grads):
            buffer.data[:] = emulation.encode(np.ones(len(buffer.data), np.float32), param)
        for _ in range(2):
            call = problem.call()
            library.clock(call)
            expected = expected_after_update(problem)
            library.update(call)
            assert_updated(problem, expected)
        assert all(np.isfinite(emulation.decode(p.data, param)).all() for p in problem.params)


@every_instance
def test_update_matches_float64_oracle(library: abi.Library, instance: tuple[str, str, str, bool]) -> None:
    """The whole step, clock included, within the bounds that tolerances.py derives."""
    param, grad, master, amsgrad = instance
    rng = np.random.default_rng(11)
    numel, steps = 600, 5
    group = GroupSpec(lr=2e-2, weight_decay=0.1, grad_divisor=2.0)
    problem = Problem([TensorSpec(numel, param, grad, master, amsgrad)], [group])
    problem.grad_scale.data[0] = 1024.0
    start = emulation.encode(rng.standard_normal(numel).astype(np.float64 if param == "fp64" else np.float32), param)
    problem.params[0].data[:] = start
    values = decoded(start, param)
    state = problem.state(0)
    if master == "fp32":
        state["master"][:numel] = values
    options = Options(lr=2e-2, weight_decay=0.1, amsgrad=amsgrad, grad_divisor=2.0)
    oracle = Oracle(values, options, param, master == "fp32")
    for _ in range(steps):
        compute = np.float64 if grad == "fp64" else np.float32
        problem.grads[0].data[:] = emulation.encode((rng.standard_normal(numel) * 1024).astype(compute), grad)
        call = problem.call(grad_scale=True)
        library.clock(call)
        library.update(call)
        oracle.update(decoded(problem.grads[0].data, grad), grad_scale=1024.0)
        if param in ("bf16", "fp16") and master == "none":
            # Rounding of the parameter may go either way at a tie; the next update starts from what was stored.
            off = np.abs(decoded(problem.params[0].data, param) - oracle.param)
            assert (off <= param_bound(oracle)).all()
            oracle.weight = decoded(problem.params[0].data, param)
    for slot in problem.specs[0].slots:
        if slot == "master":
            assert (np.abs(state[slot][:numel] - oracle.weight) <= weight_bound(oracle)).all()
        else:
            assert (np.abs(state[slot][:numel] - getattr(oracle, slot)) <= state_bound(oracle, slot)).all(), slot
    assert (np.abs(decoded(problem.params[0].data, param) - oracle.param) <= param_bound(oracle)).all()


def decoded(stored: np.ndarray, name: str) -> np.ndarray:
    return decode_codes(stored, name) if name in ("bf16", "fp16") else stored.astype(np.float64)


# ---- the clock kernel ----


def expected_scalars(group: GroupSpec, step: int, grad_scale: float = 1.0, kind: str = "<f4") -> dict[str, object]:
    """step_scalars of csrc/core/clock.h by Python's pow, whose last bit of double does not reach a float32."""
    factor = 1.0 / (grad_scale * group.grad_divisor)
    decoupled = group.flags & abi.GROUP_DECOUPLED
    scalar = np.dtype(kind).type
    bias1, bias2 = 1.0 - group.beta1**step, 1.0 - group.beta2**step
    flags = abi.FIRST_FROM_GRAD if group.beta1 < 0.5 else 0
    flags |= abi.SECOND_FROM_GRAD if group.beta2 < 0.5 else 0
    if group.weight_decay != 0.0:
        flags |= abi.DECOUPLED_DECAY if decoupled else abi.L2_DECAY
    return {
        "grad_factor": scalar(-factor if group.flags & abi.GROUP_MAXIMIZE else factor),
        "decay": scalar(group.lr * group.weight_decay if decoupled else group.weight_decay),
        "first_rate": scalar(-group.beta1 if group.beta1 < 0.5 else 1.0 - group.beta1),
        "second_rate": scalar(-group.beta2 if group.beta2 < 0.5 else 1.0 - group.beta2),
        "step_size": scalar(group.lr / bias1),
        "inv_sqrt_bias2": scalar(1.0 / np.sqrt(bias2)),
        "eps": scalar(group.eps),
        "flags": flags,
    }


def test_clock_derives_the_scalars_of_every_tensor(library: abi.Library) -> None:
    specs = [TensorSpec(1, "fp64" if i % 5 == 0 else "fp32", "fp64" if i % 5 == 0 else "fp32", group=i % 4,
                        arena=int(i % 5 != 0)) for i in range(3 * CLOCK_THREADS + 1)]  # fmt: skip
    problem = Problem(specs, GROUPS)
    problem.grad_scale.data[0] = 512.0
    for i, record in enumerate(problem.steps):
        record.data["count"] = record.data["mirror"] = i % 3
    call = problem.call(grad_scale=True)
    library.clock(call)
    for i, spec in enumerate(specs):
        expected = expected_scalars(GROUPS[spec.group], i % 3 + 1, 512.0, spec.compute)
        for name, value in expected.items():
            # In double, 1 - beta^t magnifies the last bit of beta^t by at most 1 / (1 - 0.999) = 1000.
            limit = 2000 * np.finfo(np.float64).eps if spec.compute == "<f8" else 0.0
            assert abs(problem.scalars_of(i)[name] - value) <= limit * abs(value), (i, name)


def test_clock_with_many_groups(library: abi.Library) -> None:
    groups = [GroupSpec(lr=1e-3 * (i + 1), beta1=0.9 - i * 1e-4, weight_decay=0.01 * i) for i in range(300)]
    specs = [TensorSpec(1, group=(i * 7) % 300) for i in range(600)]
    problem = Problem(specs, groups)
    library.clock(problem.call())
    for i, group in enumerate(groups):
        assert problem.values.data[i].tolist() == (group.lr, group.beta1, group.beta2, group.weight_decay)
    for i, spec in enumerate(specs):
        for name, value in expected_scalars(groups[spec.group], 1).items():
            assert problem.scalars_of(i)[name] == value, (i, name)


def linear_program(start: float, end: float, steps: int) -> bytes:
    """start + (end - start) * t/steps, held at the end: one node of csrc/core/program.h."""
    node = struct.pack("<8i12d", 0, 1, 0, 1, 0, 0, 0, 0,
                       0.0, steps, steps, 0.0, 0.0, 1.0, 1.0, 0.0, start, end - start, -inf, inf)  # fmt: skip
    return struct.pack("<IIiiq", 0x48435346, 1, 1, 0, 24 + len(node)) + node


def test_clock_evaluates_programs_and_reads_tensors(library: abi.Library) -> None:
    """Powers of two, so that every value is exact."""
    group = GroupSpec(
        lr=(0.5, linear_program(1.0, 0.0, 8)),
        beta1=(1.0, linear_program(0.5, 0.75, 8)),
        beta2=(1.0, "fp64", 0.875),
        weight_decay=(2.0, "bf16", 0x3E00),  # 0.125
    )
    problem = Problem([TensorSpec(10)], [group])
    for t in range(12):
        library.clock(problem.call())
        assert problem.clock.data["step"] == t + 1
        passed = min(t, 8) / 8
        values = (0.5 * (1.0 - passed), 0.5 + 0.25 * passed, 0.875, 0.25)
        assert problem.values.data[0].tolist() == values
        scalars = problem.scalars_of(0)
        assert scalars["decay"] == np.float32(values[0] * values[3])
        assert scalars["step_size"] == np.float32(values[0] / (1.0 - values[1] ** (t + 1)))


@pytest.mark.parametrize("value", [1.0, 2.0, nan, inf])
def test_clock_skipped_call_changes_nothing_and_keeps_its_tick(library: abi.Library, value: float) -> None:
    specs = [TensorSpec(100), TensorSpec(33, "bf16", "fp32", "fp32"), TensorSpec(9, "fp64", "fp64", arena=1)]
    problem = Problem(specs)
    problem.randomize(np.random.default_rng(2))
    applied = problem.call(found_inf=True)
    library.clock(applied)
    library.update(applied)

    problem.found_inf.data[0] = value
    before = [b.raw.tobytes() for b in problem.buffers() if b not in (problem.clock, problem.scalars)]
    skipped = problem.call(found_inf=True)
    library.clock(skipped)
    library.update(skipped)
    assert [b.raw.tobytes() for b in problem.buffers() if b not in (problem.clock, problem.scalars)] == before
    assert problem.clock.data[0].tolist() == (1, 1, 1)  # step, tick_pending, skipped

    # The round's next call is not a tick, and takes the one kept.
    problem.found_inf.data[0] = 0.0
    library.clock(problem.call(tick=False, found_inf=True))
    assert problem.clock.data[0].tolist() == (2, 0, 0)
    library.clock(problem.call(tick=False, found_inf=True))
    assert problem.clock.data[0].tolist() == (2, 0, 0)
    assert [int(record.data["count"][0]) for record in problem.steps] == [3, 3, 3]


def test_clock_takes_a_step_written_from_outside(library: abi.Library) -> None:
    problem = Problem([TensorSpec(1), TensorSpec(1), TensorSpec(1)])
    problem.steps[0].data["mirror"] = 41.0
    problem.steps[1].data["count"], problem.steps[1].data["mirror"] = 2**24 + 1, 2.0**24
    library.clock(problem.call())
    assert [int(record.data["count"][0]) for record in problem.steps] == [42, 2**24 + 2, 1]
    assert [float(record.data["mirror"][0]) for record in problem.steps] == [42.0, 2.0**24 + 2, 1.0]


def test_clock_without_tensors_ticks(library: abi.Library) -> None:
    problem = Problem([])
    call = problem.call()
    library.clock(call)
    library.update(call)
    assert problem.clock.data["step"] == 1
    assert call.launches == 1


# ---- the launcher ----


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
    for function in (library.clock, library.update):
        with pytest.raises(abi.BackendError, match=message):
            function(problem.call())
    assert problem.snapshot() == before


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("param_format", 9, "unknown tag among parameter 9"),
        ("moments", 1, "moments tag 1"),
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
    call = problem.call()
    problem.tensor_table[field][1] = value
    for function in (library.clock, library.update):
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
    with pytest.raises(abi.BackendError, match="cudaSetDevice.*cudaErrorInvalidDevice: invalid device ordinal"):
        library.update(Problem([TensorSpec(8)]).call(device=99))


def test_device_count(library: abi.Library) -> None:
    assert library.device_count() == 2
    library.fail("cudaGetDeviceCount")
    with pytest.raises(abi.BackendError, match="cudaGetDeviceCount"):
        library.device_count()
