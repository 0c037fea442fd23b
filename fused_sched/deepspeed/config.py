"""The optimizer and the schedule that DeepSpeed would build from its configuration.

Read are the sections "optimizer" and "scheduler" and the key "gradient_clipping". The rest (batch sizes, precision,
ZeRO, ...) is the engine's, which is neither needed nor touched here.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import json
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import torch

from .. import schedules
from .._warnings import each_said_once
from ..optimizer import FusedScheduledAdam
from ..schedules import Schedule
from ..schedules.deepspeed import DeepSpeedSchedule
from ..schedules.library import LibrarySchedule

Config: TypeAlias = Mapping[str, Any] | str | os.PathLike[str]

#: The keys of a section. DeepSpeed itself ignores others, a misspelt "params" included.
_SECTION_KEYS = {"optimizer": ("type", "params", "legacy_fusion"), "scheduler": ("type", "params")}

_ADAMS = ("adam", "adamw")  # DeepSpeed takes them in any case
_DEFAULT_LR = 1e-3  # of DeepSpeed's FusedAdam and of torch's

#: Parameters of DeepSpeed's and torch's Adam that are options here under the same name.
_SAME_NAME = ("lr", "betas", "eps", "weight_decay", "amsgrad", "maximize")
#: Those that choose between Adams.
_VARIANTS = ("torch_adam", "adam_w_mode")
#: Those that change how the update is computed elsewhere, or where its state is, but not its result.
_WITHOUT_EFFECT = ("fp32_optimizer_states", "set_grad_none", "foreach", "fused", "capturable")
#: Those with only one value that can be had here, and why.
_FIXED = {
    "bias_correction": (True, "the update always corrects the moments' bias"),
    "differentiable": (False, "use torch.optim.AdamW to differentiate through the update"),
}
_OPTIMIZER_PARAMS = (*_SAME_NAME, *_VARIANTS, *_WITHOUT_EFFECT, *_FIXED)

#: Arguments of torch's schedulers of which a list has one entry per group.
_TORCH_GROUP_ARGUMENTS = ("base_lr", "max_lr", "min_lr", "base_momentum", "max_momentum")


def optimizer_from_config(params: Iterable[Any], ds_config: Config, **options: Any) -> FusedScheduledAdam:
    """FusedScheduledAdam as a DeepSpeed configuration describes it, with its schedule inside.

    params: tensors, named parameters or group dicts, whose own options win over the configuration's.
    ds_config: a dict, or the path of a JSON file (Hjson, where the package `hjson` is installed).
    options: arguments of FusedScheduledAdam, which win over the configuration's: `grad_divisor`, `master`, ...

    "Adam" and "AdamW" both decouple the weight decay, unless "Adam" has `"adam_w_mode": false`; without
    `"torch_adam": true` the weight decay defaults to 0. The scheduler is one of DeepSpeed's or, by name, of torch's;
    without one the rate is constant. Lists have one entry per group. OneCycle overwrites both betas. The key
    "gradient_clipping" becomes max_grad_norm. Where it is absent, DeepSpeed 0.19.8 clips at 1.0; nothing is clipped
    here.

    Raises ValueError or TypeError, with the key in question, for a section or parameter that is missing, unknown,
    misspelt, "auto" or of no use, OSError for a file that cannot be read.

    >>> import torch
    >>> from fused_sched.deepspeed import optimizer_from_config
    >>> ds_config = {
    ...     "optimizer": {"type": "AdamW", "params": {"lr": 0.01, "weight_decay": 0.1}},
    ...     "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 100}},
    ... }
    >>> opt = optimizer_from_config([torch.zeros(8, requires_grad=True)], ds_config)
    >>> opt.param_groups[0]["weight_decay"], opt.param_groups[0]["lr"]
    (0.1, 0.01)

    Source: DeepSpeed 0.19.8, runtime/engine.py, _configure_basic_optimizer and _scheduler_from_config.
    """
    config = read(ds_config)
    clipping = {} if "max_grad_norm" in options else _clipping(config)
    if "deepspeed" in sys.modules:
        from .engine import register  # which needs this module

        register()
    settings = {**_optimizer_settings(config, options), **clipping, **options}
    entries = params if isinstance(params, torch.Tensor) else list(params)  # of a tensor torch says what is wrong
    groups = [] if isinstance(entries, torch.Tensor) else [entry for entry in entries if isinstance(entry, Mapping)]
    section = section_of(config, "scheduler")
    if section is not None:
        rates = schedules_of(section, [_number(group.get("lr", settings["lr"])) for group in groups or [{}]])
        if groups:
            entries = [{**group, "lr": rate} for group, rate in zip(groups, rates, strict=True)]
        else:
            settings["lr"] = rates[0]
    return FusedScheduledAdam(entries, **settings)


def schedule_from_config(ds_config: Config, *, base_lr: float | None = None) -> Schedule:
    """The learning rate that a DeepSpeed configuration gives an optimizer with one group.

    ds_config: as in optimizer_from_config. base_lr: the optimizer's rate, if it is not in the configuration.
    Raises as optimizer_from_config does.

    >>> from fused_sched.deepspeed import schedule_from_config
    >>> schedule_from_config({"scheduler": {"type": "WarmupLR", "params": {"warmup_max_lr": 0.1}}})
    deepspeed.WarmupLR(warmup_max_lr=0.1)
    """
    config = read(ds_config)
    section = section_of(config, "scheduler")
    if section is None:
        raise ValueError('ds_config has no "scheduler" section, so its rate is constant; use schedules.constant(lr)')
    optimizer = section_of(config, "optimizer")
    if base_lr is None and optimizer is not None:
        default = _DEFAULT_LR if _type(optimizer, "optimizer").lower() in _ADAMS else None
        in_config = (optimizer.get("params") or {}).get("lr", default)
        base_lr = None if in_config == "auto" else in_config
    return schedules_of(section, [base_lr])[0]


# The configuration as data.


def read(ds_config: Config) -> Mapping[str, Any]:
    """The configuration as a dict, its keys checked for misspelt ones."""
    if isinstance(ds_config, str | os.PathLike):
        path = Path(ds_config)
        config = _parse(path.read_text(encoding="utf-8"), str(path))
    else:
        config = ds_config
    if not isinstance(config, Mapping):
        raise TypeError(f"ds_config must be a dict or the path of a JSON file with an object, got {config!r}")
    known = (*_SECTION_KEYS, "gradient_clipping")
    for key in config:
        # There are some sixty other keys, of which none is that similar to these.
        close = _closest(key, known, cutoff=0.8)
        if key not in known and close:
            raise ValueError(f'ds_config has no key "{key}"; did you mean "{close}"?')
    return config


def _parse(text: str, path: str) -> Any:
    try:
        return json.loads(text, object_pairs_hook=_without_duplicates)
    except json.JSONDecodeError as error:
        try:
            hjson = importlib.import_module("hjson")  # DeepSpeed's reader, which takes comments
        except ImportError:
            raise ValueError(f"{path} is not JSON: {error}; for comments as in Hjson, install hjson") from error
        try:
            return hjson.loads(text, object_pairs_hook=_without_duplicates)
        except hjson.HjsonDecodeError as hjson_error:
            raise ValueError(f"{path} is neither JSON nor Hjson: {hjson_error}") from hjson_error


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keys = [key for key, _ in pairs]
    for key in keys:
        if keys.count(key) > 1:
            raise ValueError(f'ds_config has the key "{key}" twice in one section; remove one')
    return dict(pairs)


def section_of(config: Mapping[str, Any], name: str) -> Mapping[str, Any] | None:
    """A section whose keys are checked, None where there is none."""
    section = config.get(name)
    if section is None:
        return None
    if not isinstance(section, Mapping):
        raise TypeError(f'{name} must be a section with "type" and "params", got {section!r}')
    for key in section:
        _check_key(key, name, _SECTION_KEYS[name])
    return section


def _type(section: Mapping[str, Any], name: str) -> str:
    if not isinstance(section.get("type"), str):
        raise ValueError(f"{name}.type must be the name of the {name}, got {section.get('type')!r}")
    return str(section["type"])


def _params(section: Mapping[str, Any], name: str, allowed: Sequence[str], given: Iterable[str] = ()) -> dict[str, Any]:
    """A section's parameters, less those that are given elsewhere."""
    params = section.get("params")
    if params is None:
        params = {}
    if not isinstance(params, Mapping):
        raise TypeError(f"{name}.params must be an object of parameters, got {params!r}")
    for key, value in params.items():
        _check_key(key, f"{name}.params", allowed)
        if key not in given and isinstance(value, str) and value == "auto":
            raise ValueError(
                f'{name}.params.{key} is "auto", which the Trainer of transformers fills in from its own arguments; '
                "write a value"
            )
    return {key: value for key, value in params.items() if key not in given}


