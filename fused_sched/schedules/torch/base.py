"""What the schedules of torch.optim.lr_scheduler share."""

from __future__ import annotations

from abc import abstractmethod

from ...program import Tree
from ..library import Failure, LibrarySchedule
from .restarts import Restarts

#: The way out for what torch runs and these classes do not express.
ELSE_TABULATE = "tabulate its rates with schedules.from_callable(function, num_steps)"


class TorchSchedule(LibrarySchedule, library="torch", abstract=True):
    """A schedule of torch.optim.lr_scheduler for one parameter group.

    torch's arguments in torch's order, without `optimizer` and `last_epoch`; `base_lr` is the `initial_lr` that torch
    reads from the group. One update is one `scheduler.step()`. Where torch raises during training, the rates before are
    torch's and the last of them is held.
    """

    # SequentialLR begins its first child as its constructor does, and a later one by `_update_lr(0)`, which uses the
    # closed form where the class has one. The two differ for degenerate arguments only.

    def lower_restarted(self) -> Tree:
        """The schedule as a later child of SequentialLR, on a clock that is 0 at its milestone."""
        return self.lower()

    def failure_restarted(self) -> Failure | None:
        """What torch raises at the earliest, as a later child of SequentialLR."""
        return self.failure()

    @property
    def repeats_epoch_zero(self) -> bool:
        """Is the rate the same after another step to epoch 0? SequentialLR takes one in a chain that it begins with."""
        return True


class Chainable(TorchSchedule, abstract=True):
    """A schedule whose next rate is the optimizer's present one times a factor: a product with others in a chain."""

    base_lr: float

    @abstractmethod
    def lower_from(self, base_lr: float) -> Tree:
        """The schedule of another base rate."""

    def lower(self) -> Tree:
        return self.lower_from(self.base_lr)

    def lower_factors(self, restarts: Restarts) -> Tree:
        """The product of what torch multiplies the rate with since the latest restart."""
        return restarts.of_curve(self.lower_from(1.0))


def is_reached(epoch: float, *, first: int = 1) -> bool:
    """Does the epoch, counted up from `first` by ones, ever equal this number?"""
    return epoch >= first and float(epoch).is_integer()
