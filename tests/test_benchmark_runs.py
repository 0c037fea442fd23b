"""A run of the benchmark from its first case to its last, and what is kept of one that goes wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import report

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
