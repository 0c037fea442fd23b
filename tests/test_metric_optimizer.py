"""Rates that follow metrics through the optimizer: its groups, clock, checkpoints, copies and devices."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Iterator
from math import inf, nan
from typing import Any

import numpy as np
import pytest
import torch
from cases import same_bits
from conftest import Backend
from golden import records, schedules_from_record
from metric_samples import BOTH, GREEDY, METRICS, PLATEAU
from test_lr import moved, sign_descent, update
from waiting import without_waiting

from fused_sched import FusedScheduledAdam, metric_rule, schedules
from fused_sched._warnings import ScheduleWarning
from fused_sched.machine import Machine
from fused_sched.schedules.metric import ReduceLROnPlateau


def rates(optimizer: FusedScheduledAdam, metrics: list[float]) -> Iterator[float]:
    """The rate of each update, each followed by a report."""
    for metric in metrics:
        yield moved(optimizer)
        optimizer.report_metric(torch.tensor(metric, dtype=torch.float64))


@pytest.mark.parametrize("record", [pytest.param(record, id=name) for name, record in records() if "metrics" in record])
def test_recorded_rates_through_the_optimizer(record: dict[str, Any], backend: Backend) -> None:
    optimizer = sign_descent(backend, schedules_from_record(record)["lr"])
    for metric, rate in zip(record["metrics"], record["lr"], strict=True):
        assert moved(optimizer) == rate
        optimizer.report_metric(metric)


@BOTH
def test_update_uses_the_replayed_rate(schedule: Any, backend: Backend) -> None:
    optimizer = sign_descent(backend, schedule)
    assert optimizer.last_lr() == [0.1]
    for index, rate in enumerate(schedule.replay(METRICS)):
        assert moved(optimizer) == rate
        assert optimizer.last_lr() == optimizer.last_lr(sync=True) == [rate]
        assert optimizer.lr_tensor.tolist() == [rate]
        optimizer.report_metric(METRICS[index])
        assert optimizer.last_lr() == [rate]  # of the latest update
    assert optimizer.param_groups[0]["lr"] == 0.1


@pytest.mark.parametrize(
    "metric",
    [2, 2.0, np.float32(2.0), torch.tensor(2), torch.tensor([[2.0]]), torch.tensor(2.0, dtype=torch.bfloat16),
     torch.tensor(2.0, dtype=torch.float16), torch.nn.Parameter(torch.tensor(2.0))],
    ids=lambda metric: f"{type(metric).__name__} {getattr(metric, 'dtype', '')}",
)  # fmt: skip
def test_any_scalar_is_a_metric(metric: Any, backend: Backend) -> None:
    optimizer = sign_descent(backend, ReduceLROnPlateau(factor=0.5, patience=0, threshold=0.0, base_lr=0.1))
    for reported, rate in ((metric, 0.1), (1.999, 0.1), (metric, 0.05)):
        optimizer.report_metric(reported)
        assert moved(optimizer) == rate
    if isinstance(metric, torch.Tensor) and metric.requires_grad:
        assert metric.grad is None


@pytest.mark.parametrize(
    ("metric", "error", "message"),
    [
        (torch.ones(2), ValueError, r"must be one real number, got shape \(2,\) of torch.float32; reduce it"),
        (torch.ones((), dtype=torch.complex64), ValueError, "must be one real number.*complex64"),
        ("0.5", TypeError, "a tensor of one element or a number, got '0.5' of type str"),
        (True, TypeError, "a tensor of one element or a number, got True"),
        (None, TypeError, "a tensor of one element or a number, got None"),
    ],
)
def test_what_is_no_metric(metric: Any, error: type[Exception], message: str, backend: Backend) -> None:
    optimizer = sign_descent(backend, PLATEAU)
    before = optimizer.state_dict()["param_groups"][0]["metric_state"]
    with pytest.raises(error, match=message):
        optimizer.report_metric(metric)
    assert torch.equal(optimizer.state_dict()["param_groups"][0]["metric_state"], before)


def test_nothing_follows_metrics(backend: Backend) -> None:
    optimizer = sign_descent(backend, schedules.constant(0.1))
    with pytest.raises(RuntimeError, match=r"no group has one; pass a schedule such as lr=schedules\.torch\.Reduce"):
        optimizer.report_metric(1.0)


def test_only_the_lr_follows_metrics() -> None:
    p = torch.zeros(2)
    for options in ({"betas": (PLATEAU, 0.999)}, {"betas": (0.9, PLATEAU)}, {"weight_decay": PLATEAU}):
        with pytest.raises(ValueError, match=r"cannot follow metrics.*only lr can"):
            FusedScheduledAdam([p], **options)
    optimizer = FusedScheduledAdam([p])
    with pytest.raises(ValueError, match="weight_decay cannot follow metrics"):
        optimizer.set_schedule(PLATEAU, hyperparameter="weight_decay")


def test_groups_are_on_their_own(backend: Backend) -> None:
    """Each group has a machine, also two of one schedule; the others' rates are what they were."""
    lrs = [PLATEAU, schedules.linear(1.0, 0.0, 10), GREEDY, PLATEAU, 0.25]
    groups = [{"params": [backend.parameter([0.0])], "lr": lr} for lr in lrs]
    optimizer = backend.optimizer(groups, lr=1.0)
    plateau, greedy = PLATEAU.replay(METRICS), GREEDY.replay(METRICS)
    for index, metric in enumerate(METRICS):
        if index == 10:
            optimizer.set_schedule(PLATEAU, group=3)
            optimizer.add_param_group({"params": [backend.parameter([0.0])], "lr": GREEDY})
            restarted, added = PLATEAU.replay(METRICS[10:]), GREEDY.replay(METRICS[10:])
        update(optimizer)
        later = index - 10
        third = plateau[index] if later < 0 else restarted[later]
        fifth = [] if later < 0 else [added[later]]
        expected = [plateau[index], max(0.0, 1.0 - index / 10), greedy[index], third, 0.25, *fifth]
        assert optimizer.last_lr() == pytest.approx(expected, rel=1e-15, abs=1e-16)  # the line's own rounding
        optimizer.report_metric(metric)


