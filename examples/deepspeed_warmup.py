"""DeepSpeed's warm-up tutorial with the schedule on the device.

On one process:                       python examples/deepspeed_warmup.py
Under ZeRO-3 with two processes:      torchrun --nproc_per_node 2 examples/deepspeed_warmup.py --zero-stage 3

The tutorial's client optimizer, configuration and loop, with `deepspeed.initialize` replaced by
`fused_sched.deepspeed.initialize`. Its loop steps the scheduler by hand although the engine has done so; here that
changes nothing, because the rate is computed in the update itself.
"""

from __future__ import annotations

import argparse
import os
import sys
import warnings

import torch

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of what DeepSpeed imports
    import deepspeed.ops

import fused_sched.deepspeed

#: What a launcher sets, for a run without one.
ONE_PROCESS = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29512"}

BATCH_SIZE = 8
WARMUP_STEPS = 100


def ds_config(zero_stage: int) -> dict[str, object]:
    return {
        "train_batch_size": BATCH_SIZE,
        "optimizer": {"type": "Adam", "params": {"lr": 0.01}},
        "scheduler": {
            "type": "WarmupLR",
            "params": {"warmup_min_lr": 0.001, "warmup_max_lr": 0.01, "warmup_num_steps": WARMUP_STEPS},
        },
        "zero_optimization": {"stage": zero_stage},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--zero-stage", type=int, default=0, choices=range(4))
    parser.add_argument("--steps", type=int, default=WARMUP_STEPS + 1, help="updates (default: %(default)s)")
    args = parser.parse_args()
    for name, value in ONE_PROCESS.items():
        os.environ.setdefault(name, value)
    if not torch.cuda.is_available():
        # Otherwise DeepSpeed 0.19 first compiles a collective for CPUs, for 40 seconds.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        deepspeed.init_distributed("gloo", verbose=False)

    torch.manual_seed(0)
    model = torch.nn.Linear(10, 1)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    model_engine, optimizer, _, lr_scheduler = fused_sched.deepspeed.initialize(
        model=model, optimizer=optimizer, config_params=ds_config(args.zero_stage)
    )

    # DeepSpeed uses the lowest rate for two updates, so the warm-up ends with update number 101.
    for _ in range(args.steps):
        inputs = torch.randn(BATCH_SIZE, 10, device=model_engine.device)
        outputs = model_engine(inputs)
        loss = outputs.mean()
        model_engine.backward(loss)
        model_engine.step()
        lr_scheduler.step()

    if torch.distributed.get_rank() == 0:
        print(f"Learning rate after warm-up: {lr_scheduler.get_last_lr()[0]:g}")
        print(f"Loss: {loss.item():.6f}")
        print("Training step completed", flush=True)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
    sys.stdout.flush()
    os._exit(0)  # threads of DeepSpeed abort some interpreters that end by themselves
