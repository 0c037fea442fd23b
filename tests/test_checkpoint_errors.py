"""Checkpoints that are refused: why, and that nothing has changed then."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import assert_same, snapshot, through_a_file
from conftest import Backend

from fused_sched import FusedScheduledAdam, ScheduleWarning, schedules


def trained(backend: Backend, master: str, moments: str, **options: Any) -> FusedScheduledAdam:
    params = [backend.parameter(torch.linspace(-2, 2, 100), torch.bfloat16) for _ in range(2)]
    groups: list[dict[str, Any]] = [{"params": params[:1]}, {"params": params[1:], "lr": 0.5}]
    optimizer = backend.optimizer(groups, master=master, moments=moments, **{"lr": 1e-3, **options})
    for index in range(3):
        for param in params:
            param.grad = torch.full_like(param, 1.0 + index)
        optimizer.step()
    return optimizer


def assert_refused(optimizer: FusedScheduledAdam, saved: Any, error: type[Exception], message: str) -> None:
    """Groups, state, parameters and clock are as they were."""
    before, clock = snapshot(optimizer), optimizer.clock
    groups = copy.deepcopy([{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups])
    if "param_groups" in saved:
        saved["param_groups"][0]["eps"] = 0.25  # would be seen
    with pytest.raises(error, match=message):
        optimizer.load_state_dict(saved)
    assert_same(snapshot(optimizer), before)
    assert optimizer.clock == clock
    assert [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups] == groups


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("exp_avg_code", torch.zeros(100), "must be a torch.uint8 tensor of shape"),
        ("exp_avg_code", torch.zeros(99, dtype=torch.uint8), "of shape \\(100,\\)"),
        ("exp_avg_scale", torch.zeros(100, dtype=torch.uint8), "of shape \\(7,\\)"),
        ("exp_avg_sq_scale", None, "give both"),
        ("master_remainder", torch.zeros(100, dtype=torch.int32), "must be a torch.int16 tensor"),
    ],
)
def test_codes_that_do_not_fit_are_refused(key: str, value: Any, message: str, backend: Backend) -> None:
    optimizer = trained(backend, "split16", "8bit")
    saved = through_a_file(optimizer.state_dict())
    if value is None:
        del saved["state"][1][key]
    else:
        saved["state"][1][key] = value
    assert_refused(optimizer, saved, ValueError, message)


@pytest.mark.parametrize(
    ("change", "message"),
    [(lambda t: t.to("meta"), "on the meta device"), (lambda t: t.to_sparse(), "of layout torch.sparse_coo")],
    ids=["meta", "sparse"],
)
def test_tensors_without_values_of_their_own_are_refused(change: Any, message: str, backend: Backend) -> None:
    optimizer = trained(backend, "split16", "fp32")
    saved = through_a_file(optimizer.state_dict())
    saved["state"][1]["exp_avg"] = change(saved["state"][1]["exp_avg"])
    assert_refused(optimizer, saved, ValueError, message)


@pytest.mark.parametrize("missing", ["exp_avg", "exp_avg_sq"])
@pytest.mark.parametrize("moments", ["fp32", "8bit"])
def test_one_moment_without_the_other_is_refused(moments: str, missing: str, backend: Backend) -> None:
    """A second moment that starts afresh under an old first one makes an update of some thirty times the rate."""
    optimizer = trained(backend, "split16", moments)
    saved = through_a_file(optimizer.state_dict())
    for key in (missing, f"{missing}_code", f"{missing}_scale"):
        saved["state"][1].pop(key, None)
    assert_refused(optimizer, saved, ValueError, "'exp_avg' and 'exp_avg_sq' or neither")
    saved["state"][1] = {}
    optimizer.load_state_dict(saved)  # which starts afresh


@pytest.mark.parametrize(
    ("spoil", "error", "message"),
    [
        (lambda sd: sd.pop("state"), TypeError, "must have a dict 'state', got none"),
        (lambda sd: sd.update(state=[]), TypeError, "must have a dict 'state', got list"),
        (lambda sd: sd.pop("param_groups"), TypeError, "must have a list 'param_groups', got none"),
        (lambda sd: sd["param_groups"][1].pop("params"), TypeError, "group 1 .* a list 'params', got the keys 'lr'"),
        (lambda sd: sd["param_groups"].append(3), TypeError, "group 2 .* a list 'params', got 3"),
        (lambda sd: sd["state"].update({1: torch.zeros(2)}), TypeError, "state of parameter 1 .* got Tensor"),
        (lambda sd: sd["param_groups"][1].update(betas=0.9), ValueError, "group 1 cannot .* a pair of numbers .* 0.9"),
        (lambda sd: sd["param_groups"][1].update(eps="x"), TypeError, "group 1 cannot .* eps must be a number"),
        (lambda sd: sd["param_groups"][1].update(clock=2**60), ValueError, r"clock must be in \[0, 2\^53\]"),
        (
            lambda sd: sd["param_groups"][1].update(amsgrad=True),
            ValueError,
            "group 1 cannot .* moments='fp32', got '8bit'",
        ),
        (lambda sd: sd["param_groups"].pop(), ValueError, "number of parameter groups, 2, got 1"),
    ],
)
def test_what_is_no_checkpoint_is_refused(
    spoil: Callable[[Any], object], error: type[Exception], message: str, backend: Backend
) -> None:
    optimizer = trained(backend, "split8", "8bit")
    saved = through_a_file(optimizer.state_dict())
    spoil(saved)
    assert_refused(optimizer, saved, error, message)


def test_warning_that_is_an_error_comes_before_the_first_change(backend: Backend) -> None:
    """As in programs run with -W error; the group before has the schedule that it was saved with."""
    saved = through_a_file(trained(backend, "split16", "fp32", lr=schedules.constant(0.25)).state_dict())
    optimizer = trained(backend, "split16", "fp32", lr=schedules.constant(0.25))
    optimizer.set_schedule(schedules.constant(0.125), group=1)
    saved["param_groups"][1]["schedules"] = saved["param_groups"][0]["schedules"]
    with warnings.catch_warnings():
        warnings.simplefilter("error", ScheduleWarning)
        assert_refused(optimizer, saved, ScheduleWarning, "another schedule for lr")
