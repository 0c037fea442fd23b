"""The benchmark itself: that it measures what it says. No time is asserted anywhere."""

from __future__ import annotations

import builtins
import importlib.metadata
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import make_readme
import pytest
import torch

from benchmarks import __main__ as command
from benchmarks import bars, cases, measure, peers, report, roof, schedule_time, shapes, timing
from benchmarks.cases import LADDER, Case
from benchmarks.measure import Measured
from benchmarks.names import OURS, ROOF
from benchmarks.timing import Sample, Times

CPU = torch.device("cpu")
FUSED = "torch fused"


def tiny(formats: str = "fp32", **changes: Any) -> Case:
    return Case("formats", formats, LADDER[formats], shapes.flat(1000), **changes)


# -- what is measured -----------------------------------------------------------------------------------------


def test_models_have_the_shapes_of_their_libraries() -> None:
    counted = {f.__name__: (len(f()), shapes.elements(f())) for f in (shapes.resnet50, shapes.gpt2, shapes.llama3_8b)}
    assert counted == {
        "resnet50": (161, 25_557_032),
        "gpt2": (148, 124_439_808),
        "llama3_8b": (291, 8_030_261_248),
    }
    shrink, shapes_that_fit = shapes.shrunk_llama(1 << 25)
    assert (shrink, len(shapes_that_fit)) == (16, 291)
    assert shapes.elements(shapes_that_fit) <= 1 << 25 < shapes.elements(shapes.llama3_8b(8))


def test_gpt2_is_that_of_transformers() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    with torch.device("meta"):
        model = GPT2LMHeadModel(GPT2Config())
    assert [tuple(p.shape) for p in model.parameters()] == shapes.gpt2()


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_every_name_leads_somewhere(device: str) -> None:
    """Bars and headlines name cases that exist and peers that take part in them."""
    all_cases = {case.key: case for case in cases.all_cases(device)}
    assert len(all_cases) == len(cases.all_cases(device))
    assert not any("," in key for key in all_cases), "commas separate cases on the command line"
    assert set(report.HEADLINES) <= set(all_cases)
    for case in all_cases.values():
        assert set(case.peers) <= set(peers.PEERS)
    for bar in bars.BARS:
        if bar.device == device:
            known = {OURS, ROOF, f"formats/fp32: {OURS}", *all_cases[bar.case].peers}
            assert {bar.slow, bar.fast} <= known, bar


def test_all_of_the_ladder_is_measured() -> None:
    measured = {case.name for case in cases.all_cases("cpu") if case.suite == "formats"}
    masters, moments = ("fp32", "split16", "split8", "stochastic", "none"), ("fp32", "bf16", "8bit")
    assert measured >= {f"{master}_{kept}" for master in masters for kept in moments} | {"fp32"}


def test_selects_suites_and_patterns() -> None:
    everything = cases.all_cases("cpu", 1 << 12)
    tails = [case.key for case in cases.select(everything, "tail/split16_bf16,tail/*")]
    assert tails == ["tail/split16_bf16", "tail/fp32", "tail/split16_fp32", "tail/split8_8bit"]
    assert {case.suite for case in cases.select(everything, "groups,formats/split*")} == {"groups", "formats"}
    assert cases.select(everything, "*") == everything
    with pytest.raises(ValueError, match="no case is called 'speed'; suites are formats"):
        cases.select(everything, "speed")


@pytest.mark.parametrize("name", ["fp32", "split16_fp32", "split16_bf16", "split16_8bit", "split8_8bit", "fp32_fp32"])
def test_bytes_are_those_of_the_readme(name: str) -> None:
    formats = LADDER[name]
    case = Case("formats", name, formats, shapes.flat(1 << 12))  # no padding
    contestant = peers.make(OURS, case, CPU)
    contestant.step()
    kept, moved = make_readme.bytes_of(formats.dtype, formats.master, formats.moments)
    assert (contestant.kept_bytes(), measure.moved_bytes(case, contestant)) == (kept, moved)


# -- how it is timed ------------------------------------------------------------------------------------------


