"""SequentialLR and ChainedScheduler, where torch runs a sequence or a product.

In torch the children share the rate in the parameter group, and what comes out is not always what the names say: a
child that sets the rate undoes those before it in a chain; a composition inside another starts one step ahead, or
not at all. What is neither a sequence nor a product raises.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from math import inf, isclose
from typing import NamedTuple

from ... import landmarks
from ...program import Product, Tree
from .. import checks
from ..base import Schedule, set_fields
from ..library import Failure, LibrarySchedule
from ..metric import MetricSchedule
from ..nodes import after, flat, half_cosine, held, in_turn, phases, until
from .base import ELSE_TABULATE, Chainable, TorchSchedule, is_reached
from .cycles import CosineAnnealingLR, CyclicLR
from .functions import MultiplicativeLR
from .one_cycle import OneCycleLR
from .restarts import Restarts


class _Phase(NamedTuple):
    """A child of SequentialLR while it runs, from update `begin` to before update `end`."""

    schedule: Schedule
    begin: int
    end: float
    is_first: bool

    def failure(self) -> Failure | None:
        """What torch raises before the phase ends; updates are those of the phase."""
        if not isinstance(self.schedule, TorchSchedule):
            return None
        failure = self.schedule.failure() if self.is_first else self.schedule.failure_restarted()
        return failure if failure is not None and self.begin + failure.update < self.end else None

    def lower(self) -> Tree:
        if self.is_first or not isinstance(self.schedule, TorchSchedule):
            return self.schedule.lower()
        return self.schedule.lower_restarted()


@dataclass(frozen=True, repr=False)
class SequentialLR(TorchSchedule):
    """One schedule after the other: `f(t) = schedulers[i](t - milestones[i-1])` from `t = milestones[i-1]` on.

    schedulers: at least one, each with its own base_lr and its own clock. Any schedule of this package will do; torch's
        own compositions only where torch runs them as such.
    milestones: updates at which the next one begins, in order; one fewer than schedulers.
    A child's momentum is `companions["beta1"]` while it runs; the others leave it where it is.
    Raises TypeError or ValueError for what torch refuses, and ValueError for what it runs in another way: another
    SequentialLR or a ChainedScheduler of other than stairs and warm-ups to begin with (its clock is one step ahead), a
    MultiplicativeLR later (it continues from the rate before), children that overwrite each other's bounds.

    >>> from fused_sched.schedules.torch import ExponentialLR, LinearLR
    >>> warmup = LinearLR(0.5, total_iters=2, base_lr=0.1)
    >>> SequentialLR([warmup, ExponentialLR(0.5, base_lr=0.1)], [2])([0, 1, 2, 3]).tolist()
    [0.05, 0.07500000000000001, 0.1, 0.05]

    Source: torch.optim.lr_scheduler.SequentialLR, torch 2.13.
    """

    schedulers: tuple[Schedule, ...]
    milestones: tuple[int, ...]

    def check(self) -> None:
        set_fields(self, schedulers=_check_schedulers(self.word, self.schedulers))
        if not isinstance(self.milestones, list | tuple):
            raise TypeError(f"{self.word}: milestones must be a list of steps, got {self.milestones!r}")
        milestones = [
            checks.step_count(self.word, f"milestones[{i}]", m, at_least=None) for i, m in enumerate(self.milestones)
        ]
        set_fields(self, milestones=tuple(milestones))
        if len(self.milestones) != len(self.schedulers) - 1:
            raise ValueError(
                f"{self.word}: milestones must be one fewer than schedulers, got {len(self.milestones)} for "
                f"{len(self.schedulers)}; the first begins at update 0 by itself"
            )
        if any(later < earlier for earlier, later in pairwise(self.milestones)):
            raise ValueError(
                f"{self.word}: milestones must be in order, got {list(self.milestones)}, which torch searches by "
                f"halves; sort them, or {ELSE_TABULATE}"
            )
        first, *later = self._phases()
        self._check_first(first.schedule)
        if any(isinstance(phase.schedule, MultiplicativeLR) for phase in later):
            raise ValueError(
                f"{self.word}: MultiplicativeLR must come first, as it continues from whatever the rate is; "
                f"{ELSE_TABULATE}"
            )
        self._check_group_values(first.schedule)

    def _check_first(self, first: Schedule) -> None:
        if isinstance(first, SequentialLR):
            raise ValueError(
                f"{self.word}: the first of schedulers must not be a SequentialLR, whose milestones torch then reaches "
                f"one update early; give its schedulers and milestones to this one, or {ELSE_TABULATE}"
            )
        if isinstance(first, ChainedScheduler) and not first.repeats_epoch_zero:
            raise ValueError(
                f"{self.word}: a ChainedScheduler to begin with must consist of LinearLR, ConstantLR, StepLR and "
                f"MultiStepLR, got {first!r}, in which torch takes the first step twice; {ELSE_TABULATE}"
            )

    def _check_group_values(self, first: Schedule) -> None:
        """OneCycleLR reads its bounds from the group, where whatever is constructed later may have overwritten them."""
        stored: dict[str, float] = {}
        for child in self.schedulers:
            if isinstance(child, OneCycleLR):
                stored |= child.group_values
            elif isinstance(child, CyclicLR) and child.cycle_momentum:
                stored |= {"base_momentum": child.base_momentum, "max_momentum": child.max_momentum}
        for child in self.schedulers:
            if isinstance(child, OneCycleLR) and any(stored[name] != v for name, v in child.group_values.items()):
                raise ValueError(
                    f"{self.word}: torch keeps the bounds of {child!r} in the parameter group, where a later child of "
                    f"the list overwrites them; give both the same, or {ELSE_TABULATE}"
                )
        base_lr = first.base_lr if isinstance(first, Chainable | CosineAnnealingLR | ChainedScheduler) else None
        if base_lr is not None and not isclose(base_lr, stored.get("initial_lr", base_lr), rel_tol=1e-12):
            raise ValueError(
                f"{self.word}: the first schedule must have base_lr={stored['initial_lr']!r}, got {base_lr!r}; torch "
                f"begins at the group's initial_lr, which OneCycleLR sets to max_lr / div_factor; or {ELSE_TABULATE}"
            )

    def _phases(self) -> list[_Phase]:
        """The children that run at all."""
        begins = (0, *(max(0, m) for m in self.milestones))
        ends = (*begins[1:], inf)
        running = [item for item in zip(self.schedulers, begins, ends, strict=True) if item[1] < item[2]]
        return [_Phase(*item, is_first=i == 0) for i, item in enumerate(running)]

    def running(self, update: int) -> tuple[Schedule, float]:
        """The child that gives an update's rate, and the update at which the next one takes over."""
        return next((phase.schedule, phase.end) for phase in self._phases() if update < phase.end)

    def failure(self) -> Failure | None:
        for phase in self._phases():
            failure = phase.failure()
            if failure is not None:
                return failure._replace(update=phase.begin + failure.update)
        return None

    def failure_restarted(self) -> Failure | None:
        return Failure(0, "NotImplementedError", "give its children to the outer SequentialLR")

    def lower(self) -> Tree:
        return _in_turn(list(self._pieces()))

    def _pieces(self) -> Iterator[tuple[int, Tree]]:
        """First update, and what is used from then on, on a clock that is 0 there; the last one holds."""
        previous: tuple[int, Tree] | None = None
        for phase in self._phases():
            failure = phase.failure()
            if failure is not None and failure.update == 0:
                assert previous is not None  # the first child's failure would have been the constructor's
                yield phase.begin, _held(*previous, before=phase.begin)
                return
            previous = phase.begin, phase.lower()
            yield previous
            if failure is not None:
                return

    def lower_companions(self) -> dict[str, Tree]:
        children = [child.lower_companions() if isinstance(child, LibrarySchedule) else {} for child in self.schedulers]
        names = dict.fromkeys(name for child in children for name in child)
        return {name: _in_turn(list(self._companion_pieces(name, children))) for name in names}

    def _companion_pieces(self, name: str, children: list[dict[str, Tree]]) -> Iterator[tuple[int, Tree]]:
        # All constructors have run: the last of them has set the first value.
        built_last = [child[name] for child in children if name in child][-1]
        previous: tuple[int, Tree] = 0, held(built_last, 0)
        for phase in self._phases():
            failure = phase.failure()
            own = phase.schedule.lower_companions() if isinstance(phase.schedule, LibrarySchedule) else {}
            if name in own and (failure is None or failure.update > 0):
                previous = phase.begin, own[name]
            elif phase.begin > 0:
                previous = phase.begin, _held(*previous, before=phase.begin)
            yield previous
            if failure is not None:
                return


