"""What the benchmark does on a GPU alone, on one that is simulated: in which order, and what it writes down."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks import __main__ as command
from benchmarks import bars, cases, measure, nvidia_smi, peers, profiled, report, timing
from benchmarks.cases import LADDER, Case
from benchmarks.measure import Measured
from benchmarks.names import OURS
from benchmarks.timing import Sample, Times
from fused_sched import steady

CUDA = torch.device("cuda", 0)


# -- the timer ------------------------------------------------------------------------------------------------


class Logged:
    """Something whose every method is noted."""

    def __init__(self, name: str, log: list[str]) -> None:
        self.name, self.log = name, log

    def __getattr__(self, method: str) -> Any:
        return lambda *_: self.log.append(f"{self.name}.{method}")


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What torch.cuda is asked for; a time between events is 60 ms."""
    log: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            pass

        def record(self) -> None:
            log.append("record")

        def synchronize(self) -> None:
            pass

        def elapsed_time(self, end: Event) -> float:
            return 60.0

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: log.append("sleep"))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: log.append("wait"))
    monkeypatch.setattr(timing, "FLUSH_BYTES", 64)
    return log


def timed(burst: int, log: list[str]) -> Sample:
    timer = timing.CudaTimer(torch.device("cpu"), burst)
    timer._flush = Logged("flush", log)  # type: ignore[assignment]
    return timer(lambda: log.append("step"))


def test_a_step_from_memory_finds_no_line_that_is_still_to_be_written(log: list[str]) -> None:
    sample = timed(1, log)
    assert log == ["wait", "step", "wait", "flush.fill_", "flush.sum", "sleep", "record", "step", "record"]
    assert sample.device == pytest.approx(0.06)


def test_steps_in_cache_are_timed_there(log: list[str]) -> None:
    sample = timed(4, log)
    warm = ["step"] * timing.STEPS_INTO_CACHE
    assert log == ["wait", *["step"] * 4, "wait", *warm, "sleep", "record", *["step"] * 4, "record"]
    assert sample.device == pytest.approx(0.015)


def test_bursts_reach_the_timer(log: list[str]) -> None:
    case = next(case for case in cases.all_cases("cuda") if case.key == "cache/step")
    seen: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measure, "CudaTimer", lambda device, burst: seen.append(burst))
        measure._timer(case, CUDA)
    assert seen == [20]


def test_the_queue_holds_what_is_timed() -> None:
    """A for-loop of torch's is some ten launches a tensor, its thirty tails of 1,000 tensors hundreds each."""
    for case in cases.all_cases("cuda"):
        assert len(case.shapes) == 1 or "torch for-loop" not in case.peers, case.key
        assert len(case.shapes) == 1 or case.burst == 1, case.key


def test_clocks_are_raised_on_a_gpu_alone(log: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "SPIN_UP_SECONDS", 0.0)
    timing.spin_up(torch.device("cpu"))
    assert log == []
    ticks = iter([0.0, 0.0, 1.0])
    monkeypatch.setattr(time, "perf_counter", lambda: next(ticks))
    monkeypatch.setattr(timing, "SPIN_UP_SECONDS", 0.5)
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *size, device, **options: empty(*size, **options))
    timing.spin_up(CUDA)
    assert log == ["wait"]


# -- the profiler ---------------------------------------------------------------------------------------------


def test_labels_of_the_host_are_no_kernels() -> None:
    on_gpu, on_cpu = torch.autograd.DeviceType.CUDA, torch.autograd.DeviceType.CPU
    events = [
        SimpleNamespace(name="update_kernel", device_type=on_gpu, is_user_annotation=False),
        SimpleNamespace(name="Optimizer.step#FusedScheduledAdam.step", device_type=on_gpu, is_user_annotation=True),
        SimpleNamespace(name="aten::add", device_type=on_cpu, is_user_annotation=False),
    ]
    assert profiled.kernels(events) == ["update_kernel"]
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        torch.ones(3)
    assert all(hasattr(event, "is_user_annotation") for event in profile.events())


# -- a run ----------------------------------------------------------------------------------------------------


@pytest.fixture
def on_gpu(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A run's steps on a machine with a GPU, noted and not taken."""
    log: list[str] = []

    def measured(case: Case, device: torch.device, seconds: float) -> tuple[list[Measured], dict[str, str]]:
        log.append(f"time {case.key}")
        row = {"suite": case.suite, "case": case.name, "peer": OURS, "n": 1, "bytes_per_param": 1.0, "launches": None}
        row |= {"ms": 1.0, "gbps": 1.0, "ms_quartiles": [1.0, 1.0], "roof_fraction": None, "processor_ratio": None}
        row |= {"ratio": 1.0, "host_us": 60.0, "kept_bytes_per_param": 8.0}
        return [Measured(row, Times([Sample(1.0, 1.0, 1.0)]))], {}

    def launches(case: Case, device: torch.device) -> dict[str, int | None]:
        log.append(f"profile {case.key}")
        return {OURS: 2}

    def queried(fields: Any, gpu: str | None) -> dict[str, str]:
        log.append(f"nvidia-smi {gpu}")
        return {"driver_version": "1.2", "clocks.sm": f"{len(log)} MHz"}

    properties = SimpleNamespace(multi_processor_count=4, L2_cache_size=1 << 20, uuid="0a0b")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "some GPU")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(report, "compiled_pass", lambda device: False)
    monkeypatch.setattr(peers, "absent", lambda name, device: "")
    monkeypatch.setattr(peers, "versions", lambda names: {"torch": "2"})
    monkeypatch.setattr(measure, "measure", measured)
    monkeypatch.setattr(measure, "launches", launches)
    monkeypatch.setattr(timing, "spin_up", lambda device: log.append("spin up"))
    monkeypatch.setattr(nvidia_smi, "query", queried)
    return log


