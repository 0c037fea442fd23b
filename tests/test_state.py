"""State as users and engines see and change it: `state[p]`, its arenas, and parameters that move."""

from __future__ import annotations

import gc
import io
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import Problem, assert_same, by_name, same_bits, snapshot
from conftest import Backend

from fused_sched import FusedScheduledAdam, schedules

RAMP = schedules.linear(0.01, 0.05, 4)
GRADS = (1.0, -3.0, 2.0, 0.5)


def make(backend: Backend, dtype: torch.dtype = torch.float32, **options: Any) -> FusedScheduledAdam:
    params = [backend.parameter([1.0, -2.0, 3.0], dtype), backend.parameter([[0.5], [4.0]], dtype)]
    return backend.optimizer(params, **{"lr": RAMP, "weight_decay": 0.1, **options})


def params_of(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    return [param for group in optimizer.param_groups for param in group["params"]]


def train(optimizer: torch.optim.Optimizer, first: int, last: int) -> None:
    for index in range(first, last):
        for param in params_of(optimizer):
            param.grad = torch.full_like(param, GRADS[index])
        optimizer.step()


# ---- what it looks like --------------------------------------------------------------------------


def test_state_has_torchs_keys_shapes_and_dtypes(backend: Backend) -> None:
    optimizer = make(backend, amsgrad=True)
    train(optimizer, 0, 1)
    for param in params_of(optimizer):
        state = optimizer.state[param]
        for key in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"):
            assert (state[key].shape, state[key].dtype, state[key].device) == (
                param.shape,
                torch.float32,
                param.device,
            )
        assert (state["step"].shape, state["step"].dtype) == ((), torch.float32)
        assert float(state["step"]) == 1


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [(torch.bfloat16, torch.float32), (torch.float16, torch.float32), (torch.float64, torch.float64)],
    ids=str,
)
def test_moments_are_at_least_float32(dtype: torch.dtype, expected: torch.dtype, backend: Backend) -> None:
    optimizer = make(backend, dtype)
    train(optimizer, 0, 1)
    state = optimizer.state[params_of(optimizer)[0]]
    assert state["exp_avg"].dtype == state["exp_avg_sq"].dtype == expected


def test_state_is_made_by_the_first_step_and_only_for_gradients(backend: Backend) -> None:
    optimizer = make(backend)
    first, second = params_of(optimizer)
    assert len(optimizer.state) == 0
    first.grad = torch.ones_like(first)
    optimizer.step()
    assert first in optimizer.state
    assert not optimizer.state.get(second)


# ---- memory --------------------------------------------------------------------------------------


def test_saving_one_state_tensor_saves_its_elements_only(backend: Backend) -> None:
    small, large = backend.parameter(torch.ones(4)), backend.parameter(torch.ones(100_000))
    optimizer = backend.optimizer([small, large])
    for param in (small, large):
        param.grad = torch.ones_like(param)
    optimizer.step()
    buffer = io.BytesIO()
    torch.save(optimizer.state[small]["exp_avg"], buffer)
    # A .pt file of four floats is 1-2 KB of zip; the arena would be 400 KB.
    assert buffer.tell() < 10_000


def test_state_tensors_outlive_the_optimizer(backend: Backend) -> None:
    optimizer = make(backend)
    train(optimizer, 0, 2)
    kept = optimizer.state[params_of(optimizer)[0]]["exp_avg"]
    value = kept.clone()
    del optimizer
    gc.collect()
    torch.ones(1000, device=backend.device).zero_()
    assert torch.equal(kept, value)


def test_optimizer_is_freed_with_its_last_reference(backend: Backend) -> None:
    optimizer = make(backend)
    optimizer.scheduler()
    train(optimizer, 0, 1)
    alive = weakref.ref(optimizer)
    del optimizer
    gc.collect()
    assert alive() is None


def test_gradients_are_not_kept_alive(backend: Backend) -> None:
    """A kept gradient is four bytes per parameter that `zero_grad()` was to free."""
    optimizer = make(backend)
    first = weakref.ref(params_of(optimizer)[0])
    kept = []
    for index in range(3):
        train(optimizer, index, index + 1)
        param = params_of(optimizer)[0]
        assert param.grad is not None
        kept.append(weakref.ref(param.grad))
        optimizer.zero_grad()
        del param
    gc.collect()
    assert [grad() is None for grad in kept] == [True, True, True]
    assert first() is not None


def test_parameters_are_not_kept_alive_by_a_swapping_engine(backend: Backend) -> None:
    """ZeRO replaces a model's parameters by flat ones and frees the former."""
    optimizer = make(backend)
    train(optimizer, 0, 1)
    old = weakref.ref(params_of(optimizer)[0])
    optimizer.state.clear()
    optimizer.param_groups[0]["params"] = [backend.parameter([1.0])]
    train(optimizer, 1, 2)
    gc.collect()
    assert old() is None


