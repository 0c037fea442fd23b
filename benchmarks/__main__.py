"""Times optimizer steps against other optimizers and the machine's memory.

    python -m benchmarks [--device cpu|cuda] [--cases formats,tail/fp32,...] [--quick] [--out DIR]

Suites: formats, tail, cache, models, host, groups, tensors, sizes, graph (on a GPU), schedules; "headlines" are the
cases of the summary. `*` and `?` match within names. Writes DIR/<device>.json, .md and .png, by default into
benchmarks/results; the first, and on a GPU gpu.json, after every case. The exit status is 1 if a case failed.

Whoever will end this process says when in $FUSED_SCHED_DEADLINE, in seconds since the epoch: no case is begun in the
40 seconds before. $FUSED_SCHED_COMMIT names the commit where .git is missing.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import torch

from . import bars, cases, measure, peers, report, schedule_time, timing
from .cases import Case

SCHEDULES, HEADLINES = "schedules", "headlines"
#: Of --quick: elements of a case from memory, and seconds per case.
QUICK_ELEMENTS, QUICK_SECONDS = 1 << 18, 0.02
#: Before a deadline, for the case that is running, the tables and the picture.
SECONDS_TO_FINISH = 40.0
#: Of them, for counting launches.
SECONDS_TO_COUNT = 15.0

T = TypeVar("T")


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--cases", default="*", help="suites or cases, comma-separated; all")
    parser.add_argument("--quick", action="store_true", help="small and short: does it run?")
    parser.add_argument("--seconds", type=float, help="per case, by default 2")
    parser.add_argument("--budget", type=float, help="seconds after which no further case is begun")
    parser.add_argument("--elements", type=int, help="of cases from memory; by default 16.8M, on a GPU 2^28")
    parser.add_argument("--threads", type=int, help="of a CPU, by default torch's choice")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("results"))
    parser.add_argument("--check", action="store_true", help="exit with 1 if a bar is missed")
    return parser.parse_args(arguments)


def progress(items: Iterable[T], describe: Any, total: int) -> Iterator[T]:
    """On a terminal a bar by rich or tqdm, whichever is there, else a line per item: a log that ends early has it."""
    if not sys.stdout.isatty():
        yield from lines(items, describe, total)
        return
    try:
        from rich.progress import Progress
    except ImportError:
        pass
    else:
        with Progress() as bar:
            task = bar.add_task("", total=total)
            for item in items:
                bar.update(task, description=describe(item))
                yield item
                bar.advance(task)
        return
    try:
        from tqdm import tqdm
    except ImportError:
        yield from lines(items, describe, total)
        return
    for item in (bar := tqdm(items, total=total)):
        bar.set_description(describe(item))
        yield item


def lines(items: Iterable[T], describe: Any, total: int) -> Iterator[T]:
    for number, item in enumerate(items, start=1):
        print(f"[{number}/{total}] {describe(item)}", flush=True)
        yield item


def end_of_cases(budget: float | None) -> float:
    """On the monotonic clock, when no further case is begun."""
    left = budget or math.inf
    if deadline := os.environ.get("FUSED_SCHED_DEADLINE"):
        left = min(left, float(deadline) - time.time() - SECONDS_TO_FINISH)
    return time.monotonic() + left


def run(options: argparse.Namespace, save: Callable[[dict[str, Any]], object] = lambda report: None) -> dict[str, Any]:
    """Measure what the options name.

    save: called with the report after every case. A case that fails is absent from it, for a reason that it tells.
    """
    device = torch.device(options.device)
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise SystemExit("python -m benchmarks --device cuda needs a GPU that torch can use, and finds none")
        device = torch.device("cuda", torch.cuda.current_device())
    if options.threads:
        torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    elements = options.elements or (QUICK_ELEMENTS if options.quick else None)
    seconds = options.seconds or (QUICK_SECONDS if options.quick else 2.0)
    words = options.cases.replace(HEADLINES, ",".join(report.HEADLINES)).split(",")
    patterns = [pattern for pattern in words if pattern != SCHEDULES]
    chosen = cases.select(cases.all_cases(device.type, elements), ",".join(patterns)) if patterns else []
    names = list(dict.fromkeys(["fused_sched", *(peer for case in chosen for peer in case.peers)]))
    installed = [name for name in names if not peers.absent(name, device)]
    about = {**report.conditions(device, peers.versions(installed)), "seconds_per_case": seconds}
    found: dict[str, Any] = {"device": device.type, "conditions": about, "results": [], "bars": []}
    found |= {"missing": {}, "failed": [], "schedules": []}
    end = end_of_cases(options.budget)
    if device.type == "cuda":
        timing.spin_up(device)
        about["gpu_before"] = report.gpu_state(device)
    results = measure_cases(chosen, device, end, found, save)
    if device.type == "cuda":
        about["gpu_after"] = report.gpu_state(device)
        save(found)
        counted = [case for case in chosen if case.key in results]
        count_launches(counted, results, device, end + SECONDS_TO_COUNT, found)
    if SCHEDULES in words or "*" in words:
        if time.monotonic() > end:
            found["missing"][SCHEDULES] = "the time was over"
        else:
            found["schedules"] = schedule_time.measure(1 if options.quick else 7)
    return found


def measure_cases(
    chosen: list[Case],
    device: torch.device,
    end: float,
    found: dict[str, Any],
    save: Callable[[dict[str, Any]], object],
) -> bars.Results:
    """Measure cases into the report `found`, up to the end or the GPU's."""
    results: dict[str, list[measure.Measured]] = {}
    missing: dict[str, str] = found["missing"]
    lost_in = ""
    for case in progress(chosen, lambda case: case.key, len(chosen)):
        if lost_in or time.monotonic() > end:
            missing[case.key] = f"the GPU was lost in {lost_in}" if lost_in else "the time was over"
            continue
        try:
            results[case.key], absent = measure.measure(case, device, found["conditions"]["seconds_per_case"])
        except torch.cuda.OutOfMemoryError as error:
            absent = {case.key: measure.why(error)}
        except Exception as error:
            traceback.print_exc()
            absent = {case.key: measure.why(error)}
            found["failed"].append(case.key)
            lost_in = case.key if measure.is_lost(device) else ""
        missing |= absent
        found["results"] = [measured.row for rows in results.values() for measured in rows]
        compiled_pass = found["conditions"].get("compiled_pass")
        found["bars"] = bars.as_rows(bars.verdicts(device.type, results, compiled_pass))
        save(found)
    return results


def count_launches(
    measured: list[Case], results: bars.Results, device: torch.device, end: float, found: dict[str, Any]
) -> None:
    """Add them to the rows of these cases, as far as the time goes."""
    for case in measured:
        if time.monotonic() > end:
            return
        try:
            counted = measure.launches(case, device)
        except Exception as error:  # the profiler's; and nothing works on a GPU that was lost
            found["missing"]["launches"] = measure.why(error)
            return
        for peer in results[case.key]:
            peer.row["launches"] = counted.get(peer.row["peer"])


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    found = run(options, lambda report_so_far: report.save(report_so_far, options.out))
    for path in report.write(found, options.out):
        print(f"wrote {path}", flush=True)
    print(report.markdown(found))
    missed = [bar for bar in found["bars"] if not bar["met"]]
    return int(bool(found["failed"]) or (options.check and bool(missed)))


if __name__ == "__main__":
    sys.exit(main())
