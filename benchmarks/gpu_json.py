"""The formats of a report in the shape that benchmarks/results/gpu.json has. No torch is imported: `make gpu-check`
calls it in its last seconds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .names import OURS, RIVAL, ROOF


def gpu_json(report: dict[str, Any]) -> dict[str, Any]:
    """A case per format."""
    cases = []
    for key, rows in by_case(report["results"]).items():
        suite, name = key.split("/", 1)
        ours, ceiling, rival = (row_of(rows, peer) for peer in (OURS, ROOF, RIVAL))
        if suite != "formats" or ours is None:
            continue
        cases.append(
            {
                "case": name,
                "n": ours["n"],
                "bytes_per_param": ours["bytes_per_param"],
                "ms": ours["ms"],
                "gbps": ours["gbps"],
                "copy_gbps": ceiling["gbps"] if ceiling else None,
                "torch_ms": rival["ms"] if rival else None,
            }
        )
    about = report["conditions"]
    return {"gpu": about["device"], "torch": about["versions"]["torch"], "commit": about["commit"], "cases": cases}


def by_case(results: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    found: dict[str, list[dict[str, Any]]] = {}
    for row in results:
        found.setdefault(f"{row['suite']}/{row['case']}", []).append(row)
    return found


def row_of(rows: Sequence[dict[str, Any]], peer: str) -> dict[str, Any] | None:
    return next((row for row in rows if row["peer"] == peer), None)
