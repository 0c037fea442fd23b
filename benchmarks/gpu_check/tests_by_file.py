"""Tests marked `cuda`, a process per file and several side by side.

    python -m benchmarks.gpu_check.tests_by_file [--workers 4] [--limit 120] FILE...

An illegal access ends the use of the GPU for its process: all later tests there fail as well. A file that hangs is
killed after its limit, in seconds, or 10 before $FUSED_SCHED_DEADLINE. The exit status is 1 if a file failed; one whose
tests need a package that is not installed is left.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field

from .stages import PYTHON, ROOT

#: Before a deadline, for the summary.
SECONDS_TO_FINISH = 10.0
#: -vv undoes the project's -q and names each test before it runs: the last line of one that hangs is its name.
PYTEST = (
    *("-m", "pytest", "-vv", "--tb=short", "-rfE", "-m", "cuda", "--maxfail=60", "--durations=10"),
    *("-p", "no:cacheprovider", "-o", "faulthandler_timeout=60"),
    # Errors elsewhere: on a GPU's machine torch warns about what is not this project's.
    *("-W", "default::UserWarning"),
)
#: pytest's status where no test was chosen.
NOTHING_CHOSEN = 5
NOT_BEGUN = "not begun"
COUNTED = re.compile(r"(\d+) (passed|failed|error|skipped|xfailed|xpassed|deselected)")


@dataclass(frozen=True)
class Result:
    """What became of a file."""

    file: str
    state: str  # ok, failed, left, or not begun, when the time was over: no success either
    seconds: float
    why: str = ""
    output: str = ""
    counts: Counter[str] = field(default_factory=Counter)


def run_file(file: str, limit: float, deadline: float) -> Result:
    """Its tests, in a process."""
    left = min(limit, deadline - SECONDS_TO_FINISH - time.time())
    if left < 1.0:
        return Result(file, NOT_BEGUN, 0.0)
    begin = time.monotonic()
    # Packages of this machine may come with plugins of pytest that warn, and warnings are errors.
    environment = {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    with tempfile.TemporaryFile("w+", errors="replace") as log:
        try:
            # In this process's group: who kills that kills it.
            done = subprocess.run(
                [PYTHON, *PYTEST, file], cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT, timeout=left
            )
            why = "" if done.returncode in (0, NOTHING_CHOSEN) else f"exit status {done.returncode}"
        except subprocess.TimeoutExpired:
            why = f"not done after {left:.0f} s"
        log.seek(0)
        output = log.read()
    seconds = time.monotonic() - begin
    counts = counted(output)
    lacking = lacking_package(output) if counts.keys() <= {"error", "deselected"} else ""
    if why and lacking:
        return Result(file, "left", seconds, f"there is no {lacking}", output)
    if why.startswith("not done"):
        begun = re.findall(r"^\S+::\S+", output, re.M)
        why += f": {begun[-1]}" if begun else ""
    return Result(file, "failed" if why else "ok", seconds, why, output, counts)


def counted(output: str) -> Counter[str]:
    """By pytest's last line, "1 failed, 3 passed, 2 errors in 1.2s"; without one by the tests' own lines."""
    last = output.strip().splitlines()[-1] if output.strip() else ""
    if re.search(r" in \d+\.\d+s", last):
        return Counter({word: int(number) for number, word in COUNTED.findall(last)})
    words = {"PASSED": "passed", "FAILED": "failed", "ERROR": "error", "SKIPPED": "skipped"}
    return Counter(words[word] for word in re.findall(r"^\S+::.* (PASSED|FAILED|ERROR|SKIPPED)\b", output, re.M))


def lacking_package(output: str) -> str:
    """One that the file imports and this machine does not have; empty for the project's own."""
    found = re.search(r"^E\s+ModuleNotFoundError: No module named '(\w+)", output, re.M)
    if found is None or found[1] in ("fused_sched", "benchmarks") or importlib.util.find_spec(found[1]) is not None:
        return ""
    return found[1]


def summary(results: Sequence[Result]) -> list[str]:
    """Files that did not pass, failed tests, and the sum."""
    late = [result.file for result in results if result.state == NOT_BEGUN]
    lines = [f"{NOT_BEGUN}: {' '.join(late)}"] if late else []
    ended = [result for result in results if result.state in ("failed", "left")]
    lines += [f"{r.state:7} {r.file:36} {r.seconds:6.1f} s  {r.why}".rstrip() for r in ended]
    for result in (r for r in results if r.state == "failed"):
        lines += re.findall(r"^(?:FAILED|ERROR) tests/.*", result.output, re.M)
    total: Counter[str] = sum((result.counts for result in results), Counter())
    del total["deselected"]
    states = Counter(result.state for result in results)
    tests = ", ".join(f"{number} {word}" for word, number in sorted(total.items())) or "no tests"
    return [*lines, f"{tests}; files: " + ", ".join(f"{number} {state}" for state, number in sorted(states.items()))]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("files", nargs="+")
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--limit", type=float, default=120.0, help="seconds per file")
    options = parser.parse_args(arguments)
    deadline = float(os.environ.get("FUSED_SCHED_DEADLINE", "inf"))
    results = []
    with ThreadPoolExecutor(options.workers) as pool:
        running = [pool.submit(run_file, file, options.limit, deadline) for file in options.files]
        for future in as_completed(running):
            result = future.result()
            results.append(result)
            print(f"---- {result.state} {result.file} {result.seconds:.1f} s\n{result.output}", flush=True)
    print("\n".join(summary(sorted(results, key=lambda result: result.file))), flush=True)
    return int(any(result.state in ("failed", NOT_BEGUN) for result in results))


if __name__ == "__main__":
    sys.exit(main())
