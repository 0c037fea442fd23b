"""What the schedules of transformers share: a factor of the group's rate, as in torch's LambdaLR."""

from __future__ import annotations

from abc import abstractmethod
from math import inf

from ...program import Clamp, Curve, Tree
from ..library import LibrarySchedule


class TransformersSchedule(LibrarySchedule, library="transformers", abstract=True):
    """A schedule of Hugging Face transformers: `base_lr * factor(t)`."""

    base_lr: float

    @abstractmethod
    def factor(self) -> Tree:
        """The library's lr_lambda."""

    def lower(self) -> Tree:
        return Clamp(self.factor(), scale=self.base_lr)


class ReadsTheDefaultRate(TransformersSchedule, abstract=True):
    """One whose factor depends on `optimizer.defaults["lr"]`, the rate of groups that were given none."""

    default_lr: float | None

    @property
    def initial_lr(self) -> float:
        return self.base_lr if self.default_lr is None else self.default_lr


def warmup(num_warmup_steps: float, held_from: float = inf) -> Curve:
    """`t / max(1, num_warmup_steps)`, up to a step from which it is held."""
    return Curve("power", divisor=max(1.0, num_warmup_steps), limit=held_from)
