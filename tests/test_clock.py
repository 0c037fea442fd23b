"""The schedule clock: what ticks it, what does not, and under which engines.

`check_...` functions hold a property each; a test runs them as they are, and the mutation tests at the end
run them with the tick rule replaced by a plausible wrong one and demand that they fail.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

import pytest
import torch
from cases import assert_same, snapshot
from conftest import Backend
from torch.distributed.checkpoint.state_dict import _init_optim_state

import fused_sched
from fused_sched import FusedScheduledAdam, schedules

ITERATIONS = 4
RAMP = schedules.linear(0.01, 0.05, 4)


def grads(optimizer: torch.optim.Optimizer, iteration: int) -> None:
    """One gradient for all parameters, so that equal parameters stay equal when their updates are."""
    for group in optimizer.param_groups:
        for param in group["params"]:
            param.grad = torch.full_like(param, 1.0 + iteration)


def expected_weight(backend: Backend) -> torch.Tensor:
    """A plain loop over one parameter: what each element must go through under every engine."""
    param = backend.parameter([1.0])
    optimizer = backend.optimizer([param], lr=RAMP, weight_decay=0.1)
    for iteration in range(ITERATIONS):
        grads(optimizer, iteration)
        optimizer.step()
    return param.detach()


def two_groups(backend: Backend) -> tuple[FusedScheduledAdam, list[dict[str, Any]]]:
    """An optimizer whose groups an engine has given one flat partition each, as ZeRO does once it is made."""
    model = [backend.parameter([[1.0] * 4]) for _ in range(4)]
    optimizer = backend.optimizer([{"params": model[:2]}, {"params": model[2:]}], lr=RAMP, weight_decay=0.1)
    for group, size in zip(optimizer.param_groups, (5, 3), strict=True):
        group["params"] = [torch.ones(size, device=backend.device, requires_grad=True)]
    return optimizer, optimizer.param_groups


def check_zero_1(backend: Backend) -> None:
    """ZeRO-1 and 2 replace param_groups by a one-element list, once per group (stage_1_and_2.py)."""
    optimizer, groups = two_groups(backend)
    params = [group["params"][0] for group in groups]
    for iteration in range(ITERATIONS):
        grads(optimizer, iteration)
        for group in groups:
            optimizer.param_groups = [group]
            optimizer.step()
            assert set(optimizer.last_lr()) == {RAMP(iteration)}
        optimizer.param_groups = groups
        assert optimizer.clock == iteration + 1
    for param in params:
        assert torch.equal(param.detach(), expected_weight(backend).expand_as(param))


def check_zero_3(backend: Backend) -> None:
    """ZeRO-3 keeps all groups, empty but for the one sub-group being stepped (stage3.py)."""
    optimizer, groups = two_groups(backend)
    sub_groups = [
        (index, torch.ones(size, device=backend.device, requires_grad=True)) for index, size in ((0, 3), (0, 2), (1, 3))
    ]
    for group in groups:
        group["params"] = []
    for iteration in range(ITERATIONS):
        for index, flat in sub_groups:
            flat.grad = torch.full_like(flat, 1.0 + iteration)
            groups[index]["params"] = [flat]
            optimizer.step()
            groups[index]["params"] = []
        assert optimizer.clock == iteration + 1
    for _, flat in sub_groups:
        assert torch.equal(flat.detach(), expected_weight(backend).expand_as(flat))


def check_plain_alternation(backend: Backend) -> None:
    """Disjoint parameters in turn, all of them in the groups: every call is an update of its own."""
    left, right = backend.parameter([1.0]), backend.parameter([1.0])
    optimizer = backend.optimizer([left, right], lr=RAMP)
    for iteration in range(ITERATIONS):
        for param, other in ((left, right), (right, left)):
            param.grad, other.grad = torch.ones_like(param), None
            optimizer.step()
            assert optimizer.last_lr() == [RAMP(optimizer.clock - 1)]
        assert optimizer.clock == 2 * (iteration + 1)
    assert float(optimizer.state[left]["step"]) == ITERATIONS


def test_zero_1_swaps_of_the_group_list_tick_once_a_round(backend: Backend) -> None:
    check_zero_1(backend)


def test_zero_3_emptied_groups_tick_once_a_round(backend: Backend) -> None:
    check_zero_3(backend)


def test_plain_loop_ticks_on_every_call(backend: Backend) -> None:
    check_plain_alternation(backend)


def test_parameters_without_gradient_do_not_stop_the_clock(backend: Backend) -> None:
    used, unused = backend.parameter([1.0]), backend.parameter([1.0])
    optimizer = backend.optimizer([used, unused], lr=RAMP)
    for _ in range(3):
        used.grad = torch.ones_like(used)
        optimizer.step()
    unused.grad = torch.ones_like(unused)
    optimizer.step()
    assert optimizer.clock == 4
    assert float(optimizer.state[unused]["step"]) == 1
    # Its first update uses the schedule where the clock is and bias correction where its own count is.
    torch.testing.assert_close(unused.detach(), torch.ones_like(unused) - RAMP(3), rtol=1e-6, atol=0)


def test_clock_is_an_int_that_starts_at_zero(backend: Backend) -> None:
    optimizer = backend.optimizer([backend.parameter([1.0])], lr=RAMP)
    assert optimizer.clock == 0
    assert type(optimizer.clock) is int


def test_set_clock_moves_the_schedule_and_nothing_else(backend: Backend) -> None:
    param = backend.parameter([1.0])
    optimizer = backend.optimizer([param], lr=RAMP)
    for iteration in range(2):
        grads(optimizer, iteration)
        optimizer.step()
    before = snapshot(optimizer)
    optimizer.set_clock(3)
    assert optimizer.clock == 3
    assert_same(snapshot(optimizer), before)
    grads(optimizer, 2)
    optimizer.step()
    assert optimizer.last_lr() == [RAMP(3)]
    assert optimizer.clock == 4
    assert float(optimizer.state[param]["step"]) == 3


def test_set_clock_begins_a_round(backend: Backend) -> None:
    """Also in the middle of an engine's: the next call uses the schedule at the new clock."""
    optimizer, groups = two_groups(backend)
    grads(optimizer, 0)
    optimizer.param_groups = groups[:1]
    optimizer.step()
    optimizer.set_clock(3)
    optimizer.param_groups = groups[1:]
    optimizer.step()
    assert optimizer.lr_tensor.tolist() == [RAMP(3)] * 2
    assert optimizer.clock == 4


