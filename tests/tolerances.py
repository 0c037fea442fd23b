"""How far a backend may be from the oracle, and why.

Bounds are in units of u = 2^-p, half the spacing at 1 of the format computed in (2^-24 for float32, 2^-53 for
float64), times the magnitudes the oracle keeps (`oracle.py`: the value had no term cancelled). Each operation
rounds once and adds at most one u of its result. n is the number of updates.

Gradient, M_g: unscaling costs 2 (the factor, the product), L2 decay 1 more: 3.
exp_avg, M_m: each update adds the rounding of the distance g - m and of its rate, (1-beta1) * (2|g| + 2|m|),
    the gradient's own 3 * (1-beta1)|g|, and one rounding of the sum: at most 2 + 3 + 2 + 1 = 8 M_m, because
    (1-beta1)|g| <= M_m and the other form of the average keeps (1-beta1)|m| <= M_m. Errors shrink no slower than
    M_m does, so n updates add up to 8n.
exp_avg_sq, M_v: the same with the gradient squared (6 instead of 3) and its product rounded once more where the
    average starts from the gradient: 12n.
param: each update rounds the weight twice (decay and update), 2n of |w0| + U, where U is the sum of the updates'
    magnitudes; each update carries the errors of exp_avg (8n), half those of exp_avg_sq (6n), and of the step
    size, root, root's bias correction, denominator and quotient (5): (14n + 5) U, and 1n for lr * weight_decay.
The worst case is what is allowed: the cases measure at most a third of it, and a wrong formula misses by 1e-3
or more, thousands of times the bound.

16-bit parameters: state is float32, so is its bound. Beside a master, the parameter is the master's rounding,
and a master within its bound of the oracle's rounds to the same value or to its neighbour: 1 spacing. Without
one, each update may cross a tie once: 1 spacing again, because the cases are short enough for two crossings in
one element not to happen (measured: fewer than 1 element in 100 crosses at all, `CROSSING_SHARE`).
"""

from __future__ import annotations

import numpy as np
from oracle import FORMATS, Array, Oracle

UNIT_ROUNDOFF = {"fp32": 2.0**-24, "fp64": 2.0**-53}

# quantity: (units per update, units once)
STATE_UNITS = {"exp_avg": 8, "exp_avg_sq": 12, "max_exp_avg_sq": 12}
WEIGHT_UNITS_PER_UPDATE = 3
UPDATE_UNITS_PER_UPDATE = 14
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
