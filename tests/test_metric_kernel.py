"""Machines of metric-driven rates in the CUDA kernel, run on the CPU (tests/cuda_on_cpu), and in the CPU backend,
against the recorded rates.

Needs NumPy and a C++ compiler only. test_sanitizers.py runs this file again under the sanitizers.
"""

from __future__ import annotations

import json
from math import inf
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cuda_on_cpu import abi
from cuda_on_cpu.memory import Buffer

pytest_plugins = ["cuda_on_cpu.fixtures"]

GOLDEN = Path(__file__).parent / "golden"
RECORDS = [
    record
    for name in ("torch_ReduceLROnPlateau", "transformers_reduce_lr_on_plateau", "transformers_greedy")
    for record in json.loads((GOLDEN / f"{name}.json").read_text())
]

#: The libraries' defaults, in this ABI's words.
PLATEAU = {"factor": 0.1, "patience": 10, "threshold": 1e-4, "relative": 1, "cooldown": 0, "min_lr": 0, "eps": 1e-8}
GREEDY = {"factor": 0.95, "patience": 10, "threshold": 1e-6, "relative": 0, "cooldown": 0, "warmup": 0, "min_lr": 1e-3,
          "max_lr": 1.0, "eps": 1e-8, "reset_start": 500}  # fmt: skip


def rule_of(record: dict[str, Any]) -> dict[str, float]:
    greedy = record["schedule"] == "greedy"
    rule = dict(GREEDY if greedy else PLATEAU, kind=abi.METRIC_RULES["greedy" if greedy else "plateau"])
    config = dict(record["config"])
    rule["base_lr"] = config.pop("lr")
    rule["maximize"] = config.pop("mode", "min") == "max"
    if "threshold_mode" in config:
        rule["relative"] = config.pop("threshold_mode") == "rel"
    rule["window"] = config.pop("window_size", 50) if config.pop("smooth", False) else 0
    assert config.keys() <= rule.keys()
    return rule | config


def state_of(rule: dict[str, float]) -> Buffer:
    names = (abi.GREEDY_STATE if rule["kind"] else abi.PLATEAU_STATE).names
    state = Buffer(np.float64, len(names) + int(rule["window"]))
    start = {"lr": rule["base_lr"], "best": -inf if rule["maximize"] else inf, "resets_left": rule.get("reset_start")}
    state.data[: len(names)] = [start.get(name, 0.0) for name in names]
    return state


class Machines:
    """One machine per record of RECORDS, over and over; every fifth group has none."""

    def __init__(self, count: int) -> None:
        self.records = Buffer(abi.METRIC_RECORD, count)
        self.metric = Buffer(np.float64, 1)
        self.states: dict[int, Buffer] = {}
        for i in set(range(count)) - set(range(4, count, 5)):
            rule = rule_of(RECORDS[i % len(RECORDS)])
            for name, value in rule.items():
                self.records.data[i]["rule"][name] = value
            self.states[i] = state_of(rule)
            self.records.data[i]["state"] = self.states[i].address

    def report(self, device: int = 0, stream: int = 0) -> abi.Report:
        return abi.Report(self.metric.address, self.records.address, len(self.records.data), stream, device)


@pytest.mark.parametrize("count", [1, 32, 75])
def test_recorded_rates(each_library: abi.StepLibrary, count: int) -> None:
    """Machines side by side, more than a warp of them; a group without one is passed over."""
    machines = Machines(count)
    records = machines.records.raw.copy()
    for step in range(110):
        for i, state in machines.states.items():
            assert state.data[0] == RECORDS[i % len(RECORDS)]["lr"][step], (i, step)
        # All machines of a launch see one metric: the records' are told apart by launching once for each.
        for i, record in enumerate(RECORDS[:count]):
            machines.metric.data[0] = record["metrics"][step]
            mine = [j for j in machines.states if j % len(RECORDS) == i]
            others = [j for j in machines.states if j not in mine]
            machines.records.data["state"][others] = 0
            each_library.report_metric(machines.report())
            machines.records.data["state"][others] = [machines.states[j].address for j in others]
    assert (machines.records.raw == records).all()
    for buffer in [machines.records, machines.metric, *machines.states.values()]:
        buffer.assert_sentinels()


def test_no_groups(each_library: abi.StepLibrary) -> None:
    each_library.report_metric(Machines(0).report())


def test_device_and_stream_of_the_report(library: abi.Library) -> None:
    library.report_metric(Machines(2).report(device=1, stream=0x5EED))
    assert library.functions.cuda_on_cpu_launch_device() == 1
    assert library.functions.cuda_on_cpu_current_device() == 0
    assert library.functions.cuda_on_cpu_stream() == 0x5EED


def test_the_kernel_is_loaded_with_capture_relaxed(library: abi.Library) -> None:
    library.set_machine(num_devices=8)
    library.report_metric(Machines(2).report(device=7))  # a device no other test uses: loads there
    assert library.functions.cuda_on_cpu_capture_was_relaxed() == 1
    assert library.functions.cuda_on_cpu_capture_mode() == 0


def test_a_launch_that_fails(library: abi.Library) -> None:
    machines = Machines(1)
    before = machines.states[0].raw.copy()
    library.fail("launch")
    with pytest.raises(abi.BackendError, match=r"^launch_kernel.* failed at launch\.cu:\d+: cudaErrorInvalidValue"):
        library.report_metric(machines.report())
    assert (machines.states[0].raw == before).all()
