"""Schedules of timm under their own names: `f(t)` on timm's clock t.

    t < warmup_t        warmup_lr_init + t * (base_lr - warmup_lr_init) / warmup_t
    t >= warmup_t       the decay, whose clock is 0 at t = warmup_t with warmup_prefix, else at t = 0: then the rate
                        falls at the end of the warm-up to where the decay has come

With t_in_epochs=True, timm's default, the training loop steps once per epoch: t = floor(update / updates_per_epoch) and
lengths are epochs. With t_in_epochs=False t counts updates. Without warm-up t = 0 uses base_lr, which the constructor
leaves in the optimizer, also where f(0) is another.

Beside timm's arguments, in its order and with its defaults, all take keywords of their own:

    base_lr             the optimizer's rate, at least 0
    updates_per_epoch   updates between two calls of timm's `step`; needed with t_in_epochs=True, refused without

What the constructor of timm raises is raised (its assertions: AssertionError). Where timm's step raises later the rate
is held at its last value, and a ScheduleWarning says from when. ValueError for noise_range_t: random rates are no
formula (`from_callable`); the other noise_* and initialize then have no effect. Where a param group has an lr_scale,
give it `schedule.scaled(lr_scale)`. timm's PlateauLRScheduler is not here: it follows a metric.

>>> timm.StepLRScheduler(decay_t=2, decay_rate=0.5, base_lr=1.0, updates_per_epoch=10)([19, 20, 40]).tolist()
[1.0, 0.5, 0.25]

Source: timm 1.0.31, scheduler/.
"""

from .base import TimmSchedule
from .cycles import CosineLRScheduler, PolyLRScheduler, TanhLRScheduler
from .steps import MultiStepLRScheduler, StepLRScheduler
from .wsd import WSDLRScheduler

__all__ = [
    "CosineLRScheduler",
    "MultiStepLRScheduler",
    "PolyLRScheduler",
    "StepLRScheduler",
    "TanhLRScheduler",
    "TimmSchedule",
    "WSDLRScheduler",
]
