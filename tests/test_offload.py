"""State moved to the host and back: no bit changes, the memory is freed, nothing is done with it meanwhile."""

from __future__ import annotations

import copy
import gc
import io
from typing import Any

import pytest
import torch
from cases import Problem, assert_same, by_name, snapshot
from conftest import Backend
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.multiprocessing.reductions import StorageWeakRef

from fused_sched import FusedScheduledAdam

NAMES = ["groups_of_their_own", "all_dtypes_by_default", "bf16_split8_8bit", "bf16_stochastic_bf16"]


def stepped(numel: int = 4, **options: Any) -> tuple[torch.nn.Parameter, FusedScheduledAdam]:
    p = torch.nn.Parameter(torch.ones(numel))
    p.grad = torch.ones(numel)
    optimizer = FusedScheduledAdam([p], lr=0.1, **options)
    optimizer.step()
    return p, optimizer


def cloned(optimizer: FusedScheduledAdam) -> dict[str, torch.Tensor]:
    return {name: tensor.cpu().clone() for name, tensor in snapshot(optimizer).items()}


def buffers_of(optimizer: FusedScheduledAdam) -> list[torch.Tensor]:
    arenas = {id(s.entry.arena): s.entry.arena for s in optimizer.state.values()}
    return [buffer for arena in arenas.values() for buffer in arena.all_buffers]


@pytest.mark.parametrize("name", NAMES)
def test_there_and_back_changes_no_bit(backend: Backend, name: str) -> None:
    moved, plain = Problem(by_name(name), backend.device), Problem(by_name(name), backend.device)
    optimizer, other = moved.optimizer(backend.name), plain.optimizer(backend.name)
    for _ in range(2):
        moved.run(optimizer, 2)
        before = cloned(optimizer)
        addresses = {buffer.data_ptr() for buffer in buffers_of(optimizer)}
        optimizer.offload()
        assert all(t.device.type == "cpu" for s in optimizer.state.values() for t in s.values())
        assert addresses.isdisjoint(buffer.data_ptr() for buffer in buffers_of(optimizer))
        assert_same(cloned(optimizer), before)
        optimizer.reload()
        assert all(t.device.type == backend.device.type for s in optimizer.state.values() for t in s.values())
        assert_same(cloned(optimizer), before)
    moved.run(optimizer, 2)
    plain.run(other, 6)
    assert_same(snapshot(optimizer), snapshot(other))
    assert optimizer.clock == 6


def test_its_memory_is_freed_both_ways() -> None:
    _, optimizer = stepped()
    for move in (optimizer.offload, optimizer.reload):
        storages = [StorageWeakRef(buffer.untyped_storage()) for buffer in buffers_of(optimizer)]
        move()
        assert [storage.expired() for storage in storages] == [True] * 3


def test_a_tensor_taken_before_keeps_its_values() -> None:
    p, optimizer = stepped()
    taken = optimizer.state[p]["exp_avg"]
    before = taken.clone()
    optimizer.offload()
    assert taken is not optimizer.state[p]["exp_avg"]
    optimizer.reload()
    optimizer.step()
    assert torch.equal(taken, before)
    assert not torch.equal(optimizer.state[p]["exp_avg"], before)


def test_twice_is_once() -> None:
    p, optimizer = stepped()
    optimizer.reload()
    optimizer.offload()
    moved = optimizer.state[p]["exp_avg"]
    optimizer.offload()
    assert optimizer.state[p]["exp_avg"] is moved
    optimizer.reload()
    back = optimizer.state[p]["exp_avg"]
    optimizer.reload()
    assert optimizer.state[p]["exp_avg"] is back


def test_before_the_first_step_there_is_nothing_to_move() -> None:
    p = torch.nn.Parameter(torch.ones(2))
    p.grad = torch.ones(2)
    optimizer = FusedScheduledAdam([p])
    optimizer.offload()
    with pytest.raises(RuntimeError, match=r"call opt\.reload\(\)"):
        optimizer.step()
    optimizer.reload()
    optimizer.step()
    assert optimizer.clock == 1


def test_what_needs_the_state_is_refused_and_changes_nothing() -> None:
    p = torch.nn.Parameter(torch.ones(4))
    model = torch.nn.ParameterDict({"p": p})
    optimizer = FusedScheduledAdam([p], lr=0.1)
    p.grad = torch.ones(4)
    optimizer.step()
    saved, exact = copy.deepcopy(optimizer.state_dict()), optimizer.fp32_state_dict(model)
    saved["param_groups"][0]["lr"] = 0.5
    before = cloned(optimizer)
    optimizer.offload()
    for call in (
        optimizer.step,
        lambda: optimizer.load_state_dict(saved),
        lambda: optimizer.load_fp32_state_dict(model, exact),
    ):
        with pytest.raises(RuntimeError, match=r"call opt\.reload\(\)"):
            call()
    optimizer.zero_grad()
    with optimizer.step_in_backward(model), pytest.raises(RuntimeError, match=r"call opt\.reload\(\)"):
        p.sum().backward()
    assert_same(cloned(optimizer), before)
    assert (optimizer.clock, optimizer.param_groups[0]["lr"]) == (1, 0.1)


