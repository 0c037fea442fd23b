"""Steps within the backward pass: the weights, state and clock of `backward(); step(); zero_grad()`, in less memory."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
import torch._dynamo
from cases import assert_same, snapshot
from conftest import Backend
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import checkpoint

from fused_sched import FusedScheduledAdam, schedules

RAMP = schedules.linear(0.1, 0.0, 20)
KIB = 1024


class Mixed(torch.nn.Module):
    """Parameters of several dtypes, one of them used twice, and one that only every second input uses."""

    def __init__(self, device: torch.device | str = "cpu") -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weights = torch.nn.ParameterList(
            torch.randn(shape, generator=generator).to(device, dtype)
            for shape, dtype in (
                ((40, 3), torch.float32),
                ((33,), torch.bfloat16),
                ((5,), torch.float64),
                ((64,), torch.bfloat16),
                ((7, 7), torch.float32),
            )
        )

    def forward(self, x: float) -> torch.Tensor:
        used = self.weights if x > 0.0 else list(self.weights)[:-1]
        losses = [(w.double() * w.double() * x).sum() + (w.double() * (i + x)).sum() for i, w in enumerate(used)]
        return torch.stack(losses).sum()


def layers(count: int = 6, width: int = 16) -> torch.nn.Sequential:
    torch.manual_seed(0)
    return torch.nn.Sequential(*(torch.nn.Linear(width, width, bias=False) for _ in range(count)))


def data(updates: int, width: int = 16) -> torch.Tensor:
    return torch.randn(updates, 3, width, generator=torch.Generator().manual_seed(1))


def loss_of(model: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    loss: torch.Tensor = model(x).square().mean()
    return loss


def trained_plainly(model: torch.nn.Module, xs: torch.Tensor, **options: Any) -> FusedScheduledAdam:
    optimizer = FusedScheduledAdam(model.parameters(), **{"lr": RAMP, **options})
    for x in xs:
        loss_of(model, x).backward()
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


# ---- the same bits ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("bucket_bytes", [0, 300, 2**20])
@pytest.mark.parametrize(
    "formats", [{}, {"master": "split8", "moments": "8bit"}, {"master": "stochastic", "moments": "bf16"}], ids=str
)
def test_equals_backward_step_zero_grad(backend: Backend, bucket_bytes: int, formats: dict[str, str]) -> None:
    model, plain = Mixed(backend.device), Mixed(backend.device)
    options: dict[str, Any] = {"lr": RAMP, "weight_decay": 0.1, "grad_divisor": 2.0, **formats}
    optimizer = backend.optimizer(model.parameters(), **options)
    other = backend.optimizer(plain.parameters(), **options)
    optimizer.step_in_backward(model, bucket_bytes=bucket_bytes)
    for update in range(8):
        x = (-1.0) ** update * (update + 1)
        model(x).backward()
        assert [p.grad for p in model.parameters()] == [None] * 5
        plain(x).backward()
        other.step()
        other.zero_grad()
        assert optimizer.clock == other.clock == update + 1
        assert optimizer.last_lr() == other.last_lr() == [RAMP(update)]
    assert_same(snapshot(optimizer), snapshot(other))
    for field in ("clock", "lr"):
        assert np.array_equal(optimizer.history()[field], other.history()[field])


def test_groups_with_schedules_of_their_own() -> None:
    model, plain = layers(3), layers(3)

    def make(of: torch.nn.Sequential) -> FusedScheduledAdam:
        return FusedScheduledAdam(
            [{"params": of[2].parameters(), "lr": 0.5}, {"params": [of[0].weight, of[1].weight]}], lr=RAMP
        )

    optimizer, other = make(model), make(plain)
    with optimizer.step_in_backward(model, bucket_bytes=0):
        for x in data(4):
            loss_of(model, x).backward()
    for x in data(4):
        loss_of(plain, x).backward()
        other.step()
        other.zero_grad()
    assert_same(snapshot(optimizer), snapshot(other))


def test_a_tied_weight_is_updated_once() -> None:
    model, plain = layers(3), layers(3)
    for m in (model, plain):
        m[2].weight = m[0].weight
    optimizer = FusedScheduledAdam(model.parameters(), lr=RAMP)
    optimizer.step_in_backward(model, bucket_bytes=0)
    for x in data(4):
        loss_of(model, x).backward()
    assert_same(snapshot(optimizer), snapshot(trained_plainly(plain, data(4))))


def test_a_compiled_model() -> None:
    torch._dynamo.reset()
    model, plain = layers(), layers()
    optimizer = FusedScheduledAdam(model.parameters(), lr=RAMP)
    optimizer.step_in_backward(model, bucket_bytes=0)
    compiled = torch.compile(model, backend="aot_eager")
    for x in data(4):
        loss_of(compiled, x).backward()  # type: ignore[arg-type]
    assert optimizer.clock == 4
    assert_same(snapshot(optimizer), snapshot(trained_plainly(plain, data(4))))


def test_every_backward_is_an_update_whatever_it_reaches() -> None:
    """Passes that share no parameter are no parts of one update."""
    a, b = torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(2))
    optimizer = FusedScheduledAdam([a, b], lr=RAMP)
    optimizer.step_in_backward(torch.nn.ParameterList([a, b]))
    for update, p in enumerate((a, b, b, a)):
        p.sum().backward()
        assert optimizer.clock == update + 1
    assert a[0].item() == pytest.approx(1.0 - RAMP(0) - RAMP(3))
    assert b[0].item() == pytest.approx(1.0 - RAMP(1) - RAMP(2))


def test_a_backward_that_reaches_no_parameter_is_no_update() -> None:
    p, frozen = torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(2), requires_grad=False)
    optimizer = FusedScheduledAdam([p, frozen], lr=RAMP)
    optimizer.step_in_backward(torch.nn.ParameterList([p, frozen]))
    x = torch.ones(2, requires_grad=True)
    (x * 2.0).sum().backward()
    assert (optimizer.clock, p[0].item()) == (0, 1.0)
    (p * frozen).sum().backward()
    assert (optimizer.clock, frozen[0].item()) == (1, 1.0)


def test_gradients_asked_for_are_no_update() -> None:
    model = layers(2)
    optimizer = FusedScheduledAdam(model.parameters(), lr=RAMP)
    optimizer.step_in_backward(model)
    torch.autograd.grad(loss_of(model, data(1)[0]), list(model.parameters()))
    assert optimizer.clock == 0


def test_step_and_zero_grad_may_stay_in_the_loop() -> None:
    model, plain = layers(), layers()
    optimizer = FusedScheduledAdam(model.parameters(), lr=RAMP)
    optimizer.step_in_backward(model)
    for x in data(4):
        loss_of(model, x).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert optimizer.clock == 4
    assert_same(snapshot(optimizer), snapshot(trained_plainly(plain, data(4))))


def test_checkpoints_go_on_either_way() -> None:
    model, plain = layers(), layers()
    optimizer = FusedScheduledAdam(model.parameters(), lr=RAMP)
    with optimizer.step_in_backward(model, bucket_bytes=KIB):
        for x in data(2):
            loss_of(model, x).backward()
        saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    resumed = layers()
    resumed.load_state_dict(saved[0])
    optimizer = FusedScheduledAdam(resumed.parameters(), lr=RAMP)
    optimizer.load_state_dict(saved[1])
    for x in data(4)[2:]:
        loss_of(resumed, x).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert_same(snapshot(optimizer), snapshot(trained_plainly(plain, data(4))))


# ---- memory ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("bucket_bytes", "most"), [(0, 1), (KIB, 1), (KIB + 1, 2), (3 * KIB, 3), (2**20, 6)])
def test_no_more_gradients_than_a_bucket_are_alive(bucket_bytes: int, most: int) -> None:
    """Each of six gradients has 1 KiB."""
    model = layers()
    storages: list[StorageWeakRef] = []
    alive: list[int] = []

    def count(param: torch.Tensor) -> None:
        assert param.grad is not None
        storages.append(StorageWeakRef(param.grad.untyped_storage()))
        alive.append(sum(not storage.expired() for storage in storages))

    for p in model.parameters():
        p.register_post_accumulate_grad_hook(count)
    optimizer = FusedScheduledAdam(model.parameters(), lr=RAMP)
    optimizer.step_in_backward(model, bucket_bytes=bucket_bytes)
    for x in data(2):
        loss_of(model, x).backward()
        assert all(storage.expired() for storage in storages)
    assert len(alive) == 12
    assert max(alive) == most


# ---- the handle ------------------------------------------------------------------------------------------


def test_removed_it_leaves_gradients_alone() -> None:
    model = layers(2)
    optimizer = FusedScheduledAdam(model.parameters(), lr=RAMP)
    handle = optimizer.step_in_backward(model)
    handle.remove()
    handle.remove()
    loss_of(model, data(1)[0]).backward()
    assert optimizer.clock == 0
    assert all(p.grad is not None for p in model.parameters())
    optimizer.step()
    optimizer.zero_grad()
    with optimizer.step_in_backward(model):
        loss_of(model, data(1)[0]).backward()
    assert optimizer.clock == 2


def test_removed_within_a_pass_it_leaves_the_rest_to_step() -> None:
    model, plain = layers(3), layers(3)
    optimizer = FusedScheduledAdam(model.parameters(), lr=0.1)
    handle = optimizer.step_in_backward(model)
    model[0].weight.register_post_accumulate_grad_hook(lambda _: handle.remove())
    loss_of(model, data(1)[0]).backward()
    assert all(p.grad is not None for p in model.parameters())
    optimizer.step()
    optimizer.zero_grad()
    assert_same(snapshot(optimizer), snapshot(trained_plainly(plain, data(1), lr=0.1)))


def test_copies_step_when_told_to() -> None:
    model = layers(2)
    optimizer = FusedScheduledAdam(model.parameters(), lr=RAMP)
    optimizer.step_in_backward(model)
    copied_model, copied = copy.deepcopy((model, optimizer))
    loss_of(copied_model, data(1)[0]).backward()
    assert (optimizer.clock, copied.clock) == (0, 0)
    copied.step()
    copied.zero_grad()
    copied.step_in_backward(copied_model)
    assert copied.clock == 1


# ---- nested and repeated passes --------------------------------------------------------------------------


class Checkpointed(torch.nn.Module):
    def __init__(self, use_reentrant: bool) -> None:
        super().__init__()
        self.layers = layers(4)
        self.use_reentrant = use_reentrant

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = checkpoint(layer, x, use_reentrant=self.use_reentrant)  # type: ignore[assignment]
        return x


def test_activation_checkpointing() -> None:
    model, plain = Checkpointed(use_reentrant=False), Checkpointed(use_reentrant=False)
    optimizer = FusedScheduledAdam(model.parameters(), lr=RAMP)
    optimizer.step_in_backward(model, bucket_bytes=0)
    for x in data(4):
        loss_of(model, x).backward()
    assert optimizer.clock == 4
    assert_same(snapshot(optimizer), snapshot(trained_plainly(plain, data(4))))


def test_reentrant_checkpointing_is_refused() -> None:
    model = Checkpointed(use_reentrant=True)
    optimizer = FusedScheduledAdam(model.parameters(), lr=RAMP)
    before = copy.deepcopy(model.state_dict())
    handle = optimizer.step_in_backward(model)
    x = data(1)[0].requires_grad_()
    with pytest.raises(RuntimeError, match="use_reentrant=False"):
        loss_of(model, x).backward()
    assert optimizer.clock == 0
    assert_same(model.state_dict(), before)
    handle.remove()
    optimizer.zero_grad()
    loss_of(model, x).backward()
    optimizer.step()
    assert optimizer.clock == 1


def test_a_second_pass_over_a_graph_that_needs_the_old_weights_is_torchs_error() -> None:
    model = layers(2)
    optimizer = FusedScheduledAdam(model.parameters(), lr=RAMP)
    optimizer.step_in_backward(model)
    loss = loss_of(model, data(1)[0])
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    p = torch.nn.Parameter(torch.ones(2))
    optimizer = FusedScheduledAdam([p], lr=RAMP)
    optimizer.step_in_backward(torch.nn.ParameterList([p]))
    loss = p.sum()  # needs no weights
    loss.backward(retain_graph=True)
    loss.backward()
    assert optimizer.clock == 2


def test_after_a_pass_that_failed() -> None:
    model = layers(4)
    optimizer = FusedScheduledAdam(model.parameters(), lr=RAMP)
    optimizer.step_in_backward(model, bucket_bytes=2 * KIB)

    def fail(_: torch.Tensor) -> None:
        raise ArithmeticError

    hook = model[1].weight.register_post_accumulate_grad_hook(fail)
    with pytest.raises(ArithmeticError):
        loss_of(model, data(1)[0]).backward()
    hook.remove()
    assert optimizer.clock == 1
    weights = copy.deepcopy(model.state_dict())
    with pytest.raises(RuntimeError, match=r"were left .* call opt.zero_grad\(\)"):
        loss_of(model, data(1)[0]).backward()
    assert_same(model.state_dict(), weights)
    optimizer.zero_grad()
    loss_of(model, data(1)[0]).backward()
    assert optimizer.clock == 2
