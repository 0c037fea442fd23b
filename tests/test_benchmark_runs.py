"""A run of the benchmark from its first case to its last, and what is kept of one that goes wrong."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks import __main__ as command
from benchmarks import measure, peers, report
from benchmarks.cases import LADDER, Case

# -- what it says about itself --------------------------------------------------------------------------------


def test_the_commit_is_named_where_git_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(report, "ROOT", tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    monkeypatch.delenv("FUSED_SCHED_COMMIT", raising=False)
    assert report.commit() is None
    assert capfd.readouterr().err == "", "git diff shows its usage outside of a checkout"
    monkeypatch.setenv("FUSED_SCHED_COMMIT", "0123abc")
    assert report.commit() == "0123abc"


def test_a_save_that_is_cut_short_leaves_the_one_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    about = {"device": "some GPU", "versions": {"torch": "2"}, "commit": None}
    found = {"device": "cuda", "conditions": about, "results": []}
    assert [path.name for path in report.save(found, tmp_path)] == ["cuda.json", "gpu.json"]

    def write_half(path: Path, text: str) -> None:
        with path.open("w") as file:
            file.write(text[: len(text) // 2])
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "write_text", write_half)
    with pytest.raises(KeyboardInterrupt):
        report.save({**found, "results": []}, tmp_path)
    monkeypatch.undo()
    assert json.loads((tmp_path / "cuda.json").read_text()) == found


# -- cases that go wrong --------------------------------------------------------------------------------------

CPU = torch.device("cpu")
THREE = "formats/split16_fp32,formats/split16_bf16,formats/split16_8bit"


def arguments(out: Path, cases: str = THREE) -> list[str]:
    return ["--quick", "--cases", cases, "--elements", "4096", "--out", str(out)]


def failing(case_name: str, error: BaseException) -> Callable[..., Any]:
    """measure.measure that raises in one case."""
    real = measure.measure

    def measured(case: Case, device: torch.device, seconds: float) -> Any:
        if case.name == case_name:
            raise error
        return real(case, device, seconds)

    return measured


def test_a_case_that_fails_is_absent_with_its_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(measure, "measure", failing("split16_bf16", RuntimeError("no such kernel\nand more")))
    assert command.main(arguments(tmp_path)) == 1
    found = json.loads((tmp_path / "cpu.json").read_text())
    assert {row["case"] for row in found["results"]} == {"split16_fp32", "split16_8bit"}
    assert found["missing"] == {"formats/split16_bf16": "RuntimeError: no such kernel"}
    assert found["failed"] == ["formats/split16_bf16"]
    shown = capsys.readouterr()
    assert "- formats/split16_bf16: RuntimeError: no such kernel" in shown.out
    assert "Traceback" in shown.err


def test_memory_that_is_short_is_no_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    short = torch.cuda.OutOfMemoryError("out of memory")
    monkeypatch.setattr(measure, "measure", failing("split16_bf16", short))
    assert command.main(arguments(tmp_path)) == 0
    assert list(json.loads((tmp_path / "cpu.json").read_text())["missing"]) == ["formats/split16_bf16"]


def test_what_was_measured_outlives_the_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a process that ends in its second case: the first one's numbers are there, and it had no use for tables."""
    monkeypatch.setattr(measure, "measure", failing("split16_bf16", SystemExit(9)))
    with pytest.raises(SystemExit):
        command.main(arguments(tmp_path))
    found = json.loads((tmp_path / "cpu.json").read_text())
    assert {row["case"] for row in found["results"]} == {"split16_fp32"}
    assert not (tmp_path / "cpu.md").exists()


def test_numbers_are_written_before_tables_are_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(report: dict[str, Any]) -> str:
        raise KeyError("a table")

    monkeypatch.setattr(report, "markdown", broken)
    with pytest.raises(KeyError):
        command.main([*arguments(tmp_path, "formats/split16_bf16,schedules")])
    assert json.loads((tmp_path / "cpu.json").read_text())["schedules"]


def test_nothing_is_begun_on_a_lost_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    error = RuntimeError("CUDA error: an illegal memory access was encountered")
    monkeypatch.setattr(measure, "measure", failing("split16_bf16", error))
    monkeypatch.setattr(measure, "is_lost", lambda device: True)
    assert command.main(arguments(tmp_path)) == 1
    found = json.loads((tmp_path / "cpu.json").read_text())
    assert {row["case"] for row in found["results"]} == {"split16_fp32"}
    assert found["missing"]["formats/split16_8bit"] == "the GPU was lost in formats/split16_bf16"


def test_a_gpu_is_lost_if_it_cannot_be_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    def wait() -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "synchronize", wait)
    assert measure.is_lost(torch.device("cuda"))
    assert not measure.is_lost(CPU)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    assert not measure.is_lost(torch.device("cuda"))


def test_a_kernel_that_fails_is_its_peers(monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA's errors come late: whoever is being prepared waits for its own."""
    log: list[str] = []

    def make(peer: str, case: Case, device: torch.device) -> Any:
        return SimpleNamespace(peer=peer, step=lambda: log.append(peer))

    def wait() -> None:
        if "torch foreach" in log:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(peers, "make", make)
    monkeypatch.setattr(torch.cuda, "synchronize", wait)
    case = Case("formats", "fp32", LADDER["fp32"], [(64,)], peers=("torch foreach", "torch fused"))
    with pytest.raises(RuntimeError, match="torch foreach: RuntimeError: CUDA error: an illegal memory access"):
        measure._contestants(case, torch.device("cuda"))
    assert log == ["fused_sched", "torch foreach"]


# -- its time and its lines -----------------------------------------------------------------------------------


def test_no_case_is_begun_shortly_before_the_deadline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FUSED_SCHED_DEADLINE", str(time.time() + command.SECONDS_TO_FINISH - 1.0))
    assert command.main(arguments(tmp_path, "formats/split16_bf16,schedules")) == 0
    found = json.loads((tmp_path / "cpu.json").read_text())
    assert found["missing"] == dict.fromkeys(["formats/split16_bf16", "schedules"], "the time was over")
    assert found["schedules"] == []
    monkeypatch.setenv("FUSED_SCHED_DEADLINE", str(time.time() + 1e6))
    assert command.end_of_cases(180.0) - time.monotonic() <= 180.0


def test_a_log_has_a_line_per_case(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(command.progress("ab", str.upper, 2)) == ["a", "b"]
    assert capsys.readouterr().out == "[1/2] A\n[2/2] B\n"
