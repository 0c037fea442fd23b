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


def split(weight: Array, master: str) -> tuple[npt.NDArray[np.uint16], npt.NDArray[np.signedinteger]]:
    """A bf16 parameter and what split16 or split8 keep beside it."""
    bits = weight.view(np.uint32).astype(np.uint64)
    if master == "split8":
        bits = (bits + 0x80) >> 8 << 8
    param = np.where(np.isnan(weight), 0x7FFF, (bits + 0x8000) >> 16).astype(np.uint16)
    remainder = np.where(np.isnan(weight), 0, bits & 0xFFFF).astype(np.uint16).view(np.int16)
    return param, remainder if master == "split16" else (remainder >> 8).astype(np.int8)


def join(param: npt.NDArray[np.uint16], kept: npt.NDArray[np.signedinteger]) -> npt.NDArray[np.float32]:
    """The float that split() was given; the parameter's own where the two are no float's halves."""
    remainder = kept.astype(np.int64) << (16 - 8 * kept.itemsize)
    joined = ((param.astype(np.int64) << 16) + remainder).astype(np.uint32).view(np.float32)
    return np.where(np.isnan(joined), (param.astype(np.uint32) << 16).view(np.float32), joined)


# ---- random bits: SplitMix64's finaliser for the key, Wellons' lowbias32 for the elements ----------------

_MASK = (1 << 64) - 1


def random_words(seed: int, clock: int, ordinal: int, numel: int) -> tuple[npt.NDArray, npt.NDArray]:
    """32 bits per element for the moments, and 32 for the parameter's own rounding. Neighbours share a hash, the odd
    one with its halves exchanged."""
    key = 0
    for word in (seed, clock, ordinal):
        key = (key ^ word) + 0x9E3779B97F4A7C15 & _MASK
        key = (key ^ key >> 30) * 0xBF58476D1CE4E5B9 & _MASK
        key = (key ^ key >> 27) * 0x94D049BB133111EB & _MASK
        key ^= key >> 31

    def words(first: int) -> npt.NDArray[np.uint32]:
        element = np.arange(numel, dtype=np.uint32)
        x = (element - element % 2) ^ np.uint32(first)
        x = (x ^ x >> 16) * np.uint32(0x7FEB352D)
        x = (x ^ x >> 15 ^ np.uint32(key >> 32)) * np.uint32(0x846CA68B)
        x = x ^ x >> 16
        return np.where(element % 2 == 1, x >> 16 | x << 16, x)

    first = key & 0xFFFFFFFF
    return words(first), words(first ^ 0xA511E9B3)


# ---- moments: 8-bit codes in double-precision arithmetic, where the package shifts bits ------------------

MANTISSA = {"exp_avg": 3, "exp_avg_sq": 4}


def decode_moment(stored: dict[str, npt.NDArray[np.generic]], name: str, moments: str) -> Array:
    if moments != "8bit":
        return decode(stored[name], moments)
    mantissa, code = MANTISSA[name], stored[name].astype(np.int64)
    sign = np.where(code & 0x80, -1.0, 1.0) if name == "exp_avg" else 1.0
    code = code & 0x7F if name == "exp_avg" else code
    scale = np.repeat(stored[f"{name}_scale"], abi.SCALE_GROUP)[: len(code)].astype(np.int64)
    exponent, fraction = code >> mantissa, code & ((1 << mantissa) - 1)
    significand = np.where(exponent == 0, fraction, fraction + (1 << mantissa))
    value = np.ldexp(significand.astype(np.float64), scale + np.maximum(exponent, 1) - 127 - mantissa)
    with np.errstate(over="ignore"):
        return (sign * np.where(code == (16 << mantissa) - 1, np.nan, value)).astype(np.float32)


def encode_moments(moments: str, exp_avg: Array, exp_avg_sq: Array, random: npt.NDArray) -> dict:
    """What is stored of float32 moments; `random`: 32 bits per element, the lowest for the first, the highest for the
    second moment."""
    if moments == "bf16":
        bits = exp_avg_sq.view(np.uint32).astype(np.uint64)
        rounded = np.where(np.isnan(exp_avg_sq), 0x7FFF, (bits + (random >> 16)) >> 16).astype(np.uint16)
        rounded = np.where((rounded == 0) & (exp_avg_sq > 0), np.uint16(1), rounded)
        return {"exp_avg": encode(exp_avg, "bf16"), "exp_avg_sq": rounded}
    stored = {}
    draws = {"exp_avg": (random % 2**20) / 2.0**20, "exp_avg_sq": (random >> 13) / 2.0**19}
    for name, value in (("exp_avg", exp_avg), ("exp_avg_sq", exp_avg_sq)):
        stored[name], stored[f"{name}_scale"] = _encode_8bit(name, value, draws[name])
    return stored


