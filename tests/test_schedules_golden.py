"""Programs against learning rates recorded from the real libraries (golden/): the evaluator's nodes express them.

The lowerings here are written for the tests, one function per library schedule, from the library's formulas.
A record holds `config` (the library's keyword arguments), `steps`, `lr` and, where the library schedules
them, `momentum` (beta1) and `weight_decay`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from math import inf, nextafter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from core_library import core

from fused_sched import schedules
from fused_sched.program import Clamp, Clock, Curve, Join, Product, Repeat, Sum, Tree, pack

GOLDEN = Path(__file__).parent / "golden"
Programs = dict[str, Tree]
LOWERINGS: dict[str, Callable[[dict[str, Any]], Programs]] = {}


def lowers(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Registers a function from a record's config to a tree, or to one tree per hyperparameter."""

    def register(lowering: Callable[..., Any]) -> Callable[..., Any]:
        def programs(config: dict[str, Any]) -> Programs:
            trees = lowering(**config)
            return trees if isinstance(trees, dict) else {"lr": trees}

        LOWERINGS[name] = programs
        return lowering

    return register


def flat(value: float) -> Curve:
    return Curve("constant", scale=value)


def line(start: float, end: float, steps: float, origin: float = 0.0) -> Curve:
    return Curve("power", origin=origin, divisor=steps, offset=start, scale=end - start)


def falling(start: float, end: float, steps: float, origin: float = 0.0, **knobs: float) -> Curve:
    """Counts down what remains, from 1 at origin to 0."""
    return Curve("power", origin=origin + steps, divisor=-steps, offset=end, scale=start - end, **knobs)


def phases(*children: Tree, ends: tuple[float, ...]) -> Join:
    """Phases on one shared clock."""
    return Join(children, ends=ends, origins=(0.0,) * len(children))


def after(bound: float) -> float:
    """The end of a phase that includes its bound: t <= bound is t < after(bound)."""
    return nextafter(bound, inf)


def of_group(value: Any, group: int) -> Any:
    return value[group] if isinstance(value, list) else value


@lowers("deepspeed_OneCycle")
def deepspeed_one_cycle(
    cycle_min_lr: Any,
    cycle_max_lr: Any,
    decay_lr_rate: float = 0.0,
    cycle_first_step_size: int = 2000,
    cycle_second_step_size: int | None = None,
    cycle_first_stair_count: int = 0,
    cycle_second_stair_count: int | None = None,
    decay_step_size: int = 0,
    cycle_min_mom: Any = 0.8,
    cycle_max_mom: Any = 0.9,
    decay_mom_rate: float = 0.0,
    group: int = 0,
    opt_lr: Any = None,
) -> Programs:
    first = float(cycle_first_step_size)
    second = float(first if cycle_second_step_size is None else cycle_second_step_size)
    first_stairs = float(cycle_first_stair_count)
    second_stairs = first_stairs if cycle_second_stair_count is None else float(cycle_second_stair_count)
    total = first + second
    low, high = of_group(cycle_min_lr, group), of_group(cycle_max_lr, group)
    up = Curve("power", divisor=first, stairs=first_stairs, offset=low, scale=high - low)
    down = Curve("power", origin=total, divisor=-second, stairs=second_stairs, offset=low, scale=high - low)
    tail: Tree = flat(low)
    if decay_lr_rate and decay_step_size:
        length = decay_step_size / decay_lr_rate
        tail = Curve("power", origin=total - length, divisor=length, p=-1.0, scale=low)
    low_momentum, high_momentum = of_group(cycle_min_mom, group), of_group(cycle_max_mom, group)
    swing = low_momentum - high_momentum
    up_momentum = Curve("power", divisor=first, stairs=first_stairs, offset=high_momentum, scale=swing)
    down_momentum = Curve(
        "power", origin=total, divisor=-second, stairs=second_stairs, offset=high_momentum, scale=swing
    )
    tail_momentum: Tree = flat(high_momentum)
    if decay_mom_rate and decay_step_size:
        tail_momentum = line(high_momentum, high_momentum * (1 + decay_mom_rate), decay_step_size, total)
    ends = (after(first), after(total))
    return {
        "lr": phases(up, down, tail, ends=ends),
        # The constructor sets the lowest momentum, the first step the highest.
        "momentum": phases(flat(low_momentum), up_momentum, down_momentum, tail_momentum, ends=(1.0, *ends)),
    }


