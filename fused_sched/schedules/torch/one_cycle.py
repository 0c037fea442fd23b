"""OneCycleLR: the rate rises to a peak and falls far below its start, momentum the other way round."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

from ...program import Tree
from ..library import Failure
from ..nodes import after, half_cosine, line, phases
from .base import TorchSchedule


class _Phase(NamedTuple):
    """From one level to another, until an update that it includes and that need not be a whole one."""

    end: float
    lr: tuple[float, float]
    momentum: tuple[float, float]


@dataclass(frozen=True, repr=False)
class OneCycleLR(TorchSchedule):
    """One cycle of N updates: `max_lr / div_factor` up to `max_lr`, down to `max_lr / div_factor / final_div_factor`.

    max_lr: the peak. N: total_steps, or epochs * steps_per_epoch. pct_start: part of N that rises, a float in [0, 1];
        the peak is at t = pct_start * N - 1, the end at t = N - 1. anneal_strategy: "cos" or "linear".
    div_factor, final_div_factor: the ratios above. three_phase: back to the first rate as fast as up, then on.
    cycle_momentum: `companions["beta1"]` goes from max_momentum to base_momentum and back.
    Raises ValueError for what torch refuses and ZeroDivisionError for pct_start * N = 1, as torch does.
    torch extrapolates one update beyond the end (t = N), and fails at the next.

    >>> import warnings
    >>> with warnings.catch_warnings():
    ...     warnings.simplefilter("ignore")  # of the end
    ...     lr = OneCycleLR(1.0, total_steps=11, pct_start=5 / 11, anneal_strategy="linear")
    >>> lr([0, 2, 4, 7]).round(6).tolist()
    [0.04, 0.52, 1.0, 0.500002]

    Source: torch.optim.lr_scheduler.OneCycleLR, torch 2.13; Smith and Topin 2018, Super-convergence.
    """

    max_lr: float
    total_steps: int | None = None
    epochs: int | None = None
    steps_per_epoch: int | None = None
    pct_start: float = 0.3
    anneal_strategy: str = "cos"
    cycle_momentum: bool = True
    base_momentum: float = 0.85
    max_momentum: float = 0.95
    div_factor: float = 25.0
    final_div_factor: float = 1e4
    three_phase: bool = False

    def check(self) -> None:
        word = self.word
        if self.total_steps is not None:
            self._check_count("total_steps")
        elif self.epochs is None or self.steps_per_epoch is None:
            raise ValueError(f"{word}: total_steps, or epochs and steps_per_epoch, must be given")
        else:
            self._check_count("epochs")
            self._check_count("steps_per_epoch")
        if not isinstance(self.pct_start, float) or not 0.0 <= self.pct_start <= 1.0:
            raise ValueError(f"{word}: pct_start must be a float in [0, 1], got {self.pct_start!r}; 1 is not 1.0")
        if self.anneal_strategy not in ("cos", "linear"):
            raise ValueError(f"{word}: anneal_strategy must be 'cos' or 'linear', got {self.anneal_strategy!r}")
        super().check()
        for name in ("div_factor", "final_div_factor"):
            if getattr(self, name) == 0.0:
                raise ZeroDivisionError(f"{word}: {name} must not be 0; torch divides by it")
        if self._phases()[0].end == 0.0:
            raise ZeroDivisionError(
                f"{word}: pct_start * total_steps must not be 1, got pct_start={self.pct_start!r} and "
                f"{self.num_steps} steps; torch divides by pct_start * total_steps - 1"
            )

    def _check_count(self, name: str) -> None:
        value = getattr(self, name)
        if not isinstance(value, int) or value <= 0:
            raise ValueError(f"{self.word}: {name} must be an integer above 0, got {value!r}; use int(...)")

    @property
    def num_steps(self) -> int:
        """N, the updates of the cycle."""
        if self.total_steps is not None:
            return self.total_steps
        assert self.epochs is not None
        assert self.steps_per_epoch is not None
        return self.epochs * self.steps_per_epoch

    @property
    def group_values(self) -> dict[str, float]:
        """What torch writes into the parameter group and reads from there at every step."""
        initial_lr = self.max_lr / self.div_factor
        values = {"initial_lr": initial_lr, "max_lr": self.max_lr, "min_lr": initial_lr / self.final_div_factor}
        if self.cycle_momentum:
            values |= {"base_momentum": self.base_momentum, "max_momentum": self.max_momentum}
        return values

    def failure(self) -> Failure | None:
        n = self.num_steps
        if self._divides_by_zero:
            return Failure(n, "ZeroDivisionError", f"stop after {n} updates")
        return Failure(n + 1, "ValueError", f"stop after {n} updates, as update {n} has left the curve already")

    def oddity(self) -> str | None:
        if self.three_phase and self._phases()[1].end > self.num_steps - 1:
            return "with three phases and pct_start > 0.5 the rate never comes down; use pct_start <= 0.5"
        return None

    def _phases(self) -> list[_Phase]:
        n, pct = self.num_steps, self.pct_start
        low, high = self.max_lr / self.div_factor, self.max_lr
        end = low / self.final_div_factor
        least, most = self.base_momentum, self.max_momentum
        rise = _Phase(float(pct * n) - 1, (low, high), (most, least))
        if not self.three_phase:
            return [rise, _Phase(n - 1, (high, end), (least, most))]
        return [
            rise,
            _Phase(float(2 * pct * n) - 2, (high, low), (least, most)),
            _Phase(n - 1, (low, end), (most, most)),
        ]

    @property
    def _divides_by_zero(self) -> bool:
        """At t = N, where the last phase has no length."""
        return self._phases()[-2].end == self.num_steps - 1

    def lower(self) -> Tree:
        return self._lower("lr")

    def lower_companions(self) -> dict[str, Tree]:
        return {"beta1": self._lower("momentum")} if self.cycle_momentum else {}

    def _lower(self, which: str) -> Tree:
        anneal = half_cosine if self.anneal_strategy == "cos" else line
        pieces, last = self._phases(), self.num_steps
        origins = [0.0, *(phase.end for phase in pieces[:-1])]
        # torch's last phase has no end of its own: it runs on to t = N, where the one before has not reached that.
        if self._divides_by_zero:
            pieces, last = pieces[:-1], self.num_steps - 1
        elif origins[-1] >= last:
            pieces = pieces[:-1]
        curves = []
        for phase, origin in zip(pieces, origins, strict=False):
            start, end = getattr(phase, which)
            curves.append(replace(anneal(start, end, phase.end - origin, origin), limit=last - origin))
        return phases(curves, [after(phase.end) for phase in pieces[:-1]])
