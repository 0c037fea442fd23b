"""What is aimed at, as ratios within one run: the project's bars, also against regressions.

Times of different runs are never compared: machines differ, and one machine differs from hour to hour.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from .measure import Measured
from .names import CPU_ADAM, OURS, RIVAL, ROOF
from .timing import median_ratio

Results = Mapping[str, list[Measured]]  # by case


class Bar(NamedTuple):
    """The time of `slow` must be at least `least` times that of `fast`, where both were measured.

    fast: a peer, or a case and a peer ("formats/fp32: torch fused"). slow: likewise, or the roof, of whose speed `fast`
    must then reach that fraction.
    """

    device: str
    case: str
    slow: str
    fast: str
    least: float


class Verdict(NamedTuple):
    bar: Bar
    reached: float

    @property
    def is_met(self) -> bool:
        return self.reached >= self.bar.least


FORMATS_AT_THE_ROOF = ("fp32", "param32_bf16", *(f"{m}_{s}" for m in ("split16", "fp32") for s in ("fp32", "bf16")))
EIGHT_BIT = ("split16_8bit", "split8_8bit")
FUSED, KERNEL = RIVAL, "torch kernel"

BARS = [
    # CPU, two cores, 16.8M elements
    Bar("cpu", "formats/fp32", FUSED, OURS, 1.05),
    Bar("cpu", "formats/fp32", ROOF, OURS, 0.95),
    Bar("cpu", "formats/split16_bf16", FUSED, OURS, 1.4),
    Bar("cpu", "formats/split8_8bit", FUSED, OURS, 1.8),
    Bar("cpu", "tail/fp32", FUSED, OURS, 1.25),
    Bar("cpu", "host/1000 tensors tail", FUSED, OURS, 20.0),
    Bar("cpu", "cache/step", FUSED, OURS, 2.0),
    Bar("cpu", "cache/kernel alone", KERNEL, "fused_sched.ops, prepared", 2.0),
    *(
        Bar("cpu", case, peer, OURS, 1.0)
        for case, peer in (
            ("formats/fp32", CPU_ADAM),
            ("formats/none_fp32", "DeepSpeed CPUAdam, bf16"),
            ("cache/step", CPU_ADAM),
            *((f"models/{name} fp32", CPU_ADAM) for name in ("ResNet-50", "GPT-2 124M", "Llama 3 8B / 16")),
        )
    ),
    # GPU, 2^28 elements
    *(Bar("cuda", f"formats/{name}", ROOF, OURS, 0.90) for name in FORMATS_AT_THE_ROOF),
    *(Bar("cuda", f"formats/{name}", ROOF, OURS, 0.80) for name in EIGHT_BIT),
    Bar("cuda", "formats/fp32", FUSED, OURS, 1.1),
    Bar("cuda", "formats/split16_bf16", FUSED, OURS, 1.5),
    Bar("cuda", "formats/split8_8bit", FUSED, OURS, 2.0),
    Bar("cuda", "tail/fp32", FUSED, OURS, 1.8),
    Bar("cuda", "tensors/3000 of the size of one", f"formats/fp32: {OURS}", OURS, 1 / 1.10),
]
#: Of the host, per eager step of 300 tensors on a GPU.
MOST_HOST_US = 120.0


def verdicts(device: str, results: Results, compiled_pass: bool | None = None) -> Iterator[Verdict]:
    """Of every bar of the device whose two sides were measured.

    compiled_pass: whether steady steps were recognised by it (`fused_sched.steady`), which the host's time depends on.
    """
    for bar in BARS:
        if bar.device != device:
            continue
        fast, slow = _find(results, bar.case, bar.fast), _find(results, bar.case, bar.slow)
        if fast is None or slow is None:
            continue
        if bar.slow == ROOF:
            yield Verdict(bar, fast.row["roof_fraction"])
        elif ": " in bar.slow:
            yield Verdict(bar, slow.row["ms"] / fast.row["ms"])  # of two cases: no rounds in common
        else:
            yield Verdict(bar, median_ratio(slow.times.seconds, fast.times.seconds))
    host = _find(results, "host/300 tensors", OURS)
    if device == "cuda" and host is not None:
        how = {None: "", True: ", compiled pass", False: ", no compiled pass"}[compiled_pass]
        bar = Bar("cuda", "host/300 tensors", f"{MOST_HOST_US:g} us", f"host time{how}", 1.0)
        yield Verdict(bar, MOST_HOST_US / host.row["host_us"])


def _find(results: Results, case: str, peer: str) -> Measured | None:
    if ": " in peer:
        case, peer = peer.split(": ", 1)
    return next((m for m in results.get(case, []) if m.row["peer"] == peer), None)


def as_rows(found: Iterator[Verdict]) -> list[dict[str, Any]]:
    return [
        {
            "case": v.bar.case,
            "of": v.bar.fast,
            "to": v.bar.slow,
            "least": v.bar.least,
            "reached": v.reached,
            "met": v.is_met,
        }
        for v in found
    ]
