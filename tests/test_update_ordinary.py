"""The update kernel where some of a thread's numbers are not ordinary (csrc/cuda/update_ordinary.cuh): zeros,
subnormals, the ends of every range that the usual way vouches for, infinities and NaNs, alone among others or many.

Needs NumPy and a C++ compiler only. test_sanitizers.py runs this file again under the sanitizers.
"""

from __future__ import annotations

import numpy as np
import pytest
from cuda_on_cpu import abi, emulation
from cuda_on_cpu.expected import after_update, assert_same_bits, assert_updated
from cuda_on_cpu.instances import CUDA_INSTANCES, Instance, instance_id
from cuda_on_cpu.memory import GroupSpec, Problem, TensorSpec

pytest_plugins = ["cuda_on_cpu.fixtures"]

#: The format of the gradients changes nothing beyond loading.
INSTANCES = [i for i in CUDA_INSTANCES if i[0] != "fp64" and i[1] == ("fp32" if i[0] == "fp32" else "bf16")]

GROUPS = [
    GroupSpec(lr=1e-2, weight_decay=0.1),
    GroupSpec(lr=1e-2, weight_decay=0.1, flags=0),  # L2
    GroupSpec(lr=1e-2, weight_decay=0.1, flags=abi.GROUP_DECOUPLED | abi.GROUP_MAXIMIZE, grad_divisor=4.0),
    GroupSpec(lr=1e-3, beta1=0.3, beta2=0.4, weight_decay=0.0),
    GroupSpec(lr=1e-3, beta1=0.0, eps=1e-30),
    GroupSpec(lr=1e-3, eps=0.0, weight_decay=0.0),
    GroupSpec(lr=1e-3, eps=1e11),
    GroupSpec(lr=1e-3, eps=1.5e38),  # its reciprocal is subnormal
    GroupSpec(lr=0.0),
    GroupSpec(lr=1e-21, weight_decay=0.0),  # step sizes below those that are vouched for
    GroupSpec(lr=1e12, weight_decay=0.0),
    GroupSpec(lr=1e-3, beta2=1.0 - 1e-15),
    GroupSpec(lr=1e-3, beta2=1.0),  # as a tensor may be: the bias correction is infinite
]

NOT_FINITE = [np.inf, -np.inf, np.nan]
POWERS = np.ldexp(1.0, [-149, -148, -140, -127, -126, -125, -101, -100, -90, -65, -64, -63, -62])
WEIGHTS = [0.0, -0.0, *POWERS, *-POWERS, 2.0**127, *NOT_FINITE]
FIRST = [0.0, -0.0, *POWERS, *-POWERS, *np.ldexp(1.0, [9, 36, 37, 61, 62, 63, 64, 127]), *NOT_FINITE]
SECOND = [0.0, -0.0, *POWERS, *np.ldexp(1.0, [35, 36, 37, 59, 60, 61, 64, 127]), *NOT_FINITE, -1.0, -(2.0**-149)]
SCALES = [0, 1, 15, 111, 112, 126, 127, 128, 148, 149, 150, 163, 164, 238, 239]  # above, some codes are no floats
CODES = [0, 1, 0x7E, 0x7F, 0x80, 0x81, 0xFE, 0xFF]


def with_some(rng: np.random.Generator, values: np.ndarray, odd: list[float] | list[int], share: float) -> np.ndarray:
    """Some of them replaced; where something is there already, as ordinary, but exactly."""
    chosen = rng.random(len(values)) < share
    with np.errstate(over="ignore", invalid="ignore"):
        return np.where(chosen, rng.choice(np.array(odd), len(values)), values).astype(values.dtype)


def fill(problem: Problem, rng: np.random.Generator, share: float) -> None:
    """share: of odd numbers in each stream."""
    for index, spec in enumerate(problem.specs):
        n, state = spec.numel, problem.state(index)

        def normal(exponents: int, n: int = n) -> np.ndarray:
            return (rng.standard_normal(n) * 10.0 ** -rng.integers(0, exponents, n)).astype(np.float32)

        grad = normal(4) * (rng.random(n) < 0.5)  # zeros leave moments where they are
        problem.grads[index].data[:] = emulation.encode(grad.astype(np.float32), spec.grad)
        weight = with_some(rng, normal(2), WEIGHTS, share)
        with np.errstate(over="ignore"):
            problem.params[index].data[:] = emulation.encode(weight, spec.param, spec.master == "fp32")
        if spec.master in ("split16", "split8"):
            problem.params[index].data[:], state["master"][:n] = emulation.split(weight, spec.master)
            state["master"][:n] = with_some(rng, state["master"][:n], [-128, -1, 1, 127], share)
        elif spec.master == "fp32":
            state["master"][:n] = with_some(rng, weight, WEIGHTS, share)  # an edited parameter
        first = with_some(rng, normal(4), FIRST, share)
        second = with_some(rng, normal(4) ** 2, SECOND, share)
        if spec.amsgrad:
            state["max_exp_avg_sq"][:n] = with_some(rng, normal(4) ** 2, SECOND, share)
        if spec.moments == "fp32":
            state["exp_avg"][:n], state["exp_avg_sq"][:n] = first, second
        elif spec.moments == "bf16":
            state["exp_avg"][:n], state["exp_avg_sq"][:n] = (emulation.encode(m, "bf16") for m in (first, second))
        else:
            # Infinities have no code: with one, or a negative second moment, a group has a NaN.
            middle = np.full(n, 0x80080000, np.uint32)
            second = np.where(second < 0, np.float32(np.nan), second)
            for slot, stored in emulation.encode_moments("8bit", first, second, middle).items():
                odd = SCALES if slot.endswith("scale") else CODES
                state[slot][: spec.entries(slot)] = with_some(rng, stored, odd, share)


