"""Results as JSON, as tables, as bar charts: one file each, all from the same dictionary."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from fused_sched import backends, steady

from . import nvidia_smi
from .gpu_json import by_case, gpu_json, row_of
from .names import CPU_ADAM, OURS, RIVAL, ROOF

ROOT = Path(__file__).resolve().parents[1]

#: Suites of the summary, and what each row is: case -> words.
HEADLINES = {
    "formats/fp32": "fp32",
    "formats/split16_fp32": "bf16, split16 + fp32 moments",
    "formats/split16_bf16": "bf16, split16 + bf16 moments",
    "formats/split16_8bit": "bf16, split16 + 8-bit moments",
    "formats/split8_8bit": "bf16, split8 + 8-bit moments",
    "tail/fp32": "clip + step + schedule, fp32",
    "tail/split16_bf16": "clip + step + schedule, split16 + bf16",
    "cache/step": "64K elements in cache, fp32",
    "cache/clip and step": "64K elements in cache, clip + step",
    "models/ResNet-50 fp32": "ResNet-50, clip + step + schedule",
    "models/GPT-2 124M fp32": "GPT-2 124M, clip + step + schedule",
    "cache/kernel alone": "64K elements in cache, the kernels alone",
    "host/300 tensors": "300 tensors of 64 elements",
}
#: Where a row of the summary compares others.
PAIRS = {"cache/kernel alone": ("fused_sched.ops, prepared", "torch kernel")}

_OURS, _RIVAL, _TEXT, _AXIS = "#2f81d7", "#9aa4af", "#7d8590", "#9aa4af"


def conditions(device: torch.device, versions: dict[str, str]) -> dict[str, Any]:
    """What the numbers depend on."""
    found: dict[str, Any] = {
        "device": device_name(device),
        "python": platform.python_version(),
        "versions": versions,
        "commit": commit(),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {"multiprocessors": properties.multi_processor_count, "l2_bytes": properties.L2_cache_size}
        return found | {"cuda": torch.version.cuda, "compiled_pass": compiled_pass(device)}
    module = backends.select("auto", device).module
    return found | {
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "instruction_set": module.instruction_set() if module is not None else "reference",
        "load_before": round(os.getloadavg()[0], 2),
    }


def compiled_pass(device: torch.device) -> bool:
    """Whether steady steps are recognised by it: torch must have what it reads tensors with (`fused_sched.steady`)."""
    return steady._EXCHANGE_API is not None and backends.select("auto", device).module is not None


def gpu_state(device: torch.device) -> dict[str, str]:
    """Driver, clocks and temperature, where nvidia-smi tells; empty for a CPU."""
    if device.type != "cuda":
        return {}
    return nvidia_smi.query(nvidia_smi.STATE, f"GPU-{torch.cuda.get_device_properties(device).uuid}")


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    # Of the first processor. A virtual machine may hide the model's name, but hardly its family.
    about = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in reversed(lines))}
    if "model name" not in about:
        return platform.machine()
    return f"{about['model name']} (family {about.get('cpu family', '?')}, model {about.get('model', '?')})"


def commit() -> str | None:
    """Of this checkout, with a + if files differ from it; None outside of git.

    $FUSED_SCHED_COMMIT goes before: a copy of the files may have come without .git.
    """
    if named := os.environ.get("FUSED_SCHED_COMMIT"):
        return named
    try:
        head = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
        if head.returncode != 0:
            return None
        changed = subprocess.run(["git", "diff", "--quiet", "HEAD", "--", "csrc", "fused_sched"], cwd=ROOT)
    except OSError:
        return None
    return head.stdout.strip() + "+" * (changed.returncode != 0)


# ---- tables ----------------------------------------------------------------------------------------------


def summary(report: dict[str, Any], elsewhere: Mapping[str, dict[str, Any]] | None = None) -> str:
    """The headline cases against torch's fused AdamW in fp32, and DeepSpeed's CPUAdam where it takes part.

    elsewhere: reports of other machines by name, of which the ratios to torch are shown.
    """
    others = {name: _speedups(other) for name, other in (elsewhere or {}).items()}
    header = [OURS, "torch fused, fp32", "torch / ours", "of the roof", "CPUAdam / ours"]
    header += [f"torch / ours, {name}" for name in others]
    lines = [f"| | {' | '.join(header)} |", "|---|" + "---|" * len(header)]
    cases = by_case(report["results"])
    for key, words, ours, rival in _headlines(report):
        cpu_adam = row_of(cases[key], CPU_ADAM)
        cells = [
            *(words, milliseconds(ours), milliseconds(rival), f"{_speedup(ours, rival):.2f}"),
            _percent(ours["roof_fraction"]),
            "" if cpu_adam is None else f"{_speedup(ours, cpu_adam):.2f}",
            *(f"{speedups[key]:.2f}" if key in speedups else "" for speedups in others.values()),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _headlines(report: dict[str, Any]) -> Iterator[tuple[str, str, dict[str, Any], dict[str, Any]]]:
    """Case, words, our row and the rival's."""
    cases = by_case(report["results"])
    for key, words in HEADLINES.items():
        ours, rival = (row_of(cases.get(key, []), peer) for peer in PAIRS.get(key, (OURS, RIVAL)))
        if ours is not None and rival is not None:
            yield key, words, ours, rival


