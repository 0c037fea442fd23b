"""Saving, loading, resuming: bit for bit, and in place."""

from __future__ import annotations

import copy
import warnings
from collections import namedtuple
from typing import Any

import numpy as np
import pytest
import torch
from cases import CASES, COMPRESSED, Case, Problem, assert_same, by_name, snapshot, through_a_file
from conftest import Backend

import fused_sched
from fused_sched import FusedScheduledAdam, schedules

HALF = 3

Pair = namedtuple("Pair", "first second")

each_case = pytest.mark.parametrize("case", [*CASES, *COMPRESSED], ids=str)


def copied_params(problem: Problem) -> list[torch.Tensor]:
    return [param.detach().clone() for param in problem.params]


def resumed(case: Case, backend: Backend, saved: Any, weights: list[torch.Tensor]) -> tuple[Problem, Any]:
    """A new process: parameters and optimizer made anew, then loaded."""
    problem = Problem(case, backend.device)
    for _ in range(HALF):
        problem.set_grads()  # the gradients continue where they were
    with torch.no_grad():
        for param, weight in zip(problem.params, weights, strict=True):
            param.copy_(weight)
    optimizer = problem.optimizer(backend.name)
    optimizer.load_state_dict(saved)
    return problem, optimizer


@each_case
def test_resumed_training_is_the_uninterrupted_one(case: Case, backend: Backend) -> None:
    problem = Problem(case, backend.device)
    optimizer = problem.optimizer(backend.name)
    problem.run(optimizer, HALF)
    saved, weights = through_a_file(optimizer.state_dict()), copied_params(problem)
    problem.run(optimizer, HALF)

    problem, again = resumed(case, backend, saved, weights)
    assert again.clock == HALF
    problem.run(again, HALF)
    assert_same(snapshot(again), snapshot(optimizer))
    assert again.clock == optimizer.clock == 2 * HALF
    assert again.last_lr() == optimizer.last_lr()


@each_case
def test_portable_state_resumes_the_same_way(case: Case, backend: Backend) -> None:
    problem = Problem(case, backend.device)
    optimizer = problem.optimizer(backend.name)
    problem.run(optimizer, HALF)
    saved, weights = through_a_file(optimizer.state_dict(portable=True)), copied_params(problem)
    for state in saved["state"].values():
        for key in ("exp_avg", "exp_avg_sq"):
            assert state[key].dtype in (torch.float32, torch.float64)
    problem.run(optimizer, HALF)
    problem, again = resumed(case, backend, saved, weights)
    problem.run(again, HALF)
    assert_same(snapshot(again), snapshot(optimizer))


def test_backends_read_each_others_checkpoints(beside_cpu: Backend, get_backend: Any) -> None:
    """The live backend wins, and a run moves between the compiled ones without changing a bit."""
    case = by_name("all_dtypes_in_a_group")
    cpu = get_backend("cpu")
    problem = Problem(case, cpu.device)
    optimizer = problem.optimizer("cpu")
    problem.run(optimizer, HALF)
    saved, weights = optimizer.state_dict(), copied_params(problem)
    saved = through_a_file(saved)
    problem.run(optimizer, HALF)
    problem, other = resumed(case, beside_cpu, saved, weights)
    problem.run(other, HALF)
    assert_same(snapshot(other), snapshot(optimizer))


def test_loading_copies_into_existing_buffers(backend: Backend) -> None:
    case = by_name("all_dtypes_in_a_group")
    problem = Problem(case, backend.device)
    optimizer = problem.optimizer(backend.name)
    problem.run(optimizer, HALF)
    saved = through_a_file(optimizer.state_dict())
    at_saving = snapshot(optimizer)
    problem.run(optimizer, 1)

    def addresses() -> dict[int, dict[str, int]]:
        return {
            position: {
                key: value.data_ptr()
                for key, value in optimizer.state[param].items()
                if isinstance(value, torch.Tensor)
            }
            for position, param in enumerate(problem.params)
        }

    before, rates = addresses(), optimizer.lr_tensor.data_ptr()
    optimizer.load_state_dict(saved)
    assert addresses() == before
    assert optimizer.lr_tensor.data_ptr() == rates
    loaded = {key: value for key, value in snapshot(optimizer).items() if not key.endswith("param")}
    assert_same(loaded, {key: value for key, value in at_saving.items() if not key.endswith("param")})
    problem.run(optimizer, 1)
    assert addresses() == before


