"""What the memory of this machine can do, measured beside every case: the roof no optimizer step can be above.

On a GPU a copy from device to device, which reads and writes as many bytes. On a CPU a plain C++ loop (`stream.cpp`)
over streams that are read and written in place, and one that is read: with as many threads as the step, the same
number of bytes, and the same mix of reads and writes to the nearest whole stream. It walks in the fastest of four
ways, found out first.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
SOURCE = Path(__file__).with_name("stream.cpp")
FLAGS = ["-std=c++17", "-O3", "-march=native", "-shared", "-fPIC", "-pthread"]

MAX_UPDATED = 6  # streams that stream.cpp updates at once
WAYS = ("side by side", "prefetching 256 bytes ahead", "prefetching 1 KB ahead", "tile by tile")
LINE = 16  # floats
#: Of a stream's memory, far beyond every cache; what moves more bytes walks it more than once.
MOST_BYTES = 1 << 30
SETTLE_BYTES, SETTLE_SECONDS = 128 << 20, 0.012


class Roof:
    """A call that moves a case's bytes as fast as the machine can."""

    def __init__(self, run: Callable[[], object], num_bytes: int, what: str) -> None:
        self.run = run
        self.num_bytes = num_bytes
        self.what = what


def of(device: torch.device, num_bytes: int, updated_share: float) -> Roof | None:
    """The roof for a step that moves `num_bytes`; None where it cannot be measured (no compiler).

    updated_share: of the bytes of the streams, how many are read and written; the others are read.
    """
    if device.type == "cuda":
        return _copy(device, num_bytes)
    return _stream(num_bytes, updated_share, torch.get_num_threads())


def _copy(device: torch.device, num_bytes: int) -> Roof:
    half = max(1, num_bytes // 2)
    repeats = -(-half // MOST_BYTES)
    source = torch.ones(half // repeats, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)

    def run() -> None:
        for _ in range(repeats):
            target.copy_(source)

    return Roof(run, 2 * source.numel() * repeats, "copy from device to device")


def _stream(num_bytes: int, updated_share: float, num_threads: int) -> Roof | None:
    library = _library()
    if library is None:
        return None
    whole_streams = int(updated_share / (1.0 - updated_share) + 0.501)
    num_updated = max(1, min(MAX_UPDATED, whole_streams))
    floats = num_bytes // (4 * (2 * num_updated + 1))
    repeats = -(-floats * 4 * (num_updated + 1) // MOST_BYTES)
    count = max(1, floats // repeats // LINE) * LINE
    streams = [torch.ones(count) for _ in range(num_updated + 1)]
    addresses = (ctypes.c_void_p * num_updated)(*(s.data_ptr() for s in streams[:-1]))

    def run(way: int) -> None:
        for _ in range(repeats):
            library.stream(num_updated, way, addresses, ctypes.c_void_p(streams[-1].data_ptr()), count, num_threads)

    way = _fastest_way(run)
    moved = 4 * (2 * num_updated + 1) * count * repeats
    name = f"{num_updated} streams updated and one read, {num_threads} threads, {WAYS[way]}"
    return Roof(lambda: run(way), moved, name)


def settler(num_threads: int) -> Callable[[], object]:
    """What to call before a step on a CPU is timed, so that all begin alike.

    OpenMP's threads, torch's and DeepSpeed's among them, wait for more work without sleeping for some milliseconds, on
    cores that the next contestant needs: right after torch's step a loop of other threads takes a tenth longer. So the
    cores stream for a while, in threads that end, and through more memory than the caches hold.
    """
    library = _library()
    if library is None:
        return lambda: time.sleep(SETTLE_SECONDS)
    count = SETTLE_BYTES // 8
    streams = [torch.ones(count) for _ in range(2)]
    addresses = (ctypes.c_void_p * 1)(streams[0].data_ptr())

    def settle() -> None:
        end = time.perf_counter() + SETTLE_SECONDS
        while time.perf_counter() < end:
            library.stream(1, 0, addresses, ctypes.c_void_p(streams[1].data_ptr()), count, num_threads)

    return settle


def _fastest_way(run: Callable[[int], None]) -> int:
    times: list[list[float]] = [[] for _ in WAYS]
    for _ in range(5):
        for way in range(len(WAYS)):
            begin = time.perf_counter()
            run(way)
            times[way].append(time.perf_counter() - begin)
    return min(range(len(WAYS)), key=lambda way: statistics.median(times[way][1:]))


@cache
def _library() -> ctypes.CDLL | None:
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        return None
    digest = hashlib.sha256(SOURCE.read_bytes() + " ".join([compiler, *FLAGS]).encode()).hexdigest()[:16]
    target = ROOT / "build" / "benchmarks" / f"stream-{digest}.so"
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_suffix(f".{os.getpid()}")
        subprocess.run([compiler, *FLAGS, str(SOURCE), "-o", str(partial)], check=True)
        partial.rename(target)
    library = ctypes.CDLL(str(target))
    library.stream.argtypes = [
        *(ctypes.c_int, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p),
        *(ctypes.c_int64, ctypes.c_int),
    ]
    library.stream.restype = None
    return library
