"""The fixture of the tests that call the C ABI: a plugin they name, so that they run without conftest.py (and its
torch), as they do under the sanitizers.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from . import abi, build


@pytest.fixture(scope="session")
def loaded_library() -> abi.Library:
    if shutil.which(build.COMPILER) is None:
        pytest.skip(f"no C++ compiler: {build.COMPILER} is not on PATH")
    csrc = Path(os.environ.get("FUSED_SCHED_TEST_CSRC", build.CSRC))  # set by test_planted_bugs.py
    return abi.Library(build.library(os.environ.get("FUSED_SCHED_TEST_SANITIZER", ""), csrc))


@pytest.fixture
def library(loaded_library: abi.Library) -> Iterator[abi.Library]:
    """The CUDA backend on a machine of two devices that run four blocks at a time: blocks walk over several tiles."""
    loaded_library.set_machine()
    yield loaded_library
    loaded_library.set_machine()
    loaded_library.set_seed(0)
    loaded_library.fail("")
