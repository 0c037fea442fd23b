"""Time of one optimizer step on the CPU against torch's fused AdamW in fp32, in alternation in one process.

    python benchmarks/step_time.py [--threads N] [--json FILE]

Prints medians of the times and of the ratios of neighbouring steps; machines are noisy, so the ratio of one run is what
to compare. Processor time, of all threads, says what is left of it where other processes take turns.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

from fused_sched import FusedScheduledAdam, schedules

MEMORY = 16_800_000  # elements, beyond every cache

#: name, tensors, elements of each, rounds, master and moments (None: fp32 parameters without compression)
CASES: list[tuple[str, int, int, int, tuple[str, str] | None]] = [
    ("one tensor, 64K elements (in cache)", 1, 65_536, 300, None),
    ("one tensor, 16.8M elements (from memory)", 1, MEMORY, 15, None),
    ("1,000 tensors of 64 elements (host time)", 1000, 64, 40, None),
    ("148 tensors of 100K elements", 148, 100_000, 15, None),
    *(
        (f"16.8M elements, bf16, {master} + {moments}", 1, MEMORY, 15, (master, moments))
        for master, moments in (
            ("fp32", "fp32"),
            ("split16", "fp32"),
            ("split16", "bf16"),
            ("split8", "bf16"),
            ("split16", "8bit"),
            ("split8", "8bit"),
            ("stochastic", "bf16"),
        )
    ),
]


def parameters(num_tensors: int, numel: int, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    tensors = [torch.randn(numel).to(dtype).requires_grad_() for _ in range(num_tensors)]
    for tensor in tensors:
        tensor.grad = torch.randn(numel).to(dtype)
    return tensors


class Times(NamedTuple):
    """One per round, in seconds."""

    wall: list[float]
    processor: list[float]


def measure(steps: list[Callable[[], object]], rounds: int) -> list[Times]:
    """The times of each, measured in alternation after one warm-up round."""
    times = [Times([], []) for _ in steps]
    for round_index in range(rounds + 1):
        for step, taken in zip(steps, times, strict=True):
            wall, processor = time.perf_counter(), time.process_time()
            step()
            if round_index:
                taken.wall.append(time.perf_counter() - wall)
                taken.processor.append(time.process_time() - processor)
    return times


def median_ratio(numerators: list[float], denominators: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(numerators, denominators, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path, help="write the results here, too")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    lr = schedules.warmup_cosine(1e-3, warmup_steps=10, total_steps=1000)
    results = []
    print(f"torch {torch.__version__}, {arguments.threads} threads, median of alternating steps\n")
    print(f"{'case':45} {'fused_sched ms':>15} {'torch fused ms':>15} {'torch/ours':>11} {'processor':>10}")
    for name, num_tensors, numel, rounds, formats in CASES:
        master, moments = formats or ("auto", "fp32")
        params = parameters(num_tensors, numel, torch.float32 if formats is None else torch.bfloat16)
        ours = FusedScheduledAdam(params, lr=lr, weight_decay=0.01, master=master, moments=moments)
        theirs = torch.optim.AdamW(parameters(num_tensors, numel), lr=1e-3, weight_decay=0.01, fused=True)
        ours_times, theirs_times = measure([ours.step, theirs.step], rounds)
        ours_ms, theirs_ms = (statistics.median(times.wall) * 1e3 for times in (ours_times, theirs_times))
        ratio = median_ratio(theirs_times.wall, ours_times.wall)
        processor_ratio = median_ratio(theirs_times.processor, ours_times.processor)
        print(f"{name:45} {ours_ms:15.3f} {theirs_ms:15.3f} {ratio:11.2f} {processor_ratio:10.2f}")
        results.append(
            {"case": name, "ours_ms": ours_ms, "torch_ms": theirs_ms, "ratio": ratio, "processor": processor_ratio}
        )
    if arguments.json:
        arguments.json.write_text(json.dumps({"torch": torch.__version__, "cases": results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
