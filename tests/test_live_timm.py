"""timm's schedules against timm's own code, on configurations that hypothesis draws."""

from __future__ import annotations

import copy
import importlib
import importlib.util
import json
import math
import pickle
import sys
import warnings
from collections.abc import Iterable
from fractions import Fraction
from functools import cache
from types import ModuleType
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import ROUNDING

from fused_sched import schedules
from fused_sched._warnings import ScheduleWarning
from fused_sched.schedules import Schedule

MODULES = {
    "CosineLRScheduler": "cosine_lr",
    "MultiStepLRScheduler": "multistep_lr",
    "PolyLRScheduler": "poly_lr",
    "StepLRScheduler": "step_lr",
    "TanhLRScheduler": "tanh_lr",
    "WSDLRScheduler": "wsd_lr",
}
CYCLES = ("CosineLRScheduler", "PolyLRScheduler", "TanhLRScheduler")
Config = dict[str, Any]


@cache
def live_class(name: str) -> Any:
    """timm's class. The files are loaded without timm/__init__.py, which needs torchvision."""
    found = importlib.util.find_spec("timm")
    if found is None or not found.submodule_search_locations:
        pytest.skip("timm is not installed")
    packages = {"timm": ModuleType("timm"), "timm.scheduler": ModuleType("timm.scheduler")}
    packages["timm"].__path__ = list(found.submodule_search_locations)
    packages["timm.scheduler"].__path__ = [f"{folder}/scheduler" for folder in found.submodule_search_locations]
    with mock.patch.dict(sys.modules, packages):
        return getattr(importlib.import_module(f"timm.scheduler.{MODULES[name]}"), name)


class Live:
    """timm's scheduler on an optimizer, stepped as its training loop does."""

    def __init__(self, name: str, config: Config) -> None:
        arguments = dict(config)
        self.every = arguments.pop("updates_per_epoch", None)
        self.optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=arguments.pop("base_lr"))
        self.scheduler = live_class(name)(self.optimizer, t_in_epochs=self.every is not None, **arguments)
        self.first = self.optimizer.param_groups[0]["lr"]

    def rate(self, update: int) -> float:
        t = update // (self.every or 1)
        if t == 0:
            return self.first
        if self.every is None:
            self.scheduler.step_update(t)
        else:
            self.scheduler.step(t)
        return self.optimizer.param_groups[0]["lr"]


