"""Writes the figures of README.md into docs/images: python benchmarks/readme_figures.py"""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt

from fused_sched import schedules

IMAGES = Path(__file__).resolve().parents[1] / "docs" / "images"

# Title and schedule of each panel; 1,000 updates with a peak of 1, so that only the shapes differ.
PANELS = {
    "warmup_cosine": schedules.warmup_cosine(1.0, warmup_steps=100, total_steps=1000),
    "warmup_stable_decay": schedules.warmup_stable_decay(1.0, warmup_steps=100, total_steps=1000, decay_steps=250),
    "inverse_sqrt": schedules.inverse_sqrt(1.0, warmup_steps=100),
    "one_cycle": schedules.one_cycle(1.0, total_steps=1000),
    "cosine(...).repeat(250)": schedules.cosine(1.0, 0.1, 250).repeat(250),
    "linear * cosine.repeat": schedules.linear(1.0, 0.0, 1000) * schedules.cosine(1.0, 0.3, 125).repeat(125),
}


def schedule_panels(path: Path) -> None:
    figure, panels = plt.subplots(2, 3, figsize=(9.0, 3.9), sharex=True, sharey=True, layout="constrained")
    steps = range(1000)
    for axes, (title, schedule) in zip(panels.flat, PANELS.items(), strict=True):
        axes.plot(steps, schedule(steps), color="#1f4e8c", linewidth=1.8)
        axes.set_title(title, fontsize=10, family="monospace")
        axes.set(xticks=[0, 500, 1000], yticks=[0, 1], yticklabels=["0", "peak"])
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(colors="#555555", labelsize=8)
    for axes in panels[1]:
        axes.set_xlabel("update", fontsize=9)
    figure.savefig(path, metadata={"Date": None}, facecolor="white")


def main() -> None:
    # The same bytes for the same curves, so that a rerun shows in git only when something changed.
    plt.rcParams["svg.hashsalt"] = "fused_sched"
    IMAGES.mkdir(parents=True, exist_ok=True)
    schedule_panels(IMAGES / "schedules.svg")


if __name__ == "__main__":
    main()
