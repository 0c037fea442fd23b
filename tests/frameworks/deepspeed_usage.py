"""DeepSpeed beyond the grid: who schedules, what its log shows, and techniques combined. In one pair of processes.

Started by test_deepspeed.py.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any
from unittest import mock

import deepspeed
import engines
import torch
from deepspeed.runtime import lr_schedules
from deepspeed.runtime.zero.utils import ZERO_SUPPORTED_OPTIMIZERS
from engines import Config, Ours, Reference
from ranks import Checks, run_checks
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.checkpoint import checkpoint

import fused_sched.deepspeed
from fused_sched import FusedScheduledAdam, schedules
from fused_sched.masters import exact_value

CHECKS = Checks()

#: A warm-up that does not start at the rate it reaches, and has reached it after 4 updates.
WARMUP = {"type": "WarmupLR", "params": {"warmup_min_lr": 0.001, "warmup_max_lr": 0.05, "warmup_num_steps": 4}}
#: torch's AdamW; DeepSpeed's own would be compiled first.
ADAMW = {"type": "AdamW", "params": {"lr": 0.05, "weight_decay": 0.1, "torch_adam": True}}

STAGES = (Config("zero0", 0), Config("zero2", 2), Config("zero3", 3, sub_group_size=40))


def raised(action: Any) -> str:
    try:
        action()
    except (RuntimeError, ValueError, TypeError) as error:
        return str(error)
    raise AssertionError("nothing was raised")


def train(engine: Any, steps: range) -> list[list[float]]:
    """The rates that the engine reports after each step."""
    reported = []
    for step in steps:
        loss = engine(engines.batch(step, torch.distributed.get_rank())).pow(2).mean()
        engine.backward(loss)
        engine.step()
        reported.append(engine.get_lr())
    return reported


@CHECKS
def a_scheduler_section_over_our_schedule_raises_in_the_first_step() -> None:
    sections = {
        "WarmupLR": WARMUP["params"],
        "WarmupDecayLR": {"total_num_steps": 10},
        "WarmupCosineLR": {"total_num_steps": 10},
        "LRRangeTest": {"lr_range_test_min_lr": 0.5},
        "OneCycle": {"cycle_min_lr": 0.1, "cycle_max_lr": 0.5},
    }
    assert sorted(sections) == sorted(lr_schedules.VALID_LR_SCHEDULES)
    for config in STAGES:
        for name, params in sections.items():
            module = engines.model()
            optimizer = FusedScheduledAdam(module.parameters(), lr=schedules.linear(0.1, 0.0, 10))
            section = {**config.section, "scheduler": {"type": name, "params": params}}
            fused_sched.deepspeed.register()
            engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=section)
            message = raised(lambda engine=engine: train(engine, range(1)))
            assert name in message, message
            assert "lr_scheduler=opt.scheduler()" in message, message
            assert optimizer.clock == 0


@CHECKS
def a_torch_scheduler_in_the_section_raises_when_the_engine_is_built() -> None:
    """Where DeepSpeed builds one at all: over ZeRO's wrapper torch's schedulers refuse."""
    module = engines.model()
    optimizer = FusedScheduledAdam(module.parameters(), lr=schedules.linear(0.1, 0.0, 10))
    section = {**STAGES[0].section, "scheduler": {"type": "StepLR", "params": {"step_size": 2}}}
    message = raised(lambda: deepspeed.initialize(model=module, optimizer=optimizer, config=section))
    assert "opt.scheduler()" in message, message


@CHECKS
def the_handle_makes_the_engine_ignore_the_section() -> None:
    config = Config("zero2", 2, extra={"scheduler": WARMUP})
    assert engines.straight(config, Ours).applied == 6


@CHECKS
def a_plain_rate_is_driven_by_the_section_as_torchs() -> None:
    for config in STAGES:
        results = []
        for optimizer_class in (FusedScheduledAdam, torch.optim.AdamW):
            module = engines.model()
            optimizer = optimizer_class(module.parameters(), lr=0.1, weight_decay=0.1)
            fused_sched.deepspeed.register()
            section = {**config.section, "scheduler": WARMUP}
            engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=section)
            train(engine, range(6))
            results.append(engines.Run(config, None, engine).weights())
        for actual, expected in zip(*results, strict=True):
            torch.testing.assert_close(actual, expected, rtol=0, atol=1e-6)


@CHECKS
def register_adds_the_class_once_and_unregistered_ones_are_refused() -> None:
    class Mine(FusedScheduledAdam):
        pass

    def build() -> Any:
        module = engines.model()
        return deepspeed.initialize(model=module, optimizer=Mine(module.parameters()), config=STAGES[1].section)

    assert "untested" in raised(lambda: wrapped_assertion(build))
    fused_sched.deepspeed.register(Mine)
    fused_sched.deepspeed.register(Mine)
    assert ZERO_SUPPORTED_OPTIMIZERS.count(Mine) == 1
    build()
    ZERO_SUPPORTED_OPTIMIZERS.remove(Mine)


def wrapped_assertion(action: Any) -> None:
    """DeepSpeed asserts; an AssertionError is for this file's own."""
    try:
        action()
    except AssertionError as error:
        raise RuntimeError(str(error)) from error


