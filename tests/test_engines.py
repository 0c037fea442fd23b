"""What engines do to groups and states, without the engines; tests/frameworks has the real ones."""

from __future__ import annotations

import sys
import types
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from samples import FAST, SLOW, param, two_groups
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

from fused_sched import FusedScheduledAdam, schedules

RAMP = schedules.linear(1.0, 0.0, 100)


def test_a_clock_restored_into_hidden_groups_is_taken_once() -> None:
    """ZeRO-1 shows one group per call, and a universal checkpoint leaves the clock in all of them."""
    _, _, optimizer = two_groups()
    groups = list(optimizer.param_groups)
    optimizer.step()
    for group in groups:
        group["clock"] = 10
    for update in (11, 12):
        for group in groups:
            optimizer.param_groups = [group]
            optimizer.step()
            optimizer.param_groups = groups
            assert optimizer.clock == update


def test_options_of_another_group_are_undone() -> None:
    """From a universal checkpoint ZeRO-3 copies group 0's keys into all groups (zero/stage3.py:3685)."""
    groups = [{"params": [param()], "lr": SLOW, "weight_decay": 0.1}, {"params": [param()], "lr": FAST}]
    optimizer = FusedScheduledAdam(groups)
    saved = optimizer.state_dict()["param_groups"][0]
    for group in optimizer.param_groups:
        group.update({key: value for key, value in saved.items() if key != "params"})
    optimizer.step()
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]
    assert optimizer.last_lr() == [0.1, 0.2]


def test_tensors_in_a_checkpoint_have_the_parameters_shape_but_for_the_step() -> None:
    """DeepSpeed's universal checkpoint cuts every other tensor to its parameter's length."""
    optimizer = FusedScheduledAdam([param()])
    optimizer.step()
    [state] = optimizer.state_dict()["state"].values()
    assert {name for name, value in state.items() if isinstance(value, torch.Tensor) and value.dim() == 0} == {"step"}
    assert state["step_int64"] == 1


def test_its_own_step_tensor_alone_is_enough() -> None:
    optimizer = FusedScheduledAdam([param()])
    optimizer.step()
    saved = optimizer.state_dict()
    del saved["state"][0]["step_int64"]
    optimizer.load_state_dict(saved)
    [state] = optimizer.state.values()
    assert (state["step"].item(), state["step_int64"].item()) == (1, 1)


def test_what_a_flattened_checkpoint_lacks_is_missed_or_refused() -> None:
    """torch.distributed.checkpoint puts {} in place of it."""
    optimizer = FusedScheduledAdam([param()])
    optimizer.step()
    saved = optimizer.state_dict()
    saved["state"][0]["step_int64"] = {}
    optimizer.load_state_dict(saved)
    assert optimizer.clock == 1
    saved["state"][0]["exp_avg"] = {}
    with pytest.raises(ValueError, match="nested form"):
        optimizer.load_state_dict(saved)


class EnginesScheduler:
    """Writes group["lr"] without a mark, as DeepSpeed's do."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer
        for group in optimizer.param_groups:
            group["lr"] = 0.0


ENGINE = """
class Engine:
    def __init__(self, optimizer, lr_scheduler):
        self.optimizer, self.lr_scheduler = optimizer, lr_scheduler
    def step(self):
        self.optimizer.step()
"""


@pytest.fixture
def engine_class(monkeypatch: pytest.MonkeyPatch) -> Any:
    """An engine of a DeepSpeed that was imported."""
    module = types.ModuleType("deepspeed.runtime.zero.utils")
    module.ZERO_SUPPORTED_OPTIMIZERS = []  # type: ignore[attr-defined]
    for name in ("deepspeed", "deepspeed.runtime", "deepspeed.runtime.zero"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    names = {"__name__": "deepspeed.runtime.engine"}
    exec(ENGINE, names)
    return names["Engine"]


@pytest.mark.parametrize("lr", [RAMP, 0.1])
def test_an_engines_own_scheduler_over_a_schedule_is_refused(lr: Any, engine_class: Any) -> None:
    p = param()
    optimizer = FusedScheduledAdam([p], lr=lr)
    engine = engine_class(optimizer, EnginesScheduler(optimizer))
    if lr is not RAMP:
        engine.step()  # a plain rate is anybody's to drive
        return
    with pytest.raises(RuntimeError, match=r"EnginesScheduler.*lr_scheduler=opt\.scheduler\(\)"):
        engine.step()
    assert (optimizer.clock, p[0].item()) == (0, 1.0)


def test_the_handle_registers_its_class_with_deepspeed_and_is_no_second_scheduler(engine_class: Any) -> None:
    optimizer = FusedScheduledAdam([param()], lr=RAMP)
    engine_class(optimizer, optimizer.scheduler()).step()
    assert optimizer.clock == 1
    supported = sys.modules["deepspeed.runtime.zero.utils"].ZERO_SUPPORTED_OPTIMIZERS
    assert supported == [FusedScheduledAdam]


# ---- DTensors, in one process ------------------------------------------------------------------------------


@pytest.fixture
def mesh(tmp_path: Any) -> Iterator[Any]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@pytest.mark.parametrize("master", ["fp32", "split16"])
def test_distributed_parameters_keep_distributed_state(master: str, mesh: Any) -> None:
    values = torch.linspace(-1, 1, 12).reshape(4, 3).bfloat16()
    p = torch.nn.Parameter(distribute_tensor(values, mesh, [Shard(0)]))
    q = torch.nn.Parameter(values.clone())
    ours, plain = (FusedScheduledAdam([each], lr=RAMP, master=master) for each in (p, q))
    for _ in range(3):
        q.grad = torch.ones_like(q)
        p.grad = distribute_tensor(torch.ones_like(values), mesh, [Replicate()])
        ours.step()
        plain.step()
    assert torch.equal(p.full_tensor(), q)
    for name, value in ours.state[p].items():
        assert isinstance(value, DTensor) is (name not in ("step", "step_int64")), name
    loaded = FusedScheduledAdam([p], lr=RAMP, master=master)
    loaded.load_state_dict(ours.state_dict())
    assert torch.equal(loaded.state[p]["exp_avg"].to_local(), ours.state[p]["exp_avg"].to_local())
    ours.state[p]["exp_avg"] = distribute_tensor(torch.zeros(4, 3), mesh, [Shard(0)])
    ours.step()
    assert ours.clock == 4


def test_distributed_tensors_that_do_not_fit_are_refused(mesh: Any) -> None:
    shard = torch.nn.Parameter(distribute_tensor(torch.ones(4), mesh, [Shard(0)]))
    p = param()
    with pytest.raises(TypeError, match="sum over processes"):
        FusedScheduledAdam([DTensor.from_local(torch.ones(4), mesh, [Partial()]).requires_grad_()])
    optimizer = FusedScheduledAdam([p])
    optimizer.step()
    optimizer.state[p]["exp_avg"] = shard.detach()
    with pytest.raises(ValueError, match="full_tensor"):
        optimizer.step()
    optimizer = FusedScheduledAdam([shard])
    optimizer.state[shard]["exp_avg"] = distribute_tensor(torch.ones(5), mesh, [Shard(0)])
    shard.grad = distribute_tensor(torch.ones(4), mesh, [Shard(0)])
    with pytest.raises(ValueError, match="another model"):
        optimizer.step()
    assert torch.equal(shard.full_tensor(), torch.ones(4))
