"""The arguments of a live scheduler, read back from its attributes.

Classes are known by their full names, so that neither torch nor transformers nor DeepSpeed is imported here. A subclass
is another class: it may compute anything.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from math import inf, nextafter
from typing import Any

from .. import deepspeed, transformers
from ..base import Schedule
from ..metric import ReduceLROnPlateau
from .base import ELSE_TABULATE, Chainable, TorchSchedule
from .composition import ChainedScheduler, SequentialLR
from .cycles import CosineAnnealingLR, CosineAnnealingWarmRestarts, CyclicLR
from .decay import ConstantLR, ExponentialLR, LinearLR, MultiStepLR, PolynomialLR, StepLR
from .functions import LambdaLR, MultiplicativeLR
from .one_cycle import OneCycleLR


@dataclass(frozen=True)
class Live:
    """A scheduler as one parameter group of its optimizer sees it."""

    scheduler: Any
    group_index: int
    #: Updates to tabulate a user's function for, from the scheduler's epoch 0 on.
    num_steps: int | None

    @property
    def group(self) -> dict[str, Any]:
        group: dict[str, Any] = self.scheduler.optimizer.param_groups[self.group_index]
        return group

    def get(self, *names: str) -> dict[str, Any]:
        """Attributes, by their own names."""
        return {name: plain(getattr(self.scheduler, name)) for name in names}

    def own(self, name: str) -> Any:
        """This group's entry of an attribute that has one per group."""
        return plain(getattr(self.scheduler, name)[self.group_index])

    @property
    def base_lr(self) -> float:
        return float(self.own("base_lrs"))


def read(live: Live) -> Schedule:
    """The schedule that a live scheduler runs, from its epoch 0 on.

    Raises TypeError for a class that is not known, ValueError for what it runs that is not expressible.
    """
    name = full_name(type(live.scheduler))
    if name not in _READERS:
        raise TypeError(
            f"from_scheduler: the scheduler must be one of torch.optim.lr_scheduler or deepspeed.runtime.lr_schedules "
            f"itself (a subclass may compute anything), got {name}; {ELSE_TABULATE}"
        )
    return _READERS[name](live)


def plain(value: Any) -> Any:
    """A tensor of one element as a number."""
    return value.item() if hasattr(value, "item") else value


def full_name(function: Any) -> str:
    return f"{getattr(function, '__module__', '?')}.{getattr(function, '__qualname__', repr(function))}"


def _same_names(cls: Callable[..., TorchSchedule], *names: str) -> Callable[[Live], Schedule]:
    """A reader for a class that keeps its arguments under their own names."""
    return lambda live: cls(**live.get(*names), base_lr=live.base_lr)


def _multi_step(live: Live) -> Schedule:
    milestones = sorted(live.scheduler.milestones.elements())
    return MultiStepLR(tuple(milestones), **live.get("gamma"), base_lr=live.base_lr)


def _by_function(cls: type[LambdaLR] | type[MultiplicativeLR], live: Live) -> Schedule:
    function = live.scheduler.lr_lambdas[live.group_index]
    factory = _of_transformers(function, live) if cls is LambdaLR else None
    if factory is not None:
        return factory
    if live.num_steps is None:
        raise ValueError(
            f"from_scheduler: {cls.__name__} calls {full_name(function)}, whose values for all updates to come cannot "
            "be known; give num_steps, the updates to tabulate it for, or tabulate the rates themselves with "
            "schedules.from_callable(function, num_steps)"
        )
    return cls(function, num_steps=live.num_steps, base_lr=live.base_lr)


def _of_transformers(function: Any, live: Live) -> Schedule | None:
    """The schedule of a factory of transformers.optimization, which hands its arguments to a function by `partial`."""
    inner, arguments = (function.func, dict(function.keywords)) if isinstance(function, partial) else (function, {})
    module, _, name = full_name(inner).rpartition(".")
    if module != "transformers.optimization" or name not in _OF_TRANSFORMERS:
        return None
    factory = _OF_TRANSFORMERS[name]
    if "lr_init" in arguments:
        arguments["default_lr"] = arguments.pop("lr_init")
    # The two cosines share a function.
    if factory is transformers.get_cosine_schedule_with_warmup and "min_lr_rate" in arguments:
        factory = transformers.get_cosine_with_min_lr_schedule_with_warmup
    made = factory(**{key: plain(value) for key, value in arguments.items()}, base_lr=live.base_lr)
    assert isinstance(made, Schedule)
    return made


