"""What the compiled kernels are, read from the machine code of every architecture: registers, spills, widths of the
memory accesses. Needs nvcc, and cuobjdump with nvdisasm (pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm).
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from cuda_on_cpu.build import CSRC, ROOT
from sass_path import Instruction, usual_way

sys.path.insert(0, str(ROOT))

from build_tools import ninja_file, toolchain

ELEMENT_BYTES = {"Float32": 4, "Bfloat16": 2, "Float16": 2, "Float64": 8}
MASTER_BYTES = {"None": 0, "Float32": 4, "Split16": 2, "Split8": 1, "Stochastic": 0}
MOMENT_BYTES = {"Float32": 4, "Bfloat16": 2, "8bit": 1}
# Masters of the parameter times four kinds of moments: fp32, fp32 with amsgrad, bf16, 8-bit; fp64 has the first two.
INSTANCES_PER_PARAM = {"Float32": 4, "Bfloat16": 20, "Float16": 8, "Float64": 2}


@dataclass
class Kernel:
    """One update kernel of one architecture."""

    architecture: str
    param: str
    master: str
    moments: str
    amsgrad: bool
    registers: int = 0
    stack: int = 0
    local: int = 0
    code: list[Instruction] = field(default_factory=list, repr=False)

    def __str__(self) -> str:
        return f"{self.architecture} {self.param} {self.master} {self.moments} amsgrad={self.amsgrad}"

    @property
    def elements(self) -> int:
        """Per thread: 8, 16 beside 8-bit moments, 2 in double."""
        if self.param == "Float64":
            return 2
        return 16 if self.moments == "8bit" else 8

    @property
    def moment_bytes(self) -> int:
        return 8 if self.param == "Float64" else MOMENT_BYTES[self.moments]

    @property
    def written(self) -> list[int]:
        """Bytes per element of every stream that is written but scales: parameter, master, moments."""
        moments = [self.moment_bytes] * (2 + self.amsgrad)
        return [width for width in (ELEMENT_BYTES[self.param], MASTER_BYTES[self.master], *moments) if width]

    @property
    def piece(self) -> int:
        """Consecutive elements: 16 bytes of the widest stream that is written, and whole groups of 8-bit moments."""
        return 16 if self.moments == "8bit" else 16 // max(self.written)

    @property
    def names(self) -> list[str]:
        return [instruction.name for instruction in self.code]

    def count(self, *operations: str) -> int:
        return sum(name.split(".")[0] in operations for name in self.names)


def stretches_of(instructions: list[str]) -> list[list[str]]:
    """The names of instructions from one branch to the next."""
    stretches: list[list[str]] = [[]]
    for name in instructions:
        stretches[-1].append(name)
        if name.split(".")[0] in ("BRA", "CALL", "RET", "EXIT", "BSYNC"):
            stretches.append([])
    return stretches


def find_cuobjdump() -> str | None:
    """On PATH, or where pip puts it: site-packages/nvidia/*/bin."""
    found = shutil.which("cuobjdump")
    spec = importlib.util.find_spec("nvidia")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        found = found or next((str(path) for path in sorted(Path(folder).glob("*/bin/cuobjdump"))), None)
    return found


@pytest.fixture(scope="module")
def kernels() -> list[Kernel]:
    try:
        toolkit = toolchain.find_cuda_toolkit({**os.environ, "FUSED_SCHED_CUDA": "1"})
    except toolchain.Missing as reason:
        pytest.skip(f"no CUDA toolkit: {reason}")
    cuobjdump = find_cuobjdump()
    if cuobjdump is None:
        pytest.skip("no cuobjdump: pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm")
    objects = compiled_objects(toolkit)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return [kernel for part in pool.map(lambda path: read_kernels(cuobjdump, path), objects) for kernel in part]


