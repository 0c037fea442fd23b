"""Param groups, the schedules that drive them, and the order in which the device knows them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ._warnings import warn_schedule
from .hyperparameters import GroupSettings, read_group
from .machine import Machine
from .schedules import Schedule
from .schedules.metric import MetricSchedule

#: Options whose values decide a group's settings.
_READ = ("lr", "lr_reference", "betas", "eps", "weight_decay", "weight_decay_reference", "decoupled_weight_decay",
         "amsgrad", "maximize", "master", "moments")  # fmt: skip

#: And what else a step looks for, which engines and schedulers may leave.
_READ_BY_STEPS = (*_READ, "clock", "group_index", "initial_lr")


#: Keys that torch's schedulers add to groups (OneCycleLR the last four).
_WRITTEN_BY_SCHEDULERS = ("initial_lr", "max_lr", "min_lr", "max_momentum", "base_momentum")


@dataclass
class GroupRecord:
    """A param group and the schedules that drive it; the group itself holds only numbers and names."""

    group: dict[str, Any]
    schedules: dict[str, Schedule]
    machine: Machine | None = field(default=None, init=False)  # where the lr follows metrics
    _read_from: tuple[Any, ...] | None = None
    _read_types: list[type] = field(default_factory=list)
    _settings: GroupSettings | None = None

    def __post_init__(self) -> None:
        self.start_machine()
        self._given = {key: self.group[key] for key in _READ if key in self.group}
        self._own_keys = frozenset(self.group)

    def start_machine(self) -> None:
        """The lr has a new schedule: one that follows metrics has had no report yet."""
        lr = self.schedules.get("lr")
        self.machine = Machine(lr) if isinstance(lr, MetricSchedule) else None

    def take_metric_state(self, saved: object) -> None:
        """A rate that follows metrics goes on as it was saved; or afresh, from another optimizer's checkpoint."""
        if self.machine is not None and not self.machine.restore(saved):
            self.machine.restore(None)
            warn_schedule(
                "the checkpoint's rate followed metrics by other rules, and its state is of no use to this optimizer's "
                f"schedule, which starts over: {self.schedules['lr']!r}"
            )

    def take_restored_options(self, index: int) -> None:
        """Make sense of the options in the group at `index`, if an engine put a checkpoint's there key by key.

        From a universal checkpoint ZeRO-3 copies all keys of group 0 into every group (DeepSpeed 0.19.8,
        runtime/zero/stage3.py, load_hp_checkpoint_state_from_checkpoint_dir_stage3).
        """
        saved_index = self.group.pop("group_index", None)
        if saved_index is None:
            return
        live = self._latest()
        self.group.update(live if saved_index != index else {name: live[name] for name in ("master", "moments")})
        self.group.pop("schedules", None)
        metric_state = self.group.pop("metric_state", None)
        self.take_metric_state(metric_state if saved_index == index else None)

    def _latest(self) -> dict[str, Any]:
        """The options as they were last read, or given."""
        return self._given if self._read_from is None else dict(zip(_READ, self._read_from, strict=False))

    def undo_scheduler(self) -> None:
        """Take back what a scheduler has written that is refused when it attaches: last.

        A tensor for a rate is written in place, and what it was is not known.
        """
        latest = self._latest()
        self.group.update({name: latest[name] for name in ("lr", "betas")})
        for key in _WRITTEN_BY_SCHEDULERS:
            if key not in self._own_keys:
                self.group.pop(key, None)

    def forget_foreign_rate(self) -> None:
        """Undo what another optimizer's checkpoint says of scheduled options: its scheduler's latest values."""
        for name in self.schedules.keys() & {"lr", "weight_decay"}:
            self.group[name] = self.group[f"{name}_reference"]
        self.group["betas"] = tuple(
            self.schedules[name].reference if name in self.schedules else beta
            for name, beta in zip(("beta1", "beta2"), self.group["betas"], strict=True)
        )
        if "lr" in self.schedules:
            self.group.pop("initial_lr", None)

    def settings(self, grad_divisor: float) -> GroupSettings:
        """The group's settings as of now, the same object while it stands for them; raises where they are unusable."""
        if self._settings is None or not self.stands_for(self._settings):
            self._settings = read_group(self.group, self.schedules, self.machine, grad_divisor)
            self._read_from = self._read()
            self._read_types = list(map(type, self._read_from))
        return self._settings

    def stands_for(self, settings: GroupSettings) -> bool:
        """Whether nothing that a step reads here has changed since these settings were read, which were the latest."""
        read = self._read()
        # What may change within the same object, an address or an item, is never taken to have stayed.
        changes_in_place = isinstance(read[0], torch.Tensor) or isinstance(read[2], list)
        if settings is not self._settings or changes_in_place:
            return False
        # Types first: numbers of two types may compare equal and not be, and comparing a CUDA tensor waits for it.
        return list(map(type, read)) == self._read_types and read == self._read_from

    def _read(self) -> tuple[Any, ...]:
        read = (*map(self.group.get, _READ_BY_STEPS), self.schedules, self.machine)
        betas = read[2]
        return (*read, *betas) if isinstance(betas, tuple) else read


