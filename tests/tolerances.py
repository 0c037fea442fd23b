"""How far a backend may be from the oracle, and a schedule from its library, and why.

Bounds are in units of u = 2^-p, half the spacing at 1 of the format computed in (2^-24 for float32, 2^-53 for
float64), times the magnitudes the oracle keeps (`oracle.py`: the value had no term cancelled). Each operation
rounds once and adds at most one u of its result; n is the number of updates. What roundings could add up to
at worst, and what is allowed, which is three times the most that the cases measured on any backend:

exp_avg, M_m: at worst 8 per update: the rounding of the distance g - m and of its rate, (1-beta1)(2|g| + 2|m|),
    the gradient's own 3 (1-beta1)|g| (factor, product, L2 decay), and that of the sum, where (1-beta1)|g| and,
    in the form that is used, (1-beta1)|m| are at most M_m. Errors shrink no slower than M_m does, so n updates
    add up to 8n. Measured 0.53n, allowed 2n.
exp_avg_sq, M_v: at worst 12n: the same with the gradient's relative error doubled and its product rounded once
    more. Measured 0.97n, allowed 3n.
param and master, |w0| and U, the sum of the updates' magnitudes: at worst 3n (|w0| + U), the decay's rate, the
    decay and the update rounding once each, and (14n + 5) U, each update carrying the errors of exp_avg (8n),
    half those of exp_avg_sq (6n), and of the step size, root, bias correction, denominator and quotient (5).
    Measured 0.96n of the first, allowed 3n; the second is allowed what the moments are: (2 + 3/2) n + 5.

A wrong formula misses by 1e-3 or more, thousands of times the bound.

16-bit parameters: state is float32, so is its bound. Beside a master, the parameter is the master's rounding,
and a master within its bound of the oracle's rounds to the same value or to its neighbour: 1 spacing. Without
one, each update may cross a tie once: 1 spacing again, because the cases are short enough for two crossings
in one element not to happen. Measured: 1 of 565 elements crosses at all; allowed: 1 in 100.
"""

from __future__ import annotations

import numpy as np
from oracle import FORMATS, Array, Oracle

UNIT_ROUNDOFF = {"fp32": 2.0**-24, "fp64": 2.0**-53}

# Units of u per update, times the quantity's magnitude.
STATE_UNITS = {"exp_avg": 2, "exp_avg_sq": 3, "max_exp_avg_sq": 3}
WEIGHT_UNITS_PER_UPDATE = 3
UPDATE_UNITS_PER_UPDATE = 3.5
UPDATE_UNITS_ONCE = 5

CROSSING_SHARE = 0.01


def state_bound(oracle: Oracle, quantity: str) -> Array:
    """Bound on |actual - oracle| for one of the moments."""
    u = UNIT_ROUNDOFF["fp64" if oracle.format_name == "fp64" else "fp32"]
    magnitude: Array = getattr(oracle, f"{quantity}_magnitude")
    # A float32 below its normal range is off by up to its smallest spacing, not in proportion.
    return STATE_UNITS[quantity] * oracle.step * u * magnitude + float(np.finfo(np.float32).tiny) * 2.0**-20


def weight_bound(oracle: Oracle) -> Array:
    """Bound on |actual - oracle| for an fp32 or fp64 parameter, or for an fp32 master."""
    u = UNIT_ROUNDOFF["fp64" if oracle.format_name == "fp64" else "fp32"]
    n = oracle.step
    weight_units = WEIGHT_UNITS_PER_UPDATE * n
    update_units = weight_units + UPDATE_UNITS_PER_UPDATE * n + UPDATE_UNITS_ONCE
    return u * (weight_units * oracle.start_magnitude + update_units * oracle.update_magnitude)


def param_bound(oracle: Oracle) -> Array:
    """Bound on |actual - oracle| for what the parameter's storage holds."""
    if oracle.format_name in UNIT_ROUNDOFF:
        return weight_bound(oracle)
    return FORMATS[oracle.format_name].spacing(oracle.param)


# Schedules: of the largest value compared.

# Ours and a library's formula, or one of the tests', are rounded in another order, by a few units of 1.1e-16 each:
# as a rule ten and, in DeepSpeed's OneCycle, (F + S) / S of them, at most 60 in the tests; in timm the root of 1 - u
# loses 1e-16 * sqrt(length) at the end of a cycle, 4e-14 for the longest ones there.
ROUNDING = 1e-13

# torch multiplies step by step, and by 1e5 steps has drifted by up to 5e-13 from LinearLR's closed form and by up to
# 8e-13 from CosineAnnealingLR's of some periods.
TORCH_DRIFT = 4e-12

# CosineAnnealingLR over 1e5 steps, by (T_max, eta_min), where that is more. cos(math.pi * t / T) has lost the digits of
# math.pi * t / T by then: measured 3.5e-11 and 4.5e-11. The last one rises from lr - eta_min, which at its first step
# is 3e-9 of the rate: measured 2.7e-10.
TORCH_COSINE_DRIFT = {(10, 0.0): 1e-10, (1000, 0.0): 1e-10, (30_000, 1e-4): 1e-9}

# Of each value, where torch's recursion has taken a few dozen steps: some 1e-16 per step, and 1e-15 where it ends at 0.
FEW_STEPS = {"rel": 1e-12, "abs": 1e-15}

# Of each value where a rate is kept in a float32 tensor: 6e-8 per step.
FLOAT32_RATE = 1e-6


def library_tolerance(library: str) -> float:
    """Of the largest value: how far a library's own run may be from its schedule here."""
    return TORCH_DRIFT if library == "torch" else ROUNDING


def evaluators_bound(values: Array) -> float:
    """Between the compiled evaluator and Python's: each has a cos, pow and log of its own, off by an ulp at most."""
    return 2.0 * float(np.spacing(np.abs(values).max()))
