"""timm's schedules that restart: cosine, hyperbolic tangent, polynomial."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import KW_ONLY, dataclass, replace
from math import ceil, floor

from ...program import Curve, Repeat, Sum, Tree, evaluate_at, pack
from ..base import set_fields
from ..nodes import flat, phases
from .base import TimmSchedule, exceeds_decimal, floor_divisor

#: Of a repeat whose cycles grow or shrink: kMaxCycles in csrc/core/program.h.
_MAX_CYCLES = 4096

#: A training that goes on for longer has no end.
_ENDLESS = 2.0**53

#: Cycles are this much shorter where cycle_mul is a decimal that was rounded up, by which 100 * 1.1 is more than 110: a
#: restart that is meant to come at a whole step must not come at the next.
_SNUG = 1.0 - 2.0**-50


class _CycleSchedule(TimmSchedule, abstract=True):
    """`lr_min + (base_lr * cycle_decay^c - lr_min) * s(u)` in cycle c, u = 0..1 being the position in it."""

    t_initial: int
    lr_min: float
    cycle_mul: float
    cycle_decay: float
    cycle_limit: int

    @abstractmethod
    def shape(self) -> Curve:
        """From 1 to 0 in t_initial steps: the first cycle."""

    def shape_failing(self) -> tuple[int, str] | None:
        """The first t at which the shape itself cannot be computed, and why."""
        return None

    def check_arguments(self) -> None:
        self.make_plain("t_initial", "lr_min", "cycle_mul", "cycle_decay", "cycle_limit")
        set_fields(self, cycle_limit=ceil(self.cycle_limit))
        self.require(self.t_initial > 0, "t_initial must be more than 0", "t_initial", "pass the length of a cycle")
        self.require(self.lr_min >= 0.0, "lr_min must be at least 0", "lr_min", "pass the lowest rate")
        if self.cycle_mul > 0.0 and self.cycle_mul != 1.0 and self.cycle_limit > _MAX_CYCLES:
            self._check_number_of_cycles()

    def _check_number_of_cycles(self) -> None:
        _, end = self._extent()
        failing = self.failing()  # a step late where timm rounds a whole sum of lengths
        if end is not None and (failing is None or failing[0] - self.decay_begin > ceil(end) + 1):
            raise ValueError(
                f"{self.word}: cycle_limit must be at most {_MAX_CYCLES} with cycle_mul={self.cycle_mul!r}, got "
                f"{self.cycle_limit}; tabulate the rates with from_callable(function, num_steps)"
            )

    def failing(self) -> tuple[int, str] | None:
        first = self.first_call
        if self.cycle_mul <= 0.0:
            return first, f"cycle_mul={self.cycle_mul!r} has no logarithm"
        if self.cycle_mul < 1.0:
            all_cycles = self.t_initial / (1.0 - self.cycle_mul)
            step = max(first, floor(self.decay_begin + all_cycles) - 1)
            while self.logarithm_exists(step):
                step += 1
            shape_failing = self.shape_failing()
            if shape_failing is None or step < shape_failing[0]:
                return step, f"with cycle_mul={self.cycle_mul!r} all cycles together last {all_cycles:g} {self.unit}s"
        return self.shape_failing()

    def logarithm_exists(self, t: float) -> bool:
        """Of what timm takes the number of the cycle from."""
        return 1 - (t - self.decay_begin) / self.t_initial * (1 - self.cycle_mul) > 0

    def negative_decay(self) -> str | None:
        if self.cycle_decay < 0.0 and self.cycle_limit > 1:
            return f"with cycle_decay={self.cycle_decay!r} every other cycle is negative; pass 0.0 or more"
        return None

    def odd_decay(self) -> str | None:
        if self.cycle_limit <= 0:
            return f"cycle_limit={self.cycle_limit!r} leaves no cycle, only lr_min; pass 1 or more"
        if self.t_initial == 1 and self.cycle_mul == 1.0:
            return f"t_initial=1 makes a cycle of its first value alone; pass the number of {self.unit}s to decay over"
        lowest_peak = self.base_lr * (self.cycle_decay ** (self.cycle_limit - 1) if self.cycle_decay < 1.0 else 1.0)
        if lowest_peak < self.lr_min:
            return f"a cycle begins at {lowest_peak:g}, below lr_min={self.lr_min!r}, and rises; lower lr_min"
        return None

    def decay(self) -> Tree:
        if self.cycle_limit <= 0:
            return flat(self.lr_min)
        if self.cycle_mul <= 0.0:
            return flat(self.base_lr)  # until timm fails, at its first step
        times, end = self._extent()
        cycles = self._cycles(float(times))
        return cycles if end is None else phases((cycles, flat(self.lr_min)), (end,))

    def _cycles(self, times: float) -> Tree:
        shape, low, top = self.shape(), self.lr_min, self.base_lr
        knobs = {"period": self._period(), "growth": self.cycle_mul, "times": times}
        if times == 1.0:
            return replace(shape, offset=low, scale=top - low)
        if self.cycle_decay == 1.0:
            return Repeat(replace(shape, offset=low, scale=top - low), **knobs)
        peaks = Repeat(replace(shape, scale=top), gain=self.cycle_decay, **knobs)
        if low == 0.0:
            return peaks
        # The peaks fall, the floor does not: low * (1 - s) has cycles of its own.
        return Sum((peaks, Repeat(replace(shape, offset=low, scale=-low), **knobs)))

    def _period(self) -> float:
        """Of the first cycle, so that restarts at whole steps are found by rounded arithmetic."""
        if self.cycle_mul == 1.0:
            return floor_divisor(self.t_initial)
        return self.t_initial * _SNUG if exceeds_decimal(self.cycle_mul) else float(self.t_initial)

    def _extent(self) -> tuple[int, float | None]:
        """The number of cycles to count, and when the last one ends."""
        if self.cycle_mul == 1.0:
            end = self.cycle_limit * self._period()
            return self.cycle_limit, end if end < _ENDLESS else None
        times, end = 0, 0.0
        for times, end in enumerate(self._ends(), 1):
            if end >= _ENDLESS:
                return times, None
        return times, end

    def _ends(self) -> Iterator[float]:
        """When each cycle ends, on the decay's clock."""
        end, length = 0.0, self._period()
        for _ in range(min(self.cycle_limit, _MAX_CYCLES)):
            end += length
            length *= self.cycle_mul
            yield end

    def first_restart(self) -> int | None:
        """The first t, of those that timm's formula is asked for, that begins a cycle."""
        starts = (0.0, *self._ends())[: max(0, self.cycle_limit)]
        steps = (start + self.decay_begin for start in starts)
        return next((int(step) for step in steps if step >= self.first_call and step == floor(step)), None)


