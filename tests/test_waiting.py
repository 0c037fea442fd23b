"""The check that nothing waits for the GPU, on a pretended one: it sees waits, and leaves torch as it was."""

from __future__ import annotations

import pytest
import torch
from waiting import without_waiting

CUDA = torch.device("cuda", 0)


class Gpu:
    """What the check asks torch.cuda for, in the order in which it was asked."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.is_idle = False

    def synchronize(self, device: torch.device) -> None:
        self.calls.append("wait")

    def _sleep(self, cycles: int) -> None:
        self.calls.append("work")

    def set_sync_debug_mode(self, mode: str) -> None:
        self.calls.append(mode)

    def Event(self) -> Gpu:
        return self

    def record(self) -> None:
        self.calls.append("record")

    def query(self) -> bool:
        return self.is_idle


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Gpu:
    pretended = Gpu()
    for name in ("synchronize", "_sleep", "set_sync_debug_mode", "Event"):
        monkeypatch.setattr(torch.cuda, name, getattr(pretended, name))
    return pretended


def test_calls_are_made_while_the_gpu_is_at_work(gpu: Gpu) -> None:
    with without_waiting(CUDA):
        gpu.calls.append("body")
    assert gpu.calls == ["wait", "error", "work", "record", "body", "default", "wait"]


def test_a_wait_that_torch_does_not_know_is_seen(gpu: Gpu) -> None:
    with pytest.raises(AssertionError, match="the host waited"), without_waiting(CUDA):
        gpu.is_idle = True
    assert gpu.calls[-2:] == ["default", "wait"]


def test_torch_is_left_as_it_was_whatever_happens(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch warns of the mode after setting it, which is an exception where warnings are errors."""
    with pytest.raises(ZeroDivisionError), without_waiting(CUDA):
        raise ZeroDivisionError
    assert gpu.calls[-1] == "default"

    def warn(mode: str) -> None:
        gpu.calls.append(mode)
        if mode == "error":
            raise UserWarning

    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", warn)
    with pytest.raises(UserWarning), without_waiting(CUDA):
        gpu.calls.append("body")
    assert gpu.calls[-2:] == ["error", "default"]


def test_other_devices_are_not_asked(gpu: Gpu) -> None:
    with without_waiting(torch.device("cpu")):
        pass
    assert gpu.calls == []
