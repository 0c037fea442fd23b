"""Details of programs that other libraries' values depend on: inclusive ends, powers of a clock, rounded saw teeth."""

from __future__ import annotations

import math

import numpy as np
from core_library import core
from tolerances import ROUNDING

from fused_sched.program import Curve, Repeat, Sum, pack
from fused_sched.schedules.nodes import after, flat, line, phases


def test_an_inclusive_end_needs_the_next_double() -> None:
    """Megatron's warm-up takes t <= W; with W itself as the end, its last step would fall into the decay."""
    closed = phases([line(0.0, 1.0, 10.0), flat(0.25)], [after(10.0)])
    half_open = phases([line(0.0, 1.0, 10.0), flat(0.25)], [10.0])
    assert core().evaluate(pack(closed), [9.0, 10.0, 11.0]).tolist() == [0.9, 1.0, 0.25]
    assert core().evaluate(pack(half_open), [9.0, 10.0, 11.0]).tolist() == [0.9, 0.25, 0.25]


def test_timm_k_decay_and_falling_cycles() -> None:
    """timm's cosine: (u^k inside the cosine, a floor that does not fall with the peaks), all cycles growing."""
    lr, floor, period, growth, decay, k = 0.1, 0.01, 20, 2, 0.5, 1.7
    shape = Curve("cosine", divisor=period, exponent=k)
    peaks = Repeat(Curve(**{**vars(shape), "scale": lr}), period=period, growth=growth, gain=decay)
    floors = Repeat(Curve(**{**vars(shape), "offset": floor, "scale": -floor}), period=period, growth=growth)
    steps = np.arange(600)
    expected = []
    for t in steps:
        cycle, begin, length = 0, 0, period
        while t - begin >= length:
            begin, length, cycle = begin + length, length * growth, cycle + 1
        u = ((t - begin) ** k) / length**k
        expected.append(floor + 0.5 * (lr * decay**cycle - floor) * (1 + math.cos(math.pi * u)))
    got = core().evaluate(pack(Sum((peaks, floors))), steps)
    assert np.abs(got - expected).max() <= ROUNDING * lr


def test_poly_with_k_decay_needs_the_complement() -> None:
    """timm's poly: (1 - (t/T)^k)^power."""
    curve = Curve("power", limit=50.0, divisor=50.0, exponent=1.5, complement=True, p=0.9, scale=0.2)
    t = np.arange(60)
    expected = 0.2 * (1.0 - (np.minimum(t, 50) / 50) ** 1.5) ** 0.9
    assert np.abs(core().evaluate(pack(curve), t) - expected).max() <= ROUNDING * 0.2


def test_restarts_by_saw_teeth_round_as_transformers_does() -> None:
    """transformers takes (num_cycles * progress) % 1 in this order, which puts some exact restarts a step late."""
    lr, total, num_cycles = 1e-3, 11550, 50
    teeth_of = Curve("cosine", divisor=total, repeats=num_cycles, scale=lr)
    got = core().evaluate(pack(teeth_of), np.arange(total))
    teeth = [(float(num_cycles) * (float(t) / float(total))) % 1.0 for t in range(total)]
    expected = [lr * max(0.0, 0.5 * (1.0 + math.cos(math.pi * u))) for u in teeth]
    assert np.abs(got - expected).max() <= ROUNDING * lr
    late = 29 * total // num_cycles
    assert teeth[late] > 0.999
    assert got[late] < 1e-6 * lr
