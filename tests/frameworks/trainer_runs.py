"""Hugging Face's Trainer and Accelerate, in two processes. Started by test_hugging_face.py.

Trainer reads RANK and WORLD_SIZE, so that each process is a rank of its data-parallel training.
"""

from __future__ import annotations

import copy
import os
from typing import Any

import engines  # before transformers: DeepSpeed without its compiler
import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.scheduler import AcceleratedScheduler
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import DeepSpeedPlugin, DistributedType
from deepspeed.utils import safe_get_full_fp32_param
from ranks import Checks, run_checks
from torch.optim.lr_scheduler import LambdaLR
from transformers import Trainer, TrainerCallback, TrainingArguments

from fused_sched import FusedScheduledAdam, schedules
from fused_sched.integrations import unwrapped
from fused_sched.integrations.transformers import FusedScheduledAdamMixin

CHECKS = Checks()

NUM_STEPS = 6
ZERO2 = {
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "zero_optimization": {"stage": 2},
}


class Regression(torch.nn.Module):
    """A model as Trainer wants it: batches of named tensors in, a loss out."""

    def __init__(self) -> None:
        super().__init__()
        self.body = engines.model()
        self.norm = torch.nn.LayerNorm(6)

    def forward(self, inputs: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"loss": (self.body(self.norm(inputs)) - labels).pow(2).mean()}


def data() -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [
        {"inputs": torch.randn(6, generator=generator), "labels": torch.randn(1, generator=generator)}
        for _ in range(2 * 2 * 2 * NUM_STEPS)
    ]


class FusedTrainer(FusedScheduledAdamMixin, Trainer):
    pass


class Watch(TrainerCallback):
    """The rates that Trainer logs."""

    def __init__(self) -> None:
        self.logged: list[float] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if "learning_rate" in logs:
            self.logged.append(logs["learning_rate"])


def arguments(folder: str, **more: Any) -> TrainingArguments:
    return TrainingArguments(
        output_dir=folder,
        use_cpu="deepspeed" not in more,  # with which DeepSpeed is left out
        max_steps=NUM_STEPS,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        learning_rate=0.05,
        weight_decay=0.1,
        lr_scheduler_type="cosine",
        warmup_steps=2,
        max_grad_norm=0.0,
        logging_steps=1,
        save_steps=3,
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        ddp_find_unused_parameters=False,
        **more,
    )


def expected(step: int) -> float:
    cosine = schedules.transformers.get_cosine_schedule_with_warmup
    return cosine(num_warmup_steps=2, num_training_steps=NUM_STEPS, base_lr=0.05)(step)


def trained(trainer_class: type[Trainer], folder: str, resume: str | None = None, **more: Any) -> tuple[Any, Watch]:
    reset_accelerate()  # which keeps the first configuration of DeepSpeed for good
    torch.manual_seed(0)
    watch = Watch()
    trainer = trainer_class(model=Regression(), args=arguments(folder, **more), train_dataset=data(), callbacks=[watch])
    trainer.train(resume_from_checkpoint=resume)
    return trainer, watch


def weights(trainer: Trainer) -> list[torch.Tensor]:
    """Whole ones; under ZeRO-3 a parameter has an id of DeepSpeed's and no elements."""
    params = trainer.model.parameters()
    return [(safe_get_full_fp32_param(p) if hasattr(p, "ds_id") else p).detach().clone() for p in params]


def check_trainer(**more: Any) -> None:
    with engines.shared_folder() as folder:
        trainer, watch = trained(FusedTrainer, folder, **more)
        assert trainer.is_deepspeed_enabled is ("deepspeed" in more)
        ours = unwrapped(trainer.optimizer)
        assert ours is not None
        assert ours.clock == NUM_STEPS
        assert watch.logged == [expected(step) for step in range(NUM_STEPS)], watch.logged
        decays = sorted({group["weight_decay"] for group in ours.param_groups})
        assert decays == [0.0, 0.1], "Trainer's groups"

        theirs, _ = trained(Trainer, os.path.join(folder, "theirs"), **more)
        assert unwrapped(theirs.optimizer) is None
        for actual, wanted in zip(weights(trainer), weights(theirs), strict=True):
            torch.testing.assert_close(actual, wanted, rtol=0, atol=1e-6)

        resumed, watch = trained(FusedTrainer, folder, os.path.join(folder, "checkpoint-3"), **more)
        assert unwrapped(resumed.optimizer).clock == NUM_STEPS
        assert watch.logged == [expected(step) for step in range(3, NUM_STEPS)], watch.logged
        for actual, wanted in zip(weights(resumed), weights(trainer), strict=True):
            assert torch.equal(actual, wanted)
        dist.barrier()


@CHECKS
def trainer_in_plain_mode() -> None:
    check_trainer()


@CHECKS
def trainer_under_deepspeed() -> None:
    check_trainer(deepspeed=copy.deepcopy(ZERO2))


@CHECKS
def trainer_under_zero_3() -> None:
    zero = {"stage": 3, "stage3_gather_16bit_weights_on_model_save": True}
    check_trainer(deepspeed={**copy.deepcopy(ZERO2), "zero_optimization": zero})


