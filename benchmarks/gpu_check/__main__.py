"""Everything that needs a GPU, in one command of less than nine minutes, without a network.

    python3 -m benchmarks.gpu_check [--dry-run] [--only build,selftest,...] [--from benchmark] [--out DIR] [--total 520]

Builds with the torch that is there; compares every byte of the kernels' results with the CPU build's; checks that
nobody waits, runs the benchmark, the tests marked `cuda`, compute-sanitizer and ncu, and times what csrc/cuda could
have chosen otherwise. Each stage runs whatever became of the others; the exit status is 1 if one failed. A stage whose
tool is missing, or may not be used, is left.

Everything is made in build/gpu_check, a log per stage. gpu.json and the benchmark's report (cuda.json, .md, .png) are
then copied into benchmarks/results; with --out into DIR, after every stage and together with stages.json,
gpu_check.log and tune.json: the seven files to take from a machine whose files you copy back. Better in two commands,
of which the first says whether the second is worth its time:

    make gpu-check ARGS="--only build,build-selftest,selftest,torch-checks --out DIR"
    make gpu-check ARGS="--from benchmark --out DIR"

`make gpu-check` is the same as `python3 -m benchmarks.gpu_check`, in .venv if there is one.

--dry-run does the same on a machine without a GPU, small: the kernels run on the CPU (tests/cuda_on_cpu), tools that
need a GPU are left out of their commands, and results stay in build/gpu_check.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import time
from pathlib import Path

from .. import nvidia_smi
from . import processes, results
from .results import Outcome
from .stages import ROOT, Stage, missing, search_path, stages

RESULTS = ROOT / "benchmarks" / "results"
WORK = ROOT / "build" / "gpu_check"
#: Of ten minutes: a kill by the driver, the start of Python and the copying of files come on top.
TOTAL_SECONDS = 520.0
SHOWN_LINES = 25


def show(*lines: str) -> None:
    print("\n".join(lines), flush=True)


def run_stage(stage: Stage, folder: Path, deadline: float) -> Outcome:
    """Runs a stage's command, its output into folder/<name>.log, and shows the end of it: a line if all was well.

    deadline: on the monotonic clock. The command knows its own by $FUSED_SCHED_DEADLINE, in seconds since the epoch.
    """
    lacking = missing(stage)
    if lacking:
        return Outcome(stage.name, "left", 0.0, f"there is no {lacking}")
    begin = time.monotonic()
    left = min(stage.limit, deadline - begin)
    if left < 1.0:
        return Outcome(stage.name, "left", 0.0, "no time was left for it")
    log = folder / f"{stage.name}.log"
    environment = {
        **os.environ,
        "PATH": search_path(),
        "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
        "PYTHONUNBUFFERED": "1",
        "FUSED_SCHED_DEADLINE": str(time.time() + left),
        **stage.environment,
    }
    with log.open("w") as output:
        why = processes.run(stage.command, left, output, ROOT, environment)
    outcome = judged(stage, why, log.read_text(errors="replace"), time.monotonic() - begin)
    lines = [line[:200] for line in log.read_text(errors="replace").splitlines() if line.strip()]
    shown = SHOWN_LINES if outcome.state == "failed" else 1
    show(f"{outcome.state} after {outcome.seconds:.1f} s", *(f"    {line}" for line in lines[-shown:]))
    return outcome


def judged(stage: Stage, why: str, output: str, seconds: float) -> Outcome:
    """why: the command failed; empty if it did not."""
    refused = re.search(stage.refuses, output) if stage.refuses else None
    if refused is not None and not re.search(r"^FAILED", output, re.M):
        return Outcome(stage.name, "left", seconds, f"{stage.needs}: {refused[0]}")
    if not why and stage.shows not in output:
        why = f"did not show {stage.shows!r}"
    return Outcome(stage.name, "failed" if why else "ok", seconds, why)


def architecture() -> str | None:
    """Of the first GPU, as in "90"; None where nvidia-smi does not tell."""
    found = nvidia_smi.query(["compute_cap"]).get("compute_cap", "").replace(".", "")
    return found if found.isdigit() else None


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_check", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--only", help="stages, comma-separated; all")
    parser.add_argument("--from", dest="first", metavar="STAGE", help="this stage and those after it")
    parser.add_argument("--out", type=Path, help="where results go")
    parser.add_argument("--total", type=float, default=TOTAL_SECONDS, help="seconds for all stages together")
    options = parser.parse_args(arguments)
    begin = time.monotonic()
    out = (options.out or (WORK if options.dry_run else RESULTS)).resolve()
    for folder in (WORK, out):
        folder.mkdir(parents=True, exist_ok=True)
    planned = stages(WORK, options.dry_run, None if options.dry_run else architecture())
    names = [stage.name for stage in planned]
    wanted = options.only.split(",") if options.only else names
    unknown = sorted({*wanted, *filter(None, [options.first])} - set(names))
    if unknown:
        parser.error(f"no stage is called {', '.join(unknown)}; stages are {', '.join(names)}")
    if options.first:
        wanted = [name for name in wanted if name in names[names.index(options.first) :]]
    device = "cpu" if options.dry_run else "cuda"
    kept = ["stages.json", "gpu_check.log"] if options.out else []
    if "benchmark" in wanted:
        results.forget(WORK, device)
    outcomes: list[Outcome] = []
    for stage in planned:
        if stage.name not in wanted:
            continue
        show(f"== {stage.name} (at {time.monotonic() - begin:.0f} s)")
        outcomes.append(run_stage(stage, WORK, begin + options.total))
        if stage.name == "benchmark":
            kept += results.reports(device)
            if not (WORK / f"{device}.json").exists():
                outcomes.append(Outcome("report", "failed", 0.0, "the benchmark left none"))
        if stage.name == "tune":
            kept.append("tune.json")
        results.write(WORK, outcomes, device)
        results.copy(WORK, out, kept)
    show("", *map(results.line, outcomes), *([results.compact(WORK)] if "benchmark" in wanted else []))
    return int(any(outcome.state == "failed" for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
