"""From a group's options to what the device evaluates: numbers, device tensors and schedule programs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from numbers import Integral, Real
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from . import landmarks, precision
from ._warnings import warn_schedule
from .machine import Machine
from .schedules import Schedule
from .schedules.library import LibrarySchedule
from .schedules.metric import MetricSchedule

#: Hyperparameters that a Schedule may drive.
SCHEDULABLE = ("lr", "beta1", "beta2", "weight_decay")

#: Scheduled ones whose group option may be scaled by others (`group["lr"] *= 0.5`, a dry run's 0): their
#: group also keeps what the option was when the schedule was set.
_WITH_REFERENCE = ("lr", "weight_decay")

#: Updates at which a schedule is probed when it is set, besides its own landmarks and up to its end: densely where
#: schedules usually have their phases, then ever more sparsely.
_PROBES = np.array([*range(1 << 16), *(2**k + j for k in range(16, 41) for j in (-1, 0, 1))])

#: Options of torch's Adam that this optimizer has no use for, and what to do instead.
TORCH_ONLY = {
    "fused": "the update is always fused",
    "foreach": "all tensors share one launch",
    "capturable": "step() can always be captured in a CUDA graph",
    "differentiable": "use torch.optim.AdamW(differentiable=True) to differentiate through the update",
}


#: Options that groups cannot have of their own.
CONSTRUCTOR_ONLY = ("max_grad_norm", "grad_divisor", "skip_nonfinite", "seed", "backend")


class Source(NamedTuple):
    """Where a hyperparameter's value comes from: scale, times a schedule, a device tensor or a machine's rate."""

    scale: float
    schedule: Schedule | None = None
    tensor_address: int = 0
    tensor_dtype: torch.dtype | None = None
    machine: Machine | None = None

    @property
    def only_on_device(self) -> bool:
        return self.tensor_dtype is not None or self.machine is not None

    def value(self, step: int, tensor: torch.Tensor | None) -> float:
        """The value at an index of the schedule clock, as the device computes it; reads a tensor back."""
        if self.schedule is not None:
            return self.scale * self.schedule(step)
        if self.tensor_dtype is not None:
            assert tensor is not None
            return self.scale * float(tensor.item())
        return self.scale if self.machine is None else self.scale * self.machine.rate()


class GroupSettings(NamedTuple):
    """Everything the device knows about one group; equal settings need no upload."""

    lr: Source
    beta1: Source
    beta2: Source
    weight_decay: Source
    eps: float
    grad_divisor: float
    decoupled: bool
    maximize: bool


def split_options(options: dict[str, Any]) -> dict[str, Schedule]:
    """Replace the Schedules among a group's options by their reference values, and return them by name.

    A rate's companions take the place of the numbers given for them, as the library's scheduler overwrites those.
    `lr_reference` and `weight_decay_reference` are set beside the options that others may scale.
    """
    for name in CONSTRUCTOR_ONLY:
        if name in options:
            raise ValueError(f"{name} is one for the whole optimizer; pass it to the constructor, not in a group")
    for name, remedy in TORCH_ONLY.items():
        if options.get(name):
            raise TypeError(f"FusedScheduledAdam takes no {name!r} option, got {options[name]!r}: {remedy}; remove it")
        options.pop(name, None)
    schedules: dict[str, Schedule] = {}
    betas = options["betas"]
    check_pair(betas)
    values = {
        "lr": options["lr"],
        "beta1": betas[0],
        "beta2": betas[1],
        "weight_decay": options["weight_decay"],
    }
    if isinstance(values["lr"], Schedule):
        for name, companion in values["lr"].companions.items():
            if isinstance(values[name], Schedule):
                raise ValueError(
                    f"{name} is scheduled twice: by the lr, {values['lr']!r}, and by {values[name]!r}; pass a number "
                    f"for {name}, or the rate alone as join([lr], [])"
                )
            values[name] = companion
    for name, value in values.items():
        if isinstance(value, Schedule):
            check_schedule(name, value)
            schedules[name] = value
            values[name] = value.reference
    options["lr"] = values["lr"]
    options["betas"] = (values["beta1"], values["beta2"])
    options["weight_decay"] = values["weight_decay"]
    for name in _WITH_REFERENCE:
        options[f"{name}_reference"] = None if isinstance(values[name], torch.Tensor) else values[name]
    return schedules


def check_pair(betas: object) -> None:
    """Raise ValueError unless these are two values."""
    if not isinstance(betas, (tuple, list)) or len(betas) != 2:
        raise ValueError(f"betas must be a pair of numbers or Schedules, got {betas!r}")


def check_schedule(name: str, schedule: Schedule) -> None:
    """Raise if a schedule cannot drive this hyperparameter; warn of a learning rate that turns negative.

    A schedule of another library may have said so when it was constructed.
    """
    if isinstance(schedule, MetricSchedule):
        if name != "lr":
            raise ValueError(
                f"{name} cannot follow metrics, got {schedule!r}; only lr can, pass a number or a Schedule"
            )
        return
    steps = _probes(schedule)
    values = schedule(steps)
    if name in ("beta1", "beta2"):
        rule, outside = "stay in [0, 1)", ~((values >= 0.0) & (values < 1.0))
    elif name == "weight_decay":
        rule, outside = "stay finite and not negative", ~((values >= 0.0) & np.isfinite(values))
    else:
        rule, outside = "stay finite", ~np.isfinite(values)
    if outside.any():
        first = int(steps[outside].min())
        end = f"end it before, as in join([schedule, constant(value)], [{first}])" if first else "use another one"
        raise ValueError(
            f"a schedule for {name} must {rule} at every update, got {schedule(first)!r} at update {first}; {end}"
        )
    negative = values < 0.0
    if name != "lr" or not negative.any():
        return
    first = int(steps[negative].min())
    if not (values > 0.0).any():
        raise ValueError(
            f"a schedule for lr must be above 0 at some update, got {schedule(first)!r} at update {first} and nothing "
            "above 0; use schedule.scaled(-1.0), and maximize=True to ascend"
        )
    if not (isinstance(schedule, LibrarySchedule) and schedule.negative_rate()):
        warn_schedule(
            f"the learning rate turns negative: {schedule(first)!r} at update {first}; the optimizer will ascend from "
            "there"
        )


def _probes(schedule: Schedule) -> npt.NDArray[np.int64]:
    """Updates that show a schedule's range, in no order."""
    own, end = landmarks.extremes(schedule.tree), schedule.held_from()
    if end is None:
        return np.concatenate([_PROBES, [*own]])
    return np.concatenate([_PROBES[: np.searchsorted(_PROBES, end)], [*own, min(end, landmarks.LAST_STEP)]])


