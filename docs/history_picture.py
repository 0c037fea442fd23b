"""Writes docs/images/history.svg, the flight recorder's picture in the README: `python docs/history_picture.py`.

A small network on random data, three of whose batches overflow.
"""

from __future__ import annotations

from pathlib import Path

import matplotlib
import torch
from matplotlib.figure import Figure

from fused_sched import FusedScheduledAdam, plot, schedules

TARGET = Path(__file__).resolve().parent / "images" / "history.svg"
OVERFLOWS = (31, 32, 118)


def recorded_run() -> FusedScheduledAdam:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Tanh(), torch.nn.Linear(64, 10))
    inputs, targets = torch.randn(512, 64), torch.randint(10, (512,))
    lr = schedules.warmup_cosine(1e-2, warmup_steps=20, total_steps=200)
    optimizer = FusedScheduledAdam(model.parameters(), lr=lr, max_grad_norm=1.1, skip_nonfinite=True)
    for step in range(200 + len(OVERFLOWS)):
        batch = torch.randint(512, (32,))
        loss = torch.nn.functional.cross_entropy(model(inputs[batch]), targets[batch])
        optimizer.zero_grad()
        (loss * float("inf") if step in OVERFLOWS else loss).backward()
        optimizer.step()
    return optimizer


def main() -> None:
    matplotlib.rcParams["svg.hashsalt"] = "fused_sched"  # the same file every time
    figure = plot.history(recorded_run().history(), Figure(figsize=(7.0, 4.0), layout="constrained"))
    figure.savefig(TARGET, metadata={"Date": None})
    print(f"wrote {TARGET.name}, {TARGET.stat().st_size / 1024:.0f} KB")


if __name__ == "__main__":
    main()
