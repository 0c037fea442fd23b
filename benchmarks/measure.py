"""One case: its peers set up, timed in alternation with the roof, and what follows from the times."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from . import peers, roof
from .cases import Case
from .names import OURS, ROOF
from .peers import Contestant
from .profiled import kernels as profiled_kernels
from .timing import CpuTimer, CudaTimer, Timer, Times, alternate, median_ratio, nothing, spread

#: On a CPU, the caches may hold what is smaller: no roof is measured beside it.
BEYOND_CACHES = 100 << 20
#: Times of one peer differ by a third between runs of a program, by where its pages lie in the caches and the memory's
#: banks, and by a few percent within one: each trial allocates everything anew. Larger cases take too long to set up.
TRIALS, MOST_BYTES_OF_TRIALS = 3, 600 << 20


@dataclass
class Measured:
    """What is said about one peer in one case, and the times it comes from."""

    row: dict[str, Any]
    times: Times = field(default_factory=Times)


@dataclass(frozen=True)
class RoofContestant:
    """The memory's own speed, in the rotation like everybody."""

    run: roof.Roof

    @property
    def step(self) -> Any:
        return self.run.run

    prepare = staticmethod(nothing)


@contextmanager
def threads(count: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def measure(case: Case, device: torch.device, seconds: float) -> tuple[list[Measured], dict[str, str]]:
    """A row for each peer that can run, ours first, the roof last; and why the others cannot."""
    num_trials = TRIALS if device.type == "cpu" and BEYOND_CACHES <= 16 * case.numel <= MOST_BYTES_OF_TRIALS else 1
    with threads(case.num_threads if device.type == "cpu" else None):
        rows, missing = _trial(case, device, seconds / num_trials)
        for _ in range(num_trials - 1):
            again = {m.row["peer"]: m.times for m in _trial(case, device, seconds / num_trials)[0]}
            for measured in rows:
                measured.times.samples += again[measured.row["peer"]].samples
    for measured in rows:
        _add_times(measured)
    if rows:
        _relate(rows)
    return rows, missing


def _trial(case: Case, device: torch.device, seconds: float) -> tuple[list[Measured], dict[str, str]]:
    """Everybody in memory of their own, timed."""
    _free(device)
    contestants, missing = _contestants(case, device)
    if OURS not in [c.peer for c in contestants]:
        return [], missing
    rows = [_row(case, contestant, device) for contestant in contestants]
    ceiling = _roof(case, contestants[0], device)
    everyone: list[Any] = [*contestants]
    if ceiling is not None:
        rows.append(_roof_row(case, ceiling))
        everyone.append(RoofContestant(ceiling))
    return list(map(Measured, rows, alternate(everyone, _timer(case, device), seconds))), missing


def _free(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def moved_bytes(case: Case, contestant: Contestant) -> float:
    """Per element, the fewest a step can read and write: state and parameter both, the gradient once, and once more
    for its norm."""
    item = contestant.dtype.itemsize
    return 2 * contestant.kept_bytes() + 3 * item + (item if case.clips else 0)


def _timer(case: Case, device: torch.device) -> Timer:
    if device.type == "cuda":
        return CudaTimer(device, case.burst)
    return CpuTimer(case.burst, roof.settler(torch.get_num_threads()))


def _contestants(case: Case, device: torch.device) -> tuple[list[Contestant], dict[str, str]]:
    found: list[Contestant] = []
    missing: dict[str, str] = {}
    for peer in (OURS, *case.peers):
        reason = peers.absent(peer, device)
        if not reason:
            try:
                contestant = peers.make(peer, case, device)
                contestant.step()
                if device.type == "cuda":
                    torch.cuda.synchronize()  # a kernel's error is raised by a later call: this one, not another peer's
                found.append(contestant)
                continue
            except Exception as error:  # another package's build, import or step: said in the report
                reason = why(error)
                if is_lost(device):
                    raise RuntimeError(f"{peer}: {reason}") from error
                if device.type == "cuda":
                    torch.cuda.empty_cache()
        missing[peer] = reason
    return found, missing


def why(error: Exception) -> str:
    """An error in a line of a report."""
    return f"{type(error).__name__}: {error}".split("\n")[0][:200]


def is_lost(device: torch.device) -> bool:
    """Whether this process can do no more on its GPU: after an illegal access every call fails as that one did."""
    if device.type != "cuda":
        return False
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


def _peak_bytes(contestant: Contestant, device: torch.device) -> int | None:
    """The most memory a step takes beyond what is there before it."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    contestant.prepare()
    contestant.step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def launches(case: Case, device: torch.device) -> dict[str, int | None]:
    """Kernels of a step on a GPU by peer, as the profiler sees them; None where it sees none.

    To be called when everything has been timed: what the profiler leaves in a process may make launches dearer.
    """
    _free(device)
    return {contestant.peer: _launches(contestant) for contestant in _contestants(case, device)[0]}


def _launches(contestant: Contestant) -> int | None:
    from torch.profiler import ProfilerActivity, profile

    contestant.prepare()
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        contestant.step()
        torch.cuda.synchronize()
    return len(profiled_kernels(profiled.events())) or None


def _roof(case: Case, ours: Contestant, device: torch.device) -> roof.Roof | None:
    num_bytes = int(moved_bytes(case, ours) * case.numel)
    if device.type == "cpu" and num_bytes < BEYOND_CACHES:
        return None
    item = ours.dtype.itemsize
    updated = ours.kept_bytes() + item
    read = item * (2 if case.clips else 1)
    return roof.of(device, num_bytes, updated / (updated + read))


def _row(case: Case, contestant: Contestant, device: torch.device) -> dict[str, Any]:
    return {
        "suite": case.suite,
        "case": case.name,
        "peer": contestant.peer,
        "n": case.numel,
        "tensors": len(case.shapes),
        "groups": case.num_groups,
        "threads": torch.get_num_threads() if device.type == "cpu" else None,
        "kept_bytes_per_param": contestant.kept_bytes(),
        "bytes_per_param": moved_bytes(case, contestant),
        "launches": None,
        "peak_extra_bytes": _peak_bytes(contestant, device),
    }


def _roof_row(case: Case, ceiling: roof.Roof) -> dict[str, Any]:
    return {
        "suite": case.suite,
        "case": case.name,
        "peer": ROOF,
        "what": ceiling.what,
        "n": case.numel,
        "bytes": ceiling.num_bytes,
    }


def _add_times(measured: Measured) -> None:
    row, times = measured.row, measured.times
    seconds = spread(times.seconds)
    num_bytes = row["bytes"] if row["peer"] == ROOF else row["bytes_per_param"] * row["n"]
    row |= {
        "rounds": len(times.samples),
        "ms": 1e3 * seconds.median,
        "ms_quartiles": [1e3 * seconds.lower, 1e3 * seconds.upper],
        "processor_ms": 1e3 * spread(times.processor_seconds).median,
        "host_us": 1e6 * spread(times.host_seconds).median,
        "gbps": num_bytes / seconds.median / 1e9,
    }


def _relate(rows: list[Measured]) -> None:
    """Ratios of neighbouring steps: every peer's time to ours, everybody's speed to the roof's."""
    ours = next(m for m in rows if m.row["peer"] == OURS)
    ceiling = next((m for m in rows if m.row["peer"] == ROOF), None)
    for measured in rows:
        if measured is ceiling:
            continue
        row = measured.row
        row["ratio"] = median_ratio(measured.times.seconds, ours.times.seconds)
        row["processor_ratio"] = None
        if min(ours.times.processor_seconds) > 0.0:
            row["processor_ratio"] = median_ratio(measured.times.processor_seconds, ours.times.processor_seconds)
        row["roof_gbps"] = row["roof_fraction"] = None
        if ceiling is not None:
            num_bytes = row["bytes_per_param"] * row["n"]
            scale = num_bytes / ceiling.row["bytes"]
            row["roof_gbps"] = ceiling.row["gbps"]
            row["roof_fraction"] = scale * median_ratio(ceiling.times.seconds, measured.times.seconds)
