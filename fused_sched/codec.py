"""Storage formats of optimizer state: the tensors each keeps, and their values in plain torch operations.

The Python half of `csrc/core/codec.h` and the headers it includes, which give the reasons and the error bounds;
`backends.py` checks that the two tables agree. Bits are computed in int64, which holds 32-bit products and signs
alike. Everything works on elements in memory order, as the kernels do.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch


class Stream(NamedTuple):
    """One tensor of a parameter's state."""

    name: str  # its key in `state[p]`
    slot: str  # its place in an arena's addresses (`csrc/step.h`)
    dtype: torch.dtype
    group: int = 1  # elements per entry; more than one: a vector of scales, in memory order


#: What each kind of master keeps beside a 16-bit parameter.
MASTERS: dict[str, tuple[Stream, ...]] = {
    "none": (),
    "fp32": (Stream("master", "master", torch.float32),),
    "split16": (Stream("master_remainder", "master", torch.int16),),
    "split8": (Stream("master_correction", "master", torch.int8),),
    "stochastic": (),
}

#: Elements that share a scale.
GROUP = 16

#: How the two moments are kept.
MOMENTS: dict[str, tuple[Stream, ...]] = {
    "fp32": (
        Stream("exp_avg", "exp_avg", torch.float32),
        Stream("exp_avg_sq", "exp_avg_sq", torch.float32),
    ),
    "bf16": (
        Stream("exp_avg", "exp_avg", torch.bfloat16),
        Stream("exp_avg_sq", "exp_avg_sq", torch.bfloat16),
    ),
    "8bit": (
        Stream("exp_avg_code", "exp_avg", torch.uint8),
        Stream("exp_avg_sq_code", "exp_avg_sq", torch.uint8),
        Stream("exp_avg_scale", "exp_avg_scale", torch.uint8, GROUP),
        Stream("exp_avg_sq_scale", "exp_avg_sq_scale", torch.uint8, GROUP),
    ),
}

#: Significant bits after the leading one in the 8-bit codes of the two moments.
_MANTISSA = {"exp_avg": 3, "exp_avg_sq": 4}

_WORD = 0xFFFFFFFF
_MAGNITUDE = 0x7FFFFFFF
_INFINITY = 0x7F800000
_NAN = 0x7FC00000
_BINADE = 1 << 23

#: The random bits that make a stochastic rounding one to nearest: of those that use their upper bits, and of the first
#: moment in 8 bits, which uses the lower ones.
_NEAREST = 1 << 31
_NEAREST_FIRST = 1 << 19


# ---- random bits (csrc/core/rounding.h) ------------------------------------------------------------------


class RandomKey(NamedTuple):
    """What the random bits of one tensor's elements in one update depend on: two 32-bit words."""

    first: int
    second: int


def random_key(seed: int, clock_step: int, ordinal: int) -> RandomKey:
    golden, mask = 0x9E3779B97F4A7C15, (1 << 64) - 1
    key = _mix_64((seed + golden) & mask)
    for word in (clock_step, ordinal):
        key = _mix_64(((key ^ word) + golden) & mask)
    return RandomKey(key & _WORD, key >> 32)


def key_of_parameter(key: RandomKey) -> RandomKey:
    return RandomKey(key.first ^ 0xA511E9B3, key.second)


def _mix_64(x: int) -> int:
    mask = (1 << 64) - 1
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & mask
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & mask
    return x ^ (x >> 31)


def random_bits(key: RandomKey, element: torch.Tensor) -> torch.Tensor:
    """32 bits for each element (int64 indices), as int64: a hash of the even ones, whose halves neighbours exchange."""
    second = (key.second + (element >> 32) * 0x9E3779B9) & _WORD
    x = (element & (_WORD - 1)) ^ key.first
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & _WORD
    x = ((x ^ (x >> 15) ^ second) * 0x846CA68B) & _WORD
    x = x ^ (x >> 16)
    return torch.where(element % 2 == 1, x >> 16 | (x & 0xFFFF) << 16, x)


# ---- bits ------------------------------------------------------------------------------------------------