@CHECKS
def trainer_refuses_the_optimizer_that_deepspeed_builds() -> None:
    config = {**copy.deepcopy(ZERO2), "optimizer": {"type": "AdamW", "params": {"lr": "auto", "torch_adam": True}}}
    with engines.shared_folder() as folder:
        message = ""
        try:
            trained(FusedTrainer, folder, deepspeed=config)
        except RuntimeError as error:
            message = str(error)
        assert 'remove the sections "optimizer"' in message, message
        dist.barrier()


# ---- Accelerate --------------------------------------------------------------------------------------------

RATE = schedules.linear(0.05, 0.0, 20)


def reset_accelerate() -> None:
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


def accelerated(accelerator: Accelerator, fused: bool, num_batches: int = 8) -> tuple[Any, Any, Any]:
    module = engines.model()
    loader = torch.utils.data.DataLoader([engines.batch(i, 0)[0] for i in range(4 * num_batches)], batch_size=2)
    optimizer: torch.optim.Optimizer
    if fused:
        optimizer = FusedScheduledAdam(module.parameters(), lr=RATE, weight_decay=0.1)
        scheduler: Any = optimizer.scheduler()
    else:
        optimizer = torch.optim.AdamW(module.parameters(), lr=0.05, weight_decay=0.1)
        scheduler = LambdaLR(optimizer, lambda step: RATE(step) / 0.05)
    # The reference's scheduler stays outside: prepared, it would be stepped once per process (accelerate/scheduler.py).
    prepared = accelerator.prepare(module, optimizer, loader, *([scheduler] if fused else []))
    module, wrapped, loader = prepared[:3]
    handle = prepared[3] if fused else scheduler
    for index, inputs in enumerate(loader):
        with accelerator.accumulate(module):
            accelerator.backward(module(inputs).pow(2).mean())
            wrapped.step()
            if fused or accelerator.sync_gradients:
                handle.step()
            wrapped.zero_grad()
        if index == num_batches - 1:
            break
    return accelerator.unwrap_model(module), optimizer, handle


@CHECKS
def accelerate_with_accumulation() -> None:
    results = []
    for fused in (True, False):
        reset_accelerate()
        accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
        assert accelerator.num_processes == 2
        module, optimizer, handle = accelerated(accelerator, fused)
        results.append([p.detach().clone() for p in module.parameters()])
        if fused:
            assert optimizer.clock == 4
            assert handle.get_last_lr() == optimizer.last_lr() == [RATE(3)]
    for actual, wanted in zip(*results, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=0, atol=1e-6)


@CHECKS
def accelerate_saves_and_loads() -> None:
    with engines.shared_folder() as folder:
        reset_accelerate()
        accelerator = Accelerator(cpu=True)
        module, optimizer, _ = accelerated(accelerator, fused=True, num_batches=3)
        accelerator.save_state(folder)
        saved = [p.detach().clone() for p in module.parameters()]
        reset_accelerate()
        accelerator = Accelerator(cpu=True)
        module, optimizer, handle = accelerated(accelerator, fused=True, num_batches=5)
        accelerator.load_state(folder)
        assert optimizer.clock == 3
        assert handle.get_last_lr() == [RATE(2)]
        for p, value in zip(module.parameters(), saved, strict=True):
            assert torch.equal(p, value)
        dist.barrier()


@CHECKS
def accelerate_with_a_gradient_scaler() -> None:
    """Accelerate replaces step() to see whether the scaler skips, which ours does on the device."""
    reset_accelerate()
    Accelerator(cpu=True)
    optimizer = FusedScheduledAdam(engines.model().parameters(), lr=RATE)
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    wrapped = AcceleratedOptimizer(optimizer, device_placement=False, scaler=scaler)
    handle = AcceleratedScheduler(optimizer.scheduler(), wrapped)
    for step in range(6):
        for p in optimizer.param_groups[0]["params"]:
            p.grad = torch.full_like(p, torch.inf if step == 2 else 256.0)
        scaler.scale(torch.ones(()))  # GradScaler wants to have scaled a loss
        wrapped.step()
        handle.step()
        applied = step + (step < 2)
        assert optimizer.clock == applied
        assert handle.get_last_lr() == [RATE(applied - 1)]


@CHECKS
def accelerate_with_deepspeed() -> None:
    results = []
    for fused in (True, False):
        reset_accelerate()
        plugin = DeepSpeedPlugin(hf_ds_config=engines.Config("zero2", 2, gas=2).section)
        accelerator = Accelerator(deepspeed_plugin=plugin)
        assert accelerator.distributed_type == DistributedType.DEEPSPEED
        module, optimizer, handle = accelerated(accelerator, fused)
        results.append([p.detach().clone() for p in module.parameters()])
        if fused:
            assert optimizer.clock == 4, optimizer.clock
            assert handle.get_last_lr() == [RATE(3)]
    for actual, wanted in zip(*results, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=0, atol=1e-6)
    reset_accelerate()


if __name__ == "__main__":
    run_checks(CHECKS)
