"""The wrapper around `step()`: torch's own for whoever listens, and nothing of it to be seen otherwise."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from fused_sched import FusedScheduledAdam

LABEL = "Optimizer.step#{}.step"


class Renamed(FusedScheduledAdam):
    pass


CLASSES = pytest.mark.parametrize("kind", [FusedScheduledAdam, Renamed])


def trained(kind: type[FusedScheduledAdam]) -> FusedScheduledAdam:
    """An optimizer in its steady steps."""
    param = torch.nn.Parameter(torch.ones(4))
    param.grad = torch.ones(4)
    optimizer = kind([param], lr=0.1)
    for _ in range(3):
        optimizer.step()
    return optimizer


@pytest.fixture
def seen() -> list[Any]:
    return []


@pytest.fixture(params=["own", "global"])
def add_hooks(request: pytest.FixtureRequest, seen: list[Any]) -> Iterator[Callable[[FusedScheduledAdam], ExitStack]]:
    """Registers a hook before and one after the step; both note their arguments."""
    with ExitStack() as handles:

        def add(optimizer: FusedScheduledAdam) -> ExitStack:
            before, after = (
                (optimizer.register_step_pre_hook, optimizer.register_step_post_hook)
                if request.param == "own"
                else (register_optimizer_step_pre_hook, register_optimizer_step_post_hook)
            )
            for register in (before, after):
                handle = register(lambda o, args, kwargs: seen.append((o.clock, args[1:], kwargs)))  # type: ignore[arg-type]
                handles.callback(handle.remove)
            return handles

        yield add


@CLASSES
def test_hooks_added_to_a_steady_optimizer_are_called_once(
    kind: type[FusedScheduledAdam], add_hooks: Callable[[FusedScheduledAdam], ExitStack], seen: list[Any]
) -> None:
    optimizer = trained(kind)
    handles = add_hooks(optimizer)
    optimizer.step()
    assert seen == [(3, (), {}), (4, (), {})]
    closure = torch.enable_grad()(lambda: 7.0)
    assert optimizer.step(closure=closure) == 7.0
    assert seen[2:] == [(4, (), {"closure": closure}), (5, (), {"closure": closure})]
    handles.close()
    optimizer.step()
    assert len(seen) == 4
    assert optimizer.clock == 6


def test_a_hook_may_replace_the_closure(seen: list[Any]) -> None:
    optimizer = trained(FusedScheduledAdam)
    optimizer.register_step_pre_hook(lambda o, args, kwargs: ((o, lambda: "replaced"), {}))
    assert optimizer.step() == "replaced"


def test_a_hook_that_the_closure_adds_is_called_in_that_step(seen: list[Any]) -> None:
    optimizer = trained(FusedScheduledAdam)
    optimizer.step(lambda: optimizer.register_step_post_hook(lambda o, args, kwargs: seen.append(o.clock)))
    assert seen == [4]


@CLASSES
def test_a_profiler_reads_the_label_of_every_step_it_sees(kind: type[FusedScheduledAdam]) -> None:
    optimizer = trained(kind)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiled:
        optimizer.step()
        optimizer.step()
    optimizer.step()
    counts = {event.key: event.count for event in profiled.key_averages()}
    assert counts[LABEL.format(kind.__name__)] == 2
    assert sum(key.startswith("Optimizer.step#") for key in counts) == 1
    assert optimizer.clock == 6


def test_a_subclass_with_a_step_of_its_own_is_wrapped_as_well(seen: list[Any]) -> None:
    class Twice(FusedScheduledAdam):
        def step(self, closure: Callable[[], Any] | None = None) -> Any:
            super().step()
            super().step()

    optimizer = trained(Twice)
    optimizer.register_step_post_hook(lambda o, args, kwargs: seen.append(o.clock))
    optimizer.step()
    assert seen[-1] == optimizer.clock == 8


def test_the_step_keeps_its_signature() -> None:
    trained(FusedScheduledAdam)
    assert list(inspect.signature(FusedScheduledAdam.step).parameters) == ["self", "closure"]


def test_without_a_listener_torchs_wrapper_is_left_out(monkeypatch: pytest.MonkeyPatch, seen: list[Any]) -> None:
    monkeypatch.setattr(torch.optim.Optimizer, "_optimizer_step_code", lambda self: seen.append(1))
    optimizer = trained(FusedScheduledAdam)
    assert not seen  # which it calls in every step
    optimizer.step(lambda: None)
    assert seen == [1]
