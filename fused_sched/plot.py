"""Pictures of schedules. Needs matplotlib: `pip install fused_sched[plot]`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from . import landmarks
from .schedules import Schedule, checks

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.typing import ColorType

_ENDLESS_STEPS = 1000  # shown of a schedule that has no end
_MOST_POINTS = 3900  # more than a picture has columns; the starts of phases come on top
_MOST_MARKS = 24  # of one schedule: beyond, lines hide the curve and say nothing it does not

# Other hyperparameters that a rate may bring along (`Schedule.companions`): the axes that each is drawn on, and how.
_LOWER_AXES = {"beta1": "momentum", "beta2": "momentum", "weight_decay": "weight decay"}
_LINE_STYLES = {"beta2": "--"}


def plot_schedules(
    *schedules: Schedule,
    num_steps: int | None = None,
    ax: Axes | None = None,
    labels: Sequence[str] | None = None,
) -> Axes:
    """Draw schedules over the updates they are used by: point t is `schedule(t)`, the value of update t.

    Thin dotted lines mark where a phase gives way to the next; not where there are dozens of them.

    schedules: at least one. num_steps: updates to show, at least 1; by default a tenth more than the longest
        schedule has, or 1000 where none has an end.
    ax: axes to draw on. By default new ones, and below them, if any schedule has `companions`, smaller ones for the
        momentum (beta1 solid, beta2 dashed) and the weight decay that go with it.
    labels: one per schedule, by default their reprs.
    Returns the axes of the schedules; those below are the others of `ax.figure.axes`.
    Raises ImportError without matplotlib; ValueError for a wrong number of labels or of steps; TypeError for what is
    not a Schedule, or has no values before metrics are known.

    >>> import matplotlib; matplotlib.use("Agg")
    >>> ax = plot_schedules(warmup_linear(1.0, warmup_steps=10, total_steps=100), linear(1.0, 0.0, 100))
    >>> [len(line.get_xdata()) for line in ax.lines]
    [111, 111]
    """
    count = _checked_length(schedules, num_steps)
    names = _checked_labels(schedules, labels)
    if ax is None:
        return _draw(_new_figure(), schedules, count, names)
    _draw_rates(ax, schedules, count, names)
    ax.set_xlabel("update")
    return ax


def draw_schedules(
    figure: Figure, *schedules: Schedule, num_steps: int | None = None, labels: Sequence[str] | None = None
) -> Axes:
    """`plot_schedules` on an empty figure, which need not be pyplot's."""
    return _draw(figure, schedules, _checked_length(schedules, num_steps), _checked_labels(schedules, labels))


def _checked_length(schedules: Sequence[Schedule], num_steps: int | None) -> int:
    """Number of updates to show."""
    if not schedules:
        raise ValueError("plot_schedules: at least one schedule is needed, got none; pass it as the first argument")
    for schedule in schedules:
        if not isinstance(schedule, Schedule):
            raise TypeError(
                f"plot_schedules: only a Schedule can be drawn, got {schedule!r}; use constant(value) for a number, "
                "from_callable(function, num_steps) for a function"
            )
        _ = schedule.tree  # what metrics drive has none, and says what to draw instead
    if num_steps is not None:
        return checks.step_count("plot_schedules", "num_steps", num_steps, remedy="leave it out to show all phases")
    ends = [end for end in (s.held_from() for s in schedules) if end]
    return round(max(ends) * 1.1) + 1 if ends else _ENDLESS_STEPS


def _checked_labels(schedules: Sequence[Schedule], labels: Sequence[str] | None) -> Sequence[str]:
    if labels is None:
        return [_short(schedule) for schedule in schedules]
    if len(labels) != len(schedules):
        raise ValueError(
            f"plot_schedules: one label per schedule is needed, got {len(labels)} for {len(schedules)}; "
            "leave labels out for their reprs"
        )
    return labels


