"""Lightning: the handle as its scheduler, whose interval is an epoch; resuming; the monitor."""

from __future__ import annotations

import copy
import doctest
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.loggers.logger import DummyLogger
from torch.optim.lr_scheduler import LambdaLR

import fused_sched.integrations.lightning
from fused_sched import FusedScheduledAdam, schedules
from fused_sched.integrations.lightning import FusedLearningRateMonitor

RATE = schedules.linear(0.05, 0.0, 20)
BATCHES, EPOCHS = 4, 2

pytestmark = [
    # Lightning's advice about data loaders and folders, and deprecations of what it imports.
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.filterwarnings("error::fused_sched.ScheduleWarning"),
]


class Regression(pl.LightningModule):
    def __init__(self, fused: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))
        self.fused = fused

    def training_step(self, batch: Any, index: int) -> torch.Tensor:
        return self.body(batch[0]).pow(2).mean()

    def configure_optimizers(self) -> Any:
        if self.fused:
            optimizer: Any = FusedScheduledAdam(self.parameters(), lr=RATE, weight_decay=0.1)
            return {"optimizer": optimizer, "lr_scheduler": optimizer.scheduler()}
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.05, weight_decay=0.1)
        scheduler = LambdaLR(optimizer, lambda step: RATE(step) / 0.05)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


class Recorder(DummyLogger):
    """What a logger is given."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[dict[str, float]] = []

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.rows.append(metrics)


def fit(
    module: pl.LightningModule, folder: Path, epochs: int = EPOCHS, resume: str | None = None, **options: Any
) -> Any:
    options = {"logger": False, "callbacks": [], **options}
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        default_root_dir=folder,
        log_every_n_steps=1,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=any(isinstance(each, ModelCheckpoint) for each in options["callbacks"]),
        **options,
    )
    data = torch.utils.data.TensorDataset(torch.randn(2 * BATCHES, 6, generator=torch.Generator().manual_seed(1)))
    trainer.fit(module, torch.utils.data.DataLoader(data, batch_size=2), ckpt_path=resume)
    return trainer


def assert_close(a: torch.nn.Module, b: torch.nn.Module) -> None:
    for actual, expected in zip(a.parameters(), b.parameters(), strict=True):
        # Two orders of the same float32 operations, of weights below 1.
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-6)


def test_the_monitors_example_runs() -> None:
    assert doctest.testmod(fused_sched.integrations.lightning) == (0, 2)


def test_every_batch_is_an_update_whatever_the_interval(tmp_path: Path) -> None:
    ours, theirs = Regression(), Regression(fused=False)
    trainer = fit(ours, tmp_path)
    fit(theirs, tmp_path)
    optimizer = trainer.optimizers[0]
    assert optimizer.clock == BATCHES * EPOCHS
    assert trainer.lr_scheduler_configs[0].interval == "epoch"
    assert trainer.lr_scheduler_configs[0].scheduler.get_last_lr() == [RATE(BATCHES * EPOCHS - 1)]
    assert_close(ours, theirs)


def test_accumulated_batches_are_one_update(tmp_path: Path) -> None:
    ours, theirs = Regression(), Regression(fused=False)
    trainer = fit(ours, tmp_path, accumulate_grad_batches=2)
    fit(theirs, tmp_path, accumulate_grad_batches=2)
    assert trainer.optimizers[0].clock == BATCHES * EPOCHS // 2
    assert_close(ours, theirs)


def test_resumes_bit_for_bit(tmp_path: Path) -> None:
    straight = Regression()
    fit(straight, tmp_path)
    halfway = Regression()
    fit(halfway, tmp_path, epochs=1, callbacks=[ModelCheckpoint(dirpath=tmp_path, filename="half")])
    resumed = Regression()
    trainer = fit(resumed, tmp_path, resume=str(tmp_path / "half.ckpt"))
    assert trainer.optimizers[0].clock == BATCHES * EPOCHS
    for actual, expected in zip(resumed.parameters(), straight.parameters(), strict=True):
        assert torch.equal(actual, expected)


def test_monitor_shows_the_rate_that_was_used(tmp_path: Path) -> None:
    recorder = Recorder()
    fit(Regression(), tmp_path, logger=recorder, callbacks=[FusedLearningRateMonitor(logging_interval="step")])
    rates = [row["lr-FusedScheduledAdam"] for row in recorder.rows if "lr-FusedScheduledAdam" in row]
    # At the start of each batch: the rate of the latest update, and before the first one the rate it will use.
    assert rates == [RATE(0), *(RATE(step) for step in range(BATCHES * EPOCHS - 1))]


def test_monitor_shows_other_optimizers_as_lightning_does(tmp_path: Path) -> None:
    rows = []
    for monitor in (FusedLearningRateMonitor, LearningRateMonitor):
        recorder = Recorder()
        fit(Regression(fused=False), tmp_path, logger=recorder, callbacks=[monitor(logging_interval="step")])
        rows.append(copy.deepcopy(recorder.rows))
    assert rows[0] == rows[1] != []
