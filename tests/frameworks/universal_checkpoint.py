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
from engines import NUM_STEPS, SAVED_AFTER, Client, Config, Ours, Reference
from ranks import Checks, folder, run_checks

CHECKS = Checks()
CONFIGS = (
    Config("zero1", 1),
    Config("zero2", 2),
    Config("zero3", 3),
    Config("zero3_sub_groups", 3, sub_group_size=40),
    Config("zero2_8bit", 2, options={"moments": "8bit"}),
    Config("zero3_8bit_sub_groups", 3, sub_group_size=40, options={"moments": "8bit"}),
    Config("zero1_from_torch", 1),
    Config("zero2_from_torch", 2),
)


def client(config: Config) -> Client:
    return Reference if config.name.endswith("from_torch") else Ours


def save(config: Config) -> None:
    run = engines.start(config, client(config))
    run.train(range(SAVED_AFTER))
    path = folder() / config.name
    saved = str(path / "saved")
    run.engine.save_checkpoint(saved, tag="half", client_state={"universal_checkpoint_info": {}})
    if config.options:
        # Of 8-bit moments only their values can be followed: in other shards they are rounded by other random bits.
        continued = engines.start(replace(config, options={}), Ours)
        continued.engine.load_checkpoint(saved, tag="half")
        continued.applied = continued.client.applied = run.applied
        run = continued
    run.train(range(SAVED_AFTER, NUM_STEPS))
    weights = run.weights()
    if dist.get_rank() == 0:
        torch.save(weights, path / "weights.pt")


def load(config: Config) -> None:
    """The other half of the run, with the whole batches in this number of processes."""
    path = folder() / config.name
    expected = torch.load(path / "weights.pt")
    # The gradients of two processes are averaged in another order than those of one.
    goes_on(replace(config, options={}), path, expected, tolerance=1e-6)
    if config.options:
        # Moments of 3 and 4 significant bits; an update from moments that were lost is off by half the rate, 0.02.
        goes_on(config, path, expected, tolerance=0.015)


def goes_on(config: Config, path: Path, weights: list[torch.Tensor], tolerance: float) -> None:
    run = engines.start(replace(config, extra={"checkpoint": {"load_universal": True}}), Ours)
    run.engine.load_checkpoint(str(path / "universal"), tag="half")
    run.applied = SAVED_AFTER - sum(step < SAVED_AFTER for step in engines.OVERFLOWS)
    run.client.applied = run.applied
    assert run.client.optimizer.clock == run.applied, run.client.optimizer.clock
    # Stage 3 puts one tensor in place for all sub-groups (zero/stage3.py:3664).
    steps = [state["step"] for state in run.client.optimizer.state.values()]
    assert [int(step) for step in steps] == [run.applied] * len(steps), steps
    run.train(range(SAVED_AFTER, NUM_STEPS))
    for actual, expected in zip(run.weights(), weights, strict=True):
        torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance)


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
