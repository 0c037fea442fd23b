"""Rates that react to a metric instead of following the clock: torch's ReduceLROnPlateau, transformers' GreedyLR.

They are state machines on the device (csrc/core/metric.h), advanced by `opt.report_metric(value)`: metric i is
reported after update i and decides with those before it about update i+1.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import Any, NoReturn

from .. import metric_rule
from ..metric_rule import MetricRule
from ..program import Tree
from . import checks
from .base import Schedule, set_fields
from .library import LibrarySchedule

#: Metrics a window may hold: 8 MiB on the device.
_LARGEST_WINDOW = 1 << 20


class MetricSchedule(Schedule, abstract=True):
    """A learning rate as a function of the metrics reported so far. It drives a group's lr, and nothing else.

    It has no value at a step, no program and no picture: asking for them, or combining it with other schedules,
    raises TypeError. What it does to given metrics is `replay(metrics)`.
    """

    base_lr: float

    # What a subclass says about itself.

    @property
    @abstractmethod
    def rule(self) -> MetricRule:
        """The machine that computes the rate."""

    def initial_state(self) -> list[float]:
        """The machine's state before the first report."""
        return self.rule.initial_state()

    # Values.

    def replay(self, metrics: Iterable[Any]) -> list[float]:
        """The rate of each update, if metric i is reported after update i.

        metrics: numbers, or whatever float() takes.
        Returns one float per metric: the first is base_lr, the last depends on all metrics but the last.

        >>> from fused_sched.schedules.torch import ReduceLROnPlateau
        >>> ReduceLROnPlateau(factor=0.5, patience=0, base_lr=0.1).replay([3.0, 2.0, 2.0, 1.0, 1.5, 1.0])
        [0.1, 0.1, 0.1, 0.05, 0.05, 0.025]
        """
        return metric_rule.replay(self.rule, self.initial_state(), metrics)

    @property
    def reference(self) -> float:
        """The rate before the first report."""
        return self.base_lr

    # What only a function of the step has.

    def refuse(self, what: str) -> NoReturn:
        """Raise the TypeError that says why a function of metrics cannot be `what`."""
        raise TypeError(
            f"{self.word} cannot be {what}: its rate depends on the metrics reported while training, not on the step; "
            "replay(metrics) gives the rates for given metrics, opt.last_lr() those of a training run"
        )

    def lower(self) -> Tree:
        self.refuse("evaluated, printed or drawn as a function of the step")

    def __call__(self, step: Any) -> NoReturn:
        self.refuse("evaluated at a step")

    def __mul__(self, other: Schedule) -> NoReturn:
        self.refuse("multiplied; scale group['lr'] to scale its rate")

    def scaled(self, factor: float) -> NoReturn:
        self.refuse("scaled; change base_lr, or scale group['lr']")

    def shifted(self, steps: int) -> NoReturn:
        self.refuse("shifted; report no metrics during those updates")

    def repeat(self, period: int, times: int | None = None) -> NoReturn:
        self.refuse("repeated; set_schedule() starts it over")


def _check_common(schedule: ReduceLROnPlateau | GreedyLR, numbers: tuple[str, ...]) -> None:
    """What both constructors refuse, and the plain types of their arguments."""
    who = schedule.word
    plain = {name: _number(who, name, getattr(schedule, name)) for name in ("factor", *numbers)}
    if plain["factor"] >= 1.0:
        raise ValueError(f"{who}: factor must be below 1, got {schedule.factor!r}; the rate is multiplied by it")
    for name, known in (("mode", ("min", "max")), ("threshold_mode", ("rel", "abs"))):
        if getattr(schedule, name) not in known:
            raise ValueError(f"{who}: {name} must be {known[0]!r} or {known[1]!r}, got {getattr(schedule, name)!r}")
    plain["base_lr"] = checks.number(who, "base_lr", schedule.base_lr, at_least=0.0)
    set_fields(schedule, **plain)


