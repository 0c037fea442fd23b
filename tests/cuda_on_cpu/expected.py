"""What a call must leave, to the last bit."""

from __future__ import annotations

import numpy as np

from . import abi, emulation
from .memory import Problem, chunk_lengths


def assert_same_bits(actual: np.ndarray, expected: np.ndarray, what: str) -> None:
    """Bit for bit; any NaN equals any NaN."""
    same = actual.view(f"u{actual.itemsize}") == expected.view(f"u{expected.itemsize}")
    if actual.dtype.kind == "f":
        same |= np.isnan(actual) & np.isnan(expected)
    wrong = np.flatnonzero(~same)
    assert wrong.size == 0, f"{what}: element {wrong[0]} of {len(actual)}: {actual[wrong[0]]!r}, {expected[wrong[0]]!r}"


def after_update(problem: Problem) -> list[dict[str, np.ndarray]]:
    """What the update must leave, from the scalars the clock wrote."""
    results = []
    for i, spec in enumerate(problem.specs):
        stored = {slot: values[: spec.entries(slot)].copy() for slot, values in problem.state(i).items()}
        stored["param"], stored["grad"] = problem.params[i].data.copy(), problem.grads[i].data.copy()
        names = (spec.param, spec.grad, spec.master, spec.moments)
        random = (problem.seed, int(problem.clock.data["step"][0]), spec.ordinal)
        emulation.update(stored, names, problem.scalars_of(i), random)
        results.append(stored)
    return results


def state_values(stored: np.ndarray, slot: str) -> np.ndarray:
    """bf16 moments as floats, so that any NaN equals any NaN; everything else as it is."""
    is_bf16 = stored.dtype == np.uint16 and slot in ("exp_avg", "exp_avg_sq")
    return emulation.decode(stored, "bf16") if is_bf16 else stored


def assert_updated(problem: Problem, expected: list[dict[str, np.ndarray]]) -> None:
    for i, (spec, stored) in enumerate(zip(problem.specs, expected, strict=True)):
        for slot, values in problem.state(i).items():
            entries = spec.entries(slot)
            assert_same_bits(state_values(values[:entries], slot), state_values(stored[slot], slot), f"{spec}: {slot}")
            assert not values[entries:].any(), f"{spec}: the padding of {slot} is not zero any more"
        actual, wanted = (emulation.decode(p, spec.param) for p in (problem.params[i].data, stored["param"]))
        assert_same_bits(actual, wanted, f"{spec}: param")
        assert (problem.grads[i].data.view(np.uint8) == stored["grad"].view(np.uint8)).all(), f"{spec}: grad written"
    for buffer in problem.buffers():
        buffer.assert_sentinels()


def decoded(stored: np.ndarray, name: str) -> np.ndarray:
    return emulation.decode(stored, name).astype(np.float64)


def fold(accumulators: np.ndarray) -> float:
    while len(accumulators) > 1:
        half = len(accumulators) // 2
        accumulators = accumulators[:half] + accumulators[half:]
    return float(accumulators[0])


def in_order(values: np.ndarray, count: int) -> float:
    """Value i is added to accumulator i % count, in order; the accumulators are folded in halves."""
    padded = np.zeros(-(-max(1, len(values)) // count) * count)
    padded[: len(values)] = values
    accumulators = np.zeros(count)
    for row in padded.reshape(-1, count):
        accumulators = accumulators + row
    return fold(accumulators)


def sum_of_squares(problem: Problem) -> float:
    """The sum of squares to the last bit, where no element of an fp64 gradient is extreme."""
    elements = [decoded(g.data, s.grad) for g, s in zip(problem.grads, problem.specs, strict=True)]
    counts = [512 // np.dtype(abi.STORAGE[s.grad]).itemsize for s in problem.specs]
    lengths = iter(chunk_lengths([s.numel for s in problem.specs]))
    chunks = []
    for values, count in zip(elements, counts, strict=True):
        first = 0
        while first < len(values):
            length = next(lengths)
            chunks.append(in_order(values[first : first + length] ** 2, count))
            first += length
    return in_order(np.array(chunks), 256)
