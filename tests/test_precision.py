"""Masters of 16-bit parameters: what they hold, how parameters round from them, and who wins."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from cases import Problem, assert_same, by_name, same_bits, snapshot, values_of
from conftest import Backend
from oracle import FORMATS

SIXTEEN_BIT = {"bf16": torch.bfloat16, "fp16": torch.float16}
each_format = pytest.mark.parametrize("name", list(SIXTEEN_BIT))


def step(optimizer: torch.optim.Optimizer, grad: float = 1.0) -> None:
    for group in optimizer.param_groups:
        for param in group["params"]:
            param.grad = torch.full_like(param, grad)
    optimizer.step()


def master_of(optimizer: torch.optim.Optimizer, param: torch.Tensor) -> torch.Tensor:
    master = optimizer.state[param]["master"]
    assert isinstance(master, torch.Tensor)
    return master


@pytest.mark.parametrize("case", ["bf16_with_master", "fp16_with_master"])
def test_master_is_within_bounds_and_rounds_to_the_parameter(case: str, backend: Backend) -> None:
    import tolerances

    problem = Problem(by_name(case), backend.device)
    optimizer = problem.optimizer(backend.name)
    for _ in range(6):
        problem.run(optimizer, 1)
        problem.run_oracles()
        for param, oracle in zip(problem.params, problem.oracles, strict=True):
            master = values_of(master_of(optimizer, param))
            assert np.all(np.abs(master - oracle.weight) <= tolerances.weight_bound(oracle))
            fmt = FORMATS[oracle.format_name]
            np.testing.assert_array_equal(values_of(param), fmt.round(master, ties_away=oracle.format_name == "bf16"))


@pytest.mark.parametrize(("name", "ties_away"), [("bf16", True), ("fp16", False)])
def test_rounding_beside_a_master(name: str, ties_away: bool, backend: Backend) -> None:
    """Exact ties, both signs: 1 + 2^-8 in bf16, 1 + 2^-11 in fp16."""
    tie = float(FORMATS[name].spacing(np.ones(1))[0]) / 2.0
    param = backend.parameter([1.0, -1.0], SIXTEEN_BIT[name])
    optimizer = backend.optimizer([param], lr=tie, betas=(0.0, 0.0), eps=0.0, master="fp32")
    param.grad = torch.tensor([-1.0, 1.0], dtype=param.dtype, device=backend.device)
    optimizer.step()
    assert master_of(optimizer, param).tolist() == [1.0 + tie, -1.0 - tie]
    up = 1.0 + 2.0 * tie if ties_away else 1.0
    assert param.tolist() == [up, -up]


@each_format
def test_rounding_without_a_master_is_to_even(name: str, backend: Backend) -> None:
    tie = float(FORMATS[name].spacing(np.ones(1))[0]) / 2.0
    param = backend.parameter([1.0, 1.0 + 2.0 * tie], SIXTEEN_BIT[name])
    optimizer = backend.optimizer([param], lr=tie, betas=(0.0, 0.0), eps=0.0, master="none")
    step(optimizer, grad=-1.0)
    assert param.tolist() == [1.0, 1.0 + 4.0 * tie]
    assert "master" not in optimizer.state[param]


@each_format
def test_master_collects_updates_too_small_for_the_parameter(name: str, backend: Backend) -> None:
    small = float(FORMATS[name].spacing(np.ones(1))[0]) / 8.0
    results = {}
    for master in ("fp32", "none"):
        param = backend.parameter([1.0], SIXTEEN_BIT[name])
        optimizer = backend.optimizer([param], lr=small, betas=(0.0, 0.0), eps=0.0, master=master)
        for _ in range(16):
            step(optimizer, grad=-1.0)
        results[master] = param.item()
    assert results == {"fp32": 1.0 + 16.0 * small, "none": 1.0}


@pytest.mark.parametrize(
    ("name", "meaning", "key"), [("bf16", "split16", "master_remainder"), ("fp16", "fp32", "master")]
)
def test_auto_means_an_exact_master(name: str, meaning: str, key: str, backend: Backend) -> None:
    results = []
    for options in ({}, {"master": "auto"}, {"master": meaning}):
        param = backend.parameter([1.0, 2.0], SIXTEEN_BIT[name])
        optimizer = backend.optimizer([param], **options)
        step(optimizer)
        assert key in optimizer.state[param]
        results.append(snapshot(optimizer))
    assert_same(results[1], results[0])
    assert_same(results[2], results[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("master", ["auto", "none", "fp32"])
def test_wide_parameters_have_no_master(dtype: torch.dtype, master: str, backend: Backend) -> None:
    param = backend.parameter([1.0], dtype)
    optimizer = backend.optimizer([param], master=master)
    step(optimizer)
    assert "master" not in optimizer.state[param]


def test_master_option_belongs_to_the_group(backend: Backend) -> None:
    params = [backend.parameter([1.0], torch.bfloat16) for _ in range(2)]
    groups: list[dict[str, Any]] = [{"params": [params[0]]}, {"params": [params[1]], "master": "none"}]
    optimizer = backend.optimizer(groups, master="fp32")
    step(optimizer)
    assert ["master" in optimizer.state[param] for param in params] == [True, False]


@each_format
def test_parameter_edited_outside_wins_over_its_master(name: str, backend: Backend) -> None:
    """Weights loaded, an average swapped in: only the elements that changed restart."""
    param = backend.parameter([1.0, 1.0, 1.0], SIXTEEN_BIT[name])
    spacing = float(FORMATS[name].spacing(np.ones(1))[0])
    optimizer = backend.optimizer([param], lr=spacing / 8.0, betas=(0.0, 0.0), eps=0.0, master="fp32")
    step(optimizer, grad=-1.0)
    with torch.no_grad():
        param[1] = 4.0
        param[2] = -0.0
    step(optimizer, grad=-1.0)
    expected = [1.0 + spacing / 4.0, 4.0 + spacing / 8.0, spacing / 8.0]
    assert master_of(optimizer, param).tolist() == expected
    assert param.tolist() == [1.0, 4.0, spacing / 8.0]


@each_format
def test_edited_nan_parameter_wins_too(name: str, backend: Backend) -> None:
    param = backend.parameter([1.0, float("nan")], SIXTEEN_BIT[name])
    optimizer = backend.optimizer([param], lr=0.5, betas=(0.0, 0.0), eps=0.0, master="fp32")
    step(optimizer)
    assert master_of(optimizer, param)[1].isnan()
    with torch.no_grad():
        param[1] = 1.0
    step(optimizer)
    assert param.tolist() == [0.0, 0.5]


@each_format
def test_master_edited_in_place_without_the_parameter_loses(name: str, backend: Backend) -> None:
    param = backend.parameter([1.0], SIXTEEN_BIT[name])
    optimizer = backend.optimizer([param], lr=0.5, betas=(0.0, 0.0), eps=0.0, master="fp32")
    step(optimizer)
    master_of(optimizer, param).fill_(100.0)
    step(optimizer)
    assert param.item() == 0.0


def test_state_is_no_16_bit_anywhere(backend: Backend) -> None:
    problem = Problem(by_name("all_dtypes_in_a_group"), backend.device)
    optimizer = problem.optimizer(backend.name)
    problem.run(optimizer, 2)
    for param in problem.params:
        for value in optimizer.state[param].values():
            assert not isinstance(value, torch.Tensor) or value.dtype not in SIXTEEN_BIT.values()


def test_fp32_gradients_of_a_bf16_parameter_keep_their_digits(backend: Backend) -> None:
    from cases import set_grad

    grad = torch.tensor([1.0 + 2.0**-20], device=backend.device)
    wide, narrow = backend.parameter([0.0]), backend.parameter([0.0], torch.bfloat16)
    optimizer = backend.optimizer([wide, narrow], master="fp32")
    for param in (wide, narrow):
        set_grad(param, grad)
    optimizer.step()
    states = [optimizer.state[param] for param in (wide, narrow)]
    assert same_bits(states[0]["exp_avg"], states[1]["exp_avg"])


def test_main_grad_is_used_where_grad_is_missing(backend: Backend) -> None:
    """Megatron and others accumulate into `main_grad`, in fp32, and leave `grad` empty."""
    with_main, plain = (
        backend.parameter([1.0, 2.0], torch.bfloat16),
        backend.parameter([1.0, 2.0], torch.bfloat16),
    )
    with_main.main_grad = torch.tensor([1.0, -2.0], device=backend.device)  # type: ignore[attr-defined]
    plain.grad = torch.tensor([1.0, -2.0], dtype=torch.bfloat16, device=backend.device)
    snapshots = []
    for param in (with_main, plain):
        optimizer = backend.optimizer([param], lr=0.1)
        optimizer.step()
        snapshots.append(snapshot(optimizer))
    assert_same(snapshots[0], snapshots[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_main_grad_of_compressed_formats(dtype: torch.dtype, backend: Backend) -> None:
    """Read in its own dtype, with the bits that a float32 gradient of the same values gives; `p.grad` comes first, and
    zero_grad() leaves it to whoever keeps it."""
    values = torch.linspace(-1, 1, 37, dtype=dtype, device=backend.device)
    snapshots = []
    for grad in (values, values.float()):
        param = backend.parameter(torch.ones(37), torch.bfloat16)
        param.main_grad = grad  # type: ignore[attr-defined]
        optimizer = backend.optimizer([param], lr=0.1, master="split8", moments="8bit")
        optimizer.step()
        optimizer.zero_grad()
        assert param.main_grad is grad  # type: ignore[attr-defined]
        param.grad = torch.zeros_like(param)
        optimizer.step()
        assert same_bits(param.main_grad, grad)  # type: ignore[attr-defined]
        snapshots.append(snapshot(optimizer))
    assert_same(snapshots[0], snapshots[1])
    again = backend.parameter(torch.ones(37), torch.bfloat16)
    optimizer = backend.optimizer([again], lr=0.1, master="split8", moments="8bit")
    for grad in (values.to(again), torch.zeros_like(again)):
        again.grad = grad
        optimizer.step()
    if dtype == torch.bfloat16:
        assert_same(snapshot(optimizer), snapshots[0])
