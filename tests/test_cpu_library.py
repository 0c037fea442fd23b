"""The CPU backend without torch: every combination of formats, in every instruction set and on several threads, to the
last bit, and not a byte beside its buffers.

Needs NumPy and a C++ compiler only. test_sanitizers.py runs this file again under the sanitizers.
"""

from __future__ import annotations

import threading
from dataclasses import replace

import numpy as np
import pytest
from cuda_on_cpu import abi
from cuda_on_cpu.build import ISA_FLAGS
from cuda_on_cpu.expected import after_update, assert_updated, sum_of_squares
from cuda_on_cpu.instances import CPU_INSTANCES, GROUPS, Instance, instance_id, mixed_specs
from cuda_on_cpu.memory import GroupSpec, Problem, TensorSpec

pytest_plugins = ["cuda_on_cpu.fixtures"]

# Elements that the backend takes at a time.
VECTOR, BLOCK, TILE = 16, 64, 256
UNIT = 32768  # of parallel work (kUnitLength)
SIZES = sorted(
    {0, 1, 2, *(width * n + beside for width in (VECTOR, BLOCK, TILE) for n in (1, 2, 3) for beside in (-1, 0, 1))}
)


@pytest.mark.parametrize("special", [0.05, 0.001], ids=["many-special", "few-special"])
@pytest.mark.parametrize("instance", CPU_INSTANCES, ids=instance_id)
def test_update_matches_emulation_bit_for_bit(cpu_library: abi.CpuLibrary, instance: Instance, special: float) -> None:
    """special: the share of values that are not finite or otherwise odd; the blocks of block_avx512.h leave those to
    the tiles, and with many of them there is no block left."""
    param, grad, master, moments, amsgrad = instance
    rng = np.random.default_rng(CPU_INSTANCES.index(instance))
    common = TensorSpec(0, param, grad, master, amsgrad, moments)
    specs = [replace(common, numel=n) for n in SIZES]
    for numel in SIZES:
        p, g = rng.integers(0, 32, 2)
        specs.append(replace(common, numel=numel, param_misalignment=int(p), grad_misalignment=int(g)))
    groups = [*GROUPS, GroupSpec(lr=1e-2, weight_decay=0.0)]
    specs = [replace(spec, group=i % len(groups), ordinal=i) for i, spec in enumerate(specs)]
    problem = Problem(specs, groups)
    problem.randomize(rng, special)
    problem.steps[0].data["count"] = problem.steps[0].data["mirror"] = 10
    call = problem.call()
    cpu_library.clock(call)
    expected = after_update(problem)
    before = problem.snapshot()
    for _ in cpu_library.each_of(ISA_FLAGS):
        problem.restore(before)
        cpu_library.update(call)
        assert_updated(problem, expected)


def extreme_8bit_state(param: str, master: str) -> Problem:
    """Blocks of 64, each of one scale per moment. First, any state, damaged ones included: every scale of the second
    moment, above 240 too, with subnormal codes and others, beside first moments that a block takes. Then moments about
    the largest that blocks take: first ones from 1.75 * 2^14 on, and second ones that overflow."""
    beta1 = 1.0 - 1e-15  # a first moment stays small beside a gradient whose square is infinite
    common = TensorSpec(BLOCK * 4096, param, "fp32", master, moments="8bit")
    specs = [common, replace(common, numel=BLOCK * 64, group=1, ordinal=1)]
    problem = Problem(specs, [GroupSpec(), GroupSpec(beta1=beta1)])
    rng = np.random.default_rng(11)
    problem.randomize(rng, special=0.0)
    problem.draw_grads(1, scale=1e-3)
    groups = BLOCK // VECTOR

    state, grad = problem.state(0), problem.grads[0].data
    blocks = np.arange(4096)
    state["exp_avg_sq_scale"][:] = np.repeat(blocks % 256, groups)
    state["exp_avg_scale"][:] = np.repeat(np.where(blocks < 3840, rng.integers(0, 127, 4096), blocks % 256), groups)
    state["exp_avg"][:] = rng.integers(0, 0x7F, BLOCK * 4096) | rng.integers(0, 2, BLOCK * 4096) << 7
    # Subnormal second moments, but of codes that the largest scale does not refuse; others, but for NaN.
    limit = np.where(blocks < 2048, 13, 255)
    state["exp_avg_sq"][:] = rng.integers(0, np.repeat(limit, BLOCK))
    # The first moments of the last 64 blocks are 1.75 * 2^14, and their gradients at most a little more.
    last = slice(BLOCK * 4032, None)
    state["exp_avg"][last], state["exp_avg_scale"][groups * 4032 :] = 0x7E, 126
    state["exp_avg_sq"][last], state["exp_avg_sq_scale"][groups * 4032 :] = 0x80, 120
    above = np.array([0, 0, 1, 2**14, 2**20])[np.arange(64) % 5].astype(np.int32)
    grad[last] = np.repeat((np.float32(28672.0).view(np.int32) + above).view(np.float32), BLOCK)

    state, grad = problem.state(1), problem.grads[1].data
    state["exp_avg"][:], state["exp_avg_scale"][:] = 0, 0
    state["exp_avg_sq"][:] = np.repeat(rng.integers(0xF0, 0xFF, 64), BLOCK)  # 2^127 and more, at scale 239
    state["exp_avg_sq_scale"][:] = np.repeat([239, 240, 200, 0] * 16, groups)
    grad[:] = np.repeat(np.where(np.arange(64) % 8 < 4, 2e19, 0.0), BLOCK)
    return problem


