"""Clock, rates and what an optimizer consists of: all of `FusedScheduledAdam` but its steps and checkpoints."""

from __future__ import annotations

import math
import operator
from typing import Any

import torch

from . import arena, compiled, dtensors, packing
from . import state as states
from .clock import TickRule
from .devices import Call, Devices
from .engine import Engine
from .groups import GroupRecord, GroupTable
from .hyperparameters import GroupSettings
from .scheduler import SECOND_SCHEDULER, ObservingScheduler
from .tail import StepTail

#: A double tells all steps up to this one apart, and so do schedules.
_MAX_CLOCK = 2**53

#: What a group's "clock" holds unless an engine has restored one there. The key is always there, because engines
#: restore those that exist.
NO_CLOCK = -1


def check_clock(step: Any) -> int:
    """The clock as an int; raises ValueError or TypeError where it is none."""
    value = -1 if isinstance(step, bool) else operator.index(step)
    if not 0 <= value <= _MAX_CLOCK:
        raise ValueError(f"the clock must be in [0, 2^53], which schedules can tell apart, got {step!r}")
    return value


class OptimizerBase(StepTail):
    """The part of `FusedScheduledAdam` that answers questions: its clock and rates, its pickled and printed form."""

    state: states.StateMap

    # Saved: the constructor's options, as given and for the whole optimizer.
    _options: dict[str, Any]
    _grad_divisor: float
    _seed: int

    @property
    def clock(self) -> int:
        """Updates applied so far, T. Waits for the device.

        Example:
            >>> import torch
            >>> from fused_sched import FusedScheduledAdam
            >>> FusedScheduledAdam([torch.zeros(2, requires_grad=True)]).clock
            0
        """
        restored = self._restored_clock()
        return self._devices.read_clock() if restored is None else restored

    def _collect(self) -> Call:
        """What has a gradient, for the update to look at closely."""
        owners: list[torch.Tensor] = []
        call = Call(owners, owners, [], [], [])
        ordinal = -1
        for group in self.param_groups:
            index = self._records.index_of(group, self.param_groups)
            for p in group["params"]:
                ordinal += 1
                grad = packing.gradient_of(p)
                if grad is None:
                    continue
                owners.append(p)
                call.grads.append(grad)
                call.groups.append(index)
                call.ordinals.append(ordinal)
        if not dtensors.any_distributed(owners) and not dtensors.any_distributed(call.grads):
            return call
        grads = [dtensors.local_grad(p, g) for p, g in zip(owners, call.grads, strict=True)]
        return call._replace(params=list(map(dtensors.local, owners)), grads=grads)

    def _apply(
        self, call: Call, found_inf: torch.Tensor | None, grad_scale: torch.Tensor | None, *, tick: bool | None = None
    ) -> None:
        raise NotImplementedError

    def _restored_clock(self) -> int | None:
        """What an engine that restores checkpoints key by key has left in the groups or in the parameters' state."""
        return max(self._saved_clocks() or self._foreign_counts(), default=None)

    def _saved_clocks(self) -> list[int]:
        clocks = [int(g["clock"]) for g in self._all_groups if int(g.get("clock", -1)) >= 0]
        return clocks + states.clocks_of(self.state.values()) if self.state.changed else clocks

    def _foreign_counts(self) -> list[int]:
        """Updates that another optimizer took, the largest of which stands for the clock that it does not have."""
        if self._clock_is_known or not self.state.changed or self._saved_clocks():
            return []
        return [count for count in states.step_counts(self.state.values()) if count > 0]

    @property
    def _all_groups(self) -> list[dict[str, Any]]:
        """Those in force, and those that an engine has hidden for the time of this call."""
        return [*self.param_groups, *self._records.options]

    def set_clock(self, step: int) -> None:
        """Set T, the index of the next update in every schedule; the parameters' own step counts stay.

        Raises ValueError unless 0 <= step <= 2^53, TypeError for what is no integer.

        Example:
            >>> import torch
            >>> from fused_sched import FusedScheduledAdam
            >>> opt = FusedScheduledAdam([torch.zeros(2, requires_grad=True)])
            >>> opt.set_clock(500)
            >>> opt.clock
            500
        """
        value = check_clock(step)
        for group in self._all_groups:
            group["clock"] = NO_CLOCK
        for state in self.state.values():
            if isinstance(state, states.ParamState):
                state.discard("clock")
        self._devices.write_clock(value)
        self._ticks.forget_round()
        self._clock_is_known = True

    def last_lr(self, sync: bool = False) -> list[float]:
        """The rates of the latest step, one per group; before the first, those it will use.

        Without `sync` nothing waits for a CUDA device, unless only the device can know: a step was given
        `found_inf`, a step was captured in a graph, or the rate is a CUDA tensor.

        Example:
            >>> import torch
            >>> from fused_sched import FusedScheduledAdam, schedules
            >>> p = torch.zeros(256, requires_grad=True)
            >>> opt = FusedScheduledAdam([p], lr=schedules.linear(1.0, 0.0, 100))
            >>> opt.last_lr()
            [1.0]
        """
        used = self._devices.used_rates(sync, self._applied_settings)
        indices = [self._records.index_of(group, self.param_groups) for group in self.param_groups]
        return [
            used[i] if i < len(used) and not math.isnan(used[i]) else self._next_rate(self._records[i]) for i in indices
        ]

    def _next_rate(self, record: GroupRecord) -> float:
        """The rate of a group that took no step yet, or whose latest is only known from its checkpoint."""
        lr = record.group["lr"]
        source = record.settings(self._grad_divisor).lr
        index = max(0, self.clock - self._resumed)
        return source.value(index, lr if isinstance(lr, torch.Tensor) else None)

    @property
    def lr_tensor(self) -> torch.Tensor:
        """The rates just used, float64 [n_groups], on the first parameter's device; for logging without a wait.

        In the order in which the groups were added; NaN before the first step.

        Example:
            >>> import torch
            >>> from fused_sched import FusedScheduledAdam, schedules
            >>> p = torch.zeros(256, requires_grad=True)
            >>> opt = FusedScheduledAdam([p], lr=schedules.linear(1.0, 0.0, 100))
            >>> opt.lr_tensor
            tensor([nan], dtype=torch.float64)
        """
        engine = self._first_engine()
        if len(engine.lr_tensor) < len(self._records):  # groups that took part in no step yet
            self.push_hyperparameters()
        return engine.lr_tensor

    # Never traced: a graph that holds a step must end before what the step wrote is read.
    @torch._disable_dynamo  # type: ignore[attr-defined]
    def _first_engine(self) -> Engine:
        """The engine of the first parameter's device, made when nothing was stepped yet."""
        if self._devices.first is None:
            params = (p for record in self._records for p in record.group["params"])
            return self._devices.engine(next((p.device for p in params), torch.device("cpu")))
        return self._devices.first

    def scheduler(self) -> ObservingScheduler:
        """A handle for frameworks that want an LRScheduler: it observes, never drives.

        Example:
            >>> import torch
            >>> from fused_sched import FusedScheduledAdam, schedules
            >>> p = torch.zeros(256, requires_grad=True)
            >>> opt = FusedScheduledAdam([p], lr=schedules.linear(1.0, 0.0, 100))
            >>> handle = opt.scheduler()
            >>> handle.step()
            >>> opt.clock, handle.get_last_lr()
            (0, [1.0])
        """
        return ObservingScheduler(self)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop all gradients, or make them zero, as torch does; dropping them does not break a compiled graph.

        Example:
            >>> import torch
            >>> from fused_sched import FusedScheduledAdam
            >>> p = torch.zeros(2, requires_grad=True)
            >>> p.sum().backward()
            >>> FusedScheduledAdam([p]).zero_grad()
            >>> p.grad is None
            True
        """
        if set_to_none and torch.compiler.is_compiling():
            compiled.trace_zero_grad(self)
        else:
            super().zero_grad(set_to_none)

    # -- hyperparameters on the device -----------------------------------------------------------------------

    def _push(self, settings: list[GroupSettings]) -> None:
        self._devices.refuse_host_values(self._records.lr_tensors())
        lrs = [r.group["lr"] for r in self._records]
        self._devices.push(settings, [lr if isinstance(lr, torch.Tensor) else None for lr in lrs])
        self._devices.push_norm(self._norm_settings())

    def push_hyperparameters(self) -> None:
        """Bring edits of groups and of `max_grad_norm` to the device; step() does it by itself, graph replays do not.

        Raises as step() does for unusable options.

        Example:
            >>> import torch
            >>> from fused_sched import FusedScheduledAdam, schedules
            >>> p = torch.zeros(256, requires_grad=True)
            >>> opt = FusedScheduledAdam([p], lr=schedules.linear(1.0, 0.0, 100))
            >>> opt.param_groups[0]["lr"] *= 0.5
            >>> opt.push_hyperparameters()
        """
        self._push(self._records.settings(self._grad_divisor))

    # -- what it consists of ---------------------------------------------------------------------------------

    def bytes_per_param(self) -> float:
        """Persistent bytes of masters and moments per parameter element, padding included, as allocated.

        Before the first step: as they will be.

        Example:
            >>> import torch
            >>> from fused_sched import FusedScheduledAdam, schedules
            >>> p = torch.zeros(256, requires_grad=True)
            >>> opt = FusedScheduledAdam([p], lr=schedules.linear(1.0, 0.0, 100))
            >>> opt.bytes_per_param()
            8.0
        """
        kept = [s.entry.layout for s in self.state.values() if isinstance(s, states.ParamState) and s.entry]
        layouts = kept or [
            arena.Layout.of(p, r.group) for r in self._records for p in r.group["params"] if p.requires_grad
        ]
        elements = sum(layout.numel for layout in layouts)
        return sum(arena.bytes_of(layout) for layout in layouts) / elements if elements else 0.0

    def _reset_runtime(self, backend: str, clock: int) -> None:
        """What is rebuilt rather than saved: engines, prepared calls, the tick rule's memory."""
        self._records = GroupTable()
        self._devices = Devices(backend, clock, self._seed)
        self._ticks = TickRule()
        self._applied_settings: list[GroupSettings] = []
        self._resumed = False  # a checkpoint was loaded, and no step taken since
        self._clock_is_known = False  # by steps of this optimizer, a checkpoint with a clock, or set_clock()
        self._key = compiled.register(self)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "state" and not isinstance(value, states.StateMap):
            value = states.StateMap(value)
        attaches = name == "step" and hasattr(value, "_wrapped_by_lr_sched")
        if attaches and any("lr" in record.schedules for record in self._records):
            for record in self._records:
                record.undo_scheduler()
            raise RuntimeError(
                f"{SECOND_SCHEDULER}. lr and betas of the groups are again what they were when last read"
            )
        super().__setattr__(name, value)

    def __getstate__(self) -> dict[str, Any]:
        return {
            "defaults": self.defaults,
            "state": self.state,
            "param_groups": self.param_groups,
            "_options": self._options,
            "_groups": [(record.group, record.schedules) for record in self._records],
            "_metric_states": [record.machine.export() if record.machine else None for record in self._records],
            "_grad_divisor": self._grad_divisor,
            "_max_grad_norm": self._max_grad_norm,
            "_skip_nonfinite": self._skip_nonfinite,
            "_seed": self._seed,
            "_backend": self._devices.backend,
            "_clock": self.clock,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        state = dict(state)
        groups, metric_states = state.pop("_groups", None), state.pop("_metric_states", ())
        backend, clock = state.pop("_backend", "auto"), state.pop("_clock", 0)
        if groups is not None:
            self._seed = state["_seed"]
            self._reset_runtime(backend, clock)
            self._resumed, self._clock_is_known = clock > 0, True
            for group, schedules in groups:
                self._records.add(group, schedules)
            for record, metric_state in zip(self._records, metric_states, strict=True):
                if record.machine is not None:
                    record.machine.restore(metric_state)
        if "state" in state:
            state["state"] = states.StateMap(state["state"])
        super().__setstate__(state)

    def __repr__(self) -> str:
        lines = [f"{type(self).__name__} ("]
        for index, record in enumerate(self._records.of(self.param_groups)):
            lines.append(f"Parameter Group {index}: {len(record.group['params'])} tensors")
            shown = {k: v for k, v in record.group.items() if k not in ("params", "param_names", "clock")}
            for name, schedule in record.schedules.items():
                shown[f"{name} schedule"] = schedule
            lines.extend(f"    {key}: {shown[key]}" for key in sorted(shown))
        lines.append(
            f"max_grad_norm: {self._max_grad_norm}, skip_nonfinite: {self._skip_nonfinite}, "
            f"grad_divisor: {self._grad_divisor}, backend: {self._devices.backend!r}"
        )
        return "\n".join(lines) + "\n)"