def check_options(options: Mapping[str, Any]) -> None:
    """Raise if a group's plain options are unusable, saying what, got, rule and remedy."""
    lr = options["lr"]
    if isinstance(lr, torch.Tensor):
        if lr.numel() != 1 or lr.dtype not in precision.FORMATS:
            raise ValueError(
                "a tensor lr must have one element of float32, bfloat16, float16 or float64, "
                f"got shape {tuple(lr.shape)} of {lr.dtype}"
            )
        if lr.device.type == "cpu":  # reading another device's would wait for it
            _check_number("lr", lr.item(), 0.0, math.inf)
    else:
        _check_number("lr", lr, 0.0, math.inf)
    check_pair(options["betas"])
    for index, beta in enumerate(options["betas"], start=1):
        _check_number(f"beta{index}", beta, 0.0, 1.0)
    _check_number("eps", options["eps"], 0.0, math.inf)
    _check_number("weight_decay", options["weight_decay"], 0.0, math.inf)
    for name in ("decoupled_weight_decay", "amsgrad", "maximize"):
        check_flag(name, options[name])
    precision.check_names(options["master"], options["moments"], options["amsgrad"])


def _check_number(name: str, got: Any, low: float, high: float) -> None:
    allowed = "a number or a Schedule" if name in SCHEDULABLE else "a number"
    if isinstance(got, bool) or not isinstance(got, Real):
        raise TypeError(f"{name} must be {allowed}, got {got!r} of type {type(got).__name__}; pass float(...) of it")
    value = float(got)
    if not low <= value < high:  # false for NaN as well
        raise ValueError(f"{name} must be in [{low:g}, {high:g}), got {got!r}; choose a value in that range")


def check_flag(name: str, got: Any) -> None:
    """Raise TypeError unless this is True or False."""
    if not isinstance(got, (bool, np.bool_)):
        raise TypeError(f"{name} must be True or False, got {got!r} of type {type(got).__name__}; pass a bool")


def check_seed(got: Any) -> int:
    """The seed of stochastic rounding as an int."""
    if isinstance(got, bool) or not isinstance(got, Integral):
        raise TypeError(f"seed must be an int, got {got!r} of type {type(got).__name__}; pass int(...) of it")
    return int(got) & (2**64 - 1)


def check_grad_divisor(got: Any) -> float:
    """The divisor of the gradients as a float."""
    if not isinstance(got, Real):
        raise TypeError(f"grad_divisor must be a number, got {got!r} of type {type(got).__name__}")
    value = float(got)
    if not 0.0 < value < math.inf:
        raise ValueError(f"grad_divisor must be positive and finite, got {got!r}")
    return value


