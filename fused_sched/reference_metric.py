"""The machines of metric-driven schedules in plain Python, for installations where no extension was compiled.

A deliberate second copy of csrc/core/metric.h: the same operations in the same order, hence the same bits.
"""

from __future__ import annotations

from math import inf, nan

from .metric_rule import RULES, STATE, MetricRule


def replay(rule: MetricRule, state: list[float], metrics: list[float]) -> list[float]:
    """The rate before each metric is reported; advances the state."""
    rates = []
    for metric in metrics:
        rates.append(state[0])
        report(rule, state, metric)
    return rates


def report(rule: MetricRule, state: list[float], metric: float) -> None:
    """Advance a state, as in `metric_rule.STATE`, by one metric."""
    names = STATE[rule.kind]
    fields = dict(zip(names, state, strict=False))
    window = state[len(names) :]
    ADVANCE[rule.kind](rule, fields, window, metric)
    state[:] = [*fields.values(), *window]


def _plateau(rule: MetricRule, state: dict[str, float], window: list[float], metric: float) -> None:
    if _is_better(rule, metric, state["best"]):
        state["best"] = metric
        state["num_bad"] = 0.0
    else:
        state["num_bad"] += 1.0
    if state["cooldown_left"] > 0.0:
        state["cooldown_left"] -= 1.0
        state["num_bad"] = 0.0
    if state["num_bad"] > rule.patience:
        state["lr"] = _reduced(rule, state["lr"])
        state["cooldown_left"] = rule.cooldown
        state["num_bad"] = 0.0


def _greedy(rule: MetricRule, state: dict[str, float], window: list[float], metric: float) -> None:
    if window:
        metric = _average(state, window, metric)
    for waiting in ("cooldown_left", "warmup_left"):
        if state[waiting] > 0.0:
            state[waiting] -= 1.0
            state["num_bad"] = state["num_good"] = 0.0
            return
    if _is_better(rule, metric, state["best"]):
        state["best"] = metric
        state["num_bad"] = 0.0
        state["num_good"] += 1.0
    else:
        state["num_bad"] += 1.0
        state["num_good"] = 0.0
    if state["num_good"] > rule.patience:
        state["lr"] = _increased(rule, state["lr"])
        state["resets_left"] = rule.reset_start
        state["warmup_left"] = rule.warmup
        state["num_good"] = 0.0
    elif state["num_bad"] > rule.patience:
        state["lr"] = _reduced(rule, state["lr"])
        if not state["lr"] > rule.min_lr:
            state["resets_left"] -= 1.0
            if state["resets_left"] <= 0.0:
                state.update(zip(state, rule.initial_state(), strict=False))
        state["cooldown_left"] = rule.cooldown
        state["num_bad"] = 0.0


def _average(state: dict[str, float], window: list[float], metric: float) -> float:
    state["window_sum"] += metric
    if state["window_length"] < len(window):
        window[int(state["window_length"])] = metric
        state["window_length"] += 1.0
    else:
        oldest = int(state["window_oldest"])
        state["window_sum"] -= window[oldest]
        window[oldest] = metric
        state["window_oldest"] = float((oldest + 1) % len(window))
    return state["window_sum"] / state["window_length"]


def _is_better(rule: MetricRule, metric: float, best: float) -> bool:
    if rule.maximize:
        return metric > (best * (1.0 + rule.threshold) if rule.relative else best + rule.threshold)
    return metric < (best * (1.0 - rule.threshold) if rule.relative else best - rule.threshold)


def _reduced(rule: MetricRule, lr: float) -> float:
    bounded = max(lr * rule.factor, rule.min_lr)
    return bounded if lr - bounded > rule.eps else lr


def _increased(rule: MetricRule, lr: float) -> float:
    quotient = lr / rule.factor if rule.factor != 0.0 else (inf if lr > 0.0 else nan)
    bounded = min(quotient, rule.max_lr)
    return bounded if bounded - lr > rule.eps else lr


ADVANCE = {"plateau": _plateau, "greedy": _greedy}
if set(ADVANCE) != set(RULES):
    raise ImportError(f"reference_metric has machines for {sorted(ADVANCE)}, metric_rule.py names {sorted(RULES)}")
