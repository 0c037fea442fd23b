"""The update kernel, run on the CPU (tests/cuda_on_cpu): every compiled instance, to the last bit.

Needs NumPy and a C++ compiler only. test_sanitizers.py runs this file again under the sanitizers.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import numpy as np
import pytest
from cuda_on_cpu import abi, emulation
from cuda_on_cpu.expected import after_update, assert_updated
from cuda_on_cpu.instances import CUDA_INSTANCES, GROUPS, Instance, instance_id
from cuda_on_cpu.memory import GroupSpec, Problem, TensorSpec
from oracle import Options, Oracle, decode_codes
from tolerances import param_bound, state_bound, weight_bound

pytest_plugins = ["cuda_on_cpu.fixtures"]

UPDATE_CAPACITY = 1024  # tensors of one launch (UpdateTable::kCapacity)
ARENA_CAPACITY = 16  # kMaxArenas


def tile(param: str, master: str = "none", moments: str = "fp32") -> int:
    """Elements a block takes at a time: 256 threads of 8 elements, of 16 beside 8-bit moments, of 2 in double."""
    if param == "fp64":
        return 512
    return 4096 if moments == "8bit" else 2048


every_instance = pytest.mark.parametrize("instance", CUDA_INSTANCES, ids=instance_id)


@pytest.mark.parametrize("instance", CUDA_INSTANCES, ids=instance_id)
def test_update_matches_emulation_bit_for_bit(library: abi.Library, instance: Instance) -> None:
    param, grad, master, moments, amsgrad = instance
    t = tile(param, master, moments)
    sizes = [0, 1, 7, 8, 9, 31, 32, 33, 255, 256, 257, 4095, 4096, 4097, t - 1, t, t + 1, 3 * t + 5]
    rng = np.random.default_rng(CUDA_INSTANCES.index(instance))
    common = TensorSpec(0, param, grad, master, amsgrad, moments)
    specs = [replace(common, numel=n) for n in sizes]
    for numel in sizes:
        p, g = rng.integers(0, 8, 2)
        specs.append(replace(common, numel=numel, param_misalignment=int(p), grad_misalignment=int(g)))
    for p, g in product(range(8), range(8)):
        specs.append(replace(common, numel=int(rng.integers(1, 40)), param_misalignment=p, grad_misalignment=g))
    specs = [replace(spec, group=i % len(GROUPS), ordinal=i) for i, spec in enumerate(specs)]
    problem = Problem(specs, GROUPS)
    problem.randomize(rng)
    problem.steps[0].data["count"] = problem.steps[0].data["mirror"] = 10
    call = problem.call()
    library.clock(call)
    expected = after_update(problem)
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
        results.append(
            b"".join(p.data.tobytes() + problem.state(i)["exp_avg"].tobytes() for i, p in enumerate(problem.params))
        )
    assert results[0] == results[1] == results[2]


def test_formats_mixed_in_one_call(library: abi.Library) -> None:
    """Each combination has a launch of its own; rows keep their scalars wherever they are in the call."""
    specs = [
        TensorSpec(100 + 3 * i, param, grad, master, amsgrad, moments, group=i % 2, ordinal=i)
        for i, (param, grad, master, moments, amsgrad) in enumerate(CUDA_INSTANCES * 2)
    ]
    kept = list(dict.fromkeys((spec.param == "fp64", spec.master, spec.moments) for spec in specs))
    specs = [replace(spec, arena=kept.index((spec.param == "fp64", spec.master, spec.moments))) for spec in specs]
    problem = Problem(specs, GROUPS[:2])
    problem.clock.data["step"] = 2**40  # which stochastic rounding is keyed by
    problem.randomize(np.random.default_rng(3))
    call = problem.call()
    library.clock(call)
    expected = after_update(problem)
    library.update(call)
    assert_updated(problem, expected)
    assert call.launches == 1 + len(CUDA_INSTANCES)


@pytest.mark.parametrize("num_tensors", [UPDATE_CAPACITY, 1500])
def test_many_tensors_take_several_launches(library: abi.Library, num_tensors: int) -> None:
    rng = np.random.default_rng(num_tensors)
    specs = [TensorSpec(int(rng.integers(0, 40)), group=i * 3 // num_tensors) for i in range(num_tensors - 1)]
    specs = [*specs, TensorSpec(5, group=2)] + [TensorSpec(0)] * 3
    problem = Problem(specs, GROUPS[:3])
    problem.randomize(rng)
    call = problem.call()
    library.clock(call)
    clocks = call.launches
    expected = after_update(problem)
    library.update(call)
    assert_updated(problem, expected)
    nonempty = sum(spec.numel > 0 for spec in specs)
    assert call.launches == clocks + -(-nonempty // UPDATE_CAPACITY)


def test_capacity_of_one_launch(library: abi.Library) -> None:
    for num_tensors, launches in ((UPDATE_CAPACITY, 1), (UPDATE_CAPACITY + 1, 2)):
        problem = Problem([TensorSpec(1)] * num_tensors)
        call = problem.call()
        library.update(call)
        assert call.launches == launches


def test_arenas_beyond_one_launch(library: abi.Library) -> None:
    specs = [TensorSpec(300 + i, arena=i % 20) for i in range(60)]
    problem = Problem(specs)
    problem.randomize(np.random.default_rng(5))
    call = problem.call()
    library.clock(call)
    expected = after_update(problem)
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
            expected = after_update(problem)
            library.update(call)
            assert_updated(problem, expected)
        assert all(np.isfinite(emulation.decode(p.data, param)).all() for p in problem.params)


ORACLE_INSTANCES = [i for i in CUDA_INSTANCES if i[2] in ("none", "fp32") and i[3] == "fp32"]


@pytest.mark.parametrize("instance", ORACLE_INSTANCES, ids=instance_id)
def test_update_matches_float64_oracle(library: abi.Library, instance: Instance) -> None:
    """The whole step, clock included, within the bounds that tolerances.py derives, where the state is exact; what
    compressed formats add to it, test_codec.py bounds."""
    param, grad, master, _, amsgrad = instance
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
