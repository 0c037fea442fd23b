"""Updates within the backward pass: each parameter as soon as its gradient is complete, which is then freed."""

from __future__ import annotations

import operator
import sys
import threading
from types import TracebackType

import torch

from . import dtensors
from .devices import Call
from .masters import ExactParameters

#: DDP's size. An update of 25 MiB of float32 gradients moves 175 MiB: at 3 TB/s as long as ten launches take. Of the
#: gradients of a model with a billion parameters it is a hundredth.
BUCKET_BYTES = 25 * 2**20

# A Python function that starts the engine, and one that the engine calls: a nested backward pass has the one in a
# frame above the other.
_STARTS_ENGINE = torch.autograd.graph._engine_run_backward.__code__
_CALLED_BY_ENGINE = torch.autograd.function.BackwardCFunction.apply.__code__


class BackwardSteps(ExactParameters):
    """The part of `FusedScheduledAdam` that steps while gradients are computed."""

    _in_backward: StepInBackward | None = None

    def step_in_backward(self, model: torch.nn.Module, *, bucket_bytes: int = BUCKET_BYTES) -> StepInBackward:
        """Update parameters during `backward()`, as their gradients become complete, and free those.

        Each backward pass is one update: the weights, the state and the clock after it are those of `backward()`,
        `step()`, `zero_grad()`, bit for bit, but not all gradients exist at once.

        Args:
            model: which holds all parameters of this optimizer.
            bucket_bytes: gradients are kept until so many bytes of them are complete, then updated together; 0: each
                by itself.

        Returns a handle; its `remove()`, or leaving it as a context manager, ends this.

        - `step()` may stay in the loop: it finds no gradients and does nothing. Its hooks do not run within the pass.
        - Gradients cannot be accumulated over several passes, clipped, checked or scaled by a GradScaler, because the
          first update is made before the last gradient is known. `grad_divisor` divides all the same.
        - A parameter that gets no gradient in a pass is left alone; a pass that reaches none is no update.
        - A pass that fails has updated some parameters: `zero_grad()` before the next.
        - With `retain_graph=True` a second pass finds weights changed that it needs, and torch raises.
        - Activation checkpointing needs `use_reentrant=False`.
        - Processes that train one model need FSDP2 (`fully_shard`): DDP and FSDP1 sum gradients too late for this.
        - In the capture of a CUDA graph all gradients must fit one bucket.

        Raises TypeError, ValueError or RuntimeError where that is violated: here if it can be seen here, else from
        `backward()`, at the first gradient that shows it.

        Example:
            >>> import torch
            >>> from fused_sched import FusedScheduledAdam, schedules
            >>> model = torch.nn.Linear(4, 2)
            >>> opt = FusedScheduledAdam(model.parameters(), lr=schedules.linear(1.0, 0.0, 100))
            >>> with opt.step_in_backward(model):
            ...     for _ in range(3):
            ...         model(torch.ones(3, 4)).sum().backward()
            >>> opt.clock, [p.grad for p in model.parameters()]
            (3, [None, None])

        Source: torch's tutorial "How to save memory by fusing the optimizer step into the backward pass".
        """
        handle = StepInBackward(self, model, bucket_bytes)
        self._in_backward = handle
        return handle

    def __setattr__(self, name: str, value: object) -> None:
        if name == "grad_scale" and value is not None and self._in_backward is not None:
            raise RuntimeError(
                "a GradScaler cannot be used with step_in_backward(): the gradients of the latest backward pass were "
                "applied as they were scaled, unchecked; train in bfloat16, or scale the loss by a constant that "
                "grad_divisor undoes"
            )
        super().__setattr__(name, value)