@CHECKS
def a_handle_registers_by_itself() -> None:
    ZERO_SUPPORTED_OPTIMIZERS.remove(FusedScheduledAdam)
    FusedScheduledAdam(engines.model().parameters()).scheduler()
    assert FusedScheduledAdam in ZERO_SUPPORTED_OPTIMIZERS
    ZERO_SUPPORTED_OPTIMIZERS.remove(FusedScheduledAdam)
    fused_sched.deepspeed.optimizer_from_config(engines.model().parameters(), {"optimizer": ADAMW})
    assert FusedScheduledAdam in ZERO_SUPPORTED_OPTIMIZERS


@CHECKS
def initialize_builds_what_deepspeed_builds_from_the_sections() -> None:
    for config in STAGES:
        section = {**config.section, "optimizer": ADAMW, "scheduler": WARMUP}
        theirs_model, ours_model = engines.model(), engines.model()
        theirs, *_ = deepspeed.initialize(
            model=theirs_model, config=section, model_parameters=list(theirs_model.parameters())
        )
        ours, optimizer, loader, handle = fused_sched.deepspeed.initialize(ours_model, section)
        assert loader is None
        # Theirs shows the rate that the next update will use, ours the one that was used.
        next_rates, used_rates = train(theirs, range(6)), train(ours, range(6))
        expected = schedules.deepspeed.WarmupLR(**WARMUP["params"])
        assert used_rates == [[expected(step)] for step in range(6)], used_rates
        # The values of DeepSpeed's own arithmetic: math.log of another library, once rounded.
        torch.testing.assert_close(torch.tensor(next_rates[:-1]), torch.tensor(used_rates[1:]), rtol=1e-14, atol=0)
        assert handle.get_last_lr() == used_rates[-1]
        assert optimizer.param_groups[0]["lr"] == 0.05
        weights = [engines.Run(config, None, engine).weights() for engine in (ours, theirs)]
        for actual, expected_weights in zip(*weights, strict=True):
            torch.testing.assert_close(actual, expected_weights, rtol=0, atol=1e-6)


@CHECKS
def the_log_shows_the_rate_that_was_used() -> None:
    section = {**STAGES[1].section, "optimizer": ADAMW, "scheduler": WARMUP, "steps_per_print": 1}
    engine, *_ = fused_sched.deepspeed.initialize(engines.model(), section)
    with mock.patch("deepspeed.runtime.engine.log_dist") as log:
        train(engine, range(3))
    lines = [call.args[0] for call in log.call_args_list if "lr=" in call.args[0]]
    if torch.distributed.get_rank() == 0:
        rate = schedules.deepspeed.WarmupLR(**WARMUP["params"])
        assert [f"lr=[{rate(step)}]" in line for step, line in enumerate(lines)] == [True] * 3, lines