def _short(schedule: Schedule) -> str:
    text = repr(schedule)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _new_figure() -> Figure:
    try:
        from matplotlib import pyplot
    except ImportError as error:
        raise ImportError("plotting needs matplotlib; pip install 'fused_sched[plot]'") from error
    return pyplot.figure(layout="constrained")


def _draw(figure: Figure, schedules: Sequence[Schedule], num_steps: int, labels: Sequence[str]) -> Axes:
    companions = [schedule.companions for schedule in schedules]
    titles = list(dict.fromkeys(_LOWER_AXES[name] for others in companions for name in others))
    figure.set_size_inches(7.0, 3.5 + 1.3 * len(titles))
    heights = {"height_ratios": [3.0] + [1.0] * len(titles)}
    top, *below = figure.subplots(1 + len(titles), 1, sharex=True, squeeze=False, gridspec_kw=heights)[:, 0]
    _draw_rates(top, schedules, num_steps, labels)
    for ax, title in zip(below, titles, strict=True):
        _draw_companions(ax, title, schedules, companions, num_steps)
    if below:
        top.set_ylabel("learning rate")
    top.legend(fontsize="small", loc="lower left", bbox_to_anchor=(0.0, 1.0), frameon=False)  # over no curve
    figure.axes[-1].set_xlabel("update")
    return figure.axes[0]


def _draw_rates(ax: Axes, schedules: Sequence[Schedule], num_steps: int, labels: Sequence[str]) -> None:
    for schedule, label in zip(schedules, labels, strict=True):
        starts = marked_phases(schedule, num_steps)
        steps = _steps_to_show(starts, num_steps)
        (line,) = ax.plot(steps, schedule(steps), label=label)
        _mark_phases(ax, starts, line.get_color())
    ax.set_ylabel("value")
    ax.grid(alpha=0.3)
    ax.legend(fontsize="small")


def _draw_companions(
    ax: Axes, title: str, schedules: Sequence[Schedule], companions: Sequence[Mapping[str, Schedule]], num_steps: int
) -> None:
    """Each in the colour of the rate that it goes with."""
    named: set[str] = set()
    for index, (schedule, others) in enumerate(zip(schedules, companions, strict=True)):
        here = [name for name in others if _LOWER_AXES[name] == title]
        for name in here:
            starts = marked_phases(others[name], num_steps)
            steps = _steps_to_show(starts, num_steps)
            label = f"_{name}" if name in named else name  # matplotlib's legend leaves out what begins with _
            ax.plot(steps, others[name](steps), _LINE_STYLES.get(name, "-"), color=f"C{index}", label=label)
            named.add(name)
        if here:
            _mark_phases(ax, marked_phases(schedule, num_steps), f"C{index}")
    ax.set_ylabel(title)
    ax.grid(alpha=0.3)
    if named != {"weight_decay"}:
        ax.legend(fontsize="small", loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)  # over no curve


def marked_phases(schedule: Schedule, num_steps: int) -> list[int]:
    """Updates at which phases begin; none where there are too many to be marked."""
    starts = landmarks.phase_starts(schedule.tree, num_steps, most_cycles=_MOST_MARKS)
    return starts if len(starts) <= _MOST_MARKS else []


def _mark_phases(ax: Axes, starts: Sequence[int], color: ColorType) -> None:
    ax.vlines(starts, 0.0, 1.0, colors=color, linestyles=":", linewidth=0.9, transform=ax.get_xaxis_transform())


def _steps_to_show(starts: Sequence[int], num_steps: int) -> npt.NDArray[np.int64]:
    """So many that a picture shows every column, and both sides of every jump between phases."""
    spread = np.linspace(0, num_steps - 1, min(num_steps, _MOST_POINTS)).astype(np.int64)
    sides = [step for start in starts for step in (start - 1, start)]
    return np.unique(np.concatenate([spread, np.array(sides, dtype=np.int64)]))
