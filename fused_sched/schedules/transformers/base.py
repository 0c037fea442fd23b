"""What the schedules of transformers share: a factor of the group's rate, as in torch's LambdaLR."""

from __future__ import annotations

from abc import abstractmethod
from math import inf

from ...program import Clamp, Curve, Tree
from ..library import LibrarySchedule
from ..plain_numbers import make_numbers_plain


class TransformersSchedule(LibrarySchedule, library="transformers", abstract=True):
    """A schedule of Hugging Face transformers: `base_lr * factor(t)`."""

    base_lr: float

    def check(self) -> None:
        make_numbers_plain(self)

    @abstractmethod
    def factor(self) -> Tree:
        """The library's lr_lambda."""

    def lower(self) -> Tree:
        return Clamp(self.factor(), scale=self.base_lr)


def warmup(num_warmup_steps: float, held_from: float = inf) -> Curve:
    """`t / max(1, num_warmup_steps)`, up to a step from which it is held."""
    return Curve("power", divisor=max(1.0, num_warmup_steps), limit=held_from)


def then_hold(step: int) -> str:
    """The remedy for a rate that goes on after a step."""
    return f"stop there, or append schedules.constant(...) to it with schedules.join([...], [{step}])"
