"""fused_sched.ops: the kernels on tensors of the caller's, against the oracle and against the optimizer's bits."""

from __future__ import annotations

import weakref
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Backend
from oracle import Options, Oracle
from tolerances import state_bound, weight_bound

from fused_sched import FusedScheduledAdam, backends, ops, schedules

SIZES = [1, 15, 256, 257, 5000]


class Tensors:
    """Parameters, gradients and state of a few sizes."""

    def __init__(self, device: torch.device, dtype: torch.dtype = torch.float32, seed: int = 0) -> None:
        random = torch.Generator().manual_seed(seed)
        make = [torch.randn(n, generator=random).to(dtype).to(device) for n in SIZES + SIZES]
        self.params, self.grads = make[: len(SIZES)], make[len(SIZES) :]
        self.first, self.second = ops.state_like(self.params), ops.state_like(self.params)
        self.counts = ops.StepCounts(len(SIZES), device)

    @property
    def lists(self) -> tuple[Any, ...]:
        return self.params, self.grads, self.first, self.second, self.counts


def grads_at(step: int, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    random = torch.Generator().manual_seed(100 + step)
    return [torch.randn(n, generator=random).to(dtype) for n in SIZES]


def set_grads(grads: list[torch.Tensor], step: int) -> None:
    for grad, values in zip(grads, grads_at(step, grads[0].dtype), strict=True):
        grad.copy_(values)


OPTIONS: list[tuple[dict[str, Any], Options]] = [
    ({"lr": 1e-2}, Options(lr=1e-2)),
    (
        {"lr": 1e-2, "weight_decay": 0.1, "decoupled_weight_decay": False, "maximize": True, "grad_divisor": 4.0},
        Options(lr=1e-2, weight_decay=0.1, decoupled=False, maximize=True, grad_divisor=4.0),
    ),
    (
        {"lr": schedules.linear(1e-2, 0.0, 8), "betas": (0.5, schedules.linear(0.9, 0.99, 6)), "weight_decay": 0.1},
        Options(lr=lambda t: 1e-2 * (1 - t / 8), beta1=0.5, beta2=lambda t: 0.9 + 0.09 * t / 6, weight_decay=0.1),
    ),
]


@pytest.mark.parametrize("number", range(len(OPTIONS)))
@pytest.mark.parametrize("prepared", [False, True])
@pytest.mark.parametrize("amsgrad", [False, True])
def test_matches_the_oracle(compiled: Backend, number: int, prepared: bool, amsgrad: bool) -> None:
    given, options = OPTIONS[number]
    options = Options(**{**vars(options), "amsgrad": amsgrad})
    tensors = Tensors(compiled.device)
    oracles = [Oracle(p.double().cpu().numpy(), options) for p in tensors.params]
    largest = ops.state_like(tensors.params) if amsgrad else []
    given = {**given, "backend": compiled.name, "max_exp_avg_sqs": largest}
    update = ops.PreparedAdamW(*tensors.lists, **given) if prepared else None
    for step in range(5):
        set_grads(tensors.grads, step)
        if update is None:
            ops.adamw_(*tensors.lists, **given)
        else:
            update()
        for oracle, grad in zip(oracles, grads_at(step), strict=True):
            oracle.update(grad.double().numpy())
    assert int(tensors.counts) == 5
    for i, oracle in enumerate(oracles):
        oracle.format_name = "fp32"
        assert (np.abs(tensors.params[i].double().cpu().numpy() - oracle.weight) <= weight_bound(oracle)).all()
        for name, moments in (("exp_avg", tensors.first), ("exp_avg_sq", tensors.second)):
            error = np.abs(moments[i].double().cpu().numpy() - getattr(oracle, name))
            assert (error <= state_bound(oracle, name)).all(), name


FORMATS = [
    *(("float32", "none", moments) for moments in ("fp32", "bf16", "8bit")),
    *product(["bfloat16"], ["none", "fp32", "split16", "split8", "stochastic"], ["fp32", "bf16", "8bit"]),
    *product(["float16"], ["none", "fp32"], ["fp32", "8bit"]),
    ("float64", "none", "fp32"),
]
MASTER_DTYPE = {"fp32": torch.float32, "split16": torch.int16, "split8": torch.int8}
MOMENTS_DTYPE = {"fp32": None, "bf16": torch.bfloat16, "8bit": torch.uint8}


@pytest.mark.parametrize(("dtype", "master", "moments"), FORMATS)
def test_has_the_bits_of_the_optimizer(compiled: Backend, dtype: str, master: str, moments: str) -> None:
    tensors = Tensors(compiled.device, getattr(torch, dtype))
    theirs = [p.detach().clone().requires_grad_() for p in tensors.params]
    lr = schedules.linear(1e-2, 1e-3, 4)
    options: dict[str, Any] = {"lr": lr, "weight_decay": 0.1, "max_grad_norm": 1.0, "seed": 7}
    optimizer = compiled.optimizer(theirs, master=master, moments=moments, **options)
    state = [ops.state_like(tensors.params, MOMENTS_DTYPE[moments]) for _ in range(2)]
    extra: dict[str, Any] = {"stochastic_rounding": master == "stochastic"}
    if master in MASTER_DTYPE:
        extra["masters"] = ops.state_like(tensors.params, MASTER_DTYPE[master])
        if master == "fp32":
            for kept, param in zip(extra["masters"], tensors.params, strict=True):
                kept.copy_(param)
    if moments == "8bit":
        for name in ("exp_avg_scales", "exp_avg_sq_scales"):
            extra[name] = ops.state_like(tensors.params, torch.uint8, elements_per_entry=16)
    for step in range(3):
        set_grads(tensors.grads, step)
        for param, grad in zip(theirs, tensors.grads, strict=True):
            param.grad = grad
        optimizer.step()
        ops.adamw_(tensors.params, tensors.grads, *state, tensors.counts, **options, **extra, backend=compiled.name)
    for ours, other in zip(tensors.params, theirs, strict=True):
        assert torch.equal(ours.view(torch.uint8), other.detach().view(torch.uint8))


def test_norm_has_the_bits_of_the_optimizer(compiled: Backend) -> None:
    tensors = Tensors(compiled.device)
    optimizer = compiled.optimizer([p.requires_grad_() for p in tensors.params], max_grad_norm=1.0)
    for param, grad in zip(tensors.params, tensors.grads, strict=True):
        param.grad = grad
    optimizer.step()
    norm = ops.grad_norm(tensors.grads, backend=compiled.name)
    assert norm.item() == optimizer.grad_norm.item()
    exact = np.sqrt(sum((g.double().cpu().numpy() ** 2).sum() for g in tensors.grads))
    assert norm.item() == pytest.approx(exact, rel=1e-14)  # sums of 5,529 doubles, in two orders


def test_norm_of_several_dtypes_and_of_nothing(compiled: Backend) -> None:
    grads = [torch.tensor([3.0, 0.0]).bfloat16(), torch.tensor([1e30]), torch.tensor([]), torch.tensor([4e30]).double()]
    found = ops.grad_norm([g.to(compiled.device) for g in grads], backend=compiled.name)
    assert found.item() == pytest.approx(17**0.5 * 1e30, rel=1e-7)
    assert ops.grad_norm([]).item() == 0.0


def test_evaluates_as_the_host(compiled: Backend) -> None:
    lr = schedules.warmup_cosine(3e-4, warmup_steps=10, total_steps=90)
    steps = np.array([[0, 5, 10], [50, 90, 1000]])
    found = ops.evaluate(lr, steps, compiled.device, backend=compiled.name)
    assert found.tolist() == lr(steps).tolist()
    assert ops.evaluate(lr, [], compiled.device, backend=compiled.name).shape == (0,)


def test_rates_may_be_tensors(compiled: Backend) -> None:
    """Read on their device by every call."""
    tensors = Tensors(compiled.device)
    lr = torch.tensor(0.0, device=compiled.device)
    before = [p.clone() for p in tensors.params]
    update = ops.PreparedAdamW(*tensors.lists, lr=lr, eps=0.0, backend=compiled.name)
    update()
    assert all(map(torch.equal, before, tensors.params))
    lr.fill_(0.25)
    update()
    assert update.lr.item() == 0.25
    assert not any(map(torch.equal, before, tensors.params))


def test_skips_on_the_device(compiled: Backend) -> None:
    tensors = Tensors(compiled.device)
    found_inf = torch.ones((), device=compiled.device)
    update = ops.PreparedAdamW(*tensors.lists, lr=1.0, found_inf=found_inf, backend=compiled.name)
    before = [p.clone() for p in tensors.params]
    update()
    assert (int(tensors.counts), update.lr.isnan().item()) == (0, True)
    assert all(map(torch.equal, before, tensors.params))
    found_inf.zero_()
    update()
    assert int(tensors.counts) == 1


def test_a_second_call_follows_what_changed() -> None:
    """The call that `counts` keeps is not used for other tensors, options or places in memory."""
    tensors = Tensors(torch.device("cpu"))
    twins = Tensors(torch.device("cpu"))
    for lr in (0.5, 0.5, 0.25, schedules.constant(0.125)):
        ops.adamw_(*tensors.lists, lr=lr)
        ops.PreparedAdamW(*twins.lists, lr=lr)()
    shorter = [p[: len(p) // 2 + 1] for p in tensors.params]  # at the same addresses
    with pytest.raises(ValueError, match="must have its parameter's shape"):
        ops.adamw_(shorter, *tensors.lists[1:], lr=0.5)
    assert all(map(torch.equal, tensors.params, twins.params))
    moved = [g.clone() for g in tensors.grads]
    for grad in tensors.grads:
        grad.fill_(torch.nan)
    ops.adamw_(tensors.params, moved, *tensors.lists[2:], lr=0.5)
    assert all(p.isfinite().all() for p in tensors.params)


def test_a_kept_call_frees_tensors() -> None:
    p, counts = torch.zeros(64), ops.StepCounts(1, "cpu")
    first, second = ops.state_like([p]), ops.state_like([p])
    grad = torch.ones(64)
    kept = weakref.ref(grad)
    ops.adamw_([p], [grad], first, second, counts)
    del grad
    assert kept() is None


def test_bumps_versions() -> None:
    p = torch.zeros(64, requires_grad=True)
    version = p._version
    state = ops.state_like([p]), ops.state_like([p])
    ops.adamw_([p], [torch.ones(64)], *state, ops.StepCounts(1, "cpu"))
    assert p._version == version + 1
    with torch.inference_mode():
        q = torch.zeros(64)
        ops.adamw_([q], [torch.ones(64)], *state, ops.StepCounts(1, "cpu"))
    assert q[0].item() < 0.0


def test_state_is_one_arena_and_padded() -> None:
    params = [torch.zeros(3, 5).t(), torch.zeros(300)]
    first, second = ops.state_like(params, torch.bfloat16)
    assert first.stride() == params[0].stride()
    assert second.data_ptr() - first.data_ptr() == 256 * 2
    assert [s.numel() for s in ops.state_like(params, torch.uint8, elements_per_entry=16)] == [1, 19]
    assert ops.state_like([]) == []
    assert ops.state_like([torch.zeros(1).double()])[0].dtype == torch.float64
    backend = backends.select("cpu", torch.device("cpu"))
    from fused_sched.ops.call import Kind, tensor_rows
    from fused_sched.ops.call import Tensors as CallTensors

    moments = ops.state_like(params), ops.state_like(params)
    kind = Kind("none", "fp32", False)
    state = {"exp_avg": moments[0], "exp_avg_sq": moments[1]}
    call = CallTensors(params, params, state)
    rows, arenas = tensor_rows(backend.module, call, kind, ops.StepCounts(2, "cpu").rows[1:])
    assert (len(arenas), rows["state_offset"].tolist()) == (1, [0, 256])
    elsewhere = {"exp_avg": moments[0], "exp_avg_sq": [moments[1][0], torch.zeros(300)]}
    rows, arenas = tensor_rows(backend.module, call._replace(state=elsewhere), kind, ops.StepCounts(2, "cpu").rows[1:])
    assert (len(arenas), rows["arena"].tolist()) == (2, [0, 1])


def case(**changes: Any) -> dict[str, Any]:
    p = torch.zeros(32)
    given: dict[str, Any] = {
        "params": [p],
        "grads": [torch.ones(32)],
        "exp_avgs": ops.state_like([p]),
        "exp_avg_sqs": ops.state_like([p]),
        "counts": ops.StepCounts(1, "cpu"),
    }
    return {**given, **changes}


REFUSED: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"params": []}, ValueError, "at least one tensor, got none"),
    ({"grads": []}, ValueError, "grads must name a tensor for each of the 1 parameters, got 0"),
    ({"grads": [torch.ones(31)]}, ValueError, "must have its parameter's shape"),
    ({"grads": [torch.ones(64)[::2]]}, ValueError, "copy it into torch.empty_like"),
    ({"grads": [torch.ones(32, dtype=torch.int32)]}, ValueError, "got torch.int32"),
    ({"params": [torch.zeros(64)[::2]]}, ValueError, "parameters must be dense"),
    ({"exp_avgs": [torch.zeros(32, dtype=torch.int32)]}, ValueError, "exp_avg must be float32"),
    ({"exp_avg_sqs": [torch.zeros(32).bfloat16()]}, ValueError, "exp_avg_sq must be torch.float32, got torch.bfloat16"),
    ({"exp_avgs": [torch.zeros(33)[1:]]}, ValueError, "multiple of 16 bytes"),
    ({"exp_avgs": [torch.zeros(32, dtype=torch.uint8)]}, ValueError, "8-bit moments need scales, got none"),
    ({"masters": [torch.zeros(32)], "stochastic_rounding": True}, ValueError, "stands in for a master, got both"),
    ({"masters": [torch.zeros(32).half()]}, ValueError, "masters must be one of"),
    ({"counts": ops.StepCounts(2, "cpu")}, ValueError, r"must be StepCounts\(1, 'cpu'\), got those of 2"),
    ({"exp_avg_scales": [torch.zeros(2)]}, ValueError, "have no exp_avg_scale"),
    ({"lr": -1.0}, ValueError, "lr must be in"),
    ({"lr": torch.zeros(2)}, ValueError, "one floating-point element"),
    ({"lr": schedules.torch.ReduceLROnPlateau(base_lr=0.1)}, ValueError, "cannot follow metrics here"),
    ({"betas": (0.9, 1.0)}, ValueError, "beta2 must be in"),
    ({"found_inf": torch.zeros((), dtype=torch.int32)}, ValueError, "found_inf must be a float32 tensor"),
    ({"max_grad_norm": -1.0}, ValueError, "max_grad_norm must be positive"),
    ({"backend": "reference"}, RuntimeError, "needs compiled code"),
    ({"colour": 1}, TypeError, "colour"),
]