@pytest.mark.parametrize("name", NAMES)
def test_checkpoints_and_copies_while_offloaded(backend: Backend, name: str) -> None:
    problem = Problem(by_name(name), backend.device)
    optimizer = problem.optimizer(backend.name)
    problem.run(optimizer, 2)
    model = torch.nn.ParameterList(problem.params)
    expected = copy.deepcopy((optimizer.state_dict(portable=True), optimizer.fp32_state_dict(model)))
    optimizer.offload()
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    portable, exact = optimizer.state_dict(portable=True), optimizer.fp32_state_dict(model)
    for key, state in expected[0]["state"].items():
        assert_same(portable["state"][key], state)
    assert_same(exact, expected[1])

    # A copy of an offloaded optimizer is not offloaded, and neither is one that loads its checkpoint.
    _, copied = copy.deepcopy((problem.params, optimizer))
    assert_same(cloned(copied), cloned(optimizer))
    loaded = Problem(by_name(name), backend.device)
    other = loaded.optimizer(backend.name)
    loaded.run(other, 2)
    other.load_state_dict(saved)
    optimizer.reload()
    problem.run(optimizer, 2)
    loaded.run(other, 2)
    assert_same(snapshot(other), snapshot(optimizer))
    for target in (p for group in copied.param_groups for p in group["params"]):
        target.grad = torch.zeros_like(target)
    copied.step()
    assert copied.clock == 3


def test_what_is_written_while_offloaded_counts(backend: Backend) -> None:
    p = backend.parameter([1.0, 2.0])
    optimizer = backend.optimizer([p], lr=0.1, betas=(0.5, 0.5))
    p.grad = torch.ones_like(p)
    optimizer.step()
    optimizer.offload()
    optimizer.state[p]["exp_avg"].fill_(3.0)  # into its memory
    optimizer.state[p]["exp_avg_sq"] = torch.full((2,), 4.0)  # in place of it
    optimizer.reload()
    assert optimizer.state[p]["exp_avg_sq"].tolist() == [4.0, 4.0]
    optimizer.step()
    assert optimizer.state[p]["exp_avg"].tolist() == [2.0, 2.0]
    assert optimizer.state[p]["exp_avg_sq"].tolist() == [2.5, 2.5]
    assert optimizer.state[p]["step"].item() == 2.0


@pytest.mark.parametrize("offloaded", [False, True])
def test_running_out_of_memory_leaves_everything_where_it_was(offloaded: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    p, optimizer = stepped()
    if offloaded:
        optimizer.offload()
    before, shown = cloned(optimizer), optimizer.state[p]["exp_avg"]
    allocate, calls = torch.empty_like, []

    def empty_like(tensor: torch.Tensor, **options: Any) -> torch.Tensor:
        calls.append(tensor)
        if len(calls) == 2:
            raise torch.OutOfMemoryError
        return allocate(tensor, **options)

    with monkeypatch.context() as patched:
        patched.setattr(torch, "empty_like", empty_like)
        with pytest.raises(torch.OutOfMemoryError):
            optimizer.reload() if offloaded else optimizer.offload()
    assert optimizer.state[p]["exp_avg"] is shown
    assert_same(cloned(optimizer), before)
    optimizer.reload()
    optimizer.step()
    assert optimizer.clock == 2


def test_captured_steps_refuse_it(monkeypatch: pytest.MonkeyPatch) -> None:
    p, optimizer = stepped()
    optimizer._devices._uses_cuda = True
    with monkeypatch.context() as capturing:
        for module in ("engine", "devices", "offload"):
            capturing.setattr(f"fused_sched.{module}.is_capturing", lambda device: True)
        optimizer.step()
        with pytest.raises(RuntimeError, match="the capture of a CUDA graph does not allow"):
            optimizer.offload(discard_graphs=True)
    shown = optimizer.state[p]["exp_avg"]
    with pytest.raises(RuntimeError, match="discard_graphs=True"):
        optimizer.offload()
    assert optimizer.state[p]["exp_avg"] is shown
    optimizer.offload(discard_graphs=True)
    optimizer.reload()
    optimizer.offload()  # no graph has captured a step since


@pytest.mark.usefixtures("one_process")
def test_distributed_parameters_keep_distributed_state() -> None:
    mesh = init_device_mesh("cpu", (1,))
    p = torch.nn.Parameter(distribute_tensor(torch.ones(4), mesh, [Shard(0)]))
    plain, other = stepped()
    optimizer = FusedScheduledAdam([p], lr=0.1)
    p.grad = distribute_tensor(torch.ones(4), mesh, [Shard(0)])
    optimizer.step()
    optimizer.offload()
    assert isinstance(optimizer.state[p]["exp_avg"], DTensor)
    optimizer.reload()
    optimizer.step()
    other.step()
    assert torch.equal(p.full_tensor(), plain)
    assert torch.equal(optimizer.state[p]["exp_avg"].full_tensor(), other.state[plain]["exp_avg"])


@pytest.mark.cuda
def test_the_gpus_memory_is_free_meanwhile(get_backend: Any) -> None:
    backend = get_backend("cuda")
    p = backend.parameter(torch.ones(2**20))
    p.grad = torch.ones_like(p)
    optimizer = backend.optimizer([p], lr=0.1)
    optimizer.step()
    gc.collect()  # what earlier tests have left in cycles would be freed between the readings
    used = torch.cuda.memory_allocated()
    optimizer.offload()
    assert used - torch.cuda.memory_allocated() >= 8 * 2**20
    assert buffers_of(optimizer)[0].is_pinned()
    optimizer.reload()
    assert torch.cuda.memory_allocated() == used
    optimizer.step()
    assert p[0].item() == pytest.approx(0.8)
