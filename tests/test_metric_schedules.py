"""Rates that follow metrics as values: against torch's and transformers' schedulers, exactly; refusals, storage."""

from __future__ import annotations

import pickle
import warnings
from math import inf, nan
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from metric_samples import BOTH, METRICS
from torch.optim.lr_scheduler import ReduceLROnPlateau as TorchPlateau
from transformers.optimization import GreedyLR as TransformersGreedy

from fused_sched import backends, metric_rule, reference_metric, schedules
from fused_sched._warnings import ScheduleWarning
from fused_sched.schedules.metric import GreedyLR, MetricSchedule, ReduceLROnPlateau

LIBRARY = {ReduceLROnPlateau: TorchPlateau, GreedyLR: TransformersGreedy}


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