def test_loading_does_not_keep_the_loaded_tensors(backend: Backend) -> None:
    param = backend.parameter([1.0, 2.0])
    optimizer = backend.optimizer([param])
    param.grad = torch.ones_like(param)
    optimizer.step()
    saved = copy.deepcopy(optimizer.state_dict())
    optimizer.load_state_dict(saved)
    value = saved["state"][0]["exp_avg"].clone()
    optimizer.step()
    assert torch.equal(saved["state"][0]["exp_avg"], value)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_float32_state_of_16_bit_parameters_stays_float32(dtype: torch.dtype, backend: Backend) -> None:
    """torch's own loading casts state to the parameter's dtype and would lose 16 bits of each moment."""
    param = backend.parameter([1.0, 2.0], dtype)
    optimizer = backend.optimizer([param], lr=1e-3)
    param.grad = torch.tensor([1.0 / 3.0, 0.7], dtype=dtype, device=backend.device)
    for _ in range(3):
        optimizer.step()
    before = snapshot(optimizer)
    optimizer.load_state_dict(through_a_file(optimizer.state_dict()))
    assert_same(snapshot(optimizer), before)
    assert optimizer.state[param]["exp_avg"].dtype == torch.float32


def test_state_dict_holds_tensors_and_primitives(backend: Backend) -> None:
    def check(value: Any) -> None:
        if isinstance(value, dict):
            assert all(type(key) in (str, int) for key in value)
            for item in value.values():
                check(item)
        elif isinstance(value, (list, tuple)):
            for item in value:
                check(item)
        else:
            assert type(value) in (torch.Tensor, int, float, bool, str, type(None)), value

    problem = Problem(by_name("groups_of_their_own"), backend.device)
    optimizer = problem.optimizer(backend.name)
    check(optimizer.state_dict())
    problem.run(optimizer, 2)
    saved = optimizer.state_dict()
    check(saved)
    check(optimizer.state_dict(portable=True))
    clocks = [
        [key for key, value in group.items() if type(value) is int and value == 2] for group in saved["param_groups"]
    ]
    assert all(clocks), "every group carries the clock"


def test_numpys_numbers_are_saved_as_pythons(backend: Backend) -> None:
    """`weights_only=True` refuses NumPy's, which nobody notices before the run is to be resumed."""
    param = backend.parameter([1.0, -2.0])
    optimizer = backend.optimizer([param], lr=np.float64(0.25), betas=(np.float32(0.5), 0.75), eps=np.float64(1e-6))
    optimizer.param_groups[0]["weight_decay"] = np.float32(0.5)
    for portable in (False, True):
        group = through_a_file(optimizer.state_dict(portable=portable))["param_groups"][0]
        assert [group[key] for key in ("lr", "betas", "eps", "weight_decay")] == [0.25, (0.5, 0.75), 1e-6, 0.5]


def test_options_of_the_users_own_kind_are_kept(backend: Backend) -> None:
    shape = torch.Size([2, 3])  # a tuple that is made of one argument, as a named one is of several
    optimizer = backend.optimizer([{"params": [backend.parameter([1.0])], "mine": shape, "named": Pair(1, 2)}])
    group = optimizer.state_dict()["param_groups"][0]
    assert (group["mine"], group["named"]) == (shape, Pair(1, 2))