_OF_TRANSFORMERS: dict[str, Callable[..., Any]] = {
    "_get_constant_lambda": transformers.get_constant_schedule,
    "_get_constant_schedule_with_warmup_lr_lambda": transformers.get_constant_schedule_with_warmup,
    "_get_linear_schedule_with_warmup_lr_lambda": transformers.get_linear_schedule_with_warmup,
    "_get_cosine_schedule_with_warmup_lr_lambda": transformers.get_cosine_schedule_with_warmup,
    "_get_cosine_with_hard_restarts_schedule_with_warmup_lr_lambda": (
        transformers.get_cosine_with_hard_restarts_schedule_with_warmup
    ),
    "_get_cosine_with_min_lr_schedule_with_warmup_lr_rate_lambda": (
        transformers.get_cosine_with_min_lr_schedule_with_warmup_lr_rate
    ),
    "_get_polynomial_decay_schedule_with_warmup_lr_lambda": transformers.get_polynomial_decay_schedule_with_warmup,
    "_get_inverse_sqrt_schedule_lr_lambda": transformers.get_inverse_sqrt_schedule,
    "_get_wsd_scheduler_lambda": transformers.get_wsd_schedule,
}


def _cyclic(live: Live) -> Schedule:
    total, ratio = live.scheduler.total_size, live.scheduler.step_ratio
    # torch keeps the sum and the quotient: total * ratio may be off in its last place.
    up = next((n for n in (round(total * ratio), total * ratio) if n / total == ratio), total * ratio)
    momentum: dict[str, Any] = {"cycle_momentum": bool(live.scheduler.cycle_momentum)}
    if momentum["cycle_momentum"]:
        momentum |= {"base_momentum": live.own("base_momentums"), "max_momentum": live.own("max_momentums")}
    return CyclicLR(
        base_lr=live.base_lr,
        max_lr=live.own("max_lrs"),
        step_size_up=up,
        step_size_down=total - up,
        **live.get("mode", "gamma"),
        scale_fn=live.scheduler._scale_fn_custom,
        **momentum,
    )


def _one_cycle(live: Live) -> Schedule:
    scheduler, group = live.scheduler, {key: plain(value) for key, value in live.group.items() if key != "params"}
    total_steps = scheduler.total_steps
    momentum: dict[str, Any] = {"cycle_momentum": bool(scheduler.cycle_momentum)}
    if momentum["cycle_momentum"]:
        momentum |= {name: group[name] for name in ("base_momentum", "max_momentum")}
    return OneCycleLR(
        group["max_lr"],
        total_steps,
        pct_start=_solved(lambda p: p * total_steps - 1, scheduler._schedule_phases[0]["end_step"], 1 / total_steps, 1),
        anneal_strategy=scheduler._anneal_func_type,
        div_factor=_ratio(group["max_lr"], group["initial_lr"], default=25.0),
        final_div_factor=_ratio(group["initial_lr"], group["min_lr"], default=1e4),
        three_phase=len(scheduler._schedule_phases) == 3,
        **momentum,
    )


def _ratio(numerator: float, denominator: float, default: float) -> float:
    """The divisor that gave the denominator; any will do for nothing."""
    if denominator == 0.0:
        return default
    quotient = numerator / denominator
    return _nearby(quotient, lambda divisor: numerator / divisor == denominator)


def _solved(function: Callable[[float], float], value: float, slope: float, shift: float) -> float:
    """x with function(x) == value, a line up to rounding."""
    return _nearby(min(1.0, max(0.0, (value + shift) * slope)), lambda x: function(x) == value)


def _nearby(x: float, is_it: Callable[[float], bool]) -> float:
    """The number that somebody wrote, or one next to x, that gives the same bits; x itself if none does."""
    written = (float(f"{x:.{digits}g}") for digits in (6, 12, 15))
    candidates = (*written, x, nextafter(x, -inf), nextafter(x, inf))
    return next(filter(is_it, candidates), x)


def _plateau(live: Live) -> Schedule:
    best = plain(live.scheduler.best)
    return ReduceLROnPlateau(
        **live.get("mode", "factor", "patience", "threshold", "threshold_mode", "cooldown", "eps"),
        min_lr=live.own("min_lrs"),
        base_lr=float(live.group["lr"]),
        best=None if best in (inf, -inf) else best,
        **live.get("num_bad_epochs", "cooldown_counter"),
    )


