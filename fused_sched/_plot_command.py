"""`python -m fused_sched plot`: schedules, as a DeepSpeed configuration or an expression has them, in a picture."""

from __future__ import annotations

import argparse
import math
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from . import schedules
from ._warnings import ScheduleWarning
from .plot import draw_schedules
from .schedules import Schedule

FORMATS = (".pdf", ".png", ".svg")

HELP: dict[str, Any] = {
    "help": "draw schedules, from DeepSpeed configurations or Python expressions",
    "description": "Draw one or several schedules over the updates they are used by: phases marked, and below, where "
    "a schedule has them, the momentum and the weight decay that go with it.",
    "epilog": """\
examples:
  python -m fused_sched plot ds_config.json -o lr.png
  python -m fused_sched plot "warmup_cosine(1e-3, warmup_steps=10, total_steps=100)" \\
      "deepspeed.OneCycle(cycle_min_lr=1e-4, cycle_max_lr=1e-3)" -o lr.svg --steps 5000""",
    "formatter_class": argparse.RawDescriptionHelpFormatter,
}


class _Refused(Exception):
    """What the command was given cannot be drawn."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "schedules",
        nargs="+",
        metavar="schedule",
        help="a DeepSpeed configuration (a path that ends in .json), or a Python expression in the words of "
        "fused_sched.schedules and math; it is evaluated, so draw only what you trust",
    )
    parser.add_argument(
        "-o", "--output", required=True, type=_picture, metavar="lr.png", help=f"picture to write: {_listed(FORMATS)}"
    )
    parser.add_argument(
        "--steps", type=_step_count, metavar="N", help="updates to show; by default a tenth more than the longest has"
    )
    parser.add_argument(
        "--base-lr",
        type=_rate,
        metavar="X",
        help="the optimizer's learning rate, for a configuration without one; expressions have it as base_lr",
    )


def run(options: argparse.Namespace, refuse: Callable[[str], NoReturn]) -> None:
    """Draw what the command line names; `refuse` ends the program with a message."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ScheduleWarning)
        try:
            drawn = [_schedule(text, options.base_lr) for text in options.schedules]
            _draw(drawn, options)
        except _Refused as refused:
            refuse(str(refused))
    for warning in caught:
        print(f"warning: {warning.message}", file=sys.stderr)


def _schedule(text: str, base_lr: float | None) -> Schedule:
    if Path(text).suffix == ".json":
        return _configured(Path(text), base_lr)
    return _evaluated(text, base_lr)


def _configured(path: Path, base_lr: float | None) -> Schedule:
    from .deepspeed import schedule_from_config  # imports torch's optimizers, which an expression does without

    try:
        return schedule_from_config(path, base_lr=base_lr)
    except OSError as error:
        raise _Refused(
            f"schedule must be a file that can be read or an expression, got '{path}': {error.strerror}; check the path"
        ) from error
    except (TypeError, ValueError) as error:
        remedy = "; give --base-lr" if base_lr is None and "base_lr" in str(error) else ""
        raise _Refused(f"{path}: {error}{remedy}") from error


def _evaluated(expression: str, base_lr: float | None) -> Schedule:
    names = {name: value for name, value in vars(math).items() if not name.startswith("_")} | {"math": math}
    names |= {name: getattr(schedules, name) for name in schedules.__all__}
    if base_lr is not None:
        names["base_lr"] = base_lr
    try:
        value = eval(expression, names)
    except Exception as error:  # whatever the expression raises
        remedy = "give --base-lr" if isinstance(error, NameError) and error.name == "base_lr" else _REMEDY
        raise _Refused(f"schedule {expression!r} has no value: {type(error).__name__}: {error}; {remedy}") from error
    if not isinstance(value, Schedule):
        raise _Refused(f"schedule {expression!r} must be a Schedule, got {value!r}; {_REMEDY}")
    return value


_REMEDY = (
    "write an expression in the words of fused_sched.schedules, for instance "
    "'warmup_cosine(1e-3, warmup_steps=10, total_steps=100)', or the path of a .json file"
)


def _draw(drawn: list[Schedule], options: argparse.Namespace) -> None:
    try:
        from matplotlib.figure import Figure  # not pyplot's, which may want a display
    except ImportError as error:
        raise _Refused("plotting needs matplotlib, which is not installed; pip install 'fused_sched[plot]'") from error
    figure = Figure(layout="constrained")
    try:
        axes = draw_schedules(figure, *drawn, num_steps=options.steps, labels=list(map(_label, options.schedules)))
    except (TypeError, ValueError) as error:
        raise _Refused(str(error)) from error
    axes.set_ylabel("learning rate")
    try:
        figure.savefig(options.output, dpi=150)
    except OSError as error:
        raise _Refused(f"-o must be a path that can be written, got '{options.output}': {error.strerror}") from error


def _label(text: str) -> str:
    return text if len(text) <= 80 else f"{text[:77]}..."


# Types of arguments: argparse puts the argument's name before the message.


def _picture(text: str) -> Path:
    path = Path(text)
    if path.suffix.lower() not in FORMATS:
        raise argparse.ArgumentTypeError(f"must end in {_listed(FORMATS)}, got {text!r}; name it lr.png, for instance")
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"must be in a folder that exists, got {text!r}; make {path.parent} first")
    return path


def _step_count(text: str) -> int:
    if not (text.isdecimal() and int(text) >= 1):
        raise argparse.ArgumentTypeError(
            f"must be an integer number of updates, at least 1, got {text!r}; leave it out to show all phases"
        )
    return int(text)


def _rate(text: str) -> float:
    try:
        rate = float(text)
    except ValueError:
        rate = math.nan
    if not (math.isfinite(rate) and rate >= 0.0):
        raise argparse.ArgumentTypeError(f"must be a finite rate, at least 0, got {text!r}; 1e-3, for instance")
    return rate


def _listed(words: tuple[str, ...]) -> str:
    return f"{', '.join(words[:-1])} or {words[-1]}"