class Counting:
    """A contestant that notes when it is prepared and stepped."""

    def __init__(self, name: str, log: list[str]) -> None:
        self.step: Callable[[], object] = lambda: log.append(name)
        self.prepare: Callable[[], object] = lambda: log.append(f"before {name}")


def test_contestants_alternate_and_each_round_begins_with_another() -> None:
    log: list[str] = []
    ticks = iter(range(10**6))

    def timer(step: Callable[[], object]) -> Sample:
        step()
        return Sample(float(next(ticks)), 0.0, 0.0)

    times = timing.alternate([Counting("a", log), Counting("b", log), Counting("c", log)], timer, seconds=0.0)
    assert log[: 2 * 3 * 2] == ["before a", "a", "before b", "b", "before c", "c"] * 2  # warming up
    rounds = [log[i + 1 : i + 6 : 2] for i in range(12, len(log), 6)]
    assert rounds == [list("abc"), list("bca"), list("cab"), list("abc"), list("bca")]
    assert len(rounds) == timing.MIN_ROUNDS
    first = [t.seconds[0] for t in times]
    assert first == [6.0, 7.0, 8.0], "six steps of warming up are not counted"


def test_a_burst_is_divided_and_begins_warm() -> None:
    log: list[str] = []
    timer = timing.CpuTimer(burst=4, settle=lambda: log.append("settle"))
    sample = timer(lambda: log.append("step"))
    assert log == ["settle", *["step"] * (timing.STEPS_INTO_CACHE + 4)]
    assert sample.device == sample.host > 0.0


def test_moved_gradients_move() -> None:
    contestant = peers.make(FUSED, tiny(moves_grads=True), CPU)
    problem = contestant.keeps_alive[0]
    addresses = []
    for _ in range(3):
        contestant.prepare()
        addresses.append(problem.params[0].grad.data_ptr())
    assert addresses[0] != addresses[1]
    assert addresses[0] == addresses[2]


@pytest.mark.parametrize("num_updated", range(1, roof.MAX_UPDATED + 1))
@pytest.mark.parametrize("way", range(len(roof.WAYS)))
def test_the_roof_touches_all_it_counts(num_updated: int, way: int) -> None:
    """Every element of every stream, once, by two threads, past the end of the last whole chunk."""
    library = roof._library()
    if library is None:
        pytest.skip("no C++ compiler")
    count = (1 << 16) * 3 + 16 * 5
    streams = [torch.arange(count, dtype=torch.float32) for _ in range(num_updated + 1)]
    addresses = (roof.ctypes.c_void_p * num_updated)(*(s.data_ptr() for s in streams[:-1]))
    library.stream(num_updated, way, addresses, streams[-1].data_ptr(), count, 2)
    for stream in streams[:-1]:
        assert torch.equal(stream, 2 * streams[-1])
    assert torch.equal(streams[-1], torch.arange(count, dtype=torch.float32))


def test_the_roof_moves_as_many_bytes_in_the_same_mix() -> None:
    if roof._library() is None:
        pytest.skip("no C++ compiler")
    fp32 = roof.of(CPU, 28 * 100_000, 12 / 16)
    assert fp32 is not None
    assert fp32.what.startswith("3 streams updated and one read")
    assert fp32.num_bytes == pytest.approx(28 * 100_000, rel=1e-3)
    clipped = roof.of(CPU, 32 * 100_000, 12 / 20)
    assert clipped is not None
    assert clipped.what.startswith("2 streams updated")


# -- a case ---------------------------------------------------------------------------------------------------


def test_a_case_is_measured() -> None:
    rows, missing = measure.measure(tiny("split16_bf16", peers=(FUSED, "apex FusedAdam"), clips=True), CPU, 0.0)
    ours, theirs = (m.row for m in rows)
    assert missing == {"apex FusedAdam": "serves cuda"}
    assert (ours["peer"], theirs["peer"]) == (OURS, FUSED)
    assert ours["ratio"] == 1.0
    assert theirs["ratio"] == timing.median_ratio(rows[1].times.seconds, rows[0].times.seconds)
    assert theirs["bytes_per_param"] == 2 * 8 + 3 * 4 + 4
    assert ours["bytes_per_param"] == pytest.approx(2 * 6 * 1024 / 1000 + 3 * 2 + 2)  # of 1,000, padded to 1,024
    assert ours["roof_fraction"] is None, "the caches hold it"
    assert ours["ms_quartiles"][0] <= ours["ms"] <= ours["ms_quartiles"][1]
    assert ours["rounds"] >= timing.MIN_ROUNDS


