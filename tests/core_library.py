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
Floats = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]
Numbers = npt.NDArray[np.int32]
Words = int | npt.NDArray[np.uint32]  # one for all elements, or one for each


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

    # ---- storage formats: arrays in, arrays out, of the dtypes that are stored ----

    def encode_master(self, tag: str, weight: Floats, random: Words) -> tuple[npt.NDArray[np.uint16], Numbers]:
        weight, random = _as(np.float32, weight), _words(random, len(weight))
        param, kept = np.zeros(len(weight), np.uint16), np.zeros(len(weight), np.int32)
        self._run("encode_master", tag.encode(), weight, random, len(weight), param, kept)
        return param, kept

    def decode_master(self, tag: str, param: npt.ArrayLike, kept: npt.ArrayLike) -> Floats:
        param, kept = _as(np.uint16, param), _as(np.int32, kept)
        weight = np.zeros(len(param), np.float32)
        self._run("decode_master", tag.encode(), param, kept, len(param), weight)
        return weight

    def encode_8bit(self, name: str, value: Floats, random: Words) -> tuple[Bytes, Bytes]:
        """Codes and scales of "exp_avg" or "exp_avg_sq"."""
        value, random = _as(np.float32, value), _words(random, len(value))
        code, scale = np.zeros(len(value), np.uint8), np.zeros(-(-len(value) // 16), np.uint8)
        self._run("encode_8bit", name == "exp_avg", value, random, len(value), code, scale)
        return code, scale

    def decode_8bit(self, name: str, code: Bytes, scale: Bytes) -> Floats:
        code, scale = _as(np.uint8, code), _as(np.uint8, scale)
        value = np.zeros(len(code), np.float32)
        self._run("decode_8bit", name == "exp_avg", code, scale, len(code), value)
        return value

    def encode_second_bf16(self, value: Floats, random: Words) -> npt.NDArray[np.uint16]:
        value, random = _as(np.float32, value), _words(random, len(value))
        stored = np.zeros(len(value), np.uint16)
        self._run("encode_second_bf16", value, random, len(value), stored)
        return stored

    def random(self, seed: int, clock_step: int, ordinal: int, count: int, first: int = 0) -> npt.NDArray[np.uint32]:
        out = np.zeros(count, np.uint32)
        key = (ctypes.c_uint64(seed), ctypes.c_int64(clock_step), ctypes.c_uint32(ordinal), ctypes.c_int64(first))
        self._library.random_of(*key, ctypes.c_int64(count), _address(out))
        return out

    def _run(self, name: str, *arguments: bytes | bool | int | npt.NDArray[np.generic]) -> None:
        def converted(argument: bytes | bool | int | npt.NDArray[np.generic]) -> object:
            if isinstance(argument, np.ndarray):
                return _address(argument)
            if isinstance(argument, bool):
                return ctypes.c_int32(argument)
            return ctypes.c_int64(argument) if isinstance(argument, int) else argument

        getattr(self._library, name)(*map(converted, arguments))


@cache
def core(*flags: str) -> CoreLibrary:
    return CoreLibrary(*flags)


def _as(dtype: npt.DTypeLike, values: npt.ArrayLike) -> npt.NDArray[np.generic]:
    return np.ascontiguousarray(values, dtype=dtype)


def _words(random: Words, count: int) -> npt.NDArray[np.uint32]:
    return np.ascontiguousarray(np.broadcast_to(np.asarray(random, np.uint32), count))


def _operands(x: npt.ArrayLike) -> tuple[FloatArray, FloatArray]:
    contiguous = np.ascontiguousarray(x, dtype=np.float64)
    return contiguous, np.empty_like(contiguous)


def _aligned(program: bytes) -> npt.NDArray[np.uint8]:
    buffer = np.zeros(len(program) // 8 + 1, dtype=np.float64).view(np.uint8)
    buffer[: len(program)] = np.frombuffer(program, dtype=np.uint8)
    return buffer


def _address(array: npt.NDArray[np.generic]) -> ctypes.c_void_p:
    return ctypes.c_void_p(array.ctypes.data)