def _check_key(key: str, where: str, allowed: Sequence[str]) -> None:
    if key not in allowed:
        close = _closest(key, allowed)
        guess = f'did you mean "{close}"?' if close else f"remove it, or write one of {', '.join(allowed)}"
        raise ValueError(f'{where} has no key "{key}"; {guess}')


def _closest(word: str, known: Iterable[str], cutoff: float = 0.6) -> str | None:
    by_lower = {name.lower(): name for name in known}
    close = difflib.get_close_matches(str(word).lower(), by_lower, n=1, cutoff=cutoff)
    return by_lower[close[0]] if close else None


# What the sections mean.


def _optimizer_settings(config: Mapping[str, Any], given: Iterable[str]) -> dict[str, Any]:
    """Arguments of FusedScheduledAdam from the section "optimizer"."""
    section = section_of(config, "optimizer")
    if section is None:
        raise ValueError(
            'ds_config has no "optimizer" section; add one, or pass lr=schedule_from_config(ds_config, base_lr=...) to '
            "FusedScheduledAdam"
        )
    name = _type(section, "optimizer")
    if name.lower() not in _ADAMS:
        close = _closest(name, ("Adam", "AdamW"))
        guess = f'; did you mean "{close}"?' if close else ", so let DeepSpeed build it"
        raise ValueError(f'optimizer.type must be "Adam" or "AdamW", got "{name}", which is another optimizer{guess}')
    if "max_grad_norm" in (section.get("params") or {}):
        raise ValueError("optimizer.params.max_grad_norm is no parameter of DeepSpeed; use gradient_clipping beside it")
    params = _params(section, "optimizer", _OPTIMIZER_PARAMS, given)
    for key, (value, reason) in _FIXED.items():
        if bool(params.get(key, value)) is not value:
            raise ValueError(f"optimizer.params.{key} must be {json.dumps(value)}, got {params[key]!r}: {reason}")
    decoupled = name.lower() == "adamw" or bool(params.get("adam_w_mode", True))
    settings: dict[str, Any] = {
        "lr": _DEFAULT_LR,
        # torch.optim.AdamW has a default of its own; DeepSpeed's Adams and torch.optim.Adam have none.
        "weight_decay": 0.01 if params.get("torch_adam") and decoupled else 0.0,
        "decoupled_weight_decay": decoupled,
        **{key: params[key] for key in _SAME_NAME if key in params},
    }
    if isinstance(settings.get("betas"), list):
        settings["betas"] = tuple(settings["betas"])
    return settings