def test_the_roof_stands_beside_what_comes_from_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    if roof._library() is None:
        pytest.skip("no C++ compiler")
    monkeypatch.setattr(measure, "BEYOND_CACHES", 0)
    rows, _ = measure.measure(tiny(), CPU, 0.0)
    assert [m.row["peer"] for m in rows] == [OURS, FUSED, ROOF]
    ours, ceiling = rows[0], rows[-1]
    of_the_roof = timing.median_ratio(ceiling.times.seconds, ours.times.seconds)
    bytes_of_ours = ours.row["bytes_per_param"] * 1000
    assert ours.row["roof_fraction"] == pytest.approx(of_the_roof * bytes_of_ours / ceiling.row["bytes"])


@pytest.mark.parametrize("peer", ["torch foreach", "torch for-loop", "torch fused, bf16", "torch kernel"])
def test_other_steps_step(peer: str) -> None:
    contestant = peers.make(peer, tiny(schedules=True, num_groups=1), CPU)
    problem = contestant.keeps_alive[0]
    before = problem.params[0].detach().clone()
    contestant.step()
    assert not torch.equal(before, problem.params[0])
    assert contestant.kept_bytes() == (4.0 if contestant.dtype == torch.bfloat16 else 8.0)


@pytest.mark.parametrize("peer", ["fused_sched.ops", "fused_sched.ops, prepared", "torch kernel"])
def test_kernels_alone_do_the_same_work(peer: str) -> None:
    """As one step of torch's AdamW with the same options."""
    torch.manual_seed(0)
    contestant = peers.make(peer, tiny(), CPU)
    problem = contestant.keeps_alive[0]
    twin = problem.params[0].detach().clone().requires_grad_()
    twin.grad = problem.grads[0].clone()
    contestant.step()
    torch.optim.AdamW([twin], lr=peers.LR, weight_decay=peers.WEIGHT_DECAY).step()
    # A few roundings of parameters of magnitude 4.
    torch.testing.assert_close(problem.params[0].detach(), twin.detach(), rtol=0.0, atol=4 * 2.0**-22)


def test_a_peer_that_fails_is_reported_and_the_others_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(peer: str, case: Case, device: torch.device) -> Any:
        raise OSError("its kernels do not compile\nhere")

    monkeypatch.setitem(peers.PEERS, "torch foreach", peers.Peer("torch", ("cpu",), broken))
    monkeypatch.setitem(peers.PEERS, "apex FusedAdam", peers.Peer("no_such_package", ("cpu",), broken))
    rows, missing = measure.measure(tiny(peers=("torch foreach", "apex FusedAdam", FUSED)), CPU, 0.0)
    assert [m.row["peer"] for m in rows] == [OURS, FUSED]
    assert missing == {
        "torch foreach": "OSError: its kernels do not compile",
        "apex FusedAdam": "no_such_package is not installed",
    }


def test_threads_are_put_back() -> None:
    before = torch.get_num_threads()
    rows, _ = measure.measure(tiny(num_threads=1), CPU, 0.0)
    assert rows[0].row["threads"] == 1
    assert torch.get_num_threads() == before


# -- what is made of it ---------------------------------------------------------------------------------------


def measured(peer: str, seconds: list[float], **row: Any) -> Measured:
    return Measured({"peer": peer, "ms": 1e3 * seconds[0], **row}, Times([Sample(s, s, s) for s in seconds]))