@pytest.mark.parametrize("number", range(len(REFUSED)))
def test_refuses_before_anything_changes(number: int) -> None:
    changes, error, message = REFUSED[number]
    given = case(**changes)
    tensors = [t for name in ("params", "grads", "exp_avgs", "exp_avg_sqs") for t in given[name]]
    before = [t.clone() for t in tensors]
    with pytest.raises(error, match=message):
        ops.adamw_(**given)
    assert all(map(torch.equal, before, tensors))
    assert int(given["counts"]) == 0


def test_refuses_a_master_that_the_dtype_cannot_have() -> None:
    p = torch.zeros(32).half()
    state = ops.state_like([p]), ops.state_like([p])
    with pytest.raises(ValueError, match="float16 parameters can have master"):
        ops.adamw_([p], [p.clone()], *state, ops.StepCounts(1, "cpu"), masters=ops.state_like([p], torch.int16))


def test_state_must_have_room_where_kernels_move_whole_groups() -> None:
    """8-bit moments do on every backend."""
    p = torch.zeros(20)
    scales = {n: ops.state_like([p], torch.uint8, 16) for n in ("exp_avg_scales", "exp_avg_sq_scales")}
    codes = [torch.zeros(20, dtype=torch.uint8)]
    with pytest.raises(ValueError, match="memory for a multiple of 16 elements"):
        ops.adamw_([p], [p.clone()], codes, ops.state_like([p], torch.uint8), ops.StepCounts(1, "cpu"), **scales)
    both = torch.zeros(64, dtype=torch.uint8)
    with pytest.raises(ValueError, match="within the last 16 elements"):
        ops.adamw_([p], [p.clone()], [both[:20]], [both[16:36]], ops.StepCounts(1, "cpu"), **scales)


