"""Train with the optimizer and scheduler sections of a DeepSpeed configuration, in a plain loop without DeepSpeed.

The learning rate warms up from 0.001 to 0.01 over 100 updates. It is computed inside `optimizer.step()`: there is no
scheduler to step.
"""

from __future__ import annotations

import torch
from torch import nn

from fused_sched.deepspeed import optimizer_from_config

WARMUP_STEPS = 100
DS_CONFIG = {
    "train_batch_size": 32,
    "optimizer": {"type": "Adam", "params": {"lr": 0.01}},
    "scheduler": {
        "type": "WarmupLR",
        "params": {"warmup_min_lr": 0.001, "warmup_max_lr": 0.01, "warmup_num_steps": WARMUP_STEPS},
    },
}


def main() -> None:
    torch.manual_seed(0)
    model = nn.Linear(10, 1)
    optimizer = optimizer_from_config(model.parameters(), DS_CONFIG)
    inputs = torch.randn(DS_CONFIG["train_batch_size"], 10)
    targets = inputs.sum(dim=1, keepdim=True)
    # DeepSpeed uses the lowest rate for two updates, so the warm-up ends with update number 101.
    for _ in range(WARMUP_STEPS + 1):
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(inputs), targets)
        loss.backward()
        optimizer.step()
    print(f"Learning rate after warm-up: {optimizer.last_lr()[0]:g}")
    print(f"Loss: {loss.item():.6f}")
    print("Training step completed")


if __name__ == "__main__":
    main()
