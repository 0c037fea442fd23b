"""Other streams than the one that a call is made on: what they may still read or count while settings and state move.

Without a GPU there are no streams; what torch is told of them is looked at instead.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import Backend
from waiting import BUSY_CYCLES

from fused_sched import FusedScheduledAdam, offload, packing, schedules
from fused_sched.backends import select
from fused_sched.engine import CompiledEngine
from fused_sched.norm import NormMemory, NormSettings


def stepped(backend: Backend, **options: object) -> tuple[torch.nn.Parameter, FusedScheduledAdam]:
    param = backend.parameter([1.0, 2.0])
    param.grad = torch.ones_like(param)
    optimizer = backend.optimizer([param], **options)
    optimizer.step()
    return param, optimizer


# -- memory that is let go ------------------------------------------------------------------------------------


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, str]]:
    """Addresses of tensors that torch was told the current stream uses, and that stream."""
    found: list[tuple[int, str]] = []
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda self, stream: found.append((self.data_ptr(), stream)))
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: self)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"stream of {device}")
    return found


def pretend_cuda(optimizer: FusedScheduledAdam) -> CompiledEngine:
    engine = optimizer._devices.first
    assert isinstance(engine, CompiledEngine)
    engine._is_cuda = True
    return engine


def test_replaced_programs_wait_for_the_current_stream(
    get_backend: Callable[[str], Backend], recorded: list[tuple[int, str]]
) -> None:
    """Their memory returned to the stream it came from, where it could be written while a clock here read it."""
    _, optimizer = stepped(get_backend("cpu"), lr=schedules.linear(1.0, 0.0, 9), weight_decay=schedules.constant(0.5))
    engine = pretend_cuda(optimizer)
    addresses = {program: memory.data_ptr() for program, memory in engine._programs.items()}
    assert len(addresses) == 2
    optimizer.set_schedule(schedules.linear(2.0, 0.0, 9))
    optimizer.push_hyperparameters()
    let_go = [address for program, address in addresses.items() if program not in engine._programs]
    assert len(let_go) == 1
    assert recorded == [(let_go[0], "stream of cpu")]


def test_replaced_rates_wait_for_the_current_stream(
    get_backend: Callable[[str], Backend], recorded: list[tuple[int, str]]
) -> None:
    lr = torch.tensor(0.5)
    address = lr.data_ptr()
    _, optimizer = stepped(get_backend("cpu"), lr=lr)
    pretend_cuda(optimizer)
    optimizer.param_groups[0]["eps"] = 1e-4
    optimizer.push_hyperparameters()
    assert recorded == []  # it is still in use
    optimizer.param_groups[0]["lr"] = torch.tensor(0.25)
    optimizer.push_hyperparameters()
    assert recorded == [(address, "stream of cpu")]


# -- state that moves to the host -----------------------------------------------------------------------------


def test_offload_waits_before_its_copies_and_after(
    get_backend: Callable[[str], Backend], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It waited after them only: a step on another stream could be writing what was copied."""
    _, optimizer = stepped(get_backend("cpu"))
    calls = []
    allocate = torch.empty_like
    monkeypatch.setattr(offload, "_finish", lambda memory: calls.append("wait"))
    monkeypatch.setattr(
        torch, "empty_like", lambda *args, **options: calls.append("copy") or allocate(*args, **options)
    )
    optimizer.offload()
    assert calls == ["wait", *["copy"] * (len(calls) - 2), "wait"]
    assert len(calls) > 2
    calls.clear()
    optimizer.reload()
    assert "wait" not in calls


def test_it_waits_once_for_each_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "synchronize", waited.append)
    first, second, host = torch.device("cuda", 0), torch.device("cuda", 1), torch.device("cpu")
    tensors = [SimpleNamespace(device=device, is_cuda=device.type == "cuda") for device in (first, host, second, first)]
    offload._finish({id(tensor): (tensor, first) for tensor in tensors})  # type: ignore[misc]
    assert sorted(map(str, waited)) == ["cuda:0", "cuda:1"]


@pytest.mark.cuda
def test_a_step_on_another_stream_is_taken_along(get_backend: Callable[[str], Backend]) -> None:
    cuda = get_backend("cuda")
    param, optimizer = stepped(cuda)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        torch.cuda._sleep(BUSY_CYCLES)
        optimizer.step()
    optimizer.offload()
    assert optimizer.state[param]["step"].item() == 2.0
    optimizer.reload()
    optimizer.step()
    assert optimizer.state[param]["step"].item() == 3.0


# -- settings that are written while a launch counts ----------------------------------------------------------


def test_settings_of_the_norm_leave_the_count_of_a_running_launch(compiled: Backend) -> None:
    """The blocks that are done are counted in the word that also says whether to skip; it was written whole."""
    module = select(compiled.name, compiled.device).module
    assert module is not None
    memory = NormMemory(module, compiled.device)
    layout = packing.layout_dtype(module, "norm")

    def fields() -> np.void:
        return memory._state.cpu().numpy().view(layout)[0].copy()

    assert fields()["blocks_done"] == 0
    running = fields()
    running["blocks_done"], running["squares"] = 7, 2.5
    memory._state.copy_(torch.from_numpy(running.reshape(1).view(np.float64).copy()))
    upload = lambda content: torch.frombuffer(bytearray(content), dtype=torch.uint8).to(compiled.device)  # noqa: E731
    memory.write(NormSettings(max_norm=0.5, skip_nonfinite=True, grad_divisor=4.0), upload)
    found = fields()
    assert [found[name] for name in ("max_norm", "skip_nonfinite", "grad_divisor")] == [0.5, 1, 4.0]
    assert [found[name] for name in ("blocks_done", "squares")] == [7, 2.5]
    memory.write(NormSettings(), upload)
    found = fields()
    assert [found[name] for name in ("max_norm", "skip_nonfinite", "grad_divisor")] == [np.inf, 0, 1.0]
    assert found["blocks_done"] == 7
