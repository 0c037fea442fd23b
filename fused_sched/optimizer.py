"""`FusedScheduledAdam`: torch's optimizer interface over engines that compute rate and update on the device."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.optim import Optimizer

from . import arena, checkpoint, hyperparameters, packing
from . import state as states
from .clock import TickRule
from .devices import Call, Devices, called_for_allocation
from .groups import GroupRecord, GroupTable
from .hyperparameters import SCHEDULABLE, GroupSettings
from .scheduler import SECOND_SCHEDULER, ObservingScheduler, refuse_second_scheduler
from .schedules import Schedule

#: A double tells all steps up to this one apart, and so do schedules.
_MAX_CLOCK = 2**53

#: What a group's "clock" holds unless an engine has restored one there. The key is always there, because engines
#: restore those that exist.
_NO_CLOCK = -1


class FusedScheduledAdam(Optimizer):
    r"""Adam and AdamW with scheduled hyperparameters, evaluated and applied on the device in one pass.

    For update t = 1, 2, ... of a parameter, with the schedule clock at T-1 = number of updates applied before:

    .. math::
        w &\leftarrow w - \eta_{T-1} \lambda w \qquad\text{(decoupled decay)} \\
        m &\leftarrow m + (1-\beta_1)(g - m), \quad v \leftarrow v + (1-\beta_2)(g^2 - v) \\
        w &\leftarrow w - \frac{\eta_{T-1}}{1-\beta_1^t} \cdot \frac{m}{\sqrt{v}/\sqrt{1-\beta_2^t} + \epsilon}

    Args:
        params: tensors, named parameters or group dicts; float32, bfloat16, float16 or float64, on any devices.
        lr: rate per update: a number, a 0-d tensor (read on its device) or a Schedule. Per group.
        betas: decay of the two moments, numbers in [0, 1) or Schedules. Per group.
        eps: added to the denominator, outside the square root. Per group.
        weight_decay: number or Schedule (torch's AdamW defaults to 0.01, this to 0). Per group.
        decoupled_weight_decay: AdamW's decay; False adds weight_decay * w to the gradient (Adam). Per group.
        amsgrad: divide by the largest second moment so far. Per group.
        maximize: ascend. Per group.
        master: where the exact value of a 16-bit parameter is kept: "none" or "fp32"; "auto" is "fp32". Per group.
        moments: storage of the moments: "fp32" (fp64 for float64 parameters). Per group.
        grad_divisor: gradients are divided by it inside the update (micro-batches accumulated by summing).
        seed: of stochastic rounding.
        backend: "cuda", "cpu" or "reference"; "auto" takes the fastest that serves each parameter's device.

    Raises:
        ValueError, TypeError: a hyperparameter is out of range or a parameter cannot be optimized.
        NotImplementedError: an option of the interface that this version does not implement yet.

    Example:
        >>> import torch
        >>> from fused_sched import FusedScheduledAdam, schedules
        >>> model = torch.nn.Linear(4, 2)
        >>> lr = schedules.warmup_cosine(1e-3, warmup_steps=10, total_steps=100)
        >>> opt = FusedScheduledAdam(model.parameters(), lr=lr)
        >>> model(torch.ones(3, 4)).sum().backward()
        >>> opt.step()
        >>> opt.clock, opt.last_lr()
        (1, [0.0001])

    Source: Kingma and Ba 2015 (Adam); Loshchilov and Hutter 2019 (decoupled decay); Reddi et al. 2018 (AMSGrad);
    order of operations as torch 2.13's fused AdamW, moments as in `csrc/core/adam.h`.
    """

    state: states.StateMap

    #: GradScaler then hands over `grad_scale` and `found_inf` instead of waiting for the device.
    _step_supports_amp_scaling = True

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | torch.Tensor | Schedule = 1e-3,
        betas: tuple[float | Schedule, float | Schedule] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float | Schedule = 0.0,
        *,
        decoupled_weight_decay: bool = True,
        amsgrad: bool = False,
        maximize: bool = False,
        master: str = "auto",
        moments: str = "fp32",
        max_grad_norm: float | None = None,
        grad_divisor: float = 1.0,
        skip_nonfinite: bool = False,
        seed: int = 0,
        backend: str = "auto",
        **unsupported: Any,
    ) -> None:
        hyperparameters.check_keywords(unsupported, max_grad_norm=max_grad_norm, skip_nonfinite=skip_nonfinite)
        self._grad_divisor = hyperparameters.check_grad_divisor(grad_divisor)
        self._seed = hyperparameters.check_seed(seed)
        self._options: dict[str, Any] = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "decoupled_weight_decay": decoupled_weight_decay,
            "amsgrad": amsgrad,
            "maximize": maximize,
            "master": master,
            "moments": moments,
        }
        self._reset_runtime(backend, clock=0)
        defaults = dict(self._options)
        hyperparameters.split_options(defaults)
        hyperparameters.check_options(defaults)
        super().__init__(params, defaults)

    def _reset_runtime(self, backend: str, clock: int) -> None:
        """What is rebuilt rather than saved: engines, prepared calls, the tick rule's memory."""
        self._records = GroupTable()
        self._devices = Devices(backend, clock)
        self._ticks = TickRule()
        self._applied_settings: list[GroupSettings] = []
        self._resumed = False  # a checkpoint was loaded, and no step taken since

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; its options may be Schedules and default to the constructor's."""
        options = {**self._options, **param_group, "clock": _NO_CLOCK}
        schedules = hyperparameters.split_options(options)
        hyperparameters.check_options(options)
        params = options["params"]
        if not isinstance(params, set):  # which super() refuses
            params = options["params"] = [params] if isinstance(params, torch.Tensor) else list(params)
            tensors = [item[1] if isinstance(item, tuple) else item for item in params]
            for tensor in tensors:
                if isinstance(tensor, torch.Tensor):
                    packing.check_param(tensor)
            if len({id(tensor) for tensor in tensors}) != len(tensors):
                raise ValueError("a parameter group must name each parameter once, got one of them twice; remove it")
        super().add_param_group(options)
        # As in torch, the caller's dict becomes the group.
        param_group.clear()
        param_group.update(self.param_groups.pop())
        self.param_groups.append(param_group)
        self._records.add(param_group, schedules)

    # -- the step ------------------------------------------------------------------------------------------

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Apply one update to every parameter that has a gradient; returns the closure's loss.

        Raises before anything has changed if a gradient, parameter or option is unusable.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with torch.no_grad():
            self._step()
        return loss

    # torch.compile runs the step as it is: what it does depends on addresses, which a trace would freeze. The
    # private decorator is torch.optim's own; the public one imports the compiler together with this module.
    @torch._disable_dynamo  # type: ignore[attr-defined]
    def _step(self) -> None:
        self._ticks.observe(self.param_groups)
        call = self._collect()
        if not call.params:
            return
        found_inf, grad_scale = getattr(self, "found_inf", None), getattr(self, "grad_scale", None)
        packing.check_scaler_value("found_inf", found_inf)
        packing.check_scaler_value("grad_scale", grad_scale)
        options = self._records.options
        reusable = not self.state.changed and self._devices.rebind(call, options)
        if not reusable and not all(map(self.state.has_state, call.params)) and called_for_allocation():
            self._devices.allocate(self.state, call, options)
            return
        refuse_second_scheduler(self._records)
        settings = self._records.settings(self._grad_divisor)
        if not reusable:
            self._devices.lay_out(self.state, call, options)
        self._take_clock_from_groups()
        ids = [id(p) for p in call.params]
        tick = self._ticks.should_tick(ids)
        self._push(settings)
        self._devices.step(tick, found_inf, grad_scale)
        self._ticks.record(ids, tick)
        self._applied_settings, self._resumed = settings, False
        packing.bump_versions(call.params)

    def _collect(self) -> Call:
        call = Call([], [], [])
        for group in self.param_groups:
            index = self._records.index_of(group, self.param_groups)
            for p in group["params"]:
                grad = p.grad
                if grad is None:
                    grad = getattr(p, "main_grad", None)
                    if grad is None:
                        continue
                    if not isinstance(grad, torch.Tensor):
                        raise TypeError(f"p.main_grad must be a tensor or None, got {grad!r}; set it to a gradient")
                call.params.append(p)
                call.grads.append(grad)
                call.groups.append(index)
        return call

    # -- hyperparameters -----------------------------------------------------------------------------------

    def _push(self, settings: list[GroupSettings]) -> None:
        lrs = [r.group["lr"] for r in self._records]
        self._devices.push(settings, [lr if isinstance(lr, torch.Tensor) else None for lr in lrs])

    def push_hyperparameters(self) -> None:
        """Bring edits of the groups to the device; step() does it by itself, graph replays do not."""
        self._push(self._records.settings(self._grad_divisor))

    def set_schedule(self, schedule: Schedule | float, group: int | None = None, hyperparameter: str = "lr") -> None:
        """Drive a hyperparameter by another schedule, or by a number; the clock goes on.

        Args:
            schedule: the new Schedule, or a number, which ends scheduling.
            group: index of the group; None: all of them.
            hyperparameter: "lr", "beta1", "beta2" or "weight_decay".

        A factor applied to `group["lr"]` stays when one schedule follows another. Raises before anything changes.
        """
        if hyperparameter not in SCHEDULABLE:
            raise ValueError(f"hyperparameter must be one of {', '.join(SCHEDULABLE)}, got {hyperparameter!r}")
        records = self._records.of(self.param_groups)
        if group is not None and not -len(records) <= group < len(records):
            raise IndexError(f"group must be an index below {len(records)}, got {group!r}")
        if isinstance(schedule, Schedule):
            hyperparameters.check_schedule(hyperparameter, schedule)
            if hyperparameter == "lr" and hasattr(self.step, "_wrapped_by_lr_sched"):
                raise RuntimeError(SECOND_SCHEDULER)
        self._records.settings(self._grad_divisor)
        records = records if group is None else [records[group]]
        changes = [hyperparameters.replaced(r.group, r.schedules, hyperparameter, schedule) for r in records]
        for record, (options, schedules) in zip(records, changes, strict=True):
            if hyperparameter == "lr":
                record.group.pop("initial_lr", None)  # of a scheduler whose checkpoint was loaded
            record.group.update(options)
            record.schedules = schedules
        self.push_hyperparameters()

    # -- clock and rates -----------------------------------------------------------------------------------

    @property
    def clock(self) -> int:
        """Updates applied so far, T. Waits for the device."""
        pending = self._pending_clock()
        return self._devices.read_clock() if pending is None else pending

    def set_clock(self, step: int) -> None:
        """Set T, the index of the next update in every schedule; the parameters' own step counts stay.

        Example:
            >>> import torch
            >>> from fused_sched import FusedScheduledAdam
            >>> opt = FusedScheduledAdam([torch.zeros(2, requires_grad=True)])
            >>> opt.set_clock(500)
            >>> opt.clock
            500
        """
        value = -1 if isinstance(step, bool) else operator.index(step)
        if not 0 <= value <= _MAX_CLOCK:
            raise ValueError(f"the clock must be in [0, 2^53], which schedules can tell apart, got {step!r}")
        for group in self.param_groups:
            group["clock"] = _NO_CLOCK
        self._devices.write_clock(value)
        self._ticks.forget_round()

    def _pending_clock(self) -> int | None:
        """What an engine that restores checkpoints key by key has left in the groups."""
        return max((int(g["clock"]) for g in self.param_groups if int(g.get("clock", -1)) >= 0), default=None)

    def _take_clock_from_groups(self) -> None:
        pending = self._pending_clock()
        if pending is not None:
            self.set_clock(pending)

    def last_lr(self, sync: bool = False) -> list[float]:
        """The rates of the latest step, one per group; before the first, those it will use.

        Without `sync` nothing waits for a CUDA device, unless only the device can know: a step was given
        `found_inf`, a step was captured in a graph, or the rate is a CUDA tensor.
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
        """
        if self._devices.first is None:
            params = (p for record in self._records for p in record.group["params"])
            self._devices.engine(next((p.device for p in params), torch.device("cpu")))
            self.push_hyperparameters()
        assert self._devices.first is not None
        return self._devices.first.lr_tensor

    def scheduler(self) -> ObservingScheduler:
        """A handle for frameworks that want an LRScheduler: it observes, never drives."""
        return ObservingScheduler(self)

    # -- state ---------------------------------------------------------------------------------------------

    def bytes_per_param(self) -> float:
        """Persistent bytes of masters and moments per parameter element, padding included, as allocated.

        Before the first step: as they will be.
        """
        kept = [s.entry.layout for s in self.state.values() if isinstance(s, states.ParamState) and s.entry]
        layouts = kept or [
            arena.Layout.of(p, r.group) for r in self._records for p in r.group["params"] if p.requires_grad
        ]
        elements = sum(layout.numel for layout in layouts)
        return sum(arena.bytes_of(layout) for layout in layouts) / elements if elements else 0.0

    def state_dict(self, *, portable: bool = False) -> dict[str, Any]:
        """State and options as tensors and primitives, loadable with `weights_only=True`.

        Args:
            portable: only what torch's AdamW knows, and the masters: for other optimizers and resharding.
        """
        for pre_hook in self._optimizer_state_dict_pre_hooks.values():
            pre_hook(self)
        exported = checkpoint.export(self, portable)
        for post_hook in self._optimizer_state_dict_post_hooks.values():
            exported = post_hook(self, exported) or exported
        return exported

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the state of this optimizer or of torch's Adam/AdamW, into the memory already in use.

        Options come from the checkpoint, except master, moments and the constructor's schedules.
        """
        checkpoint.load(self, state_dict)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "state" and not isinstance(value, states.StateMap):
            value = states.StateMap(value)
        attaches = name == "step" and hasattr(value, "_wrapped_by_lr_sched")
        if attaches and any("lr" in record.schedules for record in self._records):
            for record in self._records:
                record.group.pop("initial_lr", None)  # which the scheduler has just added
            raise RuntimeError(SECOND_SCHEDULER)
        super().__setattr__(name, value)

    def __getstate__(self) -> dict[str, Any]:
        return {
            "defaults": self.defaults,
            "state": self.state,
            "param_groups": self.param_groups,
            "_options": self._options,
            "_groups": [(record.group, record.schedules) for record in self._records],
            "_grad_divisor": self._grad_divisor,
            "_seed": self._seed,
            "_backend": self._devices.backend,
            "_clock": self.clock,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        state = dict(state)
        groups = state.pop("_groups", None)
        backend, clock = state.pop("_backend", "auto"), state.pop("_clock", 0)
        if groups is not None:
            self._reset_runtime(backend, clock)
            self._resumed = clock > 0
            for group, schedules in groups:
                self._records.add(group, schedules)
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
        lines.append(f"grad_divisor: {self._grad_divisor}, backend: {self._devices.backend!r}")
        return "\n".join(lines) + "\n)"