def on_both(problem: Problem, *backends: abi.StepLibrary) -> list[list[np.ndarray]]:
    """A step of each backend from the same memory: parameters, one behind the other, and each stream of state."""
    before = problem.snapshot()
    results = []
    for backend in backends:
        problem.restore(before)
        call = problem.call()
        backend.clock(call)
        backend.update(call)
        params = np.concatenate([param.data for param in problem.params])
        results.append([params, *(buffer.data.copy() for buffer in problem.arenas[0].values())])
    return results


@pytest.mark.parametrize("share", [0.0, 0.01, 0.2])
@pytest.mark.parametrize("instance", INSTANCES, ids=instance_id)
def test_odd_numbers(library: abi.Library, instance: Instance, share: float) -> None:
    """share: of odd numbers in each stream. With 0.01, half of the threads have none."""
    param, grad, master, moments, amsgrad = instance
    rng = np.random.default_rng([INSTANCES.index(instance), int(100 * share)])
    specs = [
        TensorSpec(3000 + 7 * group, param, grad, master, amsgrad, moments, group=group, ordinal=group)
        for group in range(len(GROUPS))
    ]
    problem = Problem(specs, GROUPS)
    fill(problem, rng, share)
    call = problem.call()
    library.clock(call)
    expected = after_update(problem)
    library.update(call)
    assert_updated(problem, expected)


def test_a_direction_that_rounds_to_two_to_the_64(library: abi.Library, cpu_library: abi.CpuLibrary) -> None:
    """Times 2^64 it is infinite, though its first approximation is not: the weights' sum is an infinity and no NaN."""
    odd = (41, 47, 55)
    groups = [GroupSpec(lr=5e-4, beta1=0.5, eps=n * 2.0**-24, weight_decay=0.0) for n in odd]
    problem = Problem([TensorSpec(256, group=i, ordinal=i) for i in range(len(odd))], groups)
    for i, n in enumerate(odd):
        problem.params[i].data[:] = 1.0
        problem.state(i)["exp_avg"][:] = 2.0**41 * n
    actual, expected = on_both(problem, library, cpu_library)
    assert_same_bits(actual[0], expected[0], "param")
    assert np.isfinite(actual[0]).all()


@pytest.mark.parametrize("log2_step", [-20, 29, 78])
def test_subnormal_directions(library: abi.Library, cpu_library: abi.CpuLibrary, log2_step: int) -> None:
    """Times 2^64 they have more digits, which weights must not see, whatever they are and whatever the step size."""
    rng = np.random.default_rng(log2_step + 100)
    # In the first step a beta1 of 0.5 halves a first moment and doubles the rate.
    groups = [GroupSpec(lr=2.0 ** (log2_step - 1), beta1=0.5, eps=1234.5, weight_decay=0.0)]
    problem = Problem([TensorSpec(1 << 16, ordinal=i) for i in range(2)], groups)
    for i, weights in enumerate((range(-100, -80), range(-70, -50))):
        n = problem.specs[i].numel
        # A thread's weights are alike, so that the smallest does not decide for others.
        exponent = np.repeat(rng.choice(np.array(weights), n // 8), 8)
        problem.params[i].data[:] = rng.uniform(1.0, 2.0, n) * 2.0**exponent
        directions = rng.uniform(1.0, 2.0, n) * 2.0 ** rng.integers(-140, -126, n)
        problem.state(i)["exp_avg"][:] = 2.0 * 1234.5 * directions
    actual, expected = on_both(problem, library, cpu_library)
    assert_same_bits(actual[0], expected[0], "param")


@pytest.mark.parametrize("backend", ["library", "cpu_library"])
@pytest.mark.parametrize("instance", [*INSTANCES, *(i for i in CUDA_INSTANCES if i[0] == "fp64")], ids=instance_id)
def test_an_infinite_factor_stays_within_the_tensor(
    request: pytest.FixtureRequest, instance: Instance, backend: str
) -> None:
    """Zero gradients turn into NaNs; what lies past the end is zero still (assert_updated)."""
    library: abi.StepLibrary = request.getfixturevalue(backend)
    param, grad, master, moments, amsgrad = instance
    groups = [GroupSpec(grad_divisor=0.0)]
    problem = Problem([TensorSpec(n, param, grad, master, amsgrad, moments) for n in (1, 33, 300)], groups)
    call = problem.call()
    library.clock(call)
    expected = after_update(problem)
    library.update(call)
    assert_updated(problem, expected)


def test_every_bit_pattern_of_8_bit_state(library: abi.Library, cpu_library: abi.CpuLibrary) -> None:
    """All that a checkpoint could hold, scales above 240, which nobody writes, included: as the CPU has it."""
    rng = np.random.default_rng(1)
    specs = [TensorSpec(16 * 1024 + 5, "bf16", "bf16", "split8", moments="8bit", group=i) for i in range(2)]
    problem = Problem(specs, GROUPS[:2])
    for index, spec in enumerate(specs):
        for slot, stored in problem.state(index).items():
            n = spec.entries(slot)
            stored[:n] = rng.integers(0, 256, n).astype(np.uint8).view(stored.dtype)
        problem.params[index].data[:] = rng.integers(0, 1 << 16, spec.numel)
        problem.grads[index].data[:] = emulation.encode(rng.standard_normal(spec.numel).astype(np.float32), "bf16")
    for actual, expected in zip(*on_both(problem, library, cpu_library), strict=True):
        assert_same_bits(actual, expected, "cuda and cpu")