@lowers("deepspeed_WarmupLR")
def deepspeed_warmup(
    opt_lr: Any,
    warmup_min_lr: float = 0.0,
    warmup_max_lr: float | None = None,
    warmup_num_steps: int = 1000,
    group: int = 0,
) -> Tree:
    steps = max(2, warmup_num_steps)
    peak = of_group(opt_lr, group) if warmup_max_lr is None else warmup_max_lr
    warmup = Curve("logarithm", p=1.0 / math.log(steps), offset=warmup_min_lr, scale=peak - warmup_min_lr)
    return phases(flat(warmup_min_lr), warmup, flat(peak), ends=(1.0, steps + 1.0))


@lowers("transformers_linear")
def transformers_linear(lr: float, num_warmup_steps: int, num_training_steps: int) -> Tree:
    w, n = num_warmup_steps, num_training_steps
    decay = Curve("power", origin=n, divisor=-max(1, n - w), scale=lr, low=0.0)
    return phases(line(0.0, lr, max(1, w)), decay, ends=(w,))


@lowers("transformers_inverse_sqrt")
def transformers_inverse_sqrt(lr: float, num_warmup_steps: int, timescale: int | None = None) -> Tree:
    w, scale = num_warmup_steps, timescale or num_warmup_steps or 10000
    decay = Curve("power", origin=w - scale, divisor=scale, p=-0.5, scale=lr)
    return phases(line(0.0, lr, max(1, w)), decay, ends=(w,))


@lowers("transformers_cosine_with_restarts")
def transformers_cosine_with_restarts(
    lr: float, num_warmup_steps: int, num_training_steps: int, num_cycles: int = 1
) -> Tree:
    w, length = num_warmup_steps, max(1, num_training_steps - num_warmup_steps)
    teeth = Curve("cosine", origin=w, divisor=length, repeats=num_cycles, scale=lr)
    return phases(line(0.0, lr, max(1, w)), teeth, flat(0.0), ends=(w, w + length))


@lowers("torch_CosineAnnealingWarmRestarts")
def torch_warm_restarts(lr: float, T_0: int, T_mult: int = 1, eta_min: float = 0.0) -> Tree:
    return Repeat(Curve("cosine", divisor=T_0, offset=eta_min, scale=lr - eta_min), period=T_0, growth=T_mult)


@lowers("torch_CyclicLR")
def torch_cyclic(
    base_lr: Any,
    max_lr: Any,
    step_size_up: int = 2000,
    step_size_down: int | None = None,
    mode: str = "triangular",
    gamma: float = 1.0,
    base_momentum: float = 0.8,
    max_momentum: float = 0.9,
    lr: Any = None,
    group: int = 0,
) -> Programs:
    up, down = step_size_up, step_size_up if step_size_down is None else step_size_down
    triangle = phases(line(0.0, 1.0, up), falling(1.0, 0.0, down, origin=up), ends=(up,))
    cycles = Repeat(triangle, period=up + down, gain=0.5 if mode == "triangular2" else 1.0)
    wave = Product((cycles, Curve("exponential", p=gamma))) if mode == "exp_range" else cycles
    low, high = of_group(base_lr, group), of_group(max_lr, group)
    return {
        "lr": Clamp(wave, offset=low, scale=high - low),
        "momentum": Clamp(wave, offset=max_momentum, scale=base_momentum - max_momentum),
    }


@lowers("torch_PolynomialLR")
def torch_polynomial(lr: float, total_iters: int = 5, power: float = 1.0) -> Tree:
    return falling(lr, 0.0, total_iters, limit=0.0, p=power)


def timm_cycles(
    shape: Curve,
    lr: float,
    t_initial: int,
    lr_min: float = 0.0,
    cycle_decay: float = 1.0,
    cycle_limit: int = 1,
    warmup_t: int = 0,
    warmup_lr_init: float = 0.0,
    warmup_prefix: bool = False,
    every: int = 0,
) -> Tree:
    """lr_min + (lr * decay^cycle - lr_min) * s: the falling peak and the fixed floor are two cycles, summed."""
    peaks = Repeat(Curve(**{**vars(shape), "scale": lr}), period=t_initial, gain=cycle_decay, times=cycle_limit)
    floors = Repeat(Curve(**{**vars(shape), "offset": lr_min, "scale": -lr_min}), period=t_initial, times=cycle_limit)
    begin = warmup_t if warmup_prefix else 0
    tree = Join(
        (line(warmup_lr_init, lr, max(1, warmup_t)), Sum((peaks, floors)), flat(lr_min)),
        ends=(warmup_t, begin + t_initial * cycle_limit),
        origins=(0.0, begin, 0.0),
    )
    return Clock(tree, every=every)


