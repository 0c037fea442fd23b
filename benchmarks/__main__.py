"""Times optimizer steps against other optimizers and the machine's memory.

    python -m benchmarks [--device cpu|cuda] [--cases formats,tail/fp32,...] [--quick] [--out DIR]

Suites: formats, tail, cache, models, host, groups, tensors, sizes, graph (on a GPU), schedules; "headlines" are the
cases of the summary. `*` and `?` match within names. Writes DIR/<device>.json, .md and .png, by default into
benchmarks/results.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import torch

from . import bars, cases, measure, peers, report, schedule_time

SCHEDULES, HEADLINES = "schedules", "headlines"
#: Of --quick: elements of a case from memory, and seconds per case.
QUICK_ELEMENTS, QUICK_SECONDS = 1 << 18, 0.02

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
    """A bar by rich or tqdm, whichever is there, else a line per item."""
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
        for number, item in enumerate(items, start=1):
            print(f"[{number}/{total}] {describe(item)}", flush=True)
            yield item
        return
    for item in (bar := tqdm(items, total=total)):
        bar.set_description(describe(item))
        yield item


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Measure what the options name."""
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
    about = report.conditions(device, peers.versions(installed))
    results: dict[str, list[measure.Measured]] = {}
    missing: dict[str, str] = {}
    end = time.monotonic() + (options.budget or math.inf)
    for case in progress(chosen, lambda case: case.key, len(chosen)):
        if time.monotonic() > end:
            missing[case.key] = "the time was over"
            continue
        try:
            results[case.key], absent = measure.measure(case, device, seconds)
        except torch.cuda.OutOfMemoryError as error:
            absent = {case.key: str(error).split("\n")[0]}
            torch.cuda.empty_cache()
        missing |= absent
    wants_schedules = SCHEDULES in words or "*" in words
    return {
        "device": device.type,
        "conditions": {**about, "seconds_per_case": seconds},
        "results": [measured.row for rows in results.values() for measured in rows],
        "bars": bars.as_rows(bars.verdicts(device.type, results)),
        "missing": missing,
        "schedules": schedule_time.measure(1 if options.quick else 7) if wants_schedules else [],
    }


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    found = run(options)
    print(report.markdown(found))
    for path in report.write(found, options.out):
        print(f"wrote {path}")
    missed = [bar for bar in found["bars"] if not bar["met"]]
    return int(options.check and bool(missed))


if __name__ == "__main__":
    sys.exit(main())
