"""DeepSpeed's models in parts: a mixture of experts, and a pipeline. In one pair of processes.

Started by test_deepspeed.py.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import deepspeed
import engines
import torch
import torch.distributed as dist
from deepspeed.moe.layer import MoE
from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer
from deepspeed.pipe import PipelineModule
from ranks import Checks, run_checks
from torch.optim.lr_scheduler import LambdaLR

from fused_sched import FusedScheduledAdam, schedules

CHECKS = Checks()

RATE = schedules.linear(0.05, 0.0, 20)
NUM_STEPS = 6

Build = Callable[[], tuple[torch.nn.Module, Any]]
Step = Callable[[Any, int], None]


def trained(build: Build, section: dict[str, Any], step: Step, fused: bool) -> Any:
    """An engine after its updates; with ours, every one of them checked."""
    module, params = build()
    if fused:
        return fused_run(module, FusedScheduledAdam(params, lr=RATE, weight_decay=0.1), section, step)
    optimizer = torch.optim.AdamW(params, lr=RATE(0), weight_decay=0.1)
    handle = LambdaLR(optimizer, lambda t: RATE(t) / RATE(0))
    engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, lr_scheduler=handle, config=section)
    for index in range(NUM_STEPS):
        step(engine, index)
    return engine


def fused_run(module: torch.nn.Module, optimizer: FusedScheduledAdam, section: dict[str, Any], step: Step) -> Any:
    handle = optimizer.scheduler()
    engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, lr_scheduler=handle, config=section)
    for index in range(NUM_STEPS):
        step(engine, index)
        assert handle.last_epoch == index + 1
        assert set(handle.get_last_lr()) == {RATE(index)}
    return engine


def compare(build: Build, section: dict[str, Any], step: Step) -> None:
    ours, theirs = (trained(build, section, step, fused) for fused in (True, False))
    for actual, expected in zip(ours.module.parameters(), theirs.module.parameters(), strict=True):
        # Two orders of the same float32 operations, of weights below 1; bfloat16 shows no less than its last bit.
        tolerance = 2.0**-8 if actual.dtype == torch.bfloat16 else 1e-6
        torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance)


def refuse_the_norm_of_a_part(build: Build, section: dict[str, Any], step: Step) -> None:
    module, params = build()
    optimizer = FusedScheduledAdam(params, lr=RATE, max_grad_norm=1.0)
    try:
        fused_run(module, optimizer, section, step)
    except RuntimeError as error:
        refusal = str(error)
    else:
        refusal = ""
    assert "norm" in refusal, refusal
    assert optimizer.clock == 0


class WithExperts(torch.nn.Module):
    def __init__(self, processes_per_expert_set: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = torch.nn.Linear(6, 8)
        self.experts = MoE(
            8, torch.nn.Linear(8, 8), num_experts=2, ep_size=processes_per_expert_set, k=1, min_capacity=0
        )
        self.last = torch.nn.Linear(8, 1)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        hidden, *_ = self.experts(torch.tanh(self.first(inputs)))
        return self.last(hidden)


def train_experts(engine: Any, index: int) -> None:
    inputs = engines.batch(index, dist.get_rank()).to(next(engine.module.parameters()).dtype)
    engine.backward(engine(inputs).float().pow(2).mean())
    engine.step()


def mixture_of_experts(config: engines.Config, expert_processes: int) -> None:
    def build() -> tuple[torch.nn.Module, Any]:
        module = WithExperts(expert_processes)
        everything = {"params": list(module.parameters()), "name": "everything"}
        return module, split_params_into_different_moe_groups_for_optimizer(everything)

    compare(build, config.section, train_experts)
    refuse_the_norm_of_a_part(build, config.section, train_experts)


def pipeline(config: engines.Config) -> None:
    """Each process has the layers of its stage, and an optimizer with a clock of its own."""

    def build() -> tuple[torch.nn.Module, Any]:
        module = PipelineModule(list(engines.model()), num_stages=2, loss_fn=squared, partition_method="uniform")
        return module, list(module.parameters())

    def batches(index: int, dtype: torch.dtype) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for micro in itertools.count():
            yield engines.batch(16 * index + micro, 0).to(dtype), torch.zeros(2, 1)

    def train(engine: Any, index: int) -> None:
        engine.train_batch(data_iter=batches(index, next(engine.module.parameters()).dtype))

    compare(build, config.section, train)
    refuse_the_norm_of_a_part(build, config.section, train)


def squared(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return (outputs.float() - targets).pow(2).mean()


def registered(check: Callable[..., None], *arguments: Any) -> Callable[[], None]:
    return lambda: check(*arguments)


for _stage, _dtype in ((0, "fp32"), (1, "fp32"), (2, "bf16")):
    _config = engines.Config(f"zero{_stage}_{_dtype}", _stage, _dtype)
    for _processes in (1, 2):
        _name = f"experts_in_{_processes}_processes_{_config.name}"
        CHECKS[_name] = registered(mixture_of_experts, _config, _processes)
# After the experts: a pipeline's grid stays DeepSpeed's model-parallel one for the whole process.
for _stage, _dtype in ((0, "fp32"), (1, "fp32"), (1, "bf16")):
    _config = engines.Config(f"zero{_stage}_{_dtype}", _stage, _dtype, gas=4)
    CHECKS[f"pipeline_{_config.name}"] = registered(pipeline, _config)

if __name__ == "__main__":
    deepspeed.init_distributed("gloo", verbose=False)
    run_checks(CHECKS)
