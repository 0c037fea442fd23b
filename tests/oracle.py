"""Adam and AdamW in float64 NumPy: the truth every backend is compared with.

Nothing here is shared with the package: the formulas are those of Kingma and Ba (2015, algorithm 1) and of
Loshchilov and Hutter (2019, algorithm 2), hyperparameters are numbers or plain Python functions of the update
index, and the 16-bit formats are converted by arithmetic on exponents where the package moves bits.

Beside each value an `Oracle` keeps a magnitude: what the value would be if no terms had cancelled. Rounding
errors are proportional to the terms that were added and not to what is left of them, so `tolerances.py`
states its bounds in units of these magnitudes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
Scheduled = float | Callable[[int], float]


@dataclass(frozen=True)
class Format:
    """A binary floating-point format; the hidden digit of the significand counts."""

    digits: int
    min_exponent: int
    max_value: float

    def spacing(self, values: Array) -> Array:
        """Unit in the last place of each value: the distance between its neighbours in this format."""
        _, exponents = np.frexp(np.abs(values))
        exponents = np.where(values == 0.0, self.min_exponent, exponents)
        return np.ldexp(1.0, np.maximum(exponents - 1, self.min_exponent) - (self.digits - 1))

    def round(self, values: Array, ties_away: bool = False) -> Array:
        """The nearest value of this format; ties go to the even neighbour or away from zero."""
        values = np.asarray(values, dtype=np.float64)
        unit = self.spacing(np.where(np.isfinite(values), values, 1.0))
        with np.errstate(invalid="ignore"):
            quotient = values / unit
            whole = np.copysign(np.floor(np.abs(quotient) + 0.5), quotient) if ties_away else np.rint(quotient)
            rounded = whole * unit
        return np.where(np.abs(rounded) > self.max_value, np.copysign(np.inf, rounded), rounded)


FORMATS = {
    "fp64": Format(53, -1022, float(np.finfo(np.float64).max)),
    "fp32": Format(24, -126, float(np.finfo(np.float32).max)),
    "fp16": Format(11, -14, 65504.0),
    "bf16": Format(8, -126, float.fromhex("0x1.fep127")),
}


def decode_codes(codes: npt.NDArray[np.integer], format_name: str) -> Array:
    """Values of 16-bit codes: sign, exponent, fraction, read as IEEE 754 section 3.4 defines them."""
    fmt = FORMATS[format_name]
    fraction_bits = fmt.digits - 1
    exponent_bits = 15 - fraction_bits
    codes = codes.astype(np.int64) & 0xFFFF
    sign = np.where(codes >> 15, -1.0, 1.0)
    exponent = (codes >> fraction_bits) & ((1 << exponent_bits) - 1)
    fraction = codes & ((1 << fraction_bits) - 1)
    significand = np.where(exponent == 0, fraction, fraction + (1 << fraction_bits)).astype(np.float64)
    finite = sign * np.ldexp(significand, np.maximum(exponent, 1) - 1 + fmt.min_exponent - fraction_bits)
    special = np.where(fraction == 0, sign * np.inf, np.nan)
    return np.where(exponent == (1 << exponent_bits) - 1, special, finite)


@dataclass(frozen=True)
class Options:
    """One group's hyperparameters; each of the first four is a number or a function of the update index."""

    lr: Scheduled = 1e-3
    beta1: Scheduled = 0.9
    beta2: Scheduled = 0.999
    weight_decay: Scheduled = 0.0
    eps: float = 1e-8
    decoupled: bool = True
    amsgrad: bool = False
    maximize: bool = False
    grad_divisor: float = 1.0


def value_at(hyperparameter: Scheduled, index: int) -> float:
    return hyperparameter(index) if callable(hyperparameter) else float(hyperparameter)


class Oracle:
    """One parameter's trajectory.

    Without a master, a 16-bit parameter is rounded to nearest-even after each update and the next update
    starts from the rounded value. With one, `weight` is the master and `param` its rounding (ties away from
    zero in bf16). fp32 parameters are not rounded at all: the difference is what the tolerances bound.
    """

    def __init__(self, values: Array, options: Options, format_name: str = "fp64", master: bool = False) -> None:
        self.options = options
        self.format_name = format_name
        self.master = master
        self.weight: Array = np.array(values, dtype=np.float64)
        self.exp_avg = np.zeros_like(self.weight)
        self.exp_avg_sq = np.zeros_like(self.weight)
        self.max_exp_avg_sq = np.zeros_like(self.weight)
        self.step = 0
        self.start_magnitude = np.abs(self.weight)
        self.update_magnitude = np.zeros_like(self.weight)
        self.exp_avg_magnitude = np.zeros_like(self.weight)
        self.exp_avg_sq_magnitude = np.zeros_like(self.weight)
        self.max_exp_avg_sq_magnitude = np.zeros_like(self.weight)

    @property
    def param(self) -> Array:
        """What the parameter's storage holds."""
        if self.format_name in ("fp64", "fp32"):
            return self.weight
        return FORMATS[self.format_name].round(self.weight, ties_away=self.master and self.format_name == "bf16")

    def update(self, grad: Array, index: int | None = None, grad_scale: float = 1.0) -> None:
        """One update; `index` is the schedule clock before it, by default this parameter's count."""
        o = self.options
        index = self.step if index is None else index
        lr, beta1, beta2, decay = (value_at(h, index) for h in (o.lr, o.beta1, o.beta2, o.weight_decay))
        self.step += 1
        bias1 = 1.0 - beta1**self.step
        bias2 = 1.0 - beta2**self.step

        g = np.asarray(grad, dtype=np.float64) / (grad_scale * o.grad_divisor)
        g = -g if o.maximize else g
        g_magnitude = np.abs(g)
        weight = self.weight
        if o.decoupled:
            weight = weight - lr * decay * weight
        else:
            g = g + decay * self.weight
            g_magnitude = g_magnitude + abs(decay) * np.abs(self.weight)

        self.exp_avg = beta1 * self.exp_avg + (1.0 - beta1) * g
        self.exp_avg_sq = beta2 * self.exp_avg_sq + (1.0 - beta2) * g * g
        self.exp_avg_magnitude = beta1 * self.exp_avg_magnitude + (1.0 - beta1) * g_magnitude
        self.exp_avg_sq_magnitude = beta2 * self.exp_avg_sq_magnitude + (1.0 - beta2) * g_magnitude**2
        second, second_magnitude = self.exp_avg_sq, self.exp_avg_sq_magnitude
        if o.amsgrad:
            second = self.max_exp_avg_sq = np.maximum(self.max_exp_avg_sq, second)
            second_magnitude = self.max_exp_avg_sq_magnitude = np.maximum(
                self.max_exp_avg_sq_magnitude, second_magnitude
            )
        denominator = np.sqrt(second / bias2) + o.eps
        with np.errstate(divide="ignore", invalid="ignore"):
            weight = weight - lr / bias1 * self.exp_avg / denominator
            # A relative error of v enters the update through the denominator, so the excess of v's magnitude
            # over v widens the update's.
            widening = np.where(second > 0.0, second_magnitude / np.where(second > 0.0, second, 1.0), 1.0)
            update = abs(lr) / bias1 * self.exp_avg_magnitude / denominator * widening
        self.update_magnitude = self.update_magnitude + np.where(np.isfinite(update), update, 0.0)
        self.weight = weight
        if self.format_name in ("fp16", "bf16") and not self.master:
            self.weight = FORMATS[self.format_name].round(weight)