@dataclass(frozen=True, repr=False)
class ChainedScheduler(TorchSchedule):
    """Schedules on the same rate at the same time: `f(t) = base_lr * schedulers[0](t) / base_lr * ...`.

    schedulers: StepLR, MultiStepLR, ConstantLR, LinearLR, ExponentialLR, PolynomialLR, MultiplicativeLR, and
        CosineAnnealingLR with eta_min = 0, all with the same base_lr; or a single schedule of any kind.
    Raises TypeError or ValueError for what torch refuses, and ValueError for what it does not run as a product: others
    set the rate and undo what came before them, as a second cosine does.
    After T_max a CosineAnnealingLR begins anew, `f(t) = base_lr * (1 + cos(pi * t / T_max)) / 2` times what the others
    multiply from there on; what they have multiplied before is gone, here as in torch.

    >>> from fused_sched.schedules.torch import ExponentialLR, StepLR
    >>> ChainedScheduler([StepLR(2, 0.5, base_lr=0.8), ExponentialLR(0.5, base_lr=0.8)])([0, 1, 2, 3]).tolist()
    [0.8, 0.4, 0.1, 0.05]

    Source: torch.optim.lr_scheduler.ChainedScheduler, torch 2.13.
    """

    schedulers: tuple[Schedule, ...]

    def check(self) -> None:
        given = _check_schedulers(self.word, self.schedulers)
        # Chained in a chain, torch takes the same steps in the same order.
        flattened = [c for s in given for c in (s.schedulers if isinstance(s, ChainedScheduler) else (s,))]
        set_fields(self, schedulers=tuple(flattened))
        if len(flattened) == 1:
            return
        for child in flattened:
            if not isinstance(child, Chainable) and not _is_factor(child):
                raise ValueError(
                    f"{self.word}: torch multiplies StepLR, MultiStepLR, ConstantLR, LinearLR, ExponentialLR, "
                    f"PolynomialLR, MultiplicativeLR and CosineAnnealingLR with eta_min=0, got {child!r}, which sets "
                    f"the rate; {ELSE_TABULATE}"
                )
        if len(self._cosines) > 1:
            raise ValueError(
                f"{self.word}: schedulers must have at most one CosineAnnealingLR, got {len(self._cosines)}, each of "
                f"which begins anew from base_lr after its own T_max; {ELSE_TABULATE}"
            )
        rates = {child.base_lr for child in self._factors}
        if len(rates) > 1:
            raise ValueError(
                f"{self.word}: all schedulers must have the same base_lr, got {sorted(rates)}; torch has one "
                "initial_lr per group"
            )
        _ = self.tree  # refuses what is too long for a table

    @property
    def _factors(self) -> tuple[Chainable | CosineAnnealingLR, ...]:
        return tuple(c for c in self.schedulers if isinstance(c, Chainable | CosineAnnealingLR))

    @property
    def base_lr(self) -> float | None:
        """The group's rate, which all children share; None for a single child that does not multiply it."""
        return self._factors[0].base_lr if self._factors else None

    @property
    def is_product(self) -> bool:
        """Does a factor on the rate stay in all rates to come?"""
        return all(isinstance(child, Chainable) for child in self.schedulers)

    @property
    def repeats_epoch_zero(self) -> bool:
        return all(child.repeats_epoch_zero for child in self.schedulers if isinstance(child, TorchSchedule))

    def failure(self) -> Failure | None:
        children = (child.failure() for child in self.schedulers if isinstance(child, TorchSchedule))
        return min((f for f in children if f is not None), default=None)

    def failure_restarted(self) -> Failure | None:
        return Failure(0, "NotImplementedError", "begin the SequentialLR with it")

    def oddity(self) -> str | None:
        for cosine in self._cosines:
            ends = [landmarks.held_from(c.lower_from(1.0)) for c in self._factors if isinstance(c, Chainable)]
            if any(end is None or end > cosine.T_max for end in ends):
                return (
                    f"from update {cosine.T_max + 1} on torch begins the cosine anew from base_lr, whatever the others "
                    f"have multiplied before; train for {cosine.T_max} updates"
                )
        return None

    @property
    def _cosines(self) -> list[CosineAnnealingLR]:
        """Of a product; one cosine by itself is no product."""
        return [c for c in self.schedulers if isinstance(c, CosineAnnealingLR)] if len(self.schedulers) > 1 else []

    def lower(self) -> Tree:
        if len(self.schedulers) == 1:
            return self.schedulers[0].lower()
        factors = self._factors
        base = factors[0].base_lr
        tree: Tree = Product(tuple(c.lower_from(base if i == 0 else 1.0) for i, c in enumerate(factors)))
        for cosine in self._cosines:
            tree = phases([tree, self._lower_anew(cosine)], [after(cosine.T_max)])
        failure = self.failure()
        if failure is not None:
            tree = until(tree, failure.update)
        return tree

    def _lower_anew(self, cosine: CosineAnnealingLR) -> Tree:
        """What torch runs after the cosine's first end."""
        steps, place = int(cosine.T_max), self._factors.index(cosine)
        factors = [
            child.lower_factors(Restarts(steps + 1, 2 * steps, keeps_own=i > place))
            for i, child in enumerate(self._factors)
            if isinstance(child, Chainable)
        ]
        wave = half_cosine(cosine.base_lr, 0.0, steps)
        lasting = [factor for factor in factors if factor != flat(1.0)]
        return Product((wave, *lasting)) if lasting else wave

    def lower_companions(self) -> dict[str, Tree]:
        only = self.schedulers[0]
        return only.lower_companions() if len(self.schedulers) == 1 and isinstance(only, LibrarySchedule) else {}


def _is_factor(child: Schedule) -> bool:
    return isinstance(child, CosineAnnealingLR) and child.eta_min == 0.0 and is_reached(child.T_max)


def _check_schedulers(word: str, got: object) -> tuple[Schedule, ...]:
    if not isinstance(got, list | tuple):
        raise TypeError(f"{word}: schedulers must be a list of schedules, got {got!r}")
    if not got:
        raise ValueError(f"{word}: schedulers must have at least one schedule, got none")
    for i, child in enumerate(got):
        if not isinstance(child, Schedule):
            raise TypeError(f"{word}: schedulers[{i}] must be a schedule, got {child!r}; see schedules.torch")
        if isinstance(child, MetricSchedule):
            raise ValueError(f"{word}: schedulers[{i}] must not need a metric, got {child!r}, as in torch")
    return tuple(got)


def _in_turn(pieces: list[tuple[int, Tree]]) -> Tree:
    if len(pieces) == 1:
        return pieces[0][1]
    return in_turn([tree for _, tree in pieces], [begin for begin, _ in pieces[1:]])


def _held(begin: int, tree: Tree, *, before: int) -> Tree:
    """The value that a tree which begins at `begin` has one update before `before`, for good."""
    return held(tree, before - 1 - begin)