def test_bars_compare_neighbours() -> None:
    results = {
        "formats/fp32": [
            measured(OURS, [1.0, 2.0, 10.0], roof_fraction=0.96),
            measured(FUSED, [1.1, 2.2, 9.0]),
            measured(ROOF, [0.9, 1.9, 9.0]),
        ]
    }
    found = {(row["to"], row["of"]): row for row in bars.as_rows(bars.verdicts("cpu", results))}
    assert found[FUSED, OURS]["reached"] == pytest.approx(1.1)
    assert found[FUSED, OURS]["met"]
    assert found[ROOF, OURS]["reached"] == 0.96
    assert ("DeepSpeed CPUAdam", OURS) not in found
    assert not next(bars.verdicts("cpu", {"formats/fp32": [measured(OURS, [1.0]), measured(FUSED, [1.0])]})).is_met


def test_bars_of_a_gpu_know_two_cases_and_the_host() -> None:
    results = {
        "formats/fp32": [measured(OURS, [1.0])],
        "tensors/3000 of the size of one": [measured(OURS, [1.2])],
        "host/300 tensors": [measured(OURS, [1.0], host_us=100.0)],
    }
    across, host = bars.as_rows(bars.verdicts("cuda", results))
    assert across["reached"] == pytest.approx(1 / 1.2)
    assert not across["met"]
    assert (host["reached"], host["met"]) == (1.2, True)


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    """A report of two cases and the schedules."""
    words = "--quick --cases formats/split16_bf16,formats/split16_fp32,cache/step,schedules --elements 4096".split()
    options = command.parse(words)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measure, "BEYOND_CACHES", 0)
        patch.delitem(peers.PEERS, "DeepSpeed CPUAdam")  # which compiles for a minute
        patch.setitem(peers.PEERS, "DeepSpeed CPUAdam", peers.Peer("no_such_package", ("cpu",), peers.make))
        return command.run(options)


def test_torch_is_named_with_its_build(monkeypatch: pytest.MonkeyPatch) -> None:
    """The metadata of PyPI's wheels leave it out: 2.11.0 of 2.11.0+cu130."""
    monkeypatch.setattr(importlib.metadata, "version", lambda package: "0")
    assert peers.versions([]) == {"numpy": "0", "torch": torch.__version__}


def test_gpu_json_has_its_shape(found: dict[str, Any]) -> None:
    made = report.gpu_json(found)
    assert list(made) == ["gpu", "torch", "commit", "cases"]
    assert made["torch"] == torch.__version__
    assert [case["case"] for case in made["cases"]] == ["split16_bf16", "split16_fp32"]
    for case in made["cases"]:
        assert list(case) == ["case", "n", "bytes_per_param", "ms", "gbps", "copy_gbps", "torch_ms"]
        assert case["n"] == 4096
        assert case["gbps"] == pytest.approx(case["bytes_per_param"] * 4096 / case["ms"] / 1e6)


def test_the_report_is_written(found: dict[str, Any], tmp_path: Path) -> None:
    paths = report.write(found, tmp_path)
    assert [path.name for path in paths] == ["cpu.json", "cpu.md", "cpu.png"]
    assert json.loads(paths[0].read_text()) == json.loads(json.dumps(found))
    text = paths[1].read_text()
    for expected in ("## formats", "split16_bf16 | fused_sched | 4,096", "DeepSpeed CPUAdam: no_such_package is not"):
        assert expected in text
    assert "## Schedules" in text
    assert "roof: 4 streams updated" in text or roof._library() is None
    assert paths[2].stat().st_size > 10_000
    assert report.summary(found).count("\n") == 1 + 3  # of two formats and the step in cache
    for width in {len(line.split("|")) for line in report.summary(found).splitlines()}:
        assert width == 8


def test_the_summary_compares_what_a_row_names() -> None:
    """Of the kernels alone: both in units of our step."""
    row = {"suite": "cache", "case": "kernel alone", "ms": 1.0, "ms_quartiles": [1.0, 1.0], "roof_fraction": None}
    ratios = {OURS: 1.0, FUSED: 9.0, "fused_sched.ops, prepared": 0.25, "torch kernel": 0.5}
    rows = [{**row, "peer": peer, "ratio": ratio} for peer, ratio in ratios.items()]
    assert report.summary({"results": rows}).splitlines()[-1].split(" | ")[3] == "2.00"


