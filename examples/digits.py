"""Train a small convolutional network on handwritten digits twice, from one seed:

- with FusedScheduledAdam, whose learning rate is computed inside the step, and
- with torch.optim.AdamW driven by a torch.optim.lr_scheduler,

then compare what they did. The data is scikit-learn's bundled digits (1,797 real 8x8 images), so nothing is
downloaded. Run it with `make demo`; takes about ten seconds.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import matplotlib
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

from fused_sched import FusedScheduledAdam, schedules

matplotlib.use("Agg")  # writes a file; needs no display
import matplotlib.pyplot as plt

SEED = 0
BATCH_SIZE = 32
PEAK_LR = 5e-3
WEIGHT_DECAY = 0.01
REQUIRED_ACCURACY = 0.97


@dataclass(frozen=True)
class Digits:
    train_images: Tensor  # [n, 1, 8, 8], in 0..1
    train_labels: Tensor  # [n]
    test_images: Tensor
    test_labels: Tensor


@dataclass
class Run:
    """What one training recorded; one entry per step in each list."""

    lr_on_device: list[Tensor] = field(default_factory=list)
    lr: list[float] = field(default_factory=list)
    loss: list[Tensor] = field(default_factory=list)
    step_seconds: list[float] = field(default_factory=list)
    optimizer_seconds: list[float] = field(default_factory=list)
    test_accuracy: float = 0.0
    weights: list[Tensor] = field(default_factory=list)  # after each epoch, as one vector


@dataclass(frozen=True)
class Plan:
    epochs: int
    warmup_steps: int
    total_steps: int
    device: torch.device


def load(device: torch.device) -> Digits:
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16.0
    labels = torch.tensor(digits.target)
    train, test = train_test_split(range(len(labels)), test_size=0.2, random_state=SEED, stratify=digits.target)
    return Digits(*(t.to(device) for t in (images[train], labels[train], images[test], labels[test])))


def make_model(device: torch.device, seed: int = SEED) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(32 * 4 * 4, 64),
        nn.ReLU(),
        nn.Linear(64, 10),
    ).to(device)


def train_fused(data: Digits, plan: Plan, advance: Callable[[], None]) -> Run:
    """The schedule is the learning rate. There is no scheduler object to step, and nothing to forget."""
    model = make_model(plan.device)
    schedule = schedules.warmup_cosine(PEAK_LR, warmup_steps=plan.warmup_steps, total_steps=plan.total_steps)
    optimizer = FusedScheduledAdam(model.parameters(), lr=schedule, weight_decay=WEIGHT_DECAY)
    run = Run()

    def step() -> None:
        optimizer.step()

    def record() -> None:
        run.lr.append(optimizer.last_lr()[0])  # known on the host: no synchronisation
        run.lr_on_device.append(optimizer.lr_tensor[0].clone())  # read back after the training

    train(model, data, plan, optimizer, step, record, run, advance)
    return run


def train_torch(data: Digits, plan: Plan, advance: Callable[[], None]) -> Run:
    """The customary pair: an optimizer, and a scheduler that writes the optimizer's lr from the host."""
    model = make_model(plan.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_LR, weight_decay=WEIGHT_DECAY)

    def factor(index: int) -> float:
        if index < plan.warmup_steps:
            return (index + 1) / plan.warmup_steps
        done = (index - plan.warmup_steps) / (plan.total_steps - plan.warmup_steps)
        return 0.5 * (1.0 + math.cos(math.pi * min(done, 1.0)))

    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    run = Run()

    def step() -> None:
        run.lr.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()

    train(model, data, plan, optimizer, step, lambda: None, run, advance)
    return run


def train(
    model: nn.Module,
    data: Digits,
    plan: Plan,
    optimizer: torch.optim.Optimizer,
    step: Callable[[], None],
    record: Callable[[], None],
    run: Run,
    advance: Callable[[], None],
) -> None:
    order = torch.Generator().manual_seed(SEED)
    criterion = nn.CrossEntropyLoss()
    for _ in range(plan.epochs):
        shuffled = torch.randperm(len(data.train_labels), generator=order).to(plan.device)
        for batch in shuffled.split(BATCH_SIZE):
            started = time.perf_counter()
            optimizer.zero_grad()
            loss = criterion(model(data.train_images[batch]), data.train_labels[batch])
            loss.backward()
            before_step = time.perf_counter()
            step()
            finished = time.perf_counter()
            record()
            run.loss.append(loss.detach())
            run.optimizer_seconds.append(finished - before_step)
            run.step_seconds.append(finished - started)
            advance()
        run.weights.append(nn.utils.parameters_to_vector(model.parameters()).detach())
    with torch.no_grad():
        predicted = model(data.test_images).argmax(dim=1)
    run.test_accuracy = (predicted == data.test_labels).double().mean().item()