def ours(name: str, config: Config) -> schedules.timm.TimmSchedule:
    """This package's schedule, without its warnings."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ScheduleWarning)
        return getattr(schedules.timm, name)(**config, t_in_epochs="updates_per_epoch" in config)


def restarts(config: Config) -> dict[int, float]:
    """Updates at which a cycle begins exactly, by rational arithmetic, and their rates."""
    growth, length = Fraction(str(config["cycle_mul"])), Fraction(config["t_initial"])
    begin = Fraction(config["warmup_t"] if config["warmup_prefix"] else 0)
    rates, low = {}, config["lr_min"]
    for cycle in range(1, config["cycle_limit"] + 1):
        begin += length
        length *= growth
        if begin.denominator == 1 and begin >= config["warmup_t"]:
            peak = config["base_lr"] * config["cycle_decay"] ** cycle if cycle < config["cycle_limit"] else low
            rates[int(begin)] = low + (peak - low) * 0.5 * (1.0 - math.tanh(config.get("lb", -math.inf)))
    return rates


def assert_as_live(name: str, config: Config, updates: Iterable[int]) -> None:
    live, schedule = Live(name, config), ours(name, config)
    every = config.get("updates_per_epoch", 1)
    # timm takes the number of the cycle from a rounded logarithm, so that some exact restarts are a step late.
    exact = restarts(config) if name in CYCLES and config["cycle_mul"] != 1.0 else {}
    compared, expected = [], []
    for update in updates:
        try:
            rate = exact[update // every] if update // every in exact else live.rate(update)
        except (ValueError, ZeroDivisionError):
            assert schedule.failure().update == update // every * every
            assert schedule(update) == schedule(update + 10**6) == schedule(update // every * every - 1)
            break
        compared.append(update)
        expected.append(rate)
    else:
        assert schedule.failure() is None or schedule.failure().update > max(updates)
    error = np.abs(schedule(compared) - np.array(expected))
    assert error.max() <= ROUNDING * np.abs(expected).max(), compared[int(np.argmax(error))]


rates = st.sampled_from([0.1, 1.0, 3e-4]) | st.floats(1e-6, 10.0)
fractions = st.integers(0, 100).map(lambda percent: percent / 100)  # no subnormal rates, which have few digits


@st.composite
def common(draw: st.DrawFn, lengths: st.SearchStrategy[int], prefix: bool = True) -> Config:
    lr = draw(rates)
    config = {"base_lr": lr, "warmup_t": draw(st.just(0) | lengths), "warmup_lr_init": draw(fractions) * lr}
    if prefix:
        config["warmup_prefix"] = draw(st.booleans())
    every = draw(st.sampled_from([None, None, 1, 3]))
    return config if every is None else {**config, "updates_per_epoch": every}


@st.composite
def cycles(draw: st.DrawFn, name: str, lengths: st.SearchStrategy[int], growths: list[float]) -> Config:
    config = draw(common(lengths))
    config |= {
        "t_initial": draw(lengths),
        "lr_min": draw(st.just(0.0) | fractions) * config["base_lr"],
        "cycle_mul": draw(st.sampled_from(growths)),
        "cycle_decay": draw(st.sampled_from([1.0, 0.5, 0.1])),
        "cycle_limit": draw(st.integers(0, 4)),
    }
    if name == "TanhLRScheduler":
        return config | {"lb": draw(st.sampled_from([-7.0, -3.0])), "ub": draw(st.sampled_from([3.0, 5.5]))}
    # A position that timm rounds to less than 0 has no fractional power.
    exponents = [1.0, 2.0] if config["cycle_mul"] % 1.0 else [1.0, 0.5, 1.7, 2.0]
    config["k_decay"] = draw(st.sampled_from(exponents))
    if name == "PolyLRScheduler":
        config["power"] = draw(st.sampled_from([0.5, 0.9, 1.0, 2.0, 3.3]))
    return config


SHORT = st.integers(1, 40)
#: Not longer, as 1 - u and its root lose digits at the end of a cycle: some 1e-16 * sqrt(length), 4e-14 here.
LONG = st.integers(1, 5_000)


@pytest.mark.parametrize("name", CYCLES)
@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_every_update_of_short_cycles(name: str, data: st.DataObject) -> None:
    config = data.draw(cycles(name, SHORT, [1.0, 1.0, 2.0, 3.0, 1.5, 1.25, 1.1, 0.5, 0.8]))
    last = 5 + config["warmup_t"] + min(300, sum(int(config["t_initial"] * config["cycle_mul"] ** c) for c in range(4)))
    try:
        Live(name, config)
    except ValueError:  # TanhLRScheduler asks for the rate at the warm-up's end
        with pytest.raises(ValueError, match="pass warmup_prefix=True"):
            ours(name, config)
        return
    assert_as_live(name, config, range(last * config.get("updates_per_epoch", 1)))


@pytest.mark.parametrize("name", CYCLES)
@settings(deadline=None, max_examples=30)
@given(data=st.data())
def test_boundaries_of_long_cycles(name: str, data: st.DataObject) -> None:
    config = data.draw(cycles(name, LONG, [1.0, 2.0, 3.0]))
    ends, begin = [config["warmup_t"]], config["warmup_t"] if config["warmup_prefix"] else 0
    for cycle in range(config["cycle_limit"] + 1):
        begin += int(config["t_initial"] * config["cycle_mul"] ** cycle)
        ends.append(begin)
    assert_as_live(name, config, around(ends, config))


def around(ends: list[int], config: Config) -> list[int]:
    """The updates beside each end, and the calls of timm's step beside it."""
    every = config.get("updates_per_epoch", 1)
    near = {max(0, end * every + k) for end in (0, *ends) for k in (-every - 1, -every, -1, 0, 1, every)}
    return sorted(near)


@settings(deadline=None, max_examples=60)
@given(
    common(SHORT), st.sampled_from([1, 7, 30, 2.5, 2.1, 0.3, 10 / 3, -20, -2.1]), st.sampled_from([1.0, 0.5, 0.9, 0.0])
)
def test_steps(config: Config, decay_t: float, decay_rate: float) -> None:
    config |= {"decay_t": decay_t, "decay_rate": decay_rate}
    assert_as_live("StepLRScheduler", config, range(120 * config.get("updates_per_epoch", 1)))


