"""Calls that must not wait for the GPU: made while it is at work, with torch's own waits as errors."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

#: Some 0.8 s of a GPU at 1.9 GHz: the calls that must not wait for it take milliseconds.
BUSY_CYCLES = 1_500_000_000


@contextmanager
def without_waiting(device: torch.device) -> Iterator[None]:
    """Fails where its body waits for a CUDA device; on other devices it does nothing.

    Torch's mode knows torch's own waits only. Those of `_cuda` show in that the work before them is over. The body
    should do nothing for the first time: loading a kernel and allocating page-locked memory may wait.
    """
    if device.type != "cuda":
        yield
        return
    torch.cuda.synchronize(device)
    work = torch.cuda.Event()
    try:
        torch.cuda.set_sync_debug_mode("error")
        torch.cuda._sleep(BUSY_CYCLES)
        work.record()
        yield
        waited = work.query()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize(device)
    assert not waited, "the host waited for the work that the GPU had to do before"
