"""Checkpoints to and from torch.optim.AdamW, and back."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from cases import same_bits, through_a_file, values_of
from conftest import Backend

from fused_sched import schedules

TORCH_OPTIONS: dict[str, Any] = {
    "lr": 0.01,
    "betas": (0.8, 0.95),
    "eps": 1e-6,
    "weight_decay": 0.1,
    "amsgrad": True,
}


def model(backend: Backend) -> list[torch.nn.Parameter]:
    rng = np.random.default_rng(5)
    return [backend.parameter(rng.standard_normal(shape), torch.float64) for shape in ((3, 4), (5,))]


def train_all(optimizer: torch.optim.Optimizer, first: int, last: int) -> None:
    params = [param for group in optimizer.param_groups for param in group["params"]]
    for index in range(first, last):
        rng = np.random.default_rng(index)
        for param in params:
            param.grad = torch.from_numpy(rng.standard_normal(tuple(param.shape))).to(param)
        optimizer.step()


def optimizer_of(kind: str, backend: Backend, params: list[torch.nn.Parameter], **options: Any) -> Any:
    if kind == "torch":
        return torch.optim.AdamW(params, **options)
    return backend.optimizer(params, **options)


@pytest.mark.parametrize("portable", [False, True])
@pytest.mark.parametrize("direction", [("torch", "ours"), ("ours", "torch")], ids="_to_".join)
def test_checkpoints_of_torchs_adamw(direction: tuple[str, str], portable: bool, backend: Backend) -> None:
    source, target = direction
    params = model(backend)
    first = optimizer_of(source, backend, params, **TORCH_OPTIONS)
    train_all(first, 0, 3)
    saved = first.state_dict(portable=True) if portable and source == "ours" else first.state_dict()
    saved = through_a_file(saved)
    copies = [torch.nn.Parameter(param.detach().clone()) for param in params]
    second = optimizer_of(target, backend, copies)
    second.load_state_dict(saved)
    for param, copied in zip(params, copies, strict=True):
        for key in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"):
            assert same_bits(second.state[copied][key], first.state[param][key])
        assert float(second.state[copied]["step"]) == 3
    train_all(first, 3, 6)
    train_all(second, 3, 6)
    for param, copied in zip(params, copies, strict=True):
        # Two orders of the same float64 operations over 3 updates.
        torch.testing.assert_close(copied, param, rtol=1e-14, atol=1e-15)
        torch.testing.assert_close(
            first.state[param]["exp_avg"], second.state[copied]["exp_avg"], rtol=1e-14, atol=1e-15
        )
        assert float(second.state[copied]["step"]) == 6
    if target == "ours":
        assert second.clock == 6


def test_foreign_checkpoint_sets_the_clock_to_its_largest_step(backend: Backend) -> None:
    params = model(backend)
    torch_optimizer = torch.optim.AdamW(params, lr=0.5)
    train_all(torch_optimizer, 0, 4)
    schedule = schedules.linear(0.0, 1.0, 8)
    ours = backend.optimizer(params, lr=schedule)
    ours.load_state_dict(through_a_file(torch_optimizer.state_dict()))
    assert ours.clock == 4
    assert ours.param_groups[0]["lr"] == ours.param_groups[0]["lr_reference"] == schedule.reference
    train_all(ours, 4, 5)
    assert ours.last_lr() == [schedule(4)]


def test_foreign_lr_left_by_a_torch_scheduler_is_ignored(backend: Backend) -> None:
    params = model(backend)
    torch_optimizer = torch.optim.AdamW(params, lr=0.5)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(torch_optimizer, 0.9)
    train_all(torch_optimizer, 0, 1)
    scheduler.step()
    ours = backend.optimizer(params, lr=schedules.constant(0.125))
    ours.load_state_dict(torch_optimizer.state_dict())
    train_all(ours, 1, 2)
    assert ours.last_lr() == [0.125]


def test_portable_bf16_state_loads_into_torch_and_back(backend: Backend) -> None:
    param = backend.parameter([1.0, -2.0], torch.bfloat16)
    ours = backend.optimizer([param], lr=1e-3, master="fp32")
    for index in range(3):
        param.grad = torch.full_like(param, 1.0 + index)
        ours.step()
    saved = through_a_file(ours.state_dict(portable=True))
    fp32 = torch.nn.Parameter(param.detach().float())
    theirs = torch.optim.AdamW([fp32])
    theirs.load_state_dict(saved)
    fp32.grad = torch.ones_like(fp32)
    theirs.step()
    assert values_of(theirs.state[fp32]["step"]) == 4
    ours.load_state_dict(through_a_file(theirs.state_dict()))
    assert same_bits(ours.state[param]["exp_avg"], theirs.state[fp32]["exp_avg"])


@pytest.mark.parametrize("torchs_lr", ["as it was", "driven by a scheduler"])
@pytest.mark.parametrize("portable", [False, True])
def test_what_torch_trained_since_counts_when_its_checkpoint_comes_back(
    portable: bool, torchs_lr: str, backend: Backend
) -> None:
    """torch keeps our int64 count as it was and moves its own float32 one: clock and rate had gone back to ours."""
    schedule = schedules.linear(1.0, 0.0, 100)
    ours = backend.optimizer(model(backend), lr=schedule)
    train_all(ours, 0, 3)
    theirs = torch.optim.AdamW(model(backend))
    theirs.load_state_dict(through_a_file(ours.state_dict(portable=portable)))
    scheduler = torch.optim.lr_scheduler.ExponentialLR(theirs, 0.9)
    for index in range(3, 8):
        train_all(theirs, index, index + 1)
        if torchs_lr != "as it was":
            scheduler.step()
    back = backend.optimizer(model(backend), lr=schedule)
    back.load_state_dict(through_a_file(theirs.state_dict()))
    assert back.clock == 8
    assert back.state_dict()["state"][0]["step_int64"] == 8
    train_all(back, 8, 9)
    assert back.last_lr() == [schedule(8)]
    assert [int(state["step_int64"]) for state in back.state.values()] == [9, 9]
