"""make gpu-check, on a machine without a GPU: its stages run, fail and are left out as they should."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks import nvidia_smi
from benchmarks.gpu_check import __main__ as gpu_check
from benchmarks.gpu_check import build, results, stages
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
    log = (tmp_path / "gpu_check.log").read_text()
    selftest = log[log.index(" selftest ") : log.index(" benchmark ")]
    assert selftest.count("ok     4 tensors") == 6
    assert "small: every byte equal" in selftest
    made = json.loads((tmp_path / "gpu.json").read_text())
    assert [case["case"] for case in made["cases"]] == ["split16_fp32", "split16_bf16"]
    six = ["cpu.json", "cpu.md", "cpu.png", "gpu.json", "gpu_check.log", "stages.json"]
    assert sorted(path.name for path in tmp_path.iterdir()) == six


def selftest(folder: Path, mode: str, elements: int, flag: str = "") -> tuple[int, list[str]]:
    """Exit status and lines of a self-test without a GPU."""
    if not list(build.OBJECTS.glob("csrc.cpu.*.o")):
        pytest.skip("the package was not built in this checkout")
    program = build.build(folder, True, *filter(None, [flag]))
    command = [program, mode, folder / "schedule", str(elements)]
    done = subprocess.run(command, capture_output=True, text=True)
    return done.returncode, done.stdout.splitlines()


def test_the_self_test_sees_a_bit(tmp_path: Path) -> None:
    status, lines = selftest(tmp_path, "small", 0, "-DFS_PLANTED_ERROR")
    assert status == 1
    assert "FAILED param of tensor 0: byte 0 of 4 differs" in lines
    assert lines[-1] == "small: FAILED"


@pytest.mark.parametrize("flag", ["", "-DFS_PLANTED_ERROR"])
def test_roots_and_quotients_are_compared(tmp_path: Path, flag: str) -> None:
    status, lines = selftest(tmp_path, "roots", 1 << 12, flag)
    assert status == int(bool(flag))
    formats = ["fp32 parameters, none + 8bit", "fp32 parameters, none + fp32", "bf16 parameters, split16 + bf16"]
    state = "FAILED" if flag else "ok    "
    compared = [line for line in lines if "roots and quotients" in line]
    assert compared == [f"{state} roots and quotients of 4096 floats: {names}" for names in formats]
    divided = [line for line in lines if " quotients of 2048 floats by 0x1.ffff" in line and formats[1] in line]
    assert [line[:6] for line in divided] == [state] * 3


def test_a_profiler_sees_steps_of_both_kinds_after_others(tmp_path: Path) -> None:
    status, lines = selftest(tmp_path, "once", 1 << 12, "-DFS_SHOWN_CALLS")
    assert (status, lines[-1]) == (0, "once: done")
    warm = ["norm", "update", "clock", "update"] * 10
    assert lines[1:-1] == [*warm, "profile", "norm", "update", "clock", "update", "no more"] * 3


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where everything is made."""
    folder = tmp_path / "work"
    folder.mkdir()
    monkeypatch.setattr(gpu_check, "WORK", folder)
    return folder


def python(program: str) -> list[str]:
    return [sys.executable, "-c", program]


def run_stage(stage: Stage, folder: Path) -> results.Outcome:
    return gpu_check.run_stage(stage, folder, time.monotonic() + 100.0)


def plan(monkeypatch: pytest.MonkeyPatch, **programs: str) -> None:
    made = [Stage(name, python(program), 20) for name, program in programs.items()]
    monkeypatch.setattr(gpu_check, "stages", lambda *_: made)


# -- a stage --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("program", "limit", "state", "why"),
    [
        ("print('fine')", 20, "ok", ""),
        ("raise SystemExit(3)", 20, "failed", "exit status 3"),
        ("import time; time.sleep(60)", 1, "failed", "not done after 1 s"),
    ],
)
def test_what_becomes_of_a_stage(tmp_path: Path, program: str, limit: int, state: str, why: str) -> None:
    outcome = run_stage(Stage("some", python(program), limit), tmp_path)
    assert (outcome.state, outcome.why) == (state, why)
    assert (tmp_path / "some.log").exists()


def test_a_stage_is_left_where_its_tool_or_its_time_is_missing(tmp_path: Path) -> None:
    tool = Stage("some", ["no-such-tool"], 20, needs="no-such-tool")
    assert run_stage(tool, tmp_path).why == "there is no no-such-tool"
    late = Stage("some", python(""), 20)
    assert gpu_check.run_stage(late, tmp_path, time.monotonic()).state == "left"
    lost = Stage("some", ["no-such-tool"], 20)
    assert run_stage(lost, tmp_path).state == "failed"


def test_a_stage_that_hangs_ends_with_all_it_has_started(tmp_path: Path) -> None:
    """A compiler that nvcc started, say, would hold the processors, and a test the GPU, for the stages that follow."""
    child = "import os, time; print(os.getpid(), flush=True); time.sleep(60)"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    outcome = run_stage(Stage("some", python(parent), 2), tmp_path)
    assert outcome.why == "not done after 2 s"
    process = Path("/proc") / (tmp_path / "some.log").read_text().strip() / "stat"
    for _ in range(100):  # an orphan is reaped by somebody else
        if not process.exists() or process.read_text().split()[2] == "Z":
            return
        time.sleep(0.05)
    pytest.fail("what the stage had started is still running")


