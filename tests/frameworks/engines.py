"""DeepSpeed's configurations of the grid, and training runs in its engine with our optimizer or a reference."""

from __future__ import annotations

import math
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch.optim.lr_scheduler import LambdaLR

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import deepspeed
    import deepspeed.ops
    from deepspeed.accelerator import get_accelerator
    from deepspeed.utils import logger, safe_get_full_fp32_param

from fused_sched import FusedScheduledAdam, schedules

# Otherwise the first init_distributed() compiles a collective for shared memory, 40 s (deepspeed/comm/torch.py:47).
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
# What DeepSpeed asks before fp16 is whether this CPU computes it natively; torch computes it on any.
get_accelerator().is_fp16_supported = lambda: True
logger.setLevel("ERROR")

#: The rates of the two groups; both change in every update, and differently.
PEAKS = {"weights": 0.05, "biases": 0.02}
LENGTHS = {"weights": 20, "biases": 12}
SCHEDULES = {name: schedules.linear(PEAKS[name], 0.0, LENGTHS[name]) for name in PEAKS}
DECAYS = {"weights": 0.1, "biases": 0.0}

#: Parts of a batch: the ranks of a run, except where a checkpoint goes on with fewer.
GLOBAL_RANKS = 2

#: Updates of a run; a checkpoint is saved halfway, and one step before and one after it have infinite gradients.
NUM_STEPS, SAVED_AFTER, OVERFLOWS = 8, 4, (1, 5)


@dataclass(frozen=True)
class Config:
    """One row of the grid."""

    name: str
    stage: int
    dtype: str = "fp32"
    gas: int = 1
    offload: bool = False
    sub_group_size: int | None = None
    autocast: bool = False
    extra: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)  # of FusedScheduledAdam

    def __str__(self) -> str:
        return self.name

    @property
    def skips(self) -> bool:
        """Whether this engine skips steps with infinite gradients; stage 0 in fp32 does not look."""
        return self.stage > 0 or self.dtype != "fp32" or self.autocast

    @property
    def section(self) -> dict[str, Any]:
        zero: dict[str, Any] = {"stage": self.stage}
        if self.stage == 3:
            zero["stage3_param_persistence_threshold"] = 0
        if self.sub_group_size is not None:
            zero["sub_group_size"] = self.sub_group_size
        if self.offload:
            zero["offload_optimizer"] = {"device": "cpu"}
        section: dict[str, Any] = {
            "train_micro_batch_size_per_gpu": 2 * GLOBAL_RANKS // dist.get_world_size(),
            "gradient_accumulation_steps": self.gas,
            "steps_per_print": 10**9,
            "zero_optimization": zero,
        }
        if self.offload:
            section["zero_force_ds_cpu_optimizer"] = False
        if self.autocast:
            section["torch_autocast"] = {"enabled": True, "dtype": "float16"}
        elif self.dtype != "fp32":
            section[self.dtype] = {"enabled": True}
        if self.dtype == "fp16" and not self.autocast:
            section["fp16"]["initial_scale_power"] = 8
        for key, value in self.extra.items():
            section[key] = {**section.get(key, {}), **value}
        return section


GRID = (
    *(Config(f"zero{z}_{dtype}", z, dtype) for z in range(4) for dtype in ("fp32", "bf16", "fp16")),
    *(Config(f"zero{z}_fp32_accumulated", z, gas=4) for z in range(4)),
    Config("zero2_fp16_accumulated", 2, "fp16", gas=4),
    Config("zero3_fp32_sub_groups", 3, sub_group_size=40),
    Config("zero3_bf16_sub_groups", 3, "bf16", sub_group_size=40),
    Config("zero3_fp16_sub_groups_accumulated", 3, "fp16", gas=4, sub_group_size=40),
    *(Config(f"zero{z}_fp32_offloaded", z, offload=True) for z in (1, 2, 3)),
    Config("zero3_bf16_offloaded_sub_groups", 3, "bf16", offload=True, sub_group_size=40),
    Config("bf16_optimizer", 1, "bf16", extra={"data_types": {"grad_accum_dtype": "fp32"}}),
    *(Config(f"zero{z}_autocast_fp16", z, autocast=True) for z in (0, 2, 3)),
)


def model() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1)
    )


def groups(module: torch.nn.Module) -> list[dict[str, Any]]:
    parts = {"weights": lambda p: p.dim() > 1, "biases": lambda p: p.dim() == 1}
    return [
        {"params": [p for p in module.parameters() if belongs(p)], "name": name, "weight_decay": DECAYS[name]}
        for name, belongs in parts.items()
    ]


class Ours:
    """FusedScheduledAdam in an engine; every call of its step() is checked."""

    def __init__(self, config: Config, module: torch.nn.Module) -> None:
        scheduled = [{**g, "lr": SCHEDULES[g["name"]]} for g in groups(module)]
        self.optimizer = FusedScheduledAdam(scheduled, **config.options)
        # Not by their "name": stage 3 overwrites it from a universal checkpoint (zero/stage3.py:3685).
        self.names = {id(group): group["name"] for group in self.optimizer.param_groups}
        self.handle = self.optimizer.scheduler()
        self.applied = 0
        self.num_calls = 0
        self.optimizer.register_step_post_hook(lambda *_: self.check_call())

    def check_call(self) -> None:
        """Within the update under way: the groups it holds used this update's rates."""
        self.num_calls += 1
        if self.optimizer.clock == 0:
            return  # the dry run of an engine that is being built
        found_inf = getattr(self.optimizer, "found_inf", None)  # of a GradScaler, which calls steps to be skipped
        if found_inf is not None and found_inf.item():
            assert self.optimizer.clock == self.applied
            return
        assert self.optimizer.clock == self.applied + 1, (self.optimizer.clock, self.applied)
        for group, rate in zip(self.optimizer.param_groups, self.optimizer.last_lr(), strict=True):
            if group["params"]:
                name = self.names[id(group)]
                expected = SCHEDULES[name](self.applied)
                assert rate == expected, (name, self.applied, rate, expected)

    def after(self, applied: int) -> None:
        self.applied = applied
        assert self.optimizer.clock == applied, (self.optimizer.clock, applied)
        assert self.handle.last_epoch == applied
        if applied:
            expected = [SCHEDULES[name](applied - 1) for name in PEAKS]
            assert self.handle.get_last_lr() == expected, (self.handle.get_last_lr(), expected)


