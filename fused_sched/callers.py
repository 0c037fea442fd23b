"""Engines that call `step()` or `state_dict()` in ways of their own, which only their place on the stack tells."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from types import FrameType

import torch

#: ZeRO's stages 1 to 3 and its variant for bfloat16: flat partitions, some at a time.
_ZERO = ("deepspeed.runtime.zero.", "deepspeed.runtime.bf16_optimizer")
#: Each process has the layers of its stage.
_PIPELINE = "deepspeed.runtime.pipe."
#: Each process updates some of the parameters, through an optimizer of its own.
_ZERO_REDUNDANCY = "torch.distributed.optim.zero_redundancy_optimizer"

#: Functions that call step() only to make an optimizer allocate its state: (name, start of the module's name).
_DRY_RUNS = (
    ("initialize_optimizer_states", "deepspeed"),
    ("_init_optim_state", "torch.distributed.checkpoint"),
)


def frames(*modules: str) -> Iterator[FrameType]:
    """The frames of modules whose names start so, innermost first."""
    frame = sys._getframe(1)
    while frame is not None:
        if str(frame.f_globals.get("__name__")).startswith(modules):
            yield frame
        frame = frame.f_back  # type: ignore[assignment]


def called_for_allocation() -> bool:
    """Whether some caller steps only to have the state allocated. Never judged by lr == 0 or zero gradients."""
    found = frames(*(module for _, module in _DRY_RUNS))
    return any(
        frame.f_code.co_name == name and frame.f_globals["__name__"].startswith(module)
        for frame in found
        for name, module in _DRY_RUNS
    )


def called_by_zero() -> bool:
    """Whether DeepSpeed's ZeRO is calling."""
    return "deepspeed" in sys.modules and any(frames(*_ZERO))


def called_by_zero_redundancy() -> bool:
    """Whether torch's ZeroRedundancyOptimizer is calling."""
    return _ZERO_REDUNDANCY in sys.modules and any(frames(_ZERO_REDUNDANCY))


def refuse_swapped_state() -> None:
    """Raise if DeepSpeed would move the state to a disk between steps, by tensors that it takes for the only ones."""
    for frame in frames(*_ZERO) if "deepspeed" in sys.modules else ():
        if getattr(frame.f_locals.get("self"), "swap_optimizer", False):
            raise RuntimeError(
                'DeepSpeed\'s "offload_optimizer" to "nvme" empties and refills the tensors of the state, which are '
                'parts of larger buffers here; set its "device" to "cpu", or keep DeepSpeed\'s own Adam'
            )


def refuse_partial_norm(params: Iterable[torch.Tensor], is_reduced: bool) -> None:
    """Raise if the caller hands over some of a model's gradients only, of which the norm would be another one.

    is_reduced: the norm becomes that of all processes' gradients, which leaves those of other calls out.
    """
    if called_by_zero():
        raise RuntimeError(
            "max_grad_norm and skip_nonfinite need all gradients in one call, and DeepSpeed's ZeRO hands over a "
            'part at a time; clip with "gradient_clipping" in its configuration, which also skips overflows, and '
            "leave both options out here"
        )
    if is_reduced:
        return
    by_pipeline = "deepspeed" in sys.modules and any(frames(_PIPELINE))
    # DeepSpeed's mark of an expert's parameter, which other processes do not have (deepspeed/moe/layer.py).
    has_experts = any(getattr(param, "allreduce", True) is False for param in params)
    if by_pipeline or has_experts or called_by_zero_redundancy():
        raise RuntimeError(
            "max_grad_norm and skip_nonfinite need the norm of all gradients, and this process has those of some "
            "parameters only (its part of a ZeroRedundancyOptimizer, its stage of a pipeline, its experts); set "
            "opt.norm_reduce_hook to a function that makes the 0-d tensor it is given, this process's sum of squares, "
            "that of all processes, or leave both options out"
        )