def test_a_stage_knows_when_it_will_be_killed(tmp_path: Path) -> None:
    program = "import os, time; print(float(os.environ['FUSED_SCHED_DEADLINE']) - time.time())"
    run_stage(Stage("some", python(program), 20), tmp_path)
    assert 0.0 < float((tmp_path / "some.log").read_text()) <= 20.0


def test_only_a_stage_that_failed_shows_what_it_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    program = "print('first\\nsecond'); raise SystemExit({})"
    for status, shown in ((0, ["    second"]), (1, ["    first", "    second"])):
        run_stage(Stage("some", python(program.format(status)), 20), tmp_path)
        assert capsys.readouterr().out.splitlines()[1:] == shown


@pytest.mark.parametrize(
    ("stage", "said", "status", "state", "why"),
    [
        ("sanitizer-racecheck", "========= Error: Device not supported.", 1, "left", "compute-sanitizer: Device not"),
        ("sanitizer-racecheck", "small: every byte equal", 0, "ok", ""),
        ("sanitizer-racecheck", "small: every byte equal", 99, "failed", "exit status 99"),
        ("sanitizer-racecheck", "========= ERROR SUMMARY: 0 errors", 0, "failed", "did not show 'small: every byte"),
        ("ncu", "==ERROR== ERR_NVGPUCTRPERM - The user does not have permission", 1, "left", "ncu: ERR_NVGPUCTRPERM"),
        ("ncu", "==ERROR== LibraryNotLoaded", 0, "left", "ncu: LibraryNotLoaded"),
        ("ncu", "FAILED call: no\n==ERROR== LibraryNotLoaded", 1, "failed", "exit status 1"),
        ("ncu", "==WARNING== No kernels were profiled.", 0, "failed", "did not show 'update_kernel'"),
        ("ncu", '"0","update_kernel","1"', 0, "ok", ""),
    ],
)
def test_a_tool_that_may_not_be_used_is_no_failure_of_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str, said: str, status: int, state: str, why: str
) -> None:
    """With tools that stand where CUDA's are installed, and not on PATH."""
    tools = tmp_path / "nsight-compute" / "2025.1"
    tools.mkdir(parents=True)
    for name in ("ncu", "compute-sanitizer"):
        (tools / name).write_text(f"#!{sys.executable}\nprint({said!r})\nraise SystemExit({status})\n")
        (tools / name).chmod(0o755)
    monkeypatch.setattr(stages, "TOOLS", (str(tmp_path / "nsight-compute" / "*"),))
    monkeypatch.setenv("PATH", str(tmp_path))
    planned = {stage.name: stage for stage in stages.stages(tmp_path, False)}
    outcome = run_stage(planned[stage], tmp_path)
    assert (outcome.state, outcome.why[: len(why) or None]) == (state, why)


# -- a run ----------------------------------------------------------------------------------------------------