@CHECKS
def initialize_takes_a_client_adam_over() -> None:
    """The tutorial's call: a client Adam, sections of both kinds, and one step of the handle too many."""
    for optimizer_class in (torch.optim.Adam, torch.optim.AdamW, FusedScheduledAdam):
        module = engines.model()
        params = {"params": list(module.parameters()), "name": "all"}
        client = optimizer_class([params], lr=0.01, betas=(0.8, 0.9))
        section = {**STAGES[1].section, "optimizer": {"type": "Adam", "params": {"lr": 0.5}}, "scheduler": WARMUP}
        engine, _, _, lr_scheduler = fused_sched.deepspeed.initialize(
            model=module, optimizer=client, config_params=section
        )
        ours = lr_scheduler.optimizer
        group = ours.param_groups[0]
        assert group["betas"] == (0.8, 0.9)
        assert group["name"] == "all"
        assert group["decoupled_weight_decay"] is (optimizer_class is not torch.optim.Adam)
        for step in range(5):
            train(engine, range(step, step + 1))
            lr_scheduler.step()
            assert ours.clock == step + 1
            assert lr_scheduler.get_last_lr() == [schedules.deepspeed.WarmupLR(**WARMUP["params"])(step)]


@CHECKS
def the_tutorials_own_call_with_the_optimizer_and_a_handle() -> None:
    """deepspeed.initialize with both sections, and the handle stepped by the engine and once more by hand."""
    rate = schedules.deepspeed.WarmupLR(**WARMUP["params"])
    for stage in (0, 3):
        module = torch.nn.Linear(10, 1)
        optimizer = FusedScheduledAdam(module.parameters(), lr=rate)
        config = {
            "train_batch_size": 8,
            "optimizer": {"type": "Adam", "params": {"lr": 0.01}},
            "scheduler": WARMUP,
            "zero_optimization": {"stage": stage},
        }
        engine, _, _, lr_scheduler = deepspeed.initialize(
            model=module, optimizer=optimizer, lr_scheduler=optimizer.scheduler(), config_params=config
        )
        for step in range(6):
            outputs = engine(torch.randn(8, 10))
            engine.backward(outputs.mean())
            engine.step()
            lr_scheduler.step()
            assert optimizer.clock == step + 1
            assert lr_scheduler.get_last_lr() == [rate(step)]


@CHECKS
def initialize_refuses_a_second_schedule() -> None:
    section = {**STAGES[1].section, "optimizer": ADAMW, "scheduler": WARMUP}
    initialize = fused_sched.deepspeed.initialize
    module = engines.model()
    scheduled = FusedScheduledAdam(module.parameters(), lr=schedules.constant(0.1))
    assert "scheduled twice" in raised(lambda: initialize(module, section, optimizer=scheduled))
    assert "lr_scheduler" in raised(lambda: initialize(module, section, lr_scheduler=lambda optimizer: None))
    driven = torch.optim.Adam(module.parameters())
    LambdaLR(driven, lambda t: 1.0)
    assert "attached" in raised(lambda: initialize(module, section, optimizer=driven))
    sgd = torch.optim.SGD(module.parameters())
    assert "SGD" in raised(lambda: initialize(module, section, optimizer=sgd))
    assert "configuration" in raised(lambda: initialize(module))
    assert "options" in raised(lambda: initialize(module, section, optimizer=scheduled, options={"eps": 1.0}))


@CHECKS
def offloading_needs_no_flag() -> None:
    section = Config("zero2", 2, offload=True).section
    del section["zero_force_ds_cpu_optimizer"]
    engine, *_ = fused_sched.deepspeed.initialize(engines.model(), {**section, "optimizer": ADAMW})
    assert train(engine, range(2)) == [[0.05]] * 2


