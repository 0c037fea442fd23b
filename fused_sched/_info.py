"""What is installed, what this machine can run, and why not the rest: what `python -m fused_sched` prints."""

from __future__ import annotations

import importlib
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import ModuleType
from typing import Any

from . import __version__, backends


def report() -> str:
    """One line per fact, the names in a column."""
    info = backends.build_info()
    modules = {name: compiled_module(f"_{name}") for name in ("cuda", "cpu")}
    rows = [
        ("fused_sched", f"{__version__} in {Path(__file__).parent}"),
        ("versions", f"Python {platform.python_version()}, torch {of('torch')}, numpy {of('numpy')}"),
        ("built with", compilers(info)),
        *((f"backend {name}", backend_state(name)) for name in ("cuda", "cpu", "reference")),
        ("instruction sets", instruction_sets(modules["cpu"])),
        ("GPU architectures", gpu_architectures(info) if modules["cuda"] else "none"),
        *tables(modules["cpu"] or modules["cuda"]),
    ]
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {text}" for name, text in rows)


def compiled_module(name: str) -> ModuleType | None:
    try:
        return importlib.import_module(f"fused_sched.{name}")
    except ImportError:
        return None


def backend_state(name: str) -> str:
    usable, reason = backends.available(name)
    if usable or reason.startswith("not built"):
        return "usable" if usable else reason
    return f"built, not usable here: {reason}"


def of(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def compilers(info: dict[str, Any]) -> str:
    names = [info.get("compiler") or "no C++ compiler"]
    names.append(f"nvcc {info['nvcc']}" if info.get("nvcc") else "no nvcc")
    return ", ".join(names)


def instruction_sets(cpu: ModuleType | None) -> str:
    """All that were compiled; those this machine lacks are marked, and the first of the others is used."""
    if cpu is None:
        return "none"
    return ", ".join(name if here else f"{name} (not on this machine)" for name, here in cpu.instruction_sets())


def gpu_architectures(info: dict[str, Any]) -> str:
    names = info.get("cuda_architectures") or []
    return ", ".join(f"sm_{name}" for name in names) + f" and PTX of {names[-1]}" if names else "unknown"


def tables(module: ModuleType | None) -> list[tuple[str, str]]:
    """The names of the C++ tables; a name's number is in checkpoints and never changes."""
    if module is None:
        return [("curves, formats", "unknown without a compiled module")]
    rows = [("curves", "CURVES"), ("tree nodes", "NODE_KINDS"), ("formats", "FORMATS")]
    rows += [("masters", "MASTERS"), ("moments", "MOMENTS")]
    return [(title, ", ".join(str(name) for name in getattr(module, table))) for title, table in rows]
