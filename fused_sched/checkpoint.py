"""Checkpoints: what is written, and how one is taken over into memory that a CUDA graph may be using."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from . import arena, conversion, dtensors, hyperparameters
from . import state as states
from ._warnings import warn_schedule
from .base import check_clock
from .callers import called_by_zero, called_by_zero_redundancy

if TYPE_CHECKING:
    from .groups import GroupRecord
    from .optimizer import FusedScheduledAdam

#: Options that the live optimizer decides, whatever the checkpoint says.
_LIVE_WINS = (
    "params",
    "param_names",
    "master",
    "moments",
    "clock",
    "clock_step",
    "group_index",
    "schedules",
    "metric_state",
    *hyperparameters.TORCH_ONLY,
)


def export(optimizer: FusedScheduledAdam, portable: bool) -> dict[str, Any]:
    """State and options as torch's `state_dict` packs them, in plain dicts.

    The clock is in every group because engines that shard, filter or reload groups keep their keys and nothing
    else; beside it the largest step count, which tells whether another optimizer has gone on since.
    """
    counts = dict(zip(optimizer.state, states.step_counts(optimizer.state.values()), strict=True))
    clock, clock_step = optimizer.clock, max(counts.values(), default=0)
    numbers: dict[int, int] = {}
    groups: list[dict[str, Any]] = []
    for record in optimizer._records.of(optimizer.param_groups):
        params = record.group["params"]
        for param in params:
            numbers.setdefault(id(param), len(numbers))
        group = {key: _plain(value) for key, value in record.group.items() if key != "params"}
        for name in ("lr", "weight_decay"):
            if name not in record.schedules:
                group[f"{name}_reference"] = group[name]  # a ratio of 1, whoever wrote the option
        group |= {"clock": clock, "clock_step": clock_step, "group_index": len(groups)}
        if record.machine is not None:
            group["metric_state"] = record.machine.export()
        if not portable:
            group["schedules"] = {name: schedule.to_dict() for name, schedule in record.schedules.items()}
        groups.append({**group, "params": [numbers[id(param)] for param in params]})
    for_zero, for_zero_redundancy = called_by_zero(), called_by_zero_redundancy()
    packed: dict[Any, Any] = {}
    for key, value in optimizer.state.items():
        if isinstance(value, states.ParamState):
            value = _exported_state(key, value, portable, counts[key])
            if for_zero:
                value = conversion.for_zero(value)
            if for_zero_redundancy:
                value["clock"] = clock  # it drops the groups of all optimizers that it gathers
        if isinstance(key, torch.Tensor):
            if id(key) not in numbers:
                raise RuntimeError(
                    f"there is state of a parameter of shape {tuple(key.shape)} that no group holds, and a checkpoint "
                    "names parameters by their place in the groups; put its group back or delete opt.state[p]"
                )
            key = numbers[id(key)]
        packed[key] = dict(value) if isinstance(value, dict) else value
    return {"state": packed, "param_groups": groups}


def _plain(option: Any) -> Any:
    """An option without NumPy's scalars, which `torch.load(weights_only=True)` refuses."""
    if type(option) in (tuple, list):
        return type(option)(map(_plain, option))
    return option.item() if isinstance(option, np.generic) else option


def _exported_state(param: Any, state: states.ParamState, portable: bool, count: int) -> dict[str, Any]:
    exported = dict(state)
    if portable or (dtensors.is_distributed(param) and not dtensors.is_reshardable(state)):
        exported = conversion.portable(dtensors.local(param), dtensors.local_state(param, state), count)
        exported = dtensors.shown(param, exported)
    if not portable and "step_int64" in state:
        # No tensor: DeepSpeed's universal checkpoint cuts the padding off every tensor that is not called "step".
        exported["step_int64"] = count
    return exported


