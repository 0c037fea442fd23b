"""The tail of a step as the user sees it: clipping, checking, the norm, the flight recorder."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from typing import Literal, overload

import torch
from torch.optim import Optimizer

from . import hyperparameters
from .devices import Devices
from .engine import Engine, is_capturing
from .groups import GroupTable
from .history import History
from .norm import NormSettings


class StepTail(Optimizer):
    """The part of `FusedScheduledAdam` about what happens to gradients before they are used, and what is kept of it."""

    _devices: Devices
    _records: GroupTable
    _grad_divisor: float
    _max_grad_norm: float | None
    _skip_nonfinite: bool

    #: Called within a step that knows the norm, with the sum of squares of this process's gradients (as they are,
    #: before unscaling), a 0-d float64 tensor on their device; it replaces that in place by the sum over all processes,
    #: without waiting: `opt.norm_reduce_hook = torch.distributed.all_reduce`. Costs one more launch; every process must
    #: step equally often. A norm beyond 1e154 then counts as infinite. Not pickled or copied.
    norm_reduce_hook: Callable[[torch.Tensor], object] | None = None

    def _first_engine(self) -> Engine:
        raise NotImplementedError

    def _norm_settings(self) -> NormSettings:
        return NormSettings(self._max_grad_norm, self._skip_nonfinite, self._grad_divisor)

    @property
    def max_grad_norm(self) -> float | None:
        """The limit of the gradients' norm; None: gradients are not clipped. Infinite: the norm is measured alone.

        May be set at any time. A CUDA graph captured with a limit follows after `push_hyperparameters()`, also to None;
        one captured without has no norm in it and cannot.

        Raises ValueError or TypeError, when set, for what is not a positive number or None.

        Example:
            >>> import torch
            >>> from fused_sched import FusedScheduledAdam
            >>> opt = FusedScheduledAdam([torch.zeros(2, requires_grad=True)], max_grad_norm=1.0)
            >>> opt.max_grad_norm = 0.5
            >>> opt.max_grad_norm
            0.5
        """
        return self._max_grad_norm

    @max_grad_norm.setter
    def max_grad_norm(self, value: float | None) -> None:
        self._max_grad_norm = hyperparameters.check_max_grad_norm(value)

    @property
    def skip_nonfinite(self) -> bool:
        """Whether a step whose gradients are not all finite changes nothing. May be set, as `max_grad_norm` may.

        Example:
            >>> import torch
            >>> from fused_sched import FusedScheduledAdam
            >>> FusedScheduledAdam([torch.zeros(2, requires_grad=True)]).skip_nonfinite
            False
        """
        return self._skip_nonfinite

    @skip_nonfinite.setter
    def skip_nonfinite(self, value: bool) -> None:
        hyperparameters.check_flag("skip_nonfinite", value)
        self._skip_nonfinite = bool(value)

    @property
    def grad_norm(self) -> torch.Tensor:
        r"""The norm of all gradients in the latest step, 0-d float64 on the first parameter's device; NaN before.

        .. math:: \sqrt{\sum_i g_i^2} \,/\, (\text{grad_scale} \cdot \text{grad_divisor})

        before clipping, also of a skipped step. The next step overwrites it: clone what is to be kept. Infinite or NaN
        exactly when a gradient is, or when the norm of float64 gradients is beyond their range.

        Raises RuntimeError where no norm is computed.

        Example:
            >>> import torch
            >>> from fused_sched import FusedScheduledAdam
            >>> p = torch.zeros(2, requires_grad=True)
            >>> opt = FusedScheduledAdam([p], max_grad_norm=1.0)
            >>> p.grad = torch.tensor([3.0, 4.0])
            >>> opt.step()
            >>> opt.grad_norm
            tensor(5., dtype=torch.float64)
        """
        if not self._norm_settings().wanted:
            raise RuntimeError(
                "no norm is computed, because max_grad_norm is None and skip_nonfinite is False; pass "
                "max_grad_norm=float('inf') to measure without clipping"
            )
        return self._first_engine().grad_norm

    @overload
    def history(self, *, asynchronous: Literal[False] = False) -> History: ...
    @overload
    def history(self, *, asynchronous: Literal[True]) -> Future[History]: ...
    def history(self, *, asynchronous: bool = False) -> History | Future[History]:
        """What the latest 4,096 steps used, oldest first, skipped ones included: a NumPy structured array.

        Args:
            asynchronous: return a `concurrent.futures.Future` of it instead of waiting for the device.

        ============== ================== =================================================================
        field          type               of a step
        ============== ================== =================================================================
        `clock`        int64              updates applied when it was over
        `lr`           float64 [n_groups] rate of each group, in the order in which they were added
        `weight_decay` float64 [n_groups] the same
        `grad_norm`    float64            norm of the gradients before clipping; NaN where it was not computed
        `clip`         float64            factor that clipped them; 1: none
        `skipped`      bool               nothing was changed; then `lr`, `weight_decay` and `clip` are NaN
        ============== ================== =================================================================

        The step writes it on the device, in replays of a CUDA graph as well: 4096 * (32 + 16 * n_groups) bytes, from
        the first step on. Calls that an engine makes for parts of one update share a row. Loading a checkpoint and
        setting the clock keep it; pickling and copying the optimizer do not take it along.
        `fused_sched.plot.history` draws it.

        Raises RuntimeError while a CUDA graph is captured.

        Example:
            >>> import torch
            >>> from fused_sched import FusedScheduledAdam, schedules
            >>> p = torch.zeros(2, requires_grad=True)
            >>> opt = FusedScheduledAdam([p], lr=schedules.linear(1.0, 0.0, 4), max_grad_norm=1.0, skip_nonfinite=True)
            >>> for scale in (1.0, float("nan"), 2.0):
            ...     p.grad = torch.tensor([0.0, 1.0]) * scale
            ...     opt.step()
            >>> opt.history()[["clock", "grad_norm", "skipped"]].tolist()
            [(1, 1.0, False), (1, nan, True), (2, 2.0, False)]
            >>> opt.history()["lr"][:, 0].tolist()
            [1.0, nan, 0.75]
        """
        if any(map(is_capturing, self._devices.engines)):
            raise RuntimeError(
                "history() reads back from the device, which the capture of a CUDA graph does not allow; call it after "
                "the capture"
            )
        recorder, num_groups = self._devices.recorder, len(self._records)
        return recorder.read_asynchronously(num_groups) if asynchronous else recorder.read(num_groups)
