"""The step in plain torch operations: the fallback on any device, and the compiled code's twin in tests.

The one deliberate second copy of `csrc/core/adam.h` and `csrc/core/clock.h`, as `codec.py` is of the formats. It
keeps the clock on the host and reads step counts back, so it waits for the device; its results differ from the
compiled ones by the few ulp that separate roundings make. The formats give the same bits for the same values.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from . import codec, reference_metric
from .arena import Layout, is_dense
from .backends import Backend
from .history import Recorder
from .hyperparameters import GroupSettings, Source
from .machine import Machine
from .norm import NormSettings
from .packing import Work


@dataclass(frozen=True)
class _Values:
    lr: float
    beta1: float
    beta2: float
    weight_decay: float


class ReferenceEngine:
    """Same duties as CompiledEngine, without compiled code."""

    def __init__(self, backend: Backend, device: torch.device, seed: int) -> None:
        self.backend = backend
        self.device = device
        self._seed = seed
        self._clock = 0
        self._tick_pending = False
        self._settings: list[GroupSettings] = []
        self._lr_tensors: list[torch.Tensor | None] = []
        # MPS has no float64.
        self._values_device = torch.device("cpu") if device.type == "mps" else device
        self._lrs = torch.zeros(0, dtype=torch.float64, device=self._values_device)
        self._works: list[Work] = []
        self._norm_settings = NormSettings()
        self._squares = torch.zeros((), dtype=torch.float64, device=self._values_device)
        self._norm = torch.full((), math.nan, dtype=torch.float64, device=self._values_device)
        self.recorder: Recorder | None = None

    def push(self, settings: Sequence[GroupSettings], lr_tensors: Sequence[torch.Tensor | None]) -> None:
        self._settings = list(settings)
        self._lr_tensors = list(lr_tensors)
        if len(self._lrs) < len(settings):
            old = self._lrs
            self._lrs = torch.full((len(settings),), math.nan, dtype=torch.float64, device=self._values_device)
            self._lrs[: len(old)] = old

    def lay_out(self, works: Sequence[Work]) -> None:
        self._works = list(works)

    def rebind(self, grads: Sequence[torch.Tensor]) -> bool:
        return False  # nothing is prepared, so there is nothing to reuse

    @property
    def row_addresses(self) -> Sequence[int] | None:
        return None

    def push_norm(self, settings: NormSettings) -> None:
        self._norm_settings = settings

    @torch.no_grad()
    def sum_squares(self) -> torch.Tensor:
        self._squares.copy_(self._gradient_norm() ** 2)
        return self._squares

    def _gradient_norm(self) -> torch.Tensor:
        """Of the gradients as they are; scaled by the largest element, so that no square leaves the range."""
        grads = [work.grad.detach().to(self._values_device, torch.float64) for work in self._works]
        largest = torch.stack([grad.abs().max() for grad in grads if grad.numel() > 0] or [self._squares * 0.0]).max()
        if largest == 0.0 or not largest.isfinite():
            return largest
        return largest * torch.stack([(grad / largest).square().sum() for grad in grads]).sum().sqrt()

    @torch.no_grad()
    def step(
        self,
        tick: bool,
        found_inf: torch.Tensor | None = None,
        grad_scale: torch.Tensor | None = None,
        norm_is_reduced: bool = False,
    ) -> None:
        scale = 1.0 if grad_scale is None else float(grad_scale.item())
        clip, refused = 1.0, False
        if self._norm_settings.wanted:
            norm = self._squares.sqrt() if norm_is_reduced else self._gradient_norm()
            self._norm.copy_(norm / (scale * self._norm_settings.grad_divisor))
            clip = _clip_factor(self._norm.item(), self._norm_settings.max_norm)
            refused = self._norm_settings.skip_nonfinite and not math.isfinite(self._norm.item())
        works, self._works = self._works, []  # gradients are not ours to keep alive
        self._tick_pending |= tick
        skipped = refused or (found_inf is not None and found_inf.item() != 0.0)
        values: list[_Values] = []
        if not skipped:
            self._clock += self._tick_pending
            self._tick_pending = False
            values = [self._evaluate(s, t) for s, t in zip(self._settings, self._lr_tensors, strict=True)]
            self._lrs.copy_(torch.tensor([v.lr for v in values], dtype=torch.float64))
        if self.recorder is not None:
            norm_value = self._norm.item() if self._norm_settings.wanted else math.nan
            used = [(v.lr, v.weight_decay) for v in values]
            self.recorder.write(tick, self._clock, skipped, norm_value, clip, used)
        if skipped:
            return
        for work in works:
            random = codec.random_key(self._seed, self._clock, work.ordinal)
            _update(work, self._settings[work.group], values[work.group], scale, clip, random)

    def _evaluate(self, settings: GroupSettings, lr_tensor: torch.Tensor | None) -> _Values:
        index = max(0, self._clock - 1)

        def value(source: Source) -> float:
            return source.value(index, lr_tensor)

        return _Values(value(settings.lr), value(settings.beta1), value(settings.beta2), value(settings.weight_decay))

    def report(self, metric: torch.Tensor | float) -> None:
        for machine in self._machines():
            memory = machine.on(self.device)
            state = memory.tolist()
            reference_metric.report(machine.rule, state, float(metric))
            memory.copy_(torch.tensor(state, dtype=torch.float64))

    def release(self) -> None:
        for machine in self._machines():
            machine.forget(self.device)

    def _machines(self) -> list[Machine]:
        return [group.lr.machine for group in self._settings if group.lr.machine is not None]

    def forget_rates(self) -> None:
        self._lrs.fill_(math.nan)

    def read_clock(self) -> int:
        return self._clock

    def write_clock(self, step: int) -> None:
        self._clock = step
        self._tick_pending = False

    @property
    def lr_tensor(self) -> torch.Tensor:
        return self._lrs

    @property
    def grad_norm(self) -> torch.Tensor:
        return self._norm


def _clip_factor(norm: float, max_norm: float | None) -> float:
    """torch.nn.utils.clip_grad_norm_'s coefficient; a NaN stays one."""
    if max_norm is None or max_norm == math.inf:
        return 1.0
    factor = max_norm / (norm + 1e-6)
    return 1.0 if factor > 1.0 else factor


