"""Times of several steps in alternation: medians, spread, and ratios of neighbours.

Machines are noisy and drift, so no two times are compared that were not taken in the same round.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import torch

Step = Callable[[], object]

MIN_ROUNDS, MAX_ROUNDS = 5, 200
#: More than the caches of any GPU and its neighbours in a rotation: an H200's L2 has 60 MB.
FLUSH_BYTES = 256 << 20
#: Cycles for which a GPU is kept busy before a timed step, so that the host is ahead of it: some 0.1 ms.
AHEAD_CYCLES = 200_000
#: Of copies before the first case: a GPU that has been idle is at a fraction of its clock.
SPIN_UP_SECONDS = 1.0


def nothing() -> None:
    """What most steps need before them."""


class Sample(NamedTuple):
    """Of one step, in seconds."""

    device: float  # from its start to its end, where it runs
    host: float  # until the call returned
    processor: float  # of all threads of this process


@dataclass
class Times:
    """Of one contestant, a sample per round."""

    samples: list[Sample] = field(default_factory=list)

    @property
    def seconds(self) -> list[float]:
        return [sample.device for sample in self.samples]

    @property
    def host_seconds(self) -> list[float]:
        return [sample.host for sample in self.samples]

    @property
    def processor_seconds(self) -> list[float]:
        return [sample.processor for sample in self.samples]


class Spread(NamedTuple):
    """A median between its quartiles."""

    median: float
    lower: float
    upper: float


class Contestant(Protocol):
    """What is timed: `prepare` before each sample, outside of the time."""

    @property
    def step(self) -> Step: ...

    @property
    def prepare(self) -> Step: ...


#: After what `settle` leaves in the caches. With one, 64K elements of fp32 took our update 13.7 us in the steps that
#: follow, torch's 29.0; repeated for long 11.4 and 25.9.
STEPS_INTO_CACHE = 10


class CpuTimer:
    """Wall time of a burst of calls, divided by their number.

    settle: called before each sample; see `roof.settler`. A burst, of steps in cache, has unmeasured ones first.
    """

    def __init__(self, burst: int = 1, settle: Step = nothing) -> None:
        self._burst = burst
        self._settle = settle

    def __call__(self, step: Step) -> Sample:
        self._settle()
        for _ in range(STEPS_INTO_CACHE if self._burst > 1 else 0):
            step()
        begin, processor = time.perf_counter(), time.process_time()
        for _ in range(self._burst):
            step()
        wall, processor = time.perf_counter() - begin, time.process_time() - processor
        return Sample(wall / self._burst, wall / self._burst, processor / self._burst)


class CudaTimer:
    """Time between events around a call, with an L2 cache full of something else; or around a burst of calls that find
    there what they left, divided by their number.

    The device has work to do while the host enqueues the steps, so that its time holds no waiting for the host. That is
    so as long as the queue takes all their launches: with about 1,000 in it the host waits.
    """

    def __init__(self, device: torch.device, burst: int = 1) -> None:
        self._burst = burst
        self._flush = torch.empty(FLUSH_BYTES // 4, dtype=torch.float32, device=device)
        self._begin, self._end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def __call__(self, step: Step) -> Sample:
        torch.cuda.synchronize()
        begin, processor = time.perf_counter(), time.process_time()
        for _ in range(self._burst):
            step()
        host, processor = time.perf_counter() - begin, time.process_time() - processor
        torch.cuda.synchronize()
        if self._burst > 1:
            for _ in range(STEPS_INTO_CACHE):
                step()
        else:
            self._flush.fill_(0.0)
            self._flush.sum()  # else as much as the cache holds is still to be written, while the step is timed
        torch.cuda._sleep(AHEAD_CYCLES + int(4e9 * host))  # cycles of some 0.5 ns
        self._begin.record()
        for _ in range(self._burst):
            step()
        self._end.record()
        self._end.synchronize()
        seconds = self._begin.elapsed_time(self._end) * 1e-3
        return Sample(seconds / self._burst, host / self._burst, processor / self._burst)


def spin_up(device: torch.device) -> None:
    """Copies, until the clocks of a GPU are where work keeps them."""
    if device.type != "cuda":
        return
    source, target = (torch.empty(FLUSH_BYTES // 4, dtype=torch.float32, device=device) for _ in range(2))
    end = time.perf_counter() + SPIN_UP_SECONDS
    while time.perf_counter() < end:
        for _ in range(10):
            target.copy_(source)
        torch.cuda.synchronize()


Timer = Callable[[Step], Sample]


def alternate(contestants: Sequence[Contestant], timer: Timer, seconds: float) -> list[Times]:
    """Time all of them in turn for about so long, after two rounds of warming up; each round begins with another."""
    for _ in range(2):
        for contestant in contestants:
            contestant.prepare()
            timer(contestant.step)
    times = [Times() for _ in contestants]
    end = time.perf_counter() + seconds
    for round_index in range(MAX_ROUNDS):
        if round_index >= MIN_ROUNDS and time.perf_counter() > end:
            break
        for turn in range(len(contestants)):
            index = (turn + round_index) % len(contestants)
            contestants[index].prepare()
            times[index].samples.append(timer(contestants[index].step))
    return times


def spread(values: Sequence[float]) -> Spread:
    """Median and quartiles.

    >>> spread([1.0, 2.0, 3.0, 4.0, 100.0])
    Spread(median=3.0, lower=2.0, upper=4.0)
    """
    lower, median, upper = statistics.quantiles(values, n=4, method="inclusive")
    return Spread(median, lower, upper)


def median_ratio(numerators: Sequence[float], denominators: Sequence[float]) -> float:
    """Of samples of the same rounds.

    >>> median_ratio([2.0, 4.0, 6.0], [1.0, 1.0, 3.0])
    2.0
    """
    return statistics.median(a / b for a, b in zip(numerators, denominators, strict=True))
