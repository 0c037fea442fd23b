"""The schedules of transformers by the names that TrainingArguments.lr_scheduler_type knows them under."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ..base import Schedule
from ..metric import get_greedy_schedule, get_reduce_on_plateau_schedule
from .cosines import (
    get_cosine_schedule_with_warmup,
    get_cosine_with_hard_restarts_schedule_with_warmup,
    get_cosine_with_min_lr_schedule_with_warmup,
    get_cosine_with_min_lr_schedule_with_warmup_lr_rate,
)
from .decays import (
    get_constant_schedule,
    get_constant_schedule_with_warmup,
    get_inverse_sqrt_schedule,
    get_linear_schedule_with_warmup,
    get_polynomial_decay_schedule_with_warmup,
)
from .stable import get_wsd_schedule

FACTORIES: dict[str, Callable[..., Schedule]] = {
    "linear": get_linear_schedule_with_warmup,
    "cosine": get_cosine_schedule_with_warmup,
    "cosine_with_restarts": get_cosine_with_hard_restarts_schedule_with_warmup,
    "polynomial": get_polynomial_decay_schedule_with_warmup,
    "constant": get_constant_schedule,
    "constant_with_warmup": get_constant_schedule_with_warmup,
    "inverse_sqrt": get_inverse_sqrt_schedule,
    "reduce_lr_on_plateau": get_reduce_on_plateau_schedule,
    "cosine_with_min_lr": get_cosine_with_min_lr_schedule_with_warmup,
    "cosine_warmup_with_min_lr": get_cosine_with_min_lr_schedule_with_warmup_lr_rate,
    "warmup_stable_decay": get_wsd_schedule,
    "greedy": get_greedy_schedule,
}
_METRIC_DRIVEN = ("reduce_lr_on_plateau", "greedy")
_READ_THE_DEFAULT_RATE = ("polynomial", "cosine_with_min_lr", "cosine_warmup_with_min_lr")


def get_scheduler(
    name: str,
    *,
    base_lr: float,
    num_warmup_steps: int | None = None,
    num_training_steps: int | None = None,
    scheduler_specific_kwargs: Mapping[str, Any] | None = None,
    default_lr: float | None = None,
) -> Schedule:
    """The schedule of a name: `f(t)` is that of the factory it stands for.

    name: one of transformers' SchedulerType, or its string ("linear", "cosine", ...). base_lr: the group's rate.
    num_warmup_steps, num_training_steps: in updates, where the factory takes them.
    scheduler_specific_kwargs: its other arguments; the constant ones ignore them, as in the library.
    default_lr: `optimizer.defaults["lr"]`, where the factory reads it; by default base_lr.
    Raises ValueError for an unknown name or a missing number of steps, TypeError for arguments that the factory
    does not have, and what the factory raises.

    >>> get_scheduler("linear", base_lr=1.0, num_warmup_steps=0, num_training_steps=4)
    transformers.get_linear_schedule_with_warmup(num_warmup_steps=0, num_training_steps=4, base_lr=1.0)

    Source: transformers 5.23.0, optimization.py.
    """
    name = getattr(name, "value", name)  # of an enumeration
    if name not in FACTORIES:
        raise ValueError(f"get_scheduler: name must be one of {', '.join(map(repr, FACTORIES))}, got {name!r}")
    factory = FACTORIES[name]
    specific = dict(scheduler_specific_kwargs or {})
    if name == "constant":
        return factory(base_lr=base_lr)
    if name in _METRIC_DRIVEN:
        return factory(base_lr=base_lr, **specific)
    if num_warmup_steps is None:
        raise ValueError(f"get_scheduler: {name} requires num_warmup_steps, got None; 0 is no warm-up")
    if name == "constant_with_warmup":
        return factory(num_warmup_steps, base_lr=base_lr)
    if name != "inverse_sqrt":
        if num_training_steps is None and name != "warmup_stable_decay":
            raise ValueError(f"get_scheduler: {name} requires num_training_steps, got None; count the warm-up as well")
        specific["num_training_steps"] = num_training_steps
    if name in _READ_THE_DEFAULT_RATE:
        specific["default_lr"] = default_lr
    return factory(num_warmup_steps=num_warmup_steps, base_lr=base_lr, **specific)
