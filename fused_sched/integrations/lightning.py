"""Lightning: a monitor that shows the rate that was used."""

from __future__ import annotations

from typing import Any

from lightning.pytorch.callbacks import LearningRateMonitor

from . import unwrapped


class FusedLearningRateMonitor(LearningRateMonitor):  # type: ignore[misc]  # Any, where Lightning is not installed
    """LearningRateMonitor with the rate of the latest update.

    Lightning's own shows `group["lr"]`, the number that a schedule's values are relative to. Other optimizers are
    shown as Lightning shows them.

    >>> from fused_sched.integrations.lightning import FusedLearningRateMonitor
    >>> monitor = FusedLearningRateMonitor(logging_interval="step")

    Source: lightning 2.6.6, pytorch/callbacks/lr_monitor.py, _get_optimizer_stats.
    """

    def _get_optimizer_stats(self, optimizer: Any, names: list[str]) -> dict[str, float]:
        stats: dict[str, float] = super()._get_optimizer_stats(optimizer, names)
        ours = unwrapped(optimizer)
        if ours is not None:
            for name, rate in zip(names, ours.last_lr(), strict=False):  # names of groups that are shown
                stats[name] = self.lrs[name][-1] = rate
        return stats