def load(optimizer: FusedScheduledAdam, state_dict: dict[str, Any]) -> None:
    """Check everything, then take it over; nothing has changed when this raises."""
    optimizer._refuse_offloaded("load_state_dict()")
    state_dict = dict(state_dict)
    for pre_hook in optimizer._optimizer_load_state_dict_pre_hooks.values():
        state_dict = pre_hook(optimizer, state_dict) or state_dict
    _check_kinds(state_dict)
    saved_groups = state_dict["param_groups"]
    groups = optimizer.param_groups
    _check_sizes(groups, saved_groups)
    records = optimizer._records.of(groups)
    params = list(chain.from_iterable(group["params"] for group in groups))
    keys = list(chain.from_iterable(group["params"] for group in saved_groups))
    saved_state = state_dict["state"]
    sources = {key: _found(saved_state[key]) for key in keys if key in saved_state}
    for param, key in zip(params, keys, strict=True):
        source = sources.get(key, {})
        conversion.check_source(dtensors.local(param), dtensors.local_state(param, source))
        conversion.check_both_moments(source)
    largest_step = max(states.step_counts(sources.values()), default=0)
    # With more steps than we counted, another optimizer went on: its rate is not a factor of our schedule.
    ours = all(largest_step == group.get("clock_step", largest_step) for group in saved_groups)
    options = _merge(records, saved_groups, ours)
    clock = check_clock(_saved_clock(saved_groups, sources.values(), largest_step))

    for record, saved in zip(records, saved_groups, strict=True):  # before the first change: warnings may be errors
        _warn_about_schedules(record, saved)
    for record, merged, saved in zip(records, options, saved_groups, strict=True):
        _apply_options(record.group, merged)
        record.take_metric_state(saved.get("metric_state"))
    with torch.no_grad():
        _take_state(optimizer, params, keys, sources)
    for key in saved_state.keys() - set(keys):
        optimizer.state[key] = saved_state[key]  # of no parameter: kept as it is, as torch does
    optimizer.set_clock(clock)
    optimizer._devices.forget_rates()
    optimizer._applied_settings, optimizer._resumed = [], clock > 0
    settings = optimizer._records.settings(optimizer._grad_divisor)
    if optimizer._devices.first is not None:
        optimizer._push(settings)  # the clock and the state are on the device already: replays follow at once
    for post_hook in optimizer._optimizer_load_state_dict_post_hooks.values():
        post_hook(optimizer)


def _found(saved: dict[str, Any]) -> dict[str, Any]:
    """A parameter's saved state without empty dicts.

    They are what torch.distributed.checkpoint puts in place of keys that this optimizer's state has and a flattened
    checkpoint has not.
    """
    found = {name: value for name, value in saved.items() if not isinstance(value, dict) or value}
    if len(found) < len(saved) and not found.keys() & {"exp_avg", "exp_avg_code"}:
        raise ValueError(
            "the flattened checkpoint has the moments in another format than this optimizer, which torch does not hand "
            'over; use the nested form (flatten_optimizer_state_dict=False), or moments="fp32"'
        )
    return found


def _check_kinds(state_dict: dict[str, Any]) -> None:
    """Raise TypeError unless this looks like what `state_dict()` returns."""
    remedy = "pass what state_dict() of this optimizer or of torch's Adam returned"
    for key, kind in (("state", dict), ("param_groups", list)):
        if not isinstance(state_dict.get(key), kind):
            got = type(state_dict[key]).__name__ if key in state_dict else "none"
            raise TypeError(f"a checkpoint must have a {kind.__name__} {key!r}, got {got}; {remedy}")
    for index, group in enumerate(state_dict["param_groups"]):
        if not isinstance(group, dict) or not isinstance(group.get("params"), (list, tuple)):
            got = f"the keys {', '.join(map(repr, group))}" if isinstance(group, dict) else repr(group)
            raise TypeError(f"group {index} of a checkpoint must be a dict with a list 'params', got {got}; {remedy}")
        for key in group["params"]:
            state = state_dict["state"].get(key, {})
            if not isinstance(state, dict):
                got = type(state).__name__
                raise TypeError(f"the state of parameter {key!r} in a checkpoint must be a dict, got {got}; {remedy}")


def _check_sizes(groups: list[dict[str, Any]], saved_groups: list[dict[str, Any]]) -> None:
    if len(groups) != len(saved_groups):
        raise ValueError(
            f"the checkpoint must have this optimizer's number of parameter groups, {len(groups)}, "
            f"got {len(saved_groups)}; build the optimizer with the groups it was saved with"
        )
    for index, (group, saved) in enumerate(zip(groups, saved_groups, strict=True)):
        if len(group["params"]) != len(saved["params"]):
            raise ValueError(
                f"group {index} has {len(group['params'])} parameters, the checkpoint's {len(saved['params'])}; "
                "build the optimizer with the parameters it was saved with"
            )