def _encode_8bit(name: str, value: Array, draw: Array) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]:
    steps = 1 << MANTISSA[name]
    finite = np.isfinite(value)
    x = np.where(finite, np.abs(value), 0.0).astype(np.float64)
    groups = np.pad(x, (0, -len(x) % abi.SCALE_GROUP)).reshape(-1, abi.SCALE_GROUP)
    # The smallest power of two under which the largest value, rounded up, is not the code of NaN.
    largest = groups.max(axis=1, initial=0.0)
    exponent = np.frexp(largest)[1] - 1
    exponent += largest > (2.0 - 2.0 / steps) * np.ldexp(1.0, exponent)
    scale = np.maximum(np.where(largest > 0.0, exponent + 127 - 15, 0), 0)
    of_element = np.repeat(scale, abi.SCALE_GROUP)[: len(x)]
    smallest_normal = np.ldexp(1.0, of_element + 1 - 127)
    own = np.frexp(x)[1] - 1
    with np.errstate(over="ignore"):
        below = (x.astype(np.float32) + smallest_normal.astype(np.float32)).astype(np.float64) - smallest_normal
    position = np.where(
        x < smallest_normal,
        below / smallest_normal,
        own + 127 - of_element + np.where(x > 0.0, x / np.ldexp(1.0, own) - 1.0, 0.0),
    )
    code = np.floor(position * steps + draw).astype(np.int64)
    if name == "exp_avg_sq":
        code = np.where((code == 0) & (x > 0.0), 1, code)
    sign = np.signbit(value) * 0x80 if name == "exp_avg" else 0
    return np.where(finite, code | sign, 16 * steps - 1).astype(np.uint8), scale.astype(np.uint8)


# ---- the update ------------------------------------------------------------------------------------------


def update(
    stored: dict[str, npt.NDArray[np.generic]],
    names: tuple[str, str, str, str],
    scalars: np.void,
    random: tuple[int, int, int] = (0, 0, 0),
) -> None:
    """Updates `stored` in place: param, grad, and the slots the tensor has. `names`: formats of the two, the master's
    and the moments'. `random`: seed, clock, ordinal."""
    param_name, grad_name, master, moments = names
    amsgrad = "max_exp_avg_sq" in stored
    flags = int(scalars["flags"])
    if flags & abi.SKIP:
        return
    of_moments, of_param = random_words(*random, len(stored["param"]))
    with np.errstate(all="ignore"):
        weight = decode(stored["param"], param_name)
        if master == "fp32":
            unedited = encode(stored["master"], param_name, beside_master=True) == stored["param"]
            weight = np.where(unedited, stored["master"], weight)
        elif master in ("split16", "split8"):
            weight = join(stored["param"], stored["master"])
        g = decode(stored["grad"], grad_name).astype(weight.dtype) * scalars["grad_factor"]
        if flags & abi.L2_DECAY:
            g = fma(scalars["decay"], weight, g)
        w = fma(-scalars["decay"], weight, weight) if flags & abi.DECOUPLED_DECAY else weight

        m, v = (decode_moment(stored, name, moments) for name in ("exp_avg", "exp_avg_sq"))
        first, second = scalars["first_rate"], scalars["second_rate"]
        m_new = fma(first, g - m, g if flags & abi.FIRST_FROM_GRAD else m)
        v_new = fma(second, fma(g, g, -v), g * g if flags & abi.SECOND_FROM_GRAD else v)
        kept = {"exp_avg": m_new, "exp_avg_sq": v_new}
        if moments != "fp32":
            kept = encode_moments(moments, m_new, v_new, of_moments)
        for slot, values in kept.items():
            stored[slot][:] = values
        m, v = m_new, v_new
        if amsgrad:
            largest = stored["max_exp_avg_sq"]
            largest[:] = np.where(v <= largest, largest, v)
            v = largest
        denominator = fma(np.sqrt(v), scalars["inv_sqrt_bias2"], scalars["eps"])
        w = fma(-scalars["step_size"], m / denominator, w)
        if master in ("split16", "split8"):
            stored["param"][:], stored["master"][:] = split(w, master)
            return
        if master == "fp32":
            stored["master"][:] = w
        if master == "stochastic":
            bits = w.view(np.uint32).astype(np.uint64) + (of_param >> 16)
            stored["param"][:] = np.where(np.isnan(w), 0x7FFF, bits >> 16).astype(np.uint16)
            return
        stored["param"][:] = encode(w, param_name, beside_master=master == "fp32")
