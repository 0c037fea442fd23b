"""The state of a metric-driven rate on the devices that use it."""

from __future__ import annotations

from numbers import Real

import torch

from .metric_rule import MetricRule
from .schedules.metric import MetricSchedule


class Machine:
    """One group's metric-driven rate: its rule, and a copy of its state on each device that updates the group.

    All copies receive the same reports, hence are equal. The rate is the first element of a copy, where the clock
    reads it; a copy stays where it is, so that a captured graph follows.
    """

    def __init__(self, schedule: MetricSchedule) -> None:
        self.rule: MetricRule = schedule.rule
        self._initial = torch.tensor(schedule.initial_state(), dtype=torch.float64)
        self._current = self._initial.clone()  # one of the copies, or what the first of them starts as
        self._copies: dict[torch.device, torch.Tensor] = {}

    def on(self, device: torch.device) -> torch.Tensor:
        """The copy on a device, float64 [length of the state]; made when first asked for."""
        copy = self._copies.get(device)
        if copy is None:
            # MPS has no float64; its reference engine computes scalars on the host.
            copy = self._current.to("cpu" if device.type == "mps" else device, copy=True)
            self._current = self._copies[device] = copy
        return copy

    def forget(self, device: torch.device) -> None:
        """The device receives no further reports."""
        if self._copies.pop(device, None) is self._current and self._copies:
            self._current = next(iter(self._copies.values()))

    def rate(self) -> float:
        """The rate of the next update; waits for the device."""
        return float(self._current[0].item())

    def export(self) -> torch.Tensor:
        """The state on the host; waits for the device."""
        return self._current.to("cpu", copy=True)

    def restore(self, state: object) -> bool:
        """Go on from an exported state, or start afresh for None; False, and nothing changed, for another rule's."""
        if state is None:
            state = self._initial
        if not isinstance(state, torch.Tensor) or state.ndim != 1 or not self.rule.accepts(state.tolist()):
            return False
        for copy in (self._current, *self._copies.values()):
            copy.copy_(state)
        return True


def check_metric(metric: object) -> None:
    """Raise unless this is one real number, on any device."""
    if isinstance(metric, torch.Tensor):
        if metric.numel() != 1 or metric.is_complex():
            raise ValueError(
                f"a metric must be one real number, got shape {tuple(metric.shape)} of {metric.dtype}; reduce it, "
                "as in losses.mean()"
            )
    elif isinstance(metric, bool) or not isinstance(metric, Real):
        raise TypeError(
            f"a metric must be a tensor of one element or a number, got {metric!r} of type {type(metric).__name__}"
        )