def test_a_step_that_is_no_count_is_none(backend: Backend) -> None:
    param = backend.parameter([1.0])
    optimizer = backend.optimizer([param])
    param.grad = torch.ones_like(param)
    optimizer.step()
    optimizer.state[param]["step"] = torch.tensor(float("nan"))
    assert optimizer.state_dict()["param_groups"][0]["clock_step"] in (0, 1)


def test_state_of_parameters_that_an_engine_hides_waits_for_them(backend: Backend) -> None:
    params = [backend.parameter([1.0]) for _ in range(2)]
    optimizer = backend.optimizer([{"params": [p]} for p in params], lr=0.1)
    groups = optimizer.param_groups
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer.step()
    optimizer.param_groups = groups[1:]
    optimizer.step()
    optimizer.state[params[1]]["exp_avg"] = torch.zeros(1, device=backend.device)
    optimizer.param_groups = groups[:1]
    optimizer.load_state_dict(backend.optimizer([{"params": [params[0]], "lr": 0.1}]).state_dict())
    optimizer.param_groups = groups[1:]
    optimizer.step()
    assert optimizer.state[params[1]]["exp_avg"].item() == pytest.approx(0.1)


@pytest.mark.parametrize("shapes", [((), (1,)), ((1,), ())], ids=str)
def test_a_tensor_rate_is_loaded_into_one_of_another_shape(shapes: Any, backend: Backend) -> None:
    saved, live = (torch.full(shape, value) for shape, value in zip(shapes, (0.25, 0.5), strict=True))
    first, second = (backend.optimizer([backend.parameter([1.0])], lr=lr) for lr in (saved, live))
    second.load_state_dict(through_a_file(first.state_dict()))
    assert second.param_groups[0]["lr"] is live
    assert live.item() == 0.25


def test_checkpoint_before_the_first_step(backend: Backend) -> None:
    optimizer = backend.optimizer([backend.parameter([1.0])], lr=schedules.linear(0.0, 1.0, 4))
    saved = through_a_file(optimizer.state_dict())
    other = backend.optimizer([backend.parameter([1.0])], lr=schedules.linear(0.0, 1.0, 4))
    other.load_state_dict(saved)
    assert other.clock == 0
    assert not other.state


def test_saved_tensors_do_not_change_with_training(backend: Backend) -> None:
    """As torch's: `state_dict()` refers to live tensors, so a copy is the caller's to make; a file is one."""
    problem = Problem(by_name("defaults"), backend.device)
    optimizer = problem.optimizer(backend.name)
    problem.run(optimizer, 1)
    saved = through_a_file(optimizer.state_dict())
    value = saved["state"][0]["exp_avg"].clone()
    problem.run(optimizer, 1)
    assert torch.equal(saved["state"][0]["exp_avg"], value)
    assert not torch.equal(optimizer.state[problem.params[0]]["exp_avg"].cpu(), value.cpu())


# ---- what wins -----------------------------------------------------------------------------------


def trained(backend: Backend, updates: int = 3, **options: Any) -> FusedScheduledAdam:
    param = backend.parameter([1.0, -2.0], options.pop("dtype", torch.float32))
    optimizer = backend.optimizer([param], **options)
    for index in range(updates):
        param.grad = torch.full_like(param, 1.0 + index)
        optimizer.step()
    return optimizer


def test_hyperparameters_come_from_the_checkpoint(backend: Backend) -> None:
    saved = trained(backend, lr=0.25, betas=(0.5, 0.75), eps=1e-3, weight_decay=0.5, maximize=True).state_dict()
    other = trained(backend, 0)
    other.load_state_dict(saved)
    group = other.param_groups[0]
    assert (group["lr"], group["eps"], group["weight_decay"], group["maximize"]) == (0.25, 1e-3, 0.5, True)
    assert tuple(group["betas"]) == (0.5, 0.75)


