"""torch's own schedulers, run, and the schedules of this package that should give the same."""

from __future__ import annotations

import math
import pickle
import warnings
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from tolerances import TORCH_DRIFT
from torch.optim import lr_scheduler

from fused_sched import schedules
from fused_sched._warnings import ScheduleWarning
from fused_sched.schedules import Schedule

#: A scheduler's name and its arguments but the optimizer; those of a composition are configurations in "schedulers".
Config = tuple[str, dict[str, Any]]

COMPOSITIONS = {"SequentialLR", "ChainedScheduler"}
READS_NO_RATE = {"CyclicLR", "OneCycleLR"} | COMPOSITIONS


@dataclass
class Run:
    """What a live scheduler gave: rates and momenta (beta1) of the updates, and what ended it."""

    rates: list[float] = field(default_factory=list)
    momenta: list[float] = field(default_factory=list)
    error: Exception | None = None


def optimizer(lr: float = 0.1, **options: Any) -> torch.optim.Optimizer:
    return torch.optim.Adam([torch.zeros(1, requires_grad=True)], lr=lr, **options)


def build(config: Config, opt: torch.optim.Optimizer) -> Any:
    """torch's scheduler, children in the order of the list."""
    name, arguments = config
    if name not in COMPOSITIONS:
        scheduler = getattr(lr_scheduler, name)(opt, **arguments)
    else:
        children = [build(child, opt) for child in arguments["schedulers"]]
        if name == "SequentialLR":
            scheduler = lr_scheduler.SequentialLR(opt, children, list(arguments["milestones"]))
        else:
            scheduler = lr_scheduler.ChainedScheduler(children, opt)
    opt.step()  # or torch warns that the scheduler steps before the optimizer
    return scheduler


def run(scheduler: Any, num_updates: int) -> Run:
    """The hyperparameters of the next updates, stepping the scheduler in between."""
    group = scheduler.optimizer.param_groups[0]
    done = Run()
    for update in range(num_updates):
        done.rates.append(float(group["lr"]))
        done.momenta.append(group["betas"][0])
        if update < num_updates - 1:
            try:
                scheduler.step()
            except Exception as error:
                done.error = error
                break
    return done


def ours(config: Config, base_lr: float, num_steps: int) -> Schedule:
    """The schedule of this package. Functions are tabulated for num_steps."""
    name, arguments = config
    if name in COMPOSITIONS:
        children = [ours(child, base_lr, num_steps) for child in arguments["schedulers"]]
        return getattr(schedules.torch, name)(**{**arguments, "schedulers": children})
    extra: dict[str, Any] = {} if name in READS_NO_RATE else {"base_lr": base_lr}
    if "lr_lambda" in arguments:
        extra["num_steps"] = num_steps
    return getattr(schedules.torch, name)(**arguments, **extra)


def quietly(function: Any, *args: Any, **kwargs: Any) -> Any:
    """The result, without warnings of what is odd in it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ScheduleWarning)
        return function(*args, **kwargs)


def continued(values: list[float], length: int) -> npt.NDArray[np.float64]:
    """Values, the last of them held."""
    return np.array(values + values[-1:] * (length - len(values)))


def assert_same(
    schedule: Schedule, live: Run, num_updates: int, tolerance: float = TORCH_DRIFT, *, least_peak: float = 0.0
) -> None:
    """Rates and momenta of all updates, those after torch's error included, where the last rate is held.

    least_peak: the largest rate of updates before these, if that is more.
    """
    steps = np.arange(num_updates)
    for got, values in ((schedule, live.rates), (schedule.companions.get("beta1"), live.momenta)):
        expected = continued(values, num_updates)
        if got is None:  # an optimizer's own momentum stays
            assert set(expected) == {0.9}
            continue
        wrong = np.abs(got(steps) - expected) > tolerance * max(least_peak, np.abs(expected).max())
        assert not wrong.any(), (schedule, int(np.argmax(wrong)), got(steps)[wrong][:3], expected[wrong][:3])


def outcome(function: Any, *args: Any) -> Any:
    """The result or, if it raises, the exception."""
    try:
        return function(*args)
    except Exception as error:
        return error


def assert_survives(schedule: Schedule) -> None:
    """Storage, and what is written about it."""
    again = (
        quietly(Schedule.from_dict, schedule.to_dict()),
        quietly(eval, repr(schedule), vars(schedules) | {"inf": math.inf}),
        pickle.loads(pickle.dumps(schedule)),
    )
    for other in again:
        assert other == schedule
        assert other.program == schedule.program
