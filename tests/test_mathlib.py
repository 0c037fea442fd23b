"""The core's own cos, exp, log, pow and tanh against mpmath, with bounds in units in the last place."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pytest
from core_library import FloatArray, core
from mpmath import mp, mpf

PRECISION_BITS = 160  # 10^6 periods and 53 bits of result leave more than 80
random = np.random.default_rng(20240601)


def worst_ulps(got: FloatArray, exact: Iterable[object]) -> float:
    """The largest error in units in the last place of the result."""
    errors = [abs(mpf(float(g)) - e) / mpf(float(np.spacing(abs(g)))) for g, e in zip(got, exact, strict=True)]
    return float(max(errors))


def exact(function: Callable[[object], object], x: FloatArray) -> list[object]:
    with mp.workprec(PRECISION_BITS):
        return [function(mpf(float(v))) for v in x]


def log_uniform(low: float, high: float, count: int) -> FloatArray:
    return 10.0 ** random.uniform(low, high, count)


# name, mpmath's function, arguments, bound in ulps. The bounds are what mathlib.h promises.
UNARY = [
    ("cos_pi", lambda x: mp.cos(mp.pi * x), random.uniform(-3, 3, 4000), 1.0),
    ("cos_pi", lambda x: mp.cos(mp.pi * x), random.uniform(-1e6, 1e6, 2000), 1.0),
    ("cos_pi", lambda x: mp.cos(mp.pi * x), log_uniform(-20, 0, 1000), 1.0),
    ("cos_pi", lambda x: mp.cos(mp.pi * x), 0.5 - log_uniform(-12, -1, 1000), 1.0),
    ("exponential", mp.exp, random.uniform(-1, 1, 3000), 0.7),
    ("exponential", mp.exp, random.uniform(-708, 709.7, 3000), 0.7),
    ("exponential", mp.exp, log_uniform(-18, 0, 1000), 0.7),
    ("logarithm", mp.log, random.uniform(0.5, 2, 3000), 0.7),
    ("logarithm", mp.log, log_uniform(-320, 308, 3000), 0.7),
    ("logarithm", mp.log, 1.0 + random.uniform(-1e-5, 1e-5, 1000), 0.7),
    ("hyperbolic_tangent", mp.tanh, random.uniform(-3, 3, 3000), 3.0),
    ("hyperbolic_tangent", mp.tanh, log_uniform(-12, 1.4, 3000), 3.0),
]


@pytest.mark.parametrize(("name", "function", "x", "bound"), UNARY)
def test_unary_functions_are_within_their_ulps(
    name: str, function: Callable[[object], object], x: FloatArray, bound: float
) -> None:
    assert worst_ulps(core().unary(name, x), exact(function, x)) <= bound


@pytest.mark.parametrize(
    ("x", "y"),
    [
        (random.uniform(0.5, 1.5, 4000), random.uniform(-1000, 1000, 4000)),
        (log_uniform(-300, 300, 3000), random.uniform(-1, 1, 3000)),
        (random.uniform(0.9, 1, 3000), random.integers(1, 6000, 3000).astype(float)),
        (1.0 - log_uniform(-9, -3, 2000), log_uniform(0, 5.5, 2000)),  # beta^t of long runs
        (random.uniform(1.3, 1.4142, 2000), random.uniform(1500, 2000, 2000)),  # the logarithm's largest error
    ],
)
def test_power_is_within_its_ulps(x: FloatArray, y: FloatArray) -> None:
    with mp.workprec(PRECISION_BITS):
        expected = [mpf(float(a)) ** mpf(float(b)) for a, b in zip(x, y, strict=True)]
    kept = [i for i, e in enumerate(expected) if mpf("1e-307") < e < mpf("1e308")]
    assert len(kept) > len(x) // 2
    assert worst_ulps(core().power(x[kept], y[kept]), [expected[i] for i in kept]) <= 0.7


def test_exact_powers_are_exact() -> None:
    bases, exponents = np.meshgrid(np.arange(1, 60), np.arange(0, 40))
    representable = [(b, e) for b, e in zip(bases.flat, exponents.flat, strict=True) if int(b) ** int(e) < 2**53]
    x, y = np.array(representable, dtype=float).T
    assert core().power(x, y).tolist() == [float(int(b) ** int(e)) for b, e in representable]
    halves = np.arange(-1023, 1075)
    assert core().power(0.5, halves).tolist() == [math.ldexp(1.0, -int(n)) for n in halves]


def test_powers_of_square_numbers_and_their_roots_agree() -> None:
    n = np.arange(1.0, 3000.0)
    assert core().power(n * n, 0.5).tolist() == n.tolist()
    assert core().power(n, 1.0).tolist() == n.tolist()


SPECIAL = [0.0, -0.0, 1.0, -1.0, 2.0, -2.0, 0.5, -0.5, 3.0, -3.0, 2.5, -2.5, 1e300, -1e300, 5e-324, math.inf]
SPECIAL += [-math.inf, math.nan, 2.0**53, 2.0**53 + 2, -(2.0**53)]


def test_special_powers_are_those_of_c99() -> None:
    x, y = (a.ravel() for a in np.meshgrid(SPECIAL, SPECIAL))
    with np.errstate(all="ignore"):
        expected = np.power(x, y)
    got = core().power(x, y)
    np.testing.assert_allclose(got, expected, rtol=4.5e-16)  # two ulp: NumPy's own is not correctly rounded
    number = ~np.isnan(expected)
    assert np.signbit(got[number]).tolist() == np.signbit(expected[number]).tolist()


@pytest.mark.parametrize(
    ("name", "x", "expected"),
    [
        ("cos_pi", [0.0, 0.5, 1.0, 1.5, 2.0, -0.5, 2.0**60], [1.0, 0.0, -1.0, 0.0, 1.0, 0.0, 1.0]),
        ("cos_pi", [1e15 + 0.5, 1e15 + 1, math.inf, math.nan], [0.0, -1.0, math.nan, math.nan]),
        ("exponential", [0.0, 1000.0, -1000.0, math.inf, -math.inf], [1.0, math.inf, 0.0, math.inf, 0.0]),
        ("exponential", [math.nan, 1e-300, -745.13], [math.nan, 1.0, 5e-324]),
        ("logarithm", [1.0, 0.0, -1.0, math.inf, math.nan], [0.0, -math.inf, math.nan, math.inf, math.nan]),
        ("logarithm", [5e-324], [math.log(5e-324)]),
        ("hyperbolic_tangent", [0.0, 30.0, -30.0, math.inf, -math.inf], [0.0, 1.0, -1.0, 1.0, -1.0]),
        ("hyperbolic_tangent", [1e-300, math.nan], [1e-300, math.nan]),
    ],
)
def test_special_arguments(name: str, x: list[float], expected: list[float]) -> None:
    np.testing.assert_array_equal(core().unary(name, x), expected)


def test_cosines_stay_in_range_and_are_even() -> None:
    x = np.concatenate([random.uniform(0, 4, 20000), log_uniform(-10, 0, 2000), 1.0 - log_uniform(-10, 0, 2000)])
    y = core().unary("cos_pi", x)
    assert np.abs(y).max() <= 1.0
    assert y.tolist() == core().unary("cos_pi", -x).tolist()


def test_instruction_set_does_not_change_the_bits() -> None:
    """A fused multiply-add in hardware and the C library's one round alike, and nothing else is contracted."""
    if " fma " not in Path("/proc/cpuinfo").read_text():
        pytest.skip("this machine has no fused multiply-add to compare with")
    fused = core("-mavx2", "-mfma", "-O3")
    x, y = random.uniform(0, 2, 20000), random.uniform(-300, 300, 20000)
    assert core().power(x, y).tobytes() == fused.power(x, y).tobytes()
    for name in ("cos_pi", "exponential", "logarithm", "hyperbolic_tangent"):
        assert core().unary(name, y if name != "logarithm" else x).tobytes() == (
            fused.unary(name, y if name != "logarithm" else x).tobytes()
        )