@settings(deadline=None, max_examples=60)
@given(common(SHORT), st.lists(st.integers(0, 90), max_size=8), st.sampled_from([0.5, 0.1, 0.0]), st.booleans())
def test_milestones(config: Config, milestones: list[int], decay_rate: float, in_order: bool) -> None:
    config |= {"decay_t": sorted(milestones) if in_order else milestones, "decay_rate": decay_rate}
    assert_as_live("MultiStepLRScheduler", config, range(140 * config.get("updates_per_epoch", 1)))


@st.composite
def wsd(draw: st.DrawFn, lengths: st.SearchStrategy[int]) -> Config:
    config = draw(common(lengths, prefix=False))
    length = draw(lengths)
    stable = draw(st.sampled_from(["constant", "rsqrt", "power"]))
    config |= {
        "t_initial": length,
        "decay_t": draw(st.integers(1, length)),
        "lr_min": draw(st.sampled_from([0.0, 1.5]) | fractions) * config["base_lr"],
        "stable_fn": stable,
        "stable_power": draw(st.floats(0.1, 2.0)),
        "decay_fn": draw(st.sampled_from(["linear", "1-sqrt", "cosine", "power", "exp"])),
        "decay_power": draw(st.floats(0.2, 3.0)),
        "decay_ratio": draw(st.floats(0.01, 0.9)),
    }
    if stable != "constant" and (config["warmup_t"] == 0 or draw(st.booleans())):
        config["stable_timescale"] = draw(st.floats(0.5, 1000.0))
    return config


@settings(deadline=None, max_examples=80)
@given(wsd(SHORT))
def test_every_update_of_a_short_wsd(config: Config) -> None:
    last = config["warmup_t"] + config["t_initial"] + 4
    assert_as_live("WSDLRScheduler", config, range(last * config.get("updates_per_epoch", 1)))


@settings(deadline=None, max_examples=40)
@given(wsd(LONG))
def test_boundaries_of_a_long_wsd(config: Config) -> None:
    total = config["warmup_t"] + config["t_initial"]
    assert_as_live("WSDLRScheduler", config, around([config["warmup_t"], total - config["decay_t"], total], config))


# What timm does that one may not expect, each once by itself.


def plain(name: str, *args: Any, **options: Any) -> Schedule:
    return getattr(schedules.timm, name)(*args, **{"base_lr": 0.1, "t_in_epochs": False, **options})


def test_update_0_uses_the_optimizers_rate() -> None:
    assert plain("TanhLRScheduler", 20)([0, 1]).tolist() == [0.1, pytest.approx(0.1, rel=1e-5)]
    assert plain("TanhLRScheduler", 20)(1) < 0.0999999
    assert plain("MultiStepLRScheduler", [1, 10], 0.5)([0, 1, 8, 9]).tolist() == [0.1, 0.05, 0.05, 0.025]
    epochs = plain("MultiStepLRScheduler", [1], 0.5, t_in_epochs=True, updates_per_epoch=4)
    assert epochs([0, 3, 4]).tolist() == [0.1, 0.1, 0.05]


def test_restarts_come_on_time() -> None:
    """At update 100 * 1 + 100 * 1.1 = 210 the third cycle begins, though 100 * 1.1 is more than 110 in binary."""
    assert plain("CosineLRScheduler", 100, cycle_mul=1.1, cycle_limit=3)(210) == 0.1
    config = {"base_lr": 0.1, "t_initial": 5, "cycle_mul": 3.0, "cycle_limit": 9}
    assert ours("CosineLRScheduler", config)([5, 20, 65, 200, 605, 1820]).tolist() == [0.1] * 6
    # timm's logarithm makes 605 = 5 * (1 + 3 + 9 + 27 + 81) the end of the cycle before.
    assert Live("CosineLRScheduler", config).rate(605) < 1e-15


