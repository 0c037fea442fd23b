"""Names of storage formats: which exist, which combinations go together, what a parameter gets by default.

The tags that the kernels and checkpoints know live in `csrc/core/codec.h`; this module holds names only.
"""

from __future__ import annotations

import torch

#: torch dtype -> name of its element format in `csrc/core/codec.h`.
FORMATS: dict[torch.dtype, str] = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float64: "fp64",
}

MASTERS = ("none", "fp32")
MOMENTS = ("fp32",)

#: Names of the contract that no kernel implements yet.
PLANNED_MASTERS = ("split16", "split8", "stochastic")
PLANNED_MOMENTS = ("bf16", "8bit")


def check_names(master: object, moments: object) -> None:
    """Raise unless both are names that this build implements."""
    _check_name("master", master, ("auto", *MASTERS), PLANNED_MASTERS)
    _check_name("moments", moments, MOMENTS, PLANNED_MOMENTS)


def _check_name(what: str, got: object, built: tuple[str, ...], planned: tuple[str, ...]) -> None:
    if got in built:
        return
    choices = ", ".join(repr(name) for name in built)
    if got in planned:
        raise NotImplementedError(f"{what}={got!r} is planned but not built yet; use one of {choices}")
    raise ValueError(f"{what} must be one of {choices}, got {got!r}; choose one of them")


def resolve_master(master: str, dtype: torch.dtype) -> str:
    """The master a parameter of this dtype really gets: only 16-bit parameters need one."""
    if dtype in (torch.float32, torch.float64):
        return "none"
    return "fp32" if master == "auto" else master


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """What a parameter's update is computed in, and its state kept in."""
    return torch.float64 if dtype == torch.float64 else torch.float32
