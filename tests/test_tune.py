"""The variants that are timed on a GPU: each can be made of today's sources, and tells from them as it is."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.gpu_check import build, tune


@pytest.mark.parametrize("name", [name for name in tune.VARIANTS if name != tune.AS_IT_IS])
def test_a_variant_differs_in_its_changes_only(tmp_path: Path, name: str) -> None:
    csrc = tune.sources(tmp_path, tune.VARIANTS[name])
    changed = {
        str(path.relative_to(csrc / "cuda"))
        for path in csrc.rglob("*")
        if path.is_file() and path.read_bytes() != (tune.CSRC / path.relative_to(csrc)).read_bytes()
    }
    assert changed == {change.file for change in tune.VARIANTS[name]}


def test_a_text_that_is_gone_is_named(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"tuning\.h has 'kNoSuchNumber' 0 times, expected once"):
        tune.sources(tmp_path, [tune.Change("tuning.h", "kNoSuchNumber", "")])


def test_times_without_a_gpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if not list(build.OBJECTS.glob("csrc.cpu.*.o")):
        pytest.skip("the package was not built in this checkout")
    build.build(tmp_path, True)
    assert tune.main([str(tmp_path), "--dry-run", "--elements", "4096", "--rounds", "2"]) == 0
    times = json.loads((tmp_path / "tune.json").read_text())
    assert list(times) == [tune.AS_IT_IS]
    names = ["none + fp32", "split16 + fp32", "split16 + bf16", "split8 + 8bit"]
    assert list(times[tune.AS_IT_IS]) == [name + norm for name in names for norm in ("", ", norm")]
    assert all(len(ms) == 2 and min(ms) > 0 for ms in times[tune.AS_IT_IS].values())
    assert tune.AS_IT_IS in capsys.readouterr().out


def test_a_variant_that_fails_ends_no_other(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    program = tmp_path / "selftest"
    program.write_text('#!/bin/sh\n[ -e "$LD_LIBRARY_PATH/broken" ] && exit 3\necho "time none + fp32: 0.5 ms"\n')
    program.chmod(0o755)
    names = list(tune.VARIANTS)[:3]
    (tune.folder_of(tmp_path, names[1]) / "broken").touch()
    times = tune.time_variants(tmp_path, names, 1, 2, dry_run=False)
    assert times == {name: {"none + fp32": [0.5, 0.5]} for name in (names[0], names[2])}
    assert f"{names[1]}: the self-test ended with 3" in capsys.readouterr().out


def test_variants_are_told_as_ratios() -> None:
    times = {tune.AS_IT_IS: {"case": [2.0, 1.0, 4.0]}, "another": {"case": [3.0, 3.5, 1.0]}}
    first, as_it_is, another = tune.table(times)
    assert first.split() == ["case"]
    assert as_it_is.split()[-2:] == ["2.000", "ms"]
    assert another.split() == ["another", "1.500"]


def test_unknown_variants_are_refused(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.gpu_check.tune", str(tmp_path), "--only", "nonsense"]
    done = subprocess.run(command, cwd=build.ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert "no variant is called nonsense" in done.stderr
