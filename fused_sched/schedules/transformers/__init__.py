"""Schedules of Hugging Face transformers under their own names.

Every factory of transformers.optimization, without `optimizer` and `last_epoch`. The group's rate is `base_lr`; where
the library also reads `optimizer.defaults["lr"]`, that is `default_lr` (by default base_lr). There is no
get_adafactor_schedule: it displays the rates that Adafactor computes for itself.
"""

from ..metric import GreedyLR, get_greedy_schedule, get_reduce_on_plateau_schedule
from .base import TransformersSchedule
from .cosines import (
    get_cosine_schedule_with_warmup,
    get_cosine_with_hard_restarts_schedule_with_warmup,
    get_cosine_with_min_lr_schedule_with_warmup,
    get_cosine_with_min_lr_schedule_with_warmup_lr_rate,
)
from .decays import (
    get_constant_schedule,
    get_constant_schedule_with_warmup,
    get_inverse_sqrt_schedule,
    get_linear_schedule_with_warmup,
    get_polynomial_decay_schedule_with_warmup,
)
from .dispatch import get_scheduler
from .stable import get_wsd_schedule

__all__ = [
    "GreedyLR",
    "TransformersSchedule",
    "get_constant_schedule",
    "get_constant_schedule_with_warmup",
    "get_cosine_schedule_with_warmup",
    "get_cosine_with_hard_restarts_schedule_with_warmup",
    "get_cosine_with_min_lr_schedule_with_warmup",
    "get_cosine_with_min_lr_schedule_with_warmup_lr_rate",
    "get_greedy_schedule",
    "get_inverse_sqrt_schedule",
    "get_linear_schedule_with_warmup",
    "get_polynomial_decay_schedule_with_warmup",
    "get_reduce_on_plateau_schedule",
    "get_scheduler",
    "get_wsd_schedule",
]
