"""Small pictures of schedules, written as SVG by hand: a few kB, and the same bytes on every machine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from fused_sched import landmarks
from fused_sched.schedules import Schedule

WIDTH, RATE_HEIGHT, LOWER_HEIGHT = 240, 84, 40
_LEFT, _RIGHT, _TOP, _BOTTOM = 8, 8, 14, 14  # room around a curve; its labels are in it
_MOST_MARKS = 24  # as fused_sched.plot draws
_TOLERANCE = 0.15  # of a pixel, by which a drawn line may miss a value

# Colours that can be read on white and on black: GitHub shows pages on either.
_RATE, _LOWER, _TEXT, _AXIS, _MARK = "#2f81d7", "#d9822b", "#7d8590", "#9aa4af", "#b0b8c1"

Points = list[tuple[float, float]]


@dataclass(frozen=True)
class Curve:
    """Values of consecutive updates, and the updates at which phases begin."""

    name: str
    values: Sequence[float]
    starts: Sequence[int] = ()


def curves(schedule: Schedule, num_steps: int) -> list[Curve]:
    """A rate, and below it what goes with it."""
    rate = Curve("", schedule(range(num_steps)).tolist(), _phase_starts(schedule, num_steps))
    return [rate] + [Curve(name, s(range(num_steps)).tolist()) for name, s in schedule.companions.items()]


def picture(drawn: Sequence[Curve], alt: str) -> str:
    """One file: the first curve, and smaller ones below."""
    return _file(WIDTH, _height(drawn), alt, _panel(drawn))


def gallery(panels: dict[str, Sequence[Curve]], columns: int, alt: str) -> str:
    """One file: panels with titles, row by row."""
    titles = list(panels)
    parts, y = [], 0
    for first in range(0, len(titles), columns):
        row = titles[first : first + columns]
        for column, title in enumerate(row):
            x = column * WIDTH
            parts.append(f'<g transform="translate({x},{y})">')
            parts.append(f'<text x="{_LEFT}" y="11" font-size="11" fill="{_RATE}">{escape(title)}</text>')
            parts.append(f'<g transform="translate(0,13)">\n{_panel(panels[title])}\n</g></g>')
        y += 17 + max(_height(panels[title]) for title in row)
    return _file(columns * WIDTH, y, alt, "\n".join(parts))


def _phase_starts(schedule: Schedule, num_steps: int) -> list[int]:
    starts = landmarks.phase_starts(schedule.tree, num_steps, most_cycles=_MOST_MARKS)
    return starts if len(starts) <= _MOST_MARKS else []


def _file(width: int, height: int, alt: str, body: str) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}" '
        f'font-family="sans-serif" font-size="9" fill="none">\n<title>{escape(alt)}</title>\n{body}\n</svg>\n'
    )


def _height(drawn: Sequence[Curve]) -> int:
    return RATE_HEIGHT + LOWER_HEIGHT * (len(drawn) - 1)


def _panel(drawn: Sequence[Curve]) -> str:
    rate, *others = drawn
    floor = RATE_HEIGHT - _BOTTOM
    low, high = min(0.0, *rate.values), max(0.0, *rate.values)
    last = len(rate.values) - 1
    height = _height(drawn)
    parts = [_line(_x(start, last), _TOP, _x(start, last), floor, _MARK, "2 2") for start in rate.starts]
    zero = _y(0.0, low, high, _TOP, floor)
    parts += [_line(_LEFT, zero, WIDTH - _RIGHT, zero, _AXIS), _curve(rate, low, high, _TOP, floor, _RATE)]
    parts += [_text(_LEFT, _TOP - 4, f"{high:.4g}"), _text(WIDTH - _RIGHT, height - 3, f"update {last}", "end")]
    for row, other in enumerate(others):
        top = RATE_HEIGHT - _BOTTOM + 14 + row * LOWER_HEIGHT
        least, most = min(other.values), max(other.values)
        span = f"{least:.4g}" if least == most else f"{least:.4g} to {most:.4g}"
        parts.append(_curve(other, least, most, top, top + LOWER_HEIGHT - 16, _LOWER))
        parts.append(_text(_LEFT, top - 4, f"{other.name}: {span}"))
    return "\n".join(parts)


def _curve(curve: Curve, low: float, high: float, top: float, floor: float, color: str) -> str:
    last = len(curve.values) - 1
    points = [(_x(t, last), _y(value, low, high, top, floor)) for t, value in enumerate(curve.values)]
    path = " ".join(f"{_number(x)},{_number(y)}" for x, y in _simplified(points))
    return f'<polyline points="{path}" stroke="{color}" stroke-width="1.6" stroke-linejoin="round"/>'


def _x(step: float, last: int) -> float:
    return _LEFT + (WIDTH - _LEFT - _RIGHT) * step / max(last, 1)


def _y(value: float, low: float, high: float, top: float, floor: float) -> float:
    return (top + floor) / 2 if low == high else floor - (floor - top) * (value - low) / (high - low)


def _simplified(points: Points) -> Points:
    """Ramer, Douglas and Peucker: without the points that a straight line passes close enough by."""
    kept = {0, len(points) - 1}
    spans = [(0, len(points) - 1)]
    while spans:
        first, last = spans.pop()
        (x0, y0), (x1, y1) = points[first], points[last]
        # Vertical distances: a schedule has one value per step.
        misses = [
            (abs(y - y0 - (y1 - y0) * (x - x0) / (x1 - x0)), i)
            for i, (x, y) in enumerate(points[first + 1 : last], first + 1)
        ]
        worst, i = max(misses, default=(0.0, 0))
        if worst > _TOLERANCE:
            kept.add(i)
            spans += [(first, i), (i, last)]
    return [points[i] for i in sorted(kept)]


def _line(x0: float, y0: float, x1: float, y1: float, color: str, dashes: str = "") -> str:
    dashed = f' stroke-dasharray="{dashes}"' if dashes else ""
    ends = f'x1="{_number(x0)}" y1="{_number(y0)}" x2="{_number(x1)}" y2="{_number(y1)}"'
    return f'<line {ends} stroke="{color}"{dashed}/>'


def _text(x: float, y: float, text: str, anchor: str = "start") -> str:
    return f'<text x="{_number(x)}" y="{_number(y)}" fill="{_TEXT}" text-anchor="{anchor}">{escape(text)}</text>'


def _number(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")