@lowers("timm_CosineLRScheduler")
def timm_cosine(t_initial: int, k_decay: float = 1.0, **rest: Any) -> Tree:
    return timm_cycles(Curve("cosine", divisor=t_initial, exponent=k_decay), t_initial=t_initial, **rest)


@lowers("timm_TanhLRScheduler")
def timm_tanh(t_initial: int, lb: float = -7.0, ub: float = 3.0, **rest: Any) -> Tree:
    cycles = timm_cycles(Curve("tanh", divisor=t_initial, p=lb, q=ub), t_initial=t_initial, **rest)
    if rest.get("warmup_t"):
        return cycles
    return phases(flat(rest["lr"]), cycles, ends=(1.0,))  # the optimizer's own rate until the first update


@lowers("megatron_OptimizerParamScheduler")
def megatron(
    init_lr: float,
    max_lr: float,
    min_lr: float,
    lr_warmup_steps: float,
    lr_decay_steps: int,
    lr_decay_style: str,
    start_wd: float,
    end_wd: float,
    wd_incr_steps: int,
    wd_incr_style: str,
    wsd_decay_steps: int = 0,
    lr_wsd_decay_style: str = "",
    increment: int = 1,
) -> Programs:
    w, n = lr_warmup_steps, lr_decay_steps
    swing = max_lr - min_lr
    anneal = n - wsd_decay_steps
    annealing: dict[str, Tree] = {
        "cosine": Curve("cosine", origin=anneal, divisor=wsd_decay_steps or 1, offset=min_lr, scale=swing),
        "minus_sqrt": Curve(
            "power", origin=anneal, divisor=wsd_decay_steps or 1, p=0.5, offset=min_lr + swing, scale=-swing
        ),
    }
    decays: dict[str, Tree] = {
        "linear": falling(max_lr, min_lr, n - w, origin=w),
        "constant": flat(max_lr),
        "inverse-square-root": Curve("power", divisor=max(w, 1), p=-0.5, scale=max_lr, low=min_lr),
        "WSD": phases(flat(max_lr), annealing.get(lr_wsd_decay_style, flat(max_lr)), ends=(after(anneal),)),
    }
    tail = flat(max_lr if lr_decay_style == "constant" else min_lr)
    lr = phases(line(init_lr, max_lr, w), decays[lr_decay_style], tail, ends=(after(w), after(n)))
    weight_decay = line(start_wd, end_wd, wd_incr_steps)
    decay_phases = phases(weight_decay, flat(end_wd), ends=(after(wd_incr_steps),))
    return {
        "lr": Clock(lr, multiplier=increment),
        "weight_decay": Clock(decay_phases if wd_incr_style == "linear" else flat(start_wd), multiplier=increment),
    }


# Schedules whose words are enough.


@lowers("torch_StepLR")
def torch_step(lr: float, step_size: int, gamma: float = 0.1) -> Tree:
    return schedules.step_decay(lr, gamma, step_size).lower()


@lowers("torch_ExponentialLR")
def torch_exponential(lr: float, gamma: float) -> Tree:
    return schedules.exponential(lr, gamma).lower()


@lowers("optax_linear_schedule")
def optax_linear(init_value: float, end_value: float, transition_steps: int, transition_begin: int = 0) -> Tree:
    if transition_steps <= 0:
        return flat(init_value)
    return schedules.linear(init_value, end_value, transition_steps).shifted(transition_begin).lower()


@lowers("optax_polynomial_schedule")
def optax_polynomial(
    init_value: float, end_value: float, power: float, transition_steps: int, transition_begin: int = 0
) -> Tree:
    if transition_steps <= 0:
        return flat(init_value)
    return schedules.polynomial(init_value, end_value, transition_steps, power).shifted(transition_begin).lower()


@lowers("optax_cosine_decay_schedule")
def optax_cosine(init_value: float, decay_steps: int, alpha: float = 0.0, exponent: float = 1.0) -> Tree:
    end = init_value * alpha
    return Curve("cosine", limit=decay_steps, divisor=decay_steps, q=exponent, offset=end, scale=init_value - end)


@lowers("optax_join_schedules")
def optax_join(schedules: list[Any], boundaries: list[int]) -> Tree:
    words: dict[str, Callable[..., Tree]] = {
        "constant_schedule": lambda value: flat(value),
        "linear_schedule": optax_linear,
        "polynomial_schedule": optax_polynomial,
        "cosine_decay_schedule": optax_cosine,
        "exponential_decay": lambda init_value, transition_steps, decay_rate, staircase=False: Curve(
            "exponential", divisor=transition_steps, stairs=float(staircase), p=decay_rate, scale=init_value
        ),
    }
    children = tuple(words[name](**config) for name, config in schedules)
    return Join(children, ends=tuple(boundaries), origins=(0, *boundaries))


