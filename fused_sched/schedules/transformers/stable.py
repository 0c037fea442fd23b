"""Warm-up, a plateau, and a decay."""

from __future__ import annotations

import math
from dataclasses import KW_ONLY, dataclass

from ...program import Clock, Curve, Tree
from ..library import Failure
from ..nodes import flat, phases
from .base import TransformersSchedule

_SHAPES = ("linear", "cosine", "1-sqrt")


@dataclass(frozen=True, repr=False)
class get_wsd_schedule(TransformersSchedule):
    """A warm-up for W updates, a plateau for S, a decay over D, then a floor.

    `base_lr * (r + (1 - r) * s(u))`, u being the part of the phase that is done. In the warm-up s(u) is u,
    (1 - cos(pi u)) / 2 or 1 - sqrt(1 - u), on the plateau 1, in the decay 1 - u, (1 + cos(2 pi * num_cycles * u)) / 2
    or 1 - sqrt(u), and then 0.

    num_warmup_steps, num_decay_steps: W and D, in updates. num_training_steps: all of them; S is then what W and D
    leave. num_stable_steps: S itself. warmup_type, decay_type: "linear", "cosine" or "1-sqrt". min_lr_ratio: r.
    num_cycles: waves of a cosine decay; 0.5 is one descent. base_lr: the group's rate.
    Raises ValueError for neither of num_training_steps and num_stable_steps or an unknown type; TypeError or
    ValueError for anything but finite numbers. Warns for both of them (num_stable_steps is used), for W + D beyond
    num_training_steps (the decay is jumped into), for D <= 0, for a negative r, for a cosine of more than one
    descent, and where a W that is not whole makes
    the library take the root of a negative number: the value before is then held.

    >>> s = get_wsd_schedule(4, 4, num_training_steps=16, decay_type="linear", base_lr=1.0)
    >>> s([0, 1, 4, 11, 12, 14, 16]).tolist()
    [0.0, 0.25, 1.0, 1.0, 1.0, 0.5, 0.0]

    Source: transformers 5.23.0, optimization.py.
    """

    num_warmup_steps: int
    num_decay_steps: int
    num_training_steps: int | None = None
    num_stable_steps: int | None = None
    warmup_type: str = "linear"
    decay_type: str = "cosine"
    min_lr_ratio: float = 0.0
    num_cycles: float = 0.5
    _: KW_ONLY
    base_lr: float

    @property
    def _stable_steps(self) -> float:
        if self.num_stable_steps is not None:
            return self.num_stable_steps
        assert self.num_training_steps is not None  # one of them is
        return self.num_training_steps - self.num_warmup_steps - self.num_decay_steps

    @property
    def _error_step(self) -> int | None:
        """Where the library takes the root of a negative number: rounding may leave one at the decay's first step."""
        w, s = self.num_warmup_steps, self._stable_steps
        first = math.ceil(max(w, w + s))
        is_used = self.decay_type == "1-sqrt" and w <= first < w + s + self.num_decay_steps
        return first if is_used and (first - w) - s < 0 else None

    def check(self) -> None:
        super().check()
        if self.num_training_steps is None and self.num_stable_steps is None:
            raise ValueError(
                f"{self.word}: num_training_steps or num_stable_steps must be set, got neither; the first counts all "
                "phases, the second the plateau alone"
            )
        for name in ("warmup_type", "decay_type"):
            if getattr(self, name) not in _SHAPES:
                raise ValueError(
                    f"{self.word}: {name} must be one of {', '.join(map(repr, _SHAPES))}, got {getattr(self, name)!r}"
                )

    def failure(self) -> Failure | None:
        if self._error_step is None:
            return None
        return Failure(self._error_step, "ValueError", f"let num_warmup_steps={self.num_warmup_steps} be whole")

    def negative_rate(self) -> str | None:
        return f"min_lr_ratio={self.min_lr_ratio}: the rate ends negative; use 0.0" if self.min_lr_ratio < 0 else None

    def oddity(self) -> str | None:
        if self.num_training_steps is not None and self.num_stable_steps is not None:
            return (
                f"num_stable_steps={self.num_stable_steps} is used and num_training_steps={self.num_training_steps} is "
                "not; give one of them"
            )
        if self._stable_steps < 0:
            return (
                f"num_training_steps={self.num_training_steps} is less than num_warmup_steps={self.num_warmup_steps} "
                f"and num_decay_steps={self.num_decay_steps} together: after the warm-up the rate jumps into the "
                f"decay, or past it; shorten them by {-self._stable_steps}"
            )
        if self.num_decay_steps <= 0:
            return f"num_decay_steps={self.num_decay_steps}: the rate drops to its floor at once; use 1 or more"
        if self.decay_type == "cosine" and abs(self.num_cycles) > 0.5 and self.min_lr_ratio != 1:
            return f"num_cycles={self.num_cycles}: the rate rises again inside the decay; use 0.5 for one descent"
        return None

    def factor(self) -> Tree:
        w, s, d = self.num_warmup_steps, self._stable_steps, self.num_decay_steps
        up = self._shaped(self.warmup_type, 0.0, max(1, w), rises=True)
        if self._error_step is not None:
            return phases((up, flat(1.0)), (w,))
        # (t - W) - S, as in the library: the root of what their rounding leaves is no longer small.
        down = Clock(self._shaped(self.decay_type, s, max(1, d), rises=False), addend=-w)
        return phases((up, flat(1.0), down, flat(self.min_lr_ratio)), (w, w + s, w + s + d))

    def _shaped(self, kind: str, origin: float, steps: float, rises: bool) -> Curve:
        r = self.min_lr_ratio
        if kind == "1-sqrt":
            return Curve(
                "power", origin=origin, divisor=steps, complement=rises, p=0.5, offset=1.0, scale=r - 1.0, low=0.0
            )
        curve, p = {"linear": ("power", 1.0), "cosine": ("cosine", 1.0 if rises else 2.0 * self.num_cycles)}[kind]
        # A power grows with u and a cosine falls: each is turned round by 1 - u where it goes the wrong way.
        turned = rises == (kind == "cosine")
        return Curve(curve, origin=origin, divisor=steps, complement=turned, p=p, offset=r, scale=1.0 - r, low=0.0)