def in_memory_order(tensor: torch.Tensor) -> torch.Tensor:
    """A dense tensor as a vector over the same memory; one with gaps as a contiguous copy."""
    if tensor.is_contiguous():
        return tensor.reshape(-1)
    order = sorted(range(tensor.dim()), key=lambda d: (tensor.stride(d), tensor.shape[d] != 1), reverse=True)
    return tensor.permute(order).reshape(-1)


def _bits(value: torch.Tensor) -> torch.Tensor:
    return value.view(torch.int32).to(torch.int64) & _WORD


def _float(bits: torch.Tensor) -> torch.Tensor:
    return _signed(bits, 32).to(torch.int32).view(torch.float32)


def _signed(bits: torch.Tensor, width: int) -> torch.Tensor:
    """The lower bits as a two's complement number."""
    half = 1 << (width - 1)
    return ((bits + half) & ((1 << width) - 1)) - half


def _is_nan(bits: torch.Tensor) -> torch.Tensor:
    return (bits & _MAGNITUDE) > _INFINITY


def _bfloat16(upper: torch.Tensor, nan: torch.Tensor) -> torch.Tensor:
    return _signed(torch.where(nan, 0x7FFF, upper), 16).to(torch.int16).view(torch.bfloat16)


# ---- masters (csrc/core/master.h) ------------------------------------------------------------------------


