"""Time of one optimizer step on the CPU against torch's fused AdamW, in alternation in one process: the step alone,
and with gradients clipped by their norm before (`clip_grad_norm_` there, `max_grad_norm=1.0` here).

    python benchmarks/step_time.py [--threads N] [--cpu-time] [--json FILE]

Prints medians and their ratio; machines are noisy, so the ratio of one run is what to compare. On a machine that
others use, too, --cpu-time with one thread leaves out the time in which it did not run.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

from fused_sched import FusedScheduledAdam, schedules

#: name, tensors, elements of each, rounds
CASES = [
    ("one tensor, 64K elements (in cache)", 1, 65_536, 300),
    ("one tensor, 16.8M elements (from memory)", 1, 16_800_000, 15),
    ("1,000 tensors of 64 elements (host time)", 1000, 64, 40),
    ("148 tensors of 100K elements", 148, 100_000, 15),
]


def parameters(num_tensors: int, numel: int) -> list[torch.Tensor]:
    tensors = [torch.randn(numel, requires_grad=True) for _ in range(num_tensors)]
    for tensor in tensors:
        tensor.grad = torch.randn(numel)
    return tensors


def median_seconds(
    steps: list[Callable[[], object]], rounds: int, clock: Callable[[], float] = time.perf_counter
) -> list[float]:
    """Median time of each, measured in alternation after one warm-up round."""
    times: list[list[float]] = [[] for _ in steps]
    for round_index in range(rounds + 1):
        for step, taken in zip(steps, times, strict=True):
            begin = clock()
            step()
            if round_index:
                taken.append(clock() - begin)
    return [statistics.median(taken) for taken in times]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--cpu-time", action="store_true", help="of all threads together, instead of wall time")
    parser.add_argument("--json", type=Path, help="write the results here, too")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    lr = schedules.warmup_cosine(1e-3, warmup_steps=10, total_steps=1000)
    clock = time.process_time if arguments.cpu_time else time.perf_counter
    results = []
    print(f"torch {torch.__version__}, {arguments.threads} threads, median of alternating steps\n")
    print(f"{'case':49} {'fused_sched ms':>15} {'torch fused ms':>15} {'torch/ours':>11}")
    for clips in (False, True):
        for name, num_tensors, numel, rounds in CASES:
            ours = FusedScheduledAdam(
                parameters(num_tensors, numel), lr=lr, weight_decay=0.01, max_grad_norm=1.0 if clips else None
            )
            their_params = parameters(num_tensors, numel)
            theirs = torch.optim.AdamW(their_params, lr=1e-3, weight_decay=0.01, fused=True)

            def their_step(params=their_params, optimizer=theirs, clips=clips) -> None:
                if clips:
                    torch.nn.utils.clip_grad_norm_(params, 1.0)
                optimizer.step()

            ours_s, theirs_s = median_seconds([ours.step, their_step], rounds, clock)
            case = f"clip + {name}" if clips else name
            print(f"{case:49} {ours_s * 1e3:15.3f} {theirs_s * 1e3:15.3f} {theirs_s / ours_s:11.2f}")
            results.append({"case": case, "ours_ms": ours_s * 1e3, "torch_ms": theirs_s * 1e3})
    if arguments.json:
        arguments.json.write_text(json.dumps({"torch": torch.__version__, "cases": results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