def test_state_memory_is_freed_with_its_state(backend: Backend) -> None:
    """Resident memory, because an arena's storage may be held where no Python reference shows."""
    if backend.device.type != "cpu":
        before = torch.cuda.memory_allocated()
    elements = 24 << 20  # of 64 MB and less the C library may keep what others have freed

    def resident() -> int:
        if backend.device.type != "cpu":
            return torch.cuda.memory_allocated() - before
        with open("/proc/self/statm") as statm:
            return int(statm.read().split()[1]) * 4096

    param = torch.nn.Parameter(torch.ones(elements, device=backend.device))
    param.grad = torch.ones_like(param)
    optimizer = backend.optimizer([param])
    gc.collect()
    start = resident()
    optimizer.step()
    grown = resident() - start
    assert grown >= 2 * 4 * elements * 0.9
    optimizer.state.clear()
    gc.collect()
    assert resident() - start <= 0.25 * grown


@pytest.mark.parametrize(
    ("dtype", "options", "expected"),
    [
        (torch.float32, {}, 8.0),
        (torch.float32, {"amsgrad": True}, 12.0),
        (torch.bfloat16, {"master": "fp32"}, 12.0),
        (torch.bfloat16, {"master": "none"}, 8.0),
        (torch.bfloat16, {}, 10.0),
        (torch.bfloat16, {"moments": "bf16"}, 6.0),
        (torch.bfloat16, {"master": "split8", "moments": "bf16"}, 5.0),
        (torch.bfloat16, {"moments": "8bit"}, 4.125),
        (torch.bfloat16, {"master": "split8", "moments": "8bit"}, 3.125),
        (torch.bfloat16, {"master": "stochastic", "moments": "bf16"}, 4.0),
        (torch.float32, {"moments": "8bit"}, 2.125),
        (torch.float16, {"master": "fp32"}, 12.0),
        (torch.float64, {}, 16.0),
    ],
    ids=str,
)
def test_bytes_per_param_counts_what_is_allocated(
    dtype: torch.dtype, options: dict[str, Any], expected: float, backend: Backend
) -> None:
    # A multiple of the padding of 256 elements, so that padding does not enter.
    param = backend.parameter(torch.ones(4096), dtype)
    optimizer = backend.optimizer([param], **options)
    param.grad = torch.ones_like(param)
    optimizer.step()
    # Counts of steps may be included or not: 16 bytes of 4096 elements.
    assert optimizer.bytes_per_param() == pytest.approx(expected, rel=0.002)


# ---- changed behind our back ---------------------------------------------------------------------


def double_in_place(state: dict[str, Any]) -> None:
    state["exp_avg"].mul_(2.0)


def double_by_replacing(state: dict[str, Any]) -> None:
    state["exp_avg"] = state["exp_avg"] * 2.0


def double_in_float64(state: dict[str, Any]) -> None:
    state["exp_avg"] = state["exp_avg"].double() * 2.0


def double_not_contiguous(state: dict[str, Any]) -> None:
    doubled = state["exp_avg"] * 2.0
    state["exp_avg"] = torch.stack([doubled, doubled], dim=-1)[..., 0]


def double_by_update(state: dict[str, Any]) -> None:
    state.update(exp_avg=state["exp_avg"] * 2.0)


def double_by_data(state: dict[str, Any]) -> None:
    state["exp_avg"].data = state["exp_avg"] * 2.0


@pytest.mark.parametrize(
    "edit",
    [
        double_in_place,
        double_by_replacing,
        double_in_float64,
        double_not_contiguous,
        double_by_update,
        double_by_data,
    ],
    ids=lambda edit: edit.__name__,
)
def test_edited_moment_is_used(edit: Callable[[dict[str, Any]], None], backend: Backend) -> None:
    edited, expected = make(backend), make(backend)
    for optimizer in (edited, expected):
        train(optimizer, 0, 2)
        edit_of = edit if optimizer is edited else double_in_place
        for param in params_of(optimizer):
            edit_of(optimizer.state[param])
        train(optimizer, 2, 4)
    assert_same(snapshot(edited), snapshot(expected))


@pytest.mark.parametrize("value", [7, 7.0, torch.tensor(7.0), torch.tensor(7), torch.tensor([7.0])], ids=repr)
def test_replaced_step_is_used(value: Any, backend: Backend) -> None:
    replaced, filled = make(backend), make(backend)
    for optimizer in (replaced, filled):
        train(optimizer, 0, 2)
        for param in params_of(optimizer):
            if optimizer is replaced:
                optimizer.state[param]["step"] = value
            else:
                optimizer.state[param]["step"].fill_(7.0)
        train(optimizer, 2, 3)
        assert all(float(optimizer.state[param]["step"]) == 8 for param in params_of(optimizer))
    assert_same(snapshot(replaced), snapshot(filled))
    assert replaced.clock == 3


