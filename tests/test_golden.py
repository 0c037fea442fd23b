"""Every recorded learning rate of every library, on the host and through the clock of every backend."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Backend
from golden import records, schedules_from_record
from tolerances import evaluators_bound, library_tolerance

from fused_sched import reference_schedule, schedules
from fused_sched._warnings import ScheduleWarning
from fused_sched.program import unpack

RECORDS = [pytest.param(record, id=name) for name, record in records()]
by_step = pytest.mark.parametrize(
    "record", [p for p in RECORDS if "metrics" not in p.values[0] and "lr" in p.values[0]]
)
by_metric = pytest.mark.parametrize("record", [p for p in RECORDS if "metrics" in p.values[0]])
HYPERPARAMETERS = ("lr", "momentum", "weight_decay")

#: A program's bytes without its tables.
MOST_PROGRAM_BYTES = 4096


def assert_close(got: Any, record: dict[str, Any], hyperparameter: str) -> None:
    expected = np.array(record[hyperparameter])
    assert np.abs(np.asarray(got) - expected).max() <= library_tolerance(record["library"]) * np.abs(expected).max(), (
        hyperparameter
    )


@by_step
def test_recorded_values(record: dict[str, Any]) -> None:
    ours = schedules_from_record(record)
    assert set(ours) == {name for name in HYPERPARAMETERS if name in record}
    for name, schedule in ours.items():
        assert_close(schedule(record["steps"]), record, name)


@by_step
def test_programs_are_small(record: dict[str, Any]) -> None:
    for schedule in schedules_from_record(record).values():
        assert unpack(schedule.program) == schedule.tree
        table_bytes = 8 * int(np.frombuffer(schedule.program, np.int32)[3])
        assert len(schedule.program) - table_bytes <= MOST_PROGRAM_BYTES


@by_step
def test_recorded_values_through_the_clock(record: dict[str, Any], backend: Backend) -> None:
    """The device's evaluator gives the host's bits, through a whole step."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ScheduleWarning)  # of the rates that turn negative
        lr = schedules.join([schedules_from_record(record)["lr"]], [])  # the rate alone: some momenta exceed 1
        opt = backend.optimizer([backend.parameter([0.0])], lr=lr)
    opt.param_groups[0]["params"][0].grad = torch.zeros(1, device=backend.device)
    used = []
    for step in record["steps"]:
        opt.set_clock(step)
        opt.step()
        used.append(float(opt.lr_tensor[0]))
    assert used == lr(record["steps"]).tolist()
    assert_close(used, record, "lr")


@by_step
def test_the_python_evaluator_agrees(record: dict[str, Any]) -> None:
    for schedule in schedules_from_record(record).values():
        compiled = schedule(record["steps"])
        interpreted = [reference_schedule.value(schedule.tree, float(t)) for t in record["steps"]]
        assert np.abs(compiled - interpreted).max() <= evaluators_bound(compiled)


@pytest.mark.parametrize("record", [p for p in RECORDS if "lr" not in p.values[0]])
def test_a_constructor_that_raises(record: dict[str, Any]) -> None:
    with pytest.raises(Exception) as caught:  # noqa: PT011
        schedules_from_record(record)
    assert type(caught.value).__name__ == record["raises"]["type"]


@by_metric
def test_recorded_reactions_to_metrics(record: dict[str, Any]) -> None:
    lr = schedules_from_record(record)["lr"]
    assert lr.replay(record["metrics"]) == record["lr"]
