"""Adam with its learning-rate schedule on the device: fused, capturable, in mixed precision."""

from . import deepspeed, schedules
from ._warnings import ScheduleWarning
from .optimizer import FusedScheduledAdam

__version__ = "0.1.0.dev0"

__all__ = ["FusedScheduledAdam", "ScheduleWarning", "deepspeed", "schedules"]
