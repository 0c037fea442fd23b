"""The update of tensors that the caller owns."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypedDict

import torch

from .. import hyperparameters, packing
from ..engine import is_capturing
from ..norm import NormMemory, NormSettings
from ..schedules import Schedule
from .call import (
    GroupSettings,
    Kind,
    Tensors,
    Value,
    check_tensors,
    compiled,
    group_record,
    run_on_stream,
    tensor_rows,
    upload,
)
from .state import StepCounts

if TYPE_CHECKING:
    from typing_extensions import Unpack


class Options(TypedDict, total=False):
    """What an update takes beside its tensors and counts; `adamw_` says what each means."""

    lr: Value
    betas: tuple[Value, Value]
    eps: float
    weight_decay: Value
    decoupled_weight_decay: bool
    maximize: bool
    max_exp_avg_sqs: Sequence[torch.Tensor]
    masters: Sequence[torch.Tensor]
    exp_avg_scales: Sequence[torch.Tensor]
    exp_avg_sq_scales: Sequence[torch.Tensor]
    stochastic_rounding: bool
    max_grad_norm: float | None
    skip_nonfinite: bool
    grad_divisor: float
    grad_scale: torch.Tensor | None
    found_inf: torch.Tensor | None
    seed: int
    backend: str


class PreparedAdamW:
    """`adamw_` with its checks done once: each call is one update of the same tensors, for a microsecond of Python.

    Args: those of `adamw_`. Tensors are read and written where they were when this was made; it keeps them alive.
    Launches can be captured in a CUDA graph; the rates of a Schedule or a tensor follow in its replays.

    Example:
        >>> import torch
        >>> from fused_sched import ops, schedules
        >>> p, g = torch.zeros(256), torch.ones(256)
        >>> m, v = ops.state_like([p]), ops.state_like([p])
        >>> update = ops.PreparedAdamW([p], [g], m, v, ops.StepCounts(1, "cpu"), lr=schedules.linear(1.0, 0.0, 4))
        >>> update()
        >>> p[0].item(), update.lr.item()
        (-1.0, 1.0)
        >>> update()
        >>> update.lr.item()
        0.75
    """

    def __init__(
        self,
        params: Sequence[torch.Tensor],
        grads: Sequence[torch.Tensor],
        exp_avgs: Sequence[torch.Tensor],
        exp_avg_sqs: Sequence[torch.Tensor],
        counts: StepCounts,
        *,
        lr: Value = 1e-3,
        betas: tuple[Value, Value] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: Value = 0.0,
        decoupled_weight_decay: bool = True,
        maximize: bool = False,
        max_exp_avg_sqs: Sequence[torch.Tensor] = (),
        masters: Sequence[torch.Tensor] = (),
        exp_avg_scales: Sequence[torch.Tensor] = (),
        exp_avg_sq_scales: Sequence[torch.Tensor] = (),
        stochastic_rounding: bool = False,
        max_grad_norm: float | None = None,
        skip_nonfinite: bool = False,
        grad_divisor: float = 1.0,
        grad_scale: torch.Tensor | None = None,
        found_inf: torch.Tensor | None = None,
        seed: int = 0,
        backend: str = "auto",
    ) -> None:
        state = {
            "exp_avg": exp_avgs,
            "exp_avg_sq": exp_avg_sqs,
            "max_exp_avg_sq": max_exp_avg_sqs,
            "master": masters,
            "exp_avg_scale": exp_avg_scales,
            "exp_avg_sq_scale": exp_avg_sq_scales,
        }
        tensors = Tensors(params, grads, state)
        device = params[0].device if params else counts.device
        served_by = compiled(device, backend)
        kind = check_tensors(tensors, stochastic_rounding, served_by)
        if counts.device != device or len(counts) != len(params):
            raise ValueError(
                f"counts must be StepCounts({len(params)}, {str(device)!r}), got those of {len(counts)} tensors on "
                f"{counts.device}"
            )
        settings = _settings(lr, betas, eps, weight_decay, decoupled_weight_decay, maximize, grad_divisor, kind)
        norm_settings = NormSettings(
            hyperparameters.check_max_grad_norm(max_grad_norm), bool(skip_nonfinite), settings.grad_divisor
        )
        for name, value in (("grad_scale", grad_scale), ("found_inf", found_inf)):
            _check_scalar(name, value, device)
        if is_capturing(device):
            raise RuntimeError(
                "the settings of this call are not on the device yet, and the capture of a CUDA graph would record "
                "their upload; make a PreparedAdamW before capturing and call it there"
            )
        module = served_by.module
        assert module is not None
        self._device = device
        self._is_cuda = device.type == "cuda"
        self._step = module.step
        self._num_threads = 0  # of the latest call
        self._rows, self._arenas = tensor_rows(module, tensors, kind, counts.rows[1:])
        self._values = torch.full((1, 4), torch.nan, dtype=torch.float64, device=device)
        scalar_bytes = len(params) * module.LAYOUTS["scalars"][0]
        self._scalars = torch.empty(scalar_bytes, dtype=torch.uint8, device=device)
        self._record = group_record(module, settings, device)
        self._counts = counts.rows
        self._alive: list[Any] = [tensors, grad_scale, found_inf]
        # Autograd saw no write to them; those of inference mode have no versions.
        self._versioned = [p for p in params if not p.is_inference()]
        call = self._call = module.Call()
        call.device = device.index or 0
        call.seed = hyperparameters.check_seed(seed)
        call.tensors, call.num_tensors = self._rows.ctypes.data, len(self._rows)
        call.arenas, call.num_arenas = self._arenas.ctypes.data, len(self._arenas)
        call.clock = self._counts.data_ptr()
        call.groups, call.num_groups = self._record[0].data_ptr(), 1
        call.values, call.scalars = self._values.data_ptr(), self._scalars.data_ptr()
        call.grad_scale = 0 if grad_scale is None else grad_scale.data_ptr()
        call.found_inf = 0 if found_inf is None else found_inf.data_ptr()
        call.tick = 1
        self._norm: NormMemory | None = None
        if norm_settings.wanted:
            self._norm = NormMemory(module, device)
            self._norm.write(norm_settings, lambda content: upload(content, device))
            self._norm.reserve(module.num_norm_chunks(call))
            call.norm, call.chunk_sums = self._norm.address, self._norm.sums_address

    def __call__(self) -> None:
        """Apply one update."""
        packing.bump_versions(self._versioned)
        if self._is_cuda:
            run_on_stream(self._step, self._call, self._device)
            return
        num_threads = torch.get_num_threads()
        if num_threads != self._num_threads:
            self._call.num_threads = self._num_threads = num_threads
        self._step(self._call)

    @property
    def lr(self) -> torch.Tensor:
        """The rate of the latest update, 0-d float64, on the device; NaN before the first."""
        return self._values[0, 0]

    @property
    def grad_norm(self) -> torch.Tensor:
        """The norm of the latest update's gradients, 0-d float64, on the device.

        Raises RuntimeError unless max_grad_norm or skip_nonfinite asked for it.
        """
        if self._norm is None:
            raise RuntimeError("the norm is computed with max_grad_norm or skip_nonfinite, got neither; pass one")
        return self._norm.norm

    def forget(self) -> PreparedAdamW:
        """Keep no tensor of the caller's alive."""
        self._alive, self._versioned = [], []
        return self