def _advance(work: Work) -> int:
    mirror, count = work.entry.tensors["step"], work.entry.tensors["step_int64"]
    step = int(count.item())
    written = mirror.item()
    if torch.tensor(step, dtype=torch.float32).item() != written and 0.0 <= written < 9e18:
        step = int(written)
    step += 1
    count.fill_(step)
    mirror.fill_(step)
    return step


def _update(
    work: Work,
    settings: GroupSettings,
    values: _Values,
    grad_scale: float,
    clip: float,
    random: codec.RandomKey,
) -> None:
    step = _advance(work)
    param, layout, state = work.param, work.entry.layout, work.entry.tensors
    dtype = layout.compute_dtype
    sign = -1.0 if settings.maximize else 1.0
    # In the parameter's memory order, which random bits and quantisation groups follow; sliced parameters and
    # gradients of another order are copied into it.
    dense = param if is_dense(param) and not param.is_neg() else _laid_out(param, layout)
    grad = codec.in_memory_order(_laid_out(work.grad.detach(), layout)).to(dtype)
    grad = grad * (sign * clip / (grad_scale * settings.grad_divisor))
    narrow = layout.dtype.itemsize == 2
    weight = codec.decode_master(layout.master, dense, state) if narrow else codec.in_memory_order(dense).clone()

    old = weight.clone()
    if values.weight_decay != 0.0:
        if settings.decoupled:
            weight -= (values.lr * values.weight_decay) * old
        else:
            grad = grad + values.weight_decay * old
    exp_avg, exp_avg_sq = (_moment(name, state).to(dtype) for name in ("exp_avg", "exp_avg_sq"))
    _move(exp_avg, grad, values.beta1)
    _move(exp_avg_sq, grad * grad, values.beta2)
    second = exp_avg_sq
    if layout.amsgrad:
        largest = codec.in_memory_order(state["max_exp_avg_sq"])
        second = torch.maximum(largest, exp_avg_sq, out=largest)
    bias1 = 1.0 - values.beta1**step
    bias2 = 1.0 - values.beta2**step
    denominator = second.sqrt() * (1.0 / math.sqrt(bias2)) + settings.eps
    weight -= (values.lr / bias1) * (exp_avg / denominator)

    if layout.moments != "fp32":
        for name, coded in codec.encode_moments(layout.moments, exp_avg, exp_avg_sq, random).items():
            codec.in_memory_order(state[name]).copy_(coded)
    rounded, kept = codec.encode_master(layout.master, weight, layout.dtype, random) if narrow else (weight, None)
    if kept is not None:
        codec.in_memory_order(state[codec.MASTERS[layout.master][0].name]).copy_(kept)
    codec.in_memory_order(dense).copy_(rounded)
    if dense is not param:
        param.copy_(dense)


def _laid_out(tensor: torch.Tensor, layout: Layout) -> torch.Tensor:
    """The tensor, or a copy whose elements lie in memory as the layout's do."""
    if tensor.stride() == layout.stride and not tensor.is_neg():
        return tensor
    return torch.empty_strided(layout.shape, layout.stride, dtype=tensor.dtype, device=layout.device).copy_(tensor)


def _moment(name: str, state: Mapping[str, torch.Tensor]) -> torch.Tensor:
    value = codec.decode_moment(name, state)
    assert value is not None
    return value


def _move(average: torch.Tensor, new: torch.Tensor, beta: float) -> None:
    """average = average + (1-beta)*(new - average), from whichever end loses fewer digits (csrc/core/adam.h)."""
    distance = new - average
    if beta < 0.5:
        torch.sub(new, distance * beta, out=average)
    else:
        average += distance * (1.0 - beta)
