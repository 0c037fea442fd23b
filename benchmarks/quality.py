"""What the storage formats do to training: held-out loss against float32, two tasks, three seeds.

    python benchmarks/quality.py [--jobs N] [--tasks digits,text] [--formats "fp32;split8 + 8bit"] [--json FILE]

Digits: the convolutional network of examples/digits.py, with label smoothing: without it the loss on 360 held-out
images, 0.04, differs by a tenth between any two runs. Text: a byte-level transformer of 137,000 parameters on the text
of Python's own help (`pydoc_data.topics`, half a megabyte), judged on its last tenth. Every run of a seed starts from
the same weights, rounded to bfloat16, and sees the same batches. 16-bit runs hold parameters, activations and gradients
in bfloat16; float32 runs none of them. Small networks amplify every difference: "nudged" is the float32 run from
weights one part in a million away, and tells how far apart two runs end that differ in nothing that matters.

Takes some ten minutes of processor time. `make docs` draws what --json has written to docs/images/quality.json.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "examples"))

import digits  # noqa: E402

from fused_sched import FusedScheduledAdam, schedules  # noqa: E402

#: Name of a run: parameters' dtype, master, moments.
FORMATS: dict[str, tuple[torch.dtype, str, str]] = {
    "fp32": (torch.float32, "none", "fp32"),
    "fp32, nudged": (torch.float32, "none", "fp32"),
    "none + fp32": (torch.bfloat16, "none", "fp32"),
    "stochastic + bf16": (torch.bfloat16, "stochastic", "bf16"),
    "split16 + fp32": (torch.bfloat16, "split16", "fp32"),
    "split16 + bf16": (torch.bfloat16, "split16", "bf16"),
    "split8 + bf16": (torch.bfloat16, "split8", "bf16"),
    "split8 + 8bit": (torch.bfloat16, "split8", "8bit"),
}
NUDGE = 2.0**-20  # of each weight


@dataclass(frozen=True)
class Task:
    """What is trained, how long, and how it is judged."""

    steps: int
    peak_lr: float
    weight_decay: float
    label_smoothing: float
    make_model: Callable[[int], nn.Module]  # of a seed
    batches: Callable[[int], Iterator[tuple[Tensor, Tensor]]]  # of a seed, endless
    held_out: Callable[[], tuple[Tensor, Tensor]]


# ---- digits ----------------------------------------------------------------------------------------------


def digit_batches(seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    data = digits.load(torch.device("cpu"))
    order = torch.Generator().manual_seed(seed)
    while True:
        for batch in torch.randperm(len(data.train_labels), generator=order).split(digits.BATCH_SIZE):
            yield data.train_images[batch], data.train_labels[batch]


def held_out_digits() -> tuple[Tensor, Tensor]:
    data = digits.load(torch.device("cpu"))
    return data.test_images, data.test_labels


# ---- text ------------------------------------------------------------------------------------------------

CONTEXT, BATCH, WIDTH, HEADS, LAYERS = 64, 16, 64, 4, 2


def text() -> Tensor:
    """Half a megabyte of English and Python, as bytes."""
    joined = "".join(topics[name] for name in sorted(topics))
    return torch.frombuffer(bytearray(joined.encode()), dtype=torch.uint8).long()


class Block(nn.Module):
    """A pre-norm transformer block."""

    def __init__(self) -> None:
        super().__init__()
        self.norm_1, self.norm_2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in self.qkv(self.norm_1(x)).chunk(3, dim=-1))
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).flatten(-2))
        return x + self.down(F.gelu(self.up(self.norm_2(x))))


class LanguageModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.token, self.place = nn.Embedding(256, WIDTH), nn.Embedding(CONTEXT, WIDTH)
        self.blocks = nn.Sequential(*(Block() for _ in range(LAYERS)))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 256)
        for embedding in (self.token, self.place):
            nn.init.normal_(embedding.weight, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.token(tokens) + self.place.weight[: tokens.shape[1]]
        return self.head(self.norm(self.blocks(x))).flatten(0, 1)  # type: ignore[no-any-return]


def language_model(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return LanguageModel()


def windows(text: Tensor, starts: Tensor) -> tuple[Tensor, Tensor]:
    taken = text[starts[:, None] + torch.arange(CONTEXT + 1)]
    return taken[:, :-1], taken[:, 1:].flatten()


def text_batches(seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    train = text()[: len(text()) * 9 // 10]
    order = torch.Generator().manual_seed(seed)
    while True:
        yield windows(train, torch.randint(len(train) - CONTEXT, (BATCH,), generator=order))


def held_out_text() -> tuple[Tensor, Tensor]:
    rest = text()[len(text()) * 9 // 10 :]
    return windows(rest, torch.arange(0, len(rest) - CONTEXT, CONTEXT))


TASKS = {
    "digits": Task(
        675,
        digits.PEAK_LR,
        digits.WEIGHT_DECAY,
        0.1,
        lambda seed: digits.make_model(torch.device("cpu"), seed),
        digit_batches,
        held_out_digits,
    ),
    "text": Task(800, 3e-3, 0.1, 0.0, language_model, text_batches, held_out_text),
}


# ---- training --------------------------------------------------------------------------------------------


def train(task: str, formats: str, seed: int, steps: int | None = None) -> dict[str, Any]:
    """One run: its held-out loss and accuracy, and the mean training loss of its last tenth."""
    setting = TASKS[task]
    steps = steps or setting.steps
    dtype, master, moments = FORMATS[formats]
    model = setting.make_model(seed).to(torch.bfloat16).to(dtype)
    if formats.endswith("nudged"):
        with torch.no_grad():
            for param in model.parameters():
                param.mul_(1.0 + NUDGE)
    lr = schedules.warmup_cosine(setting.peak_lr, warmup_steps=steps // 10, total_steps=steps)
    optimizer = FusedScheduledAdam(
        model.parameters(), lr=lr, weight_decay=setting.weight_decay, master=master, moments=moments, seed=seed
    )

    def loss_of(inputs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        logits = model(inputs.to(dtype) if inputs.is_floating_point() else inputs).float()
        return F.cross_entropy(logits, labels, label_smoothing=setting.label_smoothing), logits

    losses = []
    for _, (inputs, labels) in zip(range(steps), setting.batches(seed), strict=False):
        optimizer.zero_grad()
        loss, _ = loss_of(inputs, labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    inputs, labels = setting.held_out()
    with torch.no_grad():
        held_out, logits = loss_of(inputs, labels)
    return {
        "task": task,
        "formats": formats,
        "seed": seed,
        "held_out_loss": held_out.item(),
        "training_loss": statistics.fmean(losses[-steps // 10 :]),
        "accuracy": (logits.argmax(1) == labels).double().mean().item(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, of one thread each")
    parser.add_argument("--tasks", default=",".join(TASKS))
    parser.add_argument("--formats", help="names separated by semicolons; all")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    chosen = arguments.formats.split(";") if arguments.formats else list(FORMATS)
    seeds = [int(seed) for seed in arguments.seeds.split(",")]
    planned = [(task, name, seed) for task in arguments.tasks.split(",") for name in chosen for seed in seeds]
    started = time.perf_counter()
    # Spawned: forked processes would lack the threads that their parent's torch counts on. One thread each, because
    # there is too little work to share, and one thread's sums are the same everywhere.
    with get_context("spawn").Pool(arguments.jobs, torch.set_num_threads, (1,)) as pool:
        runs = pool.starmap(train, planned, chunksize=1)
    print(f"{len(runs)} runs in {time.perf_counter() - started:.0f} s")
    results = summary(runs)
    print("\n".join(table(results)))
    if arguments.json:
        arguments.json.write_text(json.dumps({"conditions": conditions(), "results": results}, indent=1) + "\n")


def conditions() -> dict[str, Any]:
    return {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": f"{platform.machine()}, CPU backend, one thread a run",
        "sha256 of the text": hashlib.sha256(text().byte().numpy().tobytes()).hexdigest()[:16],
        "steps": {name: task.steps for name, task in TASKS.items()},
    }


def summary(runs: list[dict[str, Any]]) -> dict[str, dict[str, dict[str, list[float]]]]:
    """By task and formats, a value for each seed."""
    loss = {(r["task"], r["formats"], r["seed"]): r["held_out_loss"] for r in runs}
    found: dict[str, dict[str, dict[str, list[float]]]] = {}
    for run in runs:
        row = found.setdefault(run["task"], {}).setdefault(run["formats"], {})
        baseline = loss.get((run["task"], "fp32", run["seed"]), math.nan)
        percent = 100.0 * (run["held_out_loss"] / baseline - 1.0)
        for key in ("held_out_loss", "training_loss", "accuracy"):
            row.setdefault(key, []).append(round(run[key], 6))
        row.setdefault("percent_above_fp32", []).append(round(percent, 4))
    return found


def table(results: dict[str, dict[str, dict[str, list[float]]]]) -> Iterator[str]:
    for task, rows in results.items():
        for name, row in rows.items():
            losses = ", ".join(f"{loss:.4f}" for loss in row["held_out_loss"])
            percent = row["percent_above_fp32"]
            spread = f"{statistics.fmean(percent):+.2f}% ({min(percent):+.2f} to {max(percent):+.2f})"
            yield f"{task:7} {name:18} {losses}   {spread}"


if __name__ == "__main__":
    main()
