"""Clipping by the global norm, skipping what is not finite, and the norm itself, through the optimizer."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable

import numpy as np
import pytest
import torch
from cases import Case, Problem, assert_same, by_name, grad_of, snapshot, values_of
from conftest import REFERENCE_EVERYWHERE, Backend
from model_gradients import model_gradients, set_grads, start
from tolerances import param_bound, state_bound

from fused_sched import schedules

inf, nan = math.inf, math.nan

CLIPPED_CASES = [
    by_name(name)
    for name in ("defaults", "maximize", "grad_divisor", "gradients_of_all_sizes", "fp64", "groups_of_their_own",
                 "all_dtypes_in_a_group")
]  # fmt: skip


@pytest.fixture(params=REFERENCE_EVERYWHERE)
def backend(request: pytest.FixtureRequest, get_backend: Callable[[str], Backend]) -> Backend:
    return get_backend(request.param)


def expected_norm(problem: Problem, divisor: float) -> float:
    return math.sqrt(sum(float((values_of(grad_of(p)) ** 2).sum()) for p in problem.params)) / divisor


@pytest.mark.parametrize("case", CLIPPED_CASES, ids=str)
def test_matches_the_float64_oracle(backend: Backend, case: Case) -> None:
    """Gradients of the oracle are divided by what clips them; the bounds are those of an update that does not clip,
    where the factor is rounded once, too."""
    problem = Problem(case, backend.device)
    optimizer = problem.optimizer(backend.name)
    divisor = problem.case.options.get("grad_divisor", 1.0)
    clips = []
    for _ in range(5):
        problem.set_grads()
        norm = expected_norm(problem, divisor)
        optimizer.max_grad_norm = norm * (0.3, 2.0)[problem.updates % 2]
        clips.append(min(1.0, optimizer.max_grad_norm / (norm + 1e-6)))
        optimizer.step()
        assert optimizer.grad_norm.item() == pytest.approx(norm, rel=1e-13)
        for param, oracle in zip(problem.params, problem.oracles, strict=True):
            oracle.update(values_of(grad_of(param)), index=problem.updates - 1, grad_scale=1.0 / clips[-1])
    assert min(clips) < 0.31
    assert max(clips) == 1.0
    for param, oracle in zip(problem.params, problem.oracles, strict=True):
        state = optimizer.state[param]
        for slot in ("exp_avg", "exp_avg_sq"):
            off = np.abs(values_of(state[slot]) - getattr(oracle, slot))
            assert (off <= state_bound(oracle, slot)).all(), slot
        assert (np.abs(values_of(param) - oracle.param) <= param_bound(oracle)).all()


@pytest.mark.parametrize("max_norm", [0.5, 5.0, 1e4, inf])
def test_matches_clip_grad_norm_and_adamw(backend: Backend, max_norm: float) -> None:
    ours, theirs = start(backend), start(backend)
    optimizer = backend.optimizer(ours, lr=1e-2, weight_decay=0.1, max_grad_norm=max_norm)
    torchs = torch.optim.AdamW(theirs, lr=1e-2, weight_decay=0.1)
    for step in range(5):
        grads = model_gradients(step + 10)
        set_grads(ours, grads)
        set_grads(theirs, grads)
        norm = torch.nn.utils.clip_grad_norm_(theirs, max_norm)
        torchs.step()
        optimizer.step()
        assert optimizer.grad_norm.item() == pytest.approx(norm.item(), rel=1e-6)  # torch's is a float32
    for p, q in zip(ours, theirs, strict=True):
        # Both are Adam in float32, with other roundings: some 5 ulp of a weight of 1 per update.
        torch.testing.assert_close(p, q, rtol=3e-6, atol=1e-6)


@pytest.mark.parametrize(("value", "norm"), [(inf, inf), (-inf, inf), (nan, nan)])
def test_what_is_not_finite_does_as_with_torch(backend: Backend, value: float, norm: float) -> None:
    """error_if_nonfinite=False, torch's default: an infinite norm clips finite gradients to 0, a NaN spreads."""
    ours, theirs = start(backend), start(backend)
    grads = model_gradients()
    grads[5][7] = value
    set_grads(ours, grads)
    set_grads(theirs, grads)
    torch.nn.utils.clip_grad_norm_(theirs, 1.0)
    torch.optim.AdamW(theirs, lr=1e-2, weight_decay=0.1).step()
    optimizer = backend.optimizer(ours, lr=1e-2, weight_decay=0.1, max_grad_norm=1.0)
    optimizer.step()
    np.testing.assert_equal(optimizer.grad_norm.item(), norm)
    assert optimizer.clock == 1
    for p, q in zip(ours, theirs, strict=True):
        assert torch.equal(p.isnan(), q.isnan())
        torch.testing.assert_close(p, q, equal_nan=True, rtol=1e-6, atol=0.0)


