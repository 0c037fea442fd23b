"""The machine code of the CPU element loops: vectors of the right width, no calls, nothing leaked between sets.

And whatever asks for memory ahead does ask: g++ removes calls of functions that it takes to have no effect, and then
all is right, but slower.
"""

from __future__ import annotations

import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from build_tools.ninja_file import CPP_FLAGS, X86_ISA_FLAGS  # noqa: E402
from build_tools.toolchain import find_cpp_compiler  # noqa: E402

pytestmark = pytest.mark.skipif(
    platform.machine() != "x86_64" or not all(map(shutil.which, ("g++", "nm", "objdump"))),
    reason="needs g++ and binutils on x86-64",
)

#: Registers that a set's loops must work in, and packed instructions that only vectorised loops have.
VECTORS = {"avx512": "zmm", "avx2": "ymm"}
PACKED = ("vsqrtps", "vdivps", "vsqrtpd", "vdivpd")

ASKS = r"\bprefetch\w+\s"
STREAMS = 4  # parameter, gradient and moments
BLOCK_LOOPS = 6  # update_blocks, by parameter's and moments' formats
#: Instructions that ask, at least: one a stream or object, more where loops over their lines are unrolled.
ASKING = {"cpu/step.cpp": STREAMS, "cpu/norm.cpp": 1, "tensor_watch.h": 2 * 2}  # objects of Python and torch
USES = {
    "tensor_watch.h": "bool used(fused_sched::TensorWatch& watch, const pybind11::list& groups)"
    " { return watch.repeats(groups); }"
}


@pytest.fixture(scope="module", params=sorted(X86_ISA_FLAGS))
def compiled(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """An instruction set and its element loops, compiled as setup.py does."""
    isa = request.param
    target = tmp_path_factory.mktemp("isa") / f"{isa}.o"
    source = ROOT / "csrc" / "cpu" / "update_tile.cpp"
    command = ["g++", *CPP_FLAGS, *X86_ISA_FLAGS[isa], f"-DFS_ISA={isa}", "-c", str(source), "-o", str(target)]
    subprocess.run(command, check=True)
    return isa, target


def run(*command: object) -> str:
    return subprocess.run([str(word) for word in command], check=True, capture_output=True, text=True).stdout


def test_only_the_entry_point_is_visible_to_the_linker(compiled: tuple[str, Path]) -> None:
    """A weak symbol could replace another set's copy of the same function, and crash an older machine."""
    isa, path = compiled
    defined = [line.split()[1:] for line in run("nm", "--defined-only", path).splitlines()]
    shared = [name for kind, name in defined if kind.isupper() or kind in "vw"]
    assert shared == [f"fs_update_run_{isa}"]


def test_no_library_function_is_called_per_element(compiled: tuple[str, Path]) -> None:
    """In particular no fmaf: a call per element costs more than the update. memcpy and memset work on tiles' tails."""
    isa, path = compiled
    undefined = {line.split()[-1] for line in run("nm", "--undefined-only", path).splitlines()}
    allowed = {"memcpy", "memset", "_GLOBAL_OFFSET_TABLE_", "__stack_chk_fail"}
    if isa == "baseline":
        allowed.add("fma")  # of fp64 parameters, on machines before 2013
    assert undefined <= allowed


def test_loops_use_the_registers_of_their_set_and_no_wider(compiled: tuple[str, Path]) -> None:
    """The baseline emulates the fused multiply-add element by element, and must run where there is no AVX."""
    isa, path = compiled
    code = run("objdump", "-d", "--no-show-raw-insn", path)
    if isa == "baseline":
        assert not re.search(r"%[yz]mm|\bv[a-z]+[ps][sd]\b", code)
        return
    for instruction in PACKED:
        registers = re.findall(rf"\b{instruction}\s+%?\S*?%(\wmm)", code)
        assert VECTORS[isa] in registers, f"{instruction} never works on {VECTORS[isa]} registers"
    assert re.search(rf"vfn?madd\d+ps\s+\S*%{VECTORS[isa]}", code)
    assert isa == "avx512" or "%zmm" not in code


def test_blocks_ask_ahead(compiled: tuple[str, Path]) -> None:
    isa, path = compiled
    num_asked = len(re.findall(ASKS, run("objdump", "-d", "--no-show-raw-insn", path)))
    if isa == "avx512":
        assert num_asked >= BLOCK_LOOPS * STREAMS
    else:
        assert num_asked == 0  # has no blocks, and tiles gain nothing


@pytest.mark.parametrize("file", ASKING)
def test_tensors_to_come_are_asked_for(file: str, tmp_path: Path) -> None:
    source = tmp_path / "source.cpp"
    source.write_text(f'#include "{ROOT / "csrc" / file}"\n{USES.get(file, "")}\n')
    includes = [f"-I{path}" for path in find_cpp_compiler().includes]
    num_asked = len(re.findall(ASKS, run("g++", *CPP_FLAGS, *includes, "-S", source, "-o", "-")))
    assert num_asked >= ASKING[file]
