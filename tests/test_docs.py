"""docs/schedules.md is what docs/make_schedules.py writes now, and every schedule has an example that holds."""

from __future__ import annotations

import json
import pickle
import re
from pathlib import Path

import make_schedules
import pytest
from pictures import Curve, Picture
from schedule_samples import SAMPLES, evaluated, words

from fused_sched.program import Tree
from fused_sched.schedules import Schedule
from fused_sched.schedules.metric import MetricSchedule

# Some libraries' schedules are odd by nature; here it is said once per copy.
pytestmark = pytest.mark.filterwarnings("ignore::fused_sched._warnings.ScheduleWarning")

REMEDY = "run `make docs`"


@pytest.fixture(scope="module")
def drawn() -> dict[Path, Picture]:
    return make_schedules.pictures()


def test_every_schedule_has_a_sample() -> None:
    assert set(SAMPLES) == set(words()), "tests/schedule_samples.py has one example per registered schedule"


def test_the_page_is_what_the_script_writes() -> None:
    assert make_schedules.PAGE.read_text() == make_schedules.page(), REMEDY


def test_the_pictures_show_what_the_script_draws(drawn: dict[Path, Picture]) -> None:
    stale = [
        path.name for path, picture in drawn.items() if not path.exists() or picture.digest not in path.read_text()
    ]
    assert stale == [], REMEDY
    assert set(make_schedules.PICTURES.iterdir()) == {p for p in drawn if p.parent == make_schedules.PICTURES}, REMEDY


def test_a_picture_carries_its_digest(tmp_path: Path) -> None:
    pictures = [Picture("an example", {"": [Curve("", [0.0, 1.0, last])]}) for last in (0.5, 0.5, 0.50001)]
    for i, picture in enumerate(pictures):
        picture.save(tmp_path / f"{i}.svg")
    same, again, other = ((tmp_path / f"{i}.svg").read_text() for i in range(3))
    assert same == again, "the same bytes for the same curve"
    assert pictures[0].digest in same
    assert pictures[0].digest not in other


def test_every_schedule_is_listed_once_with_its_picture() -> None:
    page = make_schedules.PAGE.read_text()
    assert sorted(re.findall(r"\]\(images/schedules/(\S+)\.svg ", page)) == sorted(words())


def test_a_schedule_more_changes_the_page(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a sample the script refuses; with one it writes another page than the one that is there."""
    new = type("brand_new", (words()["constant"],), {"__doc__": "The same again: `f(t) = value`."}, word="brand_new")
    try:
        with pytest.raises(KeyError, match="brand_new"):
            make_schedules.pictures()
        monkeypatch.setitem(SAMPLES, "brand_new", "constant(1.0)")
        monkeypatch.setattr(new, "__module__", "fused_sched.schedules.curves")
        assert "| `brand_new(value)` | The same again: `f(t) = value`. |" in make_schedules.page()
    finally:
        del Schedule._words["brand_new"]


@pytest.mark.parametrize("word", words())
def test_the_docstring_has_what_the_page_needs(word: str) -> None:
    value, source = make_schedules.described(words()[word])
    summary, *_ = value.split("<br>")
    assert re.match(r"[A-Z]|timm's |`f\(t\) = ", summary), "a summary"
    assert "`" in value or "<pre>" in value, "a formula"
    if "." in word:
        assert re.search(r"\d+\.\d+|[0-9a-f]{8}", source), "the library's version"


def test_pictures_are_small(drawn: dict[Path, Picture]) -> None:
    assert [path.name for path in drawn if path.stat().st_size > 50_000] == []


@pytest.mark.parametrize("word", SAMPLES)
def test_a_sample_survives_storage(word: str) -> None:
    schedule = evaluated(SAMPLES[word])
    assert type(schedule) is words()[word]
    copies = [
        evaluated(repr(schedule)),
        pickle.loads(pickle.dumps(schedule)),
        Schedule.from_dict(schedule.to_dict()),
        Schedule.from_dict(json.loads(json.dumps(schedule.to_dict()))),
    ]
    for other in copies:
        assert other == schedule
        assert hash(other) == hash(schedule)
        assert repr(other) == repr(schedule)


@pytest.mark.parametrize("word", [word for word, cls in words().items() if not issubclass(cls, MetricSchedule)])
def test_programs_are_at_most_four_kilobytes_besides_tables(word: str) -> None:
    schedule = evaluated(SAMPLES[word])
    for each in (schedule, *schedule.companions.values()):
        assert len(each.program) - 8 * table_length(each.tree) <= 4096


def table_length(node: Tree) -> int:
    children = getattr(node, "children", None) or ([node.child] if hasattr(node, "child") else [])
    return len(getattr(node, "table", ())) + sum(map(table_length, children))