class GroupTable:
    """Every group ever added, in the device's order: engines hand over some of them, or dicts of their own."""

    def __init__(self) -> None:
        self._records: list[GroupRecord] = []
        self._index_by_id: dict[int, int] = {}  # of the records' groups, which are alive as long as their records

    def __iter__(self) -> Iterator[GroupRecord]:
        return iter(self._records)

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> GroupRecord:
        return self._records[index]

    def add(self, group: dict[str, Any], schedules: dict[str, Schedule]) -> None:
        self._index_by_id[id(group)] = len(self._records)
        self._records.append(GroupRecord(group, schedules))

    def index_of(self, group: dict[str, Any], groups: Sequence[dict[str, Any]]) -> int:
        """The device's index of a group, where `groups` are those in force.

        A dict that is new here stands for the one it replaced: same number of groups, same position, and the old
        dict gone. Raises RuntimeError where that is not so, because a wrong guess would lose a schedule.
        """
        index = self._index_by_id.get(id(group))
        if index is not None:
            return index
        index = next(i for i, other in enumerate(groups) if other is group)
        if len(groups) != len(self._records) or any(self._records[index].group is other for other in groups):
            raise RuntimeError(
                "param_groups holds a dict that add_param_group() never saw, so its schedules are unknown; add "
                "groups with add_param_group(), or put all dicts in place of all the old ones, in their order"
            )
        del self._index_by_id[id(self._records[index].group)]
        self._records[index].group = group
        self._index_by_id[id(group)] = index
        return index

    def of(self, groups: Sequence[dict[str, Any]]) -> list[GroupRecord]:
        """The records of these groups, in their order."""
        return [self._records[self.index_of(group, groups)] for group in groups]

    @property
    def options(self) -> list[dict[str, Any]]:
        return [record.group for record in self._records]

    def lr_tensors(self) -> Iterator[tuple[str, object]]:
        """The rates that the device reads from tensors of the user's, named; a schedule's factor is no such rate."""
        for index, record in enumerate(self._records):
            lr = record.group.get("lr")
            if isinstance(lr, torch.Tensor) and "lr" not in record.schedules:
                yield f"the lr of group {index}", lr

    def forget_foreign_rates(self) -> None:
        for record in self._records:
            record.forget_foreign_rate()

    def stand_for(self, settings: Sequence[GroupSettings]) -> bool:
        """Whether nothing that a step reads in any group has changed since these settings were read."""
        return len(settings) == len(self._records) and all(map(GroupRecord.stands_for, self._records, settings))

    def settings(self, grad_divisor: float) -> list[GroupSettings]:
        """All groups' settings as of now; raises where they are unusable."""
        for index, record in enumerate(self._records):
            record.take_restored_options(index)
        return [record.settings(grad_divisor) for record in self._records]
