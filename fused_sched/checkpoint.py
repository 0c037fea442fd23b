"""Checkpoints: what is written, and how one is taken over into memory that a CUDA graph may be using."""

from __future__ import annotations

import warnings
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch

from . import arena, hyperparameters
from . import state as states
from ._warnings import ScheduleWarning

if TYPE_CHECKING:
    from .groups import GroupRecord
    from .optimizer import FusedScheduledAdam

#: State that torch's AdamW knows, plus the masters.
_PORTABLE_STATE = ("step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "master")

#: Options that the live optimizer decides, whatever the checkpoint says.
_LIVE_WINS = ("params", "param_names", "master", "moments", "clock", "schedules", *hyperparameters.TORCH_ONLY)


def export(optimizer: FusedScheduledAdam, packed: dict[str, Any], portable: bool) -> dict[str, Any]:
    """Turn what torch's `state_dict` packed into plain dicts, with the clock in every group.

    The clock is there because engines that shard, filter or reload groups keep their keys and nothing else.
    """
    clock = optimizer.clock
    packed["state"] = {key: dict(value) if isinstance(value, dict) else value for key, value in packed["state"].items()}
    if portable:
        packed["state"] = {
            key: {name: value[name] for name in _PORTABLE_STATE if name in value}
            for key, value in packed["state"].items()
        }
    for group, record in zip(packed["param_groups"], optimizer._records, strict=False):
        group["clock"] = clock
        if not portable:
            group["schedules"] = {name: s.to_dict() for name, s in record.schedules.items()}
    return packed


def load(optimizer: FusedScheduledAdam, state_dict: dict[str, Any]) -> None:
    """Check everything, then take it over; nothing has changed when this raises."""
    state_dict = dict(state_dict)
    for pre_hook in optimizer._optimizer_load_state_dict_pre_hooks.values():
        state_dict = pre_hook(optimizer, state_dict) or state_dict
    saved_groups = state_dict["param_groups"]
    groups = optimizer.param_groups
    _check_sizes(groups, saved_groups)
    records = [optimizer._records[optimizer._records.index_of(group, groups)] for group in groups]
    params = list(chain.from_iterable(group["params"] for group in groups))
    keys = list(chain.from_iterable(group["params"] for group in saved_groups))
    saved_state = state_dict["state"]
    sources = {key: saved_state[key] for key in keys if key in saved_state}
    for param, key in zip(params, keys, strict=True):
        states.check_source(param, sources.get(key, {}))
    options = [_merged_options(record, saved) for record, saved in zip(records, saved_groups, strict=True)]
    for merged in options:
        hyperparameters.check_options(merged)
    clock = _saved_clock(saved_groups, sources)

    for record, merged, saved in zip(records, options, saved_groups, strict=True):
        _warn_about_schedules(record, saved)
        _apply_options(record.group, merged)
    with torch.no_grad():
        _take_state(optimizer, params, keys, sources)
    for group in groups:
        group.pop("clock", None)
    optimizer.set_clock(clock)
    optimizer._applied_settings = []
    for post_hook in optimizer._optimizer_load_state_dict_post_hooks.values():
        post_hook(optimizer)


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


def _merged_options(record: GroupRecord, saved: dict[str, Any]) -> dict[str, Any]:
    """The group's options after loading, in a dict of their own."""
    live = record.group
    merged = dict(live)
    merged.update({key: value for key, value in saved.items() if key not in _LIVE_WINS})
    merged.pop("clock", None)
    for name in ("lr", "weight_decay"):
        schedule = record.schedules.get(name)
        if schedule is None:
            merged[f"{name}_reference"] = None if isinstance(merged[name], torch.Tensor) else merged[name]
            continue
        merged[name] = schedule.reference * _saved_ratio(name, saved)
        merged[f"{name}_reference"] = schedule.reference
    if "lr" in record.schedules:
        merged.pop("initial_lr", None)
    merged["betas"] = tuple(
        record.schedules[name].reference if name in record.schedules else float(beta)
        for name, beta in zip(("beta1", "beta2"), merged["betas"], strict=True)
    )
    return merged


def _saved_ratio(name: str, saved: dict[str, Any]) -> float:
    """By what the saved option had been scaled; 1 for a checkpoint without our schedules."""
    if name not in saved.get("schedules", {}):
        return 1.0
    value, reference = saved[name], saved[f"{name}_reference"]
    return 1.0 if value == reference or not reference else float(value) / float(reference)


def _apply_options(group: dict[str, Any], merged: dict[str, Any]) -> None:
    """Write options into the live dict; a tensor lr keeps its identity, which a captured graph reads."""
    live_lr, new_lr = group["lr"], merged["lr"]
    if isinstance(live_lr, torch.Tensor):
        with torch.no_grad():
            if isinstance(new_lr, torch.Tensor):
                live_lr.copy_(new_lr)
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
            warnings.warn(
                f"the checkpoint was trained with a schedule for {name}, this optimizer has none and goes on with "
                f"a constant; pass the schedule to the constructor or to set_schedule()",
                ScheduleWarning,
                stacklevel=4,
            )
        elif schedule.to_dict() != description:
            warnings.warn(
                f"the checkpoint was trained with another schedule for {name}; this optimizer's own is used: "
                f"{schedule!r}",
                ScheduleWarning,
                stacklevel=4,
            )


def _saved_clock(saved_groups: list[dict[str, Any]], sources: dict[Any, dict[str, Any]]) -> int:
    """Our clock, or for another optimizer's checkpoint the largest step count."""
    clocks = [int(group["clock"]) for group in saved_groups if "clock" in group]
    if clocks:
        return max(clocks)
    return max((int(source.get("step", 0)) for source in sources.values()), default=0)


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
