"""What the profiler has seen on a GPU."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch


def kernels(events: Iterable[Any]) -> list[str]:
    """Names of kernels, copies and fills. Labels of the host (`Optimizer.step#AdamW.step`) are there too: no work."""
    on_gpu = torch.autograd.DeviceType.CUDA
    return [event.name for event in events if event.device_type == on_gpu and not event.is_user_annotation]