def test_reports_and_steps_count_apart(backend: Backend) -> None:
    """Skipped steps, no step and a moved clock neither advance the rate nor hold it back."""
    metrics = [1.0, 1.0, 1.0, 1.0]
    expected = ReduceLROnPlateau(factor=0.5, patience=0, base_lr=0.1).replay([*metrics, 1.0])[-1]
    optimizer = sign_descent(backend, ReduceLROnPlateau(factor=0.5, patience=0, base_lr=0.1))
    optimizer.report_metric(metrics[0])  # before any step
    optimizer.report_metric(metrics[1])
    optimizer.found_inf = torch.ones((), device=backend.device)
    update(optimizer)
    optimizer.report_metric(metrics[2])
    del optimizer.found_inf
    optimizer.set_clock(1000)
    optimizer.report_metric(metrics[3])
    assert moved(optimizer) == expected
    assert optimizer.clock == 1001


def test_scaling_group_lr_scales_the_rate(backend: Backend) -> None:
    optimizer = sign_descent(backend, PLATEAU)
    for index, rate in enumerate(PLATEAU.replay(METRICS)):
        if index == 4:
            optimizer.param_groups[0]["lr"] *= 0.5  # exact
        assert moved(optimizer) == (rate if index < 4 else 0.5 * rate)
        optimizer.report_metric(METRICS[index])


