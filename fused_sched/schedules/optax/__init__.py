"""Schedules of optax under their own names, in double precision.

optax itself computes in float32 unless x64 is on and the count is an int64; these are the values of its formulas.
Below, t is the count: 0 for the first update.
"""

from .base import OptaxSchedule
from .joins import join_schedules, sgdr_schedule
from .onecycle import cosine_onecycle_schedule, linear_onecycle_schedule
from .piecewise import (
    piecewise_constant_schedule,
    piecewise_interpolate_schedule,
)
from .transitions import (
    constant_schedule,
    cosine_decay_schedule,
    exponential_decay,
    linear_schedule,
    polynomial_schedule,
)
from .warmups import warmup_constant_schedule, warmup_cosine_decay_schedule, warmup_exponential_decay_schedule

__all__ = [
    "OptaxSchedule",
    "constant_schedule",
    "cosine_decay_schedule",
    "cosine_onecycle_schedule",
    "exponential_decay",
    "join_schedules",
    "linear_onecycle_schedule",
    "linear_schedule",
    "piecewise_constant_schedule",
    "piecewise_interpolate_schedule",
    "polynomial_schedule",
    "sgdr_schedule",
    "warmup_constant_schedule",
    "warmup_cosine_decay_schedule",
    "warmup_exponential_decay_schedule",
]