@pytest.mark.parametrize("value", [-1, 1.5, True, "3", None])
def test_set_clock_refuses_what_is_no_count(value: Any, backend: Backend) -> None:
    optimizer = backend.optimizer([backend.parameter([1.0])], lr=RAMP)
    with pytest.raises((ValueError, TypeError)):
        optimizer.set_clock(value)
    assert optimizer.clock == 0


def test_counts_go_past_the_last_integer_of_float32(backend: Backend) -> None:
    """float32 cannot count past 2^24 by adding one; `step` mirrors an integer that can."""
    param = backend.parameter([1.0])
    optimizer = backend.optimizer([param], lr=schedules.linear(0.0, 1.0, 2**26))
    grads(optimizer, 0)
    optimizer.step()
    optimizer.state[param]["step"].fill_(2.0**24)
    optimizer.set_clock(2**24 + 1)
    for _ in range(2):
        optimizer.step()
    assert float(optimizer.state[param]["step"]) == 2**24 + 2
    assert optimizer.clock == 2**24 + 3
    assert optimizer.last_lr() == [(2**24 + 2) / 2**26]


def test_add_param_group_keeps_the_clock(backend: Backend) -> None:
    optimizer = backend.optimizer([backend.parameter([1.0])], lr=RAMP)
    grads(optimizer, 0)
    optimizer.step()
    late = backend.parameter([1.0])
    optimizer.add_param_group({"params": [late], "lr": 0.5})
    for iteration in (1, 2):
        grads(optimizer, iteration)
        optimizer.step()
        assert optimizer.last_lr() == [RAMP(iteration), 0.5]
    assert optimizer.clock == 3
    assert float(optimizer.state[late]["step"]) == 2


# ---- skipping ------------------------------------------------------------------------------------


