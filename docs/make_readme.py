"""Writes the tables of formats, of quality and of speed in README.md, and pictures of the latter two: `make docs`.

Bytes are those of the streams in `fused_sched/codec.py`; bounds and words stand here and are held against the code by
tests/test_formats.py; losses are what `benchmarks/quality.py --json docs/images/quality.json` has measured,
times what `python -m benchmarks` left in benchmarks/results/cpu.json, and on an older machine in cpu-zen4.json.
"""

from __future__ import annotations

import hashlib
import json
import re
import statistics
import sys
from pathlib import Path
from typing import Any, NamedTuple

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import report  # noqa: E402
from fused_sched import codec, precision  # noqa: E402

RESULTS, SPEED_PICTURE = ROOT / "benchmarks/results", ROOT / "docs/images/speed.svg"
README, QUALITY, PICTURE = ROOT / "README.md", ROOT / "docs/images/quality.json", ROOT / "docs/images/quality.svg"

#: Rows of the table of bytes: parameters' dtype, masters that need the same.
ROWS: list[tuple[torch.dtype, tuple[str, ...]]] = [
    (torch.float32, ("auto",)),
    (torch.bfloat16, ("split16",)),
    (torch.bfloat16, ("split8",)),
    (torch.bfloat16, ("fp32",)),
    (torch.bfloat16, ("stochastic", "none")),
    (torch.float16, ("fp32",)),
    (torch.float16, ("none",)),
    (torch.float64, ("auto",)),
]


class Bound(NamedTuple):
    """How far a rounding is from a value x of the normal range: 2^relative |x|, or 2^floor of the power of two that
    covers the largest of x's group, if that is more."""

    relative: int
    floor: int | None = None
    strict: bool = False  # never quite that: rounded stochastically


#: By the dtype of the parameter: of the exact value after an update, from the value computed. None: no error.
MASTERS: dict[str, dict[torch.dtype, Bound | None]] = {
    "split16": {torch.bfloat16: None},
    "split8": {torch.bfloat16: Bound(-16)},
    "fp32": {torch.bfloat16: None, torch.float16: None},
    "stochastic": {torch.bfloat16: Bound(-7, strict=True)},
    "none": {torch.bfloat16: Bound(-8), torch.float16: Bound(-11)},
}

#: Of exp_avg and exp_avg_sq, from the values computed.
MOMENTS: dict[str, tuple[Bound | None, Bound | None]] = {
    "fp32": (None, None),
    "bf16": (Bound(-8), Bound(-7, strict=True)),
    "8bit": (Bound(-3, -17, strict=True), Bound(-4, -18, strict=True)),
}

USE = {
    "split16": "bfloat16: an fp32 master in half its bytes, the same to the last bit",
    "split8": "bfloat16, where a byte per element matters",
    "fp32": "float16; programs that read `state[p]['master']`",
    "stochastic": "no room for a master: unbiased, but every update adds noise of the last place",
    "none": "comparisons: updates below half a last place are lost",
}
MOMENTS_USE = {
    "fp32": "exactness; what other optimizers keep",
    "bf16": "half the bytes, at hardly a cost in loss",
    "8bit": "a quarter of the bytes, at some cost in loss",
}


def bytes_of(dtype: torch.dtype, master: str, moments: str) -> tuple[float, float]:
    """Kept per element of a parameter, and moved by a step whose gradient has the parameter's dtype."""
    master, moments = precision.resolve_master(master, dtype), precision.resolve_moments(moments, dtype)
    kept = sum(s.dtype.itemsize / s.group for s in precision.streams(dtype, master, moments, amsgrad=False))
    return kept, 2 * kept + 3 * dtype.itemsize  # state and parameter are read and written, the gradient is read


# ---- the tables ------------------------------------------------------------------------------------------


def formats() -> str:
    lines = ["| parameter | `master` | `fp32` moments | `bf16` | `8bit` |", "|---|---|---|---|---|"]
    for dtype, masters in ROWS:
        cells = [f"{kept:g} / {moved:g}" for kept, moved in (bytes_of(dtype, masters[0], m) for m in codec.MOMENTS)]
        if len(set(cells)) == 1:
            cells = [cells[0], "as `fp32`", "as `fp32`"]
        lines.append(f"| `{name_of(dtype)}` | {described(dtype, masters)} | {' | '.join(cells)} |")
    lines += ["", "| `master` | bytes | error of an update's result | use it for |", "|---|---|---|---|"]
    for master, bounds in MASTERS.items():
        kept = sum(s.dtype.itemsize / s.group for s in codec.MASTERS[master])
        error = {shown(bound, "w"): dtype for dtype, bound in bounds.items()}
        cell = ", ".join(f"{text} ({name_of(dtype)})" if len(error) > 1 else text for text, dtype in error.items())
        lines.append(f"| `{master}` | {kept:g} | {cell} | {USE[master]} |")
    lines += ["", "| `moments` | bytes | error of `exp_avg` | of `exp_avg_sq` | use it for |", "|---|---|---|---|---|"]
    for moments, (first, second) in MOMENTS.items():
        kept = sum(s.dtype.itemsize / s.group for s in codec.MOMENTS[moments])
        lines.append(
            f"| `{moments}` | {kept:g} | {shown(first, 'm')} | {shown(second, 'v')} | {MOMENTS_USE[moments]} |"
        )
    return "\n".join(lines)


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def described(dtype: torch.dtype, masters: tuple[str, ...]) -> str:
    if masters == ("auto",):
        return "any, ignored"
    default = precision.resolve_master("auto", dtype)
    return ", ".join(f"`{master}`" + " (default)" * (master == default) for master in masters)