def _speedups(report: dict[str, Any]) -> dict[str, float]:
    return {key: _speedup(ours, rival) for key, _, ours, rival in _headlines(report)}


def _speedup(ours: dict[str, Any], rival: dict[str, Any]) -> float:
    """Both ratios are to the time of our step, in the same rounds."""
    return float(rival["ratio"] / ours["ratio"])


def markdown(report: dict[str, Any]) -> str:
    """Everything, a table per suite."""
    about = report["conditions"]
    lines = [f"# {about['device']}", "", described(report), ""]
    suites: dict[str, list[dict[str, Any]]] = {}
    for row in report["results"]:
        suites.setdefault(row["suite"], []).append(row)
    for suite, rows in suites.items():
        lines += [
            *(f"## {suite}", ""),
            "| case | who | elements | ms (quartiles) | GB/s | of the roof | time / ours | processor time / ours | "
            "host us | bytes kept | launches |",
            "|---|---|---|---|---|---|---|---|---|---|---|",
        ]
        lines += [_line(row) for row in rows]
        lines.append("")
    if report["bars"]:
        lines += ["## Bars", "", "| case | ratio of times | at least | reached | |", "|---|---|---|---|---|"]
        lines += [
            f"| {bar['case']} | {bar['to']} / {bar['of']} | {bar['least']:.2f} | {bar['reached']:.2f} | "
            f"{'met' if bar['met'] else '**missed**'} |"
            for bar in report["bars"]
        ]
        lines.append("")
    if report["missing"]:
        lines += ["## Absent", "", *(f"- {peer}: {why}" for peer, why in report["missing"].items()), ""]
    if report["schedules"]:
        from . import schedule_time

        lines += ["## Schedules", "", schedule_time.table(report["schedules"]), ""]
    return "\n".join(lines)


def _line(row: dict[str, Any]) -> str:
    if row["peer"] == ROOF:
        return f"| {row['case']} | roof: {row['what']} | | {milliseconds(row)} | {row['gbps']:.1f} | | | | | | |"
    gbps = f"{row['gbps']:.1f}" if row["n"] >= 1 << 20 else ""
    launches = row["launches"] if row["launches"] is not None else ""
    processor = f"{row['processor_ratio']:.2f}" if row["processor_ratio"] is not None else ""
    return (
        f"| {row['case']} | {row['peer']} | {row['n']:,} | {milliseconds(row)} | {gbps} | "
        f"{_percent(row['roof_fraction'])} | {row['ratio']:.2f} | {processor} | {row['host_us']:.0f} | "
        f"{row['kept_bytes_per_param']:.2f} | {launches} |"
    )


