"""Schedules: words that become programs evaluated on the device.

    schedule(step) -> float     step: 0-based index of the update that uses the value

Curves, combinators and recipes nest freely, hold their last value beyond their end, and are checked when
constructed. The modules named after libraries have those libraries' own schedules, value for value. Importing this
package needs NumPy only.
"""

from . import deepspeed, megatron, optax, timm, torch, transformers
from .base import Schedule
from .combinators import join
from .curves import (
    constant,
    cosine,
    exponential,
    from_callable,
    inverse_sqrt,
    linear,
    polynomial,
    step_decay,
    table,
)
from .recipes import one_cycle, warmup_cosine, warmup_linear, warmup_stable_decay

__all__ = [
    "Schedule",
    "constant",
    "cosine",
    "deepspeed",
    "exponential",
    "from_callable",
    "inverse_sqrt",
    "join",
    "linear",
    "megatron",
    "one_cycle",
    "optax",
    "polynomial",
    "step_decay",
    "table",
    "timm",
    "torch",
    "transformers",
    "warmup_cosine",
    "warmup_linear",
    "warmup_stable_decay",
]