class Checkpointed(torch.nn.Module):
    """The grid's model, of which the backward pass computes the inner activations again."""

    def __init__(self, parts: torch.nn.Sequential) -> None:
        super().__init__()
        self.parts = parts

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        hidden = self.parts[:2](inputs)
        hidden = checkpoint(self.parts[2:4], hidden, use_reentrant=False)
        return self.parts[4](hidden)


@CHECKS
def activation_checkpointing_zero_and_bf16_together() -> None:
    for config in (Config("zero3", 3, "bf16", gas=2, sub_group_size=40), Config("zero2", 2, "bf16")):
        expected = engines.straight(config, Ours).weights()
        with mock.patch("engines.model", lambda plain=engines.model: Checkpointed(plain())):
            run, reference = engines.straight(config, Ours), engines.straight(config, Reference)
        for actual, same, torchs in zip(run.weights(), expected, reference.weights(), strict=True):
            assert torch.equal(actual, same)
            torch.testing.assert_close(actual, torchs, rtol=0, atol=1e-6)


@CHECKS
def flat_partitions_of_bfloat16_have_exact_masters() -> None:
    """ "bf16_master_weights_and_grads" with 2 bytes for each master, bit for bit what 4 in float32 partitions give."""
    narrow = {"bf16": {"bf16_master_weights_and_grads": True, "bf16_optimizer_states": True}}
    for stage in (1, 2, 3):
        wide = Config(f"zero{stage}", stage, "bf16", sub_group_size=40 if stage == 3 else None)
        runs = engines.straight(wide, Ours), engines.straight(replace(wide, extra=narrow), Ours)
        runs = (*runs, engines.resumed(runs[1].config))
        expected, actual, resumed = map(trained_masters, runs)
        assert {p.dtype for p in runs[1].client.optimizer.state} == {torch.bfloat16}
        for values in (actual, resumed):
            for ours, theirs in zip(values, expected, strict=True):
                assert torch.equal(ours, theirs)


@CHECKS
def the_clock_comes_with_the_optimizer_and_can_be_set_back() -> None:
    for config in STAGES:
        first = engines.start(config, Ours)
        first.train(range(4))
        with engines.shared_folder() as folder:
            first.engine.save_checkpoint(folder, tag="half")
            second = engines.start(config, Ours)
            second.engine.load_checkpoint(folder, tag="half", load_lr_scheduler_states=False)
            torch.distributed.barrier()
        optimizer = second.client.optimizer
        assert optimizer.clock == first.applied
        optimizer.set_clock(0)
        second.applied = second.client.applied = 0
        second.train(range(2, 4))


def trained_masters(run: engines.Run) -> list[torch.Tensor]:
    """This rank's, without the padding, which stage 3 leaves uninitialized and gives no gradients."""
    states = run.client.optimizer.state.items()
    return [exact_value(p, state)[state["exp_avg_sq"] > 0] for p, state in states]


@CHECKS
def another_optimizers_checkpoint_goes_on() -> None:
    """torch's AdamW in an engine, then ours from its checkpoint: the clock is its number of updates."""
    for config in STAGES[1:]:
        first = engines.start(config, Reference)
        first.train(range(4))
        with engines.shared_folder() as folder:
            first.engine.save_checkpoint(folder, tag="half")
            second = engines.start(config, Ours)
            second.engine.load_checkpoint(folder, tag="half")
            torch.distributed.barrier()
        second.applied = second.client.applied = first.applied
        for run in (first, second):
            run.train(range(4, 8))
        for actual, expected in zip(second.weights(), first.weights(), strict=True):
            torch.testing.assert_close(actual, expected, rtol=0, atol=1e-6)


if __name__ == "__main__":
    deepspeed.init_distributed("gloo", verbose=False)
    run_checks(CHECKS)