def _clipping(config: Mapping[str, Any]) -> dict[str, Any]:
    norm = config.get("gradient_clipping") or 0.0
    if isinstance(norm, bool) or not isinstance(norm, int | float):
        raise ValueError(f"gradient_clipping must be the largest norm of the gradients, or 0 for none, got {norm!r}")
    return {"max_grad_norm": float(norm)} if norm else {}


def _number(lr: Any) -> Any:
    """The optimizer's rate for a scheduler that reads it."""
    if isinstance(lr, Schedule):
        raise ValueError(f'lr is scheduled twice: by the "scheduler" section and by {lr!r}; remove one of them')
    return lr.item() if isinstance(lr, torch.Tensor) else lr


def schedules_of(section: Mapping[str, Any], base_lrs: Sequence[float | None]) -> list[Schedule]:
    """The section "scheduler", one schedule per group."""
    cls = _schedule_class(_type(section, "scheduler"))
    own = _arguments(cls, keyword_only=False)
    resume = "last_batch_iteration" if issubclass(cls, DeepSpeedSchedule) else "last_epoch"
    if section.get("params") is None:
        raise ValueError(
            f"scheduler.params is missing, without which DeepSpeed fails; {cls.word} takes {', '.join(own)}"
        )
    # The rate is the optimizer's section's.
    ours = [name for name in _arguments(cls, keyword_only=True) if name != "base_lr"]
    params = _params(section, "scheduler", [*own, *ours, resume])
    if params.pop(resume, -1) != -1:
        raise ValueError(f"scheduler.params.{resume} must be -1; use opt.set_clock(n) to begin at update n")
    for key, default in own.items():
        if default is inspect.Parameter.empty and key not in params:
            raise ValueError(f"scheduler.params.{key} is missing, without which {cls.word} cannot be built; add it")
    if issubclass(cls, DeepSpeedSchedule):
        return list(cls.per_group(base_lrs, **params))  # type: ignore[arg-type]  # None: the class says what it lacks
    with each_said_once():
        return _torch_schedules(cls, base_lrs, params)


def _torch_schedules(
    cls: type[LibrarySchedule], base_lrs: Sequence[float | None], params: Mapping[str, Any]
) -> list[Schedule]:
    reads_base_lr = "base_lr" in _arguments(cls, keyword_only=True)
    made: list[Schedule] = []
    for group, lr in enumerate(base_lrs):
        arguments = dict(params)
        for name in _TORCH_GROUP_ARGUMENTS:
            value = params.get(name)
            if isinstance(value, list | tuple):
                if len(value) != len(base_lrs):
                    raise ValueError(
                        f"scheduler.params.{name} must be one number, or one for each of the optimizer's "
                        f"{len(base_lrs)} groups, got {value!r}"
                    )
                arguments[name] = value[group]
        made.append(cls(**arguments, **({"base_lr": lr} if reads_base_lr else {})))
    return made


def _schedule_class(name: str) -> type[LibrarySchedule]:
    known = {
        key: value
        for module in (schedules.torch, schedules.deepspeed)  # of two with one name DeepSpeed takes its own
        for key, value in vars(module).items()
        if isinstance(value, type) and issubclass(value, LibrarySchedule) and not inspect.isabstract(value)
    }
    if name not in known:
        close = _closest(name, known)
        guess = f'did you mean "{close}"?' if close else f"the names are {', '.join(sorted(known))}"
        raise ValueError(f'scheduler.type "{name}" is neither one of DeepSpeed nor of torch; {guess}')
    return known[name]


def _arguments(cls: type[LibrarySchedule], keyword_only: bool) -> dict[str, Any]:
    """The library's own arguments, or what else the class takes, with their defaults or Parameter.empty."""
    parameters = inspect.signature(cls).parameters.values()
    return {p.name: p.default for p in parameters if (p.kind is inspect.Parameter.KEYWORD_ONLY) is keyword_only}
