"""Builds the torch-free self-test from the objects of the package's own build.

    python -m benchmarks.gpu_check.build FOLDER [--dry-run]

Both backends go into one program: what `exports.cpp` names anew, over the CPU objects and over the CUDA ones; in a dry
run over the CUDA sources compiled for the CPU (tests/cuda_on_cpu). Writes FOLDER/selftest and FOLDER/schedule.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import sysconfig
from pathlib import Path

from build_tools import toolchain
from fused_sched import schedules

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
OBJECTS = ROOT / "build" / str(sysconfig.get_config_var("SOABI") or sys.implementation.cache_tag)
FLAGS = ["-std=c++17", "-O2", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", f"-I{ROOT / 'csrc'}"]


def build(folder: Path, dry_run: bool, *dry_flags: str) -> Path:
    """Returns the program's path.

    dry_flags: for the compiler, of the device's part of a dry run. Raises RuntimeError where an object or a tool is
    missing.
    """
    folder = folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    compiler = list(toolchain.find_cpp_compiler().command)
    exports = str(HERE / "exports.cpp")
    run([*compiler, *FLAGS, "-c", exports, "-o", str(folder / "oracle.o")])
    link(compiler, folder, "oracle", [*objects("csrc.cpu.*.o"), "-pthread"])
    if dry_run:
        sys.path.insert(0, str(ROOT / "tests"))
        from cuda_on_cpu.build import library

        run(
            [*compiler, *FLAGS, "-DFS_DEVICE", "-DFS_ON_CPU", *dry_flags, "-c", exports, "-o", str(folder / "device.o")]
        )
        link(compiler, folder, "device", [str(library())])
    else:
        cuda = toolchain.find_cuda_toolkit()
        host_flags = ["-Xcompiler", "-fPIC,-fvisibility=hidden"]
        command = [cuda.nvcc, "-std=c++17", "-O2", *host_flags, f"-I{ROOT / 'csrc'}", "-DFS_DEVICE", "-c", exports]
        run([*command, "-o", str(folder / "device.o")])
        runtime = [cuda.runtime_library, "-Wl,--exclude-libs,ALL", "-ldl", "-lrt", "-pthread"]
        link(compiler, folder, "device", [*objects("csrc.cuda.*.o"), *runtime])
    target = folder / "selftest"
    libraries = [f"-L{folder}", "-loracle", "-ldevice", f"-Wl,-rpath,{folder}"]
    run([*compiler, *FLAGS, str(HERE / "selftest.cpp"), "-o", str(target), *libraries])
    lr = schedules.join([schedules.linear(1e-4, 1e-2, 2), schedules.cosine(1e-2, 1e-3, 6)], [2])
    (folder / "schedule").write_bytes(lr.program)
    return target


def link(compiler: list[str], folder: Path, name: str, objects: list[str]) -> None:
    run([*compiler, "-shared", str(folder / f"{name}.o"), *objects, "-o", str(folder / f"lib{name}.so")])


def objects(pattern: str) -> list[str]:
    found = sorted(map(str, OBJECTS.glob(pattern)))
    if not found:
        raise RuntimeError(f"no {pattern} in {OBJECTS}: build the package first, with make build")
    return found


def run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} failed with status {done.returncode}:\n{done.stdout}{done.stderr}")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--dry-run", action="store_true")
    arguments = parser.parse_args()
    print(build(arguments.folder, arguments.dry_run))


if __name__ == "__main__":
    main()