def decode_master(master: str, param: torch.Tensor, state: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """The exact value of a 16-bit parameter, as float32 in the parameter's memory order."""
    flat = in_memory_order(param)
    if master == "fp32":
        kept = in_memory_order(state["master"])
        unedited = _round_beside_master(kept, param.dtype).view(torch.int16) == flat.view(torch.int16)
        return torch.where(unedited, kept, flat.to(torch.float32))
    if master in ("split16", "split8"):
        upper = (flat.view(torch.int16).to(torch.int64) & 0xFFFF) << 16
        kept = in_memory_order(state[MASTERS[master][0].name]).to(torch.int64)
        bits = (upper + (kept if master == "split16" else kept * 256)) & _WORD
        return _float(torch.where(_is_nan(bits), upper, bits))
    return flat.to(torch.float32)


def encode_master(
    master: str, weight: torch.Tensor, dtype: torch.dtype, key: RandomKey | None = None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The parameter of a float32 weight, and what is kept beside it."""
    bits = _bits(weight)
    nan = _is_nan(bits)
    if master == "fp32":
        return _round_beside_master(weight, dtype), weight
    if master == "split16":
        return _round_beside_master(weight, dtype), _signed(torch.where(nan, 0, bits), 16).to(torch.int16)
    if master == "split8":
        upper = (bits + 0x80) >> 8
        return _bfloat16((upper + 0x80) >> 8, nan), _signed(torch.where(nan, 0, upper), 8).to(torch.int8)
    if master == "stochastic":
        draw = torch.full_like(bits, _NEAREST) if key is None else _random_like(weight, key_of_parameter(key))
        return _bfloat16((bits + (draw >> 16)) >> 16, nan), None
    return weight.to(dtype), None


def encode_beside(master: str, weight: torch.Tensor, param: torch.Tensor) -> torch.Tensor:
    """What a split master keeps beside a bfloat16 parameter that somebody else has rounded the weight to.

    Where that was another rounding than encode_master()'s (ties to even, or not first to split8's 16 digits), the
    nearest value that can be kept; 0 beside a parameter that is more than half a last place away: it was edited.
    """
    unit = 1 if master == "split16" else 256
    bits = _bits(weight)
    distance = bits - ((param.view(torch.int16).to(torch.int64) & 0xFFFF) << 16)
    kept = ((distance + unit // 2) // unit).clamp(-0x8000 // unit, 0x7FFF // unit)
    kept = torch.where((distance.abs() <= 0x8080) & ~_is_nan(bits), kept, 0)  # split8 rounds by 0x80 before
    return kept.to(MASTERS[master][0].dtype)


def _round_beside_master(weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """bf16: ties away from zero, the rounding that a remainder can invert."""
    if dtype != torch.bfloat16:
        return weight.to(dtype)
    bits = _bits(weight)
    return _bfloat16((bits + 0x8000) >> 16, _is_nan(bits))


def _random_like(like: torch.Tensor, key: RandomKey) -> torch.Tensor:
    return random_bits(key, torch.arange(like.numel(), dtype=torch.int64, device=like.device))


# ---- moments (csrc/core/moments.h) -----------------------------------------------------------------------


def decode_moment(name: str, state: Mapping[str, Any]) -> torch.Tensor | None:
    """A moment's values in memory order, from whichever format holds them; None where none does.

    name: "exp_avg" or "exp_avg_sq".
    """
    if state.get(name) is not None:
        return in_memory_order(state[name])
    codes, scales = state.get(f"{name}_code"), state.get(f"{name}_scale")
    return None if codes is None or scales is None else _decode_8bit(name, in_memory_order(codes), scales)


def encode_moments(
    moments: str, exp_avg: torch.Tensor, exp_avg_sq: torch.Tensor, key: RandomKey | None = None
) -> dict[str, torch.Tensor]:
    """float32 moments in memory order as the streams of a compressed format; without a key, to nearest."""
    if key is None:
        random_of_first = torch.full(exp_avg.shape, _NEAREST_FIRST, dtype=torch.int64, device=exp_avg.device)
        random = torch.full_like(random_of_first, _NEAREST)
    else:
        random_of_first = random = _random_like(exp_avg, key)
    if moments == "bf16":
        return {"exp_avg": exp_avg.to(torch.bfloat16), "exp_avg_sq": _encode_second_bf16(exp_avg_sq, random)}
    coded = {}
    for name, value, bits in (("exp_avg", exp_avg, random_of_first), ("exp_avg_sq", exp_avg_sq, random)):
        coded[f"{name}_code"], coded[f"{name}_scale"] = _encode_8bit(name, value, bits)
    return coded


def _encode_second_bf16(value: torch.Tensor, random: torch.Tensor) -> torch.Tensor:
    bits = _bits(value)
    upper = (bits + (random >> 16)) >> 16
    return _bfloat16(torch.where((upper == 0) & (value > 0), 1, upper), _is_nan(bits))


def _decode_8bit(name: str, codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    mantissa = _MANTISSA[name]
    signed, dropped = name == "exp_avg", 23 - mantissa
    stored = codes.to(torch.int64)
    code = stored & 0x7F if signed else stored
    base = _of_elements(scales.to(torch.int64) << 23, codes.numel())
    bits = (code << dropped) + base
    subnormal = _bits(_float(bits + _BINADE) - _float(base + _BINADE))
    magnitude = torch.where(code < (1 << mantissa), subnormal, bits)
    magnitude = torch.where(code == (16 << mantissa) - 1, _NAN, magnitude)
    return _float(magnitude | (stored & 0x80) << 24 if signed else magnitude)


def _encode_8bit(name: str, value: torch.Tensor, random: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    mantissa = _MANTISSA[name]
    signed, dropped = name == "exp_avg", 23 - mantissa
    bits = _bits(value)
    magnitude = bits & _MAGNITUDE
    finite = magnitude < _INFINITY
    padding = -value.numel() % GROUP
    groups = torch.nn.functional.pad(torch.where(finite, magnitude, 0), (0, padding)).view(-1, GROUP)
    largest = groups.amax(1) if groups.numel() else groups.new_zeros(0)
    scales = (((largest + (2 << dropped) - 1) >> 23) - 15).clamp(min=0)
    base = _of_elements(scales << 23, value.numel())
    smallest_normal = base + _BINADE
    subnormal = _bits(_float(magnitude) + _float(smallest_normal)) - smallest_normal
    position = torch.where(magnitude < smallest_normal, subnormal, magnitude - base)
    draw = random & ((1 << dropped) - 1) if signed else random >> (32 - dropped)
    code = (position + draw) >> dropped
    code = code | (bits >> 24 & 0x80) if signed else torch.where((code == 0) & (magnitude != 0), 1, code)
    return torch.where(finite, code, (16 << mantissa) - 1).to(torch.uint8), scales.to(torch.uint8)


def _of_elements(of_groups: torch.Tensor, numel: int) -> torch.Tensor:
    return of_groups.repeat_interleave(GROUP)[:numel]
