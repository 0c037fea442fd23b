"""Commands that end in time, with all that they have started."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

#: For a process that was killed while the driver works for it.
SECONDS_TO_DIE = 10.0
#: Its own group, so that compilers and workers can be killed with it; in the caller's session, whose end it shares.
OWN_GROUP: dict[str, Any] = {"process_group": 0} if sys.version_info >= (3, 11) else {"preexec_fn": os.setpgrp}


def run(command: Sequence[str], seconds: float, output: IO[Any], folder: Path, environment: Mapping[str, str]) -> str:
    """Why the command failed; empty if it did not. After so many seconds it is killed, and so is what it leaves."""
    try:
        process = subprocess.Popen(
            command,
            cwd=folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            **OWN_GROUP,
        )
    except OSError as error:
        return str(error)
    try:
        status = process.wait(seconds)
    except subprocess.TimeoutExpired:
        return f"not done after {seconds:.0f} s"
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(SECONDS_TO_DIE)
    return f"exit status {status}" if status else ""
