"""What becomes of a test whose backend cannot be used: skipped where that is to be expected, failed elsewhere."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

import conftest
import pytest
import torch
from conftest import ON_CUDA, REFERENCE_ON_CUDA, Backend, leave_out

from benchmarks.gpu_check import stages

SKIPPED, FAILED = pytest.skip.Exception, pytest.fail.Exception


@pytest.mark.parametrize("name", ON_CUDA)
@pytest.mark.parametrize(
    ("sees_gpu", "asked", "outcome"),
    [
        (False, None, SKIPPED),
        (False, "1", FAILED),
        (True, None, FAILED),
        (True, "", FAILED),
        (True, "1", FAILED),
        (True, "0", SKIPPED),
    ],
)
def test_where_a_gpu_is_seen_its_tests_are_not_skipped(
    name: str, sees_gpu: bool, asked: str | None, outcome: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: sees_gpu)
    monkeypatch.delenv("FUSED_SCHED_REQUIRE_CUDA", raising=False)
    if asked is not None:
        monkeypatch.setenv("FUSED_SCHED_REQUIRE_CUDA", asked)
    with pytest.raises(outcome, match="no nvcc"):
        leave_out(name, "no nvcc")


def test_what_needs_no_gpu_is_skipped_beside_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FUSED_SCHED_REQUIRE_CUDA", "1")
    with pytest.raises(SKIPPED, match=r"no g\+\+"):
        leave_out("cuda-on-cpu", "no g++")


def test_other_words_for_it_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FUSED_SCHED_REQUIRE_CUDA", "yes")
    with pytest.raises(FAILED, match="must be 0 or 1, got 'yes'"):
        leave_out("cuda", "no nvcc")


@pytest.mark.parametrize(("name", "backend"), [("cuda", "cuda"), (REFERENCE_ON_CUDA, "reference")])
def test_device_of_a_gpus_backend_is_that_of_its_tensors(
    name: str, backend: str, get_backend: Callable[[str], Backend], monkeypatch: pytest.MonkeyPatch
) -> None:
    """`cuda` without an index is another key than the `cuda:0` of a tensor, and finds nothing that is kept for it."""
    monkeypatch.setattr(conftest, "unusable_because", lambda name: "")
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    assert get_backend(name) == Backend(backend, torch.device("cuda", 3))


def test_what_needs_a_gpu_needs_no_other_package() -> None:
    """The machine with the GPU may have torch, NumPy and pytest alone: files that it cannot import go unrun."""
    files = stages.tests_for_gpu()
    assert len(files) > 20
    others = ["deepspeed", "hypothesis", "matplotlib", "optax", "rich", "sklearn", "timm", "transformers"]
    script = f"""
import importlib, pathlib, sys
sys.modules.update(dict.fromkeys({others}))
sys.path[:0] = ["tests", "docs", "."]
for file in {files}:
    importlib.import_module(pathlib.Path(file).stem)
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=stages.ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
