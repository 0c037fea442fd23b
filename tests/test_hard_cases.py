"""Things that engines and users do to an optimizer and that were once silently wrong here; one test each."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import Backend
from samples import FAST, moved, param, two_groups

from fused_sched import FusedScheduledAdam, ScheduleWarning, backends, packing, schedules


def initialize_optimizer_states(optimizer: torch.optim.Optimizer) -> None:
    optimizer.step()


# ---- groups in another order -----------------------------------------------------------------------


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))], ids=["deepcopy", "pickle"])
def test_copies_of_reordered_groups_keep_their_schedules(clone: Any) -> None:
    _, _, optimizer = two_groups()
    optimizer.param_groups.reverse()
    twin = clone(optimizer)
    for p in (p for group in twin.param_groups for p in group["params"]):
        p.grad = torch.ones_like(p)
    twin.step()
    assert [moved(group["params"][0]) for group in twin.param_groups] == [0.2, 0.1]
    assert twin.last_lr() == [0.2, 0.1]


def test_a_removed_group_leaves_the_others_their_places() -> None:
    _, b, optimizer = two_groups()
    optimizer.param_groups[:] = [optimizer.param_groups[1]]
    optimizer.step()
    assert moved(b) == 0.2
    assert optimizer.last_lr() == [0.2]
    optimizer.set_schedule(schedules.constant(0.5), group=0)
    assert optimizer.param_groups[0]["lr"] == 0.5
    saved = optimizer.state_dict()
    with warnings.catch_warnings():
        warnings.simplefilter("error", ScheduleWarning)
        optimizer.load_state_dict(saved)
    copy.deepcopy(optimizer)


def test_a_new_dict_does_not_take_a_living_groups_schedule() -> None:
    a, b, optimizer = two_groups()
    first, second = optimizer.param_groups
    optimizer.param_groups = [second, dict(first)]
    with pytest.raises(RuntimeError, match="add_param_group"):
        optimizer.step()
    assert a[0].item() == b[0].item() == 1.0


def test_the_callers_dict_is_the_group() -> None:
    group: dict[str, Any] = {"params": [param()], "lr": 0.1}
    optimizer = FusedScheduledAdam([param()], lr=0.1)
    optimizer.add_param_group(group)
    assert optimizer.param_groups[1] is group


# ---- state that lies in other state's memory ---------------------------------------------------------


def test_swapped_states_in_a_checkpoint_are_swapped() -> None:
    a, b, optimizer = two_groups()
    b.grad = torch.full((4,), 3.0)
    optimizer.step()
    saved = optimizer.state_dict()
    saved["state"] = {0: saved["state"][1], 1: saved["state"][0]}
    optimizer.load_state_dict(saved)
    assert [round(optimizer.state[p]["exp_avg"][0].item(), 6) for p in (a, b)] == [0.3, 0.1]


def test_swapped_moments_are_swapped() -> None:
    a, b, optimizer = two_groups(betas=(0.5, 0.5))
    b.grad = torch.full((4,), 3.0)
    optimizer.step()
    first, second = optimizer.state[a], optimizer.state[b]
    first["exp_avg"], second["exp_avg"] = second["exp_avg"], first["exp_avg"]
    a.grad, b.grad = torch.zeros(4), torch.zeros(4)
    optimizer.step()
    assert [optimizer.state[p]["exp_avg"][0].item() for p in (a, b)] == [0.75, 0.25]


def test_transposed_view_of_a_moment_is_taken_as_it_reads() -> None:
    p = torch.zeros(300, 300, requires_grad=True)
    optimizer = FusedScheduledAdam([p], lr=0.1, betas=(0.5, 0.5))
    p.grad = torch.randn(300, 300)
    optimizer.step()
    expected = optimizer.state[p]["exp_avg"].t() * 0.5
    optimizer.state[p]["exp_avg"] = optimizer.state[p]["exp_avg"].t()
    p.grad = torch.zeros(300, 300)
    optimizer.step()
    assert torch.equal(optimizer.state[p]["exp_avg"], expected)


def test_a_shallow_copy_does_not_steal_the_state() -> None:
    p = param()
    optimizer = FusedScheduledAdam([p], lr=0.1, betas=(0.5, 0.5))
    optimizer.step()
    copy.copy(optimizer)
    optimizer.state[p]["exp_avg"] = torch.full((4,), 100.0)
    p.grad = torch.zeros(4)
    optimizer.step()
    assert optimizer.state[p]["exp_avg"][0].item() == 50.0


def test_state_maps_behave_as_dicts() -> None:
    p = param()
    optimizer = FusedScheduledAdam([p], lr=0.1, betas=(0.5, 0.5))
    optimizer.step()
    assert copy.copy(optimizer.state).keys() == optimizer.state.keys()
    optimizer.state |= {p: {"exp_avg": torch.full((4,), 8.0)}}
    p.grad = torch.zeros(4)
    optimizer.step()
    assert optimizer.state[p]["exp_avg"][0].item() == 4.0


# ---- what must be refused, before anything changes ---------------------------------------------------


def test_set_schedule_checks_every_group_first() -> None:
    _, _, optimizer = two_groups()
    optimizer.param_groups[0]["eps"] = float("nan")
    with pytest.raises(ValueError, match="eps"):
        optimizer.set_schedule(schedules.constant(0.5), group=1)
    assert optimizer.param_groups[1]["lr"] == 0.2


@pytest.mark.parametrize("value", ["0.5", torch.tensor(0.5), None])
def test_set_schedule_takes_schedules_and_numbers_only(value: Any) -> None:
    _, _, optimizer = two_groups()
    with pytest.raises(TypeError, match="Schedule"):
        optimizer.set_schedule(value)


def test_set_schedule_after_a_schedulers_checkpoint() -> None:
    p = param()
    theirs = torch.optim.AdamW([p], lr=0.3)
    torch.optim.lr_scheduler.StepLR(theirs, 1)
    optimizer = FusedScheduledAdam([p], lr=0.1)
    optimizer.load_state_dict(theirs.state_dict())
    optimizer.set_schedule(FAST)
    optimizer.step()
    assert optimizer.last_lr() == [0.2]


def test_options_of_the_whole_optimizer_are_refused_in_a_group() -> None:
    with pytest.raises(ValueError, match="grad_divisor"):
        FusedScheduledAdam([{"params": [param()], "grad_divisor": 8.0}])


def test_named_duplicates_and_single_tensors_are_checked_when_constructed() -> None:
    p = param()
    with pytest.raises(ValueError, match="twice"):
        FusedScheduledAdam([("a", p), ("b", p)])
    with pytest.raises(TypeError, match="complex"):
        FusedScheduledAdam([{"params": torch.ones(2, dtype=torch.complex64, requires_grad=True)}])


@pytest.mark.parametrize("step", [float("nan"), -1.0, torch.tensor(-1.0), torch.tensor(float("inf"))])
def test_a_step_that_is_no_count_is_refused(step: Any) -> None:
    p = param()
    optimizer = FusedScheduledAdam([p], lr=0.1)
    optimizer.step()
    before = p.detach().clone()
    optimizer.state[p]["step"] = step
    with pytest.raises(ValueError, match="count"):
        optimizer.step()
    assert torch.equal(p, before)


def test_the_int64_count_alone_is_enough() -> None:
    p = param()
    optimizer = FusedScheduledAdam([p], lr=0.1)
    optimizer.step()
    optimizer.state[p]["step_int64"] = 41
    optimizer.step()
    assert optimizer.state[p]["step"].item() == optimizer.state[p]["step_int64"].item() == 42


def test_a_dry_run_stays_one_after_somebody_looked() -> None:
    p = param()
    optimizer = FusedScheduledAdam([p], lr=0.1)
    assert not optimizer.state[p]
    caller = dict(initialize_optimizer_states.__globals__, __name__="deepspeed.runtime")
    exec("def initialize_optimizer_states(optimizer):\n    optimizer.step()", caller)
    caller["initialize_optimizer_states"](optimizer)
    assert (optimizer.clock, p[0].item()) == (0, 1.0)
    assert optimizer.state[p]["exp_avg"].shape == p.shape


def test_falling_back_to_plain_torch_is_said_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "_registered", {})
    monkeypatch.setattr(backends, "_warned", set())
    p = param()
    with pytest.warns(RuntimeWarning, match="reference"):
        FusedScheduledAdam([p], lr=0.1).step()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        FusedScheduledAdam([p], lr=0.1).step()


@pytest.mark.parametrize("what", ["tensors", "options"])
def test_a_capture_that_would_prepare_memory_is_refused(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    p = param()
    optimizer = FusedScheduledAdam([p], lr=0.1)
    optimizer.step()
    if what == "tensors":
        optimizer.state[p]["exp_avg"] = torch.zeros(4)
    else:
        optimizer.param_groups[0]["lr"] = 0.2
    before = p.detach().clone()
    monkeypatch.setattr("fused_sched.engine.is_capturing", lambda device: True)
    monkeypatch.setattr("fused_sched.devices.is_capturing", lambda device: True)
    with pytest.raises(RuntimeError, match="CUDA graph"):
        optimizer.step()
    assert optimizer.clock == 1
    assert torch.equal(p, before)


# ---- tensors whose memory is not their value ---------------------------------------------------------


def test_lazily_negated_gradients_and_parameters() -> None:
    p, q = param(), param()
    p.grad = torch._neg_view(torch.ones(4))
    optimizer = FusedScheduledAdam([p, q], lr=0.125, betas=(0.5, 0.5))
    optimizer.step()
    assert optimizer.state[p]["exp_avg"][0].item() == -0.5
    assert p[0].item() > 1.0 > q[0].item()


def test_zero_tensors_have_no_memory() -> None:
    p = param()
    p.grad = torch._efficientzerotensor((4,))
    optimizer = FusedScheduledAdam([p], lr=0.125)
    optimizer.step()
    assert (p[0].item(), optimizer.clock) == (1.0, 1)


def test_slices_of_one_weight_are_apart_and_overlapping_ones_are_not() -> None:
    fused = torch.zeros(64, 96)
    parts = [fused[:, i * 32 : (i + 1) * 32].requires_grad_() for i in range(3)]
    for part in parts:
        part.grad = torch.ones(64, 32)
    FusedScheduledAdam(parts, lr=0.125).step()
    assert torch.allclose(fused, torch.full_like(fused, -0.125))
    shifted = fused[:, 16:48].detach().requires_grad_()
    shifted.grad = torch.ones(64, 32)
    with pytest.raises(RuntimeError, match="share memory"):
        FusedScheduledAdam([parts[0], shifted], lr=0.125).step()


def test_a_parameter_that_grows_over_its_neighbour_in_place_is_refused() -> None:
    memory = torch.zeros(8)
    a, b = memory[:4].requires_grad_(), memory[4:].requires_grad_()
    a.grad, b.grad = torch.ones(4), torch.ones(4)
    optimizer = FusedScheduledAdam([a, b], lr=0.125)
    optimizer.step()
    a.grad = None
    a.data = memory  # the same address, twice the elements
    a.grad = torch.ones(8)
    optimizer.state.pop(a)
    with pytest.raises(RuntimeError, match="share memory"):
        optimizer.step()
    assert optimizer.clock == 1


def test_hooks_see_the_checkpoint_that_is_saved() -> None:
    _, _, optimizer = two_groups()
    optimizer.step()
    seen: list[dict[str, Any]] = []
    optimizer.register_state_dict_post_hook(lambda o, d: seen.append(d) or {"wrapped": d})
    saved = optimizer.state_dict()
    assert saved == {"wrapped": seen[0]}
    assert seen[0]["param_groups"][0]["clock"] == 1
    assert all(type(value) is dict for value in seen[0]["state"].values())


def test_autograd_is_told_one_tensor_at_a_time_where_torch_wants_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "bump_versions", packing.bump_versions_of_each)
    a, b, optimizer = two_groups()
    before = a._version, b._version
    optimizer.step()
    assert a._version > before[0]
    assert b._version > before[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_devices_without_arenas_keep_ordinary_tensors(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """mps and xpu cannot slice storages; the reference backend needs no arenas."""

    def trained() -> tuple[torch.Tensor, FusedScheduledAdam]:
        p = torch.linspace(-1, 1, 37).to(dtype).requires_grad_()
        optimizer = FusedScheduledAdam([p], lr=FAST, weight_decay=0.1, backend="reference")
        for _ in range(3):
            p.grad = torch.linspace(1, 2, 37).to(dtype)
            optimizer.step()
        optimizer.load_state_dict(optimizer.state_dict())
        optimizer.step()
        return p.detach(), optimizer

    expected, _ = trained()
    monkeypatch.setattr("fused_sched.arena._DEVICES_WITH_ARENAS", ())
    p, optimizer = trained()
    assert torch.equal(p, expected)
    assert next(iter(optimizer.state.values())).entry.arena is None


# ---- schedules that cannot drive -----------------------------------------------------------------------


@pytest.mark.parametrize("name", ["lr", "weight_decay"])
def test_schedules_that_overflow_are_refused(name: str) -> None:
    growing = schedules.exponential(1e-3, 10.0)
    with pytest.raises(ValueError, match=f"{name} must stay finite.*at update 309"):
        FusedScheduledAdam([param()], **{name: growing})
    optimizer = FusedScheduledAdam([param()])
    with pytest.raises(ValueError, match="finite"):
        optimizer.set_schedule(growing, hyperparameter=name)
    optimizer.set_schedule(schedules.join([growing, schedules.constant(0.1)], [100]), hyperparameter=name)


def test_a_rate_that_turns_negative_is_said() -> None:
    with pytest.warns(ScheduleWarning, match="negative"):
        FusedScheduledAdam([param()], lr=schedules.linear(1e-2, -1e-3, 10))


@pytest.mark.parametrize(
    ("option", "value", "rule"),
    [
        ("eps", schedules.constant(1e-8), "eps must be a number, got"),
        ("amsgrad", "false", "True or False"),
        ("decoupled_weight_decay", None, "True or False"),
        ("seed", 1.7, "seed must be an int"),
        ("seed", "x", "seed must be an int"),
        ("lr", True, "lr must be a number or a Schedule"),
    ],
)
def test_options_of_the_wrong_type_say_the_rule(option: str, value: Any, rule: str) -> None:
    with pytest.raises(TypeError, match=rule):
        FusedScheduledAdam([param()], **{option: value})


def test_main_grad_must_be_a_tensor() -> None:
    p = torch.ones(4, requires_grad=True)
    p.main_grad = "later"  # type: ignore[attr-defined]
    with pytest.raises(TypeError, match="main_grad"):
        FusedScheduledAdam([p]).step()


@pytest.mark.cuda
def test_a_captured_graph_follows_the_schedule_and_its_replacement(get_backend: Callable[[str], Backend]) -> None:
    cuda = get_backend("cuda")
    p = cuda.parameter(torch.zeros(1000))
    p.grad = torch.ones_like(p)
    first, second = schedules.linear(1.0, 0.0, 100), schedules.table([0.25] * 4000)
    optimizer = cuda.optimizer([p], lr=first)
    optimizer.step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step()
    for index in range(1, 4):
        graph.replay()
        assert optimizer.last_lr() == optimizer.lr_tensor.tolist() == [first(index)]
    optimizer.set_schedule(second)
    graph.replay()
    assert (optimizer.clock, optimizer.lr_tensor.tolist()) == (5, [0.25])
