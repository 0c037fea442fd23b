"""What DeepSpeed's schedules share: arguments per group, and its check of counts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import Any, ClassVar

from ..._warnings import each_said_once
from ..base import set_fields
from ..library import LibrarySchedule


class DeepSpeedSchedule(LibrarySchedule, library="deepspeed", abstract=True):
    """A schedule of DeepSpeed."""

    #: Arguments of which DeepSpeed takes a list, one entry per group.
    group_arguments: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def per_group(cls, base_lrs: Sequence[float], **params: Any) -> list[DeepSpeedSchedule]:
        """One schedule per group, from the arguments DeepSpeed takes: numbers are for all groups, lists have one each.

        base_lrs: the optimizer's rates, one per group. params: the schedule's arguments.
        Raises ValueError for a list of another length, and what the schedule's constructor raises.

        >>> OneCycle = deepspeed.OneCycle
        >>> for schedule in OneCycle.per_group([0.1, 0.1], cycle_min_lr=[0.1, 0.2], cycle_max_lr=1.0):
        ...     print(schedule)
        deepspeed.OneCycle(cycle_min_lr=0.1, cycle_max_lr=1.0)
        deepspeed.OneCycle(cycle_min_lr=0.2, cycle_max_lr=1.0)

        Source: DeepSpeed 0.19.8, runtime/lr_schedules.py, _format_param.
        """
        reads_base_lr = any(field.name == "base_lr" for field in fields(cls))  # type: ignore[arg-type]
        arguments: list[dict[str, Any]] = [{"base_lr": lr} if reads_base_lr else {} for lr in base_lrs]
        for name, value in params.items():
            is_list = name in cls.group_arguments and isinstance(value, list | tuple)
            if is_list and len(value) != len(arguments):
                raise ValueError(
                    f"{cls.word}: {name} must be one number, or one for each of the optimizer's {len(arguments)} "
                    f"groups, got {value!r}"
                )
            for group, own in enumerate(arguments):
                own[name] = value[group] if is_list else value
        made: list[DeepSpeedSchedule] = []
        with each_said_once():
            for group, own in enumerate(arguments):
                twin = arguments.index(own)
                made.append(made[twin] if twin < group else cls(**own))
        return made

    def check_count(self, name: str) -> None:
        """The named field is what DeepSpeed takes for a number of steps, and becomes one."""
        got = getattr(self, name)
        if not isinstance(got, int) or got <= 0:
            raise ValueError(
                f"{self.word}: {name} must be a positive int, got {got!r}; count in updates, with int(...)"
            )
        set_fields(self, **{name: int(got)})  # True counts as 1
