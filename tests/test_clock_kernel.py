"""The clock kernel, run on the CPU (tests/cuda_on_cpu), and the CPU backend's clock: ticks,
hyperparameters, steps and the scalars of a step.

Needs NumPy and a C++ compiler only. test_sanitizers.py runs this file again under the sanitizers.
"""

from __future__ import annotations

import struct
from math import inf, nan

import numpy as np
import pytest
from cuda_on_cpu import abi
from cuda_on_cpu.instances import GROUPS
from cuda_on_cpu.memory import GroupSpec, Problem, TensorSpec

pytest_plugins = ["cuda_on_cpu.fixtures"]

CLOCK_CAPACITY = 1359  # runs of tensors in one launch, 24 bytes each (CallTable::kPoolBytes); each tensor is one
CLOCK_THREADS = 128


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


def test_derives_the_scalars_of_every_tensor(each_library: abi.StepLibrary) -> None:
    specs = [TensorSpec(1, "fp64" if i % 5 == 0 else "fp32", "fp64" if i % 5 == 0 else "fp32", group=i % 4,
                        arena=int(i % 5 != 0)) for i in range(3 * CLOCK_THREADS + 1)]  # fmt: skip
    problem = Problem(specs, GROUPS)
    problem.grad_scale.data[0] = 512.0
    for i, record in enumerate(problem.steps):
        record.data["count"] = record.data["mirror"] = i % 3
    call = problem.call(grad_scale=True)
    each_library.clock(call)
    for i, spec in enumerate(specs):
        expected = expected_scalars(GROUPS[spec.group], i % 3 + 1, 512.0, spec.compute)
        for name, value in expected.items():
            # In double, 1 - beta^t magnifies the last bit of beta^t by at most 1 / (1 - 0.999) = 1000.
            limit = 2000 * np.finfo(np.float64).eps if spec.compute == "<f8" else 0.0
            assert abs(problem.scalars_of(i)[name] - value) <= limit * abs(value), (i, name)


@pytest.mark.parametrize(("num_tensors", "launches"), [(CLOCK_CAPACITY, 1), (CLOCK_CAPACITY + 1, 2), (4000, 3)])
def test_many_tensors_take_several_launches(library: abi.Library, num_tensors: int, launches: int) -> None:
    """Only the first launch ticks; each thread has rows of several groups and steps."""
    groups = GROUPS[:3]
    problem = Problem([TensorSpec(0, group=i * 3 // num_tensors) for i in range(num_tensors)], groups)
    for i, record in enumerate(problem.steps):
        record.data["count"] = record.data["mirror"] = i // 7  # neighbours share their step, and not always
    call = problem.call()
    library.clock(call)
    assert call.launches == launches
    assert problem.clock.data["step"] == 1
    for i, record in enumerate(problem.steps):
        assert (record.data["count"][0], record.data["mirror"][0]) == (i // 7 + 1, i // 7 + 1)
        group = groups[problem.specs[i].group]
        assert problem.scalars_of(i)["step_size"] == expected_scalars(group, i // 7 + 1)["step_size"]


def test_with_many_groups(each_library: abi.StepLibrary) -> None:
    groups = [GroupSpec(lr=1e-3 * (i + 1), beta1=0.9 - i * 1e-4, weight_decay=0.01 * i) for i in range(300)]
    specs = [TensorSpec(1, group=(i * 7) % 300) for i in range(600)]
    problem = Problem(specs, groups)
    each_library.clock(problem.call())
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


def test_evaluates_programs_and_reads_tensors(each_library: abi.StepLibrary) -> None:
    """Powers of two, so that every value is exact."""
    group = GroupSpec(
        lr=(0.5, linear_program(1.0, 0.0, 8)),
        beta1=(1.0, linear_program(0.5, 0.75, 8)),
        beta2=(1.0, "fp64", 0.875),
        weight_decay=(2.0, "bf16", 0x3E00),  # 0.125
    )
    problem = Problem([TensorSpec(10)], [group])
    for t in range(12):
        each_library.clock(problem.call())
        assert problem.clock.data["step"] == t + 1
        passed = min(t, 8) / 8
        values = (0.5 * (1.0 - passed), 0.5 + 0.25 * passed, 0.875, 0.25)
        assert problem.values.data[0].tolist() == values
        scalars = problem.scalars_of(0)
        assert scalars["decay"] == np.float32(values[0] * values[3])
        assert scalars["step_size"] == np.float32(values[0] / (1.0 - values[1] ** (t + 1)))


@pytest.mark.parametrize("value", [1.0, 2.0, nan, inf])
def test_skipped_call_changes_nothing_and_keeps_its_tick(each_library: abi.StepLibrary, value: float) -> None:
    specs = [TensorSpec(100), TensorSpec(33, "bf16", "fp32", "fp32"), TensorSpec(9, "fp64", "fp64", arena=1)]
    problem = Problem(specs)
    problem.randomize(np.random.default_rng(2))
    applied = problem.call(found_inf=True)
    each_library.clock(applied)
    each_library.update(applied)

    problem.found_inf.data[0] = value
    before = [b.raw.tobytes() for b in problem.buffers() if b not in (problem.clock, problem.scalars)]
    skipped = problem.call(found_inf=True)
    each_library.clock(skipped)
    each_library.update(skipped)
    assert [b.raw.tobytes() for b in problem.buffers() if b not in (problem.clock, problem.scalars)] == before
    assert problem.clock.data[0].tolist() == (1, 1, 1)  # step, tick_pending, skipped

    # The round's next call is not a tick, and takes the one kept.
    problem.found_inf.data[0] = 0.0
    each_library.clock(problem.call(tick=False, found_inf=True))
    assert problem.clock.data[0].tolist() == (2, 0, 0)
    each_library.clock(problem.call(tick=False, found_inf=True))
    assert problem.clock.data[0].tolist() == (2, 0, 0)
    assert [int(record.data["count"][0]) for record in problem.steps] == [3, 3, 3]


def test_takes_a_step_written_from_outside(each_library: abi.StepLibrary) -> None:
    problem = Problem([TensorSpec(1), TensorSpec(1), TensorSpec(1)])
    problem.steps[0].data["mirror"] = 41.0
    problem.steps[1].data["count"], problem.steps[1].data["mirror"] = 2**24 + 1, 2.0**24
    each_library.clock(problem.call())
    assert [int(record.data["count"][0]) for record in problem.steps] == [42, 2**24 + 2, 1]
    assert [float(record.data["mirror"][0]) for record in problem.steps] == [42.0, 2.0**24 + 2, 1.0]


def test_without_tensors_ticks(library: abi.Library) -> None:
    problem = Problem([])
    call = problem.call()
    library.clock(call)
    library.update(call)
    assert problem.clock.data["step"] == 1
    assert call.launches == 1