@dataclass(frozen=True, repr=False)
class CosineLRScheduler(_CycleSchedule):
    """timm's cosine: `f = lr_min + (base_lr * cycle_decay^c - lr_min) * (1 + cos(pi * u^k_decay)) / 2`.

    Cycle c lasts t_initial * cycle_mul^c and u = 0..1 is the position in it; after cycle_limit cycles f = lr_min.

    t_initial: length of the first cycle, more than 0. lr_min: lowest rate, at least 0. cycle_mul, cycle_decay:
    factors of length and peak from one cycle to the next. cycle_limit: number of cycles. k_decay: exponent of the
    position, for a later (above 1) or earlier descent. The others and the errors: `fused_sched.schedules.timm`.
    Restarts come at the step that cycle_mul says. timm takes the cycle from a rounded logarithm, by which some that are
    due at a whole t come one later: with t_initial=5 and cycle_mul=3.0 that at 605. ValueError for more than 4096
    cycles whose length changes by less than a percent; AssertionError for t_initial <= 0 or lr_min < 0.

    >>> timm.CosineLRScheduler(20, lr_min=0.25, t_in_epochs=False, base_lr=1.25)([0, 5, 10, 20]).round(4).tolist()
    [1.25, 1.1036, 0.75, 0.25]
    >>> timm.CosineLRScheduler(20, warmup_t=2, warmup_prefix=True, base_lr=1.0, updates_per_epoch=100)([99, 100, 200])
    array([0. , 0.5, 1. ])

    Source: timm 1.0.31, scheduler/cosine_lr.py.
    """

    t_initial: int
    lr_min: float = 0.0
    cycle_mul: float = 1.0
    cycle_decay: float = 1.0
    cycle_limit: int = 1
    warmup_t: int = 0
    warmup_lr_init: float = 0.0
    warmup_prefix: bool = False
    t_in_epochs: bool = True
    noise_range_t: None = None
    noise_pct: float = 0.67
    noise_std: float = 1.0
    noise_seed: int = 42
    k_decay: float = 1.0
    initialize: bool = True
    _: KW_ONLY
    base_lr: float
    updates_per_epoch: int | None = None

    def check_arguments(self) -> None:
        self.make_plain("k_decay")
        super().check_arguments()

    def shape(self) -> Curve:
        return Curve("cosine", divisor=self.t_initial, exponent=self.k_decay)

    def shape_failing(self) -> tuple[int, str] | None:
        step = self.first_restart() if self.k_decay < 0.0 else None
        return None if step is None else (step, f"0^{self.k_decay!r} divides by 0 where a cycle begins")


