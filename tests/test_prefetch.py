"""What the code asks for ahead is asked for by the compiled code, too: g++ removes calls of functions that it takes to
have no effect, and all is right but slower."""

from __future__ import annotations

import platform
import re
import subprocess
from pathlib import Path

import pytest
from cuda_on_cpu.build import COMPILER, CPP_FLAGS, CSRC, ISA_FLAGS

from build_tools.toolchain import find_cpp_compiler

# By the machine: its instruction, which may be in a loop over lines.
INSTRUCTION = {"x86_64": r"\tprefetch\w+\t", "aarch64": r"\tprfm\t"}.get(platform.machine())
STREAMS = 4  # parameter, gradient and moments
BLOCK_LOOPS = 6  # update_blocks, by parameter's and moments' formats
SHIPPED = {
    "cpu/step.cpp": ([], STREAMS),
    "cpu/norm.cpp": ([], 1),
    "cpu/update_tile.cpp": ([*ISA_FLAGS.get("avx512", []), "-DFS_ISA=avx512"], BLOCK_LOOPS * STREAMS),
    "tensor_watch.h": ([], 2 * 2),  # a parameter and a gradient, of each Python's object and torch's
}
WATCH = """
bool repeats(fused_sched::TensorWatch& watch, const pybind11::list& groups) { return watch.repeats(groups); }
"""

pytestmark = pytest.mark.skipif(INSTRUCTION is None, reason=f"which instruction asks ahead on {platform.machine()}?")


@pytest.mark.parametrize("file", SHIPPED)
def test_compiled_code_asks_ahead(file: str, tmp_path: Path) -> None:
    flags, least = SHIPPED[file]
    if "-DFS_ISA=avx512" in flags and "avx512" not in ISA_FLAGS:
        pytest.skip("blocks are AVX-512's")
    source = tmp_path / "source.cpp"
    source.write_text(f'#include "{CSRC / file}"\n' + (WATCH if file.endswith(".h") else ""))
    includes = [f"-I{path}" for path in find_cpp_compiler().includes]
    command = [COMPILER, *CPP_FLAGS, *flags, *includes, "-S", str(source), "-o", "-"]
    compiled = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert INSTRUCTION is not None
    num_asked = len(re.findall(INSTRUCTION, compiled))
    assert num_asked >= least
