"""The kernels' tests again, under AddressSanitizer with UndefinedBehaviorSanitizer and under ThreadSanitizer.

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
    return name


@pytest.mark.parametrize("sanitizer", ["address", "thread"], indirect=True)
def test_kernels_under_sanitizer(sanitizer: str) -> None:
    # Update kernels share nothing between threads; ThreadSanitizer is for the barriers of clock and norm, and for one
    # update.
    files = ["test_kernels.py", "test_norm_kernel.py"]
    if sanitizer == "thread":
        files[0] += "::test_formats_mixed_in_one_call"
        names = ("sum_of_squares_to_the_last_bit", "skips_what_is_not_finite", "recorder_writes_every_step")
        files[1:] = [f"test_norm_kernel.py::test_{name}" for name in names]
    pytest_call = "-m pytest -o addopts= --noconftest -p no:cacheprovider -s -x -q".split()
    # Thousands of tensors only to count launches.
    counts = ("two_launches_a_step", "one_launch_more_for_a_further_format_and_a_further_thousand")
    pytest_call += [f"--deselect=test_norm_kernel.py::test_{name}" for name in counts]
    result = run_python(sanitizer, *pytest_call, "test_clock_kernel.py", "test_metric_kernel.py", *files)
    assert result.returncode == 0, (result.stdout + result.stderr)[-4000:]
    assert " passed" in result.stdout
    assert "skipped" not in result.stdout


WRONG_CALL = """
import os
from dataclasses import replace
from cuda_on_cpu import abi, build
from cuda_on_cpu.memory import Problem, TensorSpec
library = abi.Library(build.library(os.environ["FUSED_SCHED_TEST_SANITIZER"]))
problem = Problem([TensorSpec(300), TensorSpec(300)])
call = problem.call(norm=True)
{change}
library.norm(call)
library.update(call)
print("not noticed")
"""


@pytest.mark.parametrize(
    ("sanitizer", "change", "report"),
    [
        ("address", "problem.tensor_table['numel'][1] += 1", "heap-buffer-overflow"),
        ("address", "problem.tensor_table['param'][1] += 2", "misaligned address"),
        # Two rows, hence two CUDA threads, with one step record.
        ("thread", "problem.tensor_table['step'][1] = problem.tensor_table['step'][0]", "data race"),
    ],
    indirect=["sanitizer"],
    ids=["past-the-end", "misaligned", "race"],
)
def test_sanitizer_reports_a_wrong_call(sanitizer: str, change: str, report: str) -> None:
    result = run_python(sanitizer, "-c", WRONG_CALL.format(change=change))
    assert result.returncode != 0
    assert report in result.stderr
    assert "not noticed" not in result.stdout
