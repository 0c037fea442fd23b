"""`python -m fused_sched`: what is installed, what this machine can run, and why not the rest.

Paste its output into a bug report.
"""

from __future__ import annotations

import importlib
import json
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import ModuleType
from typing import Any


def main() -> None:
    info = build_info()
    cpu, cpu_error = load("_cpu", info)
    cuda, cuda_error = load("_cuda", info)
    rows = [
        ("fused_sched", f"{package_version()} in {Path(__file__).parent}"),
        ("versions", f"Python {platform.python_version()}, torch {of('torch')}, numpy {of('numpy')}"),
        ("built with", compilers(info)),
        ("backend cuda", cuda_error or cuda_state(cuda)),
        ("backend cpu", cpu_error or "usable"),
        ("backend reference", "usable (plain PyTorch, any device)"),
        ("instruction sets", instruction_sets(cpu)),
        ("GPU architectures", gpu_architectures(info)),
        *tables(cpu or cuda),
    ]
    width = max(len(name) for name, _ in rows)
    for name, text in rows:
        print(f"{name:<{width}}  {text}")


def build_info() -> dict[str, Any]:
    """The build's own record; empty in a checkout that was never built."""
    try:
        text = Path(__file__).with_name("_build_info.json").read_text()
    except FileNotFoundError:
        return {}
    info: dict[str, Any] = json.loads(text)
    return info


def load(name: str, info: dict[str, Any]) -> tuple[ModuleType | None, str | None]:
    """The extension module, or why it is not there."""
    try:
        return importlib.import_module(f"fused_sched.{name}"), None
    except ImportError as error:
        reason = info.get("not_built", {}).get(name)
        if reason is None and info:
            return None, f"built, but cannot be imported: {error}"
        return None, f"not built: {reason or 'this checkout was not built; run make build'}"


def cuda_state(module: ModuleType | None) -> str:
    if module is None:
        return "not built"
    try:
        count: int = module.device_count()
    except RuntimeError as error:
        return f"built, not usable here: {error}"
    return f"usable, {count} device{'' if count == 1 else 's'}" if count else "built, not usable here: no device"


def package_version() -> str:
    import fused_sched

    return fused_sched.__version__


def of(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def compilers(info: dict[str, Any]) -> str:
    names = [info.get("compiler") or "no C++ compiler"]
    names.append(f"nvcc {info['nvcc']}" if info.get("nvcc") else "no nvcc")
    return ", ".join(names)


def instruction_sets(module: ModuleType | None) -> str:
    """All that were compiled; those this machine lacks are marked, and the first of the others is used."""
    if module is None:
        return "none"
    sets = module.instruction_sets()
    return ", ".join(name if supported else f"{name} (not on this machine)" for name, supported in sets)


def gpu_architectures(info: dict[str, Any]) -> str:
    names = info.get("cuda_architectures") or []
    return ", ".join(f"sm_{name}" for name in names) + f" and PTX of {names[-1]}" if names else "none"


def tables(module: ModuleType | None) -> list[tuple[str, str]]:
    """The names of the C++ tables; a name's number is in checkpoints and never changes."""
    if module is None:
        return [("curves, formats", "unknown without a compiled module")]
    rows = [("curves", "CURVES"), ("combinators", "NODE_KINDS"), ("formats", "FORMATS")]
    rows += [("masters", "MASTERS"), ("moments", "MOMENTS")]
    return [(title, ", ".join(str(name) for name in getattr(module, table))) for title, table in rows]


if __name__ == "__main__":
    main()
