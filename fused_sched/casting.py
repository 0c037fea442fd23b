"""A model in bfloat16, but for what is usually kept wider."""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatchcase
from typing import TypeVar

import torch

_Module = TypeVar("_Module", bound=torch.nn.Module)

_CAST = (torch.float32, torch.float64, torch.float16)


@torch.no_grad()
def cast_to_bf16(model: _Module, keep: Iterable[str] = ()) -> _Module:
    """Cast a model's parameters and buffers to bfloat16 in place, except norms with running statistics.

    Args:
        model: stays the same object, as do its parameters, so that ties and optimizers hold.
        keep: names of modules, parameters or buffers that keep their dtype too, as shell patterns ("*.norm*", "head");
            a module is kept with everything in it.

    Returns the model. A running average of batches loses what bfloat16 rounds away, so modules with buffers named
    `running_*` are kept. torch's norms in float32 take bfloat16 inputs; run other kept layers under `torch.autocast`.
    Raises ValueError, before anything has changed, if a pattern of `keep` matches nothing, TypeError if it is no list.

    Masters start from the rounded weights; `opt.load_fp32_state_dict(model, whole)` sets them to the exact ones, where
    `whole` is a copy of `model.state_dict()` from before the cast.

    Example:
        >>> import torch
        >>> from fused_sched import cast_to_bf16
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 2))
        >>> [p.dtype for p in cast_to_bf16(model, keep=["2.bias"]).parameters()][1:]
        [torch.bfloat16, torch.float32, torch.float32, torch.bfloat16, torch.float32]
        >>> model[:2](torch.ones(3, 4, dtype=torch.bfloat16)).dtype
        torch.bfloat16
    """
    kept = _kept(model, keep)
    cast: dict[int, torch.Tensor] = {}
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            if id(buffer) not in kept and buffer.dtype in _CAST:
                setattr(module, name, cast.setdefault(id(buffer), buffer.to(torch.bfloat16)))
    for param in model.parameters():
        if id(param) not in kept and param.dtype in _CAST:
            grad, param.grad = param.grad, None
            param.data = param.data.to(torch.bfloat16)
            # A dtype that was set for gradients (`p.grad_dtype`, where torch has it) stays.
            wanted = getattr(param, "grad_dtype", None) or torch.bfloat16
            param.grad = None if grad is None else grad.to(wanted)
    return model


def _kept(model: torch.nn.Module, keep: Iterable[str]) -> set[int]:
    """Ids of the tensors that are not to be cast."""
    if isinstance(keep, str):
        raise TypeError(f"keep must be a list of patterns, got the string {keep!r}; write keep=[{keep!r}]")
    tensors = {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }
    patterns = list(keep)
    names = [*tensors, *(name for name, _ in model.named_modules(remove_duplicate=False) if name)]
    unmatched = [pattern for pattern in patterns if not any(fnmatchcase(name, pattern) for name in names)]
    if unmatched:
        raise ValueError(
            f"every pattern of keep must match a module, parameter or buffer, got {unmatched[0]!r}, which matches "
            "none; names are those of model.named_modules() and model.state_dict()"
        )
    averaging = {name.rpartition(".")[0] for name in tensors if name.rpartition(".")[2].startswith("running_")}

    def is_kept(name: str) -> bool:
        owners = [name[:i] for i, character in enumerate(name) if character == "."]
        return name.rpartition(".")[0] in averaging or any(
            fnmatchcase(part, pattern) for part in (*owners, name) for pattern in patterns
        )

    return {id(tensor) for name, tensor in tensors.items() if is_kept(name)}
