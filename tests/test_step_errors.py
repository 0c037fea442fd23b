"""What a step refuses, and that it leaves everything as it was: parameters, state, versions, groups and clock."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import assert_same, construct_and_step, snapshot
from conftest import Backend

from fused_sched import schedules

NAN, INF = math.nan, math.inf

# ---- steps: each error leaves everything as it was -----------------------------------------------


def overlapping(backend: Backend) -> list[torch.Tensor]:
    base = torch.ones(10, device=backend.device)
    return [base[0:6].detach().requires_grad_(), base[5:10].detach().requires_grad_()]


def overlapping_behind_another(backend: Backend) -> list[torch.Tensor]:
    """A column, an element between its rows, and a row that crosses the column."""
    base = torch.ones(4, 4, device=backend.device)
    return [part.detach().requires_grad_() for part in (base[:, 0], base[0, 1:2], base[2, 0:2])]


def expanded(backend: Backend) -> list[torch.Tensor]:
    return [torch.ones(1, device=backend.device).expand(4).detach().requires_grad_()]


def self_overlapping(backend: Backend) -> list[torch.Tensor]:
    base = torch.ones(10, device=backend.device)
    return [base.as_strided((3, 4), (2, 1)).detach().requires_grad_()]


@pytest.mark.parametrize(
    "make",
    [overlapping, overlapping_behind_another, expanded, self_overlapping],
    ids=lambda make: make.__name__,
)
def test_parameters_that_overlap_are_refused(make: Callable[[Backend], list[torch.Tensor]], backend: Backend) -> None:
    params = make(backend)
    good = backend.parameter([1.0])
    before = [param.detach().clone() for param in params]
    with pytest.raises((ValueError, RuntimeError), match=r"(?i)overlap|share memory"):
        construct_and_step([good, *params], backend.name)
    assert all(torch.equal(param.detach(), value) for param, value in zip(params, before, strict=True))
    assert good.item() == 1.0


def test_same_memory_in_two_parameters_is_refused(backend: Backend) -> None:
    first = backend.parameter([1.0, 2.0])
    second = torch.nn.Parameter(first.data)
    with pytest.raises((ValueError, RuntimeError), match=r"(?i)overlap|memory"):
        construct_and_step([first, second], backend.name)
    assert first.tolist() == [1.0, 2.0]


def test_parameters_made_to_overlap_later_are_refused(backend: Backend) -> None:
    params = [backend.parameter([1.0, 2.0]), backend.parameter([3.0, 4.0])]
    optimizer = backend.optimizer(params)
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer.step()
    params[1].data = params[0].data
    before = snapshot(optimizer)
    with pytest.raises((ValueError, RuntimeError), match=r"(?i)overlap|memory"):
        optimizer.step()
    assert_same(snapshot(optimizer), before)
    assert optimizer.clock == 1


def test_interleaved_parameters_do_not_overlap(backend: Backend) -> None:
    """Columns of one matrix share its range of addresses and no element."""
    base = torch.zeros(4, 2, device=backend.device)
    params = [base[:, i].detach().requires_grad_() for i in range(2)]
    optimizer = backend.optimizer(params, lr=0.5, eps=0.0)
    for i, param in enumerate(params):
        param.grad = torch.full((4,), 1.0 - 2.0 * i, device=backend.device)
    optimizer.step()
    assert base.tolist() == [[-0.5, 0.5]] * 4


def with_sparse_grad(param: torch.Tensor) -> None:
    param.grad = torch.eye(2, device=param.device).to_sparse()


def with_complex_grad(param: torch.Tensor) -> None:
    if hasattr(param, "grad_dtype"):
        param.grad_dtype = None
    try:
        param.grad = torch.ones(2, 2, dtype=torch.complex64, device=param.device)
    except (RuntimeError, TypeError):
        param.main_grad = torch.ones(2, 2, dtype=torch.complex64, device=param.device)  # type: ignore[attr-defined]


def with_integer_main_grad(param: torch.Tensor) -> None:
    param.main_grad = torch.ones(2, 2, dtype=torch.int32, device=param.device)  # type: ignore[attr-defined]


def with_main_grad_elsewhere(param: torch.Tensor) -> None:
    param.main_grad = torch.ones(2, 2, device="meta")  # type: ignore[attr-defined]


def with_main_grad_of_another_shape(param: torch.Tensor) -> None:
    param.main_grad = torch.ones(4, device=param.device)  # type: ignore[attr-defined]


def with_nan_lr(param: torch.Tensor) -> dict[str, Any]:
    param.grad = torch.ones_like(param)
    return {"lr": NAN}


def with_beta_of_one(param: torch.Tensor) -> dict[str, Any]:
    param.grad = torch.ones_like(param)
    return {"betas": (0.9, 1.0)}


def with_negative_decay(param: torch.Tensor) -> dict[str, Any]:
    param.grad = torch.ones_like(param)
    return {"weight_decay": -1.0}


def with_infinite_eps(param: torch.Tensor) -> dict[str, Any]:
    param.grad = torch.ones_like(param)
    return {"eps": INF}


def with_unknown_master(param: torch.Tensor) -> dict[str, Any]:
    param.grad = torch.ones_like(param)
    return {"master": "half"}


def with_state_of_another_shape(param: torch.Tensor) -> dict[str, Any]:
    param.grad = torch.ones_like(param)
    return {"state": ("exp_avg", torch.zeros(3, device=param.device))}


STEP_ERRORS: list[Callable[[torch.Tensor], dict[str, Any] | None]] = [
    with_sparse_grad,
    with_complex_grad,
    with_integer_main_grad,
    with_main_grad_elsewhere,
    with_main_grad_of_another_shape,
    with_nan_lr,
    with_beta_of_one,
    with_negative_decay,
    with_infinite_eps,
    with_unknown_master,
    with_state_of_another_shape,
]


@pytest.mark.parametrize("spoil", STEP_ERRORS, ids=lambda spoil: spoil.__name__)
@pytest.mark.parametrize("updates", [0, 2])
def test_failed_step_changes_nothing(
    spoil: Callable[[torch.Tensor], dict[str, Any] | None], updates: int, backend: Backend
) -> None:
    """The spoilt parameter comes last, after good ones in two groups: none of them may have been stepped."""
    params = [backend.parameter(torch.ones(2, 2) * (i + 1)) for i in range(3)]
    groups = [{"params": params[:1], "lr": 0.1}, {"params": params[1:]}]
    optimizer = backend.optimizer(groups, lr=schedules.linear(0.1, 0.5, 4), weight_decay=0.1)
    for _ in range(updates):
        for param in params:
            param.grad = torch.ones_like(param)
        optimizer.step()
    for param in params:
        param.grad = torch.ones_like(param)
    params[-1].grad = None
    edits = spoil(params[-1]) or {}
    key_and_value = edits.pop("state", None)
    if key_and_value is not None:
        optimizer.state[params[-1]][key_and_value[0]] = key_and_value[1]
    optimizer.param_groups[-1].update(edits)

    before = snapshot(optimizer)
    versions = [param._version for param in params]
    groups_before = copy.deepcopy([{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups])
    with pytest.raises((ValueError, TypeError, RuntimeError, NotImplementedError)):
        optimizer.step()
    assert_same(snapshot(optimizer), before)
    assert [param._version for param in params] == versions
    assert repr([{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]) == repr(groups_before)
    assert optimizer.clock == updates


def test_step_goes_on_after_the_fault_is_removed(backend: Backend) -> None:
    def run(fail: bool) -> dict[str, torch.Tensor]:
        param = backend.parameter(torch.ones(2, 2))
        optimizer = backend.optimizer([param], lr=schedules.linear(0.1, 0.5, 4))
        for index in range(4):
            if fail and index in (0, 2):
                with_sparse_grad(param)
                with pytest.raises((ValueError, TypeError, RuntimeError), match=r"(?i)sparse"):
                    optimizer.step()
                param.grad = None
            param.grad = torch.full_like(param, 1.0 + index)
            optimizer.step()
        assert optimizer.clock == 4
        return snapshot(optimizer)

    assert_same(run(fail=True), run(fail=False))


@pytest.mark.parametrize(
    "name",
    ["found_inf", "grad_scale"],
)
def test_scaler_attributes_without_a_value_change_nothing(name: str, backend: Backend) -> None:
    param = backend.parameter([1.0])
    optimizer = backend.optimizer([param])
    param.grad = torch.ones_like(param)
    setattr(optimizer, name, torch.ones((), device="meta"))
    with pytest.raises((ValueError, TypeError, RuntimeError, NotImplementedError)):
        optimizer.step()
    assert param.item() == 1.0
    assert optimizer.clock == 0
