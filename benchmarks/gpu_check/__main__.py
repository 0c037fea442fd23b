"""Everything that needs a GPU, in one command of less than ten minutes, without a network.

    python -m benchmarks.gpu_check [--dry-run] [--only build,selftest,...] [--out DIR]

Builds with the torch that is there; compares every byte of the kernels' results with the CPU build's; runs the tests
marked `cuda`, checks that nobody waits, the benchmark, compute-sanitizer and ncu. Each stage runs whatever became of
the others; the exit status is 1 if one failed. Results are DIR/gpu.json and the benchmark's report (cuda.json,
.md, .png), by default in benchmarks/results; logs are in build/gpu_check.

--dry-run does the same on a machine without a GPU, small: the kernels run on the CPU (tests/cuda_on_cpu), tools that
need a GPU are left out of their commands, and results go into build/gpu_check.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

from .stages import ROOT, Stage, missing, stages

RESULTS = ROOT / "benchmarks" / "results"
WORK = ROOT / "build" / "gpu_check"
TOTAL_SECONDS = 585  # of a loan of ten minutes
SHOWN_LINES = 12


class Outcome(NamedTuple):
    """What became of a stage."""

    stage: str
    state: str  # ok, failed, left
    seconds: float
    why: str = ""


def run_stage(stage: Stage, folder: Path, deadline: float) -> Outcome:
    """Runs a stage's command, its output into folder/<name>.log, and shows the end of it."""
    lacking = missing(stage)
    if lacking:
        return Outcome(stage.name, "left", 0.0, f"there is no {lacking}")
    begin = time.monotonic()
    left = min(stage.limit, deadline - begin)
    if left < 1.0:
        return Outcome(stage.name, "left", 0.0, "no time was left for it")
    log = folder / f"{stage.name}.log"
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1", **stage.environment}
    why = ""
    with log.open("w") as output:
        try:
            done = subprocess.run(
                stage.command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT, timeout=left
            )
            why = f"exit status {done.returncode}" if done.returncode else ""
        except subprocess.TimeoutExpired:
            why = f"not done after {left:.0f} s"
        except OSError as error:
            why = str(error)
    lines = log.read_text(errors="replace").splitlines()
    print("\n".join(f"    {line[:200]}" for line in lines[-SHOWN_LINES:]))
    return Outcome(stage.name, "failed" if why else "ok", time.monotonic() - begin, why)


def architecture() -> str | None:
    """Of the first GPU, as in "90"; None where nvidia-smi does not tell."""
    if shutil.which("nvidia-smi") is None:
        return None
    query = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    found = subprocess.run(query, capture_output=True, text=True).stdout.split("\n")[0].strip()
    return found.replace(".", "") if found.replace(".", "").isdigit() else None


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_check", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--only", help="stages, comma-separated; all")
    parser.add_argument("--out", type=Path, help="where results go")
    options = parser.parse_args(arguments)
    out = (options.out or (WORK if options.dry_run else RESULTS)).resolve()
    logs = out if options.out else WORK
    for folder in (out, logs):
        folder.mkdir(parents=True, exist_ok=True)
    # Everything is written into the folder of the logs; results are then copied to where they are wanted.
    planned = stages(logs, options.dry_run, None if options.dry_run else architecture())
    names = options.only.split(",") if options.only else [stage.name for stage in planned]
    unknown = sorted(set(names) - {stage.name for stage in planned})
    if unknown:
        known = ", ".join(stage.name for stage in planned)
        parser.error(f"no stage is called {', '.join(unknown)}; stages are {known}")
    device = "cpu" if options.dry_run else "cuda"
    (logs / f"{device}.json").unlink(missing_ok=True)  # an earlier run's
    begin = time.monotonic()
    outcomes = []
    for stage in planned:
        if stage.name not in names:
            continue
        print(f"== {stage.name} (at {time.monotonic() - begin:.0f} s)", flush=True)
        outcomes.append(run_stage(stage, logs, begin + TOTAL_SECONDS))
    if "benchmark" in names and not deliver(logs, out, device):
        outcomes.append(Outcome("results", "failed", 0.0, "the benchmark left no report"))
    print("\n".join(["", *summary(outcomes)]))
    (logs / "stages.json").write_text(json.dumps([o._asdict() for o in outcomes], indent=1) + "\n")
    return int(any(outcome.state == "failed" for outcome in outcomes))


def deliver(logs: Path, out: Path, device: str) -> bool:
    """Copies the benchmark's files to where they are wanted, and writes gpu.json; False if there are none."""
    if not (logs / f"{device}.json").exists():
        return False
    from ..report import gpu_json

    found: dict[str, Any] = json.loads((logs / f"{device}.json").read_text())
    (out / "gpu.json").write_text(json.dumps(gpu_json(found), indent=1) + "\n")
    for suffix in ("json", "md", "png"):
        source = logs / f"{device}.{suffix}"
        if source.exists() and logs != out:
            shutil.copyfile(source, out / source.name)
    return True


def summary(outcomes: list[Outcome]) -> list[str]:
    return [f"{o.state:7} {o.stage:20} {o.seconds:6.1f} s  {o.why}".rstrip() for o in outcomes]


if __name__ == "__main__":
    sys.exit(main())
