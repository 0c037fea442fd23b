"""What the compiled norm kernel is, read from the machine code of every architecture. Needs what test_sass.py needs."""

from __future__ import annotations

import os
import re
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from cuda_on_cpu.build import CSRC
from test_sass import INSTRUCTION, dump, find_cuobjdump, stretches_of

from build_tools import ninja_file, toolchain


@dataclass
class Kernel:
    """The norm kernel of one architecture."""

    registers: int = 0
    shared: int = 0
    instructions: list[str] = field(default_factory=list, repr=False)


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Kernel]:
    try:
        toolkit = toolchain.find_cuda_toolkit({**os.environ, "FUSED_SCHED_CUDA": "1"})
    except toolchain.Missing as reason:
        pytest.skip(f"no CUDA toolkit: {reason}")
    cuobjdump = find_cuobjdump()
    if cuobjdump is None:
        pytest.skip("no cuobjdump: pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm")
    target = tmp_path_factory.mktemp("norm") / "launch_clock.o"
    targets = [f"-gencode=arch=compute_{name},code=sm_{name}" for name in toolkit.architectures]
    command = [toolkit.nvcc, *ninja_file.NVCC_FLAGS, f"-I{CSRC}", *targets, "-c"]
    result = subprocess.run([*command, str(CSRC / "cuda/launch_clock.cu"), "-o", str(target)], capture_output=True)
    assert result.returncode == 0, result.stderr.decode()
    found = read_norm_kernels(cuobjdump, target)
    assert set(found) == {f"sm_{name}" for name in toolkit.architectures}
    return found


def read_norm_kernels(cuobjdump: str, path: Path) -> dict[str, Kernel]:
    found: dict[str, Kernel] = {}
    architecture, inside = "", False
    for line in dump(cuobjdump, "-res-usage", path) + dump(cuobjdump, "-sass", path):
        if match := re.match(r"arch = (sm_\w+)", line.strip()):
            architecture, inside = match[1], False
        elif match := re.search(r"Function\s*:?\s*(_Z\w+)", line):
            inside = "norm_kernel" in match[1]
        elif inside and (match := re.search(r"REG:(\d+) STACK:\d+ SHARED:(\d+)", line)):
            found.setdefault(architecture, Kernel()).registers = int(match[1])
            found[architecture].shared = int(match[2])
        elif inside and (match := INSTRUCTION.match(line)):
            found[architecture].instructions.append(match["name"])
    return found


def count(names: list[str], *parts: str) -> int:
    return sum(all(part in name.split(".") for part in parts) for name in names)


def test_four_blocks_fit(kernels: dict[str, Kernel]) -> None:
    """64 registers x 256 threads x 4 blocks are an SM's 65,536; shared memory of all four is 24 KB."""
    for architecture, kernel in kernels.items():
        assert 0 < kernel.registers <= 64, architecture
        assert kernel.shared <= 8192, architecture


def test_gradients_are_read_16_bytes_at_a_time_and_stay_in_the_cache(kernels: dict[str, Kernel]) -> None:
    """Four loads are on their way before the first is waited for, for each of the four formats; none evicts first,
    since the update reads them again."""
    for architecture, kernel in kernels.items():
        loads = [count(stretch, "LDG", "128") for stretch in stretches_of(kernel.instructions)]
        assert loads.count(4) >= 4, f"{architecture}: {loads}"
        assert count(kernel.instructions, "LDG", "128", "EF") == 0, architecture
        assert count(kernel.instructions, "LD", "128") == 0, f"{architecture}: generic access"


def test_lanes_add_by_shuffles(kernels: dict[str, Kernel]) -> None:
    """A double is two registers: 5 folds of 4, 8 and 8 accumulators, and of 2 of each of fp64's three sums."""
    for architecture, kernel in kernels.items():
        assert count(kernel.instructions, "SHFL", "DOWN") >= 2 * 5 * (4 + 8 + 8 + 3 * 2), architecture
        assert (
            count(kernel.instructions, "ATOMG", "ADD")
            + count(kernel.instructions, "RED", "ADD")
            + count(kernel.instructions, "ATOM", "ADD")
            == 1
        ), architecture
