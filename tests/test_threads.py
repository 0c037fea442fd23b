"""The pool of threads under callers that share it: other Python threads, forked children."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest
import torch

from fused_sched import FusedScheduledAdam, backends

pytestmark = pytest.mark.skipif(not backends.available("cpu")[0], reason="the compiled CPU backend was not built")

NUMEL = 300_000  # ten runs of work: enough for several threads


@pytest.fixture(autouse=True)
def several_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


def train(seed: int, steps: int = 20) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    param = torch.randn(NUMEL, generator=generator).requires_grad_()
    optimizer = FusedScheduledAdam([param], lr=0.01)
    for _ in range(steps):
        param.grad = torch.randn(NUMEL, generator=generator)
        optimizer.step()
    return param.detach()


def test_optimizers_stepped_from_several_python_threads() -> None:
    expected = [train(seed) for seed in range(4)]
    results: dict[int, torch.Tensor] = {}
    threads = [threading.Thread(target=lambda s=seed: results.__setitem__(s, train(s))) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(results[seed], expected[seed]) for seed in range(4))


FORK = f"""
import os, torch
from fused_sched import FusedScheduledAdam
torch.set_num_threads(4)
param = torch.zeros({NUMEL}, requires_grad=True)
param.grad = torch.ones({NUMEL})
optimizer = FusedScheduledAdam([param], lr=0.125, betas=(0.0, 0.0), eps=0.0)
optimizer.step()
child = os.fork()
if child == 0:
    optimizer.step()
    # Read without torch's own threads, which a child does not have either.
    os._exit(0 if (param[0].item(), param[-1].item(), optimizer.clock) == (-0.25, -0.25, 2) else 1)
_, status = os.waitpid(child, 0)
optimizer.step()
print(os.waitstatus_to_exitcode(status), param[0].item(), optimizer.clock)
"""


def test_a_forked_child_steps_without_the_parents_threads() -> None:
    """The child would wait for ever for threads that only its parent has."""
    done = subprocess.run([sys.executable, "-c", FORK], capture_output=True, text=True, timeout=120)
    assert done.stdout.split() == ["0", "-0.25", "2"], done.stdout + done.stderr


def test_subnormals_count_whatever_the_caller_has_set() -> None:
    """torch.set_flush_denormal changes the calling thread alone; its share of the elements must not differ."""
    expected = torch.tensor(0.5e-39).view(torch.int32).item()
    assert expected != 0
    param = torch.zeros(NUMEL, requires_grad=True)
    param.grad = torch.full((NUMEL,), 1e-39)
    optimizer = FusedScheduledAdam([param], lr=0.125, betas=(0.5, 0.5), backend="cpu")
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot flush subnormals")
    try:
        optimizer.step()
    finally:
        torch.set_flush_denormal(False)
    assert optimizer.state[param]["exp_avg"].view(torch.int32).unique().tolist() == [expected]


@pytest.mark.parametrize("threads", [1, 3])
def test_thread_count_follows_torch(threads: int) -> None:
    torch.set_num_threads(threads)
    param = torch.zeros(8, requires_grad=True)
    param.grad = torch.ones(8)
    optimizer = FusedScheduledAdam([param], lr=0.1, backend="cpu")
    optimizer.step()
    engine = optimizer._devices.first
    assert engine is not None
    assert engine._call.num_threads == threads  # type: ignore[attr-defined]


def test_other_python_threads_run_during_a_step() -> None:
    """A thread that may run from just before the step has run when it returns, and only if the GIL was released."""
    torch.set_num_threads(1)
    param = torch.zeros(20_000_000, requires_grad=True)
    param.grad = torch.ones_like(param)
    optimizer = FusedScheduledAdam([param], lr=0.1, backend="cpu")
    optimizer.step()
    engine = optimizer._devices.first
    gate, ran = threading.Lock(), []

    def other() -> None:
        with gate:
            ran.append(True)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(5.0)  # seconds: nobody is made to hand the GIL over meanwhile
    try:
        with gate:
            thread = threading.Thread(target=other)
            thread.start()
        engine._module.update(engine._call)  # type: ignore[union-attr]
        ran_during_the_step = bool(ran)
    finally:
        sys.setswitchinterval(interval)
    thread.join()
    assert ran_during_the_step
