"""The handle that frameworks hold as "the learning-rate scheduler": it observes, never drives."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from torch.optim.lr_scheduler import LRScheduler

from .callers import frames

if TYPE_CHECKING:
    from .base import OptimizerBase
    from .groups import GroupRecord

SECOND_SCHEDULER = (
    "this optimizer computes its own schedule (lr is a fused_sched Schedule), so a second scheduler that writes "
    "group['lr'] would multiply two schedules. Hand `opt.scheduler()` to whatever wants a scheduler, or pass a "
    "plain number as lr and keep the other scheduler"
)

ENGINES_SCHEDULER = (
    "this optimizer computes its own schedule (lr is a fused_sched Schedule), and DeepSpeed drives group['lr'] by "
    'another one, {}, from its configuration\'s section "scheduler": the rate would be the product of both. Pass '
    "lr_scheduler=opt.scheduler() to deepspeed.initialize, which then ignores the section; or remove the section; or "
    "call fused_sched.deepspeed.initialize, which makes it the optimizer's schedule"
)


def refuse_second_scheduler(records: Iterable[GroupRecord]) -> None:
    """Raise if the marks that torch's schedulers leave in a group say that one drives a scheduled rate."""
    for record in records:
        initial_lr = record.group.get("initial_lr")
        if "lr" in record.schedules and initial_lr is not None and record.group["lr"] != initial_lr:
            raise RuntimeError(SECOND_SCHEDULER)


def refuse_engines_scheduler(optimizer: OptimizerBase) -> None:
    """Raise if the engine that is calling step() has a scheduler of its own over a scheduled rate.

    DeepSpeed's schedulers leave no mark in the groups; they only write group["lr"], and 0 before the first step.
    """
    if "deepspeed" not in sys.modules or not any("lr" in record.schedules for record in optimizer._records):
        return
    for frame in frames("deepspeed."):
        scheduler = getattr(frame.f_locals.get("self"), "lr_scheduler", None)
        drives = getattr(scheduler, "optimizer", None) is optimizer
        if drives and not isinstance(scheduler, ObservingScheduler):
            raise RuntimeError(ENGINES_SCHEDULER.format(type(scheduler).__name__))


class ObservingScheduler(LRScheduler):
    """An LRScheduler whose `step()` moves nothing: the clock lives in the optimizer.

    Made by `FusedScheduledAdam.scheduler()`. Frameworks call `step()` once per update, per micro-batch, per
    process or per epoch, each in its own way; none of that changes the rate.
    """

    optimizer: OptimizerBase

    def __init__(self, optimizer: OptimizerBase) -> None:
        # Not LRScheduler.__init__: it patches optimizer.step, adds "initial_lr" and writes group["lr"].
        self.optimizer = optimizer
        self._step_count = 1
        if "deepspeed" in sys.modules:
            from .deepspeed import register  # which needs the optimizer, which needs this module

            register(type(optimizer))

    @property
    def base_lrs(self) -> list[float]:  # type: ignore[override]
        return [float(group["lr"]) for group in self.optimizer.param_groups]

    @property
    def last_epoch(self) -> int:
        restored = self.optimizer._restored_clock()
        return self.optimizer._devices.peek_clock() if restored is None else restored

    @last_epoch.setter
    def last_epoch(self, value: int) -> None:
        """Composing schedulers count it down and up; the clock is not theirs."""

    @property
    def _last_lr(self) -> list[float]:  # type: ignore[override]
        return self.optimizer.last_lr()

    def step(self, epoch: Any = None, *args: Any, **kwargs: Any) -> None:
        """Does nothing. DeepSpeed may pass a batch size here; it is not a clock value."""

    def get_last_lr(self) -> list[float]:  # type: ignore[override]
        """The rate of the latest applied update, one per group, without waiting for the device."""
        return self.optimizer.last_lr()

    def get_lr(self) -> list[float]:  # type: ignore[override]
        return self.optimizer.last_lr()

    def state_dict(self) -> dict[str, Any]:
        """The clock, so that engines which save schedulers apart from optimizers lose nothing."""
        return {"clock": self.optimizer.clock}

    def load_state_dict(self, state_dict: dict[str, Any] | None) -> None:
        """Set the clock. DeepSpeed passes None for a checkpoint saved without a scheduler."""
        if state_dict and "clock" in state_dict:
            self.optimizer.set_clock(int(state_dict["clock"]))