class Reference:
    """torch's AdamW and LambdaLR as DeepSpeed's client optimizer and scheduler."""

    def __init__(self, config: Config, module: torch.nn.Module) -> None:
        named = [{**g, "lr": PEAKS[g["name"]]} for g in groups(module)]
        if config.stage == 0:
            self.optimizer: torch.optim.Optimizer = CountingAdamW(named)
            self.handle: Any = None
        else:
            self.optimizer = torch.optim.AdamW(named)
            self.handle = LambdaLR(self.optimizer, [lambda t, n=name: SCHEDULES[n](t) / PEAKS[n] for name in PEAKS])

    def after(self, applied: int) -> None:
        pass


class CountingAdamW(torch.optim.AdamW):
    """AdamW at the rate of its own count of updates: without the errors that torch's pair has in stage 0.

    There the engine makes AdamW count its dry run as an update (fp16/unfused_optimizer.py:425), and with autocast it
    steps the scheduler though GradScaler has skipped the optimizer's step (integrations of DeepSpeed 0.19.8).
    """

    applied = 0

    def step(self, closure: Any = None) -> None:
        if all(p.grad is None or not p.grad.any() for group in self.param_groups for p in group["params"]):
            return  # the dry run, in which every gradient is zero
        for group in self.param_groups:
            group["lr"] = SCHEDULES[group["name"]](self.applied)
        self.applied += 1
        super().step()


Client = Callable[[Config, torch.nn.Module], Any]


@dataclass
class Run:
    """An engine and what drives it."""

    config: Config
    client: Any
    engine: Any
    applied: int = 0

    def train(self, steps: range) -> None:
        for step in steps:
            overflows = step in OVERFLOWS and self.config.skips
            for micro in range(self.config.gas):
                inputs = self.inputs(step * 16 + micro)
                loss = self.engine(inputs.to(self.input_dtype)).float().pow(2).mean()
                self.engine.backward(loss * math.inf if overflows and micro == 0 else loss)
                self.engine.step()
            self.applied += not overflows
            self.client.after(self.applied)

    def inputs(self, seed: int) -> torch.Tensor:
        """This rank's part of a batch; together, the ranks see the same whatever their number."""
        ranks = range(dist.get_rank(), GLOBAL_RANKS, dist.get_world_size())
        return torch.cat([batch(seed, rank) for rank in ranks])

    @property
    def input_dtype(self) -> torch.dtype:
        dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
        return dtypes[self.config.dtype]

    def weights(self) -> list[torch.Tensor]:
        """Exact weights, in the order of the model's parameters."""
        params = list(self.engine.module.parameters())
        if self.config.stage > 0:
            return [safe_get_full_fp32_param(p).detach().clone() for p in params]
        if self.config.dtype == "fp32":
            return [p.detach().clone() for p in params]
        masters = [master for group in self.engine.optimizer.fp32_groups for master in group]
        order = [p for group in self.engine.optimizer.fp16_groups for p in group]
        by_param = {id(p): master for p, master in zip(order, masters, strict=True)}
        return [by_param[id(p)].detach().clone() for p in params]


def batch(seed: int, rank: int) -> torch.Tensor:
    return torch.randn(2, 6, generator=torch.Generator().manual_seed(1000 * rank + seed))


def start(config: Config, client: Client) -> Run:
    module = model()
    made = client(config, module)
    engine, *_ = deepspeed.initialize(
        model=module, optimizer=made.optimizer, lr_scheduler=made.handle, config=config.section
    )
    return Run(config, made, engine)


def straight(config: Config, client: Client) -> Run:
    run = start(config, client)
    run.train(range(NUM_STEPS))
    return run


def resumed(config: Config) -> Run:
    """Half a run, a checkpoint, and the other half in an engine made anew."""
    first = start(config, Ours)
    first.train(range(SAVED_AFTER))
    with shared_folder() as folder:
        first.engine.save_checkpoint(folder, tag="half")
        second = start(config, Ours)
        second.engine.load_checkpoint(folder, tag="half")
        second.applied = second.client.applied = first.applied
        assert second.client.optimizer.clock == first.applied, second.client.optimizer.clock
        second.train(range(SAVED_AFTER, NUM_STEPS))
        dist.barrier()
    return second


def shared_folder() -> Any:
    """A temporary folder that rank 0 names."""
    return _SharedFolder()


class _SharedFolder:
    def __enter__(self) -> str:
        self._folder = tempfile.TemporaryDirectory() if dist.get_rank() == 0 else None
        name = [self._folder.name if self._folder else None]
        dist.broadcast_object_list(name)
        assert name[0] is not None
        return name[0]

    def __exit__(self, *_: object) -> None:
        if self._folder:
            self._folder.cleanup()