def milliseconds(row: dict[str, Any]) -> str:
    """The median and its quartiles, in the unit that suits it."""
    low, high = row["ms_quartiles"]
    scale, unit = (1e3, "us") if row["ms"] < 1.0 else (1.0, "ms")
    return f"{scale * row['ms']:.3g} {unit} ({scale * low:.3g} to {scale * high:.3g})"


def _percent(fraction: float | None) -> str:
    return "" if fraction is None else f"{100 * fraction:.0f}%"


def described(report: dict[str, Any]) -> str:
    """The conditions in a sentence or two."""
    about = report["conditions"]
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items() if name != OURS)
    where = f"{about['device']}, {versions}, commit {about['commit']}"
    if "threads" in about:
        where += f"; {about['threads']} threads on {about['cores']} cores, {about['instruction_set']}"
    for when in ("before", "after"):
        if state := about.get(f"gpu_{when}"):
            where += f"; {when} it " + ", ".join(f"{name} {value}" for name, value in state.items())
    return f"{where}. Medians of alternating steps in one process, quartiles in parentheses."


# ---- pictures --------------------------------------------------------------------------------------------


def draw(report: dict[str, Any], path: Path, description: str = "") -> None:
    """Bars of the headline cases: time per step, ours and torch's, and the share of the roof. PNG or SVG by suffix."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    rows = list(_headlines(report))[::-1]
    style = {
        "svg.hashsalt": "fused_sched",
        "svg.fonttype": "none",
        "font.size": 8.0,
        **dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color"), _TEXT),
        "axes.edgecolor": _AXIS,
    }
    with mpl.rc_context(style):
        figure = Figure(figsize=(8.5, 0.8 + 0.32 * len(rows)), layout="constrained")
        speed, roof = figure.subplots(1, 2, sharey=True, width_ratios=[3, 2])
        transparent = path.suffix == ".svg"  # shown on white and on black
        figure.patch.set_visible(not transparent)
        for ax in (speed, roof):
            ax.patch.set_visible(not transparent)
            ax.spines[["top", "right"]].set_visible(False)
        places = range(len(rows))
        speedups = [_speedup(ours, rival) for _, _, ours, rival in rows]
        speed.barh(places, speedups, color=_OURS)
        speed.axvline(1.0, color=_AXIS, linewidth=1.0)
        for place, speedup in enumerate(speedups):
            speed.annotate(f" {speedup:.2f}", (speedup, place), va="center")
        speed.set(yticks=list(places), yticklabels=[words for _, words, _, _ in rows])
        speed.set_xlabel("steps in the time of one of torch's fused AdamW in fp32")
        fractions = [ours["roof_fraction"] or 0.0 for _, _, ours, _ in rows]
        roof.barh(places, [100 * fraction for fraction in fractions], color=_RIVAL)
        roof.set(xlabel="% of the speed of the machine's memory", xlim=(0, 110))
        about = {"Title": "Optimizer steps", "Description": description}
        metadata = {**about, "Date": None, "Creator": None} if transparent else about
        figure.savefig(path, dpi=150, metadata=metadata)


def save(report: dict[str, Any], folder: Path) -> list[Path]:
    """The numbers, which the rest is made of: <device>.json, and gpu.json of a GPU."""
    folder.mkdir(parents=True, exist_ok=True)
    contents = {f"{report['device']}.json": report}
    if report["device"] == "cuda":
        contents["gpu.json"] = gpu_json(report)
    for name, content in contents.items():
        # Whoever is killed while writing leaves the file of before.
        partial = folder / f"{name}.partial"
        partial.write_text(json.dumps(content, indent=1) + "\n")
        partial.replace(folder / name)
    return [folder / name for name in contents]


def write(report: dict[str, Any], folder: Path) -> list[Path]:
    """All files of a report, named after its device type."""
    paths = save(report, folder)
    name = report["device"]
    paths.append(folder / f"{name}.md")
    paths[-1].write_text(markdown(report))
    if any(True for _ in _headlines(report)):
        try:
            draw(report, folder / f"{name}.png")
            paths.append(folder / f"{name}.png")
        except ImportError:
            print("no picture: matplotlib is not installed")
    return paths
