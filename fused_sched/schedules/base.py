"""What every schedule can do: be called, compared, printed, stored, combined and plotted."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import fields
from functools import cached_property
from inspect import get_annotations
from typing import TYPE_CHECKING, Any, ClassVar, overload

import numpy as np
import numpy.typing as npt

from .. import landmarks
from ..program import Tree, evaluate, evaluate_at, pack

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Steps = npt.NDArray[np.integer[Any]] | list[int] | tuple[int, ...] | range

#: How far `reference` looks for a first value that will do.
_REFERENCE_SEARCH_STEPS = 1 << 16


class Schedule(ABC):
    """A hyperparameter as a function of the number of updates applied before.

    Subclasses are frozen dataclasses of numbers, strings and other schedules: immutable, comparable, hashable,
    picklable, with a repr that rebuilds them. They check their fields when constructed and say what they
    compute by `lower`; every value comes from the one evaluator of programs, on the host as on the device.
    """

    #: Name of the constructor, in `to_dict` and in messages.
    word: ClassVar[str]
    _words: ClassVar[dict[str, type[Schedule]]] = {}

    def __init_subclass__(cls, word: str | None = None, abstract: bool = False, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.word = word or cls.__name__
        if abstract:
            return
        if "schedule" in get_annotations(cls):
            raise TypeError(
                f"{cls.__name__} must not have a field called 'schedule', which holds the class's name in to_dict(); "
                "rename it"
            )
        other = cls._words.get(cls.word)
        if other is not None and (other.__module__, other.__qualname__) != (cls.__module__, cls.__qualname__):
            raise TypeError(f"two schedules are called {cls.word!r}; give one of them another word=")
        cls._words[cls.word] = cls

    # What a subclass says about itself.

    @abstractmethod
    def lower(self) -> Tree:
        """The schedule as a tree of the evaluator's nodes."""

    # Values.

    @cached_property
    def tree(self) -> Tree:
        """What `lower` gave."""
        return self.lower()

    @cached_property
    def program(self) -> bytes:
        """The schedule as the device reads it; `fused_sched.program.describe` prints it."""
        return pack(self.tree)

    def held_from(self) -> int | None:
        """The first step from which the value no longer changes; None for a schedule without an end.

        >>> from fused_sched import schedules
        >>> schedules.linear(1.0, 0.0, 100).held_from()
        100
        """
        return landmarks.held_from(self.tree)

    @overload
    def __call__(self, step: int) -> float: ...
    @overload
    def __call__(self, step: Steps) -> npt.NDArray[np.float64]: ...
    def __call__(self, step: int | Steps) -> float | npt.NDArray[np.float64]:
        """The value used by an update.

        step: 0-based index of the update (the first update uses step 0); an integer, or integers in an array
            of any shape.
        Returns a float, or float64 values in an array of that shape.
        Raises ValueError for a negative step, TypeError for one that is not an integer.

        >>> from fused_sched import schedules
        >>> schedules.linear(1.0, 0.0, 4)(1)
        0.75
        >>> schedules.linear(1.0, 0.0, 4)([0, 2, 9]).tolist()
        [1.0, 0.5, 0.0]
        """
        if type(step) is int and step >= 0:
            return evaluate_at(self.program, float(step))
        steps = np.asarray(step)
        if steps.size and not np.issubdtype(steps.dtype, np.integer):
            raise TypeError(f"a schedule's step must be an integer, got {step!r}; convert it with int(...)")
        if steps.size and steps.min() < 0:
            raise ValueError(f"a schedule's step must be 0 or more, got {step!r}; the first update uses step 0")
        values = evaluate(self.program, steps)
        return values if steps.ndim else float(values)

    @property
    def reference(self) -> float:
        """The peak, the largest value above 0, where there is one: what `group["lr"]` starts as.

        Of a product it is the largest value at any of its factors' peaks, or the first one above 0. Of a schedule that
        is never above 0 it is the lowest value at such a place, or the first one that is not 0.

        >>> from fused_sched import schedules
        >>> schedules.warmup_cosine(1e-3, warmup_steps=10, total_steps=100).reference
        0.001
        """
        return self._reference

    @cached_property
    def _reference(self) -> float:
        candidates = self(sorted(landmarks.extremes(self.tree)))
        positive = candidates[(candidates > 0.0) & np.isfinite(candidates)]
        if positive.size:
            return float(positive.max())
        values = self(np.arange(_REFERENCE_SEARCH_STEPS))
        positive = values[(values > 0.0) & np.isfinite(values)]
        if positive.size:
            return float(positive[0])
        # Not the lowest of those that were searched: of a fall without an end it would be wherever the search stopped.
        negative = candidates[(candidates < 0.0) & np.isfinite(candidates)]
        if negative.size:
            return float(negative.min())
        nonzero = values[(values != 0.0) & np.isfinite(values)]
        return float(nonzero[0]) if nonzero.size else 0.0

    @property
    def companions(self) -> dict[str, Schedule]:
        """Schedules of other hyperparameters that go with this rate, by their names: none but for some libraries'.

        `lr=schedule` and `set_schedule(schedule)` drive them as well. A combination (`a * b`, `join`, ...) is one of
        rates and has none.
        """
        return {}

    # Combinations.

    def scaled(self, factor: float) -> Schedule:
        """`s.scaled(c)(t) = c * s(t)`.

        >>> from fused_sched import schedules
        >>> schedules.constant(0.5).scaled(3.0)(0)
        1.5
        """
        from .combinators import Scaled

        return Scaled(self, factor)

    def shifted(self, steps: int) -> Schedule:
        """`s.shifted(n)(t) = s(max(0, t - n))`: n updates later, or earlier for a negative n.

        >>> from fused_sched import schedules
        >>> schedules.linear(1.0, 0.0, 4).shifted(2)([0, 2, 3]).tolist()
        [1.0, 1.0, 0.75]
        """
        from .combinators import Shifted

        return Shifted(self, steps)

    def repeat(self, period: int, times: int | None = None) -> Schedule:
        """`s.repeat(period)(t) = s(t mod period)`; after `times` periods the value is s(period) for good.

        >>> from fused_sched import schedules
        >>> schedules.linear(1.0, 0.0, 2).repeat(2, times=2)([0, 1, 2, 3, 4, 5]).tolist()
        [1.0, 0.5, 1.0, 0.5, 0.0, 0.0]
        """
        from .combinators import Repeated

        return Repeated(self, period, times)

    def __mul__(self, other: Schedule) -> Schedule:
        """`(a * b)(t) = a(t) * b(t)`."""
        if not isinstance(other, Schedule):
            return NotImplemented
        from .combinators import Product

        return Product((*self.factors, other) if isinstance(self, Product) else (self, other))

    # Storage.

    def to_dict(self) -> dict[str, Any]:
        """The schedule as JSON-ready data; `Schedule.from_dict` rebuilds it.

        >>> from fused_sched import schedules
        >>> schedules.linear(1.0, 0.0, 10).to_dict()
        {'schedule': 'linear', 'start': 1.0, 'end': 0.0, 'steps': 10}
        """
        return {"schedule": self.word} | {f.name: _plain(getattr(self, f.name)) for f in fields(self)}  # type: ignore[arg-type]

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> Schedule:
        """The schedule that `to_dict` wrote.

        Raises ValueError for an unknown schedule or fields it does not have.

        >>> from fused_sched import schedules
        >>> schedules.Schedule.from_dict({"schedule": "constant", "value": 0.5})
        constant(value=0.5)
        """
        arguments = dict(data)
        word = arguments.pop("schedule", None)
        cls = Schedule._words.get(word) if isinstance(word, str) else None
        if cls is None:
            raise ValueError(f"Schedule.from_dict: schedule must be one of {sorted(Schedule._words)}, got {word!r}")
        known = {f.name for f in fields(cls)}  # type: ignore[arg-type]
        if set(arguments) != known:
            raise ValueError(f"Schedule.from_dict: {word} has the fields {sorted(known)}, got {sorted(arguments)}")
        return cls(**{name: _rebuilt(value) for name, value in arguments.items()})

    def __getstate__(self) -> dict[str, Any]:
        # Fields only: a cached program must not outlive its version.
        return {f.name: getattr(self, f.name) for f in fields(self)}  # type: ignore[arg-type]

    # Pictures.

    def plot(self, num_steps: int | None = None, *, ax: Axes | None = None, label: str | None = None) -> Axes:
        """Draw the schedule, its phases marked, and below it the momentum and weight decay that go with it.

        num_steps: updates to show, by default all phases. ax: axes to draw on, and on no others. label: for the legend.
        Returns the axes of the schedule. Raises ImportError without matplotlib (`pip install fused_sched[plot]`),
        ValueError for num_steps < 1. Several schedules: `fused_sched.plot.plot_schedules`.

        >>> import matplotlib; matplotlib.use("Agg")
        >>> from fused_sched import schedules
        >>> ax = schedules.warmup_cosine(1e-3, warmup_steps=10, total_steps=100).plot()
        >>> ax.figure.savefig("lr.png")  # doctest: +SKIP
        """
        from ..plot import plot_schedules

        return plot_schedules(self, num_steps=num_steps, ax=ax, labels=None if label is None else [label])


def _plain(value: Any) -> Any:
    if isinstance(value, Schedule):
        return value.to_dict()
    return [_plain(item) for item in value] if isinstance(value, tuple) else value


def _rebuilt(value: Any) -> Any:
    if isinstance(value, Mapping):
        return Schedule.from_dict(value)
    return tuple(_rebuilt(item) for item in value) if isinstance(value, list | tuple) else value


def set_fields(schedule: Schedule, **values: Any) -> None:
    """Assign a frozen dataclass's fields while it is being constructed."""
    for name, value in values.items():
        object.__setattr__(schedule, name, value)
