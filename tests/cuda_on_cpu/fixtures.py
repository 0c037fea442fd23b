"""The fixtures of the tests that call the C ABI: a plugin they name, so that they run without conftest.py (and its
torch), as they do under the sanitizers.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from . import abi, build

SANITIZER = os.environ.get("FUSED_SCHED_TEST_SANITIZER", "")
CSRC = Path(os.environ.get("FUSED_SCHED_TEST_CSRC", build.CSRC))  # set by test_planted_bugs.py


@pytest.fixture(scope="session")
def compiler() -> None:
    if shutil.which(build.COMPILER) is None:
        pytest.skip(f"no C++ compiler: {build.COMPILER} is not on PATH")


@pytest.fixture(scope="session")
def loaded_library(compiler: None) -> abi.Library:
    return abi.Library(build.library(SANITIZER, CSRC))


@pytest.fixture(scope="session")
def loaded_cpu_library(compiler: None) -> abi.CpuLibrary:
    return abi.CpuLibrary(build.cpu_library(SANITIZER, CSRC))


@pytest.fixture
def library(loaded_library: abi.Library) -> Iterator[abi.Library]:
    """The CUDA backend on a machine of two devices that run four blocks at a time: blocks walk over several tiles."""
    loaded_library.set_machine()
    yield loaded_library
    loaded_library.set_machine()
    loaded_library.set_seed(0)
    loaded_library.set_driver()
    loaded_library.fail("")


@pytest.fixture
def cpu_library(loaded_cpu_library: abi.CpuLibrary) -> Iterator[abi.CpuLibrary]:
    """The CPU backend, with the fastest instruction set that the machine has."""
    yield loaded_cpu_library
    next(loaded_cpu_library.each_of(build.ISA_FLAGS))


@pytest.fixture(params=["cuda", "cpu"])
def each_library(request: pytest.FixtureRequest) -> abi.StepLibrary:
    """Either backend, where the two must agree."""
    library: abi.StepLibrary = request.getfixturevalue("library" if request.param == "cuda" else "cpu_library")
    return library