@pytest.mark.parametrize("flag", [1.0, 2.0, float("inf"), float("nan")])
def test_any_found_inf_skips_and_changes_nothing(flag: float, backend: Backend) -> None:
    params = [backend.parameter([1.0, 2.0]), backend.parameter([3.0], torch.bfloat16)]
    optimizer = backend.optimizer(params, lr=RAMP, weight_decay=0.1, master="fp32")
    grads(optimizer, 0)
    optimizer.step()
    before = snapshot(optimizer)
    for param in params:
        param.grad = torch.full_like(param, float("inf"))
    optimizer.found_inf = torch.tensor(flag, device=backend.device)
    optimizer.step()
    del optimizer.found_inf
    assert_same(snapshot(optimizer), before)
    assert optimizer.clock == 1
    grads(optimizer, 1)
    optimizer.step()
    assert optimizer.clock == 2
    assert optimizer.last_lr(sync=True) == [RAMP(1)]


def test_first_step_skipped_leaves_state_as_created(backend: Backend) -> None:
    param = backend.parameter([1.0])
    optimizer = backend.optimizer([param], lr=RAMP)
    param.grad = torch.full_like(param, float("nan"))
    optimizer.found_inf = torch.ones((), device=backend.device)
    optimizer.step()
    del optimizer.found_inf
    assert param.item() == 1.0
    assert optimizer.clock == 0
    grads(optimizer, 0)
    optimizer.step()
    assert float(optimizer.state[param]["step"]) == 1
    assert not optimizer.state[param]["exp_avg"].isnan().any()


def test_grad_scale_divides_and_leaves_gradients_alone(backend: Backend) -> None:
    scaled, plain = backend.parameter([1.0, -2.0]), backend.parameter([1.0, -2.0])
    scaling = backend.optimizer([scaled], lr=RAMP)
    scaling.grad_scale = torch.tensor(1024.0, device=backend.device)
    scaling.found_inf = torch.tensor(0.0, device=backend.device)
    scaled.grad = torch.tensor([1024.0, 3072.0], device=backend.device)
    plain.grad = torch.tensor([1.0, 3.0], device=backend.device)
    scaling.step()
    reference = backend.optimizer([plain], lr=RAMP)
    reference.step()
    assert_same(snapshot(scaling), snapshot(reference))
    assert scaled.grad.tolist() == [1024.0, 3072.0]


def test_grad_scale_of_none_means_already_unscaled(backend: Backend) -> None:
    param = backend.parameter([1.0])
    optimizer = backend.optimizer([param], lr=0.5, eps=0.0)
    optimizer.grad_scale = None
    optimizer.found_inf = torch.tensor(0.0, device=backend.device)
    param.grad = torch.ones_like(param)
    optimizer.step()
    assert param.item() == 0.5


def test_torch_grad_scaler_unscales_skips_and_recovers(backend: Backend) -> None:
    param = backend.parameter([1.0, 2.0])
    optimizer = backend.optimizer([param], lr=RAMP)
    assert optimizer._step_supports_amp_scaling
    scaler = torch.amp.GradScaler(backend.device.type, init_scale=8.0, growth_interval=1000)
    for factor, clock in ((1.0, 1), (float("inf"), 1), (2.0, 2)):
        optimizer.zero_grad()
        scaler.scale((param * factor).sum()).backward()
        before = param.detach().clone()
        scaler.step(optimizer)
        scaler.update()
        assert optimizer.clock == clock
        assert torch.equal(param.detach(), before) == (factor == float("inf"))
    assert not hasattr(optimizer, "found_inf")
    assert scaler.get_scale() == 4.0


@pytest.mark.parametrize("skipped", [0, 1])
def test_tick_belongs_to_the_first_applied_call_of_a_round(skipped: int, backend: Backend) -> None:
    optimizer, groups = two_groups(backend)
    for iteration in range(3):
        grads(optimizer, iteration)
        for index, group in enumerate(groups):
            optimizer.param_groups = [group]
            overflow = iteration == 1 and index == skipped
            optimizer.found_inf = torch.tensor(float(overflow), device=backend.device)
            optimizer.step()
            if not overflow:
                assert set(optimizer.last_lr(sync=True)) == {RAMP(iteration)}
        optimizer.param_groups = groups
        assert optimizer.clock == iteration + 1
    counts = [float(optimizer.state[group["params"][0]]["step"]) for group in groups]
    assert counts == ([2, 3] if skipped == 0 else [3, 2])