def test_measuring_alone_changes_no_bit(backend: Backend) -> None:
    """max_grad_norm=inf, and a limit that is not reached, are the step without a norm, to the last bit."""
    results = []
    for max_norm in (None, inf, 1e6):
        params = start(backend)
        optimizer = backend.optimizer(params, lr=1e-2, max_grad_norm=max_norm)
        for step in range(3):
            set_grads(params, model_gradients(step))
            optimizer.step()
        results.append(snapshot(optimizer))
    assert_same(results[1], results[0])
    assert_same(results[2], results[0])


@pytest.mark.parametrize("max_norm", [None, 1.0])
@pytest.mark.parametrize("value", [nan, inf])
def test_skip_nonfinite_changes_nothing(backend: Backend, value: float, max_norm: float | None) -> None:
    params = start(backend)
    lr = schedules.linear(1.0, 0.0, 10)
    optimizer = backend.optimizer(params, lr=lr, weight_decay=0.1, max_grad_norm=max_norm, skip_nonfinite=True)
    set_grads(params, model_gradients(0))
    optimizer.step()
    before = snapshot(optimizer)
    bad = model_gradients(1)
    bad[0][3, 4] = value
    set_grads(params, bad)
    optimizer.step()
    assert_same(snapshot(optimizer), before)
    assert (optimizer.clock, optimizer.last_lr()) == (1, [1.0])
    np.testing.assert_equal(optimizer.grad_norm.item(), value)
    set_grads(params, model_gradients(2))
    optimizer.step()
    assert (optimizer.clock, optimizer.last_lr()) == (2, [lr(1)])
    assert math.isfinite(optimizer.grad_norm.item())


def test_scaler_and_divisor_belong_to_the_norm(backend: Backend) -> None:
    """GradScaler's attributes: the norm is that of the unscaled gradients, and any non-zero found_inf skips."""
    plain, scaled = start(backend), start(backend)
    a = backend.optimizer(plain, lr=1e-2, max_grad_norm=0.5)
    b = backend.optimizer(scaled, lr=1e-2, max_grad_norm=0.5, grad_divisor=4.0)
    for step in range(3):
        grads = model_gradients(step)
        set_grads(plain, grads)
        set_grads(scaled, [g * 4096.0 for g in grads])
        b.grad_scale = torch.tensor(1024.0, device=backend.device)  # type: ignore[attr-defined]
        b.found_inf = torch.tensor(0.0, device=backend.device)  # type: ignore[attr-defined]
        a.step()
        b.step()
        assert a.grad_norm.item() == b.grad_norm.item()
    assert_same(snapshot(b), snapshot(a))  # powers of two: the same bits
    b.found_inf.fill_(2.0)  # type: ignore[attr-defined]
    b.step()
    assert_same(snapshot(b), snapshot(a))
    assert b.clock == 3
    del b.found_inf, b.grad_scale  # as GradScaler does


def test_grad_scaler_drives_it(backend: Backend) -> None:
    """The real one, on the device's type: an overflow skips, halves the scale, and the next step goes on."""
    param = backend.parameter(torch.ones(4))
    optimizer = backend.optimizer([param], lr=0.5, max_grad_norm=1.0)
    scaler = torch.amp.GradScaler(backend.device.type, init_scale=4.0)
    for factor in (1.0, inf, 1.0):
        optimizer.zero_grad()
        scaler.scale((param * torch.tensor(factor, device=backend.device)).sum()).backward()
        scaler.step(optimizer)
        scaler.update()
        assert scaler.get_scale() == (4.0 if factor == 1.0 and optimizer.clock == 1 else 2.0)
    assert optimizer.clock == 2
    assert optimizer.grad_norm.item() == 2.0


