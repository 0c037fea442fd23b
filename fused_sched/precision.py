"""Names of storage formats: which exist, which combinations go together, what a parameter gets by default.

The tags that the kernels and checkpoints know live in `csrc/core/codec.h`, what each format stores in `codec.py`;
this module holds names and rules.
"""

from __future__ import annotations

import torch

from . import codec

#: torch dtype -> name of its element format in `csrc/core/codec.h`.
FORMATS: dict[torch.dtype, str] = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float64: "fp64",
}

#: Masters that parameters of a 16-bit dtype may have, the one that "auto" means first.
_MASTERS_OF = {
    torch.bfloat16: ("split16", "split8", "fp32", "stochastic", "none"),
    torch.float16: ("fp32", "none"),
}


def check_names(master: object, moments: object, amsgrad: object = False) -> None:
    """Raise ValueError unless both are names of formats, and go with the group's amsgrad."""
    _check_name("master", master, ("auto", *codec.MASTERS))
    _check_name("moments", moments, tuple(codec.MOMENTS))
    if amsgrad and moments != "fp32":
        raise ValueError(
            f"amsgrad=True needs moments='fp32', got {moments!r}: it keeps a largest second moment, which no format "
            "compresses; use amsgrad=False or moments='fp32'"
        )


def _check_name(what: str, got: object, known: tuple[str, ...]) -> None:
    if got not in known:
        choices = ", ".join(map(repr, known))
        raise ValueError(f"{what} must be one of {choices}, got {got!r}; choose one of them")


def resolve_master(master: str, dtype: torch.dtype) -> str:
    """The master a parameter of this dtype really gets: only 16-bit parameters need one.

    Raises ValueError for a master that the dtype cannot have.
    """
    choices = _MASTERS_OF.get(dtype)
    if choices is None:
        return "none"
    if master == "auto":
        return choices[0]
    if master not in choices:
        raise ValueError(
            f"{dtype} parameters can have master {' or '.join(map(repr, choices))}, got {master!r}, which completes or "
            "rounds bfloat16 bits; use 'fp32', or bfloat16 parameters"
        )
    return master


def resolve_moments(moments: str, dtype: torch.dtype) -> str:
    """The format a parameter's moments really have: those of float64 parameters are float64."""
    return "fp32" if dtype == torch.float64 else moments


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """What a parameter's update is computed in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def streams(dtype: torch.dtype, master: str, moments: str, amsgrad: bool) -> tuple[codec.Stream, ...]:
    """The tensors of state of a parameter with these (resolved) formats."""
    largest = (codec.Stream("max_exp_avg_sq", "max_exp_avg_sq", torch.float32),) if amsgrad else ()
    found = (*codec.MOMENTS[moments], *largest, *codec.MASTERS[master])
    if dtype == torch.float64:
        found = tuple(stream._replace(dtype=torch.float64) for stream in found)
    return found
