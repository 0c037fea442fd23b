"""make gpu-check, on a machine without a GPU: its stages run, fail and are left out as they should."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks.gpu_check import __main__ as gpu_check
from benchmarks.gpu_check import build, stages
from benchmarks.gpu_check.stages import ROOT, Stage

#: All kinds of stages but those that repeat others' commands or other tests, and those that other tests here run.
SMALL = "build-selftest,selftest,benchmark,sanitizer-memcheck,ncu"


def test_a_dry_run_end_to_end(tmp_path: Path) -> None:
    if not list(build.OBJECTS.glob("csrc.cpu.*.o")):
        pytest.skip("the package was not built in this checkout")
    command = [sys.executable, "-m", "benchmarks.gpu_check", "--dry-run", "--only", SMALL, "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 0, done.stdout
    outcomes = json.loads((tmp_path / "stages.json").read_text())
    assert {o["stage"]: o["state"] for o in outcomes} == dict.fromkeys(SMALL.split(","), "ok")
    selftest = (tmp_path / "selftest.log").read_text()
    assert selftest.count("ok    ") == 6
    assert "small: every byte equal" in selftest
    made = json.loads((tmp_path / "gpu.json").read_text())
    assert [case["case"] for case in made["cases"]] == ["split16_fp32", "split16_bf16"]
    assert (tmp_path / "cpu.png").exists()


def test_the_self_test_sees_a_bit(tmp_path: Path) -> None:
    if not list(build.OBJECTS.glob("csrc.cpu.*.o")):
        pytest.skip("the package was not built in this checkout")
    program = build.build(tmp_path, True, "-DFS_PLANTED_ERROR")
    done = subprocess.run([program, "small", tmp_path / "schedule"], capture_output=True, text=True)
    assert done.returncode == 1
    assert "FAILED param of tensor 0: byte 0 of 4 differs" in done.stdout
    assert done.stdout.endswith("small: FAILED\n")


@pytest.mark.parametrize(
    ("words", "limit", "state", "why"),
    [
        (["-c", "print('fine')"], 20, "ok", ""),
        (["-c", "raise SystemExit(3)"], 20, "failed", "exit status 3"),
        (["-c", "import time; time.sleep(60)"], 1, "failed", "not done after 1 s"),
    ],
)
def test_what_becomes_of_a_stage(tmp_path: Path, words: list[str], limit: int, state: str, why: str) -> None:
    stage = Stage("some", [sys.executable, *words], limit)
    outcome = gpu_check.run_stage(stage, tmp_path, time.monotonic() + 100.0)
    assert (outcome.state, outcome.why) == (state, why)
    assert (tmp_path / "some.log").exists()


def test_a_stage_is_left_where_its_tool_or_its_time_is_missing(tmp_path: Path) -> None:
    tool = Stage("some", ["no-such-tool"], 20, needs="no-such-tool")
    assert gpu_check.run_stage(tool, tmp_path, time.monotonic() + 100.0).why == "there is no no-such-tool"
    late = Stage("some", [sys.executable, "-c", ""], 20)
    assert gpu_check.run_stage(late, tmp_path, time.monotonic()).state == "left"
    lost = Stage("some", ["no-such-tool"], 20)
    assert gpu_check.run_stage(lost, tmp_path, time.monotonic() + 100.0).state == "failed"


def test_one_stage_that_fails_stops_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    programs = {"first": "raise SystemExit(1)", "second": ""}
    made = [Stage(name, [sys.executable, "-c", program], 20) for name, program in programs.items()]
    monkeypatch.setattr(gpu_check, "stages", lambda *_: made)
    assert gpu_check.main(["--dry-run", "--out", str(tmp_path)]) == 1
    states = [outcome["state"] for outcome in json.loads((tmp_path / "stages.json").read_text())]
    assert states == ["failed", "ok"]


def test_an_earlier_report_is_not_taken_for_this_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cpu.json").write_text("{}")
    monkeypatch.setattr(gpu_check, "stages", lambda *_: [Stage("benchmark", [sys.executable, "-c", ""], 20)])
    assert gpu_check.main(["--dry-run", "--out", str(tmp_path)]) == 1
    assert not (tmp_path / "gpu.json").exists()


def test_commands_of_a_real_run(tmp_path: Path) -> None:
    planned = {stage.name: stage for stage in stages.stages(tmp_path, False, "90")}
    dry = {stage.name: stage for stage in stages.stages(tmp_path, True)}
    assert list(planned) == list(dry)
    assert planned["build"].environment == {"FUSED_SCHED_CUDA": "1", "FUSED_SCHED_CUDA_ARCHS": "90"}
    assert planned["sanitizer-racecheck"].command[:5] == [
        *("compute-sanitizer", "--error-exitcode", "99", "--tool", "racecheck"),
    ]
    assert {name for name, stage in planned.items() if stage.needs} == {
        *(f"sanitizer-{tool}" for tool in stages.SANITIZERS),
        "ncu",
    }
    assert not any(stage.needs for stage in dry.values())
    assert all(stage.limit < gpu_check.TOTAL_SECONDS for stage in planned.values())
    files = stages.tests_for_gpu()
    assert {"tests/test_norm.py", "tests/test_ops.py", "tests/test_adam.py"} <= set(files)
    assert all((ROOT / file).exists() for file in files)
    # They are run where DeepSpeed, timm and optax are not.
    assert not any("test_live_" in file for file in files)


def test_unknown_stages_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        gpu_check.main(["--dry-run", "--only", "fly", "--out", str(tmp_path)])
    assert "no stage is called fly; stages are build, build-selftest" in capsys.readouterr().err


def test_missing_objects_say_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(build, "OBJECTS", tmp_path)
    with pytest.raises(RuntimeError, match="build the package first, with make build"):
        build.objects("csrc.cuda.*.o")
