"""What this machine can build with: a C++ compiler, Python's and pybind11's headers, ninja, a CUDA toolkit.

Nothing here asks whether the machine shows a GPU: wheels are built on machines without one.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

DEFAULT_CUDA_ARCHITECTURES = "75 80 90 100 120"
# The tensor table travels as a 32 KB kernel parameter block; before 12.1 the limit was 4 KB.
OLDEST_CUDA = (12, 1)


class Missing(Exception):
    """A tool that a module needs is not here. The message says which, and how to get it."""


@dataclass(frozen=True)
class CppCompiler:
    command: tuple[str, ...]  # more than one word where $CXX has them: ("ccache", "g++")
    version: str
    target: str  # as in `x86_64-linux-gnu`
    includes: tuple[str, ...]  # of what sees Python: the binding

    @property
    def x86_64(self) -> bool:
        return self.target.startswith("x86_64")


@dataclass(frozen=True)
class CudaToolkit:
    nvcc: str
    version: str
    runtime_library: str  # libcudart_static.a
    architectures: tuple[str, ...]  # as in ("80", "90")
    compresses: bool  # this nvcc knows --compress-mode, and every driver that its code runs on reads it
    host_compiler: str | None  # $CXX where it is one word; None: nvcc's own choice


def output_of(*command: str) -> str | None:
    """Standard output and error of a command, or None when it cannot be run or fails."""
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout


def find_ninja() -> str:
    """The ninja of the Python package, else one on PATH: a machine without a network may have only that."""
    found = shutil.which("ninja", path=sysconfig.get_path("scripts")) or shutil.which("ninja")
    found = found or shutil.which("ninja-build")
    if found is None:
        raise Missing("ninja was not found: pip install ninja")
    return found


def pybind11_include() -> str:
    """pybind11's headers: the package's own, else the copy that torch wheels carry. Imports neither."""
    for package in ("pybind11", "torch"):
        spec = importlib.util.find_spec(package)
        for folder in (spec.submodule_search_locations or []) if spec else []:
            include = Path(folder) / "include"
            if (include / "pybind11" / "pybind11.h").is_file():
                return str(include)
    raise Missing("pybind11's headers were not found: pip install pybind11")


def find_cpp_compiler(environment: Mapping[str, str] = os.environ) -> CppCompiler:
    """$CXX if it is set, else the first of g++, c++, clang++ on PATH."""
    if sys.platform == "win32":
        raise Missing("no build for Windows yet: use WSL, or the reference backend")
    named = environment.get("CXX")
    candidates = [tuple(shlex.split(named))] if named else [("g++",), ("c++",), ("clang++",)]
    command = next((words for words in candidates if words and shutil.which(words[0])), None)
    target = output_of(*command, "-dumpmachine") if command else None
    version = output_of(*command, "--version") if command else None
    if command is None or target is None or version is None:
        wanted = f"CXX={named} cannot be run" if named else "none of g++, c++, clang++ is on PATH"
        raise Missing(f"no C++ compiler ({wanted}): install g++, or set CXX")
    python_include = sysconfig.get_path("include")
    if not (Path(python_include) / "Python.h").is_file():
        raise Missing(f"Python.h is not in {python_include}: install Python's headers (python3-dev)")
    return CppCompiler(command, version.splitlines()[0], target.strip(), (pybind11_include(), python_include))


def find_cuda_toolkit(environment: Mapping[str, str] = os.environ) -> CudaToolkit:
    """The toolkit of $CUDA_HOME (or $CUDA_PATH) if that is set, else of the nvcc on PATH or in /usr/local/cuda."""
    if environment.get("FUSED_SCHED_CUDA") == "0":
        raise Missing("FUSED_SCHED_CUDA=0")
    home = environment.get("CUDA_HOME") or environment.get("CUDA_PATH")
    candidates = [f"{home}/bin/nvcc"] if home else [shutil.which("nvcc"), "/usr/local/cuda/bin/nvcc"]
    reasons = []
    for nvcc in filter(None, candidates):
        try:
            return _toolkit_of(nvcc, environment.get("FUSED_SCHED_CUDA_ARCHS"), environment.get("CXX"))
        except Missing as reason:
            reasons.append(str(reason))
    raise Missing("; ".join(dict.fromkeys(reasons)) or "no nvcc on PATH: install the CUDA toolkit, or set CUDA_HOME")


def _toolkit_of(nvcc: str, architectures: str | None, host_compiler: str | None) -> CudaToolkit:
    release = re.search(r"release (\d+)\.(\d+), V([\d.]+)", output_of(nvcc, "--version") or "")
    # Asked of nvcc itself: on PATH it may be a wrapper script or a link, far from its toolkit.
    top = re.search(r"^#\$ TOP=(.*)$", output_of(nvcc, "--dryrun", "-E", "-x", "cu", os.devnull) or "", re.M)
    if release is None or top is None:
        raise Missing(f"{nvcc} cannot be run")
    if (int(release[1]), int(release[2])) < OLDEST_CUDA:
        raise Missing(f"{nvcc} is CUDA {release[3]}, older than {'.'.join(map(str, OLDEST_CUDA))}")
    root = Path(top[1].strip().strip('"')).resolve()
    libraries = [root / folder / "libcudart_static.a" for folder in ("lib64", "lib")]
    libraries += sorted(root.glob("targets/*/lib/libcudart_static.a"))
    library = next((path for path in libraries if path.is_file()), None)
    if library is None:
        raise Missing(f"libcudart_static.a is not in the toolkit at {root}: install its cudart development files")
    known = set(re.findall(r"compute_(\w+)", output_of(nvcc, "--list-gpu-arch") or ""))
    return CudaToolkit(
        nvcc=nvcc,
        version=release[3],
        runtime_library=str(library),
        architectures=_choose_architectures(architectures, known),
        # 12.8 knows it, too, but the drivers before 550.54.14, on which all other code of 12.x runs, cannot read it.
        compresses=int(release[1]) >= 13 and "--compress-mode" in (output_of(nvcc, "--help") or ""),
        host_compiler=host_compiler if host_compiler and len(shlex.split(host_compiler)) == 1 else None,
    )


def _choose_architectures(asked: str | None, known: set[str]) -> tuple[str, ...]:
    """The architectures to compile for, oldest first.

    Those asked for by name must all be known to nvcc; of the default ones an older nvcc takes what it knows.
    """
    names = re.split(r"[\s,;]+", (asked or DEFAULT_CUDA_ARCHITECTURES).strip())
    names = [name.replace(".", "") for name in names]
    unknown = [name for name in names if name.rstrip("af") not in known]
    if asked and unknown:
        raise Missing(
            f"FUSED_SCHED_CUDA_ARCHS asks for {', '.join(unknown)}; this nvcc knows {', '.join(sorted(known))}"
        )
    chosen = [name for name in dict.fromkeys(names) if name not in unknown]
    if not chosen:
        raise Missing(f"this nvcc knows none of the architectures {DEFAULT_CUDA_ARCHITECTURES}")
    return tuple(sorted(chosen, key=lambda name: int(name.rstrip("af"))))
