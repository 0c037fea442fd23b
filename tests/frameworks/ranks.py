"""Checks that several processes run together: a worker file registers them, every rank runs all of them in order.

Starting processes costs seconds and a check milliseconds, so each file starts its ranks once; what every check
had to say comes back as a file per rank.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]

#: A rank that waits longer for another one has lost it.
COLLECTIVE_TIMEOUT = timedelta(seconds=60)

Check = Callable[[], None]


class Checks(dict[str, Check]):
    """The checks of a worker file, by name; a decorator registers one."""

    def __call__(self, check: Check) -> Check:
        self[check.__name__] = check
        return check


def environment(rank: int, world_size: int, port: int) -> dict[str, str]:
    return {
        **os.environ,
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "GLOO_SOCKET_IFNAME": "lo",
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
        "PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "tests", HERE))),
        "PYTHONWARNINGS": "ignore",  # of the frameworks' own imports
        "TOKENIZERS_PARALLELISM": "false",
    }


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def start(command: list[str], world_size: int, folder: Path, timeout: float = 300.0) -> list[str]:
    """Run a command as `world_size` ranks; what each printed. Raises if one fails."""
    port = free_port()
    logs = [folder / f"rank{rank}.log" for rank in range(world_size)]
    processes = []
    for rank, log in enumerate(logs):
        with log.open("w") as output:
            own = environment(rank, world_size, port)
            processes.append(subprocess.Popen(command, env=own, stdout=output, stderr=subprocess.STDOUT, cwd=folder))
    deadline = time.monotonic() + timeout
    codes: list[int | None] = [None] * world_size
    try:
        for rank, process in enumerate(processes):
            codes[rank] = process.wait(max(0.0, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        pass  # None is the exit code of a rank that hangs
    finally:
        for process in processes:
            process.kill()
            process.wait()
    printed = [log.read_text() for log in logs]
    if any(code != 0 for code in codes):
        tails = "\n".join(
            f"--- rank {rank}, exit code {codes[rank]}\n{text[-6000:]}" for rank, text in enumerate(printed)
        )
        raise RuntimeError(f"{' '.join(command)}\n{tails}")
    return printed


def outcomes(worker: str, world_size: int, *arguments: str, shared: Path | None = None) -> dict[str, str]:
    """Run a worker file's checks; the traceback of each, empty where it passed on every rank.

    shared: a folder that one run of a worker file leaves to the next.
    """
    with tempfile.TemporaryDirectory() as name:
        run = Path(name)
        start([sys.executable, str(HERE / f"{worker}.py"), str(shared or run), *arguments], world_size, run)
        ranks = [json.loads((run / f"outcome{rank}.json").read_text()) for rank in range(world_size)]
    return {
        check: "\n".join(f"rank {rank}: {outcome[check]}" for rank, outcome in enumerate(ranks) if outcome[check])
        for check in ranks[0]
    }


def run_checks(checks: Checks) -> None:
    """What a worker file ends with; its outcome goes to the working directory, which is this run's own."""
    import torch.distributed as dist

    rank = int(os.environ["RANK"])
    if not dist.is_initialized():
        dist.init_process_group("gloo", timeout=COLLECTIVE_TIMEOUT)
    outcome = {}
    for name, check in checks.items():
        try:
            check()
            outcome[name] = ""
        except Exception:
            outcome[name] = traceback.format_exc()
            print(name, outcome[name], flush=True)
        dist.barrier()
    Path(f"outcome{rank}.json").write_text(json.dumps(outcome))
    leave()


def leave() -> None:
    """End a rank: threads of DeepSpeed and gloo abort some interpreters that end by themselves."""
    import torch.distributed as dist

    dist.barrier()
    sys.stdout.flush()
    os._exit(0)


def folder() -> Path:
    """The folder that the ranks share."""
    return Path(sys.argv[1])
