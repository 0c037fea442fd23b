"""`FusedScheduledAdam`: torch's optimizer interface over engines that compute rate and update on the device."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.optim import Optimizer

from . import arena, checkpoint, hyperparameters, packing
from . import state as states
from .clock import TickRule
from .devices import Call, Devices, called_for_allocation
from .groups import GroupTable
from .hyperparameters import SCHEDULABLE, GroupSettings
from .scheduler import ObservingScheduler
from .schedules import Schedule

_NOT_BUILT = {
    "max_grad_norm": (None, "clip with torch.nn.utils.clip_grad_norm_ before step()"),
    "skip_nonfinite": (False, "set `opt.found_inf` to a device scalar, as GradScaler does"),
}


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
        _refuse(unsupported, max_grad_norm=max_grad_norm, skip_nonfinite=skip_nonfinite)
        self._grad_divisor = hyperparameters.check_grad_divisor(grad_divisor)
        self._seed = int(seed)
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

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; its options may be Schedules and default to the constructor's."""
        options = {**self._options, **param_group}
        schedules = hyperparameters.split_options(options)
        hyperparameters.check_options(options)
        params = options["params"]
        if not isinstance(params, (torch.Tensor, set)):
            params = options["params"] = list(params)
            for item in params:
                tensor = item[1] if isinstance(item, tuple) else item
                if isinstance(tensor, torch.Tensor):
                    packing.check_param(tensor)
            if len({id(p) for p in params}) != len(params):
                raise ValueError("a parameter group must name each parameter once, got one of them twice; remove it")
        super().add_param_group(options)
        self._records.add(self.param_groups[-1], schedules)

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
        self._take_clock_from_groups()
        self._ticks.observe(self.param_groups)
        call = self._collect()
        if not call.params:
            return
        found_inf, grad_scale = getattr(self, "found_inf", None), getattr(self, "grad_scale", None)
        packing.check_scaler_value("found_inf", found_inf)
        packing.check_scaler_value("grad_scale", grad_scale)
        options = self._records.options
        reusable = not self.state.changed and self._devices.rebind(call, options)
        dry_run = not reusable and any(p not in self.state for p in call.params) and called_for_allocation()
        if not dry_run:
            self._refuse_other_schedulers()
            settings = self._records.settings(self._grad_divisor)
        if not reusable:
            self._devices.lay_out(self.state, call, options)
        if dry_run:
            return
        ids = [id(p) for p in call.params]
        tick = self._ticks.should_tick(ids)
        self._push(settings)
        self._devices.step(tick, found_inf, grad_scale)
        self._ticks.record(ids, tick)
        self._applied_settings = settings
        torch.autograd.graph.increment_version(call.params)

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
                call.params.append(p)
                call.grads.append(grad)
                call.groups.append(index)
        return call

    def _refuse_other_schedulers(self) -> None:
        for record in self._records:
            initial_lr = record.group.get("initial_lr")
            if "lr" in record.schedules and initial_lr is not None and record.group["lr"] != initial_lr:
                raise RuntimeError(_SECOND_SCHEDULER)

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

        A factor that was applied to `group["lr"]` stays: lr = new reference * old ratio.
        """
        if hyperparameter not in SCHEDULABLE:
            raise ValueError(f"hyperparameter must be one of {', '.join(SCHEDULABLE)}, got {hyperparameter!r}")
        if group is not None and not -len(self._records) <= group < len(self._records):
            raise IndexError(f"group must be an index below {len(self._records)}, got {group!r}")
        if isinstance(schedule, Schedule):
            hyperparameters.check_schedule(hyperparameter, schedule)
            if hyperparameter == "lr" and hasattr(self.step, "_wrapped_by_lr_sched"):
                raise RuntimeError(_SECOND_SCHEDULER)
        records = list(self._records) if group is None else [self._records[group]]
        changes = [hyperparameters.replaced(r.group, r.schedules, hyperparameter, schedule) for r in records]
        for record, (options, schedules) in zip(records, changes, strict=True):
            record.group.update(options)
            record.schedules = schedules
        self.push_hyperparameters()

    # -- clock and rates -----------------------------------------------------------------------------------

    @property
    def clock(self) -> int:
        """Updates applied so far, T. Waits for the device."""
        return self._devices.read_clock()

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
        if isinstance(step, bool) or not isinstance(step, int) or step < 0:
            raise ValueError(f"the clock must be a non-negative int, got {step!r}")
        self._devices.write_clock(step)
        self._ticks.forget_round()

    def _take_clock_from_groups(self) -> None:
        """Engines that restore checkpoints key by key leave the clock in the groups."""
        clocks = [group.pop("clock") for group in self.param_groups if "clock" in group]
        if clocks:
            self.set_clock(int(clocks[0]))

    def last_lr(self, sync: bool = False) -> list[float]:
        """The rates of the latest step, one per group; before the first, those it will use.

        Without `sync` nothing waits for a CUDA device, unless a step was given `found_inf`, whose outcome only
        the device knows, or the rate is a CUDA tensor.
        """
        clock = self._devices.read_clock() if sync else self._devices.peek_clock()
        settings = self._applied_settings or self._records.settings(self._grad_divisor)
        rates = []
        for record, group in zip(self._records, settings, strict=False):
            if group.lr.schedule is not None:
                rates.append(group.lr.scale * group.lr.schedule(max(0, clock - 1)))
            else:
                lr = record.group["lr"]
                rates.append(float(lr) if group.lr.tensor_dtype is not None else group.lr.scale)
        return rates

    @property
    def lr_tensor(self) -> torch.Tensor:
        """The rates just used, float64 [n_groups], on the first parameter's device; for logging without a wait."""
        if self._devices.first is None:
            self._devices.engine(next(p.device for r in self._records for p in r.group["params"]))
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
        layouts = [arena.Layout.of(p, r.group) for r in self._records for p in r.group["params"] if p.requires_grad]
        elements = sum(layout.numel for layout in layouts)
        return sum(arena.bytes_of(layout) for layout in layouts) / elements if elements else 0.0

    def state_dict(self, *, portable: bool = False) -> dict[str, Any]:
        """State and options as tensors and primitives, loadable with `weights_only=True`.

        Args:
            portable: only what torch's AdamW knows, and the masters: for other optimizers and resharding.
        """
        return checkpoint.export(self, super().state_dict(), portable)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the state of this optimizer or of torch's Adam/AdamW, into the memory already in use.

        Options come from the checkpoint, except master, moments and the constructor's schedules.
        """
        checkpoint.load(self, state_dict)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "state" and not isinstance(value, states.StateMap):
            value = states.StateMap(value)
        if name == "step" and hasattr(value, "_wrapped_by_lr_sched"):
            scheduled = [r.group for r in self._records if "lr" in r.schedules]
            if scheduled:
                for group in scheduled:
                    group.pop("initial_lr", None)  # which the scheduler has just added
                raise RuntimeError(_SECOND_SCHEDULER)
        super().__setattr__(name, value)

    def __getstate__(self) -> dict[str, Any]:
        return {
            "defaults": self.defaults,
            "state": self.state,
            "param_groups": self.param_groups,
            "_options": self._options,
            "_schedules": [r.schedules for r in self._records],
            "_grad_divisor": self._grad_divisor,
            "_seed": self._seed,
            "_backend": self._devices.backend,
            "_clock": self.clock,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        state = dict(state)
        schedules = state.pop("_schedules", None)
        backend, clock = state.pop("_backend", "auto"), state.pop("_clock", 0)
        if schedules is not None:
            self._reset_runtime(backend, clock)
            for group, by_name in zip(state["param_groups"], schedules, strict=True):
                self._records.add(group, by_name)
        if "state" in state:
            state["state"] = states.StateMap(state["state"])
        super().__setstate__(state)

    def __repr__(self) -> str:
        lines = [f"{type(self).__name__} ("]
        for index, record in enumerate(self._records):
            lines.append(f"Parameter Group {index}: {len(record.group['params'])} tensors")
            shown = {k: v for k, v in record.group.items() if k not in ("params", "param_names")}
            for name, schedule in record.schedules.items():
                shown[f"{name} schedule"] = schedule
            lines.extend(f"    {key}: {shown[key]}" for key in sorted(shown))
        lines.append(f"grad_divisor: {self._grad_divisor}, backend: {self._devices.backend!r}")
        return "\n".join(lines) + "\n)"


_SECOND_SCHEDULER = (
    "this optimizer computes its own schedule (lr is a fused_sched Schedule), so a second scheduler that writes "
    "group['lr'] would multiply two schedules. Hand `opt.scheduler()` to whatever wants a scheduler, or pass a "
    "plain number as lr and keep the other scheduler"
)


def _refuse(unsupported: dict[str, Any], **planned: Any) -> None:
    for name in unsupported:
        if name in hyperparameters.TORCH_ONLY:
            raise TypeError(
                f"FusedScheduledAdam takes no {name!r} argument: {hyperparameters.TORCH_ONLY[name]}; remove it"
            )
        raise TypeError(f"FusedScheduledAdam got an unexpected keyword argument {name!r}")
    for name, value in planned.items():
        off, remedy = _NOT_BUILT[name]
        if value != off:
            raise NotImplementedError(f"{name}={value!r} is not built yet; {remedy}")
