"""What engines do to groups and states, without the engines; tests/frameworks has the real ones."""

from __future__ import annotations

import copy
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
from torch.utils._python_dispatch import TorchDispatchMode

from fused_sched import FusedScheduledAdam, codec, conversion, schedules

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


# ---- state restored key by key, without load_state_dict() --------------------------------------------------


def stepped(count: int) -> FusedScheduledAdam:
    optimizer = FusedScheduledAdam([param(), param()], lr=RAMP)
    for _ in range(count):
        for p in optimizer.param_groups[0]["params"]:
            p.grad = torch.ones_like(p)
        optimizer.step()
    return optimizer


def write_states(source: FusedScheduledAdam, target: FusedScheduledAdam) -> None:
    """As ZeroRedundancyOptimizer and DeepSpeed's universal checkpoint do."""
    saved = source.state_dict()["state"]
    for index, p in enumerate(target.param_groups[0]["params"]):
        target.state[p] = {key: copy.deepcopy(saved[index][key]) for key in ("step", "exp_avg", "exp_avg_sq")}


@pytest.mark.parametrize("dry_run", [False, True])
def test_counts_written_into_a_new_optimizer_are_its_clock(dry_run: bool) -> None:
    """They are another optimizer's, whose schedule was at that update; at 0 ours would warm up again."""
    optimizer = stepped(0)
    if dry_run:
        allocate(optimizer)
    write_states(stepped(3), optimizer)
    assert optimizer.clock == optimizer.scheduler().last_epoch == 3
    step_once(optimizer)
    assert (optimizer.clock, optimizer.last_lr()) == (4, [RAMP(3)])


def allocate(optimizer: FusedScheduledAdam) -> None:
    """An engine's dry run."""
    names = {"__name__": "deepspeed.runtime.zero.stage3", "run": step_once}
    exec("def initialize_optimizer_states(optimizer): run(optimizer)", names)
    names["initialize_optimizer_states"](optimizer)  # type: ignore[operator]
    assert optimizer.clock == 0


def step_once(optimizer: FusedScheduledAdam) -> None:
    for p in optimizer.param_groups[0]["params"]:
        p.grad = torch.ones_like(p)
    optimizer.step()


def test_counts_written_later_or_beside_a_clock_that_was_set_are_not_the_clock() -> None:
    trained, set_by_hand, copied = stepped(5), stepped(0), copy.deepcopy(stepped(5))
    set_by_hand.set_clock(0)
    for optimizer, clock in ((trained, 5), (set_by_hand, 0), (copied, 5)):
        write_states(stepped(3), optimizer)
        assert optimizer.clock == clock
        step_once(optimizer)
        assert (optimizer.clock, optimizer.last_lr()) == (clock + 1, [RAMP(clock)])


def test_a_clock_in_the_states_is_taken_once() -> None:
    optimizer = stepped(5)
    write_states(stepped(3), optimizer)
    for state in optimizer.state.values():
        state["clock"] = 7
    assert optimizer.clock == 7
    for update in (8, 9):
        step_once(optimizer)
        assert optimizer.clock == update
    assert not any("clock" in state for state in optimizer.state.values())


def test_the_state_of_a_rate_that_follows_metrics_is_restored_with_its_group() -> None:
    plateau = schedules.torch.ReduceLROnPlateau(factor=0.5, patience=0, base_lr=0.1)
    ours, theirs = (FusedScheduledAdam([param()], lr=plateau) for _ in range(2))
    for loss in (1.0, 2.0):
        theirs.step()
        theirs.report_metric(loss)
    [saved] = theirs.state_dict()["param_groups"]
    ours.param_groups[0].update({key: value for key, value in saved.items() if key != "params"})
    ours.step()
    assert (ours.clock, ours.last_lr()) == (3, [0.05])
    assert "metric_state" not in ours.param_groups[0]


def test_a_restored_group_leaves_the_live_formats_in_force() -> None:
    ours, theirs = stepped(0), FusedScheduledAdam([param(), param()], lr=RAMP, moments="8bit")
    theirs.step()
    [saved] = theirs.state_dict()["param_groups"]
    ours.param_groups[0].update({key: value for key, value in saved.items() if key != "params"})
    step_once(ours)
    assert {state["exp_avg"].dtype for state in ours.state.values()} == {torch.float32}


