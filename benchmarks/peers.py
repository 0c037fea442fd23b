"""Who is measured: a function per optimizer that prepares its step for a case.

A peer takes part where its package can be imported, on the devices it serves. Each has parameters and gradients of its
own, of the same shapes and of the dtype it is meant for: torch's AdamW updates fp32 parameters in every case, as
training in mixed precision does.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fused_sched import FusedScheduledAdam, ops, schedules

from .cases import Case
from .names import OURS
from .timing import Step, nothing

LR, WEIGHT_DECAY, MAX_NORM = 1e-3, 0.01, 1.0


@dataclass
class Contestant:
    """A peer ready to step."""

    peer: str
    step: Step
    dtype: torch.dtype  # of parameters and gradients
    kept_bytes: Callable[[], float]  # persistent, per element; known after the first step
    prepare: Step = nothing
    keeps_alive: list[Any] = field(default_factory=list)


class Problem:
    """Parameters with gradients, in groups."""

    def __init__(self, case: Case, device: torch.device, dtype: torch.dtype) -> None:
        self.params = [torch.randn(shape, device=device).to(dtype).requires_grad_() for shape in case.shapes]
        self.grads = [(torch.randn(shape, device=device) * 1e-3).to(dtype) for shape in case.shapes]
        for param, grad in zip(self.params, self.grads, strict=True):
            param.grad = grad
        self.groups = [{"params": self.params[i :: case.num_groups]} for i in range(case.num_groups)]
        self._elsewhere = [grad.clone() for grad in self.grads] if case.moves_grads else self.grads

    @property
    def numel(self) -> int:
        return sum(param.numel() for param in self.params)

    def move_grads(self) -> None:
        self.grads, self._elsewhere = self._elsewhere, self.grads
        for param, grad in zip(self.params, self.grads, strict=True):
            param.grad = grad


def make(peer: str, case: Case, device: torch.device) -> Contestant:
    """Whatever goes wrong in another package goes wrong here."""
    contestant = PEERS[peer].make(peer, case, device)
    if case.replays:
        contestant.step = _captured(contestant.step, device)
    return contestant


def _captured(step: Step, device: torch.device) -> Step:
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


# ---- fused_sched -----------------------------------------------------------------------------------------


def _ours(peer: str, case: Case, device: torch.device) -> Contestant:
    problem = Problem(case, device, case.formats.dtype)
    optimizer = FusedScheduledAdam(
        problem.groups,
        lr=schedules.warmup_cosine(LR, warmup_steps=10, total_steps=1000),
        weight_decay=WEIGHT_DECAY,
        master=case.formats.master,
        moments=case.formats.moments,
        max_grad_norm=MAX_NORM if case.clips else None,
    )
    prepare = problem.move_grads if case.moves_grads else nothing
    return Contestant(peer, optimizer.step, case.formats.dtype, optimizer.bytes_per_param, prepare, [problem])


def _ops(peer: str, case: Case, device: torch.device) -> Contestant:
    problem = Problem(case, device, torch.float32)
    params = [param.detach() for param in problem.params]
    tensors = params, problem.grads, ops.state_like(params), ops.state_like(params), ops.StepCounts(len(params), device)
    if peer.endswith("prepared"):
        step: Step = ops.PreparedAdamW(*tensors, lr=LR, weight_decay=WEIGHT_DECAY)
    else:

        def step() -> None:
            ops.adamw_(*tensors, lr=LR, weight_decay=WEIGHT_DECAY)

    return Contestant(peer, step, torch.float32, lambda: 8.0, keeps_alive=[problem])


# ---- torch -----------------------------------------------------------------------------------------------


def _torch_kernel(peer: str, case: Case, device: torch.device) -> Contestant:
    """torch._fused_adamw_ as torch.optim.AdamW calls it, its steps counted for it."""
    problem = Problem(case, device, torch.float32)
    params = [param.detach() for param in problem.params]
    first, second = ([torch.zeros_like(param) for param in params] for _ in range(2))
    steps = [torch.ones((), device=device) for _ in params]

    def step() -> None:
        torch._fused_adamw_(
            *(params, problem.grads, first, second, [], steps),
            lr=LR,
            beta1=0.9,
            beta2=0.999,
            weight_decay=WEIGHT_DECAY,
            eps=1e-8,
            amsgrad=False,
            maximize=False,
        )

    return Contestant(peer, step, torch.float32, lambda: 8.0, keeps_alive=[problem])


def _torch_step(implementation: dict[str, bool], dtype: torch.dtype = torch.float32) -> Make:
    def prepare(peer: str, case: Case, device: torch.device) -> Contestant:
        options = {**implementation, "capturable": True} if case.replays else implementation
        problem = Problem(case, device, dtype)
        optimizer = torch.optim.AdamW(problem.groups, lr=LR, weight_decay=WEIGHT_DECAY, **options)
        return _stepping(peer, case, problem, optimizer)

    return prepare


def _stepping(peer: str, case: Case, problem: Problem, optimizer: torch.optim.Optimizer) -> Contestant:
    """A step of somebody's optimizer with torch's clipping before it and torch's scheduler after it."""
    parts: list[Step] = []
    if case.clips:
        parts.append(lambda: torch.nn.utils.clip_grad_norm_(problem.params, MAX_NORM))
    if case.schedules:
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: min(1.0, (t + 1) / 10))
        parts += [optimizer.step, scheduler.step]  # the scheduler has wrapped the step
    else:
        parts.append(optimizer.step)

    def step() -> None:
        for part in parts:
            part()

    prepare = problem.move_grads if case.moves_grads else nothing
    dtype = problem.params[0].dtype
    run = parts[0] if len(parts) == 1 else step
    return Contestant(peer, run, dtype, lambda: _state_bytes(optimizer) / problem.numel, prepare, [problem, optimizer])


