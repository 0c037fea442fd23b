"""Schedulers beside the optimizer: torch's, which may drive only a plain lr, and the handle that observes."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from cases import assert_same, snapshot
from conftest import Backend
from test_lr import moved, sign_descent, update
from torch.optim import lr_scheduler
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from fused_sched import schedules

RAMP = schedules.linear(0.01, 0.05, 4)

TORCH_SCHEDULERS: dict[str, Callable[[torch.optim.Optimizer], LRScheduler]] = {
    "LambdaLR": lambda optimizer: LambdaLR(optimizer, lambda epoch: 0.9**epoch),
    "CosineAnnealingLR": lambda optimizer: lr_scheduler.CosineAnnealingLR(optimizer, 5),
    "LinearLR": lambda optimizer: lr_scheduler.LinearLR(optimizer, total_iters=3),
    "OneCycleLR": lambda optimizer: lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=10),
    "CyclicLR": lambda optimizer: lr_scheduler.CyclicLR(optimizer, 0.01, 0.1, step_size_up=3),
    "SequentialLR": lambda optimizer: lr_scheduler.SequentialLR(
        optimizer,
        [lr_scheduler.ConstantLR(optimizer, 0.5), lr_scheduler.ExponentialLR(optimizer, 0.9)],
        [2],
    ),
}


def attach(name: str, optimizer: torch.optim.Optimizer) -> LRScheduler:
    return TORCH_SCHEDULERS[name](optimizer)


@pytest.mark.parametrize("name", TORCH_SCHEDULERS)
def test_torch_schedulers_drive_an_unscheduled_optimizer(name: str, backend: Backend) -> None:
    ours = backend.optimizer([backend.parameter([1.0, -1.0], torch.float64)], lr=0.1, weight_decay=0.1)
    theirs = torch.optim.AdamW([backend.parameter([1.0, -1.0], torch.float64)], lr=0.1, weight_decay=0.1)
    pairs = [(optimizer, attach(name, optimizer)) for optimizer in (ours, theirs)]
    for index in range(6):
        for optimizer, scheduler in pairs:
            update(optimizer, grad=math.cos(index))
            scheduler.step()
    # Two orders of the same float64 operations over 6 updates.
    torch.testing.assert_close(snapshot(ours)["0.param"], snapshot(theirs)["0.param"], rtol=1e-14, atol=1e-15)
    assert ours.param_groups[0]["lr"] == theirs.param_groups[0]["lr"]
    assert ours.param_groups[0]["betas"] == theirs.param_groups[0]["betas"]


@pytest.mark.parametrize("name", TORCH_SCHEDULERS)
@pytest.mark.parametrize("updates", [0, 2])
def test_second_scheduler_on_a_scheduled_optimizer_is_refused(name: str, updates: int, backend: Backend) -> None:
    optimizer = sign_descent(backend, RAMP)
    for _ in range(updates):
        update(optimizer)
    before, options = snapshot(optimizer), dict(optimizer.param_groups[0])

    def attach_and_step() -> None:
        attach(name, optimizer)
        update(optimizer)

    with pytest.raises((RuntimeError, ValueError), match=r"(?i)schedul"):
        attach_and_step()
    assert_same(snapshot(optimizer), before)
    assert optimizer.param_groups[0] == options
    update(optimizer)
    assert optimizer.last_lr() == [RAMP(updates)]
    assert optimizer.clock == updates + 1


def test_refused_scheduler_leaves_edits_of_other_options(backend: Backend) -> None:
    optimizer = sign_descent(backend, RAMP)
    update(optimizer)
    optimizer.param_groups[0].update(weight_decay=0.25, eps=1e-6, mine="kept")
    for name in ("LambdaLR", "OneCycleLR"):
        with pytest.raises(RuntimeError, match="when last read"):
            attach(name, optimizer)
    group = optimizer.param_groups[0]
    assert (group["weight_decay"], group["eps"], group["mine"]) == (0.25, 1e-6, "kept")


def test_scheduler_that_only_writes_groups_is_refused_by_the_step(backend: Backend) -> None:
    """timm's schedulers wrap nothing: they keep `initial_lr` and write `lr` (timm/scheduler/scheduler.py)."""
    optimizer = sign_descent(backend, RAMP)
    update(optimizer)
    group = optimizer.param_groups[0]
    group.setdefault("initial_lr", group["lr"])
    group["lr"] = 0.5 * group["initial_lr"]
    before = snapshot(optimizer)
    with pytest.raises((RuntimeError, ValueError), match=r"(?i)schedul"):
        update(optimizer)
    assert_same(snapshot(optimizer), before)
    assert optimizer.clock == 1


