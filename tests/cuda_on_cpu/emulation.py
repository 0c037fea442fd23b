"""The update of csrc/core/adam.h in NumPy, to the last bit: float32 (float64 for fp64 parameters) with fused
multiply-adds. Independent of the C++ code, and of how elements are cut into threads and tiles.
"""

from __future__ import annotations

import ctypes
from ctypes.util import find_library

import numpy as np
import numpy.typing as npt

from . import abi

Array = npt.NDArray[np.floating]


def fma32(a: Array, b: Array, c: Array) -> npt.NDArray[np.float32]:
    """a*b + c rounded once. The product of floats is exact in double; the sum is rounded to odd, so that the
    rounding to float32 sees on which side of a tie it was (Boldo and Melquiond 2008)."""
    product = np.multiply(a, b, dtype=np.float64)
    addend = np.asarray(c, dtype=np.float64)
    total = product + addend
    part = total - product
    error = (product - (total - part)) + (addend - part)
    bits = total.view(np.int64)
    to_odd = np.isfinite(total) & (error != 0.0) & (bits & 1 == 0)
    odd = np.where((error > 0.0) == (total > 0.0), bits + 1, bits - 1)
    return np.where(to_odd, odd, bits).view(np.float64).astype(np.float32)


_libm = ctypes.CDLL(find_library("m") or "libm.so.6")
_libm.fma.restype = ctypes.c_double
_libm.fma.argtypes = (ctypes.c_double,) * 3
_fma64 = np.frompyfunc(_libm.fma, 3, 1)


def fma(a: Array, b: Array, c: Array) -> Array:
    a, b, c = np.broadcast_arrays(a, b, c)
    return fma32(a, b, c) if a.dtype == np.float32 else _fma64(a, b, c).astype(np.float64)


def decode(stored: npt.NDArray[np.generic], name: str) -> Array:
    if name == "bf16":
        return (stored.astype(np.uint32) << 16).view(np.float32)
    return stored.view(np.float16).astype(np.float32) if name == "fp16" else stored.copy()


def encode(value: Array, name: str, beside_master: bool = False) -> npt.NDArray[np.generic]:
    """To nearest, ties to even; bf16 beside a master: ties away from zero."""
    if name == "fp16":
        return value.astype(np.float16).view(np.uint16)
    if name != "bf16":
        return value.copy()
    bits = value.view(np.uint32).astype(np.uint64)
    bias = 0x8000 if beside_master else 0x7FFF + ((bits >> 16) & 1)
    return np.where(np.isnan(value), 0x7FFF, (bits + bias) >> 16).astype(np.uint16)


def update(stored: dict[str, npt.NDArray[np.generic]], names: tuple[str, str], scalars: np.void) -> None:
    """Updates `stored` in place: param, grad, and the slots the tensor has. `names`: formats of the two."""
    param_name, grad_name = names
    master = stored.get("master")
    amsgrad = "max_exp_avg_sq" in stored
    flags = int(scalars["flags"])
    if flags & abi.SKIP:
        return
    with np.errstate(all="ignore"):
        weight = decode(stored["param"], param_name)
        if master is not None:
            unedited = encode(master, param_name, beside_master=True) == stored["param"]
            weight = np.where(unedited, master, weight)
        g = decode(stored["grad"], grad_name) * scalars["grad_factor"]
        if flags & abi.L2_DECAY:
            g = fma(scalars["decay"], weight, g)
        w = fma(-scalars["decay"], weight, weight) if flags & abi.DECOUPLED_DECAY else weight

        m, v = stored["exp_avg"], stored["exp_avg_sq"]
        first, second = scalars["first_rate"], scalars["second_rate"]
        m_new = fma(first, g - m, g if flags & abi.FIRST_FROM_GRAD else m)
        v_new = fma(second, fma(g, g, -v), g * g if flags & abi.SECOND_FROM_GRAD else v)
        m[:], v[:] = m_new, v_new
        if amsgrad:
            largest = stored["max_exp_avg_sq"]
            largest[:] = np.where(v <= largest, largest, v)
            v = largest
        denominator = fma(np.sqrt(v), scalars["inv_sqrt_bias2"], scalars["eps"])
        w = fma(-scalars["step_size"], m / denominator, w)
        if master is not None:
            master[:] = w
        stored["param"][:] = encode(w, param_name, beside_master=master is not None)
