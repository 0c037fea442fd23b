"""The state machines of metric-driven schedules as data: their parameters (csrc/core/metric.h), state and replay."""

from __future__ import annotations

import importlib
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from math import inf
from types import ModuleType
from typing import Any

import numpy as np

#: Tags of FS_METRIC_RULES in csrc/core/metric.h.
RULES = {"plateau": 0, "greedy": 1}

#: The doubles of each rule's state, the rate first. "greedy" has the metrics of its window after them.
STATE = {
    "plateau": ("lr", "best", "num_bad", "cooldown_left"),
    "greedy": ("lr", "best", "num_bad", "cooldown_left", "num_good", "warmup_left", "resets_left", "window_sum",
               "window_length", "window_oldest"),
}  # fmt: skip

_RULE = struct.Struct("<4i10d")
_RECORD = struct.Struct(f"{_RULE.format}Q")  # and the address of the state


@dataclass(frozen=True)
class MetricRule:
    """What a machine does, field by field as `MetricRule` in csrc/core/metric.h; both rules share the first half."""

    kind: str
    maximize: bool
    relative: bool
    window: int
    base_lr: float
    factor: float
    patience: float
    threshold: float
    cooldown: float
    warmup: float
    min_lr: float
    max_lr: float
    eps: float
    reset_start: float

    def pack(self) -> bytes:
        """The rule as the device reads it."""
        kind, *parameters = (getattr(self, f.name) for f in fields(self))
        return _RULE.pack(RULES[kind], *parameters)

    @property
    def worst_metric(self) -> float:
        return -inf if self.maximize else inf

    def initial_state(self) -> list[float]:
        """The state before any report."""
        state = dict.fromkeys(STATE[self.kind], 0.0)
        state |= {"lr": self.base_lr, "best": self.worst_metric}
        if "resets_left" in state:
            state["resets_left"] = self.reset_start
        return [*state.values(), *[0.0] * self.window]

    def accepts(self, state: Sequence[float]) -> bool:
        """Whether this rule's machine can go on from a state read from outside: its length, and its indices."""
        names = STATE[self.kind]
        if len(state) != len(names) + self.window:
            return False
        if self.window == 0:
            return True
        length, oldest = state[names.index("window_length")], state[names.index("window_oldest")]
        places = range(self.window)
        return (length == self.window or (length in places and oldest == 0.0)) and oldest in places


def pack_records(rules: Iterable[tuple[MetricRule, int] | None]) -> bytes:
    """The records of the groups' machines, (rule, address of its state); None for a group without one."""
    return b"".join(bytes(_RECORD.size) if r is None else r[0].pack() + struct.pack("<Q", r[1]) for r in rules)


def replay(rule: MetricRule, state: Sequence[float], metrics: Iterable[Any]) -> list[float]:
    """The rate before each of the metrics is reported, by the compiled machine or, without one, in Python."""
    reported = np.array([float(metric) for metric in metrics], np.float64)
    if _cpu is None:
        from . import reference_metric

        return reference_metric.replay(rule, list(state), reported.tolist())
    memory = np.array(state, np.float64)
    rates = np.empty_like(reported)
    _cpu.replay_metrics(rule.pack(), memory.ctypes.data, reported.ctypes.data, rates.ctypes.data, reported.size)
    return [float(rate) for rate in rates]


def check_module(module: ModuleType) -> None:
    """Raise ImportError where a compiled module has other machines, or other structures, than this file."""
    sizes = {name: module.LAYOUTS[f"{name}_state"] for name in RULES}
    own = {name: (8 * len(names), [(n, "<f8", 8 * i) for i, n in enumerate(names)]) for name, names in STATE.items()}
    rule_bytes, rule_fields = module.LAYOUTS["metric_rule"]
    same_rule = rule_bytes == _RULE.size and [name for name, _, _ in rule_fields] == [
        f.name for f in fields(MetricRule)
    ]
    if dict(module.METRIC_RULES) != RULES or {n: (b, list(f)) for n, (b, f) in sizes.items()} != own or not same_rule:
        raise ImportError(
            f"{module.__name__} and fused_sched/metric_rule.py disagree on the rules of metric-driven schedules, built "
            f"{dict(module.METRIC_RULES)}, expected {RULES}, or on their structures; rebuild the package"
        )


def _load_compiled() -> ModuleType | None:
    try:
        module = importlib.import_module("fused_sched._cpu")
    except ImportError:  # fused_sched.backends keeps the reason, for `python -m fused_sched`
        return None
    check_module(module)
    return module


_cpu = _load_compiled()
