"""What cannot step within the backward pass: refused, with a way out; and several processes."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch._dynamo
from cases import assert_same
from test_backward import RAMP, data, layers, loss_of, trained_plainly
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from fused_sched import FusedScheduledAdam

# ---- what is refused -------------------------------------------------------------------------------------


@pytest.mark.parametrize("option", [{"max_grad_norm": 1.0}, {"skip_nonfinite": True}], ids=str)
def test_what_needs_all_gradients_is_refused(option: dict[str, Any]) -> None:
    model = layers(2)
    optimizer = FusedScheduledAdam(model.parameters(), lr=RAMP, **option)
    with pytest.raises(ValueError, match="before all gradients are known"):
        optimizer.step_in_backward(model)
    optimizer = FusedScheduledAdam(model.parameters(), lr=RAMP)
    optimizer.step_in_backward(model)
    for name, value in option.items():
        setattr(optimizer, name, value)
    weights = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="before all gradients are known"):
        loss_of(model, data(1)[0]).backward()
    assert_same(model.state_dict(), weights)


def test_arguments_are_checked() -> None:
    model = layers(2)
    optimizer = FusedScheduledAdam(model.parameters(), lr=RAMP)
    with pytest.raises(TypeError, match=r"torch\.nn\.Module, got generator"):
        optimizer.step_in_backward(model.parameters())  # type: ignore[arg-type]
    for bucket_bytes in (-1, True):
        with pytest.raises(ValueError, match="bucket_bytes must be"):
            optimizer.step_in_backward(model, bucket_bytes=bucket_bytes)
    with pytest.raises(ValueError, match="1 of the optimizer's 2 parameters are not the model's"):
        optimizer.step_in_backward(model[0])
    optimizer.step_in_backward(model)
    with pytest.raises(RuntimeError, match="in force already"):
        optimizer.step_in_backward(model)


def test_gradients_that_wait_for_a_step_are_refused() -> None:
    model = layers(2)
    optimizer = FusedScheduledAdam(model.parameters(), lr=RAMP)
    loss_of(model, data(1)[0]).backward()
    with pytest.raises(RuntimeError, match="2 were left"):
        optimizer.step_in_backward(model)


def test_flat_partitions_in_place_of_the_parameters_are_refused() -> None:
    """As ZeRO puts there, between steps (1, 2) or within them (3)."""
    model = layers(2)
    optimizer = FusedScheduledAdam(model.parameters(), lr=RAMP)
    for held in ([torch.nn.Parameter(torch.zeros(512))], []):
        optimizer.param_groups[0]["params"] = held
        with pytest.raises(ValueError, match="ZeRO puts flat partitions"):
            optimizer.step_in_backward(model)


def test_parameters_that_come_later_are_refused() -> None:
    model = layers(3)
    optimizer = FusedScheduledAdam(model[:2].parameters(), lr=RAMP)
    optimizer.step_in_backward(model)
    optimizer.add_param_group({"params": model[2].parameters()})
    with pytest.raises(RuntimeError, match="holds other parameters"):
        loss_of(model, data(1)[0]).backward()
    assert optimizer.clock == 0


def test_a_gradient_that_another_optimizer_took_is_missed() -> None:
    model = layers(2)
    first, second = (FusedScheduledAdam(model.parameters(), lr=RAMP) for _ in range(2))
    first.step_in_backward(model, bucket_bytes=0)
    second.step_in_backward(model, bucket_bytes=0)
    with pytest.raises(RuntimeError, match="taken away by another hook"):
        loss_of(model, data(1)[0]).backward()


def test_a_grad_scaler_is_refused() -> None:
    model = layers(2)
    optimizer = FusedScheduledAdam(model.parameters(), lr=RAMP)
    scaler = torch.amp.GradScaler("cpu")
    handle = optimizer.step_in_backward(model)
    scaler.scale(loss_of(model, data(1)[0])).backward()
    with pytest.raises(RuntimeError, match="GradScaler cannot be used"):
        scaler.step(optimizer)
    handle.remove()
    optimizer.grad_scale = torch.ones(())  # type: ignore[assignment]


# ---- several processes -----------------------------------------------------------------------------------


@pytest.mark.usefixtures("one_process")
def test_ddp_is_refused() -> None:
    model = layers(2)
    optimizer = FusedScheduledAdam(model.parameters(), lr=RAMP)
    with pytest.raises(ValueError, match="DistributedDataParallel sums gradients"):
        optimizer.step_in_backward(DistributedDataParallel(model))


@pytest.mark.usefixtures("one_process")
def test_plain_parameters_of_several_processes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = layers(2)
    optimizer = FusedScheduledAdam(model.parameters(), lr=RAMP)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    with pytest.raises(ValueError, match="with 2 processes each would apply its own gradients"):
        optimizer.step_in_backward(model)


@pytest.mark.skipif(not hasattr(torch.cpu.Stream, "record_event"), reason="torch 2.6's fully_shard has no CPU")
@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("bucket_bytes", [0, 2**20])
def test_fully_shard(bucket_bytes: int) -> None:
    mesh = torch.distributed.init_device_mesh("cpu", (1,))
    model, plain = layers(), layers()
    for layer in model:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = FusedScheduledAdam(model.parameters(), lr=RAMP)
    optimizer.step_in_backward(model, bucket_bytes=bucket_bytes)
    for x in data(4):
        loss_of(model, x).backward()
        assert [p.grad for p in model.parameters()] == [None] * 6
    assert optimizer.clock == 4
    trained_plainly(plain, data(4))
    assert_same({k: v.full_tensor() for k, v in model.state_dict().items()}, plain.state_dict())
