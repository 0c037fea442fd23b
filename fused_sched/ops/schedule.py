"""Schedules evaluated on a device by themselves."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from ..schedules import Schedule
from .call import GroupSettings, compiled, group_record, run


def evaluate(
    schedule: Schedule, steps: npt.ArrayLike, device: torch.device | str = "cpu", *, backend: str = "auto"
) -> torch.Tensor:
    """A schedule's values at 0-based updates, computed on a device by the code that a step runs there.

    Args:
        schedule: what to evaluate; `schedule(steps)` is the same on the host.
        steps: an integer or an array of them, not negative.
        device: where; on a GPU every value is a launch.
        backend: "auto", "cpu" or "cuda".

    Returns float64 on the device, of the shape of `steps`. Raises ValueError for negative steps, or for a schedule
    without a program: one that follows metrics.

    Example:
        >>> from fused_sched import ops, schedules
        >>> ops.evaluate(schedules.linear(1.0, 0.0, 4), [0, 1, 2]).tolist()
        [1.0, 0.75, 0.5]
    """
    times = np.asarray(steps)
    if times.size and (times.dtype.kind not in "iu" or times.min() < 0):
        raise ValueError(f"steps must be integers and not negative, got {steps!r}; updates are numbered from 0")
    place = torch.device(device)
    if place.type == "cuda" and place.index is None:
        place = torch.device("cuda", torch.cuda.current_device())
    module = compiled(place, backend).module
    assert module is not None
    settings = GroupSettings(schedule, 0.0, 0.0, 0.0, 0.0, 1.0, True, False)
    record = group_record(module, settings, place)
    clock = torch.zeros(2, dtype=torch.int64, device=place)
    values = torch.zeros(1, 4, dtype=torch.float64, device=place)
    found = torch.empty(times.size, dtype=torch.float64, device=place)
    call = module.Call()
    call.device = place.index or 0
    call.clock, call.values = clock.data_ptr(), values.data_ptr()
    call.groups, call.num_groups = record[0].data_ptr(), 1
    call.tick = 1
    for i, step in enumerate(times.reshape(-1).tolist()):
        clock[0].fill_(step)
        run(module.clock, call, place)
        found[i].copy_(values[0, 0])
    return found.reshape(times.shape)
