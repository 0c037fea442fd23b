"""Builds the CUDA sources for the CPU, into build/cuda_on_cpu/, and keeps each result by the hash of its sources.

    library()                 the C ABI of csrc/step.h, for ctypes: no pybind11, no torch
    library("address")        the same under AddressSanitizer and UndefinedBehaviorSanitizer; "thread": ThreadSanitizer
    cpu_library()             the same two of the CPU backend, with its own flags
    load()                    the Python module `_cuda_on_cpu`, a backend of the package like `_cuda`

A library built with a sanitizer only loads where the sanitizer was there first: see `sanitizer_environment`.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import platform
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

sys.path.append(str(ROOT))
from build_tools.ninja_file import CPP_FLAGS, ISA_SOURCES, OTHER_ISA_FLAGS, X86_ISA_FLAGS  # noqa: E402

COMPILER = os.environ.get("CXX", "g++")
# -ffp-contract=off: the same bits as the GPU. Host FMA where there is one, else libm's, which is slow and right.
FLAGS = ["-std=c++17", "-O2", "-g1", "-fPIC", "-ffp-contract=off", "-fno-math-errno", "-Wall", "-Wextra"]
SANITIZER_FLAGS = {
    "": [],
    # -O1 keeps each sanitized build under ten seconds.
    "address": ["-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"],
    "thread": ["-O1", "-fsanitize=thread"],
}
SANITIZER_LIBRARIES = {"address": ["libasan.so", "libubsan.so"], "thread": ["libtsan.so"]}

# The CPU backend's loops as they are shipped, but for symbols that ctypes finds; a sanitizer's -O1 comes last.
CPU_FLAGS = [*CPP_FLAGS, "-g1", "-fvisibility=default"]
ISA_FLAGS = X86_ISA_FLAGS if platform.machine() == "x86_64" else OTHER_ISA_FLAGS


def library(sanitizer: str = "", csrc: Path = CSRC) -> Path:
    """The shared library of the CUDA backend; `csrc`: another copy of the sources, for planted bugs."""
    flags = [*FLAGS, *SANITIZER_FLAGS[sanitizer]]
    folder = cache(csrc, flags, KERNEL_FILES)
    target = folder / "libcuda_on_cpu.so"
    if not target.exists():
        link(compile_kernels(csrc, flags, sanitizer, folder), target, SANITIZER_FLAGS[sanitizer])
    return target


def cpu_library(sanitizer: str = "", csrc: Path = CSRC) -> Path:
    """The shared library of the CPU backend."""
    flags = [*CPU_FLAGS, *SANITIZER_FLAGS[sanitizer]]
    folder = cache(csrc, [*flags, str(ISA_FLAGS)], CPU_FILES)
    target = folder / "libcpu.so"
    if not target.exists():
        compiler = [COMPILER, *flags, f"-I{csrc}", "-c"]
        commands = {}
        for source in [*sorted((csrc / "cpu").glob("*.cpp")), HERE / "cpu_exports.cpp"]:
            if source.name not in ISA_SOURCES:
                commands[f"{source.stem}.o"] = [*compiler, str(source)]
                continue
            for isa, isa_flags in ISA_FLAGS.items():
                commands[f"{source.stem}.{isa}.o"] = [*compiler, *isa_flags, f"-DFS_ISA={isa}", str(source)]
        link(compile_all(commands, folder), target, SANITIZER_FLAGS[sanitizer])
    return target


def load() -> ModuleType:
    """Imports `_cuda_on_cpu`: csrc/binding.cpp over the CUDA sources.

    Raises ImportError where there is no compiler; sources that do not compile are a RuntimeError.
    """
    name = "_cuda_on_cpu"
    if name in sys.modules:
        return sys.modules[name]
    folder = cache(CSRC, [*FLAGS, sys.version], KERNEL_FILES)
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
    common = [COMPILER, "-DFS_CUDA_ON_CPU", f"-I{HERE}"]
    scheduler_flags = [*FLAGS, *(["-DFS_THREAD_SANITIZER"] if sanitizer == "thread" else [])]
    commands = [[*common, *scheduler_flags, "-c", str(HERE / "cuda_on_cpu.cpp")]]
    kernel_flags = [*flags, "-Wno-unknown-pragmas", "-x", "c++", "-c"]
    commands += [[*common, *kernel_flags, str(source)] for source in sorted((csrc / "cuda").glob("*.cu"))]
    return compile_all({f"{Path(command[-1]).stem}.o": command for command in commands}, folder)


def compile_all(commands: dict[str, list[str]], folder: Path) -> list[Path]:
    """Objects by their names, side by side."""
    folder.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(run, ([*command, "-o", str(folder / name)] for name, command in commands.items())))
    return [folder / name for name in commands]


def link(objects: list[Path], target: Path, flags: list[str]) -> None:
    # Renamed into place at the end: another test process never sees half a library.
    partial = target.with_suffix(f".{os.getpid()}")
    run([COMPILER, "-shared", *flags, *map(str, objects), "-o", str(partial), "-lpthread"])
    partial.rename(target)


# What each backend is made of.
KERNEL_FILES = ("**/*.h", "**/*.cu*", "*.cpp")
CPU_FILES = ("**/*.h", "cpu/*.cpp")


def cache(csrc: Path, flags: list[str], files: tuple[str, ...]) -> Path:
    """The folder of what these flags make of these files, beside the sources."""
    digest = hashlib.sha256("\0".join([COMPILER, *flags]).encode())
    for path in sorted([*(path for pattern in files for path in csrc.glob(pattern)), *HERE.glob("*.[hcp]*")]):
        digest.update(str(path.relative_to(csrc) if csrc in path.parents else path.name).encode())
        digest.update(path.read_bytes())
    return csrc.parent / "build" / "cuda_on_cpu" / digest.hexdigest()[:16]


def run(command: list[str]) -> str:
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} failed with status {result.returncode}:\n{result.stderr}")
    return result.stdout