@pytest.mark.parametrize(
    ("name", "args", "options"),
    [
        ("CosineLRScheduler", (100,), {"warmup_t": 5, "warmup_lr_init": 1e-5, "lr_min": 1e-5}),
        ("CosineLRScheduler", (20,), {"cycle_limit": 4, "cycle_decay": 0.5, "cycle_mul": 2.0}),
        ("TanhLRScheduler", (20,), {"warmup_t": 5}),
        ("PolyLRScheduler", (20,), {"warmup_t": 3, "warmup_prefix": True, "k_decay": 1.5}),
        ("StepLRScheduler", (30,), {}),
        ("MultiStepLRScheduler", ([30, 60], 0.1), {"warmup_t": 5}),
        ("WSDLRScheduler", (100, 20), {"warmup_t": 10, "stable_fn": "rsqrt", "lr_min": 0.01}),
    ],
)
def test_ordinary_use_does_not_warn_and_is_stored(name: str, args: tuple[Any, ...], options: Config) -> None:
    schedule = plain(name, *args, **options)  # pytest makes a warning an error
    rebuilt = eval(repr(schedule), {"timm": schedules.timm})
    restored = Schedule.from_dict(json.loads(json.dumps(schedule.to_dict())))
    for other in (rebuilt, restored, pickle.loads(pickle.dumps(schedule)), copy.deepcopy(schedule)):
        assert other == schedule
        assert other.program == schedule.program


