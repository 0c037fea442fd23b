"""Builds the CUDA sources for the CPU, into build/cuda_on_cpu/, and keeps each result by the hash of its sources.

    library()                 the C ABI of csrc/step.h, for ctypes: no pybind11, no torch
    library("address")        the same under AddressSanitizer and UndefinedBehaviorSanitizer; "thread": ThreadSanitizer
    load()                    the Python module `_cuda_on_cpu`, a backend of the package like `_cuda`

A library built with a sanitizer only loads where the sanitizer was there first: see `sanitizer_environment`.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
CSRC = ROOT / "csrc"
CACHE = ROOT / "build" / "cuda_on_cpu"

COMPILER = os.environ.get("CXX", "g++")
# -ffp-contract=off: the same bits as the GPU. Host FMA where there is one, else libm's, which is slow and right.
FLAGS = ["-std=c++17", "-O2", "-g1", "-fPIC", "-ffp-contract=off", "-fno-math-errno", "-Wall", "-Wextra"]
SANITIZER_FLAGS = {
    "": [],
    # FS_CUDA_ON_CPU's kernels are small; -O1 keeps the sanitized build under ten seconds.
    "address": ["-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"],
    "thread": ["-O1", "-fsanitize=thread"],
}
SANITIZER_LIBRARIES = {"address": ["libasan.so", "libubsan.so"], "thread": ["libtsan.so"]}


def library(sanitizer: str = "", csrc: Path = CSRC) -> Path:
    """The shared library of the CUDA backend; `csrc`: another copy of the sources, for planted bugs."""
    flags = [*FLAGS, *SANITIZER_FLAGS[sanitizer]]
    folder = CACHE / key(csrc, flags)
    target = folder / "libcuda_on_cpu.so"
    if not target.exists():
        link(compile_kernels(csrc, flags, sanitizer, folder), target, SANITIZER_FLAGS[sanitizer])
    return target


def load() -> ModuleType:
    """Imports `_cuda_on_cpu`: csrc/binding.cpp over the CUDA sources.

    Raises ImportError where there is no compiler; sources that do not compile are a RuntimeError.
    """
    name = "_cuda_on_cpu"
    if name in sys.modules:
        return sys.modules[name]
    folder = CACHE / key(CSRC, [*FLAGS, sys.version])
    target = folder / f"{name}{sysconfig.get_config_var('EXT_SUFFIX')}"
    if not target.exists():
        if shutil.which(COMPILER) is None:
            raise ImportError(f"no C++ compiler: {COMPILER} is not on PATH")
        import pybind11

        includes = [f"-I{path}" for path in (pybind11.get_include(), sysconfig.get_paths()["include"])]
        binding = folder / "binding.o"
        flags = [*FLAGS, "-O1", "-fvisibility=hidden", f"-DFS_MODULE={name}", f"-I{CSRC}", *includes]
        objects = compile_kernels(CSRC, FLAGS, "", folder)
        run([COMPILER, *flags, "-c", str(CSRC / "binding.cpp"), "-o", str(binding)])
        link([*objects, binding], target, [])
    spec = importlib.util.spec_from_file_location(name, target)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.modules[name] = module
    return module


def sanitizer_environment(sanitizer: str) -> dict[str, str]:
    """The environment of a Python that is to load `library(sanitizer)`."""
    paths = [run([COMPILER, f"-print-file-name={name}"]).strip() for name in SANITIZER_LIBRARIES[sanitizer]]
    return {
        **os.environ,
        "FUSED_SCHED_TEST_SANITIZER": sanitizer,
        "LD_PRELOAD": ":".join(paths),
        # Python frees little at exit; a report must end the process.
        "ASAN_OPTIONS": "detect_leaks=0:halt_on_error=1",
        "UBSAN_OPTIONS": "halt_on_error=1:print_stacktrace=1",
        "TSAN_OPTIONS": "halt_on_error=1:exitcode=66",
        # NumPy's BLAS would start threads that no sanitizer needs to watch.
        "OPENBLAS_NUM_THREADS": "1",
    }


def compile_kernels(csrc: Path, flags: list[str], sanitizer: str, folder: Path) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    common = [COMPILER, "-DFS_CUDA_ON_CPU", f"-I{HERE}"]
    scheduler_flags = [*FLAGS, *(["-DFS_THREAD_SANITIZER"] if sanitizer == "thread" else [])]
    commands = [[*common, *scheduler_flags, "-c", str(HERE / "cuda_on_cpu.cpp")]]
    kernel_flags = [*flags, "-Wno-unknown-pragmas", "-x", "c++", "-c"]
    commands += [[*common, *kernel_flags, str(source)] for source in sorted((csrc / "cuda").glob("*.cu"))]
    objects = [folder / f"{Path(command[-1]).stem}.o" for command in commands]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(run, ([*c, "-o", str(o)] for c, o in zip(commands, objects, strict=True))))
    return objects


def link(objects: list[Path], target: Path, flags: list[str]) -> None:
    # Renamed into place at the end: another test process never sees half a library.
    partial = target.with_suffix(f".{os.getpid()}")
    run([COMPILER, "-shared", *flags, *map(str, objects), "-o", str(partial), "-lpthread"])
    partial.rename(target)


def key(csrc: Path, flags: list[str]) -> str:
    digest = hashlib.sha256("\0".join([COMPILER, *flags]).encode())
    for path in sorted([*csrc.rglob("*.h"), *csrc.rglob("*.cu*"), *csrc.glob("*.cpp"), *HERE.glob("*.[hcp]*")]):
        digest.update(str(path.relative_to(csrc) if csrc in path.parents else path.name).encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def run(command: list[str]) -> str:
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} failed with status {result.returncode}:\n{result.stderr}")
    return result.stdout
