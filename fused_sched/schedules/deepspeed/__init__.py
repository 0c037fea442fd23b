"""Schedules of DeepSpeed under their own names.

The index is that of the update: DeepSpeed's warm-ups write the rate of update 0 when they are constructed and count
from the update after, so that their lowest rate is used twice and the W-th step of the warm-up is taken by update W.

`last_batch_iteration`, with which DeepSpeed resumes, is not an argument: a checkpoint of the optimizer has its clock,
`opt.set_clock(n)` sets it, and `schedule.shifted(-n)` is the schedule from update n on.
"""

from .common import DeepSpeedSchedule
from .cycle import LRRangeTest, OneCycle
from .warmup import WarmupCosineLR, WarmupDecayLR, WarmupLR

__all__ = ["DeepSpeedSchedule", "LRRangeTest", "OneCycle", "WarmupCosineLR", "WarmupDecayLR", "WarmupLR"]
