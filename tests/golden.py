"""Learning rates recorded from the real libraries (golden/*.json), as schedules of this package.

A record holds `library`, `version`, `schedule`, `config` (the library's keyword arguments, and what it took from
elsewhere), `steps`, `lr` and, where the library schedules them, `momentum` (beta1) and `weight_decay`; for
metric-driven schedules `metrics`, of which metric i was reported after update i.
"""

from __future__ import annotations

import json
import math
import warnings
from bisect import bisect_right
from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

from fused_sched import schedules
from fused_sched._warnings import ScheduleWarning
from fused_sched.schedules import Schedule

FOLDER = Path(__file__).parent / "golden"
Record = dict[str, Any]

#: Arguments of the libraries' constructors that mean a schedule from its start, which ours have not.
FROM_THE_START = (("last_epoch", -1), ("last_batch_iteration", -1))

#: Names of companions in the records.
COMPANIONS = {"beta1": "momentum", "weight_decay": "weight_decay"}


def records() -> Iterator[tuple[str, Record]]:
    """All records, each with a name for test ids."""
    for path in sorted(FOLDER.glob("*.json")):
        for i, record in enumerate(json.loads(path.read_text())):
            yield f"{path.stem}-{i}", record


def schedules_from_record(record: Record) -> dict[str, Schedule]:
    """The schedules that give a record's values: "lr", and "momentum" and "weight_decay" where it has them.

    Raises what the library's constructor raised.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ScheduleWarning)  # odd arguments are what many records are about
        config = {
            name: value for name, value in deepcopy(record["config"]).items() if (name, value) not in FROM_THE_START
        }
        if record["library"] == "torch":
            config["n"] = max(record.get("steps") or [0]) + 1
        lr = ADAPTERS[record["library"]](record["schedule"], config)
        named = {COMPANIONS[name]: s for name, s in lr.companions.items() if name in COMPANIONS}
    return {"lr": lr, **{name: s for name, s in named.items() if name in record}}


def _deepspeed(schedule: str, config: dict[str, Any]) -> Schedule:
    group, opt_lr = config.pop("group", 0), config.pop("opt_lr", None)
    base_lrs = opt_lr if isinstance(opt_lr, list) else [opt_lr]
    return getattr(schedules.deepspeed, schedule).per_group(base_lrs, **config)[group]


def _torch(schedule: str, config: dict[str, Any]) -> Schedule:
    arguments = of_group(config)
    base_lr, num_steps = arguments.pop("lr", None), arguments.pop("n")
    if "schedulers" in arguments:
        arguments["schedulers"] = _torch_children(schedule, arguments, base_lr, num_steps)
    elif schedule not in ("CyclicLR", "OneCycleLR"):
        arguments["base_lr"] = base_lr
    if "expr" in arguments:
        arguments["lr_lambda"] = _table(arguments.pop("expr"), num_steps, first=int(schedule == "MultiplicativeLR"))
    return getattr(schedules.torch, schedule)(**arguments)


def _table(expr: str, num_steps: int, first: int) -> list[float]:
    """An expression in t from t = first on, up to an error of its own."""
    function = eval(f"lambda t: {expr}", {"math": math})
    values = [1.0] if first else [float(function(0))]
    for t in range(1, num_steps):
        try:
            values.append(float(function(t)))
        except (ArithmeticError, ValueError):
            break
    return values


def _torch_children(schedule: str, arguments: dict[str, Any], lr: float, num_steps: int) -> list[Schedule]:
    """Each child reads the initial_lr that those before it have left; a SequentialLR begins at the last one's."""
    configs = [(name, {**child, "n": num_steps}) for name, child in arguments["schedulers"]]
    rates = []
    for i, (name, child) in enumerate(configs):
        if name == "OneCycleLR":
            lr = child["max_lr"] / child.get("div_factor", 25.0)
        elif name == "CyclicLR" and i == 0:
            lr = child["base_lr"]
        rates.append(lr)
    if schedule == "SequentialLR":
        first = bisect_right(arguments["milestones"], 0)
        if first < len(configs) and configs[first][0] not in ("LambdaLR", "CosineAnnealingWarmRestarts"):
            rates[first] = lr
    return [_torch(name, {**child, "lr": rate}) for (name, child), rate in zip(configs, rates, strict=True)]


def _transformers(schedule: str, config: dict[str, Any]) -> Schedule:
    # `group_lr` is the recorded group's own rate, `lr` the optimizer's default.
    config = of_group(config)
    default_lr = config.pop("lr")
    steps = {name: config.pop(name, None) for name in ("num_warmup_steps", "num_training_steps")}
    return schedules.transformers.get_scheduler(
        schedule,
        base_lr=config.pop("group_lr", default_lr),
        default_lr=default_lr,
        scheduler_specific_kwargs=config,
        **steps,
    )


def _optax(schedule: str, config: dict[str, Any]) -> Schedule:
    if schedule == "join_schedules":
        config["schedules"] = [_optax(*child) for child in config["schedules"]]
    if config.get("boundaries_and_scales"):  # the keys of JSON are strings
        config["boundaries_and_scales"] = {
            json.loads(step): scale for step, scale in config["boundaries_and_scales"].items()
        }
    return getattr(schedules.optax, schedule)(**config)


def _megatron(schedule: str, config: dict[str, Any]) -> Schedule:
    return getattr(schedules.megatron, schedule)(**config)


def _timm(schedule: str, config: dict[str, Any]) -> Schedule:
    every = config.pop("every", 0) or None
    config.setdefault("t_in_epochs", every is not None)
    return getattr(schedules.timm, schedule)(base_lr=config.pop("lr"), updates_per_epoch=every, **config)


ADAPTERS: dict[str, Callable[[str, dict[str, Any]], Schedule]] = {
    "deepspeed": _deepspeed,
    "torch": _torch,
    "transformers": _transformers,
    "optax": _optax,
    "megatron": _megatron,
    "timm": _timm,
}


#: Arguments of which a list has one entry per group.
PER_GROUP = frozenset(
    "lr opt_lr base_lr max_lr min_lr base_momentum max_momentum lr_range_test_min_lr warmup_min_lr warmup_max_lr "
    "cycle_min_lr cycle_max_lr cycle_min_mom cycle_max_mom".split()
)


def of_group(config: dict[str, Any]) -> dict[str, Any]:
    """The arguments of the recorded group."""
    group = config.pop("group", 0)
    return {k: v[group] if k in PER_GROUP and isinstance(v, list) else v for k, v in config.items()}