def compiled_objects(toolkit: toolchain.CudaToolkit) -> list[Path]:
    """The update kernels as objects: those of the build if they are newer than every source, else compiled here with
    the build's flags, and kept by the hash of the sources."""
    sources = sorted((CSRC / "cuda").glob("update_*.cu"))
    read = sorted([*CSRC.rglob("*.h"), *CSRC.rglob("*.cu*")])
    newest = max(path.stat().st_mtime for path in read)
    built = [ROOT / "build" / f"{sysconfig.get_config_var('SOABI')}" / f"csrc.cuda.{path.name}.o" for path in sources]
    if all(path.exists() and path.stat().st_mtime > newest for path in built):
        return built

    targets = [f"-gencode=arch=compute_{name},code=sm_{name}" for name in toolkit.architectures]
    flags = [*ninja_file.NVCC_FLAGS, f"-I{CSRC}", *targets]
    digest = hashlib.sha256(" ".join([toolkit.version, *flags]).encode())
    for path in read:
        digest.update(path.read_bytes())
    folder = ROOT / "build" / "sass" / digest.hexdigest()[:16]
    folder.mkdir(parents=True, exist_ok=True)
    objects = [folder / f"{source.stem}.o" for source in sources]

    def compile_one(source: Path, target: Path) -> None:
        if target.exists():
            return
        partial = target.with_suffix(f".{os.getpid()}.o")
        command = [toolkit.nvcc, *flags, "-c", str(source), "-o", str(partial)]
        result = subprocess.run(command, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        partial.rename(target)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(compile_one, sources, objects))
    return objects


INSTRUCTION = re.compile(
    r"\s+/\*(?P<address>[0-9a-f]{4,})\*/\s+(?P<predicate>@!?U?P\w+\s+)?(?P<name>[A-Z0-9_.]+)(?P<operands>[^;]*)"
)


def read_kernels(cuobjdump: str, path: Path) -> list[Kernel]:
    """Parses `cuobjdump -res-usage` and `-sass`."""
    found: dict[tuple[str, str], Kernel] = {}
    architecture, kernel = "", None
    for line in dump(cuobjdump, "-res-usage", path) + dump(cuobjdump, "-sass", path):
        if match := re.match(r"arch = (sm_\w+)", line.strip()):
            architecture, kernel = match[1], None
        elif match := re.search(r"Function\s*:?\s*(_Z\w+)", line):
            kernel = kernel_of(found, architecture, match[1])
        elif kernel is None:
            continue
        elif match := re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", line):
            kernel.registers, kernel.stack, kernel.local = map(int, match.groups())
        elif match := INSTRUCTION.match(line):
            address, predicate, name, operands = (part or "" for part in match.groups())
            kernel.code.append(Instruction(int(address, 16), predicate, name, operands.strip()))
    return list(found.values())


def kernel_of(found: dict[tuple[str, str], Kernel], architecture: str, mangled: str) -> Kernel | None:
    if "update_kernel" not in mangled:
        return None
    if (architecture, mangled) not in found:
        name = subprocess.run(["c++filt", mangled], capture_output=True, text=True, check=True).stdout
        match = re.search(r"<\S*::(\w+), \S*::Master(\w+), \S*::Moments(\w+), (true|false)>", name)
        assert match is not None, name
        found[architecture, mangled] = Kernel(architecture, match[1], match[2], match[3], match[4] == "true")
    return found[architecture, mangled]


def dump(cuobjdump: str, option: str, path: Path) -> list[str]:
    # cuobjdump calls nvdisasm, which pip puts beside it.
    environment = {**os.environ, "PATH": f"{Path(cuobjdump).parent}{os.pathsep}{os.environ['PATH']}"}
    result = subprocess.run([cuobjdump, option, str(path)], env=environment, capture_output=True, text=True, check=True)
    return (result.stdout + result.stderr).splitlines()


def test_every_instance_is_compiled_for_every_architecture(kernels: list[Kernel]) -> None:
    architectures = {kernel.architecture for kernel in kernels}
    assert architectures == {
        f"sm_{name}" for name in toolchain.find_cuda_toolkit({**os.environ, "FUSED_SCHED_CUDA": "1"}).architectures
    }
    counts = Counter((kernel.architecture, kernel.param) for kernel in kernels)
    assert counts == {(a, param): n for a in architectures for param, n in INSTANCES_PER_PARAM.items()}


def test_update_kernels_neither_spill_nor_use_a_stack(kernels: list[Kernel]) -> None:
    for kernel in kernels:
        assert (kernel.stack, kernel.local) == (0, 0), kernel
        assert kernel.count("LDL", "STL") == 0, kernel