def _state_bytes(optimizer: torch.optim.Optimizer) -> int:
    return sum(_bytes(v) for state in optimizer.state.values() for v in state.values() if isinstance(v, Tensor))


def _bytes(tensor: Tensor) -> int:
    if hasattr(tensor, "__tensor_flatten__"):  # a subclass of several tensors: torchao's
        return sum(_bytes(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0])
    return tensor.numel() * tensor.element_size() if tensor.dim() > 0 else 0


# ---- other packages --------------------------------------------------------------------------------------


def _imported(module: str, name: str, dtype: torch.dtype = torch.float32, **options: Any) -> Make:
    def prepare(peer: str, case: Case, device: torch.device) -> Contestant:
        optimizer_class = getattr(importlib.import_module(module), name)
        problem = Problem(case, device, dtype)
        groups = problem.params if len(problem.groups) == 1 else problem.groups
        return _stepping(peer, case, problem, optimizer_class(groups, lr=LR, weight_decay=WEIGHT_DECAY, **options))

    return prepare


Make = Callable[[str, Case, torch.device], Contestant]


@dataclass(frozen=True)
class Peer:
    """Where it comes from, and where it can run."""

    package: str
    devices: tuple[str, ...]
    make: Make


ANY, CPU, CUDA = ("cpu", "cuda"), ("cpu",), ("cuda",)
BF16 = torch.bfloat16

PEERS = {
    OURS: Peer("fused_sched", ANY, _ours),
    "fused_sched.ops": Peer("fused_sched", ANY, _ops),
    "fused_sched.ops, prepared": Peer("fused_sched", ANY, _ops),
    "torch kernel": Peer("torch", ANY, _torch_kernel),
    "torch fused": Peer("torch", ANY, _torch_step({"fused": True})),
    "torch fused, bf16": Peer("torch", ANY, _torch_step({"fused": True}, BF16)),
    "torch foreach": Peer("torch", ANY, _torch_step({"foreach": True})),
    "torch for-loop": Peer("torch", ANY, _torch_step({"foreach": False})),
    "DeepSpeed CPUAdam": Peer("deepspeed", CPU, _imported("deepspeed.ops.adam", "DeepSpeedCPUAdam")),
    "DeepSpeed CPUAdam, bf16": Peer("deepspeed", CPU, _imported("deepspeed.ops.adam", "DeepSpeedCPUAdam", BF16)),
    "DeepSpeed FusedAdam": Peer("deepspeed", CUDA, _imported("deepspeed.ops.adam", "FusedAdam")),
    "apex FusedAdam": Peer("apex", CUDA, _imported("apex.optimizers", "FusedAdam")),
    "TransformerEngine FusedAdam": Peer(
        "transformer_engine", CUDA, _imported("transformer_engine.pytorch.optimizers", "FusedAdam")
    ),
    "flashoptim": Peer("flashoptim", CUDA, _imported("flashoptim", "FlashAdamW", BF16)),
    "torchao 8-bit": Peer("torchao", ANY, _imported("torchao.optim", "AdamW8bit", BF16)),
    "bitsandbytes 8-bit": Peer("bitsandbytes", CUDA, _imported("bitsandbytes.optim", "AdamW8bit", BF16)),
}


def absent(peer: str, device: torch.device) -> str:
    """Why a peer takes no part on a device; empty if it does."""
    found = PEERS[peer]
    if device.type not in found.devices:
        return f"serves {' and '.join(found.devices)}"
    return "" if importlib.util.find_spec(found.package) else f"{found.package} is not installed"


def versions(names: Sequence[str]) -> dict[str, str]:
    """Of the packages behind these peers, and of Python's numerical ones."""
    found = {}
    for package in sorted({PEERS[name].package for name in names} | {"torch", "numpy"}):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = str(getattr(importlib.import_module(package), "__version__", "unknown"))
    return found | {"torch": torch.__version__}  # with its build, as in 2.11.0+cu130: a wheel's metadata may lack that
