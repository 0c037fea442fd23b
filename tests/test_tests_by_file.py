"""The runner of the tests for a GPU, with test files of its own."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from benchmarks.gpu_check import tests_by_file
from benchmarks.gpu_check.tests_by_file import Result, run_file

MARKER = "cuda"  # apart from `mark`, by which gpu-check would take this file for one of its own
HEAD = f"import os, time, pytest\npytestmark = pytest.mark.{MARKER}\n"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tests_by_file, "ROOT", tmp_path)
    (tmp_path / "pytest.ini").write_text("[pytest]\naddopts = -q\nmarkers = cuda\n")
    (tmp_path / "tests").mkdir()
    return tmp_path / "tests"


def write(folder: Path, name: str, text: str) -> str:
    path = folder / f"test_{name}.py"
    path.write_text(HEAD + text)
    return f"tests/{path.name}"


def run(file: str, limit: float = 60.0) -> Result:
    return run_file(file, limit, time.time() + 1e6)


def test_files_are_run_beside_each_other_and_summed(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    files = [
        write(folder, "good", "def test_a(): pass\ndef test_b(): pytest.skip('no')\n"),
        write(folder, "bad", "def test_c(): pass\ndef test_d():\n    assert 1 == 2, 'a reason'\n"),
        write(folder, "lost", "def test_e(): os.abort()\n"),
        write(folder, "needy", "import no_such_package\n"),
    ]
    monkeypatch.delenv("FUSED_SCHED_DEADLINE", raising=False)
    assert tests_by_file.main([*files, "--workers", "2"]) == 1
    shown = capsys.readouterr().out.splitlines()
    assert shown[-1] == "1 failed, 2 passed, 1 skipped; files: 2 failed, 1 left, 1 ok"
    assert shown[-2] == "FAILED tests/test_bad.py::test_d - AssertionError: a reason"
    table = [line.split() for line in shown[-5:-2]]
    assert [(words[0], words[1], words[4:]) for words in table] == [
        ("failed", "tests/test_bad.py", ["exit", "status", "1"]),
        ("failed", "tests/test_lost.py", ["exit", "status", "-6"]),
        ("left", "tests/test_needy.py", ["there", "is", "no", "no_such_package"]),
    ]
    assert any("test_good.py::test_a PASSED" in line for line in shown), "each test has its line"


def test_a_file_that_hangs_says_where(folder: Path) -> None:
    result = run(write(folder, "slow", "def test_a(): pass\ndef test_b(): time.sleep(60)\n"), 5.0)
    assert result.state == "failed"
    assert result.why == "not done after 5 s: tests/test_slow.py::test_b"
    assert result.counts == {"passed": 1}


def test_nothing_is_begun_when_the_time_is_over(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    files = [write(folder, "late", "def test_a(): pass\n"), write(folder, "later", "def test_a(): pass\n")]
    monkeypatch.setenv("FUSED_SCHED_DEADLINE", str(time.time() + tests_by_file.SECONDS_TO_FINISH))
    assert tests_by_file.main(files) == 1
    assert capsys.readouterr().out.splitlines()[-2:] == [
        "not begun: tests/test_late.py tests/test_later.py",
        "no tests; files: 2 not begun",
    ]


def test_a_file_without_tests_for_a_gpu_is_no_failure(folder: Path) -> None:
    (folder / "test_other.py").write_text("def test_a(): pass\n")
    assert run("tests/test_other.py").state == "ok"


def test_a_module_of_the_project_that_is_missing_is_a_failure(folder: Path) -> None:
    result = run(write(folder, "ours", "import fused_sched.no_such_module\n"))
    assert (result.state, result.counts) == ("failed", {"error": 1})


def test_plugins_of_the_machine_are_not_loaded_and_a_warning_of_its_torch_is_no_error(folder: Path) -> None:
    text = "def test_a():\n    import warnings\n    warnings.warn('old driver', UserWarning, stacklevel=1)\n"
    (folder.parent / "pytest.ini").write_text("[pytest]\naddopts = -q\nmarkers = cuda\nfilterwarnings = error\n")
    result = run(write(folder, "warns", text))
    assert result.state == "ok"
    assert "plugins:" not in result.output


def test_tests_with_hypothesis_need_no_plugin(folder: Path) -> None:
    text = "from hypothesis import given, strategies\n@given(strategies.integers())\ndef test_a(n): assert n == n\n"
    assert run(write(folder, "drawn", text)).counts["passed"] == 1