@pytest.mark.parametrize("steps", [[-1], [0.5]])
def test_refuses_steps_that_are_none(steps: list[Any]) -> None:
    with pytest.raises(ValueError, match="must be integers and not negative"):
        ops.evaluate(schedules.constant(1.0), steps)


def test_counts_print_and_start() -> None:
    counts = ops.StepCounts(1, "cpu", start=2**24 + 1)
    assert repr(counts) == "StepCounts(1, 'cpu', start=16777217)"
    p = torch.zeros(16)
    update = ops.PreparedAdamW([p], [torch.ones(16)], ops.state_like([p]), ops.state_like([p]), counts, lr=1.0)
    update()
    assert int(counts) == 2**24 + 2  # the int64 count, not its mirror in float32
    with pytest.raises(RuntimeError, match="max_grad_norm or skip_nonfinite"):
        _ = update.grad_norm
    with pytest.raises(ValueError, match="must not be negative"):
        ops.StepCounts(1, "cpu", start=-1)


@pytest.mark.cuda
def test_captured_updates_follow_their_schedule(get_backend: Any) -> None:
    device = get_backend("cuda").device
    eager, captured = Tensors(device), Tensors(device)
    lr = schedules.warmup_cosine(1e-2, warmup_steps=3, total_steps=20)
    updates = [ops.PreparedAdamW(*tensors.lists, lr=lr, max_grad_norm=1.0) for tensors in (eager, captured)]
    for update in updates:
        update()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        updates[1]()
    for _ in range(20):
        updates[0]()
        graph.replay()
    assert int(captured.counts) == 21
    assert all(map(torch.equal, eager.params, captured.params))


def test_optimizer_and_ops_share_the_clock_rule() -> None:
    """T follows a StepCounts that starts late, as the optimizer's clock after a resume."""
    p = torch.zeros(16)
    lr = schedules.linear(1.0, 0.0, 10)
    counts = ops.StepCounts(1, "cpu", start=4)
    update = ops.PreparedAdamW([p], [torch.ones(16)], ops.state_like([p]), ops.state_like([p]), counts, lr=lr)
    update()
    q = torch.zeros(16, requires_grad=True)
    optimizer = FusedScheduledAdam([q], lr=lr)
    optimizer.set_clock(4)
    q.grad = torch.ones(16)
    optimizer.step()
    assert update.lr.item() == optimizer.last_lr()[0] == lr(4)