# What timm's constructors raise, and what only this package does.


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("CosineLRScheduler", {"t_initial": 0}, "t_initial must be more than 0, got 0; pass the length"),
        ("PolyLRScheduler", {"t_initial": 10, "lr_min": -0.1}, "lr_min must be at least 0, got -0.1"),
        ("TanhLRScheduler", {"t_initial": 10, "lb": 3.0}, "lb must be less than ub=3.0, got 3.0"),
        ("TanhLRScheduler", {"t_initial": 10, "cycle_limit": -1}, "cycle_limit must be at least 0"),
        ("TanhLRScheduler", {"t_initial": 10, "warmup_t": -1}, "warmup_t must be at least 0"),
        ("TanhLRScheduler", {"t_initial": 10, "warmup_lr_init": -1.0}, "warmup_lr_init must be at least 0"),
        ("TanhLRScheduler", {"t_initial": 10, "warmup_t": 30, "cycle_mul": 0.5}, "pass warmup_prefix=True"),
        ("TanhLRScheduler", {"t_initial": 10, "warmup_t": 3, "cycle_mul": -1.0}, "pass warmup_prefix=True"),
        ("WSDLRScheduler", {"t_initial": 0, "decay_t": 1}, "t_initial must be more than 0"),
        ("WSDLRScheduler", {"t_initial": 10, "decay_t": 11}, "decay_t must be in (0, t_initial=10], got 11"),
        ("WSDLRScheduler", {"t_initial": 10, "decay_t": 5, "lr_min": -0.1}, "lr_min must be at least 0"),
        ("WSDLRScheduler", {"t_initial": 10, "decay_t": 5, "stable_fn": "flat"}, "stable_fn must be one of"),
        ("WSDLRScheduler", {"t_initial": 10, "decay_t": 5, "decay_fn": "sqrt"}, "decay_fn must be one of 'linear'"),
        ("WSDLRScheduler", {"t_initial": 10, "decay_t": 5, "decay_ratio": 1.0}, "decay_ratio must be in (0, 1)"),
        ("WSDLRScheduler", {"t_initial": 10, "decay_t": 5, "decay_power": 0.0}, "decay_power must be more than 0"),
        ("WSDLRScheduler", {"t_initial": 10, "decay_t": 5, "stable_power": -1.0}, "stable_power must be more than 0"),
        ("WSDLRScheduler", {"t_initial": 10, "decay_t": 5, "stable_fn": "rsqrt"}, "stable_timescale must be more"),
    ],
)
def test_what_the_constructor_raises(name: str, options: Config, message: str) -> None:
    config = {"base_lr": 0.1, **options}
    with pytest.raises(Exception) as theirs:  # noqa: PT011
        Live(name, config)
    with pytest.raises(type(theirs.value)) as caught:
        ours(name, config)
    assert type(caught.value) is type(theirs.value)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"t_in_epochs": True}, ValueError, "needs updates_per_epoch, got None; pass the number"),
        ({"updates_per_epoch": 5}, ValueError, "updates_per_epoch must be None with t_in_epochs=False"),
        ({"t_in_epochs": True, "updates_per_epoch": 0}, ValueError, "updates_per_epoch must be at least 1"),
        ({"noise_range_t": (0, 10)}, ValueError, "from_callable"),
        ({"base_lr": -0.1}, ValueError, "base_lr must be at least 0"),
        ({"cycle_mul": 1.001, "cycle_limit": 10_000}, ValueError, "at most 4096 .* from_callable"),
        ({"k_decay": "1"}, TypeError, "k_decay must be a number"),
    ],
)
def test_what_cannot_be_said(options: Config, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        plain("CosineLRScheduler", 20, **options)


def test_what_cannot_be_said_of_the_others() -> None:
    with pytest.raises(TypeError, match=r"decay_t must be a list of milestones, got 30; pass \[milestone\]"):
        plain("MultiStepLRScheduler", 30)
    with pytest.raises(ValueError, match="from_callable"):
        plain("WSDLRScheduler", 20, 5, decay_fn=math.sqrt)


def test_many_cycles_that_grow_have_no_end() -> None:
    schedule = plain("CosineLRScheduler", 10, cycle_mul=2.0, cycle_limit=10_000)
    assert schedule([10, 30, 10 * (2**30 - 1)]).tolist() == [0.1] * 3


@pytest.mark.parametrize(("cycle_mul", "length"), [(0.5, 20), (0.75, 40)])
def test_many_cycles_that_shrink_end_in_an_error(cycle_mul: float, length: int) -> None:
    message = f"cycle_mul={cycle_mul} all cycles together last {length} updates, at the step to update {length},"
    with pytest.warns(ScheduleWarning, match=message):
        plain("CosineLRScheduler", 10, cycle_mul=cycle_mul, cycle_limit=10_000)


@pytest.mark.parametrize(
    ("name", "args", "options", "message"),
    [
        ("CosineLRScheduler", (20,), {"warmup_t": 10}, "falls from 0.1 to 0.05; pass warmup_prefix=True"),
        ("StepLRScheduler", (10, 0.5), {"warmup_t": 10, "warmup_prefix": False}, "falls from 0.1 to 0.05"),
        ("CosineLRScheduler", (20,), {"warmup_t": 1, "warmup_lr_init": -0.1}, "the rate is negative at first"),
        ("CosineLRScheduler", (20,), {"lr_min": 0.2}, "a cycle begins at 0.1, below lr_min=0.2, and rises"),
        ("CosineLRScheduler", (20,), {"cycle_limit": 0}, "leaves no cycle"),
        ("CosineLRScheduler", (20,), {"cycle_limit": 2, "cycle_decay": -0.5}, "every other cycle is negative"),
        ("CosineLRScheduler", (1,), {}, "t_initial=1 makes a cycle of its first value alone"),
        ("CosineLRScheduler", (20,), {"cycle_mul": 0.0}, "cycle_mul=0.0 has no logarithm, at the step to update 1,"),
        ("CosineLRScheduler", (20,), {"k_decay": -1.0, "cycle_limit": 2}, "because 0.*, at the step to update 20,"),
        ("PolyLRScheduler", (20,), {"k_decay": -1.0}, "complex number, at the step to update 1,"),
        ("PolyLRScheduler", (20, -1.0), {"k_decay": 0.0}, "because 0.*, at the step to update 1,"),
        ("PolyLRScheduler", (20, -1.0), {}, "the rate rises until a cycle ends"),
        ("StepLRScheduler", (0,), {}, "it divides by decay_t=0, at the step to update 1,"),
        ("StepLRScheduler", (10, 2.0), {}, "the rate grows at every step"),
        ("StepLRScheduler", (10, -0.5), {}, "every other step has a negative rate"),
        ("StepLRScheduler", (-10, 0.5), {}, "divides by decay_rate at every step"),
        ("MultiStepLRScheduler", ([30, 10], 0.5), {}, "is not in order"),
        ("WSDLRScheduler", (20, 5), {"lr_min": 0.2}, "base_lr=0.1 is below lr_min=0.2"),
    ],
)
def test_odd_arguments_are_said_once(name: str, args: tuple[Any, ...], options: Config, message: str) -> None:
    with pytest.warns(ScheduleWarning, match=message) as said:
        schedule = plain(name, *args, **options)
    assert len(said) == 1
    assert np.isfinite(schedule(range(100))).all()