def adamw_(
    params: Sequence[torch.Tensor],
    grads: Sequence[torch.Tensor],
    exp_avgs: Sequence[torch.Tensor],
    exp_avg_sqs: Sequence[torch.Tensor],
    counts: StepCounts,
    **options: Unpack[Options],
) -> None:
    r"""One AdamW update in place, of tensors that share their dtype and hyperparameters.

    For the t-th update of a tensor, T updates having been applied before by calls with these counts:

    .. math::
        w &\leftarrow w - \eta_T \lambda w, \quad
        m \leftarrow m + (1-\beta_1)(g - m), \quad v \leftarrow v + (1-\beta_2)(g^2 - v) \\
        w &\leftarrow w - \frac{\eta_T}{1-\beta_1^t} \cdot \frac{m}{\sqrt{v}/\sqrt{1-\beta_2^t} + \epsilon}

    Args:
        params, grads: float32, bfloat16, float16 or float64; dense, a gradient in its parameter's strides.
        exp_avgs, exp_avg_sqs: the moments: float32 (float64 for float64 parameters), bfloat16, or uint8 codes.
        counts: `StepCounts`, advanced by the call.
        lr, betas, weight_decay: numbers, Schedules, or tensors of one element on the parameters' device, read there.
        eps: added to the denominator.
        decoupled_weight_decay: False adds weight_decay * w to the gradient.
        maximize: ascend.
        max_exp_avg_sqs: makes it AMSGrad.
        masters: of 16-bit parameters: float32, int16 (split16) or int8 (split8).
        exp_avg_scales, exp_avg_sq_scales: of uint8 moments, an entry per 16 elements.
        stochastic_rounding: of bfloat16 parameters without masters; `seed` chooses its bits.
        max_grad_norm, skip_nonfinite, grad_divisor: as those of `FusedScheduledAdam`, over the tensors of this call.
        grad_scale, found_inf: float32 tensors of one element, GradScaler's.
        backend: "auto", "cpu" or "cuda".

    On a GPU, and with uint8 moments, state needs memory for whole groups of 16 elements; `state_like` allocates it. A
    second call with the same tensors and options costs less than the first: `PreparedAdamW` costs least.

    Raises ValueError, TypeError or RuntimeError before anything has changed.

    Example:
        >>> import torch
        >>> from fused_sched import ops
        >>> p, g = torch.zeros(256), torch.ones(256)
        >>> m, v, counts = ops.state_like([p]), ops.state_like([p]), ops.StepCounts(1, "cpu")
        >>> ops.adamw_([p], [g], m, v, counts, lr=0.5)
        >>> p[0].item(), int(counts)
        (-0.5, 1)

    Source: as `FusedScheduledAdam`; comparable with torch 2.13's torch._fused_adamw_.
    """
    key = (
        *map(_places, (params, grads, exp_avgs, exp_avg_sqs)),
        {name: v if type(v) in (float, int, bool) else _identity(v) for name, v in options.items()},
    )
    if counts.latest is None or counts.latest[0] != key:
        update = PreparedAdamW(params, grads, exp_avgs, exp_avg_sqs, counts, **options)
        counts.latest = key, update.forget()
    packing.bump_versions([p for p in params if not p.is_inference()])
    counts.latest[1]()