class ReadsOfTheDevice(TorchDispatchMode):
    """Counts `.item()`, int() and the like, each of which waits for a CUDA device."""

    count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += function is torch.ops.aten._local_scalar_dense.default
        return function(*args, **(kwargs or {}))


def test_saving_waits_for_the_device_as_often_for_many_parameters_as_for_one() -> None:
    counts = []
    for number in (1, 20):
        params = [param() for _ in range(number)]
        optimizer = FusedScheduledAdam(params, lr=RAMP)
        optimizer.step()
        with ReadsOfTheDevice() as reads:
            saved = optimizer.state_dict()
        assert [state["step_int64"] for state in saved["state"].values()] == [1] * number
        counts.append(reads.count)
    assert counts[0] == counts[1], counts


# ---- schedulers of engines ---------------------------------------------------------------------------------


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


def test_a_norm_without_other_processes_experts_is_refused(engine_class: Any) -> None:
    p = param()
    p.allreduce = False  # DeepSpeed's mark of an expert's parameter
    optimizer = FusedScheduledAdam([p], lr=RAMP)
    engine = engine_class(optimizer, optimizer.scheduler())
    engine.step()
    for name, value in (("max_grad_norm", 1.0), ("skip_nonfinite", True)):
        before = getattr(optimizer, name)
        setattr(optimizer, name, value)
        with pytest.raises(RuntimeError, match="norm_reduce_hook"):
            engine.step()
        setattr(optimizer, name, before)
    optimizer.max_grad_norm = 1.0
    optimizer.norm_reduce_hook = lambda squares: None
    engine.step()
    assert optimizer.clock == 2


def test_a_norm_within_zero_is_refused_whatever_reduces_it(engine_class: Any) -> None:
    """The hook would sum over processes what ZeRO hands over in one call, a group or part of one."""
    names = {"__name__": "deepspeed.runtime.zero.stage_1_and_2"}
    exec(ENGINE, names)
    optimizer = FusedScheduledAdam([param()], lr=RAMP, max_grad_norm=1.0)
    engine = names["Engine"](optimizer, None)
    for hook in (None, lambda squares: None):
        optimizer.norm_reduce_hook = hook
        with pytest.raises(RuntimeError, match="gradient_clipping"):
            engine.step()
    assert optimizer.clock == 0


def test_state_that_an_engine_swaps_to_disk_is_refused(engine_class: Any) -> None:
    names = {"__name__": "deepspeed.runtime.zero.stage3"}
    exec(ENGINE, names)
    optimizer = FusedScheduledAdam([param()], lr=RAMP)
    engine = names["Engine"](optimizer, None)
    engine.swap_optimizer = True
    with pytest.raises(RuntimeError, match='"cpu"'):
        engine.step()
    assert not optimizer.state
    engine.swap_optimizer = False
    engine.step()
    assert optimizer.clock == 1


# ---- 8-bit moments where DeepSpeed converts checkpoints ----------------------------------------------------


def test_8bit_moments_are_exact_in_bfloat16_and_in_codes_again() -> None:
    """Groups of every scale, rounded up and down: what ZeRO's checkpoints hold of them restores them bit for bit."""
    generator = torch.Generator().manual_seed(0)
    exponents = torch.arange(-149, 128).repeat_interleave(4 * codec.GROUP)
    mantissas = 1 + torch.rand(exponents.shape, generator=generator, dtype=torch.float64)
    spread = torch.randint(0, 24, exponents.shape, generator=generator)
    magnitude = torch.ldexp(mantissas, exponents - spread).float()
    magnitude[5], magnitude[40] = torch.inf, torch.nan
    signs = torch.where(torch.rand(exponents.shape, generator=generator) < 0.5, -1.0, 1.0)
    for key in (None, *(codec.random_key(0, step, 0) for step in range(4))):
        state = codec.encode_moments("8bit", magnitude * signs, magnitude, key)
        exported = conversion.for_zero(state)
        assert exported.keys() == {"exp_avg", "exp_avg_sq"}
        again = codec.encode_moments("8bit", exported["exp_avg"].float(), exported["exp_avg_sq"].float())
        for name in ("exp_avg", "exp_avg_sq"):
            values = codec.decode_moment(name, state)
            assert_same_values(exported[name].float(), values)
            assert_same_values(codec.decode_moment(name, again), values)


def assert_same_values(actual: torch.Tensor | None, expected: torch.Tensor | None) -> None:
    assert actual is not None
    assert expected is not None
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


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
