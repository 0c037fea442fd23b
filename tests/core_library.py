"""The core's headers compiled by themselves, for tests of functions that the package's binding does not export."""

from __future__ import annotations

import atexit
import ctypes
import os
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

TESTS = Path(__file__).resolve().parent
CSRC = TESTS.parent / "csrc"
FLAGS = ["-std=c++17", "-O2", "-ffp-contract=off", "-Wall", "-Wextra", "-Werror", f"-I{CSRC}"]
FloatArray = npt.NDArray[np.float64]


def compiler() -> str:
    """The C++ compiler of the package's own build; skips the test where there is none."""
    found = shutil.which(os.environ.get("CXX", "g++"))
    if found is None:
        pytest.skip("no C++ compiler")
    return found


def build(source: str, name: str, *flags: str) -> Path:
    """Compile a file of tests/ into a folder that goes with this process."""
    folder = tempfile.mkdtemp(prefix="fused_sched_core_")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    target = Path(folder) / name
    subprocess.run([compiler(), *FLAGS, *flags, str(TESTS / source), "-o", str(target)], check=True)
    return target


class CoreLibrary:
    """core_library.cpp over ctypes, on float64 arrays."""

    def __init__(self, *flags: str) -> None:
        self._library = ctypes.CDLL(str(build("core_library.cpp", "core.so", "-shared", "-fPIC", *flags)))
        self._library.validate.restype = ctypes.c_char_p

    def unary(self, name: str, x: npt.ArrayLike) -> FloatArray:
        x, out = _operands(x)
        self._library.unary(name.encode(), _address(x), _address(out), ctypes.c_int64(x.size))
        return out

    def power(self, x: npt.ArrayLike, y: npt.ArrayLike) -> FloatArray:
        x, y = np.broadcast_arrays(np.asarray(x, np.float64), np.asarray(y, np.float64))
        x, out = _operands(x)
        y, _ = _operands(y)
        self._library.powers(_address(x), _address(y), _address(out), ctypes.c_int64(x.size))
        return out

    def validate(self, program: bytes) -> str:
        """What is wrong with a program; empty if nothing is."""
        buffer = _aligned(program)
        message = self._library.validate(_address(buffer), ctypes.c_int64(len(program)))
        return message.decode() if message else ""

    def evaluate(self, program: bytes, times: npt.ArrayLike) -> FloatArray:
        assert not self.validate(program)
        times, out = _operands(times)
        buffer = _aligned(program)
        self._library.evaluate_at(_address(buffer), _address(times), _address(out), ctypes.c_int64(times.size))
        return out


@cache
def core(*flags: str) -> CoreLibrary:
    return CoreLibrary(*flags)


def _operands(x: npt.ArrayLike) -> tuple[FloatArray, FloatArray]:
    contiguous = np.ascontiguousarray(x, dtype=np.float64)
    return contiguous, np.empty_like(contiguous)


def _aligned(program: bytes) -> npt.NDArray[np.uint8]:
    buffer = np.zeros(len(program) // 8 + 1, dtype=np.float64).view(np.uint8)
    buffer[: len(program)] = np.frombuffer(program, dtype=np.uint8)
    return buffer


def _address(array: npt.NDArray[np.generic]) -> ctypes.c_void_p:
    return ctypes.c_void_p(array.ctypes.data)
