"""Time of evaluating schedules on the CPU, as one step does it for a group: lr, both betas and weight decay.

    python benchmarks/schedule_time.py

Takes one sample of every schedule the package has (tests/schedule_samples.py), for all four hyperparameters of a
group, at updates spread over 10^5.
"""

from __future__ import annotations

import sys
import time
import warnings
from pathlib import Path

import numpy as np

from fused_sched import schedules
from fused_sched.program import evaluate

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
from schedule_samples import SAMPLES

HYPERPARAMETERS = 4
STEPS = np.linspace(0, 100_000, 20_001).astype(np.int64)
ROUNDS = 7


def nanoseconds(program: bytes) -> float:
    """Fastest of a few rounds: what the evaluation takes when nothing else runs."""
    times = []
    for _ in range(ROUNDS):
        begin = time.perf_counter()
        evaluate(program, STEPS)
        times.append(time.perf_counter() - begin)
    return min(times) / STEPS.size * 1e9


def main() -> None:
    warnings.simplefilter("ignore")
    rows = []
    for word, expression in SAMPLES.items():
        schedule = eval(expression, vars(schedules))
        if not hasattr(schedule, "replay"):  # metric-driven rates are read, not evaluated
            rows.append((nanoseconds(schedule.program), len(schedule.program), word))
    rows.sort(reverse=True)
    print(f"{'schedule':64} {'bytes':>6} {'ns':>6} {'us per group':>13}")
    for ns, size, word in rows:
        print(f"{word:64} {size:6} {ns:6.0f} {HYPERPARAMETERS * ns / 1000:13.2f}")


if __name__ == "__main__":
    main()
