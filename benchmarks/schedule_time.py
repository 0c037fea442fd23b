"""Time of evaluating schedules on the CPU, as one step does it for a group: lr, both betas and weight decay.

    python -m benchmarks --cases schedules

One sample of every schedule the package has (tests/schedule_samples.py), at updates spread over 10^5.
"""

from __future__ import annotations

import sys
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np

from fused_sched import schedules
from fused_sched.program import evaluate

SAMPLES_FOLDER = Path(__file__).resolve().parents[1] / "tests"
HYPERPARAMETERS = 4
STEPS = np.linspace(0, 100_000, 20_001).astype(np.int64)


def nanoseconds(program: bytes, rounds: int) -> float:
    """Fastest of a few rounds: what the evaluation takes when nothing else runs."""
    times = []
    for _ in range(rounds):
        begin = time.perf_counter()
        evaluate(program, STEPS)
        times.append(time.perf_counter() - begin)
    return min(times) / STEPS.size * 1e9


def measure(rounds: int = 7) -> list[dict[str, Any]]:
    """A row per schedule, slowest first."""
    sys.path.insert(0, str(SAMPLES_FOLDER))
    try:
        from schedule_samples import SAMPLES
    finally:
        sys.path.remove(str(SAMPLES_FOLDER))
    rows = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what is odd about the libraries' samples
        for word, expression in SAMPLES.items():
            schedule = eval(expression, vars(schedules))
            if not hasattr(schedule, "replay"):  # metric-driven rates are read, not evaluated
                rows.append(
                    {"schedule": word, "bytes": len(schedule.program), "ns": nanoseconds(schedule.program, rounds)}
                )
    return sorted(rows, key=lambda row: -row["ns"])


def table(rows: list[dict[str, Any]]) -> str:
    lines = ["| schedule | program, bytes | ns per value | us per group and step |", "|---|---|---|---|"]
    lines += [
        f"| {row['schedule']} | {row['bytes']} | {row['ns']:.0f} | {HYPERPARAMETERS * row['ns'] / 1000:.2f} |"
        for row in rows
    ]
    return "\n".join(lines)
