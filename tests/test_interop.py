"""What frameworks and users do to any torch optimizer: closures, groups, copies, hooks, repr."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from cases import Problem, assert_same, by_name, grad_of, set_grad, snapshot
from conftest import Backend

from fused_sched import schedules

RAMP = schedules.linear(0.01, 0.05, 4)
CONTINUED = [
    "defaults",
    "groups_of_their_own",
    "bf16_with_master",
    "all_dtypes_without_master",
    "bf16_split8_8bit",
    "bf16_stochastic_bf16",
]


def test_is_a_torch_optimizer(backend: Backend) -> None:
    optimizer = backend.optimizer([backend.parameter([1.0])])
    assert isinstance(optimizer, torch.optim.Optimizer)
    assert optimizer.defaults["lr"] == 1e-3
    assert optimizer.param_groups[0]["betas"] == (0.9, 0.999)
    assert optimizer.param_groups[0]["weight_decay"] == 0.0
    assert "capturable" not in optimizer.param_groups[0]


def test_closure_runs_once_with_gradients_enabled_and_its_loss_returns(backend: Backend) -> None:
    param = backend.parameter([2.0])
    optimizer = backend.optimizer([param], lr=0.5, eps=0.0)
    calls = []

    def closure() -> torch.Tensor:
        calls.append(torch.is_grad_enabled())
        optimizer.zero_grad()
        loss = (param * param).sum()
        loss.backward()
        return loss

    with torch.no_grad():
        loss = optimizer.step(closure)
    assert calls == [True]
    assert loss.item() == 4.0
    assert param.item() == 1.5
    assert optimizer.step() is None


def test_step_hooks_run(backend: Backend) -> None:
    param = backend.parameter([2.0])
    optimizer = backend.optimizer([param])
    seen = []
    optimizer.register_step_pre_hook(lambda *args: seen.append("pre"))
    optimizer.register_step_post_hook(lambda *args: seen.append("post"))
    param.grad = torch.ones_like(param)
    optimizer.step()
    assert seen == ["pre", "post"]


def two_parameters(backend: Backend) -> tuple[Any, list[torch.nn.Parameter]]:
    params = [backend.parameter([1.0, 2.0]), backend.parameter([3.0])]
    return backend.optimizer(params, lr=RAMP), params


def test_zero_grad_keeps_or_drops_gradients(backend: Backend) -> None:
    optimizer, params = two_parameters(backend)
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer.step()
    optimizer.zero_grad(set_to_none=False)
    assert all(param.grad is not None and not param.grad.any() for param in params)
    optimizer.zero_grad()
    assert all(param.grad is None for param in params)


def test_step_bumps_the_versions_of_what_it_changes(backend: Backend) -> None:
    """Autograd must notice that a saved tensor was updated, as after any in-place torch operation."""
    optimizer, (stepped, skipped) = two_parameters(backend)
    loss = (stepped * stepped).sum()
    stepped.grad = torch.ones_like(stepped)
    before = skipped._version
    optimizer.step()
    assert skipped._version == before
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("form", ["tensors", "iterator", "named", "groups", "named_groups", "one_tensor_group"])
def test_every_form_of_params(form: str, backend: Backend) -> None:
    module = torch.nn.Linear(2, 2).to(backend.device)
    forms: dict[str, Any] = {
        "tensors": list(module.parameters()),
        "iterator": module.parameters(),
        "named": module.named_parameters(),
        "groups": [{"params": [module.weight], "lr": 0.5}, {"params": [module.bias]}],
        "named_groups": [{"params": list(module.named_parameters())}],
        "one_tensor_group": [{"params": module.weight}, {"params": module.bias}],
    }
    optimizer = backend.optimizer(forms[form], lr=0.5, eps=0.0)
    before = [param.detach().clone() for param in module.parameters()]
    for param in module.parameters():
        param.grad = torch.ones_like(param)
    optimizer.step()
    for param, value in zip(module.parameters(), before, strict=True):
        torch.testing.assert_close(param.detach(), value - 0.5)
    if form in ("named", "named_groups"):
        assert optimizer.param_groups[0]["param_names"] == ["weight", "bias"]


@pytest.mark.parametrize("key", ["lr", "betas", "eps", "weight_decay", "decoupled_weight_decay", "amsgrad", "maximize"])
def test_group_options_override_the_constructors(key: str, backend: Backend) -> None:
    common = {
        "lr": 0.1,
        "betas": (0.9, 0.99),
        "eps": 1e-8,
        "weight_decay": 0.1,
        "decoupled_weight_decay": True,
        "amsgrad": False,
        "maximize": False,
    }
    other = {
        "lr": RAMP,
        "betas": (0.5, schedules.linear(0.5, 0.9, 3)),
        "eps": 0.5,
        "weight_decay": 0.5,
        "decoupled_weight_decay": False,
        "amsgrad": True,
        "maximize": True,
    }

    def run(groups: list[dict[str, Any]], **options: Any) -> Any:
        optimizer = backend.optimizer(groups, **options)
        for grad in (1.0, -2.0, 0.5):
            for group in optimizer.param_groups:
                for param in group["params"]:
                    param.grad = torch.full_like(param, grad)
            optimizer.step()
        return snapshot(optimizer)

    def start() -> torch.nn.Parameter:
        return backend.parameter([1.0, -2.0])

    mixed = run([{"params": [start()]}, {"params": [start()], key: other[key]}], **common)
    plain = run([{"params": [start()]}], **common)
    changed = run([{"params": [start()]}], **{**common, key: other[key]})
    assert_same({k: v for k, v in mixed.items() if k.startswith("0.")}, plain)
    assert_same({"0." + k[2:]: v for k, v in mixed.items() if k.startswith("1.")}, changed)


def test_add_param_group_takes_schedules_and_defaults(backend: Backend) -> None:
    optimizer = backend.optimizer([backend.parameter([0.0])], lr=0.5, eps=0.0)
    late, later = backend.parameter([0.0]), backend.parameter([0.0])
    optimizer.add_param_group({"params": [late], "lr": RAMP})
    optimizer.add_param_group({"params": later})
    for group in optimizer.param_groups:
        for param in group["params"]:
            param.grad = torch.ones_like(param)
    optimizer.step()
    assert optimizer.last_lr() == [0.5, RAMP(0), 0.5]
    assert later.item() == -0.5


@pytest.mark.parametrize("name", CONTINUED)
@pytest.mark.parametrize("way", ["pickle", "deepcopy"])
@pytest.mark.parametrize("updates", [0, 3])
def test_copies_continue_alike_and_apart(name: str, way: str, updates: int, backend: Backend) -> None:
    problem = Problem(by_name(name), backend.device)
    optimizer = problem.optimizer(backend.name)
    problem.run(optimizer, updates)
    clone = pickle.loads(pickle.dumps(optimizer)) if way == "pickle" else copy.deepcopy(optimizer)
    assert clone.clock == optimizer.clock == updates
    assert repr(clone) == repr(optimizer)
    before = snapshot(clone)
    problem.run(optimizer, 1)
    assert_same(snapshot(clone), before)

    cloned_params = [param for group in clone.param_groups for param in group["params"]]
    for param, copied in zip(problem.params, cloned_params, strict=True):
        set_grad(copied, grad_of(param).clone())
    clone.step()
    assert_same(snapshot(clone), snapshot(optimizer))
    assert clone.last_lr() == optimizer.last_lr()


def test_deepcopy_together_with_its_model(backend: Backend) -> None:
    module = torch.nn.Linear(2, 2).to(backend.device)
    optimizer = backend.optimizer(module.parameters(), lr=RAMP)
    twin_module, twin = copy.deepcopy((module, optimizer))
    assert twin.param_groups[0]["params"][0] is twin_module.weight
    for param in twin_module.parameters():
        param.grad = torch.ones_like(param)
    before = module.weight.detach().clone()
    twin.step()
    assert torch.equal(module.weight.detach(), before)
    assert (twin.clock, optimizer.clock) == (1, 0)


def test_repr_says_what_is_scheduled(backend: Backend) -> None:
    optimizer = backend.optimizer([backend.parameter([1.0])], lr=RAMP, weight_decay=0.125)
    text = repr(optimizer)
    assert "FusedScheduledAdam" in text
    assert repr(RAMP) in text
    assert "weight_decay: 0.125" in text or "weight_decay=0.125" in text


def test_equals_torchs_adamw_on_a_real_model(backend: Backend) -> None:
    torch.manual_seed(0)
    ours_model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1)).double()
    ours_model.to(backend.device)
    theirs_model = copy.deepcopy(ours_model)
    ours = backend.optimizer(ours_model.parameters(), lr=1e-2, weight_decay=0.01)
    theirs = torch.optim.AdamW(theirs_model.parameters(), lr=1e-2, weight_decay=0.01)
    data = torch.randn(16, 4, dtype=torch.float64).to(backend.device)
    for _ in range(20):
        for module, optimizer in ((ours_model, ours), (theirs_model, theirs)):
            optimizer.zero_grad()
            (module(data) ** 2).mean().backward()
            optimizer.step()
    for a, b in zip(ours_model.parameters(), theirs_model.parameters(), strict=True):
        # float64 throughout; training feeds each difference of 1e-16 back through 20 gradients.
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-13)


def test_distributed_checkpoint_of_torch_round_trips(backend: Backend) -> None:
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

    def make() -> tuple[torch.nn.Module, Any]:
        torch.manual_seed(0)
        module = torch.nn.Linear(3, 2).to(backend.device)
        return module, backend.optimizer(module.parameters(), lr=RAMP, weight_decay=0.1)

    def train(module: torch.nn.Module, optimizer: Any, updates: int) -> None:
        for _ in range(updates):
            for param in module.parameters():
                param.grad = torch.ones_like(param)
            optimizer.step()
            optimizer.zero_grad()

    module, optimizer = make()
    train(module, optimizer, 2)
    saved = copy.deepcopy(get_optimizer_state_dict(module, optimizer))
    other_module, other = make()
    other_module.load_state_dict(module.state_dict())
    set_optimizer_state_dict(other_module, other, saved)
    assert other.clock == 2
    for pair in ((module, optimizer), (other_module, other)):
        train(*pair, 2)
    assert_same(snapshot(other), snapshot(optimizer))


def test_load_round_trip_as_accelerate_does_it(backend: Backend) -> None:
    """`prepare()` loads the optimizer's own state dict at once (accelerate/optimizer.py)."""
    problem = Problem(by_name("groups_of_their_own"), backend.device)
    optimizer = problem.optimizer(backend.name)
    plain_problem = Problem(by_name("groups_of_their_own"), backend.device)
    plain = plain_problem.optimizer(backend.name)
    optimizer.load_state_dict(optimizer.state_dict())
    problem.run(optimizer, 2)
    optimizer.load_state_dict(state_dict=optimizer.state_dict())
    problem.run(optimizer, 2)
    plain_problem.run(plain, 4)
    assert_same(snapshot(optimizer), snapshot(plain))
    assert optimizer.clock == 4


# Dynamo warns of each compiled function it cannot look into, and then runs it as it is.
@pytest.mark.filterwarnings("ignore:Dynamo does not know how to trace")
def test_step_inside_a_compiled_training_step(backend: Backend) -> None:
    """A compiled training step may break the graph at step(); it must compute the same."""
    param = backend.parameter([1.0, 2.0])
    optimizer = backend.optimizer([param], lr=RAMP)

    @torch.compile(backend="eager")
    def train_step() -> None:
        loss = (param * param).sum()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    for _ in range(3):
        train_step()
    assert optimizer.clock == 3
    eager = backend.parameter([1.0, 2.0])
    other = backend.optimizer([eager], lr=RAMP)
    for _ in range(3):
        (eager * eager).sum().backward()
        other.step()
        other.zero_grad()
    assert torch.equal(param.detach(), eager.detach())