def shown(bound: Bound | None, symbol: str) -> str:
    if bound is None:
        return "none"
    sign = "<" if bound.strict else "≤"
    text = f"{sign} 2<sup>{bound.relative}</sup>&#124;{symbol}&#124;"
    return (
        text
        if bound.floor is None
        else f"{text} or 2<sup>{bound.floor}</sup> of the power of two covering the group's largest"
    )


# ---- quality ---------------------------------------------------------------------------------------------


def measured() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(QUALITY.read_text())
    return found


def quality() -> str:
    results = measured()["results"]
    lines = [f"| | {' | '.join(results)} |", "|---|" + "---|" * len(results)]
    for name in next(iter(results.values())):
        cells = []
        for task in results.values():
            percent = task[name]["percent_above_fp32"]
            mean, loss = statistics.fmean(percent), statistics.fmean(task[name]["held_out_loss"])
            change = f"{signed(mean)}% ({signed(min(percent))} to {signed(max(percent))})"
            cells.append(f"loss {loss:.4f}" if name == "fp32" else change)
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def signed(percent: float) -> str:
    return f"{round(percent, 2) + 0.0:+.2f}"  # no -0.00


def digest() -> str:
    """Of what the picture shows."""
    return hashlib.sha256(json.dumps(measured()["results"], sort_keys=True).encode()).hexdigest()[:16]


# Colours that can be read on white and on black: GitHub shows pages on either.
_DOT, _MEAN, _TEXT, _AXIS = "#2f81d7", "#d9822b", "#7d8590", "#9aa4af"

_STYLE = {
    "svg.hashsalt": "fused_sched",
    "svg.fonttype": "none",
    "font.size": 8.0,
    **dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color"), _TEXT),
    "axes.edgecolor": _AXIS,
}


def draw(path: Path) -> None:
    import matplotlib as mpl  # only here: the tests read the tables without it
    from matplotlib.figure import Figure

    results = measured()["results"]
    names = [name for name in next(iter(results.values())) if name != "fp32"][::-1]
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(7.5, 2.6), layout="constrained")
        figure.patch.set_visible(False)
        panels: Any = figure.subplots(1, len(results), sharey=True)
        for ax, (task, by_name) in zip(panels, results.items(), strict=True):
            ax.patch.set_visible(False)
            ax.axvline(0.0, color=_AXIS, linewidth=0.8)
            ax.axvspan(-0.5, 0.5, color=_AXIS, alpha=0.2, linewidth=0.0)
            for row, name in enumerate(names):
                percent = by_name[name]["percent_above_fp32"]
                ax.plot(percent, [row] * len(percent), "o", color=_DOT, markersize=3.5, alpha=0.8)
                ax.plot([statistics.fmean(percent)], [row], "|", color=_MEAN, markersize=12, markeredgewidth=1.8)
            ax.set(title=task, xlabel="held-out loss above fp32's, %", yticks=range(len(names)), yticklabels=names)
            ax.spines[["top", "right"]].set_visible(False)
        about = {"Title": "Held-out loss of formats against float32", "Description": digest()}
        figure.savefig(path, metadata={**about, "Date": None, "Creator": None})


# ---- speed -----------------------------------------------------------------------------------------------


def timed(name: str = "cpu") -> dict[str, Any]:
    found: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text())
    return found


def speed() -> str:
    return report.summary(timed(), {"Zen 4": timed("cpu-zen4")})


def speed_conditions() -> str:
    return f"{report.described(timed())}\n\nThe last column: {report.described(timed('cpu-zen4'))}"


def speed_digest() -> str:
    """Of what the picture shows."""
    return hashlib.sha256(json.dumps(timed(), sort_keys=True).encode()).hexdigest()[:16]


# ---- the page --------------------------------------------------------------------------------------------


def page(text: str) -> str:
    """README.md with its generated parts as they should be."""
    for part in (formats, quality, speed, speed_conditions):
        name = part.__name__
        pattern = rf"(<!-- {name}: written by docs/make_readme.py -->\n).*?(\n<!-- end of {name} -->)"
        text, found = re.subn(pattern, lambda m, part=part: m[1] + part() + m[2], text, flags=re.S)  # type: ignore[misc]
        if found != 1:
            raise ValueError(f"README.md must mark the place of {name} once, got {found} places")
    return text


def main() -> None:
    draw(PICTURE)
    report.draw(timed(), SPEED_PICTURE, speed_digest())
    README.write_text(page(README.read_text()))
    print(f"wrote tables into {README.name}, and {PICTURE.relative_to(ROOT)}, {SPEED_PICTURE.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
