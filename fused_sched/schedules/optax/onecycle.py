"""One-cycle schedules: interpolations of two or three pieces that begin at whole steps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ...program import Tree
from .base import OptaxSchedule
from .piecewise import as_scales, interpolated


class OneCycle(OptaxSchedule, abstract=True):
    """From peak_value / div_factor up to peak_value, and down."""

    interpolate_type: str
    transition_steps: int
    peak_value: float
    pct_start: float
    div_factor: float
    final_div_factor: float

    def scales(self) -> Mapping[float, float]:
        """optax's scales by boundary; of equal boundaries the later wins."""
        raise NotImplementedError

    def check(self) -> None:
        super().check()
        if self.transition_steps <= 0:
            raise ValueError(
                f"{self.word}: transition_steps must be more than 0, got {self.transition_steps}; it is the length of "
                "the cycle"
            )
        for name in ("div_factor", "final_div_factor"):
            if getattr(self, name) == 0:
                raise ZeroDivisionError(f"{self.word}: {name} divides, got 0; use 1.0 for no difference")
        as_scales(self.word, self.scales())

    def oddity(self) -> str | None:
        scales = self.scales()
        peak = int(self.pct_start * self.transition_steps)
        if scales.get(peak) != self.div_factor:
            return (
                f"pct_start={self.pct_start} puts the peak at step {peak}, where another phase ends: the rate never "
                f"reaches peak_value={self.peak_value}; use a smaller pct_start"
            )
        if peak <= 0:
            return (
                f"pct_start={self.pct_start} of transition_steps={self.transition_steps} is step {peak}: the rate "
                "starts at its peak; use a larger pct_start"
            )
        if list(scales) != sorted(scales):
            return f"its phases end at {list(scales)}, which is out of order: they are swapped; let them increase"
        return None

    def lower(self) -> Tree:
        scales = as_scales(self.word, self.scales()) or ()
        return interpolated(self.interpolate_type, self.peak_value / self.div_factor, scales, self.word)


@dataclass(frozen=True, repr=False)
class linear_onecycle_schedule(OneCycle):
    """Lines up to peak_value, down to where they began, and further down.

    `peak_value / div_factor` at t = 0, `peak_value` at int(pct_start * T), `peak_value / div_factor` at
    int(pct_final * T), and that over final_div_factor from T on.

    transition_steps: T, in updates, more than 0. peak_value: largest rate. pct_start, pct_final: parts of T.
    div_factor: of the peak to the first rate. final_div_factor: of the first rate to the last.
    Raises ValueError for T <= 0 or a negative factor, ZeroDivisionError for a factor of 0, TypeError or ValueError for
    anything but finite numbers. Warns where the peak comes at once or never: two phases that end at the same
    step are one in optax.

    >>> s = linear_onecycle_schedule(20, 1.0, pct_start=0.25, pct_final=0.75, div_factor=4.0, final_div_factor=2.0)
    >>> s([0, 5, 10, 15, 20, 99]).tolist()
    [0.25, 1.0, 0.625, 0.25, 0.125, 0.125]

    Source: optax 0.2.8.
    """

    interpolate_type = "linear"

    transition_steps: int
    peak_value: float
    pct_start: float = 0.3
    pct_final: float = 0.85
    div_factor: float = 25.0
    final_div_factor: float = 1e4

    def scales(self) -> Mapping[float, float]:
        return {
            int(self.pct_start * self.transition_steps): self.div_factor,
            int(self.pct_final * self.transition_steps): 1.0 / self.div_factor,
            self.transition_steps: 1.0 / self.final_div_factor,
        }


@dataclass(frozen=True, repr=False)
class cosine_onecycle_schedule(OneCycle):
    """Half cosines up to peak_value, and down.

    `peak_value / div_factor` at t = 0, `peak_value` at int(pct_start * T), and `peak_value / (div_factor *
    final_div_factor)` from T on.

    transition_steps: T, in updates, more than 0. peak_value: largest rate. pct_start: part of T.
    div_factor: of the peak to the first rate. final_div_factor: of the first rate to the last.
    Raises ValueError for T <= 0 or a negative factor, ZeroDivisionError for a factor of 0, TypeError or ValueError for
    anything but finite numbers. Warns where the peak comes at once or never: two phases that end at the same step are
    one in optax.

    >>> s = cosine_onecycle_schedule(20, 1.0, pct_start=0.5, div_factor=4.0, final_div_factor=2.0)
    >>> s([0, 5, 10, 15, 20, 99]).tolist()
    [0.25, 0.625, 1.0, 0.5625, 0.125, 0.125]

    Source: optax 0.2.8.
    """

    interpolate_type = "cosine"

    transition_steps: int
    peak_value: float
    pct_start: float = 0.3
    div_factor: float = 25.0
    final_div_factor: float = 1e4

    def scales(self) -> Mapping[float, float]:
        return {
            int(self.pct_start * self.transition_steps): self.div_factor,
            int(self.transition_steps): 1.0 / (self.div_factor * self.final_div_factor),
        }
