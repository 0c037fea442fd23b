"""Each header compiles alone, under g++ and, where there is a toolkit, nvcc; the core knows no CUDA and no torch."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
from cuda_on_cpu.build import COMPILER, CSRC

CORE_HEADERS = [*sorted((CSRC / "core").glob("*.h")), CSRC / "step.h"]
CUDA_HEADERS = [path for path in sorted((CSRC / "cuda").iterdir()) if path.suffix in (".h", ".cuh")]

needs_compiler = pytest.mark.skipif(shutil.which(COMPILER) is None, reason="no C++ compiler")
needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc on PATH")


def header_id(path: Path) -> str:
    return str(path.relative_to(CSRC))


def compile_header(header: Path, folder: Path, command: list[str]) -> None:
    # Twice: the second time the include guard must make it empty.
    source = folder / f"alone{'.cu' if command[0] == 'nvcc' else '.cpp'}"
    source.write_text(f'#include "{header}"\n' * 2 + "int main() { return 0; }\n")
    result = subprocess.run([*command, str(source)], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "warning" not in result.stderr, result.stderr


@needs_compiler
@pytest.mark.parametrize("header", CORE_HEADERS, ids=header_id)
def test_header_compiles_alone_with_gcc(header: Path, tmp_path: Path) -> None:
    flags = ["-std=c++17", "-Wall", "-Wextra", "-fsyntax-only"]
    compile_header(header, tmp_path, [COMPILER, *flags])


@needs_nvcc
@pytest.mark.parametrize("header", [*CORE_HEADERS, *CUDA_HEADERS], ids=header_id)
def test_header_compiles_alone_with_nvcc(header: Path, tmp_path: Path) -> None:
    # --ptx: the device pass of the compiler; the host pass is g++'s.
    compile_header(header, tmp_path, ["nvcc", "-std=c++17", "--ptx", "-arch=sm_80", "-o", str(tmp_path / "alone.ptx")])


@needs_compiler
@pytest.mark.parametrize("header", CORE_HEADERS, ids=header_id)
def test_core_includes_neither_cuda_nor_torch(header: Path) -> None:
    """Every file that a header draws in, directly or not, is of the core or of the language."""
    command = [COMPILER, "-std=c++17", "-M", "-x", "c++", str(header)]
    rule = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    included = [Path(word).resolve() for word in rule.replace("\\\n", " ").split()[1:]]
    assert header in included
    assert {path for path in included if path.is_relative_to(CSRC)} <= set(CORE_HEADERS)
    foreign = ("cuda", "torch", "aten", "c10", "pybind")
    assert not [path for path in included if any(word in path.name.lower() for word in foreign)]
