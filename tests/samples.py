"""Small optimizers whose rates can be read off their parameters."""

from __future__ import annotations

from typing import Any

import torch

from fused_sched import FusedScheduledAdam, schedules

SLOW, FAST = schedules.constant(0.1), schedules.constant(0.2)


def param(numel: int = 4) -> torch.Tensor:
    p = torch.ones(numel, requires_grad=True)
    p.grad = torch.ones(numel)
    return p


def two_groups(**options: Any) -> tuple[torch.Tensor, torch.Tensor, FusedScheduledAdam]:
    a, b = param(), param()
    return a, b, FusedScheduledAdam([{"params": [a], "lr": SLOW}, {"params": [b], "lr": FAST}], **options)


def moved(p: torch.Tensor) -> float:
    """How far the first update of a unit gradient moved a parameter: its learning rate."""
    return round(1.0 - p[0].item(), 6)