def test_set_schedule_starts_over(backend: Backend) -> None:
    optimizer = sign_descent(backend, PLATEAU)
    first = list(rates(optimizer, METRICS))
    optimizer.set_schedule(0.01, hyperparameter="weight_decay")
    optimizer.set_schedule(0.0, hyperparameter="weight_decay")
    assert moved(optimizer) == min(first) < 0.1  # another hyperparameter's schedule is none of its business
    optimizer.set_schedule(PLATEAU)
    assert list(rates(optimizer, METRICS)) == first
    optimizer.set_schedule(GREEDY)
    assert list(rates(optimizer, METRICS)) == GREEDY.replay(METRICS)
    optimizer.set_schedule(schedules.constant(0.5))
    assert moved(optimizer) == 0.5
    with pytest.raises(RuntimeError, match="no group has one"):
        optimizer.report_metric(1.0)


@BOTH
@pytest.mark.parametrize("portable", [False, True])
def test_checkpoint_in_the_middle(schedule: Any, portable: bool, backend: Backend) -> None:
    optimizer = sign_descent(backend, schedule)
    expected = schedule.replay(METRICS)
    assert list(rates(optimizer, METRICS[:9])) == expected[:9]
    buffer = io.BytesIO()
    torch.save(optimizer.state_dict(portable=portable), buffer)
    buffer.seek(0)
    other = sign_descent(backend, schedule)
    list(rates(other, METRICS[5:]))
    address = other._records[0].machine.on(backend.device).data_ptr()
    other.load_state_dict(torch.load(buffer, weights_only=True))
    assert other._records[0].machine.on(backend.device).data_ptr() == address
    assert other.last_lr() == [expected[9]]
    assert list(rates(other, METRICS[9:])) == expected[9:]
    assert list(rates(optimizer, METRICS[9:])) == expected[9:]


@BOTH
def test_copies_go_on(schedule: Any, backend: Backend) -> None:
    optimizer = sign_descent(backend, schedule)
    expected = schedule.replay(METRICS)
    list(rates(optimizer, METRICS[:9]))
    for twin in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        assert list(rates(twin, METRICS[9:])) == expected[9:]
    assert moved(optimizer) == expected[9]


def test_distributed_checkpoint_of_torch(backend: Backend) -> None:
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

    def made() -> tuple[torch.nn.Module, FusedScheduledAdam]:
        module = torch.nn.Linear(1, 1).to(backend.device)
        return module, backend.optimizer(module.parameters(), lr=GREEDY)

    module, optimizer = made()
    for metric in METRICS[:9]:
        update(optimizer)
        optimizer.report_metric(metric)
    other_module, other = made()
    set_optimizer_state_dict(other_module, other, copy.deepcopy(get_optimizer_state_dict(module, optimizer)))
    assert other.last_lr() == [GREEDY.replay(METRICS)[9]]


def test_state_of_another_rule_starts_over(backend: Backend) -> None:
    saved = sign_descent(backend, GREEDY)
    list(rates(saved, METRICS))
    optimizer = sign_descent(backend, PLATEAU)
    list(rates(optimizer, METRICS))
    with pytest.warns(ScheduleWarning) as caught:
        optimizer.load_state_dict(saved.state_dict())
    said = [str(warning.message) for warning in caught]
    assert [text for text in said if "another schedule for lr" in text]
    assert [text for text in said if "starts over: torch.ReduceLROnPlateau" in text]
    assert list(rates(optimizer, METRICS)) == PLATEAU.replay(METRICS)


@pytest.mark.parametrize("place", ["window_length", "window_oldest"])
@pytest.mark.parametrize("value", [nan, inf, -1.0, 3.5, 4.0, 1e300])
def test_state_that_points_outside_its_window_starts_over(place: str, value: float, backend: Backend) -> None:
    optimizer = sign_descent(backend, GREEDY)
    list(rates(optimizer, METRICS))
    state_dict = optimizer.state_dict()
    state_dict["param_groups"][0]["metric_state"][metric_rule.STATE["greedy"].index(place)] = value
    with pytest.warns(ScheduleWarning, match="starts over"):
        optimizer.load_state_dict(state_dict)
    assert list(rates(optimizer, METRICS)) == GREEDY.replay(METRICS)


