"""What the schedules of other libraries share.

Each library has a module beside this one (`torch`, `deepspeed`, ...) with its own names, keyword arguments and
defaults; where the library reads the optimizer's rate, there is `base_lr`. They give what the library runs, value
for value, and raise only where its constructor does. What looks odd in it (a rate that rises again, that turns
negative, that ends in an error) is kept, and said in one ScheduleWarning.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import MISSING, dataclass, fields
from typing import Any, ClassVar, NamedTuple

from .._warnings import warn_schedule
from ..program import Tree
from . import checks
from .base import Schedule, set_fields

#: Annotation of a field: what makes a plain value of its argument. An int is a number of steps or the like, which the
#: libraries also take where it is not whole, as 0.1 * num_training_steps.
_PLAIN: dict[str, Callable[[str, str, Any], Any]] = {
    "int": checks.duration,
    "float": checks.number,
    "bool": lambda who, name, got: bool(got),
}


class Failure(NamedTuple):
    """The library raises `error` where it should compute the rate of an update, and the rate before is held here."""

    update: int
    error: str
    remedy: str


class LibrarySchedule(Schedule, abstract=True):
    """A schedule under another library's name.

    Subclasses are dataclasses (`frozen=True, repr=False`) whose fields are the library's arguments in its order,
    then, keyword-only, what the library takes from elsewhere.
    """

    #: Module under `fused_sched.schedules`, which begins the word: "torch.StepLR".
    library: ClassVar[str]

    def __init_subclass__(cls, library: str | None = None, abstract: bool = False, **kwargs: Any) -> None:
        if library is not None:
            cls.library = library
        super().__init_subclass__(word=f"{cls.library}.{cls.__name__}", abstract=abstract, **kwargs)

    def __post_init__(self) -> None:
        self.check()
        warning = self.warning()
        if warning is not None:
            warn_schedule(f"{self.word}: {warning}")

    # What a subclass says about itself.

    def check(self) -> None:
        """Raise what the library's constructor raises, and give the fields their plain types."""
        self.make_plain()

    def oddity(self) -> str | None:
        """What the library does with these arguments that their owner may not expect, and what to do about it."""
        return None

    def negative_rate(self) -> str | None:
        """What turns the rate negative, and what to do about it; the optimizer then says no more of that."""
        return None

    def failure(self) -> Failure | None:
        """What the library raises at the earliest, after the constructor."""
        return None

    def lower_companions(self) -> dict[str, Tree]:
        """The other hyperparameters that the library's scheduler writes: "beta1", "beta2", "weight_decay"."""
        return {}

    # What they share.

    def make_plain(self, *names: str) -> None:
        """Turn the named fields, by default all, into what they are annotated as: int, float or bool.

        They then compare, print and store alike wherever they came from. None stays where it may be. Raises TypeError
        for what is no number, ValueError for one that is not finite.
        """
        for field in fields(self):  # type: ignore[arg-type]
            kind, _, rest = str(field.type).partition(" | ")
            got = getattr(self, field.name)
            is_unset = got is None and rest == "None"
            if kind in _PLAIN and not is_unset and (not names or field.name in names):
                set_fields(self, **{field.name: _PLAIN[kind](self.word, field.name, got)})

    def warning(self) -> str | None:
        """What the constructor warns of: one thing, the gravest."""
        odd, failure = self.negative_rate() or self.oddity(), self.failure()
        if odd is not None or failure is None:
            return odd
        return (
            f"{self.library} raises {failure.error} at the step to update {failure.update}, where this schedule holds "
            f"the rate before; {failure.remedy}"
        )

    @property
    def companions(self) -> dict[str, Schedule]:
        return {name: Companion(self, name) for name in self.lower_companions()}

    def __repr__(self) -> str:
        given = (f for f in fields(self) if f.default is MISSING or getattr(self, f.name) != f.default)  # type: ignore[arg-type]
        return f"{self.word}({', '.join(f'{f.name}={getattr(self, f.name)!r}' for f in given)})"


@dataclass(frozen=True)
class Companion(Schedule, word="companion"):
    """Another hyperparameter that a library's scheduler writes with the rate: `schedule.companions["beta1"]`."""

    rate: LibrarySchedule
    hyperparameter: str

    def __post_init__(self) -> None:
        names = self.rate.lower_companions() if isinstance(self.rate, LibrarySchedule) else ()
        if self.hyperparameter not in names:
            raise ValueError(
                f"companion: {self.rate!r} schedules {', '.join(names) or 'nothing beside the rate'}, got "
                f"{self.hyperparameter!r}"
            )

    def __repr__(self) -> str:
        return f"{self.rate!r}.companions[{self.hyperparameter!r}]"

    def lower(self) -> Tree:
        return self.rate.lower_companions()[self.hyperparameter]
