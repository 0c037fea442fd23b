"""What nvidia-smi tells of a GPU. No torch is imported."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence

#: It hangs where a driver does.
SECONDS = 30.0
#: What a time depends on. A field that a driver does not know fails the whole query: these are old.
STATE = ("driver_version", "pstate", "clocks.sm", "clocks.mem", "clocks.max.sm", "clocks.max.mem", "temperature.gpu")


def query(fields: Sequence[str], gpu: str | None = None) -> dict[str, str]:
    """Of the first GPU, or of that with this UUID; empty where there is no answer."""
    command = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader"]
    try:
        done = subprocess.run(
            [*command, f"--id={gpu}"] if gpu else command, capture_output=True, text=True, timeout=SECONDS
        )
    except (OSError, subprocess.TimeoutExpired):
        return {}
    values = [value.strip() for value in done.stdout.split("\n")[0].split(",")]
    return dict(zip(fields, values, strict=True)) if done.returncode == 0 and len(values) == len(fields) else {}