def report(console: Console, plan: Plan, fused: Run, torch_run: Run) -> None:
    last = plan.total_steps - 1
    middle = (plan.warmup_steps + plan.total_steps) // 2
    shown = sorted({0, 1, plan.warmup_steps - 1, plan.warmup_steps, middle, last - 1, last})
    rates = Table(title="Learning rate used by update", title_justify="left")
    rates.add_column("step", justify="right")
    rates.add_column("on the device\n(opt.lr_tensor)", justify="right")
    rates.add_column("on the host\n(opt.last_lr())", justify="right")
    rates.add_column("torch's scheduler\n(get_last_lr())", justify="right")
    for index in shown:
        device_lr = fused.lr_on_device[index].item()
        rates.add_row(str(index), f"{device_lr:.12g}", f"{fused.lr[index]:.12g}", f"{torch_run.lr[index]:.12g}")
    console.print(rates)

    results = Table(title="Training", title_justify="left")
    results.add_column("")
    results.add_column("FusedScheduledAdam", justify="right")
    results.add_column("AdamW + LambdaLR", justify="right")
    rows: list[tuple[str, Callable[[Run], str]]] = [
        ("mean loss of the last epoch", lambda run: f"{last_epoch_loss(run, plan):.6f}"),
        ("test accuracy", lambda run: f"{run.test_accuracy:.2%}"),
        ("time per training step, median", lambda run: milliseconds(run.step_seconds)),
        ("  of it optimizer and scheduler", lambda run: milliseconds(run.optimizer_seconds)),
    ]
    for name, value in rows:
        results.add_row(name, value(fused), value(torch_run))
    console.print(results)

    console.print(f"Largest difference of a learning rate: {largest_rate_difference(fused, torch_run):.1e}")
    steps_per_epoch = plan.total_steps // plan.epochs
    for epoch in (0, plan.epochs - 1):
        apart = (fused.weights[epoch] - torch_run.weights[epoch]).abs().max().item()
        console.print(f"Largest difference of a weight after {(epoch + 1) * steps_per_epoch} steps: {apart:.1e}")
    console.print(
        "(The two round differently in the last bit, and training feeds every difference back "
        "through the gradients, so late weights drift apart while losses stay together.)"
    )


def largest_rate_difference(fused: Run, torch_run: Run) -> float:
    return max(abs(lr.item() - other) for lr, other in zip(fused.lr_on_device, torch_run.lr, strict=True))


def last_epoch_loss(run: Run, plan: Plan) -> float:
    return torch.stack(run.loss[-plan.total_steps // plan.epochs :]).mean().item()


def milliseconds(seconds: list[float]) -> str:
    return f"{1e3 * statistics.median(seconds):.3f} ms"


def plot(path: Path, fused: Run, torch_run: Run) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure, (rates, losses) = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    rates.plot(torch_run.lr, linewidth=5, color="#c9d6e8", label="AdamW + LambdaLR")
    rates.plot([lr.item() for lr in fused.lr_on_device], color="#1f4e8c", label="FusedScheduledAdam")
    rates.set(xlabel="step", ylabel="learning rate", title="Learning rate")
    losses.semilogy(torch.stack(torch_run.loss).cpu(), linewidth=5, color="#c9d6e8", label="AdamW + LambdaLR")
    losses.semilogy(torch.stack(fused.loss).cpu(), color="#1f4e8c", linewidth=1, label="FusedScheduledAdam")
    losses.set(xlabel="step", ylabel="training loss", title="Loss")
    for axes in (rates, losses):
        axes.legend(frameon=False, loc="upper right")
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, default=Path("demo_output"), help="folder of the plot")
    arguments = parser.parse_args()

    # Batches of 32 images of 8x8 are too little work to share, and one thread's sums are the same everywhere.
    torch.set_num_threads(1)
    device = torch.device(arguments.device)
    data = load(device)
    total_steps = arguments.epochs * math.ceil(len(data.train_labels) / BATCH_SIZE)
    plan = Plan(arguments.epochs, total_steps // 10, total_steps, device)

    console = Console()
    console.print(
        f"{len(data.train_labels)} images to train, {len(data.test_labels)} to test; "
        f"{plan.warmup_steps} steps of warm-up, then cosine to step {total_steps}; on {device}"
    )
    bars = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*bars, console=console) as progress:
        runs = []
        for name, train_with in (("FusedScheduledAdam", train_fused), ("AdamW + LambdaLR", train_torch)):
            task = progress.add_task(f"{name:<18}", total=total_steps)
            runs.append(train_with(data, plan, lambda task=task: progress.advance(task)))
    fused, torch_run = runs

    report(console, plan, fused, torch_run)
    picture = arguments.output / "digits.png"
    plot(picture, fused, torch_run)
    console.print(f"Curves written to {picture}")
    if fused.test_accuracy < REQUIRED_ACCURACY:
        console.print(f"FAILED: test accuracy {fused.test_accuracy:.2%} is below {REQUIRED_ACCURACY:.0%}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
