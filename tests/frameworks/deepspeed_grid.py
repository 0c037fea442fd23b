"""The grid of DeepSpeed's configurations, in one pair of processes. Started by test_deepspeed.py."""

from __future__ import annotations

from collections.abc import Callable
from unittest import mock

import deepspeed
import engines
import torch
from engines import GRID, Config, Ours, Reference
from ranks import Checks, run_checks

from fused_sched.clock import TickRule

CHECKS = Checks()

#: Of the weights, which are below 1: two orders of the same float32 operations.
TOLERANCE = 1e-6


def check(config: Config) -> None:
    """Rates and clock in every call, the weights of torch's pair, and the same bits after resuming."""
    ours = engines.straight(config, Ours)
    assert ours.applied == engines.NUM_STEPS - len(engines.OVERFLOWS) * config.skips
    assert_calls(ours)
    reference = engines.straight(config, Reference)
    weights = ours.weights()
    for actual, expected in zip(weights, reference.weights(), strict=True):
        torch.testing.assert_close(actual, expected, rtol=0, atol=TOLERANCE)
    for actual, expected in zip(engines.resumed(config).weights(), weights, strict=True):
        assert torch.equal(actual, expected), (actual - expected).abs().max()


def assert_calls(run: engines.Run) -> None:
    """The engine calls step() as often as the configuration is there for."""
    calls = run.client.num_calls / run.applied
    if run.config.sub_group_size:
        assert calls > 2, calls
    elif run.config.stage and run.config.name != "bf16_optimizer":
        assert calls == 2, calls


def named(name: str) -> Config:
    return next(config for config in GRID if config.name == name)


def registered(config: Config) -> Callable[[], None]:
    return lambda: check(config)


CHECKS.update({config.name: registered(config) for config in GRID})


def clock_that_ticks_on_every_call(config: Config) -> None:
    try:
        with mock.patch.object(TickRule, "should_tick", return_value=True):
            engines.straight(config, Ours)
    except AssertionError:
        return
    raise RuntimeError(f"{config}: a clock that ticks on every call goes unnoticed")


def mutated(name: str) -> Callable[[], None]:
    return lambda: clock_that_ticks_on_every_call(named(name))


for _name in ("zero1_fp32", "zero2_bf16", "zero3_fp32", "zero3_fp16_sub_groups_accumulated"):
    CHECKS[f"mutation_{_name}"] = mutated(_name)

if __name__ == "__main__":
    deepspeed.init_distributed("gloo", verbose=False)
    run_checks(CHECKS)
