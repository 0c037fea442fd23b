"""What `lr` means: schedules, edits of groups, tensors, and what is reported back."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from cases import assert_same, snapshot
from conftest import Backend
from torch.optim.lr_scheduler import LambdaLR

from fused_sched import FusedScheduledAdam, ScheduleWarning, schedules

RAMP = schedules.linear(0.01, 0.05, 4)


def update(optimizer: torch.optim.Optimizer, grad: float = 1.0) -> None:
    for group in optimizer.param_groups:
        for param in group["params"]:
            param.grad = torch.full_like(param, grad)
    optimizer.step()


def moved(optimizer: torch.optim.Optimizer, grad: float = 1.0) -> float:
    """How far an update moves the first parameter. With betas of 0 and eps of 0 this is the learning rate."""
    param = optimizer.param_groups[0]["params"][0]
    param.data.zero_()
    update(optimizer, grad)
    return -float(param.detach()[0])


def sign_descent(backend: Backend, lr: Any, **options: Any) -> FusedScheduledAdam:
    """fp64, betas 0, eps 0: each update is lr * sign(gradient), to the last digit."""
    param = backend.parameter([0.0], torch.float64)
    return backend.optimizer([param], lr=lr, betas=(0.0, 0.0), eps=0.0, **options)


def test_untouched_group_gets_exactly_the_schedule(backend: Backend) -> None:
    optimizer = sign_descent(backend, RAMP)
    for index in range(7):
        assert moved(optimizer) == RAMP(index)
        assert optimizer.last_lr() == [RAMP(index)]
        assert optimizer.last_lr(sync=True) == [RAMP(index)]


@pytest.mark.parametrize("schedule", [RAMP, schedules.warmup_cosine(0.3, warmup_steps=2, total_steps=9)], ids=repr)
def test_group_lr_starts_as_the_reference_and_is_never_written(schedule: Any, backend: Backend) -> None:
    optimizer = sign_descent(backend, schedule)
    group = optimizer.param_groups[0]
    assert group["lr"] == group["lr_reference"] == schedule.reference
    for _ in range(3):
        update(optimizer)
    assert group["lr"] == group["lr_reference"] == schedule.reference
    assert type(group["lr"]) is float


@pytest.mark.parametrize("factor", [0.5, 3.0, 0.0])
def test_scaling_group_lr_scales_the_schedule(factor: float, backend: Backend) -> None:
    optimizer = sign_descent(backend, RAMP)
    update(optimizer)
    optimizer.param_groups[0]["lr"] *= factor
    for index in (1, 2):
        # The ratio of two floats is rounded once, and so is its product with the schedule.
        assert moved(optimizer) == pytest.approx(factor * RAMP(index), rel=4 * 2.0**-53, abs=0.0)
    assert optimizer.last_lr()[0] == pytest.approx(factor * RAMP(2), rel=4 * 2.0**-53)


def test_zero_lr_keeps_the_weights_and_moves_the_moments(backend: Backend) -> None:
    param = backend.parameter([1.0, -2.0])
    optimizer = backend.optimizer([param], lr=RAMP, weight_decay=0.5)
    optimizer.param_groups[0]["lr"] = 0.0
    update(optimizer)
    assert param.tolist() == [1.0, -2.0]
    assert optimizer.state[param]["exp_avg"].any()
    assert optimizer.clock == 1


def test_edited_lr_beside_a_reference_of_zero_raises(backend: Backend) -> None:
    optimizer = sign_descent(backend, schedules.constant(0.0))
    update(optimizer)
    optimizer.param_groups[0]["lr"] = 0.1
    before = snapshot(optimizer)
    with pytest.raises((ValueError, RuntimeError), match=r"reference"):
        update(optimizer)
    assert_same(snapshot(optimizer), before)
    assert optimizer.clock == 1


def test_groups_have_schedules_of_their_own(backend: Backend) -> None:
    params = [backend.parameter([0.0], torch.float64) for _ in range(3)]
    optimizer = backend.optimizer(
        [{"params": [params[0]]}, {"params": [params[1]], "lr": RAMP}, {"params": [params[2]], "lr": 0.125}],
        lr=schedules.constant(0.5),
        betas=(0.0, 0.0),
        eps=0.0,
    )
    update(optimizer)
    assert [-param.item() for param in params] == [0.5, RAMP(0), 0.125]
    assert optimizer.last_lr() == [0.5, RAMP(0), 0.125]


@pytest.mark.parametrize("key", ["lr", "betas", "eps", "weight_decay", "maximize"])
def test_edits_of_plain_hyperparameters_reach_the_next_step(key: str, backend: Backend) -> None:
    values = {"lr": 0.25, "betas": (0.5, 0.25), "eps": 0.5, "weight_decay": 0.5, "maximize": True}
    start = {"lr": 0.1, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1, "maximize": False}
    edited = backend.optimizer([backend.parameter([1.0, 2.0])], **start)
    edited.param_groups[0][key] = values[key]
    made = backend.optimizer([backend.parameter([1.0, 2.0])], **{**start, key: values[key]})
    untouched = backend.optimizer([backend.parameter([1.0, 2.0])], **start)
    for optimizer in (edited, made, untouched):
        update(optimizer)
        update(optimizer, grad=2.0)
    assert_same(snapshot(edited), snapshot(made))
    assert not torch.equal(snapshot(edited)["0.param"], snapshot(untouched)["0.param"])


def test_groups_keep_their_schedules_when_an_engine_drops_others(backend: Backend) -> None:
    """DeepSpeed filters empty groups out of `param_groups`, which moves the others up (engine.py)."""

    def make() -> FusedScheduledAdam:
        groups = [{"params": [backend.parameter([0.0])], "lr": lr} for lr in (0.5, RAMP)]
        optimizer = backend.optimizer(groups, lr=0.5)
        optimizer.param_groups[:] = optimizer.param_groups[1:]
        return optimizer

    optimizer = make()
    for index in range(3):
        update(optimizer)
        assert optimizer.lr_tensor[-1].item() == optimizer.last_lr()[-1] == RAMP(index)
    saved, other = optimizer.state_dict(), make()
    with warnings.catch_warnings():
        warnings.simplefilter("error", ScheduleWarning)
        other.load_state_dict(saved)
    update(other)
    assert other.last_lr()[-1] == RAMP(3)


def test_a_group_whose_schedule_cannot_be_known_is_refused(backend: Backend) -> None:
    optimizer = backend.optimizer([{"params": [backend.parameter([0.0])], "lr": lr} for lr in (0.5, RAMP)])
    optimizer.param_groups = [dict(optimizer.param_groups[1])]
    with pytest.raises(RuntimeError, match="add_param_group"):
        update(optimizer)
    assert optimizer.clock == 0
    assert not optimizer.state


def test_new_dicts_for_all_groups_stand_for_the_old_ones(backend: Backend) -> None:
    optimizer = backend.optimizer([{"params": [backend.parameter([0.0])], "lr": lr} for lr in (0.5, RAMP)])
    optimizer.param_groups = [dict(group) for group in optimizer.param_groups]
    for index in range(3):
        update(optimizer)
        assert optimizer.lr_tensor.tolist() == optimizer.last_lr() == [0.5, RAMP(index)]


# ---- set_schedule --------------------------------------------------------------------------------


def test_set_schedule_keeps_the_ratio_of_an_edited_lr(backend: Backend) -> None:
    optimizer = sign_descent(backend, RAMP)
    update(optimizer)
    group = optimizer.param_groups[0]
    group["lr"] *= 0.5
    optimizer.set_schedule(schedules.constant(0.25))
    assert (group["lr"], group["lr_reference"]) == (0.125, 0.25)
    assert moved(optimizer) == 0.125
    assert optimizer.clock == 2


def test_set_schedule_takes_effect_at_the_clock_where_it_is(backend: Backend) -> None:
    optimizer = sign_descent(backend, 0.5)
    for _ in range(3):
        update(optimizer)
    optimizer.set_schedule(RAMP)
    assert moved(optimizer) == RAMP(3)


def test_set_schedule_of_one_group(backend: Backend) -> None:
    params = [backend.parameter([0.0]), backend.parameter([0.0])]
    optimizer = backend.optimizer([{"params": [p]} for p in params], lr=schedules.constant(0.5))
    optimizer.set_schedule(RAMP, group=1)
    update(optimizer)
    assert optimizer.last_lr() == [0.5, RAMP(0)]


@pytest.mark.parametrize("hyperparameter", ["beta1", "beta2", "weight_decay"])
def test_set_schedule_of_other_hyperparameters(hyperparameter: str, backend: Backend) -> None:
    schedule = schedules.linear(0.5, 0.9, 4)
    options: dict[str, Any] = {"lr": 0.1, "betas": (0.5, 0.5), "weight_decay": 0.5}
    later = backend.optimizer([backend.parameter([1.0])], **options)
    later.set_schedule(schedule, hyperparameter=hyperparameter)
    if hyperparameter == "weight_decay":
        options["weight_decay"] = schedule
    else:
        options["betas"] = (schedule, 0.5) if hyperparameter == "beta1" else (0.5, schedule)
    made = backend.optimizer([backend.parameter([1.0])], **options)
    for optimizer in (later, made):
        for grad in (1.0, -3.0, 2.0):
            update(optimizer, grad)
    assert_same(snapshot(later), snapshot(made))


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"schedule": "cosine"}, (TypeError, ValueError)),
        ({"schedule": RAMP, "hyperparameter": "eps"}, ValueError),
        ({"schedule": RAMP, "group": 1}, (IndexError, ValueError)),
        ({"schedule": schedules.constant(1.0), "hyperparameter": "beta1"}, ValueError),
        ({"schedule": schedules.linear(0.5, 1.5, 3), "hyperparameter": "beta2"}, ValueError),
    ],
    ids=["name", "eps", "group", "beta1", "beta2"],
)
def test_set_schedule_refuses(arguments: dict[str, Any], error: Any, backend: Backend) -> None:
    optimizer = sign_descent(backend, RAMP)
    with pytest.raises(error):
        optimizer.set_schedule(**arguments)
    assert moved(optimizer) == RAMP(0)


# ---- tensors -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_tensor_lr_is_read_where_it_lives(dtype: torch.dtype, backend: Backend) -> None:
    lr = torch.tensor(0.5, dtype=dtype, device=backend.device)
    optimizer = sign_descent(backend, lr)
    assert moved(optimizer) == 0.5
    lr.fill_(0.125)
    assert moved(optimizer) == 0.125
    assert optimizer.last_lr(sync=True) == [0.125]
    optimizer.param_groups[0]["lr"] = torch.tensor(0.25, dtype=dtype, device=backend.device)
    assert moved(optimizer) == 0.25


def test_torch_schedulers_may_drive_a_tensor_lr(backend: Backend) -> None:
    optimizer = sign_descent(backend, torch.tensor(0.5, device=backend.device))
    scheduler = LambdaLR(optimizer, lambda epoch: 0.5**epoch)
    for epoch in range(3):
        assert moved(optimizer) == 0.5 * 0.5**epoch
        scheduler.step()


def test_tensor_lr_of_more_than_one_element_is_refused(backend: Backend) -> None:
    with pytest.raises((ValueError, TypeError)):
        sign_descent(backend, torch.tensor([0.5, 0.25], device=backend.device))


# ---- reporting -----------------------------------------------------------------------------------


def test_lr_tensor_holds_the_rates_just_used(backend: Backend) -> None:
    params = [backend.parameter([0.0]), backend.parameter([0.0])]
    optimizer = backend.optimizer([{"params": [params[0]]}, {"params": [params[1]], "lr": 0.5}], lr=RAMP)
    for index in range(3):
        update(optimizer)
        rates = optimizer.lr_tensor
        assert (rates.shape, rates.dtype, rates.device.type) == ((2,), torch.float64, backend.device.type)
        assert rates.tolist() == [RAMP(index), 0.5]
    optimizer.add_param_group({"params": [backend.parameter([0.0])], "lr": 0.25})
    assert optimizer.lr_tensor.isnan().tolist() == [False, False, True]  # took part in no step yet


def test_last_lr_is_floats_of_the_latest_step(backend: Backend) -> None:
    optimizer = sign_descent(backend, RAMP)
    update(optimizer)
    optimizer.param_groups[0]["lr"] *= 0.5
    rates = optimizer.last_lr()
    assert rates == [RAMP(0)]
    assert all(type(rate) is float for rate in rates)


def test_skipped_step_is_seen_by_the_synchronising_read(backend: Backend) -> None:
    optimizer = sign_descent(backend, RAMP)
    update(optimizer)
    optimizer.found_inf = torch.ones((), device=backend.device)
    update(optimizer)
    assert optimizer.last_lr(sync=True) == [RAMP(0)]
    optimizer.found_inf = torch.zeros((), device=backend.device)
    update(optimizer)
    assert optimizer.last_lr(sync=True) == optimizer.last_lr() == [RAMP(1)]
