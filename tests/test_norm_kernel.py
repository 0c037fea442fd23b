"""The norm kernel, run on the CPU (tests/cuda_on_cpu), and the CPU backend's norm: sums to the last bit, clipping,
skipping, launches, recorder.

Needs NumPy and a C++ compiler only. test_sanitizers.py runs this file again under the sanitizers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import inf, isfinite, isnan, nan, sqrt

import numpy as np
import pytest
from cuda_on_cpu import abi, emulation
from cuda_on_cpu.expected import decoded, sum_of_squares
from cuda_on_cpu.instances import mixed_specs
from cuda_on_cpu.memory import GroupSpec, Problem, TensorSpec

pytest_plugins = ["cuda_on_cpu.fixtures"]

GRADS = 2039  # of one launch: 16 bytes each, 24 each run of tensors (CallTable::kPoolBytes)
RUNS = 1359


def run_norm(library: abi.StepLibrary, problem: Problem, **options: bool) -> abi.Call:
    call = problem.call(norm=True, **options)
    library.norm(call)
    return call


def test_sum_of_squares_to_the_last_bit(each_library: abi.StepLibrary) -> None:
    problem = Problem(mixed_specs())
    problem.draw_grads()
    run_norm(each_library, problem)
    squares = sum_of_squares(problem)
    assert problem.norm.data["squares"][0] == squares
    assert problem.norm.data["norm"][0] == sqrt(squares)
    exact = sum(float((decoded(g.data, s.grad) ** 2).sum()) for g, s in zip(problem.grads, problem.specs, strict=True))
    assert abs(squares - exact) <= 1e-13 * exact
    for buffer in problem.buffers():
        buffer.assert_sentinels()


def test_same_bits_for_any_grid_order_and_table(library: abi.Library) -> None:
    results = set()
    for device, num_sms, seed, empty in ((20, 1, 0, 0), (21, 3, 1, 0), (22, 50, 2, 2 * RUNS)):
        library.set_machine(num_devices=23, num_sms=num_sms, blocks_per_sm=1)
        library.set_seed(seed)
        specs = mixed_specs()
        # Empty tensors have steps, though no gradient to read: runs beyond one launch.
        problem = Problem([*specs, *[TensorSpec(0)] * empty])
        problem.draw_grads()
        run_norm(library, problem, device=device)  # type: ignore[arg-type]
        results.add(problem.norm.data["squares"][0])
    assert len(results) == 1


@pytest.mark.parametrize(("grad", "scale"), [("fp32", 1e30), ("bf16", 1e30), ("fp64", 1e200), ("fp64", 1e-200)])
def test_norm_neither_overflows_nor_vanishes(each_library: abi.StepLibrary, grad: str, scale: float) -> None:
    problem = Problem([TensorSpec(5000, "fp64" if grad == "fp64" else "fp32", grad)])
    problem.draw_grads(scale=scale)
    run_norm(each_library, problem)
    values = decoded(problem.grads[0].data, grad) / scale
    assert problem.norm.data["norm"][0] / scale == pytest.approx(np.linalg.norm(values), rel=1e-13)


def test_norm_of_doubles_of_every_magnitude(each_library: abi.StepLibrary) -> None:
    """Each of the three sums, alone and beside the next; subnormals, and the largest double."""
    for values in ([1e-320], [3e-200, 4e-200], [1e-150, 1e-140], [1e-145, 1.0], [3.0, 4.0], [1e140, 1e150],
                   [1e144, 1e145], [3e300, 4e300], [1e-320, 1.0, 1e300], [1.7e308]):  # fmt: skip
        problem = Problem([TensorSpec(len(values), "fp64", "fp64")])
        problem.grads[0].data[:] = values
        run_norm(each_library, problem)
        largest = max(values)
        expected = largest * sqrt(sum((v / largest) ** 2 for v in values))
        assert problem.norm.data["norm"][0] == pytest.approx(expected, rel=4e-16, abs=5e-324), values
    problem = Problem([TensorSpec(4, "fp64", "fp64")])
    problem.grads[0].data[:] = 1.7e308
    run_norm(each_library, problem)
    assert problem.norm.data["norm"][0] == inf  # 3.4e308 is beyond double


CLIPS = [
    # norm of the gradients, max_norm, what torch multiplies by
    (5.0, 1.0, 1.0 / (5.0 + 1e-6)),
    (0.5, 1.0, 1.0),
    (0.0, 1.0, 1.0),
    (0.0, 1e-7, 0.1),
    (5.0, inf, 1.0),
    (inf, 1.0, 0.0),
    (inf, inf, 1.0),
    (nan, 1.0, nan),
    (nan, inf, 1.0),
]


@pytest.mark.parametrize(("norm", "max_norm", "clip"), CLIPS)
def test_clip_factor(each_library: abi.StepLibrary, norm: float, max_norm: float, clip: float) -> None:
    problem = Problem([TensorSpec(3), TensorSpec(300, "fp64", "fp64", arena=1)], [GroupSpec(grad_divisor=2.0)])
    problem.grads[0].data[1] = norm * 2.0 * 8.0
    problem.norm.data["max_norm"], problem.norm.data["grad_divisor"] = max_norm, 2.0
    problem.grad_scale.data[0] = 8.0
    run_norm(each_library, problem, grad_scale=True)
    state = problem.norm.data[0]
    np.testing.assert_equal((state["norm"], state["clip"]), (norm, clip))
    assert problem.clock.data[0].tolist() == (1, 0, 0)
    np.testing.assert_equal(problem.scalars_of(0)["grad_factor"], np.float32(clip / 16.0))
    np.testing.assert_equal(problem.scalars_of(1)["grad_factor"], clip / 16.0)


@pytest.mark.parametrize("value", [nan, inf, -inf])
@pytest.mark.parametrize("grad", abi.FORMATS)
def test_skips_what_is_not_finite(each_library: abi.StepLibrary, grad: str, value: float) -> None:
    param = "fp64" if grad == "fp64" else "fp32"
    problem = Problem([TensorSpec(100, param, grad), TensorSpec(5000, param, grad)])
    problem.draw_grads()
    problem.norm.data["skip_nonfinite"] = 1
    call = run_norm(each_library, problem)
    each_library.update(call)
    written = np.array([value], np.float64 if grad == "fp64" else np.float32)
    problem.grads[1].data[4999:] = emulation.encode(written, grad)
    changing = (problem.clock, problem.scalars, problem.norm, problem.chunk_sums)
    before = [b.raw.tobytes() for b in problem.buffers() if not any(b is other for other in changing)]
    call = run_norm(each_library, problem)
    each_library.update(call)
    assert [b.raw.tobytes() for b in problem.buffers() if not any(b is other for other in changing)] == before
    assert problem.clock.data[0].tolist() == (1, 1, 1)
    assert not isfinite(problem.norm.data["norm"][0])
    problem.grads[1].data[4999] = 0
    run_norm(each_library, problem, tick=False)
    assert problem.clock.data[0].tolist() == (2, 0, 0)


def launches(library: abi.Library, problem: Problem, norm: bool) -> int:
    call = problem.call(norm=norm)
    (library.norm if norm else library.clock)(call)
    library.update(call)
    return call.launches


def in_one_arena(problem: Problem) -> Problem:
    """Step records and ordinals one after the other, as the package gives them."""
    records = np.zeros(len(problem.specs), abi.STEP_RECORD)
    make = problem.call

    def call(*arguments: object, **options: object) -> abi.Call:
        made = make(*arguments, **options)  # type: ignore[arg-type]
        problem.tensor_table["ordinal"] = np.arange(len(records))
        problem.tensor_table["step"] = records.ctypes.data + abi.STEP_RECORD.itemsize * np.arange(len(records))
        return made

    problem.call = call  # type: ignore[method-assign]
    return problem


@pytest.mark.parametrize("norm", [False, True])
def test_two_launches_a_step(library: abi.Library, norm: bool) -> None:
    for num_tensors, num_groups in ((1, 1), (2, 2), (465, 465), (1000, 1), (1000, 465)):
        groups = [GroupSpec()] * num_groups
        specs = [TensorSpec(3, group=i * num_groups // num_tensors) for i in range(num_tensors)]
        assert launches(library, in_one_arena(Problem(specs, groups)), norm) == 2, (num_tensors, num_groups)


@pytest.mark.parametrize("norm", [False, True])
def test_one_launch_more_for_a_further_format_and_a_further_thousand(library: abi.Library, norm: bool) -> None:
    specs = [TensorSpec(3, param, param) for param in ("fp32", "bf16", "fp16")]
    assert launches(library, in_one_arena(Problem(specs)), norm) == 4
    assert launches(library, in_one_arena(Problem([TensorSpec(3)] * 2000)), norm) == 3


@pytest.mark.parametrize(
    ("num_tensors", "num_arenas", "expected"),
    [(GRADS - 1, 1, 1), (GRADS, 1, 2), (815, 0, 1), (816, 0, 2), (2 * RUNS, 0, 4)],
)
def test_many_tensors_take_several_launches(
    library: abi.Library, num_tensors: int, num_arenas: int, expected: int
) -> None:
    """num_arenas 0: every step record lies alone, so that each tensor takes a run of its own."""
    problem = Problem([TensorSpec(1)] * num_tensors)
    problem = in_one_arena(problem) if num_arenas else problem
    for grad in problem.grads:
        grad.data[:] = 2.0
    problem.norm.data["max_norm"] = 1.0
    call = run_norm(library, problem)
    assert call.launches == expected
    assert problem.clock.data["step"] == 1
    assert problem.norm.data["squares"] == 4.0 * num_tensors
    factor = np.float32(1.0 / (sqrt(4.0 * num_tensors) + 1e-6))
    assert {float(problem.scalars_of(i)["grad_factor"]) for i in range(num_tensors)} == {float(factor)}
    if not num_arenas:
        assert {int(step.data["count"][0]) for step in problem.steps} == {1}


def test_reduced_norm_takes_one_more_launch(each_library: abi.StepLibrary) -> None:
    problem = Problem([TensorSpec(1000), TensorSpec(10)])
    problem.draw_grads()
    problem.norm.data["max_norm"] = 0.5
    call = run_norm(each_library, problem, norm_is_reduced=True)
    assert problem.clock.data["step"] == 0
    squares = problem.norm.data["squares"][0]
    problem.norm.data["squares"] *= 4.0  # as four processes with these gradients would
    each_library.clock(call)
    assert call.launches == 2
    assert problem.norm.data["norm"][0] == sqrt(4.0 * squares)
    assert problem.scalars_of(1)["grad_factor"] == np.float32(0.5 / (sqrt(4.0 * squares) + 1e-6))


def test_without_gradients(each_library: abi.StepLibrary) -> None:
    for specs in ([], [TensorSpec(0), TensorSpec(0)]):
        problem = Problem(specs)
        problem.norm.data["max_norm"] = 1.0
        problem.norm.data["skip_nonfinite"] = 1
        call = run_norm(each_library, problem)
        assert call.launches == 1
        assert (problem.norm.data["norm"][0], problem.norm.data["clip"][0]) == (0.0, 1.0)
        assert problem.clock.data["step"] == 1


def history(problem: Problem, indices: Sequence[int]) -> list[list[float]]:
    return [problem.rows()[i].tolist() for i in indices]


def test_recorder_writes_every_step(each_library: abi.StepLibrary) -> None:
    problem = Problem(
        [TensorSpec(4), TensorSpec(4, group=1)], [GroupSpec(lr=0.5), GroupSpec(lr=0.25, weight_decay=0.125)]
    )
    problem.record_history()
    problem.norm.data["skip_nonfinite"] = 1
    problem.norm.data["max_norm"] = 1.0
    for step, value in enumerate((2.0, nan, 0.25)):
        problem.grads[0].data[:] = value
        call = run_norm(each_library, problem)
        each_library.update(call)
        assert problem.history.data["count"] == step + 1
    np.testing.assert_equal(
        history(problem, range(4)),
        [
            [1.0, 4.0, 1.0 / (4.0 + 1e-6), 0.0, 0.5, 0.01, 0.25, 0.125],
            [1.0, nan, nan, 1.0, nan, nan, nan, nan],
            [2.0, 0.5, 1.0, 0.0, 0.5, 0.01, 0.25, 0.125],
            [0.0] * 8,
        ],
    )
    each_library.clock(problem.call())  # without a norm
    np.testing.assert_equal(history(problem, [3]), [[3.0, nan, 1.0, 0.0, 0.5, 0.01, 0.25, 0.125]])


def test_recorder_wraps_around(each_library: abi.StepLibrary) -> None:
    problem = Problem([TensorSpec(1)])
    problem.record_history()
    problem.history.data["count"] = abi.HISTORY_LENGTH - 1
    problem.clock.data["step"] = 10_000
    for _ in range(2):
        each_library.clock(problem.call())
    assert problem.history.data["count"] == abi.HISTORY_LENGTH + 1
    assert [row[0] for row in history(problem, [-1, 0, 1])] == [10_001.0, 10_002.0, 0.0]


def test_recorder_has_one_row_for_a_round(each_library: abi.StepLibrary) -> None:
    """Calls that do not tick are further parts of one update: the row says what those that were applied used."""
    problem = Problem([TensorSpec(1)])
    problem.record_history()
    each_library.clock(problem.call(tick=False))  # before any round: nowhere to write
    assert problem.history.data["count"] == 0
    assert not problem.rows().any()
    for found_inf, tick in ((1.0, True), (0.0, False), (1.0, False)):
        problem.found_inf.data[0] = found_inf
        each_library.clock(problem.call(tick=tick, found_inf=True))
    assert problem.history.data["count"] == 1
    np.testing.assert_equal(history(problem, [0]), [[1.0, nan, 1.0, 0.0, 1e-3, 0.01]])


def test_recorder_of_more_groups_than_the_call_knows(each_library: abi.StepLibrary) -> None:
    """A graph captured before a group was added goes on; the new group's columns hold nothing."""
    problem = Problem([TensorSpec(1)], [GroupSpec(lr=0.5), GroupSpec(lr=0.25)])
    problem.record_history(num_groups=200)
    each_library.clock(problem.call())
    row = problem.rows()[0]
    assert row[4:8].tolist() == [0.5, 0.01, 0.25, 0.01]
    assert all(isnan(value) for value in row[8:])
    for buffer in problem.buffers():
        buffer.assert_sentinels()