def check_max_grad_norm(got: Any) -> float | None:
    """The limit of the gradients' norm as a float, or None."""
    if got is None:
        return None
    if isinstance(got, bool) or not isinstance(got, Real):
        raise TypeError(
            f"max_grad_norm must be a number or None, got {got!r} of type {type(got).__name__}; pass float(...) of it"
        )
    value = float(got)
    if not value > 0.0:  # false for NaN as well
        raise ValueError(
            f"max_grad_norm must be positive, got {got!r}; pass None to clip nothing, float('inf') to measure only"
        )
    return value


def read_group(
    group: Mapping[str, Any], schedules: Mapping[str, Schedule], machine: Machine | None, grad_divisor: float
) -> GroupSettings:
    """A group's settings as of now; raises where they are unusable."""
    check_options(group)
    betas = group["betas"]
    return GroupSettings(
        lr=_source("lr", group, schedules, machine),
        beta1=_beta_source("beta1", betas[0], schedules),
        beta2=_beta_source("beta2", betas[1], schedules),
        weight_decay=_source("weight_decay", group, schedules),
        eps=float(group["eps"]),
        grad_divisor=grad_divisor,
        decoupled=bool(group["decoupled_weight_decay"]),
        maximize=bool(group["maximize"]),
    )


def _source(
    name: str, group: Mapping[str, Any], schedules: Mapping[str, Schedule], machine: Machine | None = None
) -> Source:
    value = group[name]
    schedule = schedules.get(name)
    if schedule is None:
        if isinstance(value, torch.Tensor):
            return Source(1.0, None, value.data_ptr(), value.dtype)
        return Source(float(value))
    if isinstance(value, torch.Tensor):
        if value.device.type != "cpu":
            raise TypeError(
                f"group[{name!r}] follows a Schedule and must stay a float, got a tensor on {value.device}; "
                f"drive the rate with set_schedule(...) or without a Schedule"
            )
        value = value.item()
    ratio = _ratio(name, float(value), group[f"{name}_reference"])
    return Source(ratio, schedule) if machine is None else Source(ratio, machine=machine)


def _ratio(name: str, value: float, reference: float) -> float:
    if value == reference:
        return 1.0
    if reference == 0.0:
        raise ValueError(
            f"group[{name!r}] was changed from 0 to {value!r}, but its Schedule's reference is 0, so the change has "
            "no meaning as a factor; use set_schedule(schedule.scaled(...)) instead"
        )
    return value / reference


def _beta_source(name: str, value: float, schedules: Mapping[str, Schedule]) -> Source:
    schedule = schedules.get(name)
    if schedule is None:
        return Source(float(value))
    if float(value) != schedule.reference:
        raise ValueError(
            f"{name} follows a Schedule, but group['betas'] was changed to hold {value!r}; "
            f"use set_schedule(..., hyperparameter={name!r})"
        )
    return Source(1.0, schedule)


def replaced(
    group: Mapping[str, Any], schedules: Mapping[str, Schedule], new: Mapping[str, Schedule | float]
) -> tuple[dict[str, Any], dict[str, Schedule]]:
    """A group's changed options and its schedules with new ones in place; raises if they are unusable."""
    changed: dict[str, Any] = {}
    kept = {name: schedule for name, schedule in schedules.items() if name not in new}
    for name, value in new.items():
        if not isinstance(value, (Schedule, Real)):
            raise TypeError(
                f"{name} must be set to a Schedule or a number, got {value!r} of type {type(value).__name__}"
            )
        reference = value.reference if isinstance(value, Schedule) else float(value)
        if name in _WITH_REFERENCE:
            scheduled = name in schedules and isinstance(value, Schedule)
            ratio = _ratio(name, float(group[name]), group[f"{name}_reference"]) if scheduled else 1.0
            changed[name] = reference * ratio
            changed[f"{name}_reference"] = reference
        else:
            betas = list(changed.get("betas", group["betas"]))
            betas[("beta1", "beta2").index(name)] = reference
            changed["betas"] = tuple(betas)
        if isinstance(value, Schedule):
            kept[name] = value
    check_options({**group, **changed})
    return changed, kept


def check_keywords(unsupported: Mapping[str, Any]) -> None:
    """Raise for keyword arguments that the constructor does not know."""
    for name, got in unsupported.items():
        if name in TORCH_ONLY:
            raise TypeError(
                f"FusedScheduledAdam takes no {name!r} argument, got {got!r}: {TORCH_ONLY[name]}; remove it"
            )
        raise TypeError(f"FusedScheduledAdam got an unexpected keyword argument {name!r}")
