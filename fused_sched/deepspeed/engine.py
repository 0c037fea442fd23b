"""DeepSpeed's engine with FusedScheduledAdam as its client optimizer."""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from ..hyperparameters import TORCH_ONLY
from ..optimizer import FusedScheduledAdam
from ..scheduler import ObservingScheduler
from .config import Config, optimizer_from_config, read, schedules_of, section_of

#: What the groups of torch's Adam and AdamW hold that has no meaning here; all else is kept, "moe" of an expert's too.
_NOT_TAKEN_OVER = ("params", "param_names", *TORCH_ONLY)


def register(optimizer_class: type[torch.optim.Optimizer] = FusedScheduledAdam) -> None:
    """Tell DeepSpeed's ZeRO that it knows this class, which makes "zero_allow_untested_optimizer" unnecessary.

    optimizer_class: FusedScheduledAdam or a subclass; DeepSpeed compares classes, not their ancestors.

    Where DeepSpeed has been imported before, `opt.scheduler()`, `optimizer_from_config` and `initialize` do it by
    themselves. Raises ImportError if DeepSpeed is not installed.

    >>> from fused_sched.deepspeed import register
    >>> register()  # doctest: +SKIP

    Source: DeepSpeed 0.19.8, runtime/zero/utils.py, ZERO_SUPPORTED_OPTIMIZERS.
    """
    supported = _deepspeed("runtime.zero.utils").ZERO_SUPPORTED_OPTIMIZERS
    if optimizer_class not in supported:
        supported.append(optimizer_class)


def initialize(
    model: torch.nn.Module,
    config: Config | None = None,
    *,
    optimizer: torch.optim.Optimizer | None = None,
    model_parameters: Iterable[Any] | None = None,
    lr_scheduler: Any = None,
    config_params: Config | None = None,
    options: Mapping[str, Any] | None = None,
    **deepspeed_arguments: Any,
) -> tuple[Any, ...]:
    """`deepspeed.initialize` with the configuration's own optimizer and scheduler sections on the device.

    model: the module to train.
    config: DeepSpeed's configuration, a dict or the path of a file; also accepted as config_params.
    optimizer: a torch Adam or AdamW, whose groups and options are taken over in place of the section "optimizer"; or
        a FusedScheduledAdam, used as it is, whose rate must not have a second schedule in the configuration.
    model_parameters: what to optimize, tensors or group dicts; all of the model's by default.
    lr_scheduler: nothing, or the handle of `optimizer`: the rate comes from the configuration.
    options: arguments of FusedScheduledAdam that the configuration has no words for.
    deepspeed_arguments: passed on: training_data, collate_fn, dist_init_required, ...

    Returns what deepspeed.initialize returns: engine, optimizer, data loader and scheduler, a handle that observes.
    `engine.get_lr()`, and with it DeepSpeed's log and monitor, is the rate that the latest update used. Gradients are
    clipped by the engine. Raises as optimizer_from_config does, ImportError if DeepSpeed is not installed.

    >>> engine, optimizer, _, lr_scheduler = initialize(  # doctest: +SKIP
    ...     model=model, config={"train_batch_size": 8, "optimizer": {"type": "Adam", "params": {"lr": 0.01}}}
    ... )

    Source: DeepSpeed 0.19.8, __init__.py, initialize; runtime/engine.py, get_lr.
    """
    deepspeed = _deepspeed()
    if (config is None) == (config_params is None):
        raise ValueError("one configuration is needed, as config or as config_params")
    ds_config = read(config if config is not None else config_params)  # type: ignore[arg-type]  # one of them is not
    if lr_scheduler is not None and not (
        isinstance(lr_scheduler, ObservingScheduler) and lr_scheduler.optimizer is optimizer
    ):
        raise ValueError(
            f'the rate comes from the section "scheduler" or from the optimizer, got lr_scheduler={lr_scheduler!r}; '
            "leave it out, or call deepspeed.initialize with an optimizer whose lr is a number"
        )
    if optimizer is None:
        params = model.parameters() if model_parameters is None else model_parameters
        ours = optimizer_from_config(params, ds_config, **{"max_grad_norm": None, **(options or {})})
    else:
        ours = _converted(optimizer, ds_config, dict(options or {}))
    register(type(ours))
    handle = ours.scheduler()
    # Offloaded, the engine insists on DeepSpeedCPUAdam unless it is told otherwise.
    ds_config = {"zero_force_ds_cpu_optimizer": False, **ds_config}
    returned: tuple[Any, ...] = deepspeed.initialize(
        model=model,
        optimizer=ours,
        model_parameters=model_parameters,
        lr_scheduler=handle,
        config=ds_config,
        **deepspeed_arguments,
    )
    # The engine's own reads group["lr"], the rate that the schedule's values are relative to.
    returned[0].get_lr = handle.get_last_lr
    return returned


def _converted(
    optimizer: torch.optim.Optimizer, ds_config: Mapping[str, Any], options: dict[str, Any]
) -> FusedScheduledAdam:
    """A client optimizer as ours, with the configuration's schedule."""
    if isinstance(optimizer, FusedScheduledAdam):
        if options:
            raise ValueError(f"options are given to FusedScheduledAdam itself, got {options} beside one")
        _schedule(optimizer, ds_config)
        return optimizer
    if not isinstance(optimizer, torch.optim.Adam | torch.optim.AdamW):
        raise TypeError(
            f"optimizer must be a torch Adam, AdamW or FusedScheduledAdam, got {type(optimizer).__name__}, which is "
            "another optimizer; call deepspeed.initialize with it"
        )
    if optimizer.defaults.get("differentiable"):
        raise ValueError("optimizer is differentiable, which an update in one pass is not; keep torch's")
    if hasattr(optimizer.step, "_wrapped_by_lr_sched"):
        raise ValueError(
            "a torch scheduler is attached to the optimizer, which it would go on driving without effect; leave it "
            'out, and write it into the section "scheduler"'
        )
    decoupled = isinstance(optimizer, torch.optim.AdamW)
    groups = []
    for group in optimizer.param_groups:
        names = group.get("param_names")
        params = list(zip(names, group["params"], strict=True)) if names else group["params"]
        kept = {key: value for key, value in group.items() if key not in _NOT_TAKEN_OVER}
        groups.append({"params": params, "decoupled_weight_decay": decoupled, **kept})
    section = {"type": "Adam", "params": {}}
    ours = optimizer_from_config(groups, {**ds_config, "optimizer": section}, **{"max_grad_norm": None, **options})
    if optimizer.state:
        ours.load_state_dict(optimizer.state_dict())
    return ours


def _schedule(optimizer: FusedScheduledAdam, ds_config: Mapping[str, Any]) -> None:
    """The configuration's schedule for an optimizer that has none."""
    section = section_of(ds_config, "scheduler")
    if section is None:
        return
    for record in optimizer._records:
        if "lr" in record.schedules:
            raise ValueError(
                'the rate is scheduled twice: by the section "scheduler" and by the optimizer, whose lr is '
                f"{record.schedules['lr']!r}; remove the section, or give the optimizer a number"
            )
    lrs = [group["lr"] for group in optimizer.param_groups]
    for index, schedule in enumerate(schedules_of(section, lrs)):
        optimizer.set_schedule(schedule, group=index)


def _deepspeed(module: str = "") -> Any:
    try:
        return importlib.import_module(f"deepspeed.{module}".rstrip("."))
    except ImportError as error:
        raise ImportError(f"this needs DeepSpeed: pip install 'fused_sched[deepspeed]' ({error})") from error