def _places(tensors: Sequence[torch.Tensor]) -> list[Any]:
    """Where and how tensors lie in memory: all that a call knows of them."""
    return [(t.data_ptr(), t.dtype, t.shape, t.stride()) for t in tensors]


def _identity(option: Any) -> Any:
    """Equal for what makes the same call."""
    if isinstance(option, torch.Tensor):
        return _places([option])
    return [_identity(v) for v in option] if isinstance(option, list | tuple) else option


def _settings(
    lr: Value,
    betas: tuple[Value, Value],
    eps: float,
    weight_decay: Value,
    decoupled: bool,
    maximize: bool,
    grad_divisor: float,
    kind: Kind,
) -> GroupSettings:
    """Checked as the options of a group, but for what only the device knows."""

    def plain(value: Value) -> Any:
        return 0.0 if isinstance(value, Schedule | torch.Tensor) else value

    hyperparameters.check_options(
        {
            "lr": plain(lr),
            "betas": tuple(map(plain, betas)),
            "eps": eps,
            "weight_decay": plain(weight_decay),
            "decoupled_weight_decay": decoupled,
            "amsgrad": kind.amsgrad,
            "maximize": maximize,
            "master": kind.master,
            "moments": kind.moments,
        }
    )
    divisor = hyperparameters.check_grad_divisor(grad_divisor)
    return GroupSettings(lr, *betas, weight_decay, eps, divisor, decoupled, maximize)


def _check_scalar(name: str, value: torch.Tensor | None, device: torch.device) -> None:
    if value is None:
        return
    if value.dtype != torch.float32 or value.numel() != 1 or value.device != device:
        raise ValueError(
            f"{name} must be a float32 tensor of one element on {device}, got {value.dtype} of shape "
            f"{tuple(value.shape)} on {value.device}; convert it with .to()"
        )