@dataclass(frozen=True, repr=False)
class TanhLRScheduler(_CycleSchedule):
    """timm's tanh: `f = lr_min + (base_lr * cycle_decay^c - lr_min) * (1 - tanh(lb + (ub - lb) * u)) / 2`.

    Cycle c lasts t_initial * cycle_mul^c and u = 0..1 is the position in it; after cycle_limit cycles f = lr_min.
    Without warm-up t = 0 uses base_lr, not f(0); a warm-up that is no prefix (warmup_prefix=False) aims at f(warmup_t).

    lb, ub: the stretch of the tangent that is used, lb < ub. t_initial, lr_min, cycle_*: as of CosineLRScheduler. The
    others: `fused_sched.schedules.timm`. AssertionError for t_initial <= 0, lb >= ub, or a negative lr_min,
    cycle_limit, warmup_t or warmup_lr_init.

    >>> timm.TanhLRScheduler(20, t_in_epochs=False, base_lr=1.0)([0, 10, 14, 20]).round(4).tolist()
    [1.0, 0.982, 0.5, 0.0]

    Source: timm 1.0.31, scheduler/tanh_lr.py.
    """

    t_initial: int
    lb: float = -7.0
    ub: float = 3.0
    lr_min: float = 0.0
    cycle_mul: float = 1.0
    cycle_decay: float = 1.0
    cycle_limit: int = 1
    warmup_t: int = 0
    warmup_lr_init: float = 0.0
    warmup_prefix: bool = False
    t_in_epochs: bool = True
    noise_range_t: None = None
    noise_pct: float = 0.67
    noise_std: float = 1.0
    noise_seed: int = 42
    initialize: bool = True
    _: KW_ONLY
    base_lr: float
    updates_per_epoch: int | None = None

    def check_arguments(self) -> None:
        self.make_plain("lb", "ub")
        super().check_arguments()
        self.require(self.lb < self.ub, f"lb must be less than ub={self.ub!r}", "lb", "the rate falls from lb to ub")
        self.require(self.cycle_limit >= 0, "cycle_limit must be at least 0", "cycle_limit", "pass 1 for one descent")
        self.require(self.warmup_t >= 0, "warmup_t must be at least 0", "warmup_t", "pass 0 for none")
        self.require(self.warmup_lr_init >= 0.0, "warmup_lr_init must be at least 0", "warmup_lr_init", "pass 0.0")
        if self._aims_at_decay and not (self.cycle_mul > 0.0 and self.logarithm_exists(self.warmup_t)):
            raise ValueError(
                f"{self.word}: the warm-up aims at the rate of t = warmup_t, where there must be a cycle, got "
                f"warmup_t={self.warmup_t!r} and cycle_mul={self.cycle_mul!r}, which leaves none; pass "
                "warmup_prefix=True or a cycle_mul of 1.0 or more"
            )

    def shape(self) -> Curve:
        return Curve("tanh", divisor=self.t_initial, p=self.lb, q=self.ub)

    @property
    def _aims_at_decay(self) -> bool:
        return self.warmup_t > 0 and not self.warmup_prefix

    @property
    def warmup_target(self) -> float:
        return evaluate_at(pack(self.decay()), float(self.warmup_t)) if self._aims_at_decay else self.base_lr


@dataclass(frozen=True, repr=False)
class PolyLRScheduler(_CycleSchedule):
    """timm's polynomial: `f = lr_min + (base_lr * cycle_decay^c - lr_min) * (1 - u^k_decay)^power`.

    Cycle c lasts t_initial * cycle_mul^c and u = 0..1 is the position in it; after cycle_limit cycles f = lr_min.

    power: exponent of what remains (timm's factory and train.py pass their decay_rate for it). t_initial, lr_min,
    cycle_*, k_decay: as of CosineLRScheduler. The others: `fused_sched.schedules.timm`. AssertionError for
    t_initial <= 0 or lr_min < 0.

    >>> timm.PolyLRScheduler(16, power=2.0, t_in_epochs=False, base_lr=1.0)([0, 4, 8, 16]).tolist()
    [1.0, 0.5625, 0.25, 0.0]

    Source: timm 1.0.31, scheduler/poly_lr.py.
    """

    t_initial: int
    power: float = 0.5
    lr_min: float = 0.0
    cycle_mul: float = 1.0
    cycle_decay: float = 1.0
    cycle_limit: int = 1
    warmup_t: int = 0
    warmup_lr_init: float = 0.0
    warmup_prefix: bool = False
    t_in_epochs: bool = True
    noise_range_t: None = None
    noise_pct: float = 0.67
    noise_std: float = 1.0
    noise_seed: int = 42
    k_decay: float = 1.0
    initialize: bool = True
    _: KW_ONLY
    base_lr: float
    updates_per_epoch: int | None = None

    def check_arguments(self) -> None:
        self.make_plain("power", "k_decay")
        super().check_arguments()

    def shape(self) -> Curve:
        # 1 - u cancels where timm's does, which a clock that counts down would not.
        return Curve("power", divisor=self.t_initial, exponent=self.k_decay, complement=True, p=self.power)

    def shape_failing(self) -> tuple[int, str] | None:
        if self.k_decay < 0.0 and not self.power.is_integer():
            return self.first_call, f"(1 - u^{self.k_decay!r})^{self.power!r} is a complex number"
        if self.k_decay == 0.0 and self.power < 0.0:
            return self.first_call, f"0^{self.power!r} divides by 0"
        step = self.first_restart() if self.k_decay < 0.0 else None
        return None if step is None else (step, f"0^{self.k_decay!r} divides by 0 where a cycle begins")

    def odd_decay(self) -> str | None:
        if self.power < 0.0 and self.cycle_limit > 0:
            return f"with power={self.power!r} the rate rises until a cycle ends; pass more than 0.0"
        return super().odd_decay()
