"""Hugging Face's Trainer with FusedScheduledAdam, in plain and in DeepSpeed mode."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from .. import schedules
from ..optimizer import FusedScheduledAdam
from ..schedules import Schedule
from ..schedules.metric import MetricSchedule
from . import unwrapped


class FusedScheduledAdamMixin:
    """Makes a Trainer optimize with FusedScheduledAdam, its schedule on the device.

    Optimizer and schedule are what the TrainingArguments say: learning_rate, adam_beta1, adam_beta2, adam_epsilon,
    weight_decay (with Trainer's own two groups), lr_scheduler_type, warmup_steps, lr_scheduler_kwargs. The log's
    "learning_rate" is the rate of the latest update.

    fused_adam_options: further arguments of FusedScheduledAdam, to be set in a subclass.

    Trainer's argument `optimizers=(opt, scheduler)` is not needed, and under DeepSpeed Trainer drops it without a
    word. Override `fused_schedule` for another schedule.

    >>> class Trainer: ...  # transformers.Trainer
    >>> class FusedTrainer(FusedScheduledAdamMixin, Trainer):
    ...     fused_adam_options = {"moments": "fp32"}

    Source: transformers 5.23.0, trainer.py, create_optimizer and create_scheduler; integrations/deepspeed.py,
    deepspeed_optim_sched.
    """

    fused_adam_options: ClassVar[Mapping[str, Any]] = {}

    args: Any
    optimizer: Any
    lr_scheduler: Any
    optimizer_cls_and_kwargs: Any
    _created_lr_scheduler: bool

    def fused_schedule(self, num_training_steps: int) -> Schedule:
        """The schedule of all groups; Trainer's own, by default.

        num_training_steps: updates of the whole training.

        Raises ValueError for a schedule type that follows metrics, TypeError for arguments that it does not take.
        """
        schedule: Schedule = schedules.transformers.get_scheduler(
            str(getattr(self.args.lr_scheduler_type, "value", self.args.lr_scheduler_type)),
            num_warmup_steps=self.args.get_warmup_steps(num_training_steps),
            num_training_steps=num_training_steps,
            scheduler_specific_kwargs=self.args.lr_scheduler_kwargs or {},
            base_lr=self.args.learning_rate,
        )
        if isinstance(schedule, MetricSchedule):
            raise ValueError(
                f"lr_scheduler_type={self.args.lr_scheduler_type} follows metrics, which Trainer would not report; "
                "override fused_schedule(), and call opt.report_metric() in a callback's on_evaluate"
            )
        return schedule

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """Trainer's groups, optimized by FusedScheduledAdam."""
        options = {
            "lr": self.args.learning_rate,
            "betas": (self.args.adam_beta1, self.args.adam_beta2),
            "eps": self.args.adam_epsilon,
            **self.fused_adam_options,
        }
        self.optimizer_cls_and_kwargs = (FusedScheduledAdam, options)
        return super().create_optimizer(*args, **kwargs)  # type: ignore[misc]

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """The schedule goes into the optimizer; what Trainer gets is the handle that observes.

        Raises RuntimeError if the optimizer is another one.
        """
        if self.lr_scheduler is not None:
            return self.lr_scheduler
        ours = unwrapped(self.optimizer if optimizer is None else optimizer)
        if ours is None:
            raise RuntimeError(
                "the optimizer is no FusedScheduledAdam: DeepSpeed builds its own from a configuration with an "
                '"optimizer" section, and DeepSpeedCPUAdam where the optimizer is offloaded; remove the sections '
                '"optimizer" and "scheduler", and set "zero_force_ds_cpu_optimizer": false'
            )
        if not any("lr" in record.schedules for record in ours._records):
            ours.set_schedule(self.fused_schedule(num_training_steps))
        self.lr_scheduler = ours.scheduler()
        self._created_lr_scheduler = True
        return self.lr_scheduler
