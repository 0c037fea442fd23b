"""What a call of `step()` comes to: what has changed since the last one, and one update of what has gradients."""

from __future__ import annotations

import torch

from . import dtensors, packing
from .callers import called_for_allocation, refuse_partial_norm, refuse_swapped_state
from .devices import Call
from .offload import Offloading
from .scheduler import refuse_engines_scheduler, refuse_second_scheduler
from .steady import SteadyCall


class Updates(Offloading):
    """The part of `FusedScheduledAdam` that updates parameters."""

    # Never traced. The private decorator is torch.optim's own; the public one imports the compiler with this module.
    @torch._disable_dynamo  # type: ignore[attr-defined]
    def _step(self) -> None:
        found_inf, grad_scale = getattr(self, "found_inf", None), getattr(self, "grad_scale", None)
        is_settled = self._is_settled()
        options = None if is_settled else self._records.options
        steady = self._devices.steady_call(self.state, self.param_groups, options)
        if steady is not None:  # without no_grad(), which takes 2 to 4 us: nothing in it is differentiable for torch
            try:
                self._apply(steady.call, found_inf, grad_scale, steady=steady, is_settled=is_settled)
            finally:
                steady.release()
            return
        with torch.no_grad():
            self._apply(self._collect(), found_inf, grad_scale)

    def _is_settled(self) -> bool:
        """Whether the options and limits are still those of the latest step."""
        limits = self._max_grad_norm, self._skip_nonfinite, self._grad_divisor
        return limits == self._devices.norm_settings and self._records.stand_for(self._applied_settings)

    def _apply(
        self,
        call: Call,
        found_inf: torch.Tensor | None,
        grad_scale: torch.Tensor | None,
        *,
        tick: bool | None = None,
        steady: SteadyCall | None = None,
        is_settled: bool = False,
    ) -> None:
        """Update what the call names. tick: whether it begins a new update, where the caller knows; steady: the call is
        the last one again; is_settled: with its options and limits."""
        if steady is None:
            self._ticks.observe(self.param_groups)
        if not call.owners:
            return
        self._refuse_offloaded("step()")
        packing.check_scaler_value("found_inf", found_inf)
        packing.check_scaler_value("grad_scale", grad_scale)
        if found_inf is not None or grad_scale is not None:
            self._devices.refuse_host_values((("found_inf", found_inf), ("grad_scale", grad_scale)))
        if not is_settled:  # settled rates are no tensors
            self._devices.refuse_host_values(self._records.lr_tensors())
        if steady is None or not is_settled or steady.reducer != self.norm_reduce_hook:
            steady = self._settle(call, steady)
            if steady is None:
                return
        tick = self._ticks.should_tick(steady.ids) if tick is None else tick
        packing.bump_versions(call.owners)  # before the update, while what the pass has read is still in the caches
        self._devices.step(tick, found_inf, grad_scale, steady.reducer)
        self._ticks.record(steady.ids, tick)
        if self._applied_settings is not steady.settings:  # setting attributes of an optimizer takes a while
            self._applied_settings, self._resumed, self._clock_is_known = steady.settings, False, True

    def _settle(self, call: Call, steady: SteadyCall | None) -> SteadyCall | None:
        """Bring memory, options, limits and clock to where the call needs them; None: only memory was asked for."""
        options = self._records.options
        reusable = steady is not None or self._devices.rebind(self.state, call, options)
        if not reusable and not all(map(self.state.has_state, call.owners)):
            refuse_swapped_state()
            if called_for_allocation():
                self._devices.allocate(self.state, call, options)
                return None
        if self._foreign_counts():
            self._records.forget_foreign_rates()
        refuse_second_scheduler(self._records)
        norm_settings = self._norm_settings()
        reducer = self.norm_reduce_hook
        if norm_settings.wanted:
            if reducer is None and steady is None:
                reducer = dtensors.norm_reducer(call.owners)
            if not self._applied_settings or norm_settings != self._devices.norm_settings:
                refuse_partial_norm(call.owners, is_reduced=reducer is not None)
        if not self._applied_settings:
            refuse_engines_scheduler(self)
        settings = self._records.settings(self._grad_divisor)
        restored_clock = self._restored_clock()
        if not reusable:
            self._devices.lay_out(self.state, call, options)
        if steady is None:
            steady = self._devices.watch(self.state, call, self.param_groups)
        if restored_clock is not None:
            self.set_clock(restored_clock)
        self._push(settings)
        steady.settings, steady.reducer = settings, reducer
        return steady