@pytest.mark.parametrize(
    ("dtype", "scale"), [(torch.float32, 1e30), (torch.bfloat16, 1e30), (torch.float64, 1e200), (torch.float64, 1e-200)]
)
def test_norm_of_extreme_gradients(backend: Backend, dtype: torch.dtype, scale: float) -> None:
    param = backend.parameter(torch.zeros(1000), dtype)
    values = torch.randn(1000, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * scale
    param.grad = values.to(dtype).to(backend.device)
    optimizer = backend.optimizer([param], lr=1.0, betas=(0.0, 0.0), eps=1.0, max_grad_norm=scale)
    optimizer.step()
    exact = (param.grad.double().cpu() / scale).norm().item() * scale
    assert optimizer.grad_norm.item() == pytest.approx(exact, rel=1e-12)


def test_zero_gradients(backend: Backend) -> None:
    param = backend.parameter(torch.ones(300))
    param.grad = torch.zeros(300, device=backend.device)
    optimizer = backend.optimizer([param], lr=0.1, max_grad_norm=1.0, skip_nonfinite=True)
    optimizer.step()
    assert (optimizer.grad_norm.item(), optimizer.clock) == (0.0, 1)
    assert torch.equal(param.cpu(), torch.ones(300))


def test_no_gradients_and_empty_ones(backend: Backend) -> None:
    """A step without gradients is none, and leaves the norm as it was; empty tensors have a norm of 0."""
    param, empty = backend.parameter(torch.ones(3)), backend.parameter(torch.ones(0))
    optimizer = backend.optimizer([param, empty], lr=0.1, max_grad_norm=1.0)
    assert optimizer.grad_norm.isnan()
    optimizer.step()
    assert optimizer.grad_norm.isnan()
    assert optimizer.clock == 0
    empty.grad = torch.ones(0, device=backend.device)
    optimizer.step()
    assert (optimizer.grad_norm.item(), optimizer.clock) == (0.0, 1)


def test_limit_can_be_edited(backend: Backend) -> None:
    param = backend.parameter(torch.zeros(2))
    optimizer = backend.optimizer([param], lr=1.0, betas=(0.0, 0.0), eps=1.0)
    moved = []
    for limit in (None, 5.0, 2.5, inf, None):
        param.grad = torch.tensor([6.0, 8.0], device=backend.device)
        optimizer.max_grad_norm = limit
        with torch.no_grad():
            param.zero_()
        optimizer.step()
        moved.append(round(param[0].item(), 5))
    # g = (6, 8) * clip moves a weight by g / (|g| + 1).
    assert moved == [round(-g / (g + 1), 5) for g in (6.0, 3.0, 1.5, 6.0, 6.0)]


def test_pickles_and_copies_keep_the_options(backend: Backend) -> None:
    optimizer = backend.optimizer(start(backend), max_grad_norm=0.25, skip_nonfinite=True)
    optimizer.norm_reduce_hook = lambda squares: squares  # a function that cannot be pickled
    for clone in (pickle.loads(pickle.dumps(optimizer)), copy.deepcopy(optimizer)):
        assert (clone.max_grad_norm, clone.skip_nonfinite, clone.norm_reduce_hook) == (0.25, True, None)
        assert "max_grad_norm: 0.25, skip_nonfinite: True" in repr(clone)


def test_hook_reduces_over_processes(backend: Backend) -> None:
    """Two processes with half of the model each, played one after the other."""
    whole, halves = start(backend), start(backend)
    grads = model_gradients()
    a = backend.optimizer(whole, lr=1e-2, max_grad_norm=1.0)
    set_grads(whole, grads)
    a.step()
    parts = [backend.optimizer(halves[:2], lr=1e-2, max_grad_norm=1.0)]
    parts.append(backend.optimizer(halves[2:], lr=1e-2, max_grad_norm=1.0))
    set_grads(halves, grads)
    seen: list[torch.Tensor] = []

    def other_half(squares: torch.Tensor) -> None:
        assert squares.shape == ()
        assert (squares.dtype, squares.device.type) == (torch.float64, backend.device.type)
        seen.append(squares.clone())
        squares.fill_(sum(float((g.double() ** 2).sum()) for g in grads))

    for part in parts:
        part.norm_reduce_hook = other_half
        part.step()
        assert part.grad_norm.item() == pytest.approx(a.grad_norm.item(), rel=1e-14)
    assert sum(squares.item() for squares in seen) == pytest.approx(a.grad_norm.item() ** 2, rel=1e-14)
    for p, q in zip(halves, whole, strict=True):
        torch.testing.assert_close(p, q, rtol=2e-7, atol=2e-7)  # a factor of another last bit


def test_hook_that_raises_leaves_everything(backend: Backend) -> None:
    params = start(backend)
    optimizer = backend.optimizer(params, max_grad_norm=1.0)
    set_grads(params, model_gradients())
    optimizer.step()
    before = snapshot(optimizer)

    def fail(squares: torch.Tensor) -> None:
        raise ConnectionError("the other process is gone")

    optimizer.norm_reduce_hook = fail
    with pytest.raises(ConnectionError):
        optimizer.step()
    assert_same(snapshot(optimizer), before)
    assert optimizer.clock == 1
    optimizer.norm_reduce_hook = None
    optimizer.step()
    assert optimizer.clock == 2


def test_hook_may_drop_gradients_and_sees_no_autograd(backend: Backend) -> None:
    """The update goes on with gradients that the hook has freed; in a steady step nobody held them."""
    param = torch.nn.Parameter(torch.zeros(1 << 16, device=backend.device))
    optimizer = backend.optimizer([param], lr=0.5, max_grad_norm=1e9)
    scale = torch.ones((), dtype=torch.float64, device=backend.device, requires_grad=True)
    new_memory = []

    def hook(squares: torch.Tensor) -> None:
        assert not torch.is_grad_enabled()
        squares.mul_(scale)
        param.grad = None
        new_memory.append(torch.full_like(param, -7.0))

    optimizer.norm_reduce_hook = hook
    for index in range(4):
        param.grad = torch.ones_like(param)
        optimizer.step()
        assert optimizer.grad_norm.grad_fn is None
        assert param.unique().numel() == 1
        assert param[0].item() == pytest.approx(-0.5 * (index + 1), rel=1e-5)
