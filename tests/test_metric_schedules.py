"""Rates that follow metrics: against torch's and transformers' schedulers, exactly, and through the optimizer."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from collections.abc import Iterator
from math import inf, nan
from typing import Any

import numpy as np
import pytest
import torch
from cases import same_bits
from conftest import Backend
from golden import records
from hypothesis import given, settings
from hypothesis import strategies as st
from test_lr import moved, sign_descent, update
from torch.optim.lr_scheduler import ReduceLROnPlateau as TorchPlateau
from transformers.optimization import GreedyLR as TransformersGreedy

from fused_sched import FusedScheduledAdam, backends, metric_rule, reference_metric, schedules
from fused_sched._warnings import ScheduleWarning
from fused_sched.machine import Machine
from fused_sched.schedules.metric import GreedyLR, MetricSchedule, ReduceLROnPlateau

LIBRARY = {ReduceLROnPlateau: TorchPlateau, GreedyLR: TransformersGreedy}

PLATEAU = ReduceLROnPlateau(factor=0.5, patience=1, cooldown=1, base_lr=0.1)
GREEDY = GreedyLR(factor=0.5, patience=1, warmup=1, smooth=True, window_size=3, min_lr=0.01, base_lr=0.1)
BOTH = pytest.mark.parametrize("schedule", [PLATEAU, GREEDY], ids=["plateau", "greedy"])
METRICS = [3.0, 2.0, 2.5, 2.25, 2.5, 1.5, 1.0, 0.5, 0.25, 2.0, 3.0, nan, 3.0, 4.0, 5.0, -1.0, inf, 2.0, 2.0, 2.0]


# -- the libraries' own values ---------------------------------------------------------------------------------------


def with_arguments(kind: type, **config: Any) -> st.SearchStrategy[Any]:
    shared = {
        "base_lr": st.floats(1e-6, 1.0),
        "mode": st.sampled_from(["min", "max"]),
        "factor": st.floats(0.01, 0.999),
        "patience": st.integers(0, 4) | st.floats(-1.0, 4.0),
        "threshold": st.sampled_from([0.0, 1e-4, 0.1, 1.0, -0.05]),
        "threshold_mode": st.sampled_from(["rel", "abs"]),
        "cooldown": st.integers(0, 3) | st.just(1.5),
        "min_lr": st.just(0) | st.floats(0.0, 0.2),
        "eps": st.sampled_from([1e-8, 0.0, 1e-3]),
    }
    return st.fixed_dictionaries({"base_lr": shared.pop("base_lr")}, optional={**shared, **config}).map(
        lambda arguments: (kind, arguments)
    )


CONFIGURATIONS = with_arguments(ReduceLROnPlateau) | with_arguments(
    GreedyLR,
    warmup=st.integers(0, 3),
    max_lr=st.floats(0.1, 2.0) | st.just(inf),
    smooth=st.booleans(),
    window_size=st.integers(1, 5) | st.just(2.5),
    reset_start=st.integers(0, 3),
)
#: Ties, slow progress and sudden changes, and what is no progress at all.
METRIC_LISTS = st.lists(
    st.sampled_from([1.0, 0.99, 0.5, 2.0, 0.0, -1.0]) | st.floats(-2.0, 2.0) | st.sampled_from([nan, inf, -inf]),
    max_size=60,
)


def made(kind: type[MetricSchedule], arguments: dict[str, Any]) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ScheduleWarning)  # of bounds that cross
        return kind(**arguments)


def live_rates(kind: type[MetricSchedule], arguments: dict[str, Any], metrics: list[float]) -> list[float]:
    config = dict(arguments)
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=config.pop("base_lr"))
    scheduler = LIBRARY[kind](optimizer, **config)  # type: ignore[index]
    rates = []
    for metric in metrics:
        rates.append(optimizer.param_groups[0]["lr"])
        scheduler.step(metric)
    return rates


@given(CONFIGURATIONS, METRIC_LISTS)
@settings(max_examples=400, deadline=None)
def test_replay_is_the_library(
    configuration: tuple[type[MetricSchedule], dict[str, Any]], metrics: list[float]
) -> None:
    schedule = made(*configuration)
    expected = live_rates(*configuration, metrics)
    assert schedule.replay(metrics) == expected
    assert reference_metric.replay(schedule.rule, schedule.initial_state(), metrics) == expected


@pytest.mark.parametrize("kind", LIBRARY)
def test_defaults_are_the_library(kind: type[MetricSchedule]) -> None:
    rng = np.random.default_rng(3)
    metrics = (1.0 / np.arange(1, 2001) + 0.1 * rng.standard_normal(2000)).tolist()
    got = made(kind, {"base_lr": 0.01}).replay(metrics)
    assert got == live_rates(kind, {"base_lr": 0.01}, metrics)
    assert len(set(got)) > 5


@pytest.mark.parametrize("record", [pytest.param(record, id=name) for name, record in records() if "metrics" in record])
def test_recorded_rates_through_the_optimizer(record: dict[str, Any], backend: Backend) -> None:
    config = dict(record["config"])
    kind = GreedyLR if record["schedule"] == "greedy" else ReduceLROnPlateau
    optimizer = sign_descent(backend, made(kind, {"base_lr": config.pop("lr"), **config}))
    for metric, rate in zip(record["metrics"], record["lr"], strict=True):
        assert moved(optimizer) == rate
        optimizer.report_metric(metric)


def test_a_running_torch_scheduler_goes_on() -> None:
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.1)
    live = TorchPlateau(optimizer, factor=0.5, patience=2, cooldown=4)
    for metric in METRICS[:9]:
        live.step(metric)
    ours = ReduceLROnPlateau(
        factor=0.5, patience=2, cooldown=4, base_lr=optimizer.param_groups[0]["lr"], best=live.best,
        num_bad_epochs=live.num_bad_epochs, cooldown_counter=live.cooldown_counter,
    )  # fmt: skip
    expected = []
    for metric in METRICS[9:]:
        expected.append(optimizer.param_groups[0]["lr"])
        live.step(metric)
    assert ours.replay(METRICS[9:]) == expected
    assert len(set(expected)) > 1


# -- the schedules as values -----------------------------------------------------------------------------------------


@BOTH
def test_round_trips(schedule: Any) -> None:
    names = {"torch": schedules.torch, "transformers": type("module", (), {"GreedyLR": GreedyLR})}
    assert eval(repr(schedule), names) == schedule
    for twin in (schedules.Schedule.from_dict(schedule.to_dict()), pickle.loads(pickle.dumps(schedule))):
        assert twin == schedule
        assert hash(twin) == hash(schedule)
        assert twin.replay(METRICS) == schedule.replay(METRICS)
    assert schedule.reference == 0.1
    assert schedule.replay([]) == []


@BOTH
@pytest.mark.parametrize(
    "use",
    [
        lambda s: s(0),
        lambda s: s([0, 1]),
        lambda s: s.program,
        lambda s: s.held_from(),
        lambda s: s.plot(),
        lambda s: s * schedules.constant(1.0),
        lambda s: schedules.constant(1.0) * s,
        lambda s: s.scaled(2.0),
        lambda s: s.shifted(2),
        lambda s: s.repeat(2),
        lambda s: schedules.join([s, schedules.constant(1.0)], [5]),
        lambda s: schedules.from_callable(s, 10),
    ],
)
def test_is_no_function_of_the_step(schedule: Any, use: Any) -> None:
    with pytest.raises(TypeError, match=r"depends on the metrics.*replay\(metrics\)"):
        use(schedule)


@pytest.mark.parametrize("kind", LIBRARY)
@pytest.mark.parametrize(
    "arguments", [{"factor": 1.0}, {"factor": 2}, {"mode": "auto"}, {"threshold_mode": "relative"}], ids=repr
)
def test_refuses_what_the_library_refuses(kind: Any, arguments: dict[str, Any]) -> None:
    with pytest.raises(ValueError):  # noqa: PT011
        LIBRARY[kind](torch.optim.SGD([torch.zeros(1)], lr=0.1), **arguments)
    with pytest.raises(ValueError, match=f"{kind.word}: {next(iter(arguments))} must be .*, got "):
        kind(**arguments, base_lr=0.1)


@pytest.mark.parametrize(
    ("kind", "arguments", "error", "message"),
    [
        (ReduceLROnPlateau, {"min_lr": [0.1, 0.2]}, TypeError, "min_lr must be a number.*give each group its own"),
        (GreedyLR, {"max_lr": (1.0,)}, TypeError, "max_lr must be a number.*give each group its own"),
        (ReduceLROnPlateau, {"patience": "3"}, TypeError, r"patience must be a number, got '3'; convert it"),
        (ReduceLROnPlateau, {"threshold": nan}, ValueError, "threshold must be a number, got nan"),
        (ReduceLROnPlateau, {"base_lr": -0.1}, ValueError, "base_lr must be at least 0, got -0.1"),
        (GreedyLR, {"base_lr": inf}, ValueError, "base_lr must be finite, got inf"),
        (GreedyLR, {"smooth": True, "window_size": 1e9}, ValueError, r"window_size must be at most 2\*\*20 metrics"),
    ],
)
def test_refuses(kind: Any, arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^{kind.word}: {message}"):
        kind(**{"base_lr": 0.1, **arguments})


@pytest.mark.parametrize(
    ("kind", "arguments", "message"),
    [
        (ReduceLROnPlateau, {"factor": -0.5}, "factor=-0.5 is negative"),
        (GreedyLR, {"factor": 0.0}, "factor=0.0 is not positive"),
        (GreedyLR, {"smooth": True, "window_size": 0}, "window_size=0 holds no metric"),
        (GreedyLR, {"base_lr": 1e-4}, "min_lr=0.001 is above base_lr=0.0001"),
        (GreedyLR, {"verbose": True}, "verbose=True prints nothing"),
    ],
)
def test_says_what_is_odd(kind: Any, arguments: dict[str, Any], message: str) -> None:
    with pytest.warns(ScheduleWarning, match=f"^{kind.word}: {message}"):
        schedule = kind(**{"base_lr": 0.1, **arguments})
    reference = reference_metric.replay(schedule.rule, schedule.initial_state(), METRICS)
    assert schedule.replay(METRICS) == reference


def test_compiled_code_of_other_rules_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    module = backends.select("cpu", torch.device("cpu")).module
    assert module is not None
    metric_rule.check_module(module)
    for table, entry in ((metric_rule.RULES, {"plateau": 7}), (metric_rule.STATE, {"greedy": ("lr", "best")})):
        with monkeypatch.context() as patch:
            for name, value in entry.items():
                patch.setitem(table, name, value)
            with pytest.raises(ImportError, match="disagree on the rules of metric-driven schedules"):
                metric_rule.check_module(module)


# -- through the optimizer -------------------------------------------------------------------------------------------


def rates(optimizer: FusedScheduledAdam, metrics: list[float]) -> Iterator[float]:
    """The rate of each update, each followed by a report."""
    for metric in metrics:
        yield moved(optimizer)
        optimizer.report_metric(torch.tensor(metric, dtype=torch.float64))


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

    with monkeypatch.context() as patch:
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
    torch.cuda.set_sync_debug_mode("error")
    try:
        optimizer.report_metric(metric)
        optimizer.report_metric(1.0)
    finally:
        torch.cuda.set_sync_debug_mode("default")