def test_one_stage_that_fails_stops_no_other(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan(monkeypatch, first="raise SystemExit(1)", second="")
    assert gpu_check.main(["--dry-run"]) == 1
    states = [outcome["state"] for outcome in json.loads((work / "stages.json").read_text())]
    assert states == ["failed", "ok"]


def test_an_earlier_report_is_not_taken_for_this_one(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("cpu.json", "gpu.json"):
        (work / name).write_text("{}")
    plan(monkeypatch, benchmark="")
    assert gpu_check.main(["--dry-run", "--out", str(work.parent / "out")]) == 1
    assert not (work.parent / "out" / "gpu.json").exists()


REPORT = {
    "conditions": {"device": "some GPU", "versions": {"torch": "2"}, "commit": "0123abc"},
    "results": [
        {
            "suite": "formats",
            "case": "fp32",
            "peer": "fused_sched",
            "n": 1,
            "bytes_per_param": 28,
            "ms": 2.0,
            "gbps": 3.0,
        }
    ],
}


def test_six_files_are_kept_and_after_every_stage(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = work.parent / "out"
    files = {"cuda.json": json.dumps(REPORT), "cuda.md": "# some GPU", "cuda.png": "", "cuda.json.partial": "{"}
    program = "\n".join(f"open({str(work / name)!r}, 'w').write({text!r})" for name, text in files.items())
    kept = f"import os; print(sorted(os.listdir({str(out)!r})))"
    monkeypatch.setattr(gpu_check, "architecture", lambda: None)
    plan(monkeypatch, first="print('one')", benchmark=f"{program}\nprint('two')", last=kept)
    assert gpu_check.main(["--out", str(out)]) == 0
    six = ["cuda.json", "cuda.md", "cuda.png", "gpu.json", "gpu_check.log", "stages.json"]
    assert sorted(path.name for path in out.iterdir()) == six
    assert (work / "last.log").read_text().strip() == str(six), "what there was before the last stage"
    assert json.loads((out / "gpu.json").read_text())["cases"][0]["ms"] == 2.0
    words = [line.split() for line in (out / "gpu_check.log").read_text().splitlines()]
    assert [line[2] for line in words if line[0] == "===="] == ["first", "benchmark", "last"]
    assert [line[0] for line in words if len(line) == 1] == ["one", "two"]


def test_without_a_folder_for_them_logs_stay_where_they_are_made(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_check, "RESULTS", work.parent / "results")
    monkeypatch.setattr(gpu_check, "architecture", lambda: None)
    plan(monkeypatch, benchmark=f"open({str(work / 'cuda.json')!r}, 'w').write({json.dumps(REPORT)!r})")
    assert gpu_check.main([]) == 0
    assert sorted(path.name for path in (work.parent / "results").iterdir()) == ["cuda.json", "gpu.json"]
    assert (work / "gpu_check.log").exists()


def test_the_end_of_the_output_is_the_summary_and_the_numbers(
    work: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    report = f"open({str(work / 'cpu.json')!r}, 'w').write({json.dumps(REPORT)!r})"
    plan(monkeypatch, benchmark=report, last="raise SystemExit(2)")
    assert gpu_check.main(["--dry-run"]) == 1
    *_, first, second, numbers = capsys.readouterr().out.splitlines()
    assert (first.split()[:2], second.split()[:2]) == (["ok", "benchmark"], ["failed", "last"])
    assert '"case":"fp32","n":1,' in numbers


def test_stages_share_their_time(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan(monkeypatch, first="import time; time.sleep(60)", second="")
    assert gpu_check.main(["--dry-run", "--total", "2"]) == 1
    outcomes = json.loads((work / "stages.json").read_text())
    assert [(outcome["state"], outcome["why"]) for outcome in outcomes] == [
        ("failed", "not done after 2 s"),
        ("left", "no time was left for it"),
    ]


def test_a_run_can_begin_in_the_middle(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan(monkeypatch, first="", second="", third="")
    assert gpu_check.main(["--dry-run", "--from", "second"]) == 0
    assert [outcome["stage"] for outcome in json.loads((work / "stages.json").read_text())] == ["second", "third"]


def test_a_long_log_is_shown_from_both_ends() -> None:
    assert results.shortened(b"0123456789", 10) == b"0123456789"
    assert results.shortened(b"0123456789ab", 10) == b"01234\n[2 bytes left out]\n789ab"


def test_the_build_is_for_the_gpu_that_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    for said, found in (({"compute_cap": "9.0"}, "90"), ({}, None), ({"compute_cap": "[N/A]"}, None)):
        monkeypatch.setattr(nvidia_smi, "query", lambda fields, said=said: said)
        assert gpu_check.architecture() == found


def test_commands_of_a_real_run(tmp_path: Path) -> None:
    planned = {stage.name: stage for stage in stages.stages(tmp_path, False, "90")}
    dry = {stage.name: stage for stage in stages.stages(tmp_path, True)}
    assert list(planned) == list(dry)
    assert list(planned).index("benchmark") < list(planned).index("cuda-tests")
    assert planned["build"].environment == {
        "FUSED_SCHED_CUDA": "1",
        "FUSED_SCHED_REQUIRE_CPU": "1",
        "FUSED_SCHED_CUDA_ARCHS": "90",
    }
    assert dry["build"].command == planned["build"].command
    assert dry["build"].environment == {"FUSED_SCHED_REQUIRE_CPU": "1"}
    assert planned["cuda-tests"].environment == {"FUSED_SCHED_REQUIRE_CUDA": "1"}
    assert planned["sanitizer-racecheck"].command[:5] == [
        *("compute-sanitizer", "--error-exitcode", "99", "--tool", "racecheck"),
    ]
    assert {name for name, stage in planned.items() if stage.needs} == {
        *(f"sanitizer-{tool}" for tool in stages.SANITIZERS),
        *("ncu", "ncu-more"),
    }
    assert not any(stage.needs for stage in dry.values())
    assert all(stage.limit < gpu_check.TOTAL_SECONDS for stage in planned.values())
    files = stages.tests_for_gpu()
    assert {"tests/test_norm.py", "tests/test_ops.py", "tests/test_adam.py"} <= set(files)
    assert all((ROOT / file).exists() for file in files)
    assert not {"tests/test_gpu_check.py", "tests/test_tests_by_file.py"} & set(files)
    # They are run where DeepSpeed, timm and optax are not.
    assert not any("test_live_" in file for file in files)


@pytest.mark.parametrize("option", ["--only", "--from"])
def test_unknown_stages_are_refused(option: str, work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        gpu_check.main(["--dry-run", option, "fly"])
    assert "no stage is called fly; stages are build, build-selftest" in capsys.readouterr().err


def test_missing_objects_say_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(build, "OBJECTS", tmp_path)
    with pytest.raises(RuntimeError, match="build the package first, with make build"):
        build.objects("csrc.cuda.*.o")
