"""Adam with its learning-rate schedule on the device: fused, capturable, in mixed precision."""

from . import deepspeed, ops, schedules
from ._warnings import ScheduleWarning
from .casting import cast_to_bf16
from .optimizer import FusedScheduledAdam

__version__ = "0.1.0.dev0"

__all__ = ["FusedScheduledAdam", "ScheduleWarning", "cast_to_bf16", "deepspeed", "ops", "schedules"]