class StepInBackward:
    """What `step_in_backward()` returns: steps in every backward pass until it is removed."""

    def __init__(self, optimizer: BackwardSteps, model: torch.nn.Module, bucket_bytes: int) -> None:
        self._bucket_bytes = _check_bucket_bytes(bucket_bytes)
        self._optimizer = optimizer
        self._params = _held(optimizer)
        _check_model(model, optimizer, self._params)
        self._check_pass()
        self._place = {id(p): ordinal for ordinal, p in enumerate(self._params)}
        # Gradients of several devices become complete in several threads.
        self._lock = threading.RLock()
        self._graph_task: int | None = None
        self._ticked = False
        self._group_of: dict[int, int] = {}
        self._bucket: list[torch.Tensor] = []
        self._bucket_filled = 0
        self._streams: dict[torch.device, torch.cuda.Stream] = {}
        self._hooks = [
            p.register_post_accumulate_grad_hook(self._take)  # type: ignore[no-untyped-call]
            for p in self._params
            if p.requires_grad
        ]

    def remove(self) -> None:
        """End stepping in backward passes. Gradients that a pass has left waiting stay for `step()`."""
        for hook in self._hooks:
            hook.remove()
        self._bucket = []
        if self._optimizer._in_backward is self:
            self._optimizer._in_backward = None

    def __enter__(self) -> StepInBackward:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()

    # -- within a backward pass ----------------------------------------------------------------------------

    def _take(self, param: torch.Tensor) -> None:
        """The parameter's gradient is complete."""
        with self._lock:
            graph_task = torch._C._current_graph_task_id()
            if graph_task != self._graph_task:
                self._begin_pass(graph_task, param)
            if param.grad is None:
                raise RuntimeError(
                    f"the gradient of the parameter of shape {tuple(param.shape)} was taken away by another hook "
                    "before it was used; let one optimizer update each parameter"
                )
            self._order_streams(param.device)
            self._bucket.append(param)
            self._bucket_filled += dtensors.local(param.grad).nbytes
            if self._bucket_filled >= self._bucket_bytes:
                self._update()

    def _begin_pass(self, graph_task: int, first: torch.Tensor) -> None:
        if _is_nested():
            raise RuntimeError(
                "step_in_backward() cannot tell when a backward pass within a backward pass is over, which reentrant "
                "activation checkpointing starts; pass use_reentrant=False to torch.utils.checkpoint.checkpoint"
            )
        if [id(p) for p in _held(self._optimizer)] != list(self._place):
            raise RuntimeError(
                "the optimizer holds other parameters than when step_in_backward() was called; remove() the handle and "
                "call it again"
            )
        self._check_pass(but=first)
        self._graph_task = graph_task
        self._ticked = False
        self._bucket, self._bucket_filled = [], 0
        self._streams = {}
        groups = self._optimizer.param_groups
        index_of = self._optimizer._records.index_of
        self._group_of = {id(p): index for g in groups for index in [index_of(g, groups)] for p in g["params"]}
        torch.autograd.Variable._execution_engine.queue_callback(self._end_pass)

    def _end_pass(self) -> None:
        with self._lock:
            self._graph_task = None
            if self._bucket:
                self._update()

    def _update(self) -> None:
        """Update the parameters whose gradients wait, and free those."""
        owners, self._bucket, self._bucket_filled = self._bucket, [], 0
        grads = [p.grad for p in owners if p.grad is not None]
        call = Call(
            owners,
            list(map(dtensors.local, owners)) if dtensors.any_distributed(owners) else owners,
            [dtensors.local_grad(p, g) for p, g in zip(owners, grads, strict=True)],
            [self._group_of[id(p)] for p in owners],
            [self._place[id(p)] for p in owners],
        )
        for device in {p.device for p in owners}:
            self._order_streams(device)
        with torch.no_grad():
            self._optimizer._apply(call, None, None, tick=not self._ticked)
        self._ticked = True
        for p, grad in zip(owners, call.grads, strict=True):
            if grad.is_cuda:
                grad.record_stream(torch.cuda.current_stream(grad.device))
            p.grad = None

    def _order_streams(self, device: torch.device) -> None:
        """Updates follow each other also where a forward pass on several streams has them run on several."""
        if device.type == "cuda":
            stream = torch.cuda.current_stream(device)
            last = self._streams.get(device, stream)
            if last != stream:
                stream.wait_stream(last)
            self._streams[device] = stream

    def _check_pass(self, but: torch.Tensor | None = None) -> None:
        """Raise if the next backward pass could not do what a step does."""
        if self._optimizer._norm_settings().wanted:
            raise ValueError(
                "step_in_backward() updates parameters before all gradients are known, so it can neither clip by their "
                "norm nor skip a step for one of them; set opt.max_grad_norm = None and opt.skip_nonfinite = False"
            )
        left = [p for p in self._params if p is not but and p.grad is not None]
        if left:
            raise RuntimeError(
                f"step_in_backward() needs all gradients freed before a backward pass, and {len(left)} were left (the "
                f"first of shape {tuple(left[0].shape)}) by a pass that failed, came before, or did not know that the "
                "parameter is trained; call opt.zero_grad(), or remove() the handle"
            )


def _held(optimizer: BackwardSteps) -> list[torch.Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def _check_bucket_bytes(bucket_bytes: int) -> int:
    value = -1 if isinstance(bucket_bytes, bool) else operator.index(bucket_bytes)
    if value < 0:
        raise ValueError(f"bucket_bytes must be a number of bytes, 0 or more, got {bucket_bytes!r}")
    return value


def _check_model(model: torch.nn.Module, optimizer: BackwardSteps, params: list[torch.Tensor]) -> None:
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"step_in_backward() takes the model, a torch.nn.Module, got {type(model).__name__}")
    if optimizer._in_backward is not None:
        raise RuntimeError("step_in_backward() is in force already; remove() its handle first")
    wrappers = {type(module).__name__ for module in model.modules()} & {
        "DistributedDataParallel",
        "FullyShardedDataParallel",
    }
    if wrappers:
        raise ValueError(
            f"{wrappers.pop()} sums gradients over processes after step_in_backward() would use them; use "
            "torch.distributed.fsdp.fully_shard, or step()"
        )
    of_model = {id(p) for p in model.parameters()}
    others = [p for p in params if id(p) not in of_model]
    if others or not params:
        raise ValueError(
            f"{len(others)} of the optimizer's {len(params)} parameters are not the model's, so no backward pass would "
            "update them; pass the model that holds them all. DeepSpeed's ZeRO puts flat partitions in their place and "
            "steps by itself"
        )
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    if distributed and torch.distributed.get_world_size() > 1 and not all(map(dtensors.is_distributed, params)):
        raise ValueError(
            f"with {torch.distributed.get_world_size()} processes each would apply its own gradients to parameters "
            "that are not DTensors; use torch.distributed.fsdp.fully_shard, which sums them first, or step()"
        )


def _is_nested() -> bool:
    """Whether the backward pass that is running was started within another, in this thread."""
    frame = sys._getframe(1)
    started = False
    while frame is not None:
        started |= frame.f_code is _STARTS_ENGINE
        if started and frame.f_code is _CALLED_BY_ENGINE:
            return True
        frame = frame.f_back  # type: ignore[assignment]
    return False