def test_checkpoint_without_a_machine_starts_over(backend: Backend) -> None:
    optimizer = sign_descent(backend, PLATEAU)
    assert list(rates(optimizer, METRICS))[-1] < 0.1
    theirs = torch.optim.AdamW(optimizer.param_groups[0]["params"], lr=0.7, eps=0.0, betas=(0.0, 0.0))
    optimizer.load_state_dict(theirs.state_dict())
    assert list(rates(optimizer, METRICS)) == PLATEAU.replay(METRICS)


def test_torch_loads_our_checkpoint(backend: Backend) -> None:
    optimizer = sign_descent(backend, PLATEAU)
    list(rates(optimizer, METRICS))
    theirs = torch.optim.AdamW(optimizer.param_groups[0]["params"])
    theirs.load_state_dict(optimizer.state_dict(portable=True))
    update(theirs)


def test_engines_advance_their_own_copies() -> None:
    """Two devices' engines, of which one computes on the host for want of float64."""
    optimizer = sign_descent(Backend("reference", torch.device("cpu")), GREEDY)
    expected = GREEDY.replay(METRICS)
    list(rates(optimizer, METRICS[:6]))
    optimizer._devices.engine(torch.device("mps"))
    assert list(rates(optimizer, METRICS[6:])) == expected[6:]
    machine = optimizer._records[0].machine
    first, second = machine.on(torch.device("cpu")), machine.on(torch.device("mps"))
    assert first.data_ptr() != second.data_ptr()
    assert same_bits(first, second)


def test_a_machine_moves_with_its_parameters() -> None:
    machine = Machine(PLATEAU)
    here, there = torch.device("cpu"), torch.device("mps")
    machine.on(here)[0] = 0.25
    assert machine.on(there)[0] == 0.25
    machine.forget(here)
    machine.on(there)[0] = 0.125
    assert machine.rate() == 0.125
    assert machine.on(here)[0] == 0.125
    machine.forget(there)
    machine.forget(here)
    assert machine.rate() == 0.125


def test_reports_do_not_wait(compiled: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    optimizer = sign_descent(compiled, GREEDY)
    update(optimizer)
    metrics = [torch.tensor(metric, device=compiled.device) for metric in METRICS]
    optimizer.report_metric(metrics[0])

    def wait(*args: Any) -> Any:
        raise AssertionError("waited for the device")

    with without_waiting(compiled.device), monkeypatch.context() as patch:
        for name in ("item", "tolist", "cpu", "numpy", "__float__", "__bool__"):
            patch.setattr(torch.Tensor, name, wait)
        for metric in metrics[1:5]:
            optimizer.step()
            optimizer.report_metric(metric)
    assert moved(optimizer) == GREEDY.replay(METRICS)[5]


@pytest.mark.cuda
def test_reports_in_a_captured_graph(get_backend: Any) -> None:
    backend = get_backend("cuda")
    optimizer = sign_descent(backend, PLATEAU)
    param = optimizer.param_groups[0]["params"][0]
    metric = torch.zeros((), device=backend.device)
    update(optimizer)  # allocates
    optimizer.set_schedule(PLATEAU)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step()
        optimizer.report_metric(metric)
        with pytest.raises(RuntimeError, match="would record the metric's value"):
            optimizer.report_metric(1.0)

    def replayed() -> list[float]:
        used = []
        for value in METRICS:
            param.data.zero_()
            metric.fill_(value)
            graph.replay()
            used.append(-float(param.detach()))
        return used

    assert replayed() == PLATEAU.replay(METRICS)
    optimizer.set_schedule(GREEDY)
    assert replayed() == GREEDY.replay(METRICS)
    optimizer.report_metric(1.0)  # loads the kernel that fills in a number
    with without_waiting(backend.device):
        optimizer.report_metric(metric)
        optimizer.report_metric(1.0)