def test_norm_needs_its_memory(each_library: abi.StepLibrary) -> None:
    problem = Problem([TensorSpec(1)])
    call = problem.call()
    with pytest.raises(abi.BackendError, match="`norm` is null"):
        each_library.norm(call)
    call = problem.call(norm=True)
    call.chunk_sums = 0
    with pytest.raises(abi.BackendError, match="`chunk_sums`, got null"):
        each_library.norm(call)
    assert problem.clock.data["step"] == 0


def test_update_is_clipped_as_a_smaller_gradient_would_be(each_library: abi.StepLibrary) -> None:
    """max_norm half of the norm, less 1e-6: the factor is 1/2 but for a rounding, and so is every gradient."""
    specs = [TensorSpec(100), TensorSpec(33, "bf16", "fp32", "fp32"), TensorSpec(9, "fp64", "fp64", arena=1)]
    specs[1] = replace(specs[1], arena=2)
    clipped, halved = Problem(specs), Problem(specs)
    for problem in (clipped, halved):
        problem.draw_grads()
    norm = sqrt(sum_of_squares(clipped))
    clipped.norm.data["max_norm"] = (norm + 1e-6) / 2
    for grad in halved.grads:
        grad.data[:] = grad.data * 0.5
    for problem, norm_wanted in ((clipped, True), (halved, False)):
        call = problem.call(norm=norm_wanted)
        (each_library.norm if norm_wanted else each_library.clock)(call)
        each_library.update(call)
    assert clipped.norm.data["clip"][0] == pytest.approx(0.5, rel=1e-15)
    for i in range(3):
        for slot, values in clipped.state(i).items():
            np.testing.assert_allclose(values, halved.state(i)[slot], rtol=1e-6)