@pytest.mark.parametrize(("param", "master"), [("fp32", "none"), ("bf16", "split8")])
def test_every_scale_of_8_bits(cpu_library: abi.CpuLibrary, param: str, master: str) -> None:
    problem = extreme_8bit_state(param, master)
    call = problem.call()
    cpu_library.clock(call)
    before = problem.snapshot()
    expected = None
    for _ in cpu_library.each_of(reversed(list(ISA_FLAGS))):  # from that without blocks
        problem.restore(before)
        cpu_library.update(call)
        expected = expected or [
            {slot: values[: spec.entries(slot)].copy() for slot, values in problem.state(i).items()}
            | {"param": problem.params[i].data.copy(), "grad": problem.grads[i].data.copy()}
            for i, spec in enumerate(problem.specs)
        ]
        assert_updated(problem, expected)


def large_tensors() -> Problem:
    """Every format, in tensors of several units of parallel work and in small ones that share a unit."""
    sizes, grads = [UNIT + 1, 5, 300, 2 * UNIT, UNIT - 1, 3 * UNIT + 77, UNIT], list(abi.FORMATS)
    specs = []
    for param, master, moments in dict.fromkeys((param, *kept) for param, _, *kept, _ in CPU_INSTANCES):
        i = len(specs)
        spec = TensorSpec(sizes[i % len(sizes)], param, grads[i % 4], master, moments=moments, arena=i, ordinal=i)
        specs.append(replace(spec, group=i % 2, param_misalignment=i % 3, grad_misalignment=i % 5))
    problem = Problem(specs, GROUPS[:2])
    problem.clock.data["step"] = 2**40  # which stochastic rounding is keyed by
    problem.randomize(np.random.default_rng(3), special=0.0)
    problem.norm.data["max_norm"] = 1.0
    return problem


def test_whole_steps_on_several_threads(cpu_library: abi.CpuLibrary) -> None:
    problem = large_tensors()
    for step in range(2):
        problem.draw_grads(step)
        squares = sum_of_squares(problem)
        before = problem.snapshot()
        expected = None
        for _ in cpu_library.each_of(ISA_FLAGS):
            for num_threads in (1, 2, 4):
                problem.restore(before)
                call = problem.call(norm=True, num_threads=num_threads)
                cpu_library.norm(call)
                assert problem.norm.data["squares"][0] == squares
                expected = expected or after_update(problem)
                cpu_library.update(call)
                assert_updated(problem, expected)


def test_units_of_any_length_cover_every_element(cpu_library: abi.CpuLibrary) -> None:
    """From memory (2^22 elements on) a unit's length follows from what is left and the number of threads."""
    sizes = [3 << 20, *range(250, 350), 1 << 20, UNIT + 1, 5]
    problem = Problem([TensorSpec(numel, moments="bf16", ordinal=i) for i, numel in enumerate(sizes)])
    problem.draw_grads()
    call = problem.call(num_threads=1)
    cpu_library.clock(call)
    before = problem.snapshot()
    after = None
    for num_threads in (1, 2, 4):
        problem.restore(before)
        cpu_library.update(problem.call(num_threads=num_threads))
        assert all(param.data.all() for param in problem.params)  # from 0, each has moved
        after = after or problem.snapshot()
        assert problem.snapshot() == after


def test_sum_of_squares_in_every_instruction_set(cpu_library: abi.CpuLibrary) -> None:
    problem = Problem(mixed_specs())
    problem.draw_grads()
    squares = sum_of_squares(problem)
    for _ in cpu_library.each_of(ISA_FLAGS):
        problem.norm.data["squares"] = 0.0
        cpu_library.norm(problem.call(norm=True))
        assert problem.norm.data["squares"][0] == squares
        for buffer in problem.buffers():
            buffer.assert_sentinels()


def test_two_callers_at_once(cpu_library: abi.CpuLibrary) -> None:
    """One of them gets the pool of threads, the other works alone; a caller's steps follow each other."""

    def train(problem: Problem) -> None:
        for _ in range(5):
            call = problem.call(norm=True, num_threads=3)
            cpu_library.norm(call)
            cpu_library.update(call)

    problems = [large_tensors() for _ in range(3)]
    train(problems[2])
    callers = [threading.Thread(target=train, args=(problem,)) for problem in problems[:2]]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    for problem in problems[:2]:
        assert problem.clock.data["step"] == 2**40 + 5
        for buffer, alone in zip(problem.params, problems[2].params, strict=True):
            assert (buffer.raw == alone.raw).all()
