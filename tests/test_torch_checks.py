"""Steps on a GPU as torch's user sees them: the checks themselves, on a machine without a GPU."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks.gpu_check import torch_checks
from benchmarks.gpu_check.torch_checks import CannotTell, wrong_with_launches

ON_GPU, ON_CPU = torch.autograd.DeviceType.CUDA, torch.autograd.DeviceType.CPU


def test_torch_checks_in_small(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["torch_checks", "--dry-run"])
    assert torch_checks.main() == 0
    shown = capsys.readouterr().out
    assert (shown.count("ok     "), shown.count("left   ")) == (1, 3)
    assert shown.endswith("no check failed\n")


def test_torch_checks_see_steps_that_differ() -> None:
    a, b = (torch_checks.Training("cpu", *torch_checks.FORMATS[0]) for _ in range(2))
    b.optimizer.param_groups[0]["weight_decay"] = 0.2
    assert torch_checks.check_replays(a, b) == "step 1 of a replayed graph differs from the eager one"


def test_a_check_that_raises_ends_no_other(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> str:
        """Raises."""
        raise RuntimeError("CUDA error: an illegal memory access was encountered\nmore")

    def silent(*_: Any) -> str:
        """Cannot tell."""
        raise CannotTell("CUPTI is missing")

    def good(*_: Any) -> str:
        """Is good."""
        return ""

    monkeypatch.setattr(torch_checks, "CHECKS", [(broken, False), (silent, False), (good, False)])
    monkeypatch.setattr(sys, "argv", ["torch_checks", "--dry-run"])
    assert torch_checks.main() == 1
    formats = "torch.bfloat16, split16 + bf16"
    assert capsys.readouterr().out.splitlines() == [
        f"FAILED {formats}: Raises. RuntimeError: CUDA error: an illegal memory access was encountered",
        f"left   {formats}: Cannot tell. CUPTI is missing",
        f"ok     {formats}: Is good.",
        f"FAILED {formats}: Raises. RuntimeError: CUDA error: an illegal memory access was encountered",
        "1 checks failed",
    ]


def event(name: str, device: Any = ON_CPU, is_label: bool = False) -> Any:
    return SimpleNamespace(name=name, device_type=device, is_user_annotation=is_label)


STEP = [
    event("Optimizer.step#FusedScheduledAdam.step", is_label=True),
    event("Optimizer.step#FusedScheduledAdam.step", ON_GPU, is_label=True),  # on the GPU's side of the trace, too
    event("cudaLaunchKernel"),
    event("norm_kernel", ON_GPU),
    event("update_kernel", ON_GPU),
]
END = [event("cudaDeviceSynchronize"), event("cudaDeviceSynchronize")]  # as the profiler ends


def test_launches_are_counted_without_labels_and_the_profilers_own_wait() -> None:
    assert wrong_with_launches([*STEP, *STEP, *END], 2) == ""


def test_a_launch_too_many_a_wait_and_a_copy_are_seen() -> None:
    fill = event("Memset (Device)", ON_GPU)
    assert wrong_with_launches([*STEP, fill, *END], 1).startswith("3 kernels and copies in 1 steps, expected 2")
    for call in ("cudaStreamSynchronize", "cudaEventSynchronize", "cudaMemcpyAsync"):
        wrong = wrong_with_launches([*STEP, event(call), *END], 1)
        assert wrong == f"calls of the runtime that wait or copy: ['{call}']"


def test_a_profiler_without_cupti_tells_nothing() -> None:
    with pytest.raises(CannotTell, match="CUPTI is missing"):
        wrong_with_launches([event("cudaLaunchKernel"), *END], 1)
