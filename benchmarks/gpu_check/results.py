"""What is kept of a run: at most seven files, brought up to date after every stage.

gpu.json and the benchmark's report (<device>.json, .md, .png), stages.json, tune.json, and one log of all stages.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ..gpu_json import gpu_json

#: Of a stage's output in the common log: its head and its tail, half each.
MOST_BYTES_OF_A_STAGE = 1 << 20


class Outcome(NamedTuple):
    """What became of a stage."""

    stage: str
    state: str  # ok, failed, left
    seconds: float
    why: str = ""


def reports(device: str) -> list[str]:
    """The benchmark's files."""
    return ["gpu.json", *(f"{device}.{suffix}" for suffix in ("json", "md", "png"))]


def forget(work: Path, device: str) -> None:
    """An earlier run's report, which is not to be taken for this one's."""
    for name in reports(device):
        (work / name).unlink(missing_ok=True)


def write(work: Path, outcomes: Sequence[Outcome], device: str) -> None:
    """stages.json, the common log, and gpu.json where there is a report, into the folder of the work."""
    (work / "stages.json").write_text(json.dumps([o._asdict() for o in outcomes], indent=1) + "\n")
    with (work / "gpu_check.log").open("wb") as log:
        for outcome in outcomes:
            log.write(f"==== {line(outcome)}\n".encode())
            if (of_stage := work / f"{outcome.stage}.log").exists() and outcome.seconds > 0.0:
                log.write(shortened(of_stage.read_bytes(), MOST_BYTES_OF_A_STAGE))
    if (report := work / f"{device}.json").exists():
        found: dict[str, Any] = json.loads(report.read_text())
        (work / "gpu.json").write_text(json.dumps(gpu_json(found), indent=1) + "\n")


def copy(work: Path, out: Path, names: Sequence[str]) -> None:
    """Those of these files that there are."""
    if work == out:
        return
    for name in names:
        if (work / name).exists():
            shutil.copyfile(work / name, out / name)


def shortened(text: bytes, most: int) -> bytes:
    """Head and tail."""
    if len(text) <= most:
        return text
    return b"%s\n[%d bytes left out]\n%s" % (text[: most // 2], len(text) - most // 2 * 2, text[-(most // 2) :])


def line(outcome: Outcome) -> str:
    return f"{outcome.state:7} {outcome.stage:20} {outcome.seconds:6.1f} s  {outcome.why}".rstrip()


def compact(work: Path) -> str:
    """gpu.json in as few characters as it can have; empty where there is none."""
    path = work / "gpu.json"
    return json.dumps(json.loads(path.read_text()), separators=(",", ":")) if path.exists() else ""