def test_schedule_set_beside_a_torch_scheduler_is_refused(backend: Backend) -> None:
    optimizer = sign_descent(backend, 0.5)
    LambdaLR(optimizer, lambda epoch: 0.5**epoch)
    with pytest.raises((RuntimeError, ValueError), match=r"(?i)schedul"):
        optimizer.set_schedule(RAMP)
    assert moved(optimizer) == 0.5


def test_plateau_scheduler_drives_an_unscheduled_optimizer(backend: Backend) -> None:
    optimizer = sign_descent(backend, 0.5)
    plateau = lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=0)
    for metric in (1.0, 2.0):
        update(optimizer)
        plateau.step(metric)
    assert moved(optimizer) == 0.25


def test_plateau_scheduler_scales_a_schedule(backend: Backend) -> None:
    """It leaves no mark: nothing tells it from a user who edits the group (docs/frameworks.md)."""
    optimizer = sign_descent(backend, RAMP)
    plateau = lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=0)
    for metric in (1.0, 2.0):
        update(optimizer)
        plateau.step(metric)
    assert moved(optimizer) == 0.5 * RAMP(2)


# ---- the handle ----------------------------------------------------------------------------------


def test_handle_observes_and_never_drives(backend: Backend) -> None:
    optimizer = sign_descent(backend, RAMP)
    group_before = {k: v for k, v in optimizer.param_groups[0].items() if k != "params"}
    step_before = optimizer.step
    handle = optimizer.scheduler()
    assert isinstance(handle, LRScheduler)
    assert handle.optimizer is optimizer
    assert optimizer.step == step_before
    for index in range(3):
        assert moved(optimizer) == RAMP(index)
        for _ in range(index):
            handle.step()
        handle.step(7)
        handle.step(epoch=1)
        handle.step(32, "train_batch_size", key=1)
        assert handle.get_last_lr() == [RAMP(index)]
        assert all(type(rate) is float for rate in handle.get_last_lr())
        assert handle.last_epoch == optimizer.clock == index + 1
    assert {k: v for k, v in optimizer.param_groups[0].items() if k != "params"} == group_before


def test_handle_is_what_frameworks_ask_for(backend: Backend) -> None:
    """DeepSpeed calls what is callable and drops what is false; Accelerate changes what has `total_steps`."""
    handle = sign_descent(backend, RAMP).scheduler()
    assert not callable(handle)
    assert not hasattr(handle, "__len__")
    assert bool(handle)
    assert not hasattr(handle, "total_steps")
    assert handle.base_lrs == [RAMP.reference]
    handle._step_count += 1  # Accelerate's AcceleratedScheduler writes it


def test_handle_state_is_primitive_and_its_loading_drives_nothing(backend: Backend) -> None:
    optimizer = sign_descent(backend, RAMP)
    handle = optimizer.scheduler()
    update(optimizer)
    saved = handle.state_dict()
    assert all(isinstance(value, (int, float, str, list, type(None))) for value in saved.values())
    handle.load_state_dict(None)
    handle.load_state_dict({})
    handle.load_state_dict(saved)
    assert optimizer.clock == 1
    assert moved(optimizer) == RAMP(1)


def test_handle_of_an_unscheduled_optimizer(backend: Backend) -> None:
    optimizer = sign_descent(backend, 0.5)
    handle = optimizer.scheduler()
    update(optimizer)
    handle.step()
    assert handle.get_last_lr() == [0.5]
    assert optimizer.param_groups[0]["lr"] == 0.5
