"""DeepSpeed's universal checkpoint: two processes save ("save"), another number of them goes on ("load").

In between, `convert` makes one of the other. Started by test_deepspeed.py.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import deepspeed
import engines
import torch
import torch.distributed as dist
from engines import NUM_STEPS, SAVED_AFTER, Config, Ours
from ranks import Checks, folder, run_checks

CHECKS = Checks()
CONFIGS = (
    Config("zero1", 1),
    Config("zero2", 2),
    Config("zero3", 3),
    Config("zero3_sub_groups", 3, sub_group_size=40),
)


def save(config: Config) -> None:
    run = engines.start(config, Ours)
    run.train(range(SAVED_AFTER))
    path = folder() / config.name
    run.engine.save_checkpoint(str(path / "saved"), tag="half", client_state={"universal_checkpoint_info": {}})
    run.train(range(SAVED_AFTER, NUM_STEPS))
    weights = run.weights()
    if dist.get_rank() == 0:
        torch.save(weights, path / "weights.pt")


def load(config: Config) -> None:
    """The other half of the run, with the whole batches in this number of processes."""
    path = folder() / config.name
    run = engines.start(replace(config, extra={"checkpoint": {"load_universal": True}}), Ours)
    run.engine.load_checkpoint(str(path / "universal"), tag="half")
    run.applied = SAVED_AFTER - sum(step < SAVED_AFTER for step in engines.OVERFLOWS)
    run.client.applied = run.applied
    assert run.client.optimizer.clock == run.applied, run.client.optimizer.clock
    # Stage 3 puts one tensor in place for all sub-groups (zero/stage3.py:3664).
    steps = [state["step"] for state in run.client.optimizer.state.values()]
    assert [int(step) for step in steps] == [run.applied] * len(steps), steps
    run.train(range(SAVED_AFTER, NUM_STEPS))
    for actual, expected in zip(run.weights(), torch.load(path / "weights.pt"), strict=True):
        # The gradients of two processes are averaged in another order than those of one.
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-6)


def convert(shared: Path) -> None:
    """Make universal checkpoints of the saved ones. Not in a rank: DeepSpeed's tool forks, and ranks have threads."""
    for config in CONFIGS:
        path = shared / config.name
        tool = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", "--inject_missing_state"]
        folders = ["--input_folder", str(path / "saved" / "half"), "--output_folder", str(path / "universal" / "half")]
        workers = ["--num_extract_workers", "1", "--num_merge_workers", "1"]
        subprocess.run([*tool, *folders, *workers], check=True, capture_output=True, timeout=120)


def registered(phase: Callable[[Config], None], config: Config) -> Callable[[], None]:
    return lambda: phase(config)


if __name__ == "__main__":
    for _config in CONFIGS:
        CHECKS[_config.name] = registered({"save": save, "load": load}[sys.argv[2]], _config)
    deepspeed.init_distributed("gloo", verbose=False)
    run_checks(CHECKS)