def test_one_step_tensor_shared_by_parameters_counts_each_once(backend: Backend) -> None:
    """DeepSpeed's universal checkpoint of ZeRO-3 hands one tensor to all sub-groups (stage3.py)."""
    optimizer = make(backend)
    train(optimizer, 0, 1)
    shared = torch.tensor(3.0)
    for param in params_of(optimizer):
        optimizer.state[param]["step"] = shared
    train(optimizer, 1, 2)
    assert [float(optimizer.state[param]["step"]) for param in params_of(optimizer)] == [4, 4]
    assert float(shared) == 3.0


def test_cleared_state_starts_again(backend: Backend) -> None:
    optimizer = make(backend)
    train(optimizer, 0, 2)
    optimizer.state.clear()
    weights = [param.detach().clone() for param in params_of(optimizer)]
    train(optimizer, 2, 3)
    fresh = backend.optimizer([torch.nn.Parameter(weight) for weight in weights], lr=RAMP, weight_decay=0.1)
    fresh.set_clock(2)
    train(fresh, 2, 3)
    assert_same(snapshot(optimizer), snapshot(fresh))
    assert optimizer.clock == 3


def test_state_of_one_parameter_dropped_starts_again(backend: Backend) -> None:
    optimizer = make(backend)
    train(optimizer, 0, 2)
    first, second = params_of(optimizer)
    del optimizer.state[first]
    train(optimizer, 2, 3)
    assert [float(optimizer.state[param]["step"]) for param in (first, second)] == [1, 3]


def test_foreign_keys_of_state_are_kept(backend: Backend) -> None:
    optimizer = make(backend)
    train(optimizer, 0, 1)
    param = params_of(optimizer)[0]
    optimizer.state[param]["note"] = "mine"
    train(optimizer, 1, 2)
    assert optimizer.state[param]["note"] == "mine"


def test_whole_state_dict_of_a_parameter_assigned(backend: Backend) -> None:
    assigned, expected = make(backend), make(backend)
    for optimizer in (assigned, expected):
        train(optimizer, 0, 2)
    for param in params_of(assigned):
        assigned.state[param] = {
            key: value.clone() if isinstance(value, torch.Tensor) else value
            for key, value in assigned.state[param].items()
        }
    for optimizer in (assigned, expected):
        train(optimizer, 2, 4)
    assert_same(snapshot(assigned), snapshot(expected))


# ---- parameters that move ------------------------------------------------------------------------


def test_replaced_parameter_data_is_followed(backend: Backend) -> None:
    moved, expected = make(backend), make(backend)
    for optimizer in (moved, expected):
        train(optimizer, 0, 2)
    old = [param.data for param in params_of(moved)]
    for param in params_of(moved):
        param.data = param.data.clone()
    kept = [data.clone() for data in old]
    for optimizer in (moved, expected):
        train(optimizer, 2, 4)
    assert_same(snapshot(moved), snapshot(expected))
    assert all(torch.equal(data, value) for data, value in zip(old, kept, strict=True))


@pytest.mark.parametrize("target", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_model_converted_after_state_exists(target: torch.dtype, backend: Backend) -> None:
    module = torch.nn.Linear(3, 2).to(backend.device)
    optimizer = backend.optimizer(module.parameters(), lr=RAMP)
    train(optimizer, 0, 2)
    before = {param: optimizer.state[param]["exp_avg"].clone() for param in module.parameters()}
    module.to(target)
    train(optimizer, 2, 3)
    for param in module.parameters():
        state = optimizer.state[param]
        assert param.dtype == target
        assert state["exp_avg"].dtype == (torch.float64 if target == torch.float64 else torch.float32)
        assert float(state["step"]) == 3
        expected = 0.9 * before[param].double() + 0.1 * GRADS[2]
        # The converted moment went on, to float32's precision, and did not start from zero.
        torch.testing.assert_close(state["exp_avg"].double(), expected, rtol=1e-6, atol=1e-7)
    assert optimizer.clock == 3


def test_options_changed_after_state_exists_convert_it(backend: Backend) -> None:
    optimizer = make(backend)
    train(optimizer, 0, 2)
    optimizer.param_groups[0]["amsgrad"] = True
    train(optimizer, 2, 3)
    for param in params_of(optimizer):
        state = optimizer.state[param]
        assert same_bits(state["max_exp_avg_sq"], state["exp_avg_sq"])
        assert float(state["step"]) == 3


def test_step_allocates_nothing_new_in_state(backend: Backend) -> None:
    problem = Problem(by_name("all_dtypes_in_a_group"), backend.device)
    optimizer = problem.optimizer(backend.name)
    problem.run(optimizer, 1)

    def addresses() -> list[int]:
        return [
            value.data_ptr()
            for param in problem.params
            for value in optimizer.state[param].values()
            if isinstance(value, torch.Tensor)
        ]

    before = addresses()
    problem.run(optimizer, 3)
    assert addresses() == before
