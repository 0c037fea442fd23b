"""Parameters that are distributed tensors (FSDP2, tensor parallelism): the kernels work on this process's shard.

A parameter's state is distributed as it is, so that torch.distributed.checkpoint saves and reshards it; counts are
plain tensors.
Nothing here imports torch.distributed, which a DTensor's presence proves imported.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch


def is_distributed(value: object) -> bool:
    """Whether this is a DTensor."""
    return hasattr(type(value), "to_local")


def any_distributed(tensors: Sequence[torch.Tensor]) -> bool:
    """Whether one of them is a DTensor; fast, because it is asked in every step."""
    return any(hasattr(kind, "to_local") for kind in set(map(type, tensors)))


def local(tensor: torch.Tensor) -> torch.Tensor:
    """This process's part of a tensor, sharing its memory: the same object as long as the shard is where it is."""
    # Not to_local(), which makes a new view of a Parameter in every call (torch 2.13).
    shard: torch.Tensor = tensor._local_tensor if is_distributed(tensor) else tensor  # type: ignore[attr-defined]
    # The result of a collective that is still under way.
    wait = getattr(type(shard), "wait", None)
    return shard if wait is None else wait(shard)


def local_grad(param: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
    """A gradient's part that belongs to this process's part of the parameter; one still to be summed, is summed."""
    if not is_distributed(grad):
        return grad
    if not is_distributed(param):
        raise TypeError(
            f"the parameter of shape {tuple(param.shape)} is a plain tensor and its gradient a DTensor; set p.grad to "
            "the gradient's to_local() or full_tensor(), whichever has the parameter's shape"
        )
    theirs: Any = grad
    ours: Any = param
    if theirs.placements != ours.placements or theirs.device_mesh != ours.device_mesh:
        theirs = theirs.redistribute(ours.device_mesh, ours.placements)
    return local(theirs)


def check_param(param: torch.Tensor) -> None:
    """Raise if a parameter is distributed in such a way that its shards cannot be updated one by one."""
    placements = getattr(param, "placements", ()) if is_distributed(param) else ()
    if any(placement.is_partial() for placement in placements):
        raise TypeError(
            f"the parameter of shape {tuple(param.shape)} is a sum over processes ({placements}), which an update of "
            "its parts would not keep; distribute it with Shard or Replicate"
        )


def norm_reducer(params: Sequence[torch.Tensor]) -> Callable[[torch.Tensor], None] | None:
    """What turns the sum of squares of the local parts into that of the whole; None without distributed parameters.

    Raises ValueError where some are cut along other dimensions of a mesh than others, or not at all: a sum over
    processes would count those several times.
    """
    if not any_distributed(params):
        return None
    cuts = {_cut(param) for param in params}
    if len(cuts) > 1:
        raise ValueError(
            "the norm of all gradients needs all parameters cut along the same dimensions of one mesh, got "
            f"{sorted(map(str, cuts))}; set opt.norm_reduce_hook to a function that makes the 0-d tensor it is given, "
            "this process's sum of squares, that of all processes, or clip with torch.nn.utils.clip_grad_norm_"
        )
    mesh, dimensions = cuts.pop()

    def reduce(squares: torch.Tensor) -> None:
        for dimension in dimensions:
            torch.distributed.all_reduce(squares, group=mesh.get_group(dimension))

    return reduce


def _cut(param: Any) -> tuple[Any, tuple[int, ...]]:
    """The mesh of a parameter, and along which of its dimensions the parameter is cut into shards."""
    if not is_distributed(param):
        return None, ()
    dimensions = [i for i, placement in enumerate(param.placements) if not placement.is_replicate()]
    return param.device_mesh, tuple(dimensions)


def like(param: torch.Tensor, shard: torch.Tensor) -> torch.Tensor:
    """A DTensor placed as the parameter is, over this process's part of it."""
    # Not from_local(), which moves a shard that is offloaded to the CPU to the mesh's device.
    spec = copy.copy(param._spec)  # type: ignore[attr-defined]
    spec.tensor_meta = spec.tensor_meta._replace(dtype=shard.dtype)
    kind: Any = type(param.detach())
    distributed: torch.Tensor = kind(shard, spec, requires_grad=False)
    return distributed


def shown(param: torch.Tensor, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A parameter's state as its users see it: what has a value per element is distributed as the parameter is."""
    if not is_distributed(param):
        return dict(tensors)
    return {name: like(param, value) if _is_elementwise(name) else value for name, value in tensors.items()}


def _is_elementwise(name: str) -> bool:
    """Whether a state tensor has a value for each of the parameter's elements: no count, no scale of several."""
    return name not in ("step", "step_int64") and not name.endswith("_scale")


def is_reshardable(state: Mapping[str, Any]) -> bool:
    """Whether a parameter's state can be cut into other shards: a scale belongs to several elements of this one."""
    return not any(name.endswith("_scale") for name in state)


def local_state(param: torch.Tensor, state: Mapping[str, Any]) -> dict[str, Any]:
    """The parts of a parameter's state that belong to this process.

    Raises ValueError for a DTensor of another shape, or beside a parameter that is none, and for a whole tensor where
    the parameter is a shard of it.
    """
    return {name: _local_value(param, name, value) for name, value in state.items()}


def _local_value(param: torch.Tensor, name: str, value: Any) -> Any:
    if is_distributed(value):
        if not is_distributed(param):
            raise ValueError(
                f"state {name!r} is a DTensor and its parameter of shape {tuple(param.shape)} is not; load the "
                "checkpoint with torch.distributed.checkpoint.state_dict.set_optimizer_state_dict, or as full_tensor()"
            )
        if value.shape != param.shape:
            raise ValueError(
                f"state {name!r} must have its parameter's shape {tuple(param.shape)}, got {tuple(value.shape)}; "
                "was the checkpoint made from another model?"
            )
        return local_grad(param, value)
    if not is_distributed(param) or not isinstance(value, torch.Tensor) or value.dim() == 0:
        return value
    if value.shape == param.shape != local(param).shape:
        raise ValueError(
            f"state {name!r} is whole and its parameter a shard of shape {tuple(local(param).shape)}; load the "
            "checkpoint with torch.distributed.checkpoint.state_dict.set_optimizer_state_dict and "
            "StateDictOptions(full_state_dict=True)"
        )
    return value