def test_a_round_skipped_whole_does_not_tick(backend: Backend) -> None:
    optimizer, groups = two_groups(backend)
    for iteration, overflow in enumerate((0.0, 1.0, 0.0)):
        grads(optimizer, iteration)
        for group in groups:
            optimizer.param_groups = [group]
            optimizer.found_inf = torch.tensor(overflow, device=backend.device)
            optimizer.step()
        optimizer.param_groups = groups
    assert optimizer.clock == 2


# ---- dry runs ------------------------------------------------------------------------------------


def deepspeed_dry_run(optimizer: torch.optim.Optimizer) -> None:
    """What DeepSpeed's wrappers do when they start: a step on zero gradients, known by its caller's name."""
    module = types.ModuleType("deepspeed.runtime.fp16.unfused_optimizer")
    source = """
def initialize_optimizer_states(optimizer):
    for group in optimizer.param_groups:
        for param in group["params"]:
            param.grad = param.detach().clone().zero_()
    optimizer.step()
    optimizer.zero_grad()
"""
    exec(source, module.__dict__)
    module.initialize_optimizer_states(optimizer)


@pytest.mark.parametrize("dry_run", [deepspeed_dry_run, _init_optim_state], ids=["deepspeed", "torch"])
@pytest.mark.parametrize("lr", [0.1, RAMP], ids=["float", "schedule"])
def test_dry_runs_only_allocate(dry_run: Callable[[Any], None], lr: Any, backend: Backend) -> None:
    def make() -> FusedScheduledAdam:
        params = [backend.parameter([1.0, 2.0]), backend.parameter([3.0])]
        return backend.optimizer(params, lr=lr, weight_decay=0.1, amsgrad=True)

    dry, plain = make(), make()
    before = [param.detach().clone() for param in dry.param_groups[0]["params"]]
    dry_run(dry)
    for param, value in zip(dry.param_groups[0]["params"], before, strict=True):
        assert torch.equal(param.detach(), value)
        state = dry.state[param]
        assert float(state["step"]) == 0
        for key in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"):
            assert state[key].shape == param.shape
            assert not state[key].any()
    assert dry.clock == 0
    for iteration in range(3):
        for optimizer in (dry, plain):
            grads(optimizer, iteration)
            optimizer.step()
    assert_same(snapshot(dry), snapshot(plain))
    assert dry.clock == 3


def test_zero_lr_and_zero_gradients_are_no_dry_run(backend: Backend) -> None:
    """Dry runs are told by their caller: one rank's flat partition can be all zeros in a real step."""
    param = backend.parameter([1.0])
    optimizer = backend.optimizer([param], lr=0.0)
    param.grad = torch.zeros_like(param)
    optimizer.step()
    assert optimizer.clock == 1
    assert float(optimizer.state[param]["step"]) == 1


# ---- mutation tests ------------------------------------------------------------------------------


def test_ticking_on_every_call_fails_under_engines(backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused_sched.clock.TickRule, "should_tick", lambda self, *args, **kwargs: True)
    check_plain_alternation(backend)
    for check in (check_zero_1, check_zero_3):
        with pytest.raises(AssertionError):
            check(backend)


def test_ticking_on_repeats_alone_fails_in_a_plain_loop(backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rule that ticks once per two calls that alternate disjoint parameters."""
    stepped_by: WeakKeyDictionary[Any, set[int]] = WeakKeyDictionary()

    def should_tick(rule: Any, ids: Any) -> bool:
        stepped = stepped_by.setdefault(rule, set())
        tick = not stepped or not stepped.isdisjoint(ids)
        if tick:
            stepped.clear()
        stepped.update(ids)
        return tick

    monkeypatch.setattr(fused_sched.clock.TickRule, "should_tick", should_tick)
    check_zero_1(backend)
    check_zero_3(backend)
    with pytest.raises(AssertionError):
        check_plain_alternation(backend)
