"""Rates that come back: CosineAnnealingLR, CosineAnnealingWarmRestarts, CyclicLR."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass

from ...program import Clamp, Product, Repeat, Tree
from ..library import Failure
from ..nodes import falling, flat, geometric, half_cosine, line, phases
from .base import ELSE_TABULATE, TorchSchedule


@dataclass(frozen=True, repr=False)
class CosineAnnealingLR(TorchSchedule):
    """A cosine without an end: `f(t) = eta_min + (base_lr - eta_min) * (1 + cos(pi * t / T_max)) / 2`.

    T_max: updates from base_lr to eta_min; the rate rises again after it. eta_min: the lowest rate. base_lr: the
    group's rate. Raises TypeError or ValueError for what is not a finite number. T_max = 0 fails at the step to
    update 1.

    >>> import warnings
    >>> with warnings.catch_warnings():
    ...     warnings.simplefilter("ignore")  # of the rise
    ...     lr = CosineAnnealingLR(100, base_lr=0.1)
    >>> lr([0, 50, 100, 150, 200]).tolist()
    [0.1, 0.05, 0.0, 0.05, 0.1]

    Source: torch.optim.lr_scheduler.CosineAnnealingLR, torch 2.13.
    """

    T_max: int
    eta_min: float = 0.0
    _: KW_ONLY
    base_lr: float

    @property
    def repeats_epoch_zero(self) -> bool:
        return False

    def failure(self) -> Failure | None:
        return Failure(1, "ZeroDivisionError", "use T_max >= 1") if self.T_max == 0 else None

    def failure_restarted(self) -> Failure | None:
        return Failure(0, "ZeroDivisionError", "use T_max >= 1") if self.T_max == 0 else None

    def oddity(self) -> str | None:
        if self.T_max == 0 or self.base_lr == self.eta_min:
            return None
        return (
            f"the rate comes back to base_lr after update T_max={self.T_max!r}; train for T_max updates, or end with "
            "schedules.cosine, which stays at its end"
        )

    def lower_from(self, base_lr: float) -> Tree:
        """The schedule of another base rate."""
        return flat(base_lr) if self.T_max == 0 else half_cosine(base_lr, self.eta_min, abs(self.T_max))

    def lower(self) -> Tree:
        return self.lower_from(self.base_lr)


@dataclass(frozen=True, repr=False)
class CosineAnnealingWarmRestarts(TorchSchedule):
    """Cosines one after the other: `f(t) = eta_min + (base_lr - eta_min) * (1 + cos(pi * x / T_i)) / 2`.

    x: updates since the latest restart; T_i = T_0 * T_mult^i: length of cycle i. T_0: int above 0. T_mult: int, at
    least 1. eta_min: the lowest rate. base_lr: the group's rate. Raises ValueError otherwise, as torch does.

    >>> CosineAnnealingWarmRestarts(2, 2, base_lr=0.1)([0, 1, 2, 4, 6]).tolist()
    [0.1, 0.05, 0.1, 0.05, 0.1]

    Source: torch.optim.lr_scheduler.CosineAnnealingWarmRestarts, torch 2.13; Loshchilov and Hutter 2017, SGDR.
    """

    T_0: int
    T_mult: int = 1
    eta_min: float = 0.0
    _: KW_ONLY
    base_lr: float

    def check(self) -> None:
        for name in ("T_0", "T_mult"):
            value = getattr(self, name)
            if value < 1 or not isinstance(value, int):
                raise ValueError(f"{self.word}: {name} must be an integer of at least 1, got {value!r}")
        if not isinstance(self.eta_min, float | int):
            raise ValueError(f"{self.word}: eta_min must be a float or int, got {self.eta_min!r}; use float(...)")
        super().check()

    def lower(self) -> Tree:
        cycle = half_cosine(self.base_lr, self.eta_min, self.T_0)
        return Repeat(cycle, period=float(self.T_0), growth=float(self.T_mult))


@dataclass(frozen=True, repr=False)
class CyclicLR(TorchSchedule):
    """Triangles: `f(t) = base_lr + (max_lr - base_lr) * tri(t) * scale(t)`, and momentum the other way round.

    base_lr, max_lr: lower and upper rate. step_size_up, step_size_down: updates of tri from 0 to 1, and back to 0
        (None: as many). mode: scale is 1 for "triangular", 2^-cycle for "triangular2", gamma^t for "exp_range".
    scale_fn: must be None; a function of one's own is for schedules.from_callable. scale_mode: goes with it.
    cycle_momentum: `companions["beta1"](t) = max_momentum - (max_momentum - base_momentum) * tri(t) * scale(t)`.
    Raises ZeroDivisionError for step_size_up = 0 and ValueError for an unknown mode, as torch does; ValueError for a
    scale_fn or a step size below 0.

    >>> lr = CyclicLR(0.0, 0.5, step_size_up=2)
    >>> lr([0, 1, 2, 3, 4]).tolist(), lr.companions["beta1"]([0, 2]).tolist()
    ([0.0, 0.25, 0.5, 0.25, 0.0], [0.9, 0.8])

    Source: torch.optim.lr_scheduler.CyclicLR, torch 2.13; Smith 2017, Cyclical learning rates.
    """

    base_lr: float
    max_lr: float
    step_size_up: int = 2000
    step_size_down: int | None = None
    mode: str = "triangular"
    gamma: float = 1.0
    scale_fn: Callable[[float], float] | None = None
    scale_mode: str = "cycle"
    cycle_momentum: bool = True
    base_momentum: float = 0.8
    max_momentum: float = 0.9

    def check(self) -> None:
        super().check()
        if self.step_size_up == 0:
            raise ZeroDivisionError(f"{self.word}: step_size_up must be above 0, got 0; torch divides by it")
        if self.step_size_up < 0 or self._down < 0:
            raise ValueError(
                f"{self.word}: step sizes must not be negative, got {self.step_size_up!r} up and {self._down!r} down; "
                f"to run time backwards, {ELSE_TABULATE}"
            )
        if self.scale_fn is not None:
            raise ValueError(f"{self.word}: scale_fn must be None, got {self.scale_fn!r}; {ELSE_TABULATE}")
        if self.mode not in ("triangular", "triangular2", "exp_range"):
            raise ValueError(
                f"{self.word}: mode must be one of 'triangular', 'triangular2', 'exp_range', got {self.mode!r}"
            )

    @property
    def _down(self) -> float:
        return self.step_size_up if self.step_size_down is None else self.step_size_down

    def oddity(self) -> str | None:
        if self.mode != "exp_range" or -1.0 <= self.gamma <= 1.0:
            return None
        return f"the cycles grow by gamma={self.gamma!r} per update without end; use a gamma of at most 1"

    def lower(self) -> Tree:
        return Clamp(self._wave(), offset=self.base_lr, scale=self.max_lr - self.base_lr)

    def lower_companions(self) -> dict[str, Tree]:
        if not self.cycle_momentum:
            return {}
        return {"beta1": Clamp(self._wave(), offset=self.max_momentum, scale=self.base_momentum - self.max_momentum)}

    def _wave(self) -> Tree:
        """tri(t) * scale(t)."""
        up, down = float(self.step_size_up), float(self._down)
        triangle = line(0.0, 1.0, up)
        cycle = phases([triangle, falling(1.0, 0.0, down, origin=up)], [up]) if down else triangle
        wave = Repeat(cycle, period=up + down, gain=0.5 if self.mode == "triangular2" else 1.0)
        return Product((wave, geometric(1.0, self.gamma))) if self.mode == "exp_range" else wave