WORDS = "--device cuda --cases formats/fp32,host/300?tensors --quick".split()


def test_the_profiler_comes_when_everything_is_timed_and_saved(on_gpu: list[str], tmp_path: Path) -> None:
    assert command.main([*WORDS, "--out", str(tmp_path)]) == 0
    both = ["formats/fp32", "host/300 tensors"]
    asked = "nvidia-smi GPU-0a0b"
    assert on_gpu == ["spin up", asked, *(f"time {key}" for key in both), asked, *(f"profile {key}" for key in both)]
    found = json.loads((tmp_path / "cuda.json").read_text())
    assert [row["launches"] for row in found["results"]] == [2, 2]
    assert found["conditions"]["gpu_before"] == {"driver_version": "1.2", "clocks.sm": "2 MHz"}
    assert found["conditions"]["gpu_after"]["clocks.sm"] == "5 MHz"
    assert json.loads((tmp_path / "gpu.json").read_text())["cases"][0]["case"] == "fp32"
    text = (tmp_path / "cuda.md").read_text()
    assert "before it driver_version 1.2, clocks.sm 2 MHz; after it" in text
    assert "host/300 tensors | 120 us / host time, no compiled pass |" in text


def test_a_profiler_that_fails_costs_no_times(
    on_gpu: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(case: Case, device: torch.device) -> Any:
        assert json.loads((tmp_path / "cuda.json").read_text())["results"], "not saved before"
        raise RuntimeError("CUPTI_ERROR_NOT_INITIALIZED")

    monkeypatch.setattr(measure, "launches", broken)
    assert command.main([*WORDS, "--out", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "cuda.json").read_text())
    assert len(found["results"]) == 2
    assert found["missing"] == {"launches": "RuntimeError: CUPTI_ERROR_NOT_INITIALIZED"}


def test_the_compiled_pass_is_said_to_be_in_force_where_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    contestant = peers.make(OURS, Case("host", "x", LADDER["fp32"], [(8,)]), cpu)
    if not report.compiled_pass(cpu):
        pytest.skip("it is not, here")
    taken: list[bool] = []
    real = steady.SteadyCall.repeats

    def repeats(self: steady.SteadyCall, groups: Any) -> bool:
        taken.append(real(self, groups))
        return taken[-1]

    monkeypatch.setattr(steady.SteadyCall, "repeats", repeats)
    for _ in range(4):
        contestant.step()
    assert taken[-1]
    monkeypatch.setattr(steady, "_EXCHANGE_API", None)
    assert not report.compiled_pass(cpu)


def test_the_bar_of_the_host_names_its_condition() -> None:
    row = {"peer": OURS, "ms": 1.0, "host_us": 100.0}
    results = {"host/300 tensors": [Measured(row, Times([Sample(1.0, 1.0, 1.0)]))]}
    said = [next(bars.verdicts("cuda", results, how)).bar.fast for how in (None, True, False)]
    assert said == ["host time", "host time, compiled pass", "host time, no compiled pass"]


# -- nvidia-smi -----------------------------------------------------------------------------------------------


def program(folder: Path, name: str, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Put a Python script of this name first on PATH."""
    path = folder / name
    path.write_text(f"#!{sys.executable}\n{text}\n")
    path.chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=":")


def test_nvidia_smi_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = "import sys; assert '--id=GPU-1' in sys.argv; print('570.1, 1980 MHz'); print('570.1, 345 MHz')"
    program(tmp_path, "nvidia-smi", script, monkeypatch)
    assert nvidia_smi.query(["driver_version", "clocks.sm"], "GPU-1") == {
        "driver_version": "570.1",
        "clocks.sm": "1980 MHz",
    }
    assert nvidia_smi.query(["driver_version"], "GPU-1") == {}, "another number of fields"
    assert nvidia_smi.query(["driver_version", "clocks.sm"], "GPU-2") == {}, "an error"


def test_nvidia_smi_may_hang_or_be_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program(tmp_path, "nvidia-smi", "import time; time.sleep(60)", monkeypatch)
    monkeypatch.setattr(nvidia_smi, "SECONDS", 0.5)
    assert nvidia_smi.query(["driver_version"]) == {}

    def missing(*_: Any, **__: Any) -> Any:
        raise FileNotFoundError("nvidia-smi")

    monkeypatch.setattr(subprocess, "run", missing)
    assert nvidia_smi.query(["driver_version"]) == {}