def _number(who: str, name: str, got: Any) -> float:
    """An int or float, infinity included: patience=math.inf never reduces."""
    if isinstance(got, list | tuple):
        raise TypeError(
            f"{who}: {name} must be a number, got {got!r}: a schedule drives one group; give each group its own"
        )
    if isinstance(got, bool) or not isinstance(got, Real):
        raise TypeError(f"{who}: {name} must be a number, got {got!r}; convert it with float(...)")
    if math.isnan(got):
        raise ValueError(f"{who}: {name} must be a number, got {got!r}; check the arithmetic it came from")
    return int(got) if isinstance(got, Integral) else float(got)


@dataclass(frozen=True, repr=False)
class ReduceLROnPlateau(MetricSchedule, LibrarySchedule, library="torch"):
    """Falls when the metric stagnates.

    `lr = max(lr * factor, min_lr)` whenever more than `patience` reports in a row brought no better metric.

    A metric m is better than the best b so far if, for mode "min" | "max" and threshold_mode

        "rel"   m < b * (1 - threshold)  |  m > b * (1 + threshold)
        "abs"   m < b - threshold        |  m > b + threshold

    mode: "min" for a loss, "max" for an accuracy.
    factor: of the rate, below 1. patience: reports. threshold, threshold_mode: as above.
    cooldown: reports after a reduction that are not counted as bad. min_lr: lowest rate, for this group.
    eps: a reduction by no more than this is not made.
    base_lr: the rate before the first report; torch reads it from the optimizer.
    best, num_bad_epochs, cooldown_counter: where a scheduler that has been running stands; best=None: at its start.
    Raises ValueError for a factor of 1 or more or an unknown mode, TypeError for what is no number; a list of min_lr
    belongs to several groups, each of which takes a schedule of its own.

    >>> lr = ReduceLROnPlateau("min", factor=0.5, patience=1, base_lr=0.1)
    >>> lr.replay([1.0, 0.9, 0.95, 0.95, 0.8, 0.8, 0.8])
    [0.1, 0.1, 0.1, 0.1, 0.05, 0.05, 0.05]

    Source: torch 2.13, torch.optim.lr_scheduler.ReduceLROnPlateau; exact.
    """

    mode: str = "min"
    factor: float = 0.1
    patience: float = 10
    threshold: float = 1e-4
    threshold_mode: str = "rel"
    cooldown: float = 0
    min_lr: float = 0
    eps: float = 1e-8
    base_lr: float = field(kw_only=True)
    best: float | None = field(default=None, kw_only=True)
    num_bad_epochs: float = field(default=0, kw_only=True)
    cooldown_counter: float = field(default=0, kw_only=True)

    def check(self) -> None:
        position = ("num_bad_epochs", "cooldown_counter", *(["best"] if self.best is not None else []))
        _check_common(self, ("patience", "threshold", "cooldown", "min_lr", "eps", *position))

    def oddity(self) -> str | None:
        if self.factor >= 0.0:
            return None
        return f"factor={self.factor!r} is negative: the first reduction goes to min_lr or below 0; pass one in [0, 1)"

    @property
    def rule(self) -> MetricRule:
        return MetricRule(
            kind="plateau",
            maximize=self.mode == "max",
            relative=self.threshold_mode == "rel",
            window=0,
            base_lr=self.base_lr,
            factor=self.factor,
            patience=self.patience,
            threshold=self.threshold,
            cooldown=self.cooldown,
            warmup=0.0,
            min_lr=self.min_lr,
            max_lr=math.inf,
            eps=self.eps,
            reset_start=0.0,
        )

    def initial_state(self) -> list[float]:
        lr, best, _, _ = super().initial_state()
        return [lr, best if self.best is None else self.best, float(self.num_bad_epochs), float(self.cooldown_counter)]


