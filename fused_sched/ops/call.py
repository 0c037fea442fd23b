"""One call of a compiled backend over tensors that the caller owns: what the functions here pack and run.

The optimizer's way to the same kernels is `packing.py` and `engine.py`, which own the state's memory and may therefore
check less; here every tensor is somebody else's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from types import ModuleType
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch

from .. import backends, codec, precision
from ..arena import PADDING, SLOTS, is_dense, same_order
from ..hyperparameters import SCHEDULABLE, check_schedule
from ..packing import check_param, layout_dtype
from ..schedules import Schedule
from ..schedules.metric import MetricSchedule

#: A hyperparameter: a number, a function of the clock, or a 0-d tensor that every call reads on its device.
Value: TypeAlias = float | Schedule | torch.Tensor

#: Elements that one thread of a kernel, or one group of 8-bit codes, takes: the last of them lie behind the tensor.
WHOLE = 16

_MASTER_OF = {streams[0].dtype: name for name, streams in codec.MASTERS.items() if streams}
_MOMENTS_OF = {streams[0].dtype: name for name, streams in codec.MOMENTS.items()}


class Tensors(NamedTuple):
    """The tensors of a call, a list for each role; empty for roles that the formats do not have."""

    params: Sequence[torch.Tensor]
    grads: Sequence[torch.Tensor]
    state: Mapping[str, Sequence[torch.Tensor]]  # by slot

    def flat(self) -> list[torch.Tensor]:
        return [*self.params, *self.grads, *(t for tensors in self.state.values() for t in tensors)]


class Kind(NamedTuple):
    """The formats of all parameters of a call but their own."""

    master: str
    moments: str
    amsgrad: bool


def compiled(device: torch.device, backend: str) -> backends.Backend:
    """The backend that serves a device; there is none in plain torch.

    Raises RuntimeError or ValueError.
    """
    found = backends.select(backend, device)
    if found.module is None:
        name = "cuda" if device.type == "cuda" else "cpu"
        raise RuntimeError(
            f"fused_sched.ops needs compiled code for tensors on {device}, got none ({backends.available(name)[1]}); "
            "build the package, or use FusedScheduledAdam(backend='reference')"
        )
    return found


def check_tensors(tensors: Tensors, stochastic_rounding: bool, backend: backends.Backend) -> Kind:
    """Raise unless the kernels can walk these tensors; returns their formats."""
    params = tensors.params
    if not params:
        raise ValueError("params must name at least one tensor, got none")
    for name, given in (("grads", tensors.grads), *tensors.state.items()):
        if len(given) not in ((len(params),) if name in ("grads", "exp_avg", "exp_avg_sq") else (0, len(params))):
            raise ValueError(f"{name} must name a tensor for each of the {len(params)} parameters, got {len(given)}")
    kind = _kind(tensors, stochastic_rounding)
    for param in params:
        check_param(param)
        if param.dtype != params[0].dtype or param.device != params[0].device:
            raise ValueError(
                "parameters of one call must have one dtype and device, got "
                f"{params[0].dtype} on {params[0].device} and {param.dtype} on {param.device}; make a call for each"
            )
        if not is_dense(param):
            raise ValueError(
                f"parameters must be dense, got shape {tuple(param.shape)} with strides {param.stride()}; use a copy"
            )
    if kind.master != "none":
        precision.resolve_master(kind.master, params[0].dtype)
    streams = precision.streams(params[0].dtype, kind.master, kind.moments, kind.amsgrad)
    dtypes = {stream.slot: stream for stream in streams}
    owns_whole_groups = backend.name != "cpu" or kind.moments == "8bit"
    spans: list[tuple[int, int]] = []
    for i, param in enumerate(params):
        _check_like(param, tensors.grads[i], "gradient", None)
        if (tensors.grads[i].dtype == torch.float64) != (param.dtype == torch.float64) and not backend.mixes_fp64:
            raise ValueError(
                f"{param.dtype} parameters cannot have {tensors.grads[i].dtype} gradients here; cast the gradient"
            )
        for slot, given in tensors.state.items():
            if not given:
                continue
            if slot not in dtypes:
                raise ValueError(f"moments {kind.moments!r} have no {slot}, got one; leave it out")
            stream = dtypes[slot]
            if stream.group == 1:
                _check_like(param, given[i], slot, stream.dtype)
            else:
                _check_scales(param, given[i], slot, stream)
            begin = given[i].data_ptr()
            if begin % 16 != 0:
                raise ValueError(f"{slot} must begin at a multiple of 16 bytes, got address {begin:#x}; see state_like")
            if owns_whole_groups and stream.group == 1:
                spans.append(_span(given[i], slot))
    spans.sort()
    for (_, end), (begin, _) in pairwise(spans):
        if begin < end:
            raise ValueError(
                f"state must not begin within the last {WHOLE} elements of another's: kernels write whole groups of "
                f"{WHOLE}; allocate it with fused_sched.ops.state_like"
            )
    return kind


def _kind(tensors: Tensors, stochastic_rounding: bool) -> Kind:
    param, state = tensors.params[0], tensors.state
    moments = "fp32" if param.dtype == torch.float64 else _MOMENTS_OF.get(state["exp_avg"][0].dtype, "")
    if not moments:
        raise ValueError(
            f"exp_avg must be float32, bfloat16 or uint8 codes, got {state['exp_avg'][0].dtype}; see state_like"
        )
    if moments == "8bit" and not (state["exp_avg_scale"] and state["exp_avg_sq_scale"]):
        raise ValueError("8-bit moments need scales, got none; pass exp_avg_scales and exp_avg_sq_scales")
    master = "stochastic" if stochastic_rounding else "none"
    if state["master"]:
        if stochastic_rounding:
            raise ValueError("stochastic_rounding stands in for a master, got both; leave one out")
        master = _MASTER_OF.get(state["master"][0].dtype, "")
        if not master:
            known = ", ".join(map(str, _MASTER_OF))
            raise ValueError(f"masters must be one of {known}, got {state['master'][0].dtype}")
    amsgrad = bool(state["max_exp_avg_sq"])
    precision.check_names(master, moments, amsgrad)
    return Kind(master, moments, amsgrad)


def _check_like(param: torch.Tensor, tensor: torch.Tensor, what: str, dtype: torch.dtype | None) -> None:
    if tensor.device != param.device or tensor.layout is not torch.strided or tensor.is_neg():
        raise ValueError(f"{what} must be a dense tensor on {param.device}, got {tensor.layout} on {tensor.device}")
    if tensor.shape != param.shape or not same_order(tensor.stride(), param.stride(), param.shape):
        raise ValueError(
            f"{what} must have its parameter's shape and strides, {tuple(param.shape)} and {param.stride()}, got "
            f"{tuple(tensor.shape)} and {tensor.stride()}; copy it into torch.empty_like(param)"
        )
    if tensor.dtype != dtype if dtype is not None else tensor.dtype not in precision.FORMATS:
        raise ValueError(f"{what} must be {dtype or 'float32, bfloat16, float16 or float64'}, got {tensor.dtype}")


def _check_scales(param: torch.Tensor, tensor: torch.Tensor, slot: str, stream: codec.Stream) -> None:
    wanted = -(-param.numel() // stream.group)
    if tensor.device != param.device or tensor.dtype != stream.dtype or not tensor.is_contiguous():
        raise ValueError(f"{slot} must be contiguous {stream.dtype} on {param.device}, got {tensor.dtype}")
    if tensor.shape != (wanted,):
        raise ValueError(
            f"{slot} must have an entry per {stream.group} elements, shape ({wanted},), got {tuple(tensor.shape)}"
        )


def _span(tensor: torch.Tensor, slot: str) -> tuple[int, int]:
    """Where a kernel reads and writes for this tensor: addresses of its whole groups."""
    begin, size = tensor.data_ptr(), tensor.element_size()
    needed = -(-tensor.numel() // WHOLE) * WHOLE * size
    storage = tensor.untyped_storage()
    if tensor.numel() > 0 and begin + needed > storage.data_ptr() + storage.nbytes():
        raise ValueError(
            f"{slot} must have memory for a multiple of {WHOLE} elements, which kernels move whole, got "
            f"{tensor.numel()} at the end of its storage; allocate it with fused_sched.ops.state_like"
        )
    return begin, begin + needed


def tensor_rows(module: ModuleType, tensors: Tensors, kind: Kind, records: torch.Tensor) -> tuple[Any, Any]:
    """The tables of a call: `fs_tensor` and `fs_arena`. records: a StepRecord per tensor."""
    params, grads = tensors.params, tensors.grads
    rows = np.zeros(len(params), layout_dtype(module, "tensor"))
    rows["param"] = [p.data_ptr() for p in params]
    rows["grad"] = [g.data_ptr() for g in grads]
    rows["step"] = records.data_ptr() + np.arange(len(params)) * records.stride(0) * records.element_size()
    rows["numel"] = [p.numel() for p in params]
    rows["ordinal"] = np.arange(len(params))
    rows["param_format"] = [module.FORMATS[precision.FORMATS[p.dtype]] for p in params]
    rows["grad_format"] = [module.FORMATS[precision.FORMATS[g.dtype]] for g in grads]
    rows["master"] = module.MASTERS[kind.master]
    rows["moments"] = module.MOMENTS[kind.moments]
    rows["amsgrad"] = kind.amsgrad
    streams = precision.streams(params[0].dtype, kind.master, kind.moments, kind.amsgrad)
    arenas: list[tuple[int, ...]] = []
    for i in range(len(params)):
        address = {s.slot: tensors.state[s.slot][i].data_ptr() for s in streams}
        place = _offset_in(arenas[-1], address, streams) if arenas else None
        if place is None:
            arenas.append(tuple(address.get(slot, 0) for slot in SLOTS))
            place = 0
        rows["state_offset"][i] = place
        rows["arena"][i] = len(arenas) - 1
    return rows, np.array(arenas, np.uint64)


def _offset_in(arena: tuple[int, ...], address: Mapping[str, int], streams: Sequence[codec.Stream]) -> int | None:
    """Elements from an arena's begin, where all of a tensor's state is at one offset; None: it is elsewhere.

    A CUDA launch holds 16 arenas, so state that `state_like` has allocated together should be one.
    """
    offsets = set()
    for stream in streams:
        distance = (address[stream.slot] - arena[SLOTS.index(stream.slot)]) * stream.group
        if distance < 0 or distance % (stream.dtype.itemsize * PADDING) != 0:
            return None
        offsets.add(distance // stream.dtype.itemsize)
    return offsets.pop() if len(offsets) == 1 else None


class GroupSettings(NamedTuple):
    """The hyperparameters of a call, as given."""

    lr: Value
    beta1: Value
    beta2: Value
    weight_decay: Value
    eps: float
    grad_divisor: float
    decoupled: bool
    maximize: bool


def group_record(module: ModuleType, settings: GroupSettings, device: torch.device) -> list[torch.Tensor]:
    """A `GroupRecord` on the device, and after it what it points to, which must stay alive with it."""
    record = np.zeros((), layout_dtype(module, "group"))
    needed: list[torch.Tensor] = []
    for name in SCHEDULABLE:
        value = getattr(settings, name)
        record[f"{name}.scale"] = 1.0
        if isinstance(value, Schedule):
            if isinstance(value, MetricSchedule):
                raise ValueError(f"{name} cannot follow metrics here, got {value!r}; pass a tensor that you write to")
            check_schedule(name, value)
            needed.append(upload(value.program, device))
            record[f"{name}.program"] = needed[-1].data_ptr()
        elif isinstance(value, torch.Tensor):
            if value.device != device or value.numel() != 1 or value.dtype not in precision.FORMATS:
                raise ValueError(
                    f"a tensor {name} must have one floating-point element on {device}, which is read there, got "
                    f"shape {tuple(value.shape)} of {value.dtype} on {value.device}"
                )
            needed.append(value)
            record[f"{name}.tensor"] = value.data_ptr()
            record[f"{name}.tensor_format"] = module.FORMATS[precision.FORMATS[value.dtype]]
        else:
            record[f"{name}.scale"] = value
    record["eps"], record["grad_divisor"] = settings.eps, settings.grad_divisor
    flags = module.GROUP_FLAGS
    record["flags"] = flags["decoupled"] * settings.decoupled | flags["maximize"] * settings.maximize
    return [upload(record.tobytes(), device), *needed]


def upload(content: bytes, device: torch.device) -> torch.Tensor:
    """Bytes into memory of the device, without waiting for it."""
    host = torch.frombuffer(bytearray(content), dtype=torch.uint8)
    if device.type != "cuda":
        return host
    return host.pin_memory().to(device, non_blocking=True)


def run(function: Callable[[Any], None], call: Any, device: torch.device) -> None:
    """One function of the backend."""
    if device.type == "cuda":
        run_on_stream(function, call, device)
        return
    call.num_threads = torch.get_num_threads()
    function(call)


def run_on_stream(function: Callable[[Any], None], call: Any, device: torch.device) -> None:
    """One function of the CUDA backend, on the current stream of the device."""
    call.stream = torch.cuda.current_stream(device).cuda_stream
    with torch.cuda.device(device):  # see CompiledEngine._run
        function(call)
