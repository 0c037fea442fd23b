"""The tests of the kernels and of the CPU backend again, under AddressSanitizer with UndefinedBehaviorSanitizer and
under ThreadSanitizer.

Each runs in a Python of its own, because a sanitizer must be loaded before everything else. For each there is a
call that is wrong on purpose, which it must report: a sanitizer that sees nothing would pass everything.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from cuda_on_cpu import build

TESTS = Path(__file__).resolve().parent


def run_python(sanitizer: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = build.sanitizer_environment(sanitizer)
    environment["PYTHONPATH"] = str(TESTS)
    command = [sys.executable, *arguments]
    return subprocess.run(command, env=environment, cwd=TESTS, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def sanitizer(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    if shutil.which(build.COMPILER) is None:
        pytest.skip("no C++ compiler")
    try:
        result = run_python(name, "-c", "print('started')")
    except FileNotFoundError as error:
        pytest.skip(str(error))
    if result.stdout != "started\n":  # e.g. ThreadSanitizer where address space is randomised too widely
        pytest.skip(f"the {name} sanitizer does not start here: {result.stderr.strip()[-200:]}")
    build.library(name)
    build.cpu_library(name)
    return name


def run_tests(sanitizer: str, *arguments: str) -> None:
    command = "-m pytest -o addopts= --noconftest -p no:cacheprovider -s -x -q".split()
    result = run_python(sanitizer, *command, *arguments)
    assert result.returncode == 0, (result.stdout + result.stderr)[-4000:]
    assert " passed" in result.stdout
    assert "skipped" not in result.stdout


@pytest.mark.parametrize("sanitizer", ["address", "thread"], indirect=True)
def test_kernels_under_sanitizer(sanitizer: str) -> None:
    # Update kernels share nothing between threads; ThreadSanitizer is for the barriers of clock and norm, and for one
    # update.
    files = ["test_kernels.py", "test_norm_kernel.py", "test_update_ordinary.py"]
    if sanitizer == "thread":
        files[0] += "::test_formats_mixed_in_one_call"
        names = ("sum_of_squares_to_the_last_bit", "skips_what_is_not_finite", "recorder_writes_every_step")
        files[1:] = [f"test_norm_kernel.py::test_{name}" for name in names]
    # Thousands of tensors only to count launches.
    counts = ("two_launches_a_step", "one_launch_more_for_a_further_format_and_a_further_thousand")
    deselected = [f"--deselect=test_norm_kernel.py::test_{name}" for name in counts]
    run_tests(sanitizer, "test_clock_kernel.py", "test_metric_kernel.py", *files, *deselected)


@pytest.mark.parametrize("sanitizer", ["address", "thread"], indirect=True)
def test_cpu_backend_under_sanitizer(sanitizer: str) -> None:
    # One thread alone updates the small tensors. Where few values are special, both blocks and tiles have work.
    left_out = {"address": "many-special", "thread": "matches_emulation"}[sanitizer]
    run_tests(sanitizer, "test_cpu_library.py", "-k", f"not {left_out}")


WRONG_CALL = """
import os
from cuda_on_cpu import abi, build
from cuda_on_cpu.memory import Problem, TensorSpec
sanitizer = os.environ["FUSED_SCHED_TEST_SANITIZER"]
library = {library}(sanitizer))
problem = Problem([{spec}, {spec}])
call = problem.call(norm=True, num_threads=4)
rows = problem.tensor_table
{change}
for _ in range({calls}):
    library.norm(call)
    library.update(call)
print("not noticed")
"""
CUDA, CPU = "abi.Library(build.library", "abi.CpuLibrary(build.cpu_library"
SMALL, BLOCKS, LARGE = "TensorSpec(300)", "TensorSpec(320, 'bf16', master='split16')", "TensorSpec(500_000)"


@pytest.mark.parametrize(
    ("sanitizer", "library", "spec", "change", "calls", "report"),
    [
        ("address", CUDA, SMALL, "rows['numel'][1] += 1", 1, "heap-buffer-overflow"),
        ("address", CUDA, SMALL, "rows['param'][1] += 2", 1, "misaligned address"),
        # Two rows, hence two CUDA threads, with one step record.
        ("thread", CUDA, SMALL, "rows['step'][1] = rows['step'][0]", 1, "data race"),
        ("address", CPU, SMALL, "rows['numel'][1] += 1", 1, "heap-buffer-overflow"),  # the norm
        ("address", CPU, SMALL, "rows['param'][1] += 4", 1, "heap-buffer-overflow"),  # the update's loops
        # With AVX-512 its blocks, whose 64 bytes begin within the buffer: of an unknown kind, says the sanitizer.
        ("address", CPU, BLOCKS, "rows['param'][1] += 2", 1, "ERROR: AddressSanitizer"),
        ("address", CPU, SMALL, "rows['param'][1] += 2", 1, "misaligned address"),
        # Units of both tensors, hence two threads, on one state. One that wakes late finds no work: not in every call.
        ("thread", CPU, LARGE, "rows['state_offset'][1] = 0", 50, "data race"),
    ],
    indirect=["sanitizer"],
    ids=[
        "past-the-end", "misaligned", "race",
        "cpu-norm-past-the-end", "cpu-past-the-end", "cpu-blocks-past-the-end", "cpu-misaligned", "cpu-race",
    ],
)  # fmt: skip
def test_sanitizer_reports_a_wrong_call(
    sanitizer: str, library: str, spec: str, change: str, calls: int, report: str
) -> None:
    code = WRONG_CALL.format(library=library, spec=spec, change=change, calls=calls)
    result = run_python(sanitizer, "-c", code)
    assert result.returncode != 0
    assert report in result.stderr
    assert "not noticed" not in result.stdout
