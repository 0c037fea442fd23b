"""Schedules of Megatron-LM under their own names."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass
from math import floor

from ..program import Clamp, Clock, Curve, Tree
from . import checks
from .base import set_fields
from .library import Failure, LibrarySchedule
from .nodes import after, falling, flat, half_cosine, held, line, phases


class MegatronSchedule(LibrarySchedule, library="megatron", abstract=True):
    """A schedule of Megatron-LM."""


#: lr_decay_style
_STYLES = ("constant", "linear", "cosine", "inverse-square-root", "WSD")

#: lr_wsd_decay_style: from max_lr to min_lr in `steps` steps from `start` on.
_ANNEALS: dict[str, Callable[[float, float, float, float], Curve]] = {
    "linear": falling,
    "cosine": half_cosine,
    "exponential": lambda top, bottom, steps, start: Curve(
        "exponential", origin=start, divisor=steps, p=0.5, offset=2.0 * bottom - top, scale=2.0 * (top - bottom)
    ),
    "minus_sqrt": lambda top, bottom, steps, start: Curve(
        "power", origin=start, divisor=steps, p=0.5, offset=top, scale=bottom - top
    ),
}

#: wd_incr_style
_INCREASES = ("constant", "linear", "cosine")


@dataclass(frozen=True, repr=False)
class OptimizerParamScheduler(MegatronSchedule):
    """Megatron-LM's schedule of rate and weight decay, on a clock of samples: `n = t * increment` at update t.

    With W = lr_warmup_steps, D = lr_decay_steps, u = (n - W) / (D - W), A = wsd_decay_steps, v = (n - D + A) / A:

        n <= W, if W > 0        init_lr + (max_lr - init_lr) * n / W
        then, by lr_decay_style
        constant                max_lr, for good; the others end in min_lr for n > D
        linear, cosine          min_lr + (max_lr - min_lr) * s,  s = 1 - u  or  (1 + cos(pi * u)) / 2
        inverse-square-root     max(min_lr, max_lr * sqrt(max(W, 1) / max(n, 1)))
        WSD                     max_lr for n <= D - A, then min_lr + (max_lr - min_lr) * s by lr_wsd_decay_style:
                                linear 1 - v, cosine (1 + cos(pi * v)) / 2, exponential 2 * 0.5^v - 1,
                                minus_sqrt 1 - sqrt(v)

    `companions["weight_decay"]` is its weight decay: start_wd + (end_wd - start_wd) * s for n <= N = wd_incr_steps with
    s = n / N (linear) or (1 + cos(pi * (1 - n / N))) / 2 (cosine), end_wd afterwards and with "constant".

    init_lr, max_lr, min_lr: rates; start_wd, end_wd: weight decays. The *_steps are in the units of increment: samples
    in Megatron-LM's own training loop (and may be fractions). use_checkpoint_opt_param_scheduler,
    override_opt_param_scheduler: only checked as there. increment: samples per update, what the loop gives to `step`;
    1 counts updates. wd_mult: the group's factor of the weight decay. lr_mult: that of the rate, in Megatron-Core 0.14
    and before. For a param group with a max_lr, min_lr, start_wd or end_wd of its own give that one here. Where the
    batch size ramps up, tabulate the rates with from_callable.

    Raises what the constructor raises: AssertionError where rates, decays or steps are out of order, a style without
    its options, or start_wd != end_wd with "constant"; ZeroDivisionError for wd_incr_steps=0 with another style;
    Exception for an unknown wd_incr_style, and for an unknown lr_decay_style without warm-up. After a warm-up the
    training loop is what fails: the rate is then held at its last value, and a ScheduleWarning says from when.

    >>> schedule = megatron.OptimizerParamScheduler(
    ...     init_lr=0.0, max_lr=1.0, min_lr=0.125, lr_warmup_steps=64, lr_decay_steps=320, lr_decay_style="linear",
    ...     start_wd=0.0, end_wd=0.5, wd_incr_steps=320, wd_incr_style="linear", increment=32)
    >>> schedule([0, 1, 2, 6, 10, 11]).tolist()
    [0.0, 0.5, 1.0, 0.5625, 0.125, 0.125]
    >>> schedule.companions["weight_decay"]([0, 5, 10, 11]).tolist()
    [0.0, 0.25, 0.5, 0.5]

    Source: Megatron-LM d98e8a64, megatron/core/optimizer_param_scheduler.py.
    """

    init_lr: float
    max_lr: float
    min_lr: float
    lr_warmup_steps: int
    lr_decay_steps: int
    lr_decay_style: str
    start_wd: float
    end_wd: float
    wd_incr_steps: int
    wd_incr_style: str
    use_checkpoint_opt_param_scheduler: bool | None = True
    override_opt_param_scheduler: bool | None = False
    wsd_decay_steps: int | None = None
    lr_wsd_decay_style: str | None = None
    _: KW_ONLY
    increment: int = 1
    wd_mult: float = 1.0
    lr_mult: float = 1.0

    def check(self) -> None:
        set_fields(self, increment=checks.step_count(self.word, "increment", self.increment))
        self.make_plain()
        self._check_arguments()
        # What step(0) in the constructor meets: first the rate, then the weight decay.
        error = self._error()
        if error is not None and self.lr_warmup_steps <= 0 and error[0] < 0:
            raise error[1]
        if self.wd_incr_steps >= 0:
            self._check_weight_decay()

    def _check_arguments(self) -> None:
        uses_checkpoint = not self.override_opt_param_scheduler or not self.use_checkpoint_opt_param_scheduler
        has_anneal = self.lr_decay_style != "WSD" or self.wsd_decay_steps is not None
        self._assert(self.min_lr >= 0, "min_lr must be at least 0", "pass 0.0 for a rate that ends there", "min_lr")
        self._assert(self.max_lr >= self.min_lr, "max_lr must be at least min_lr", "swap them", "max_lr", "min_lr")
        self._assert(self.init_lr <= self.max_lr, "init_lr must be at most max_lr", "lower it", "init_lr", "max_lr")
        self._assert(self.lr_decay_steps > 0, "lr_decay_steps must be more than 0", "pass a length", "lr_decay_steps")
        self._assert(
            self.lr_warmup_steps < self.lr_decay_steps,
            "lr_warmup_steps must be less than lr_decay_steps",
            "lr_decay_steps counts the warm-up as well",
            "lr_warmup_steps",
            "lr_decay_steps",
        )
        self._assert(has_anneal, '"WSD" needs wsd_decay_steps', "pass the length of its anneal", "wsd_decay_steps")
        self._assert(self.start_wd >= 0, "start_wd must be at least 0", "pass 0.0 for none", "start_wd")
        self._assert(
            self.end_wd >= self.start_wd, "end_wd must not be below start_wd", "swap them", "end_wd", "start_wd"
        )
        self._assert(
            uses_checkpoint,
            "override_opt_param_scheduler needs use_checkpoint_opt_param_scheduler=False",
            "both are set: pass only one of them",
            "override_opt_param_scheduler",
            "use_checkpoint_opt_param_scheduler",
        )

    def _check_weight_decay(self) -> None:
        if self.wd_incr_style == "constant":
            rule = 'wd_incr_style "constant" needs start_wd == end_wd'
            self._assert(self.start_wd == self.end_wd, rule, 'pass "linear" or "cosine"', "start_wd", "end_wd")
        elif self.wd_incr_steps == 0:
            raise ZeroDivisionError(
                f"{self.word}: wd_incr_steps must not be 0 with wd_incr_style={self.wd_incr_style!r}, got 0; pass the "
                'length of the training, or "constant" with start_wd == end_wd'
            )
        elif self.wd_incr_style not in _INCREASES:
            raise Exception(
                f"{self.word}: wd_incr_style must be one of {', '.join(map(repr, _INCREASES))}, got "
                f"{self.wd_incr_style!r}; pass one of them"
            )

    def _assert(self, holds: bool, rule: str, remedy: str, *names: str) -> None:
        if not holds:
            got = " and ".join(f"{name}={getattr(self, name)!r}" for name in names)
            raise AssertionError(f"{self.word}: {rule}, got {got}; {remedy}")

    @property
    def _anneal_start(self) -> float:
        return self.lr_decay_steps - (self.wsd_decay_steps or 0)

    def _error(self) -> tuple[float, Exception] | None:
        """What Megatron-LM raises for n <= lr_decay_steps past the warm-up and past this n; None where it does not."""
        if self.lr_decay_style not in _STYLES:
            return -1.0, Exception(
                f"{self.word}: lr_decay_style must be one of {', '.join(map(repr, _STYLES))}, got "
                f"{self.lr_decay_style!r}; pass one of them"
            )
        if self.lr_decay_style == "WSD" and self.lr_wsd_decay_style not in _ANNEALS:
            return self._anneal_start, AssertionError(
                f"{self.word}: lr_wsd_decay_style must be one of {', '.join(map(repr, _ANNEALS))} with lr_decay_style "
                f'"WSD", got {self.lr_wsd_decay_style!r}; pass one of them'
            )
        return None

    def failure(self) -> Failure | None:
        error = self._error()
        if error is None:
            return None
        begin = max(error[0], self.lr_warmup_steps if self.lr_warmup_steps > 0 else -1.0)
        update = floor(begin / self.increment) + 1
        if update * self.increment > self.lr_decay_steps:
            return None
        style = "lr_wsd_decay_style" if self.lr_decay_style == "WSD" else "lr_decay_style"
        unknown = f"{type(error[1]).__name__}, as {style}={getattr(self, style)!r} is unknown,"
        return Failure(update, unknown, "pass a style that it has")

    def negative_rate(self) -> str | None:
        if self.init_lr * self.lr_mult < 0.0 and self.lr_warmup_steps > 0:
            return f"the rate is negative at first, as init_lr={self.init_lr!r} is; pass 0.0 or more"
        return None

    def oddity(self) -> str | None:
        if self.failure() is not None:
            return None  # which is more than odd
        if self.lr_decay_style == "inverse-square-root" and self.lr_warmup_steps <= 0:
            return (
                "without warm-up the inverse square root falls from max_lr at update 0 to max_lr / sqrt(increment) at "
                "update 1; set lr_warmup_steps"
            )
        if self.lr_decay_style == "WSD":
            return self._odd_anneal()
        return None

    def _odd_anneal(self) -> str | None:
        assert self.wsd_decay_steps is not None  # check has raised
        if self.wsd_decay_steps <= 0:
            return (
                f"wsd_decay_steps={self.wsd_decay_steps!r} leaves no anneal: the rate jumps from max_lr to min_lr "
                "after lr_decay_steps; pass the length of the anneal"
            )
        if self._anneal_start < max(0.0, self.lr_warmup_steps):
            return (
                f"the anneal starts at {self._anneal_start!r}, before the end of the warm-up at "
                f"{self.lr_warmup_steps!r}, and the rate jumps down there; shorten wsd_decay_steps or lr_warmup_steps"
            )
        return None

    def lower(self) -> Tree:
        tree = self._rate()
        failure = self.failure()
        if failure is not None:
            last = held(tree, (failure.update - 1) * self.increment)
            tree = phases((tree, last), (failure.update * self.increment,))
        return self._per_update(tree if self.lr_mult == 1.0 else Clamp(tree, scale=self.lr_mult))

    def _rate(self) -> Tree:
        """The rate after n samples."""
        warmup, end, top, bottom = self.lr_warmup_steps, self.lr_decay_steps, self.max_lr, self.min_lr
        parts: list[tuple[Tree, float]] = []  # with the last step of each
        if warmup > 0:
            parts.append((line(self.init_lr, top, warmup), warmup))
        match self.lr_decay_style:
            case "linear":
                parts.append((falling(top, bottom, end - warmup, warmup), end))
            case "cosine":
                parts.append((half_cosine(top, bottom, end - warmup, warmup), end))
            case "inverse-square-root":
                parts.append((flat(top), 0.0))
                parts.append((Curve("power", divisor=max(warmup, 1.0), p=-0.5, scale=top, low=bottom), end))
            case "WSD":
                parts.append((flat(top), min(self._anneal_start, end)))
                anneal = _ANNEALS.get(self.lr_wsd_decay_style or "")
                if anneal is not None and self.wsd_decay_steps:
                    parts.append((anneal(top, bottom, self.wsd_decay_steps, self._anneal_start), end))
        held = top if self.lr_decay_style == "constant" else bottom
        return phases([*(tree for tree, _ in parts), flat(held)], [after(last) for _, last in parts])

    def lower_companions(self) -> dict[str, Tree]:
        start, end, steps = self.start_wd * self.wd_mult, self.end_wd * self.wd_mult, self.wd_incr_steps
        increases = {"linear": line(start, end, steps), "cosine": half_cosine(end, start, -steps, steps)}
        increase = increases.get(self.wd_incr_style)
        if increase is None or steps <= 0:
            return {"weight_decay": flat(end)}
        return {"weight_decay": self._per_update(phases((increase, flat(end)), (after(steps),)))}

    def _per_update(self, tree: Tree) -> Tree:
        return tree if self.increment == 1 else Clock(tree, multiplier=float(self.increment))