def test_edited_lr_keeps_its_ratio_over_a_checkpoint(backend: Backend) -> None:
    schedule = schedules.linear(0.5, 0.25, 8)
    first = trained(backend, lr=schedule)
    first.param_groups[0]["lr"] *= 0.5
    saved = first.state_dict()
    other = trained(backend, 0, lr=schedule)
    other.load_state_dict(saved)
    group = other.param_groups[0]
    assert (group["lr"], group["lr_reference"]) == (0.25, 0.5)


def test_constructors_schedule_wins_and_a_different_saved_one_warns(backend: Backend) -> None:
    saved = trained(backend, lr=schedules.linear(0.5, 0.25, 8)).state_dict()
    new = schedules.constant(0.125)
    other = trained(backend, 0, lr=new)
    with pytest.warns(fused_sched.ScheduleWarning):
        other.load_state_dict(saved)
    group = other.param_groups[0]
    assert (group["lr"], group["lr_reference"]) == (0.125, 0.125)
    param = group["params"][0]
    param.grad = torch.ones_like(param)
    other.step()
    assert other.last_lr() == [0.125]
    assert other.clock == 4


def test_same_schedule_does_not_warn(backend: Backend) -> None:
    schedule = schedules.warmup_cosine(0.1, warmup_steps=2, total_steps=9)
    saved = through_a_file(trained(backend, lr=schedule).state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trained(backend, 0, lr=schedule).load_state_dict(saved)


def test_live_master_wins_and_state_is_converted(backend: Backend) -> None:
    options: dict[str, Any] = {"lr": 1e-3, "dtype": torch.bfloat16}
    with_master = trained(backend, master="fp32", **options)
    without = trained(backend, master="none", **options)
    exp_avg = without.state[without.param_groups[0]["params"][0]]["exp_avg"].clone()
    saved = through_a_file(without.state_dict())
    with_master.load_state_dict(saved)
    param = with_master.param_groups[0]["params"][0]
    param.grad = torch.zeros_like(param)
    with_master.param_groups[0]["lr"] = 0.0
    with_master.step()
    state = with_master.state[param]
    # lr = 0 leaves the master at what the parameter held.
    assert torch.equal(state["master"], param.detach().float())
    torch.testing.assert_close(state["exp_avg"], 0.9 * exp_avg, rtol=1e-6, atol=0)


def test_checkpoint_of_another_model_is_refused_and_changes_nothing(backend: Backend) -> None:
    optimizer = trained(backend, lr=schedules.constant(0.5))
    before, group_before = snapshot(optimizer), dict(optimizer.param_groups[0])
    saved = through_a_file(optimizer.state_dict())
    saved["state"][0]["exp_avg"] = torch.zeros(5)
    saved["param_groups"][0]["lr"] = 0.125
    with pytest.raises((ValueError, RuntimeError)):
        optimizer.load_state_dict(saved)
    too_many = through_a_file(optimizer.state_dict())
    too_many["param_groups"][0]["params"] = [0, 1]
    with pytest.raises(ValueError, match=r"(?i)param"):
        optimizer.load_state_dict(too_many)
    assert_same(snapshot(optimizer), before)
    assert optimizer.clock == 3
    assert {k: v for k, v in optimizer.param_groups[0].items() if k != "params"} == {
        k: v for k, v in group_before.items() if k != "params"
    }


def test_saved_group_keys_written_into_live_groups_set_the_clock(backend: Backend) -> None:
    """DeepSpeed's universal checkpoint assigns group keys and state one by one (base_optimizer.py)."""
    schedule = schedules.linear(0.5, 0.25, 8)
    saved = through_a_file(trained(backend, lr=schedule).state_dict())
    other = trained(backend, 0, lr=schedule)
    for group, saved_group in zip(other.param_groups, saved["param_groups"], strict=True):
        group.update({key: value for key, value in saved_group.items() if key != "params"})
    param = other.param_groups[0]["params"][0]
    param.grad = torch.ones_like(param)
    other.step()
    assert other.last_lr() == [schedule(3)]
    assert other.clock == 4
