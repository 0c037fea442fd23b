"""Every case on every backend: within bounds of the oracle, and the same bits on all compiled backends."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from cases import (
    CASES,
    COMPRESSED,
    Case,
    Problem,
    assert_same,
    by_name,
    snapshot,
    values_of,
)
from conftest import REFERENCE_EVERYWHERE, Backend
from oracle_check import UPDATES, check_against_oracle

each_case = pytest.mark.parametrize("case", CASES, ids=str)


@pytest.fixture(params=REFERENCE_EVERYWHERE)
def backend(request: pytest.FixtureRequest, get_backend: Callable[[str], Backend]) -> Backend:
    return get_backend(request.param)


@each_case
def test_stays_within_bounds_of_the_oracle(case: Case, backend: Backend) -> None:
    check_against_oracle(case, backend)


@pytest.mark.parametrize("case", [*CASES, *COMPRESSED], ids=str)
def test_compiled_backends_give_the_same_bits(
    case: Case, beside_cpu: Backend, get_backend: Callable[[str], Backend]
) -> None:
    results = []
    for backend in (get_backend("cpu"), beside_cpu):
        problem = Problem(case, backend.device)
        optimizer = problem.optimizer(backend.name)
        problem.run(optimizer, UPDATES)
        results.append(snapshot(optimizer))
    assert_same(results[1], results[0])


SPECIALS = [
    0.0,
    -0.0,
    float("inf"),
    -float("inf"),
    float("nan"),
    1e-45,
    -1e-45,
    1e-38,
    3.4e38,
    -3.4e38,
    1e-20,
    1.0,
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("master", ["none", "fp32"])
def test_special_values_give_the_same_bits(
    dtype: torch.dtype, master: str, beside_cpu: Backend, get_backend: Callable[[str], Backend]
) -> None:
    specials = torch.tensor(SPECIALS, dtype=torch.float64).to(dtype)
    pairs = torch.cartesian_prod(specials, specials)
    results = []
    for backend in (get_backend("cpu"), beside_cpu):
        param = backend.parameter(pairs[:, 0], dtype)
        optimizer = backend.optimizer([param], lr=0.1, weight_decay=0.1, amsgrad=True, master=master)
        for _ in range(3):
            param.grad = pairs[:, 1].to(backend.device)
            optimizer.step()
        results.append(snapshot(optimizer))
    assert_same(results[1], results[0])


def test_finite_elements_beside_special_ones_stay_right(backend: Backend) -> None:
    grads = torch.tensor(SPECIALS)
    param = backend.parameter(torch.ones(len(SPECIALS)))
    optimizer = backend.optimizer([param], lr=0.5, eps=0.0)
    param.grad = grads.to(backend.device)
    optimizer.step()
    # eps = 0: the first update is lr * sign(g) exactly where g*g neither under- nor overflows.
    assert param[-1].item() == 0.5
    assert param[4].isnan().item()


def test_a_thousand_updates_do_not_drift(backend: Backend) -> None:
    """beta2 rounded to float instead of 1 - beta2 would put exp_avg_sq 1.3e-5 off (csrc/core/adam.h)."""
    problem = Problem(by_name("defaults"), backend.device)
    optimizer = problem.optimizer(backend.name)
    for _ in range(1000):
        problem.run(optimizer, 1)
        problem.run_oracles()
    for param, oracle in zip(problem.params, problem.oracles, strict=True):
        state = optimizer.state[param]
        # Errors of a thousand roundings add up like a random walk, sqrt(1000) = 32 roundings of 6e-8: 2e-6.
        np.testing.assert_allclose(values_of(state["exp_avg_sq"]), oracle.exp_avg_sq, rtol=2e-6)
        moved = oracle.update_magnitude
        assert np.all(np.abs(values_of(param) - oracle.param) <= 2e-6 * (oracle.start_magnitude + moved))


def three_large_steps(backend: Backend) -> dict[str, torch.Tensor]:
    """Large enough for several units of parallel work, and ends inside a vector."""
    generator = torch.Generator().manual_seed(0)
    sizes = (200_001, 3, 70_000)
    params = [backend.parameter(torch.randn(size, generator=generator)) for size in sizes]
    optimizer = backend.optimizer(params, lr=1e-2, weight_decay=0.1)
    for _ in range(3):
        for param in params:
            param.grad = torch.randn(param.shape, generator=generator)
        optimizer.step()
    return snapshot(optimizer)


def test_thread_count_does_not_change_the_result(get_backend: Callable[[str], Backend]) -> None:
    backend = get_backend("cpu")
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(three_large_steps(backend))
    finally:
        torch.set_num_threads(before)
    assert_same(results[1], results[0])
    assert_same(results[2], results[0])


def test_instruction_sets_give_the_same_bits(get_backend: Callable[[str], Backend]) -> None:
    backend = get_backend("cpu")
    from fused_sched import _cpu

    before = _cpu.instruction_set()
    names = [name for name, supported in _cpu.instruction_sets() if supported]
    assert "baseline" in names
    results = {}
    try:
        for name in names:
            _cpu.set_instruction_set(name)
            assert _cpu.instruction_set() == name
            results[name] = three_large_steps(backend)
            for case in (*CASES, *COMPRESSED):
                problem = Problem(case, backend.device)
                optimizer = problem.optimizer(backend.name)
                problem.run(optimizer, 3)
                results[name] |= {f"{case}.{key}": value for key, value in snapshot(optimizer).items()}
    finally:
        _cpu.set_instruction_set(before)
    for name in names:
        assert_same(results[name], results["baseline"])


def test_unknown_instruction_set_is_refused(get_backend: Callable[[str], Backend]) -> None:
    get_backend("cpu")
    from fused_sched import _cpu

    with pytest.raises(ValueError, match="sse9"):
        _cpu.set_instruction_set("sse9")


def test_subnormals_count_even_where_torch_flushes_them(compiled: Backend) -> None:
    results = []
    for flush in (False, True):
        param = compiled.parameter([3e-40, 1e-39])
        optimizer = compiled.optimizer([param], lr=1e-40, eps=0.0)
        param.grad = torch.ones_like(param)
        try:
            assert torch.set_flush_denormal(flush) or not flush
            optimizer.step()
        finally:
            torch.set_flush_denormal(False)
        results.append(snapshot(optimizer))
    assert_same(results[1], results[0])
    assert results[0]["0.param"].abs().min() > 0
