"""The build of both extension modules as a ninja file: which sources are compiled, and with which flags.

Paths are relative to the checkout, where ninja runs. Depfiles record the headers each object read, so that
after an edit only what includes the edited file is compiled again.
"""

from __future__ import annotations

import shlex
import zlib
from pathlib import Path

from .toolchain import CppCompiler, CudaToolkit

# No contraction: CPU and CUDA give the same bits. -fno-math-errno and -fno-trapping-math change no results,
# but g++ vectorises no square root without them.
CPP_FLAGS = (
    "-std=c++17 -O3 -ffp-contract=off -fno-math-errno -fno-trapping-math -fvisibility=hidden -fPIC -g0 -Wall -Wextra"
).split()
NVCC_FLAGS = (
    "-std=c++17 -O3 -fmad=false -lineinfo -t 0 -Xcompiler -fPIC,-fvisibility=hidden,-ffp-contract=off"
).split()

# The element loops, once per instruction set; the fastest that the machine has is chosen at run time.
ISA_SOURCES = ("norm_tile.cpp", "update_tile.cpp")
X86_ISA_FLAGS = {
    "avx512": "-mavx512f -mavx512bw -mavx512dq -mavx512vl -mfma -mprefer-vector-width=512".split(),
    "avx2": "-mavx2 -mfma".split(),
    "baseline": ["-DFS_EMULATE_FMA"],  # x86-64 before FMA: same bits, computed in double
}
OTHER_ISA_FLAGS: dict[str, list[str]] = {"baseline": []}

RULES = """\
rule cpp
  command = $cxx $cpp_flags $flags -MMD -MF $out.d -c $in -o $out
  depfile = $out.d
  deps = gcc
  description = C++   $in $note
rule nvcc
  command = $nvcc $nvcc_flags -MMD -MF $out.d -c $in -o $out
  depfile = $out.d
  deps = gcc
  description = CUDA  $in
rule link
  command = $cxx -shared -o $out $in $flags
  description = link  $out
"""


def ninja_file(root: Path, folder: Path, compiler: CppCompiler, cuda: CudaToolkit | None) -> str:
    """The text of build.ninja: targets `_cpu` and, with a toolkit, `_cuda`.

    root: the checkout, where ninja will run. folder: where objects and modules go, relative to root.
    """
    graph = _Graph(folder)
    graph.variable("builddir", [folder.as_posix()])
    graph.variable("cxx", list(compiler.command))
    graph.variable("cpp_flags", [*CPP_FLAGS, "-Icsrc", _version_flag(compiler.version)])
    if cuda is not None:
        graph.variable("nvcc", [cuda.nvcc])
        versions = _version_flag(cuda.version, compiler.version)
        graph.variable("nvcc_flags", [*NVCC_FLAGS, "-Icsrc", versions, *_target_flags(cuda)])
    graph.lines.append(RULES)

    link_flags = ["-pthread"]
    if "darwin" in compiler.target:
        link_flags += ["-undefined", "dynamic_lookup"]

    isa_flags = X86_ISA_FLAGS if compiler.x86_64 else OTHER_ISA_FLAGS
    # Only the bindings see Python and pybind11, which an isolated build keeps elsewhere every time.
    python = [f"-isystem{path}" for path in compiler.includes]
    objects = [graph.object("cpp", "csrc/binding.cpp", "_cpu", ["-DFS_MODULE=_cpu", *python])]
    for source in _sources(root, "csrc/cpu/*.cpp"):
        if Path(source).name in ISA_SOURCES:
            objects += [
                graph.object("cpp", source, isa, [f"-DFS_ISA={isa}", *flags]) for isa, flags in isa_flags.items()
            ]
        else:
            objects.append(graph.object("cpp", source))
    graph.module("_cpu", objects, link_flags)

    if cuda is not None:
        objects = [graph.object("cpp", "csrc/binding.cpp", "_cuda", ["-DFS_MODULE=_cuda", *python])]
        objects += [graph.object("nvcc", source) for source in _sources(root, "csrc/cuda/*.cu")]
        # The static runtime after the objects that need it, and none of its symbols for others to find: torch
        # brings a runtime of its own into the process.
        runtime = [cuda.runtime_library, "-Wl,--exclude-libs,ALL", "-ldl", "-lrt"]
        graph.module("_cuda", objects, runtime + link_flags)
    return "\n".join(graph.lines) + "\n"


def _sources(root: Path, pattern: str) -> list[str]:
    return sorted(path.relative_to(root).as_posix() for path in root.glob(pattern))


def _version_flag(*versions: str) -> str:
    """Makes a command another one when a tool was upgraded in place: its files may well be older than our objects."""
    return f"-DFS_BUILT_WITH={zlib.crc32(' '.join(versions).encode()):08x}"


def _target_flags(cuda: CudaToolkit) -> list[str]:
    """Machine code for each architecture, and PTX of the newest for those to come."""
    newest = cuda.architectures[-1]
    flags = [] if cuda.host_compiler is None else ["-ccbin", cuda.host_compiler]
    flags += [f"-gencode=arch=compute_{name},code=sm_{name}" for name in cuda.architectures]
    flags.append(f"-gencode=arch=compute_{newest},code=compute_{newest}")
    return flags + (["--compress-mode=size"] if cuda.compresses else [])


class _Graph:
    """Lines of a ninja file."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.lines: list[str] = []

    def variable(self, name: str, words: list[str], indent: str = "") -> None:
        self.lines.append(f"{indent}{name} = {shlex.join(words).replace('$', '$$')}")

    def object(self, rule: str, source: str, variant: str = "", flags: list[str] | None = None) -> str:
        """Compiles one source; `variant` tells apart the objects of a source compiled more than once."""
        path = self.folder / (source.replace("/", ".") + (f".{variant}" if variant else "") + ".o")
        self.lines.append(f"build {_escape(path.as_posix())}: {rule} {_escape(source)}")
        if flags:
            self.variable("flags", flags, indent="  ")
        if variant:
            self.lines.append(f"  note = ({variant})")
        return path.as_posix()

    def module(self, name: str, objects: list[str], flags: list[str]) -> None:
        target = _escape((self.folder / f"{name}.so").as_posix())
        self.lines.append(f"build {target}: link {' '.join(map(_escape, objects))}")
        self.variable("flags", flags, indent="  ")
        self.lines.append(f"build {name}: phony {target}")


def _escape(path: str) -> str:
    return path.replace("$", "$$").replace(" ", "$ ").replace(":", "$:")
