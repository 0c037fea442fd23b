"""From tensors to the table the kernels walk.

A plan is built once for a set of parameters and reused until something about them changed; a steady step only
reads pointers, dtypes and strides again, because gradients and parameters move.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch.autograd.graph import increment_version

from . import dtensors, precision
from .arena import Entry, is_dense, same_order
from .backends import Backend


class Work(NamedTuple):
    """One parameter of a call."""

    param: torch.Tensor
    grad: torch.Tensor
    group: int
    entry: Entry
    ordinal: int  # place of the parameter among all of the optimizer's


#: What must stay the same for a row to be reused, pointers aside.
Signature = tuple[Any, ...]


def signature(param: torch.Tensor, grad: torch.Tensor) -> Signature:
    return (
        param.dtype,
        param.device,
        param.shape,
        param.stride(),
        grad.dtype,
        grad.device,
        grad.shape,
        grad.layout,
        grad.stride() if grad.layout is torch.strided else None,
        param.is_neg(),
        grad.is_neg() or grad._is_zerotensor(),
    )


def gradient_of(param: torch.Tensor) -> torch.Tensor | None:
    """`p.grad`, else `p.main_grad`: Megatron's place for gradients of another dtype than their parameter's."""
    grad = param.grad
    if grad is None:
        grad = getattr(param, "main_grad", None)
        if grad is not None and not isinstance(grad, torch.Tensor):
            raise TypeError(f"p.main_grad must be a tensor or None, got {grad!r}; set it to a gradient")
    return grad


def check_param(param: torch.Tensor) -> None:
    """Raise if a tensor cannot be optimized, whatever its gradient."""
    if param.layout is not torch.strided:
        raise TypeError(f"parameters must be dense (torch.strided), got {param.layout}; densify it first")
    if param.dtype not in precision.FORMATS:
        remedy = "optimize torch.view_as_real(p)" if param.is_complex() else "cast it"
        raise TypeError(
            f"parameters must be float32, bfloat16, float16 or float64, got {param.dtype} of shape "
            f"{tuple(param.shape)}; {remedy}"
        )
    dtensors.check_param(param)


def check_work(param: torch.Tensor, grad: torch.Tensor) -> None:
    """Raise if a parameter cannot be updated with this gradient."""
    check_param(param)
    where = f"the parameter of shape {tuple(param.shape)}"
    if grad.layout is not torch.strided:
        raise RuntimeError(
            f"gradients must be dense, got {grad.layout} for {where}; use torch.optim.SparseAdam, or "
            "sparse=False in the embedding"
        )
    if grad.dtype not in precision.FORMATS:
        raise TypeError(
            f"gradients must be float32, bfloat16, float16 or float64, got {grad.dtype} for {where}; "
            "split complex ones with torch.view_as_real"
        )
    if grad.device != param.device:
        raise RuntimeError(
            f"a gradient must be on its parameter's device {param.device}, got {grad.device} for {where}; "
            "move it with grad.to(p.device)"
        )
    if grad.shape != param.shape:
        raise RuntimeError(
            f"a gradient must have its parameter's shape, got {tuple(grad.shape)} for {where}; reshape it"
        )
    if param.device.type == "meta":
        raise RuntimeError(f"{where} is on the meta device and has no values; materialise the model before step()")
    if _overlaps_itself(param):
        raise RuntimeError(
            f"{where} has strides {param.stride()}: several of its elements share memory, so an update in place "
            "has no meaning; make it a parameter of its own with p.detach().clone()"
        )


def _overlaps_itself(param: torch.Tensor) -> bool:
    reach = 0  # the largest offset that the dimensions before can address
    if param.numel() == 0:
        return False
    for stride, size in sorted((s, n) for s, n in zip(param.stride(), param.shape, strict=True) if n > 1):
        if stride <= reach:
            return True
        reach += (size - 1) * stride
    return False


def check_overlap(params: Sequence[torch.Tensor]) -> None:
    """Raise if two parameters share memory."""
    spans = sorted((p.data_ptr(), p.data_ptr() + _extent_bytes(p), i) for i, p in enumerate(params) if p.numel() > 0)
    open_spans: list[tuple[int, int]] = []  # (end, index) of those that reach past the current start
    for start, end, index in spans:
        open_spans = [span for span in open_spans if span[0] > start]
        for _, other in open_spans:
            a, b = params[other], params[index]
            if _share_elements(a, b):
                raise RuntimeError(
                    f"two parameters share memory (shapes {tuple(a.shape)} and {tuple(b.shape)}): both would be "
                    "updated in an undefined order; pass one of them, or clone the other"
                )
        open_spans.append((end, index))


def check_scaler_value(name: str, value: object) -> None:
    """Raise unless this is what GradScaler hands over: a tensor of one element, or None."""
    if value is None:
        return
    if not isinstance(value, torch.Tensor) or value.numel() != 1 or value.device.type == "meta":
        raise TypeError(f"opt.{name} must be a tensor of one element with a value, or None; got {value!r}")


def _extent_bytes(tensor: torch.Tensor) -> int:
    last = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    return (last + 1) * tensor.element_size()


def _share_elements(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors of overlapping extent have a byte in common: interleaved slices do not."""
    if is_dense(a) and is_dense(b):
        return True
    if _in_different_columns(a, b):
        return False
    first: npt.NDArray[np.int64] = _byte_offsets(a)
    return bool(np.isin(first, _byte_offsets(b)).any())


