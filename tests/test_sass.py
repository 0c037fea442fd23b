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
    # (operation, bits, whether evict-first) -> count, of global accesses; ("local", ...) of spills.
    accesses: Counter[tuple[str, int, bool]] = field(default_factory=Counter)

    def __str__(self) -> str:
        return f"{self.architecture} {self.param} {self.master} {self.moments} amsgrad={self.amsgrad}"

    @property
    def elements(self) -> int:
        """Per thread: 16 bytes of the narrowest stream, and 8 at least but in double."""
        if self.param == "Float64":
            return 2
        return 16 if 1 in (MASTER_BYTES[self.master], MOMENT_BYTES[self.moments]) else 8


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


INSTRUCTION = re.compile(r"\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?(?P<name>[A-Z0-9_.]+)")


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
            operation, *modifiers = match["name"].split(".")
            if operation in ("LDG", "STG", "LDL", "STL", "LD", "ST"):
                bits = next((int(m) for m in modifiers if m in ("64", "128", "256")), 32)
                kernel.accesses[operation, bits, "EF" in modifiers] += 1
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
        assert not [access for access in kernel.accesses if access[0] in ("LDL", "STL")], kernel


def test_update_kernels_leave_room_for_their_blocks(kernels: list[Kernel]) -> None:
    """64 registers x 256 threads x 4 blocks are an SM's 65,536; with a master (or draws for one) and amsgrad three
    blocks, with 16 elements per thread two."""
    for kernel in kernels:
        limit = 80 if kernel.master != "None" and kernel.amsgrad else 64
        assert 0 < kernel.registers <= (128 if kernel.elements == 16 else limit), kernel


def test_update_kernels_move_every_stream_16_bytes_at_a_time(kernels: list[Kernel]) -> None:
    """A thread's 8 elements (16 beside 8-bit streams, 2 of fp64): each stream is loaded and stored once, in 128-bit
    evict-first accesses; the gradient in one of three formats, in a branch for each. The narrower ones are for
    misaligned tensors, tails and scales, the plain ones read the step's scalars."""
    for kernel in kernels:
        wide = kernel.param == "Float64"
        moment_bytes = 8 if wide else MOMENT_BYTES[kernel.moments]
        state_bytes = (2 + kernel.amsgrad) * moment_bytes + MASTER_BYTES[kernel.master]
        param = kernel.elements * ELEMENT_BYTES[kernel.param] // 16
        grad = kernel.elements * (8 if wide else 4 + 2 + 2) // 16
        state = kernel.elements * state_bytes // 16
        assert kernel.accesses["LDG", 128, True] == param + grad + state, kernel
        assert kernel.accesses["STG", 128, True] == param + state, kernel
        assert not [access for access in kernel.accesses if access[0] in ("LD", "ST")], f"{kernel}: generic access"