def test_update_kernels_leave_room_for_their_blocks(kernels: list[Kernel]) -> None:
    """64 registers x 256 threads x 4 blocks are an SM's 65,536; with state beside the moments three blocks, with two
    kinds of it or 16 elements per thread two."""
    for kernel in kernels:
        beside = kernel.amsgrad + (kernel.master != "None") + (kernel.amsgrad and MASTER_BYTES[kernel.master] > 0)
        limit = 128 if kernel.elements == 16 else (64, 80, 80, 128)[beside]
        assert 0 < kernel.registers <= limit, kernel


def access_bytes(name: str) -> int:
    """Of an evict-first access of whole vectors: nothing where it is narrower than a register."""
    modifiers = name.split(".")
    if "EF" not in modifiers or any(part in modifiers for part in ("U8", "S8", "U16", "S16")):
        return 0
    return next((int(part) for part in modifiers if part in ("64", "128")), 32) // 8


def test_update_kernels_store_every_stream_once_in_whole_sectors(kernels: list[Kernel]) -> None:
    """In accesses of a piece each, or of 16 bytes where a piece has more; evict-first. Narrower ones are for misaligned
    tensors, tails and scales, plain ones for what is updated element by element."""
    for kernel in kernels:
        wanted: Counter[int] = Counter()
        for width in kernel.written:
            access = min(16, kernel.piece * width)
            wanted[access] += kernel.elements * width // access
        if kernel.param in ("Float32", "Float64"):  # of misaligned parameters, one by one
            wanted[ELEMENT_BYTES[kernel.param]] += kernel.elements
        found = Counter(access_bytes(name) for name in kernel.names if name.startswith("STG"))
        del found[0]
        assert found == wanted, kernel
        assert kernel.count("LD", "ST") == 0, f"{kernel}: generic access"


def test_all_loads_are_on_their_way_before_the_first_is_waited_for(kernels: list[Kernel]) -> None:
    """Parameter, state and gradient of whole, aligned vectors are loaded in one stretch without a branch, for each of
    the three formats of gradients."""
    for kernel in kernels:
        grads = [8] if kernel.param == "Float64" else [4, 2, 2]
        loaded = Counter(
            sum(access_bytes(name) for name in stretch if name.startswith("LDG"))
            for stretch in stretches_of(kernel.names)
        )
        for grad, count in Counter(grads).items():
            assert loaded[kernel.elements * (sum(kernel.written) + grad)] >= count, kernel


def test_ordinary_elements_are_updated_without_a_branch(kernels: list[Kernel]) -> None:
    """All roots and quotients of a thread are in one stretch; IEEE's own, with a subroutine each, are left to the loop
    over single elements."""
    for kernel in kernels:
        if kernel.param == "Float64":
            continue
        roots = [sum(name.startswith("MUFU.RSQ") for name in stretch) for stretch in stretches_of(kernel.names)]
        quotients = [sum(name.startswith("MUFU.RCP") for name in stretch) for stretch in stretches_of(kernel.names)]
        assert kernel.elements in roots, kernel
        assert kernel.elements in quotients, kernel


#: Issue slots of a thread per byte: a copy moved 4.3 TB/s on an H200, of 132 SMs with four schedulers, at 1.755 GHz.
H200_SLOTS_PER_BYTE = 132 * 4 * 1.755e9 * 32 / 4.3e12


def test_memory_is_the_limit_and_not_instructions(kernels: list[Kernel]) -> None:
    """At 0.9 of an H200's copy, at 0.8 with 8-bit moments, the usual way takes nine tenths of the issue slots at most,
    and the integer pipe, half as fast, is free as often. bf16 gradients, and fp32 ones of fp32 parameters."""
    looked_at = 0
    for kernel in kernels:
        if kernel.architecture != "sm_90" or kernel.param == "Float64":
            continue
        grad, scales = (4 if kernel.param == "Float32" else 2), 2 * (kernel.moments == "8bit")
        moved = kernel.elements * sum(kernel.written)
        wanted = (kernel.elements, moved + kernel.elements * grad, moved)
        pipes = usual_way(kernel.code, wanted, access_bytes)
        assert pipes is not None, kernel
        slots = H200_SLOTS_PER_BYTE * (2 * moved + kernel.elements * grad + 2 * scales)
        slots /= 0.8 if kernel.moments == "8bit" else 0.9
        assert max(pipes.total(), 2 * pipes["integer"]) < 0.9 * slots, f"{kernel}: {pipes}"
        looked_at += 1
    assert looked_at == sum(INSTANCES_PER_PARAM.values()) - INSTANCES_PER_PARAM["Float64"]
