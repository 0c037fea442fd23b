"""The flight recorder's picture. Needs matplotlib: `pip install fused_sched[plot]`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MOST_LABELS = 10  # groups in a legend


def history(recorded: npt.NDArray[np.void], figure: Figure | None = None) -> Figure:
    """Draw what `opt.history()` returned: rates over updates, below them the gradients' norm, across both the skips.

    recorded: the array. figure: an empty one to draw on, by default a new one of pyplot's.
    The norm has axes if a step computed it; steps that were clipped are dots on its line. A skipped step is a vertical
    line after the update before it.
    Returns the figure. Raises ImportError without matplotlib, TypeError for what is no history, ValueError for an
    empty one.

    >>> import matplotlib; matplotlib.use("Agg")
    >>> import torch
    >>> from fused_sched import FusedScheduledAdam
    >>> p = torch.zeros(2, requires_grad=True)
    >>> opt = FusedScheduledAdam([p], lr=linear(1.0, 0.0, 100), max_grad_norm=1.0)
    >>> for scale in (0.5, 1.0, 2.0):
    ...     p.grad = torch.tensor([0.0, scale])
    ...     opt.step()
    >>> [axes.get_ylabel() for axes in history(opt.history()).axes]
    ['learning rate', 'gradient norm']
    """
    names = getattr(getattr(recorded, "dtype", None), "names", None) or ()
    if not {"clock", "lr", "grad_norm", "clip", "skipped"} <= set(names):
        raise TypeError(f"history: what opt.history() returns is drawn, got {recorded!r}; pass that array")
    if len(recorded) == 0:
        raise ValueError("history: at least one step is needed, got none; draw it after a call of opt.step()")
    if figure is None:
        figure = _new_figure()
    has_norm = not np.isnan(recorded["grad_norm"]).all()
    rows = figure.subplots(1 + has_norm, 1, sharex=True, squeeze=False)[:, 0]
    _draw_rates(rows[0], recorded)
    if has_norm:
        _draw_norm(rows[1], recorded)
    for axes in rows:
        _draw_skips(axes, recorded)
        axes.grid(alpha=0.3)
    _label_skips(rows[0], recorded)
    rows[-1].set_xlabel("update")
    return figure


def _new_figure() -> Figure:
    try:
        from matplotlib import pyplot
    except ImportError as error:
        raise ImportError("plotting needs matplotlib; pip install 'fused_sched[plot]'") from error
    return pyplot.figure(figsize=(7.0, 4.5), layout="constrained")


def _applied(recorded: npt.NDArray[np.void]) -> npt.NDArray[np.void]:
    applied: npt.NDArray[np.void] = recorded[~recorded["skipped"]]
    return applied


def _draw_rates(axes: Axes, recorded: npt.NDArray[np.void]) -> None:
    applied = _applied(recorded)
    num_groups = recorded["lr"].shape[1]
    for group in range(num_groups):
        label = f"group {group}" if 1 < num_groups <= _MOST_LABELS else None
        axes.plot(applied["clock"], applied["lr"][:, group], label=label)
    axes.set_ylabel("learning rate")


def _draw_norm(axes: Axes, recorded: npt.NDArray[np.void]) -> None:
    applied = _applied(recorded)
    shown = applied[np.isfinite(applied["grad_norm"])]
    axes.plot(shown["clock"], shown["grad_norm"], linewidth=0.8, color="tab:gray")
    clipped = shown[shown["clip"] < 1.0]
    if len(clipped):
        share = len(clipped) / len(applied)
        axes.plot(clipped["clock"], clipped["grad_norm"], ".", markersize=3, label=f"clipped: {share:.0%} of updates")
        axes.legend(fontsize="small", loc="best")
    if (shown["grad_norm"] > 0.0).any():
        axes.set_yscale("log")
    axes.set_ylabel("gradient norm")


def _skips(recorded: npt.NDArray[np.void]) -> npt.NDArray[Any]:
    """Where on the axis of updates: half an update after the one before."""
    places: npt.NDArray[Any] = recorded["clock"][recorded["skipped"]] + 0.5
    return places


def _draw_skips(axes: Axes, recorded: npt.NDArray[np.void]) -> None:
    for place in np.unique(_skips(recorded)):
        axes.axvline(place, color="tab:red", linewidth=0.8, alpha=0.7)


def _label_skips(axes: Axes, recorded: npt.NDArray[np.void]) -> None:
    count = len(_skips(recorded))
    if count:
        axes.plot([], [], color="tab:red", label=f"{count} skipped" if count > 1 else "skipped")
    if axes.get_legend_handles_labels()[1]:
        axes.legend(fontsize="small", loc="best")