def _sequential(live: Live) -> Schedule:
    children, milestones = live.scheduler._schedulers, tuple(live.scheduler._milestones)
    begins = (0, *(max(0, m) for m in milestones))
    schedules = []
    for child, begin, end in zip(children, begins, (*begins[1:], inf), strict=True):
        # A function may not be defined beyond its phase.
        updates = None if live.num_steps is None else int(max(1, min(live.num_steps, end) - begin))
        schedules.append(read(replace(live, scheduler=child, num_steps=updates)))
    first = bisect_right(milestones, 0)
    beginning: Any = schedules[first]
    end = milestones[first] if first < len(milestones) else inf
    follows_the_group = isinstance(beginning, Chainable) or (
        isinstance(beginning, CosineAnnealingLR) and end <= abs(beginning.T_max)  # where it returns to its own base_lr
    )
    initial_lr = float(live.group["initial_lr"])  # which OneCycleLR may have set after the child has read it
    if follows_the_group and beginning.base_lr != initial_lr:
        schedules[first] = replace(beginning, base_lr=initial_lr)
    return SequentialLR(tuple(schedules), milestones)


def _chained(live: Live) -> Schedule:
    return ChainedScheduler(tuple(read(replace(live, scheduler=child)) for child in live.scheduler._schedulers))


def _range_test(live: Live) -> Schedule:
    scheduler = live.scheduler
    return deepspeed.LRRangeTest(
        live.own("min_lr"), scheduler.step_size, scheduler.step_rate, lr_range_test_staircase=scheduler.staircase
    )


def _deepspeed_one_cycle(live: Live) -> Schedule:
    scheduler = live.scheduler
    momentum: dict[str, Any] = {"cycle_momentum": bool(scheduler.cycle_momentum)}
    if momentum["cycle_momentum"]:
        low, high = scheduler.min_moms[live.group_index], scheduler.max_moms[live.group_index]
        momentum |= {"cycle_min_mom": low[0], "cycle_max_mom": high[0], "decay_mom_rate": scheduler.decay_mom_rate}
    return deepspeed.OneCycle(
        cycle_min_lr=live.own("min_lrs"),
        cycle_max_lr=live.own("max_lrs"),
        cycle_first_step_size=scheduler.first_step_size,
        cycle_second_step_size=scheduler.second_step_size,
        cycle_first_stair_count=scheduler.first_stair_count,
        cycle_second_stair_count=scheduler.second_stair_count,
        **live.get("decay_lr_rate", "decay_step_size"),
        **momentum,
    )


def _warmup(cls: Callable[..., Schedule], live: Live) -> Schedule:
    names = ("total_num_steps",) if cls is deepspeed.WarmupDecayLR else ()
    return cls(
        warmup_min_lr=live.own("min_lrs"),
        warmup_max_lr=live.own("max_lrs"),
        **live.get("warmup_num_steps", "warmup_type", *names),
    )


def _warmup_cosine(live: Live) -> Schedule:
    names = ("total_num_steps", "warmup_min_ratio", "warmup_num_steps", "cos_min_ratio", "warmup_type")
    return deepspeed.WarmupCosineLR(**live.get(*names), base_lr=float(live.own("org_lrs")))


_OF_TORCH: dict[str, Callable[[Live], Schedule]] = {
    "LambdaLR": partial(_by_function, LambdaLR),
    "MultiplicativeLR": partial(_by_function, MultiplicativeLR),
    "StepLR": _same_names(StepLR, "step_size", "gamma"),
    "MultiStepLR": _multi_step,
    "ConstantLR": _same_names(ConstantLR, "factor", "total_iters"),
    "LinearLR": _same_names(LinearLR, "start_factor", "end_factor", "total_iters"),
    "ExponentialLR": _same_names(ExponentialLR, "gamma"),
    "PolynomialLR": _same_names(PolynomialLR, "total_iters", "power"),
    "CosineAnnealingLR": _same_names(CosineAnnealingLR, "T_max", "eta_min"),
    "CosineAnnealingWarmRestarts": _same_names(CosineAnnealingWarmRestarts, "T_0", "T_mult", "eta_min"),
    "CyclicLR": _cyclic,
    "OneCycleLR": _one_cycle,
    "ReduceLROnPlateau": _plateau,
    "SequentialLR": _sequential,
    "ChainedScheduler": _chained,
}

_OF_DEEPSPEED: dict[str, Callable[[Live], Schedule]] = {
    "LRRangeTest": _range_test,
    "OneCycle": _deepspeed_one_cycle,
    "WarmupLR": partial(_warmup, deepspeed.WarmupLR),
    "WarmupDecayLR": partial(_warmup, deepspeed.WarmupDecayLR),
    "WarmupCosineLR": _warmup_cosine,
}

_READERS = {f"torch.optim.lr_scheduler.{name}": reader for name, reader in _OF_TORCH.items()}
_READERS |= {f"deepspeed.runtime.lr_schedules.{name}": reader for name, reader in _OF_DEEPSPEED.items()}
