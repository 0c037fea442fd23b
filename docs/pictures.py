"""Small pictures of schedules, drawn by matplotlib.

Other versions of it write other bytes, so that a picture carries a digest of what it shows: a stale one has another.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fused_sched.plot import marked_phases
from fused_sched.schedules import Schedule

WIDTH, RATE_HEIGHT, LOWER_HEIGHT, TITLE_HEIGHT = 2.5, 0.9, 0.45, 0.15  # inches of 96 pixels on a page

# Colours that can be read on white and on black: GitHub shows pages on either.
_RATE, _LOWER, _TEXT, _AXIS, _MARK = "#2f81d7", "#d9822b", "#7d8590", "#9aa4af", "#b0b8c1"

_STYLE = {"svg.hashsalt": "fused_sched", "svg.fonttype": "none", "font.size": 7.0, "text.color": _TEXT}


@dataclass(frozen=True)
class Curve:
    """Values of consecutive updates, and the updates at which phases begin."""

    name: str
    values: Sequence[float]
    starts: Sequence[int] = ()


def curves(schedule: Schedule, num_steps: int) -> list[Curve]:
    """A rate, and below it what goes with it."""
    rate = Curve("", schedule(range(num_steps)).tolist(), marked_phases(schedule, num_steps))
    return [rate] + [Curve(name, s(range(num_steps)).tolist()) for name, s in schedule.companions.items()]


@dataclass(frozen=True)
class Picture:
    """One file: panels by their titles, row by row, each a curve and smaller ones below."""

    alt: str
    panels: dict[str, Sequence[Curve]]
    columns: int = 1

    @property
    def digest(self) -> str:
        """Of what it shows, to six digits."""
        shown = [
            (title, curve.name, [f"{value:.5e}" for value in curve.values], list(curve.starts))
            for title, drawn in self.panels.items()
            for curve in drawn
        ]
        return hashlib.sha256(repr((self.alt, shown)).encode()).hexdigest()[:16]

    def save(self, path: Path) -> None:
        titles = list(self.panels)
        rows = [titles[first : first + self.columns] for first in range(0, len(titles), self.columns)]
        heights = [max(map(self._height, row)) for row in rows]
        with mpl.rc_context(_STYLE):
            figure = Figure(figsize=(self.columns * WIDTH, sum(heights)), layout="constrained")
            figure.patch.set_visible(False)
            cells: Any = figure.subfigures(len(rows), self.columns, squeeze=False, height_ratios=heights)
            for row, beside, height in zip(rows, cells, heights, strict=True):
                for title, cell in zip(row, beside, strict=False):
                    _draw(cell, title, self.panels[title], height - self._height(title))
            about = {"Title": self.alt, "Description": self.digest, "Date": None, "Creator": None}
            figure.savefig(path, metadata=about)

    def _height(self, title: str) -> float:
        return RATE_HEIGHT + LOWER_HEIGHT * (len(self.panels[title]) - 1) + (TITLE_HEIGHT if title else 0.0)


def _draw(cell: Any, title: str, drawn: Sequence[Curve], spare: float) -> None:
    """spare: height, in inches, that others in the row need and this panel does not."""
    cell.patch.set_visible(False)
    if title:
        cell.suptitle(title, color=_RATE, fontsize=8.0)
    rows = len(drawn) + bool(spare)
    heights = [RATE_HEIGHT, *[LOWER_HEIGHT] * (len(drawn) - 1), *([spare] if spare else [])]
    axes = cell.subplots(rows, 1, sharex=True, squeeze=False, gridspec_kw={"height_ratios": heights})[:, 0]
    for ax in axes:
        ax.set_axis_off()
    rate = drawn[0]
    _label(axes[0], f"{max(0.0, *rate.values):.4g}")
    axes[0].axhline(0.0, color=_AXIS, linewidth=0.8)
    axes[0].vlines(rate.starts, 0.0, 1.0, _MARK, ":", linewidth=0.9, transform=axes[0].get_xaxis_transform())
    for ax, curve, color in zip(axes, drawn, [_RATE, *[_LOWER] * len(drawn)], strict=False):
        ax.plot(curve.values, color=color, linewidth=1.4)
    for ax, curve in zip(axes[1:], drawn[1:], strict=False):
        least, most = min(curve.values), max(curve.values)
        _label(ax, f"{curve.name}: " + (f"{least:.4g}" if least == most else f"{least:.4g} to {most:.4g}"))
    end = f"update {len(rate.values) - 1}"
    axes[len(drawn) - 1].text(1.0, -0.02, end, ha="right", va="top", transform=axes[len(drawn) - 1].transAxes)


def _label(ax: Axes, text: str) -> None:
    ax.set_title(text, loc="left", fontsize=7.0, color=_TEXT, pad=1.0)