RECORDS = [
    pytest.param(path.stem, record, id=f"{path.stem}-{i}")
    for path in sorted(GOLDEN.glob("*.json"))
    for i, record in enumerate(json.loads(path.read_text()))
    if path.stem in LOWERINGS
]


def test_every_lowering_has_its_record() -> None:
    assert {record.values[0] for record in RECORDS} == set(LOWERINGS)


@pytest.mark.parametrize(("name", "record"), RECORDS)
def test_recorded_values(name: str, record: dict[str, Any]) -> None:
    # Relative to the peak. torch's recursive schedules drift from their own closed forms by up to 1e-12 in
    # these records; elsewhere the libraries evaluate closed forms in another order.
    tolerance = 4e-12 if name.startswith("torch_") else 1e-13
    programs = LOWERINGS[name](record["config"])
    recorded = {key for key in ("lr", "momentum", "weight_decay") if key in record}
    assert recorded == set(programs)
    for hyperparameter, tree in programs.items():
        expected = np.array(record[hyperparameter])
        got = core().evaluate(pack(tree), record["steps"])
        assert np.abs(got - expected).max() <= tolerance * np.abs(expected).max(), hyperparameter


def test_an_inclusive_end_needs_the_next_double() -> None:
    """Megatron's warm-up takes t <= W; with W itself as the end, its last step would fall into the decay."""
    closed = phases(line(0.0, 1.0, 10.0), flat(0.25), ends=(after(10.0),))
    half_open = phases(line(0.0, 1.0, 10.0), flat(0.25), ends=(10.0,))
    assert core().evaluate(pack(closed), [9.0, 10.0, 11.0]).tolist() == [0.9, 1.0, 0.25]
    assert core().evaluate(pack(half_open), [9.0, 10.0, 11.0]).tolist() == [0.9, 0.25, 0.25]


def test_timm_k_decay_and_falling_cycles() -> None:
    """timm's cosine: (u^k inside the cosine, a floor that does not fall with the peaks), all cycles growing."""
    lr, floor, period, growth, decay, k = 0.1, 0.01, 20, 2, 0.5, 1.7
    shape = Curve("cosine", divisor=period, exponent=k)
    peaks = Repeat(Curve(**{**vars(shape), "scale": lr}), period=period, growth=growth, gain=decay)
    floors = Repeat(Curve(**{**vars(shape), "offset": floor, "scale": -floor}), period=period, growth=growth)
    steps = np.arange(600)
    expected = []
    for t in steps:
        cycle, begin, length = 0, 0, period
        while t - begin >= length:
            begin, length, cycle = begin + length, length * growth, cycle + 1
        u = ((t - begin) ** k) / length**k
        expected.append(floor + 0.5 * (lr * decay**cycle - floor) * (1 + math.cos(math.pi * u)))
    got = core().evaluate(pack(Sum((peaks, floors))), steps)
    assert np.abs(got - expected).max() <= 1e-13 * lr


def test_poly_with_k_decay_needs_the_complement() -> None:
    """timm's poly: (1 - (t/T)^k)^power."""
    curve = Curve("power", limit=50.0, divisor=50.0, exponent=1.5, complement=True, p=0.9, scale=0.2)
    t = np.arange(60)
    expected = 0.2 * (1.0 - (np.minimum(t, 50) / 50) ** 1.5) ** 0.9
    assert np.abs(core().evaluate(pack(curve), t) - expected).max() <= 1e-15


def test_restarts_by_saw_teeth_round_as_transformers_does() -> None:
    """transformers takes (num_cycles * progress) % 1 in this order, which puts some exact restarts a step late."""
    lr, total, num_cycles = 1e-3, 11550, 50
    lower = LOWERINGS["transformers_cosine_with_restarts"]
    tree = lower({"lr": lr, "num_warmup_steps": 0, "num_training_steps": total, "num_cycles": num_cycles})["lr"]
    got = core().evaluate(pack(tree), np.arange(total))
    teeth = [(float(num_cycles) * (float(t) / float(total))) % 1.0 for t in range(total)]
    expected = [lr * max(0.0, 0.5 * (1.0 + math.cos(math.pi * u))) for u in teeth]
    assert np.abs(got - expected).max() <= 1e-13 * lr
    late = 29 * total // num_cycles
    assert teeth[late] > 0.999
    assert got[late] < 1e-6 * lr
