"""What the choices in csrc/cuda are worth: the same sources with one of them made otherwise, timed side by side.

    python3 -m benchmarks.gpu_check.tune FOLDER [--only NAME,...] [--elements N] [--rounds N] [--dry-run]
                                             [--out FILE]

FOLDER has the self-test (`benchmarks.gpu_check.build`), whose mode `time` every variant runs, in alternation. Writes
FILE, by default FOLDER/tune.json, and prints each variant's time over that of the sources as they are: above 1, the
choice is right. --dry-run: the sources as they are, on the CPU.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from build_tools import ninja_file, toolchain

from .build import ROOT, link, objects, run

CSRC = ROOT / "csrc"
#: What differs between variants; the other formats' kernels are those of the build.
SOURCES = ("launch.cu", "launch_clock.cu", "update_bf16.cu", "update_fp32.cu")
AS_IT_IS = "as it is"
LINE = re.compile(r"^time (?P<case>.+): (?P<ms>[0-9.]+) ms$", re.M)


class Change(NamedTuple):
    """A text, once in a file of csrc/cuda, and what stands there in the variant."""

    file: str
    text: str
    instead: str


_INSTANCE, _ACCESS = "update_instance.cuh", "vector_access.cuh"
_PIECE = "kHasFloats ? 4 : 8;"
VARIANTS: dict[str, list[Change]] = {
    AS_IT_IS: [],
    "two blocks without a master": [Change(_INSTANCE, ": kUpdateBlocksPerSm;", ": kUpdateBlocksPerSm - 2;")],
    "three blocks without a master": [Change(_INSTANCE, ": kUpdateBlocksPerSm;", ": kUpdateBlocksPerSm - 1;")],
    "two blocks with a master": [Change(_INSTANCE, "? kUpdateBlocksPerSm - 1", "? kUpdateBlocksPerSm - 2")],
    "four blocks with a master": [Change(_INSTANCE, "? kUpdateBlocksPerSm - 1", "? kUpdateBlocksPerSm")],
    "three blocks beside 8-bit moments": [Change(_INSTANCE, "? kUpdateBlocksPerSm - 2", "? kUpdateBlocksPerSm - 1")],
    "blocks of 128 threads": [
        Change("tuning.h", "kUpdateThreads = 256", "kUpdateThreads = 128"),
        Change("tuning.h", "kUpdateBlocksPerSm = 4", "kUpdateBlocksPerSm = 8"),
        Change(_INSTANCE, "? kUpdateBlocksPerSm - 2", "? kUpdateBlocksPerSm - 4"),
        Change(_INSTANCE, "? kUpdateBlocksPerSm - 1", "? kUpdateBlocksPerSm - 2"),
        Change("launch.cu", " * kElementsPerThreadFloat64 >= kMaxElements", " > 0"),  # of the largest tensors of all
    ],
    "a block for every tile": [
        Change("launch.cu", "table_->num_tiles < resident ? table_->num_tiles : resident", "table_->num_tiles")
    ],
    "eight consecutive elements": [Change(_INSTANCE, _PIECE, "8;")],
    "pieces of four elements": [Change(_INSTANCE, _PIECE, "4;")],
    "loads that do not evict": [
        Change(
            _ACCESS,
            "__ldcs(reinterpret_cast<const Access*>(piece) + i % kPerPiece)",
            "reinterpret_cast<const Access*>(piece)[i % kPerPiece]",
        )
    ],
    "stores that do not evict": [
        Change(
            _ACCESS,
            "__stcs(reinterpret_cast<Access*>(piece) + i % kPerPiece, access[i])",
            "reinterpret_cast<Access*>(piece)[i % kPerPiece] = access[i]",
        )
    ],
    "two loads of the norm": [Change("tuning.h", "kNormLoads = 4", "kNormLoads = 2")],
    "eight loads of the norm": [Change("tuning.h", "kNormLoads = 4", "kNormLoads = 8")],
}


def sources(folder: Path, changes: Sequence[Change]) -> Path:
    """A copy of csrc with these changes."""
    csrc = folder / "csrc"
    shutil.rmtree(csrc, ignore_errors=True)
    shutil.copytree(CSRC, csrc)
    for change in changes:
        path = csrc / "cuda" / change.file
        text = path.read_text()
        if text.count(change.text) != 1:
            raise RuntimeError(f"{change.file} has {change.text!r} {text.count(change.text)} times, expected once")
        path.write_text(text.replace(change.text, change.instead))
    return csrc


def compile_variants(folder: Path, names: Sequence[str], architecture: str) -> dict[str, str]:
    """Each into folder/<its number>/libdevice.so; why one could not be compiled."""
    cuda = toolchain.find_cuda_toolkit({**os.environ, "FUSED_SCHED_CUDA": "1"})
    flags = [*ninja_file.NVCC_FLAGS, f"-gencode=arch=compute_{architecture},code=sm_{architecture}"]
    compiler = list(toolchain.find_cpp_compiler().command)
    rest = [path for path in objects("csrc.cuda.*.o") if not path.endswith(tuple(f".{source}.o" for source in SOURCES))]
    runtime = [cuda.runtime_library, "-Wl,--exclude-libs,ALL", "-ldl", "-lrt", "-pthread"]
    failed: dict[str, str] = {}
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        compiled = {}
        for name in names:
            target = folder_of(folder, name)
            csrc = sources(target, VARIANTS[name])
            for source in SOURCES:
                command = [cuda.nvcc, *flags, f"-I{csrc}", "-c", str(csrc / "cuda" / source)]
                compiled[name, source] = pool.submit(run, [*command, "-o", str(target / f"{source}.o")])
        for name in names:
            target = folder_of(folder, name)
            shutil.copyfile(folder / "device.o", target / "device.o")
            try:
                for source in SOURCES:
                    compiled[name, source].result()
                made = [str(target / f"{source}.o") for source in SOURCES]
                link(compiler, target, "device", [*made, *rest, *runtime])
            except RuntimeError as error:
                failed[name] = str(error)
    return failed


def folder_of(folder: Path, name: str) -> Path:
    target = folder / "tune" / str(list(VARIANTS).index(name))
    target.mkdir(parents=True, exist_ok=True)
    return target


def time_variants(
    folder: Path, names: Sequence[str], elements: int, rounds: int, dry_run: bool
) -> dict[str, dict[str, list[float]]]:
    """Milliseconds by variant and case. One that fails is left out from there on."""
    found: dict[str, dict[str, list[float]]] = {name: {} for name in names}
    for _ in range(rounds):
        for name in list(found):
            environment = dict(os.environ)
            if not dry_run:
                environment["LD_LIBRARY_PATH"] = str(folder_of(folder, name))
            command = [str(folder / "selftest"), "time", str(folder / "schedule"), str(elements)]
            done = subprocess.run(command, env=environment, capture_output=True, text=True)
            if done.returncode != 0:
                print(f"{name}: the self-test ended with {done.returncode}:\n{done.stdout}{done.stderr}", flush=True)
                del found[name]
                continue
            for match in LINE.finditer(done.stdout):
                found[name].setdefault(match["case"], []).append(float(match["ms"]))
    return found


def table(times: Mapping[str, Mapping[str, Sequence[float]]]) -> list[str]:
    """Medians of the sources as they are in ms, and of the others over those."""
    medians = {name: {case: statistics.median(ms) for case, ms in cases.items()} for name, cases in times.items()}
    base = medians[AS_IT_IS]
    width = max(map(len, medians))
    lines = ["".ljust(width) + "".join(f"{case:>21}" for case in base)]
    for name, cases in medians.items():
        cells = [f"{cases[case]:.3f} ms" if name == AS_IT_IS else f"{cases[case] / base[case]:.3f}" for case in base]
        lines.append(name.ljust(width) + "".join(f"{cell:>21}" for cell in cells))
    return lines


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--only", help="variants, comma-separated, beside the sources as they are; all")
    parser.add_argument("--elements", type=int, default=1 << 26)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--architecture", default="90", help='of the GPU, as in "90"')
    parser.add_argument("--out", type=Path, help="where the times go")
    parser.add_argument("--dry-run", action="store_true")
    options = parser.parse_args(arguments)
    wanted = [] if options.dry_run else options.only.split(",") if options.only else list(VARIANTS)
    if unknown := sorted(set(wanted) - set(VARIANTS)):
        parser.error(f"no variant is called {', '.join(unknown)}; variants are {', '.join(VARIANTS)}")
    names = list(dict.fromkeys([AS_IT_IS, *wanted]))
    folder = options.folder.resolve()
    failed = {} if options.dry_run else compile_variants(folder, names, options.architecture)
    for name, why in failed.items():
        print(f"{name}: {why}", flush=True)
    good = [name for name in names if name not in failed]
    times = time_variants(folder, good, options.elements, options.rounds, options.dry_run)
    (options.out or folder / "tune.json").write_text(json.dumps(times, indent=1) + "\n")
    if AS_IT_IS in times:
        print("\n".join(table(times)))
    return int(len(times) < len(names))


if __name__ == "__main__":
    sys.exit(main())
