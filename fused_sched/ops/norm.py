"""The norm of gradients by itself."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from .. import packing, precision
from ..arena import SLOTS, is_dense
from ..norm import NormMemory, NormSettings
from .call import compiled, run, upload


def grad_norm(grads: Sequence[torch.Tensor], *, backend: str = "auto") -> torch.Tensor:
    """The 2-norm of all gradients together, 0-d float64 on their device, without waiting for it.

    norm = sqrt(sum of squares), summed in double in an order that depends on the sizes alone: the same bits on every
    backend, any NaN being equal to any NaN. Right for gradients near 1e30, infinite or NaN exactly when a gradient is.

    Args:
        grads: dense tensors of one device: float32, bfloat16, float16 or float64, of any mixture.
        backend: "auto", "cpu" or "cuda".

    Raises ValueError, TypeError or RuntimeError for tensors that no kernel can walk.

    Example:
        >>> import torch
        >>> from fused_sched import ops
        >>> ops.grad_norm([torch.tensor([3.0, 0.0]), torch.tensor([4.0])]).item()
        5.0

    Source: torch.nn.utils.get_total_norm (torch 2.13) with norm_type=2, which sums in the gradients' dtype.
    """
    if not grads:
        return torch.zeros((), dtype=torch.float64)
    device = grads[0].device
    module = compiled(device, backend).module
    assert module is not None
    for grad in grads:
        packing.check_work(grad, grad)
        if grad.device != device or not is_dense(grad):
            raise ValueError(f"gradients must be dense and on {device}, got {grad.stride()} on {grad.device}; copy it")
    call = module.Call()
    call.device = device.index or 0
    rows = np.zeros(len(grads), packing.layout_dtype(module, "tensor"))
    rows["grad"] = [g.data_ptr() for g in grads]
    rows["numel"] = [g.numel() for g in grads]
    rows["grad_format"] = rows["param_format"] = [module.FORMATS[precision.FORMATS[g.dtype]] for g in grads]
    norm = NormMemory(module, device)
    norm.write(NormSettings(max_norm=torch.inf), lambda content: upload(content, device))
    # Nothing but gradients is read, but every call is checked for where its state is.
    arena = np.full((1, len(SLOTS)), norm.address // 16 * 16, np.uint64)
    clock, group, values = (torch.zeros(n, dtype=torch.float64, device=device) for n in (2, 32, 4))
    call.tensors, call.num_tensors = rows.ctypes.data, len(rows)
    call.arenas, call.num_arenas = arena.ctypes.data, 1
    call.clock, call.groups, call.values, call.num_groups = clock.data_ptr(), group.data_ptr(), values.data_ptr(), 1
    norm.reserve(module.num_norm_chunks(call))
    call.norm, call.chunk_sums = norm.address, norm.sums_address
    call.norm_is_reduced = 1
    run(module.norm, call, device)
    return norm.squares.sqrt()