def _merge(records: list[GroupRecord], saved_groups: list[dict[str, Any]], ours: bool) -> list[dict[str, Any]]:
    """The groups' options after loading; raises for those of the checkpoint that do not go with the live ones."""
    options = []
    for index, (record, saved) in enumerate(zip(records, saved_groups, strict=True)):
        try:
            merged = _merged_options(record, saved, ours)
            hyperparameters.check_options(merged)
        except (TypeError, ValueError) as error:
            raise type(error)(f"group {index} cannot have the checkpoint's options: {error}") from error
        options.append(merged)
    return options


def _merged_options(record: GroupRecord, saved: dict[str, Any], ours: bool) -> dict[str, Any]:
    """The group's options after loading, in a dict of their own."""
    live = record.group
    merged = dict(live)
    merged.update({key: value for key, value in saved.items() if key not in _LIVE_WINS})
    for name in ("lr", "weight_decay"):
        schedule = record.schedules.get(name)
        if schedule is None:
            merged[f"{name}_reference"] = None if isinstance(merged[name], torch.Tensor) else merged[name]
            continue
        merged[name] = schedule.reference * (_saved_ratio(name, saved) if ours else 1.0)
        merged[f"{name}_reference"] = schedule.reference
    if "lr" in record.schedules:
        merged.pop("initial_lr", None)
    hyperparameters.check_pair(merged["betas"])
    merged["betas"] = tuple(
        record.schedules[name].reference if name in record.schedules else float(beta)
        for name, beta in zip(("beta1", "beta2"), merged["betas"], strict=True)
    )
    return merged


def _saved_ratio(name: str, saved: dict[str, Any]) -> float:
    """By what a scheduled option had been scaled; 1 for another optimizer's checkpoint."""
    value, reference = saved.get(name), saved.get(f"{name}_reference")
    return 1.0 if not reference or value == reference else float(value) / float(reference)  # type: ignore[arg-type]


def _apply_options(group: dict[str, Any], merged: dict[str, Any]) -> None:
    """Write options into the live dict; a tensor lr keeps its identity, which a captured graph reads."""
    live_lr, new_lr = group["lr"], merged["lr"]
    if isinstance(live_lr, torch.Tensor):
        with torch.no_grad():
            if isinstance(new_lr, torch.Tensor):
                live_lr.copy_(new_lr.reshape(live_lr.shape))
            else:
                live_lr.fill_(new_lr)
        merged["lr"] = live_lr
    elif isinstance(new_lr, torch.Tensor):
        merged["lr"] = merged["lr_reference"] = float(new_lr)
    for stale in [key for key in group if key not in merged]:
        del group[stale]
    group.update(merged)


def _warn_about_schedules(record: GroupRecord, saved: dict[str, Any]) -> None:
    for name, description in saved.get("schedules", {}).items():
        schedule = record.schedules.get(name)
        if schedule is None:
            warn_schedule(
                f"the checkpoint was trained with a schedule for {name}, this optimizer has none and goes on with "
                f"a constant; pass the schedule to the constructor or to set_schedule()"
            )
        elif schedule.to_dict() != description:
            warn_schedule(
                f"the checkpoint was trained with another schedule for {name}; this optimizer's own is used: "
                f"{schedule!r}"
            )


def _saved_clock(saved_groups: list[dict[str, Any]], saved_states: Iterable[dict[str, Any]], largest_step: int) -> int:
    """Our clock, moved on by the steps that another optimizer took since; without one, the largest step count."""
    clocks = [
        int(group["clock"]) + max(0, largest_step - int(group.get("clock_step", largest_step)))
        for group in saved_groups
        if int(group.get("clock", -1)) >= 0
    ]
    return max(clocks or states.clocks_of(saved_states), default=largest_step)


def _take_state(
    optimizer: FusedScheduledAdam,
    params: list[torch.Tensor],
    keys: list[Any],
    sources: dict[Any, dict[str, Any]],
) -> None:
    taken, layouts = [], []
    group_of = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    for param, key in zip(params, keys, strict=True):
        if key not in sources and param not in optimizer.state:
            continue
        # A parameter the checkpoint knows nothing of starts fresh in the memory it has.
        param_state = optimizer.state[param]
        param_state.clear()
        param_state.update(sources.get(key, {}))
        taken.append(param)
        layouts.append(arena.Layout.of(param, group_of[id(param)]))
    states.ensure(optimizer.state, taken, layouts)
    # Of parameters that an engine has hidden, what was written waits.
    optimizer.state.changed = any(s.changed for s in optimizer.state.values() if isinstance(s, states.ParamState))
