"""Clocks and rates through checkpoints, other optimizers and engines; each was once silently wrong here."""

from __future__ import annotations

import copy

import pytest
import torch
from samples import FAST, SLOW, param, two_groups

from fused_sched import FusedScheduledAdam, schedules

# ---- clocks that travel ------------------------------------------------------------------------------


def test_clock_counts_the_steps_another_optimizer_took() -> None:
    p = param()
    ours = FusedScheduledAdam([p], lr=FAST)
    for _ in range(3):
        ours.step()
    q = p.detach().clone().requires_grad_()
    theirs = torch.optim.AdamW([q])
    theirs.load_state_dict(copy.deepcopy(ours.state_dict(portable=True)))
    for _ in range(10):
        q.grad = torch.ones(4)
        theirs.step()
    ours.load_state_dict(theirs.state_dict())
    assert ours.clock == 13


def test_flattened_checkpoint_keeps_clock_and_factor() -> None:
    from torch.distributed.checkpoint.state_dict import StateDictOptions
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict as get
    from torch.distributed.checkpoint.state_dict import set_optimizer_state_dict as put

    options = StateDictOptions(flatten_optimizer_state_dict=True)

    def make() -> tuple[torch.nn.Module, FusedScheduledAdam]:
        model = torch.nn.Linear(3, 2)
        optimizer = FusedScheduledAdam(model.parameters(), lr=schedules.linear(0.4, 0.0, 1000))
        model(torch.ones(1, 3)).sum().backward()
        return model, optimizer

    model, optimizer = make()
    optimizer.step()
    optimizer.set_clock(100)
    optimizer.param_groups[0]["lr"] *= 0.5
    flat = get(model, optimizer, options=options)
    other_model, other = make()
    put(other_model, other, flat, options=options)
    assert other.clock == 100
    other_model(torch.ones(1, 3)).sum().backward()
    other.step()
    assert other.last_lr() == [0.5 * schedules.linear(0.4, 0.0, 1000)(100)]


@pytest.mark.parametrize("portable", [False, True])
def test_factor_of_the_rate_survives_a_checkpoint(portable: bool) -> None:
    _, _, optimizer = two_groups()
    optimizer.step()
    optimizer.param_groups[0]["lr"] *= 0.5
    saved = optimizer.state_dict(portable=portable)
    _, _, other = two_groups()
    other.load_state_dict(saved)
    assert [group["lr"] for group in other.param_groups] == [0.05, 0.2]


def test_a_clock_left_in_the_groups_waits_for_a_good_step() -> None:
    p = param()
    optimizer = FusedScheduledAdam([p], lr=schedules.linear(1.0, 0.0, 100))
    optimizer.step()
    optimizer.param_groups[0]["clock"] = 50
    assert optimizer.clock == optimizer.state_dict()["param_groups"][0]["clock"] == 50
    p.grad = torch.ones(4).to_sparse()
    with pytest.raises(RuntimeError, match="sparse"):
        optimizer.step()
    assert optimizer.clock == 50
    p.grad = torch.ones(4)
    optimizer.step()
    assert (optimizer.clock, optimizer.last_lr()) == (51, [0.5])


def test_a_saved_group_that_is_added_does_not_set_the_clock() -> None:
    _, _, optimizer = two_groups()
    for _ in range(5):
        optimizer.step()
    saved = optimizer.state_dict()["param_groups"][0]
    optimizer.add_param_group({**saved, "params": [param()], "clock": 2})
    assert optimizer.clock == 5


@pytest.mark.parametrize("step", [2**53 + 1, 2**63, -1])
def test_an_impossible_clock_changes_nothing(step: int) -> None:
    _, _, optimizer = two_groups()
    optimizer.step()
    with pytest.raises(ValueError, match="clock"):
        optimizer.set_clock(step)
    assert optimizer.clock == 1


# ---- rates that were really used ---------------------------------------------------------------------


def test_rates_are_those_of_the_step_not_of_the_options_now() -> None:
    p = param()
    lr = torch.tensor(0.125)
    optimizer = FusedScheduledAdam([p], lr=lr)
    optimizer.step()
    lr.fill_(0.5)
    assert optimizer.last_lr() == optimizer.lr_tensor.tolist() == [0.125]


def test_a_skipped_step_leaves_the_rate() -> None:
    optimizer = FusedScheduledAdam([param()], lr=SLOW)
    optimizer.step()
    optimizer.param_groups[0]["lr"] = 0.5
    optimizer.found_inf = torch.ones(())
    optimizer.step()
    assert optimizer.last_lr() == optimizer.last_lr(sync=True) == [0.1]


def test_every_group_has_a_rate_before_its_first_step() -> None:
    optimizer = FusedScheduledAdam([param()], lr=schedules.linear(1.0, 0.0, 100))
    optimizer.set_clock(50)
    assert optimizer.last_lr() == [0.5]
    optimizer.step()
    optimizer.add_param_group({"params": [param()], "lr": FAST})
    assert optimizer.last_lr() == [0.5, 0.2]


def test_lr_tensor_where_an_engine_has_emptied_the_groups() -> None:
    _, _, optimizer = two_groups()
    for group in optimizer.param_groups:
        group["params"] = []
    assert optimizer.lr_tensor.shape == (2,)