@dataclass(frozen=True, repr=False)
class GreedyLR(MetricSchedule, LibrarySchedule, library="transformers"):
    """Falls when the metric stagnates and rises while it improves.

    `lr = max(lr * factor, min_lr)` after more than `patience` reports in a row without a better metric,
    `lr = min(lr / factor, max_lr)` after more than `patience` better ones in a row. Better is as for
    `ReduceLROnPlateau`, said of the metric or, with `smooth`, of its average over a window.

    mode: "min" for a loss, "max" for an accuracy.
    factor: of the rate, below 1. patience: reports. threshold, threshold_mode: as for `ReduceLROnPlateau`.
    cooldown, warmup: reports ignored after a reduction, after an increase. min_lr, max_lr: bounds, for this group.
    eps: a change by no more than this is not made. verbose: accepted; nothing is printed.
    smooth, window_size: average the metric over the latest window_size reports.
    reset_start: this many reductions at min_lr, none of them after an increase, start everything over at base_lr.
    base_lr: the rate before the first report; transformers reads it from the optimizer.
    Raises ValueError for a factor of 1 or more, an unknown mode or a window of more than 2**20 metrics, TypeError for
    what is no number.

    The library starts all groups over when all are at their min_lr; here each group does so by itself.

    >>> lr = GreedyLR(factor=0.5, patience=0, base_lr=0.1)
    >>> lr.replay([1.0, 0.9, 0.95, 0.95, 0.8])
    [0.1, 0.2, 0.4, 0.2, 0.1]

    Source: transformers 5.23, optimization.GreedyLR; exact. Method: https://arxiv.org/abs/2512.14527.
    """

    mode: str = "min"
    factor: float = 0.95
    patience: float = 10
    threshold: float = 1e-6
    threshold_mode: str = "abs"
    cooldown: float = 0
    warmup: float = 0
    min_lr: float = 1e-3
    max_lr: float = 1.0
    eps: float = 1e-8
    verbose: bool = False
    smooth: bool = False
    window_size: float = 50
    reset_start: float = 500
    base_lr: float = field(kw_only=True)

    def check(self) -> None:
        _check_common(
            self,
            ("patience", "threshold", "cooldown", "warmup", "min_lr", "max_lr", "eps", "window_size", "reset_start"),
        )
        set_fields(self, verbose=bool(self.verbose), smooth=bool(self.smooth))
        if self.smooth and self.window_size > _LARGEST_WINDOW:
            raise ValueError(
                f"{self.word}: window_size must be at most 2**20 metrics, which stay on the device, got "
                f"{self.window_size!r}; report an average instead"
            )

    def oddity(self) -> str | None:
        if self.factor <= 0.0:
            return (
                f"factor={self.factor!r} is not positive: an increase, lr / factor, divides by zero or turns the rate "
                "negative; pass one in (0, 1)"
            )
        if self.smooth and self.window_size < 1:
            return (
                f"window_size={self.window_size!r} holds no metric, for which the library raises ZeroDivisionError at "
                "the first report; metrics are taken as they are"
            )
        if self.min_lr > self.base_lr:
            return (
                f"min_lr={self.min_lr!r} is above base_lr={self.base_lr!r}: the rate cannot fall; pass a lower min_lr"
            )
        return "verbose=True prints nothing: the device decides; read opt.last_lr()" if self.verbose else None

    @property
    def rule(self) -> MetricRule:
        return MetricRule(
            kind="greedy",
            maximize=self.mode == "max",
            relative=self.threshold_mode == "rel",
            window=int(self.window_size) if self.smooth and self.window_size >= 1 else 0,
            base_lr=self.base_lr,
            factor=self.factor,
            patience=self.patience,
            threshold=self.threshold,
            cooldown=self.cooldown,
            warmup=self.warmup,
            min_lr=self.min_lr,
            max_lr=self.max_lr,
            eps=self.eps,
            reset_start=self.reset_start,
        )


def get_reduce_on_plateau_schedule(*, base_lr: float, **arguments: Any) -> ReduceLROnPlateau:
    """`torch.ReduceLROnPlateau(**arguments)`, as transformers' factory of that name.

    >>> get_reduce_on_plateau_schedule(base_lr=0.1, patience=2)
    torch.ReduceLROnPlateau(patience=2, base_lr=0.1)
    """
    return ReduceLROnPlateau(**arguments, base_lr=base_lr)


def get_greedy_schedule(*, base_lr: float, **arguments: Any) -> GreedyLR:
    """`GreedyLR(**arguments)`, as transformers' factory of that name.

    >>> get_greedy_schedule(base_lr=0.1, patience=2)
    transformers.GreedyLR(patience=2, base_lr=0.1)
    """
    return GreedyLR(**arguments, base_lr=base_lr)
