"""Pictures of schedules. Needs matplotlib: `pip install fused_sched[plot]`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from .schedules import Schedule

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_ENDLESS_STEPS = 1000  # shown of a schedule that has no end
_MOST_POINTS = 4000  # more than a picture has columns


def plot_schedules(
    *schedules: Schedule,
    num_steps: int | None = None,
    ax: Axes | None = None,
    labels: Sequence[str] | None = None,
) -> Axes:
    """Draw schedules over the updates they are used by.

    schedules: at least one. num_steps: updates to show; by default a tenth more than the longest schedule
    has, or 1000 where none has an end. ax: axes to draw on, by default new ones. labels: one per schedule,
    by default their reprs.
    Returns the axes. Raises ImportError without matplotlib, ValueError for a wrong number of labels.
    """
    if not schedules:
        raise ValueError("plot_schedules: at least one schedule is needed, got none")
    if labels is not None and len(labels) != len(schedules):
        raise ValueError(f"plot_schedules: one label per schedule is needed, got {len(labels)} for {len(schedules)}")
    if num_steps is not None and num_steps < 1:
        raise ValueError(f"plot_schedules: num_steps must be at least 1, got {num_steps}")
    if ax is None:
        ax = _new_axes()
    steps = _steps_to_show(schedules, num_steps)
    for schedule, label in zip(schedules, labels or map(_short, schedules), strict=True):
        ax.plot(steps, schedule(steps), label=label)
    ax.set_xlabel("update")
    ax.set_ylabel("value")
    ax.grid(alpha=0.3)
    ax.legend(fontsize="small")
    return ax


def _new_axes() -> Axes:
    try:
        from matplotlib import pyplot
    except ImportError as error:
        raise ImportError("plotting needs matplotlib; pip install 'fused_sched[plot]'") from error
    return pyplot.subplots(figsize=(7.0, 3.5), layout="constrained")[1]


def _steps_to_show(schedules: Sequence[Schedule], num_steps: int | None) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    if num_steps is None:
        ends = [end for end in (s.held_from() for s in schedules) if end]
        num_steps = round(max(ends) * 1.1) + 1 if ends else _ENDLESS_STEPS
    return np.unique(np.linspace(0, num_steps - 1, min(num_steps, _MOST_POINTS)).astype(np.int64))


def _short(schedule: Schedule) -> str:
    text = repr(schedule)
    return text if len(text) <= 80 else f"{text[:77]}..."
