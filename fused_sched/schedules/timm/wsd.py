"""timm's warm-up, stable phase and decay."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass, replace

from ...program import Clamp, Curve, Product, Tree
from ..nodes import falling, flat, half_cosine, phases
from .base import TimmSchedule

_STABLE = ("constant", "rsqrt", "power")
_DECAYS = ("linear", "1-sqrt", "cosine", "power", "exp")


def _names(words: tuple[str, ...]) -> str:
    return ", ".join(map(repr, words))


@dataclass(frozen=True, repr=False)
class WSDLRScheduler(TimmSchedule):
    """timm's warm-up, stable phase and decay: `f = lr_min + (max(base_lr * g(x), lr_min) - lr_min) * h(u)`.

    x = t - warmup_t; u is 0 until x = t_initial - decay_t, then rises to 1 at x = t_initial. g: 1 for stable_fn
    "constant", (1 + x / stable_timescale)^-0.5 for "rsqrt" and ^-stable_power for "power". h(u): 1 - u for decay_fn
    "linear", 1 - sqrt(u) for "1-sqrt", (1 + cos(pi * u)) / 2 for "cosine", 1 - u^decay_power for "power",
    (r^u - r) / (1 - r) with r = decay_ratio for "exp".

    t_initial: length of the stable phase and the decay together. decay_t: that of the decay. lr_min: last rate.
    stable_timescale: in the units of t, by default warmup_t. The others: `fused_sched.schedules.timm`; the warm-up is
    always a prefix. A callable decay_fn cannot be a formula: tabulate it with from_callable.
    ValueError for t_initial <= 0, decay_t outside (0, t_initial], lr_min < 0, decay_ratio outside (0, 1), an unknown
    stable_fn or decay_fn, an exponent that is not positive, or no positive stable_timescale where it is needed.

    >>> timm.WSDLRScheduler(100, 40, decay_fn="linear", t_in_epochs=False, base_lr=1.0)([0, 60, 80, 100]).tolist()
    [1.0, 1.0, 0.5, 0.0]

    Source: timm 1.0.31, scheduler/wsd_lr.py.
    """

    refusal = ValueError

    t_initial: int
    decay_t: int
    lr_min: float = 0.0
    stable_fn: str = "constant"
    stable_timescale: int | None = None
    stable_power: float = 0.5
    decay_fn: str = "1-sqrt"
    decay_power: float = 0.5
    decay_ratio: float = 0.1
    warmup_t: int = 0
    warmup_lr_init: float = 0.0
    t_in_epochs: bool = True
    noise_range_t: None = None
    noise_pct: float = 0.67
    noise_std: float = 1.0
    noise_seed: int = 42
    initialize: bool = True
    _: KW_ONLY
    base_lr: float
    updates_per_epoch: int | None = None

    @property
    def decay_begin(self) -> float:
        return self.warmup_t

    @property
    def _timescale(self) -> float:
        return self.warmup_t if self.stable_timescale is None else self.stable_timescale

    def check_arguments(self) -> None:
        self.make_plain("t_initial", "decay_t", "lr_min")
        self.make_plain("stable_timescale", "stable_power", "decay_power", "decay_ratio")
        if callable(self.decay_fn):
            raise ValueError(
                f"{self.word}: decay_fn must be one of {_names(_DECAYS)}, got {self.decay_fn!r}; tabulate its own "
                "rates with from_callable(function, num_steps)"
            )
        decay_rule = f"decay_t must be in (0, t_initial={self.t_initial}]"
        ratio = "pass a fraction of the stable rate"
        self.require(self.t_initial > 0, "t_initial must be more than 0", "t_initial", "pass the length after warm-up")
        self.require(0 < self.decay_t <= self.t_initial, decay_rule, "decay_t", "t_initial counts the decay as well")
        self.require(self.lr_min >= 0.0, "lr_min must be at least 0", "lr_min", "pass the last rate")
        self.require(self.stable_fn in _STABLE, f"stable_fn must be one of {_names(_STABLE)}", "stable_fn", "pass one")
        self.require(self.decay_fn in _DECAYS, f"decay_fn must be one of {_names(_DECAYS)}", "decay_fn", "pass one")
        self.require(0.0 < self.decay_ratio < 1.0, "decay_ratio must be in (0, 1)", "decay_ratio", ratio)
        self.require(self.decay_power > 0.0, "decay_power must be more than 0", "decay_power", "1.0 is linear")
        self.require(self.stable_power > 0.0, "stable_power must be more than 0", "stable_power", "0.5 is rsqrt")
        if self.stable_fn != "constant" and self._timescale <= 0:
            raise ValueError(
                f"{self.word}: stable_timescale must be more than 0 with stable_fn={self.stable_fn!r}, got "
                f"{self._timescale!r}; pass one where there is no warm-up, whose length is the default"
            )

    def odd_decay(self) -> str | None:
        if self.base_lr < self.lr_min:
            return f"base_lr={self.base_lr!r} is below lr_min={self.lr_min!r}, to which the rate rises; lower lr_min"
        return None

    def decay(self) -> Tree:
        begin, length, low = self.t_initial - self.decay_t, self.decay_t, self.lr_min
        factor = {
            "linear": falling(1.0, 0.0, length, begin),
            "1-sqrt": Curve("power", origin=begin, divisor=length, p=0.5, offset=1.0, scale=-1.0),
            "cosine": half_cosine(1.0, 0.0, length, begin),
            "power": Curve("power", origin=begin, divisor=length, p=self.decay_power, offset=1.0, scale=-1.0),
            "exp": self._exponential(begin, length),
        }[self.decay_fn]
        if self.stable_fn == "constant":
            top = max(self.base_lr, low)
            stable: Tree = flat(top)
            decay: Tree = replace(factor, offset=low + (top - low) * factor.offset, scale=(top - low) * factor.scale)
        else:
            p, scale = 0.5 if self.stable_fn == "rsqrt" else self.stable_power, self._timescale
            curve = Curve("power", origin=-scale, divisor=scale, p=-p, scale=self.base_lr, low=low)
            stable = curve
            decay = Clamp(Product((replace(curve, offset=-low, low=0.0), factor)), offset=low)
        return phases((stable, decay, flat(low)), (begin, self.t_initial))

    def _exponential(self, begin: float, length: float) -> Curve:
        r = self.decay_ratio
        return Curve("exponential", origin=begin, divisor=length, p=r, offset=-r / (1.0 - r), scale=1.0 / (1.0 - r))