def test_the_summary_has_cpu_adam_and_other_machines_beside() -> None:
    def measured(*ratios: tuple[str, float]) -> dict[str, Any]:
        row = {"suite": "cache", "case": "step", "ms": 1.0, "ms_quartiles": [1.0, 1.0], "roof_fraction": None}
        return {"results": [{**row, "peer": peer, "ratio": ratio} for peer, ratio in ratios]}

    here = measured((OURS, 1.0), (FUSED, 3.0), ("DeepSpeed CPUAdam", 1.25))
    others = {"old": measured((OURS, 1.0), (FUSED, 1.5)), "older": measured((OURS, 1.0))}
    header, _, line = report.summary(here, others).splitlines()
    assert header.endswith("| CPUAdam / ours | torch / ours, old | torch / ours, older |")
    assert line.endswith("| 3.00 |  | 1.25 | 1.50 |  |")


def test_a_gpu_report_has_gpu_json(found: dict[str, Any], tmp_path: Path) -> None:
    report.write({**found, "device": "cuda"}, tmp_path)
    assert json.loads((tmp_path / "gpu.json").read_text()) == report.gpu_json(found)


def test_schedules_are_slowest_first(found: dict[str, Any]) -> None:
    rows = found["schedules"]
    assert [row["ns"] for row in rows] == sorted((row["ns"] for row in rows), reverse=True)
    assert len(rows) > 60
    assert schedule_time.table(rows).count("\n") == 1 + len(rows)


def test_times_are_shown_in_a_fitting_unit() -> None:
    assert report.milliseconds({"ms": 12.345, "ms_quartiles": [12.0, 13.0]}) == "12.3 ms (12 to 13)"
    assert report.milliseconds({"ms": 0.0712, "ms_quartiles": [0.07, 0.08]}) == "71.2 us (70 to 80)"


def test_the_readme_shows_what_was_measured() -> None:
    assert make_readme.speed_digest() in make_readme.SPEED_PICTURE.read_text(), "run make docs"


# -- the command ----------------------------------------------------------------------------------------------


def test_the_command_writes_and_checks(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    monkeypatch.setattr(bars, "BARS", [bars.Bar("cpu", "formats/split16_bf16", FUSED, OURS, 1e9)])
    words = ["--quick", "--cases", "formats/split16_bf16", "--elements", "4096", "--out", str(tmp_path)]
    assert command.main(words) == 0
    assert "**missed**" in capsys.readouterr().out
    assert command.main([*words, "--check"]) == 1
    assert (tmp_path / "cpu.json").exists()


def test_no_case_is_begun_after_the_budget() -> None:
    options = command.parse("--quick --cases formats/split16_* --elements 4096 --budget 1e-9".split())
    result = command.run(options)
    assert result["results"] == []
    assert set(result["missing"]) == {f"formats/split16_{kept}" for kept in ("fp32", "bf16", "8bit")}


def test_headlines_are_cases() -> None:
    options = SimpleNamespace(**vars(command.parse(["--quick", "--cases", "headlines", "--budget", "1e-9"])))
    with pytest.raises(ValueError, match="no case is called 'models/ResNet-50 fp32'"):
        command.run(options)  # --quick has no large models
    options = command.parse(["--cases", "headlines", "--budget", "1e-9"])
    assert set(command.run(options)["missing"]) == set(report.HEADLINES)


def test_a_gpu_that_is_not_there() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(SystemExit, match="needs a GPU that torch can use, and finds none"):
        command.run(command.parse(["--device", "cuda"]))


@pytest.mark.parametrize("lacking", [(), ("rich.progress",), ("rich.progress", "tqdm")])
def test_progress_without_its_packages(lacking: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def importing(name: str, *arguments: Any, **options: Any) -> Any:
        if name in lacking:
            raise ImportError(name)
        return real(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", importing)
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    assert list(command.progress("abc", str.upper, 3)) == ["a", "b", "c"]
