"""`FusedScheduledAdam`: torch's optimizer interface over engines that compute rate and update on the device."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

from . import checkpoint, compiled, hyperparameters, packing, precision
from ._warnings import each_said_once
from .backward import BackwardSteps
from .base import NO_CLOCK
from .hooks import profile_hook_step
from .hyperparameters import SCHEDULABLE
from .machine import check_metric
from .scheduler import SECOND_SCHEDULER
from .schedules import Schedule


class FusedScheduledAdam(BackwardSteps):
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
        master: where the exact value of a 16-bit parameter is kept. "fp32"; "split16": the low half of an exact fp32
            master beside a bfloat16 parameter; "split8": 8 of its bits; "stochastic": nowhere, the parameter is rounded
            without bias; "none": nowhere, to nearest. "auto" is "split16" for bfloat16, "fp32" for float16, which
            has no others but "none". Ignored by float32 and float64 parameters. Per group.
        moments: storage of the moments: "fp32", "bf16", or "8bit" (codes, and a scale per 16 elements). float64
            parameters have float64 ones. Per group.
        max_grad_norm: all gradients are multiplied by min(1, max_grad_norm / (norm + 1e-6)) inside the update, where
            norm is that of all of them together, after unscaling, as torch.nn.utils.clip_grad_norm_ does: an infinite
            norm makes finite gradients 0 and infinite ones NaN, a NaN makes all NaN, unless the step is skipped.
        grad_divisor: gradients are divided by it inside the update (micro-batches accumulated by summing).
        skip_nonfinite: a step whose gradients are not all finite changes nothing, clock and step counts included.
        seed: of stochastic rounding; not saved in checkpoints. Its lower 64 bits count.
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

    #: GradScaler then hands over `grad_scale` and `found_inf` instead of waiting for the device.
    _step_supports_amp_scaling = True

    #: What torch wraps `step()` with.
    profile_hook_step = staticmethod(profile_hook_step)  # type: ignore[assignment]

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
        hyperparameters.check_keywords(unsupported)
        self._grad_divisor = hyperparameters.check_grad_divisor(grad_divisor)
        self.max_grad_norm = max_grad_norm
        self.skip_nonfinite = skip_nonfinite
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
        with each_said_once():  # by the defaults and by every group that has them
            hyperparameters.split_options(defaults)
            hyperparameters.check_options(defaults)
            super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; its options may be Schedules and default to the constructor's.

        Raises ValueError or TypeError for options or parameters that the constructor would refuse.

        Example:
            >>> import torch
            >>> from fused_sched import FusedScheduledAdam, schedules
            >>> p = torch.zeros(256, requires_grad=True)
            >>> opt = FusedScheduledAdam([p], lr=schedules.linear(1.0, 0.0, 100))
            >>> opt.add_param_group({"params": [torch.zeros(8, requires_grad=True)], "lr": 0.25})
            >>> opt.last_lr()
            [1.0, 0.25]
        """
        options = {**self._options, **param_group, "clock": NO_CLOCK}
        schedules = hyperparameters.split_options(options)
        hyperparameters.check_options(options)
        params = options["params"]
        if not isinstance(params, set):  # which super() refuses
            params = options["params"] = [params] if isinstance(params, torch.Tensor) else list(params)
            tensors = [item[1] if isinstance(item, tuple) else item for item in params]
            for tensor in tensors:
                if isinstance(tensor, torch.Tensor):
                    packing.check_param(tensor)
                    precision.resolve_master(options["master"], tensor.dtype)
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

        The gradient is `p.grad`, else `p.main_grad`, of any dtype; `zero_grad()` leaves the latter alone.
        Without any gradient it does nothing, and the clock stays.

        In a CUDA graph, captured after a step with the same tensors, every replay is a step: it reads clock, schedules,
        options, limit and state where they are on the device, which `set_schedule()`, `set_clock()`,
        `load_state_dict()` and `push_hyperparameters()` write in place. It goes on with the addresses it was captured
        with: capture anew after gradients or parameters moved, or parameters were added.

        Raises TypeError, ValueError or RuntimeError, before anything has changed, if a gradient, a parameter or an
        option is unusable.

        Example:
            >>> import torch
            >>> from fused_sched import FusedScheduledAdam, schedules
            >>> p = torch.zeros(256, requires_grad=True)
            >>> opt = FusedScheduledAdam([p], lr=schedules.linear(1.0, 0.0, 100))
            >>> p.grad = torch.ones(256)
            >>> opt.step()
            >>> opt.clock, p[0].item()
            (1, -1.0)

        Within `torch.compile` it is one operator: no graph break, no recompilation while the same parameters have
        gradients, whatever rates, limits and schedules do (one when a profiler starts). DTensors and closures that call
        backward() break the graph. The optimizer's own tensors are read after the compiled function.

            >>> compiled_step = torch.compile(opt.step, fullgraph=True, backend="eager")
            >>> compiled_step()
            >>> opt.clock, round(p[0].item(), 4)
            (2, -1.99)
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if not torch.compiler.is_compiling() or not compiled.trace_step(self):
            self._step()
        return loss

    # -- hyperparameters -----------------------------------------------------------------------------------

    def set_schedule(self, schedule: Schedule | float, group: int | None = None, hyperparameter: str = "lr") -> None:
        """Drive a hyperparameter by another schedule, or by a number; the clock goes on.

        Args:
            schedule: the new Schedule, or a number, which ends scheduling.
            group: index of the group; None: all of them.
            hyperparameter: "lr", "beta1", "beta2" or "weight_decay".

        A rate's companions (`schedule.companions`: the momentum of a one-cycle policy, for instance) are set with it,
        and stay until they are set themselves. A factor applied to `group["lr"]` stays when one schedule follows
        another; one that follows metrics starts over. Raises IndexError, ValueError or TypeError before anything
        changes.

        Example:
            >>> import torch
            >>> from fused_sched import FusedScheduledAdam, schedules
            >>> p = torch.zeros(256, requires_grad=True)
            >>> opt = FusedScheduledAdam([p], lr=schedules.linear(1.0, 0.0, 100))
            >>> opt.set_schedule(schedules.constant(0.5))
            >>> opt.last_lr()
            [0.5]
        """
        if hyperparameter not in SCHEDULABLE:
            raise ValueError(f"hyperparameter must be one of {', '.join(SCHEDULABLE)}, got {hyperparameter!r}")
        records = self._records.of(self.param_groups)
        if group is not None and not -len(records) <= group < len(records):
            raise IndexError(f"group must be an index below {len(records)}, got {group!r}")
        new = {hyperparameter: schedule}
        if isinstance(schedule, Schedule):
            if hyperparameter == "lr":
                new |= schedule.companions
            for name, value in new.items():
                assert isinstance(value, Schedule)
                hyperparameters.check_schedule(name, value)
            if hyperparameter == "lr" and hasattr(self.step, "_wrapped_by_lr_sched"):
                raise RuntimeError(SECOND_SCHEDULER)
        self._records.settings(self._grad_divisor)
        records = records if group is None else [records[group]]
        changes = [hyperparameters.replaced(r.group, r.schedules, new) for r in records]
        for record, (options, schedules) in zip(records, changes, strict=True):
            if hyperparameter == "lr":
                record.group.pop("initial_lr", None)  # of a scheduler whose checkpoint was loaded
            record.group.update(options)
            record.schedules = schedules
            if hyperparameter == "lr":
                record.start_machine()
        self.push_hyperparameters()

    @torch._disable_dynamo  # type: ignore[attr-defined]
    @torch.no_grad()
    def report_metric(self, metric: torch.Tensor | float) -> None:
        """Report a metric to the rates that follow it (ReduceLROnPlateau, GreedyLR), without waiting for the device.

        Args:
            metric: of the updates so far, a tensor of one element or a number; every process reports the same one.

        Each report moves such a rate on by one, whether steps were applied or skipped since the last: report once per
        evaluation, or update, of which the schedule counts its patience. The next update uses the new rate. In the
        capture of a CUDA graph the metric must be a tensor on the parameters' device, which every replay reads.

        Raises TypeError or ValueError for what is no scalar, RuntimeError if no group's rate follows metrics.

        Example:
            >>> import torch
            >>> from fused_sched import FusedScheduledAdam, schedules
            >>> p = torch.zeros(256, requires_grad=True)
            >>> lr = schedules.torch.ReduceLROnPlateau(factor=0.5, patience=0, base_lr=0.1)
            >>> opt = FusedScheduledAdam([p], lr=lr)
            >>> for loss in (torch.tensor(1.0), torch.tensor(2.0)):
            ...     opt.report_metric(loss)
            >>> opt.last_lr()
            [0.05]
        """
        check_metric(metric)
        settings = self._records.settings(self._grad_divisor)
        if not any(group.lr.machine for group in settings):
            raise RuntimeError(
                "report_metric() moves rates that follow metrics, and no group has one; pass a schedule such as "
                "lr=schedules.torch.ReduceLROnPlateau(base_lr=...)"
            )
        self._first_engine()
        self._push(settings)
        self._devices.report(metric)

    # -- state ---------------------------------------------------------------------------------------------

    def state_dict(self, *, portable: bool = False) -> dict[str, Any]:
        """State and options as tensors and primitives, loadable with `weights_only=True`.

        Args:
            portable: only what torch's AdamW knows, and the masters: for other optimizers and resharding.

        Raises RuntimeError if there is state of a parameter that no group holds.

        Example:
            >>> import torch
            >>> from fused_sched import FusedScheduledAdam, schedules
            >>> p = torch.zeros(256, requires_grad=True)
            >>> opt = FusedScheduledAdam([p], lr=schedules.linear(1.0, 0.0, 100))
            >>> opt.state_dict()["param_groups"][0]["clock"]
            0
        """
        for pre_hook in self._optimizer_state_dict_pre_hooks.values():
            pre_hook(self)
        exported = checkpoint.export(self, portable)
        for post_hook in self._optimizer_state_dict_post_hooks.values():
            exported = post_hook(self, exported) or exported
        return exported

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the state of this optimizer or of torch's Adam/AdamW, into the memory already in use.

        Options come from the checkpoint, except master, moments and the constructor's schedules. State of these formats
        is taken over bit for bit, of others converted: moments rounded to nearest; masters exactly, or for "split8" to
        16 significant bits, beside the values that the parameters hold by then: load the model first. Raises ValueError
        or TypeError, before anything has changed, for a checkpoint of other groups, parameters or shapes; warns
        (ScheduleWarning) if it was trained with another schedule.

        Example:
            >>> import torch
            >>> from fused_sched import FusedScheduledAdam, schedules
            >>> p = torch.zeros(256, requires_grad=True)
            >>> opt = FusedScheduledAdam([p], lr=schedules.linear(1.0, 0.0, 100))
            >>> opt.load_state_dict(torch.optim.AdamW([p], lr=0.1).state_dict())
            >>> opt.last_lr()  # the schedule wins
            [1.0]
        """
        checkpoint.load(self, state_dict)