def _in_different_columns(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether both step by rows of one length and stay in disjoint columns of them: slices of a fused weight.

    Decides the usual case without listing elements, of which there may be millions.
    """
    rows = {s * a.element_size() for n, s in zip(a.shape, a.stride(), strict=True) if n > 1}
    rows &= {s * b.element_size() for n, s in zip(b.shape, b.stride(), strict=True) if n > 1}
    if not rows:
        return False
    row = max(rows)

    def columns(tensor: torch.Tensor) -> tuple[int, int]:
        size = tensor.element_size()
        width = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True) if s * size != row)
        begin = tensor.data_ptr() % row
        return begin, begin + (width + 1) * size

    (begin_a, end_a), (begin_b, end_b) = columns(a), columns(b)
    return max(end_a, end_b) <= row and (end_a <= begin_b or end_b <= begin_a)


def _byte_offsets(tensor: torch.Tensor) -> npt.NDArray[np.int64]:
    offsets = np.zeros((), np.int64)
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        offsets = offsets[..., None] + np.arange(size, dtype=np.int64) * stride * tensor.element_size()
    starts = offsets.reshape(-1) + tensor.data_ptr()
    return (starts[:, None] + np.arange(tensor.element_size(), dtype=np.int64)).reshape(-1)


def bump_versions_of_each(params: Iterable[torch.Tensor]) -> None:
    """Tell autograd that these were changed in place, which it cannot see."""
    for param in params:
        increment_version(param)


try:
    increment_version([])
    # Without its check, which takes as long as the rest.
    bump_versions: Callable[[list[torch.Tensor]], None] = getattr(torch._C, "_increment_version", increment_version)
except TypeError:  # torch 2.6 takes one tensor at a time
    bump_versions = bump_versions_of_each


class Plan:
    """The tensor table of one call on one device, in the memory layout of `fs_tensor`; its tensors are checked."""

    def __init__(self, works: Sequence[Work], backend: Backend) -> None:
        module = backend.module
        assert module is not None
        # Not the works themselves: they would keep gradients alive that zero_grad() means to free.
        self._params = [w.param for w in works]
        self._entries = [weakref.ref(w.entry) for w in works]
        self._strides = [w.entry.layout.stride for w in works]
        self.signatures = [signature(w.param, w.grad) for w in works]
        self.rows = np.zeros(len(works), layout_dtype(module, "tensor"))
        arenas = list(dict.fromkeys(w.entry.arena for w in works if w.entry.arena is not None))
        index_of = {id(arena): i for i, arena in enumerate(arenas)}
        self.arenas = np.array([arena.slots for arena in arenas], dtype=np.uint64)
        self.rows["step"] = [w.entry.step_address for w in works]
        self.rows["numel"] = [w.entry.layout.numel for w in works]
        self.rows["state_offset"] = [w.entry.offset for w in works]
        self.rows["arena"] = [index_of[id(w.entry.arena)] for w in works]
        self.rows["group"] = [w.group for w in works]
        self.rows["ordinal"] = [w.ordinal for w in works]
        self.rows["param_format"] = [module.FORMATS[precision.FORMATS[w.param.dtype]] for w in works]
        self.rows["master"] = [module.MASTERS[w.entry.layout.master] for w in works]
        self.rows["moments"] = [module.MOMENTS[w.entry.layout.moments] for w in works]
        self.rows["amsgrad"] = [w.entry.layout.amsgrad for w in works]
        self._grad_dtypes = [_kernel_grad_dtype(w, backend.mixes_fp64) for w in works]
        self.rows["grad_format"] = [module.FORMATS[precision.FORMATS[dtype]] for dtype in self._grad_dtypes]
        self._staged_params = [i for i, w in enumerate(works) if w.param.is_neg() or not is_dense(w.param)]
        self._staged_grads = [i for i, w in enumerate(works) if _needs_staging(w, self._grad_dtypes[i])]
        self._written_back: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._keep_alive: list[torch.Tensor] = []
        # Where they do not overlap: the caller has checked.
        self._param_pointers = list(map(torch.Tensor.data_ptr, self._params))

    def bind(self, grads: Sequence[torch.Tensor]) -> bool:
        """Point the table at where the tensors are now; False if the plan no longer fits them."""
        params = self._params
        for old, param, grad in zip(self.signatures, params, grads, strict=True):
            if signature(param, grad) != old:
                return False
        for reference in self._entries:
            entry = reference()
            if entry is None or entry.moved:
                return False
        param_pointers = list(map(torch.Tensor.data_ptr, params))
        if param_pointers != self._param_pointers:
            check_overlap(params)
            self._param_pointers = param_pointers
        self.rows["param"] = param_pointers
        self.rows["grad"] = list(map(torch.Tensor.data_ptr, grads))
        self._stage(grads)
        return True

    @property
    def row_addresses(self) -> Sequence[int] | None:
        """Where the rows are; None where filling in the gradients' addresses would not do, because some are copied."""
        if self._staged_params or self._staged_grads:
            return None
        start = self.rows.ctypes.data
        return range(start, start + self.rows.nbytes, self.rows.itemsize)

    def _stage(self, grads: Sequence[torch.Tensor]) -> None:
        """Dense copies of what the kernels cannot walk: sliced parameters, gradients in another memory order."""
        self._written_back = []
        self._keep_alive = []
        for i in self._staged_grads:
            param = self._params[i]
            dense = torch.empty_strided(param.shape, self._strides[i], dtype=self._grad_dtypes[i], device=param.device)
            dense.copy_(grads[i])
            self.rows["grad"][i] = dense.data_ptr()
            self._keep_alive.append(dense)
        for i in self._staged_params:
            param = self._params[i]
            dense = torch.empty(param.shape, dtype=param.dtype, device=param.device).copy_(param)
            self.rows["param"][i] = dense.data_ptr()
            self._written_back.append((param, dense))

    def finish(self) -> None:
        """Write staged parameters back, once the update is enqueued."""
        for param, dense in self._written_back:
            param.copy_(dense)
        self._written_back = []
        self._keep_alive = []


def _needs_staging(work: Work, kernel_grad_dtype: torch.dtype) -> bool:
    # Lazily negated or zero tensors: what their memory holds is not their value.
    if work.grad.is_neg() or work.grad._is_zerotensor():
        return True
    return work.grad.dtype != kernel_grad_dtype or not same_order(
        work.grad.stride(), work.entry.layout.stride, work.param.shape
    )


def _kernel_grad_dtype(work: Work, mixes_fp64: bool) -> torch.dtype:
    """The dtype a gradient is handed over in: its own, unless the kernels do not mix it with the parameter's."""
    param, grad = work.param.dtype, work.grad.dtype
    if mixes_fp64 or (param == torch.float64) == (grad == torch.float64):
        return grad
    return torch.float64 if param == torch.float64 else torch.float32


def layout_dtype(module: Any, name: str) -> np.dtype[Any]:
    """A C++ struct as a NumPy dtype, from the offsets its compiler used."""
    itemsize, fields = module.LAYOUTS[name]
    return np.dtype(
        {
            "names": [field for field, _, _ in fields],
            "formats": [dtype for _, dtype, _ in fields],
            "offsets": [offset for _, _, offset in fields],
            "itemsize": itemsize,
        }
    )
