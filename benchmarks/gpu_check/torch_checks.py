"""Steps on a GPU as torch's user sees them: nobody waits, nothing is copied, replays are steps.

    python -m benchmarks.gpu_check.torch_checks [--dry-run]

A dry run does on the CPU what can be done there and says what cannot.
"""

from __future__ import annotations

import argparse
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch

from fused_sched import FusedScheduledAdam, schedules

from ..profiled import kernels

SHAPES = [(257, 33), (1024,), (3,), (640, 512), (7, 11, 13), *[(96, 64)] * 40]
#: Some 0.8 s of work ahead of the steps that must not wait for it.
BUSY_CYCLES = 1_500_000_000
STEPS_AHEAD = 20

FORMATS = [
    (torch.float32, "auto", "fp32"),
    (torch.bfloat16, "split16", "bf16"),
    (torch.bfloat16, "split8", "8bit"),
    (torch.bfloat16, "stochastic", "bf16"),
]


class Training:
    """Parameters, their gradients, and the whole tail of a step."""

    def __init__(self, device: str, dtype: torch.dtype, master: str, moments: str) -> None:
        random = torch.Generator().manual_seed(0)
        self.params = [torch.randn(s, generator=random).to(dtype).to(device).requires_grad_() for s in SHAPES]
        self.grads = [torch.zeros_like(param) for param in self.params]
        for param, grad in zip(self.params, self.grads, strict=True):
            param.grad = grad
        lr = schedules.warmup_cosine(1e-2, warmup_steps=3, total_steps=40)
        self.optimizer = FusedScheduledAdam(
            self.params, lr=lr, weight_decay=0.1, master=master, moments=moments, max_grad_norm=1.0, skip_nonfinite=True
        )

    def set_grads(self, step: int) -> None:
        """Different ones every step; now and then one with an infinity."""
        random = torch.Generator().manual_seed(100 + step)
        for grad in self.grads:
            grad.copy_(torch.randn(grad.shape, generator=random))
        if step % 9 == 8:
            self.grads[-1].view(-1)[-1] = torch.inf

    def tensors(self) -> Iterator[torch.Tensor]:
        for param in self.params:
            yield param.detach()
            yield from self.optimizer.state[param].values()


Check = Callable[[Training, Training], str]  # what is wrong; empty if nothing is


class CannotTell(Exception):
    """Why a check says nothing about the product here."""


def check_replays(eager: Training, replayed: Training) -> str:
    """A graph captured once and replayed 30 times has the bits of as many steps, the skipped ones included."""
    on_gpu = eager.params[0].is_cuda
    for training in (eager, replayed):
        training.set_grads(0)
        training.optimizer.step()
    replay: Callable[[], object] = replayed.optimizer.step
    if on_gpu:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            replayed.optimizer.step()
        replay = graph.replay
    rates = set()
    for step in range(1, 31):
        for training in (eager, replayed):
            training.set_grads(step)
        eager.optimizer.step()
        replay()
        rates.add(replayed.optimizer.lr_tensor[0].item())
        if not all(map(torch.equal, eager.tensors(), replayed.tensors())):
            return f"step {step} of a replayed graph differs from the eager one"
    if eager.optimizer.clock != replayed.optimizer.clock or eager.optimizer.clock == 31:
        return f"clocks are {eager.optimizer.clock} and {replayed.optimizer.clock}, with skipped steps among 31"
    return "" if len(rates) > 20 else f"a replayed graph used {len(rates)} rates"


def check_syncs(training: Training, _: Training) -> str:
    """torch's own synchronising calls are errors."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _step in range(10):
            training.optimizer.step()
    except RuntimeError as error:
        return str(error).split("\n")[0]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return ""


def check_busy(training: Training, _: Training) -> str:
    """Steps are enqueued while the GPU is still at work before them."""
    torch.cuda.synchronize()
    event = torch.cuda.Event()
    torch.cuda._sleep(BUSY_CYCLES)
    event.record()
    begin = time.perf_counter()
    for _step in range(STEPS_AHEAD):
        training.optimizer.step()
    host = (time.perf_counter() - begin) / STEPS_AHEAD
    waited = event.query()
    torch.cuda.synchronize()
    print(f"       {1e6 * host:.0f} us of the host per step of {len(training.params)} tensors")
    return f"{STEPS_AHEAD} steps waited for the work before them" if waited else ""


def check_launches(training: Training, _: Training) -> str:
    """Two kernels a step, no copy, no wait."""
    from torch.profiler import ProfilerActivity, profile

    steps = 5
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiled:
        for _step in range(steps):
            training.optimizer.step()
    return wrong_with_launches(profiled.events(), steps)


def wrong_with_launches(events: Iterable[Any], steps: int) -> str:
    """The profiler itself calls cudaDeviceSynchronize as it ends; `check_busy` sees whether a step does."""
    events = list(events)
    found = kernels(events)
    if not found:
        raise CannotTell("the profiler saw no kernel: CUPTI is missing, or may not be used")
    calls = {e.name for e in events if e.name.startswith("cu") and ("ynchronize" in e.name or "Memcpy" in e.name)}
    calls.discard("cudaDeviceSynchronize")
    if len(found) != 2 * steps:
        return f"{len(found)} kernels and copies in {steps} steps, expected {2 * steps}: {sorted(set(found))}"
    return f"calls of the runtime that wait or copy: {sorted(calls)}" if calls else ""


CHECKS: list[tuple[Check, bool]] = [  # and whether it needs a GPU
    (check_replays, False),
    (check_syncs, True),
    (check_busy, True),
    (check_launches, True),
]


def result(check: Callable[[], str]) -> tuple[str, str]:
    """ok, FAILED or left, and why. What a check raises ends no other."""
    try:
        wrong = check()
    except CannotTell as reason:
        return "left", str(reason)
    except Exception as error:
        traceback.print_exc()
        return "FAILED", f"{type(error).__name__}: {error}".split("\n")[0]
    return ("FAILED" if wrong else "ok"), wrong


def results(device: str, formats: tuple[torch.dtype, str, str]) -> Iterator[tuple[str, str, str]]:
    """Of each check, its words and what came of it."""
    trainings: list[Training] = []
    for check, needs_gpu in CHECKS:
        words = (check.__doc__ or "").split("\n")[0]
        if needs_gpu and device == "cpu":
            yield words, "left", ""
            continue

        def checked(check: Check = check) -> str:
            while len(trainings) < 2:
                trainings.append(Training(device, *formats))
            return check(*trainings)

        yield words, *result(checked)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--dry-run", action="store_true")
    device = "cpu" if parser.parse_args().dry_run else "cuda"
    failed = []
    for formats in FORMATS[1:2] if device == "cpu" else FORMATS:
        dtype, master, moments = formats
        for words, state, why in results(device, formats):
            line = f"{state:6} {dtype}, {master} + {moments}: {words} {why}".rstrip()
            print(line, flush=True)
            failed += [line] if state == "FAILED" else []
    # Once more: of a stage that failed the last lines are shown, and tracebacks are long.
    print("\n".join([*failed, f"{len(failed)} checks failed" if failed else "no check failed"]))
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
