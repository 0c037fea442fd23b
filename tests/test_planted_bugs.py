"""Bugs planted in a copy of the CUDA sources, each of which the kernels' tests must notice.

A test that has never failed proves little. Two minutes of compiling, so only on request:

    FUSED_SCHED_PLANTED_BUGS=1 python -m pytest tests/test_planted_bugs.py
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from cuda_on_cpu import build

pytestmark = pytest.mark.skipif(
    "FUSED_SCHED_PLANTED_BUGS" not in os.environ, reason="on request: FUSED_SCHED_PLANTED_BUGS=1"
)

TESTS = Path(__file__).resolve().parent
UPDATE, CLOCK, LAUNCH = "cuda/update_kernel.cuh", "cuda/clock_kernel.cuh", "cuda/launch.cu"
INSTANCE = "cuda/update_instance.cuh"

# What is wrong: (file, text, its replacement, which sanitizer is needed to see it, if any).
BUGS = {
    "none": (UPDATE, "at.count <= 0", "at.count < 1", ""),
    "vector past the end": (
        INSTANCE,
        "at.count >= Instance::kCount && is_vector_aligned(table.param",
        "is_vector_aligned(table.param",
        "",
    ),
    "misaligned vector": (INSTANCE, " && is_vector_aligned(base)", "", "address"),
    "0/0 left in the padding": (
        INSTANCE,
        "if constexpr (Instance::kHasMaster) clear_padding(stored.kept, at.count);",
        "",
        "",
    ),
    "scale not stored": (INSTANCE, "    __stcs(at.exp_avg_scale, stored.exp_avg_scale);\n", "", ""),
    "random bits of the thread's first element": (
        UPDATE,
        "const uint32_t element = first_element + static_cast<uint32_t>(kBegin + i);",
        "const uint32_t element = first_element;",
        "",
    ),
    "gradients read as bf16": (INSTANCE, "default: return load_grad<Float16", "default: return load_grad<Bfloat16", ""),
    "ordinals of another launch": (LAUNCH, "table->ordinal[row] = tensor.ordinal;", "table->ordinal[row] = 0;", ""),
    "threads beyond the end work": (UPDATE, "if (at.count <= 0) return;", "", ""),
    "first tile of a tensor taken for the one before": (
        "cuda/tensor_table.cuh",
        "tile < table.tile_end",
        "tile <= table.tile_end",
        "",
    ),
    "master not reconciled": (
        "core/master.h",
        "Param::encode_beside_master(kept) == param ? kept : Param::decode(param)",
        "kept",
        "",
    ),
    "skip ignored": (UPDATE, "if (scalars.flags & kSkip) return;", "", ""),
    "scalars of another group reused": (CLOCK, "group == table.group[row - 1] &&", "", ""),
    "every launch ticks": (LAUNCH, "table->begins_call = first == 0;", "table->begins_call = true;", ""),
    "row of the table for row of the call": (LAUNCH, "static_cast<int32_t>(index);", "row;", ""),
    "arenas kept from the launch before": (LAUNCH, "    num_arenas_ = 0;\n", "", ""),
    "every thread reports to every group": ("cuda/metric_kernel.cuh", "i = threadIdx.x", "i = 0", ""),
    "groups beyond a warp get no report": ("cuda/metric_kernel.cuh", "i < table.num_records", "i < 32", ""),
    "no barrier after the tick": (CLOCK, "table.found_inf);\n  __syncthreads();", "table.found_inf);", "thread"),
    "no barrier after the values": (CLOCK, "  }\n  __syncthreads();\n}", "  }\n}", "thread"),
    "barrier in a branch": (CLOCK, "  __syncthreads();\n}", "  if (threadIdx.x < 64) __syncthreads();\n}", ""),
}


@pytest.mark.parametrize("bug", BUGS)
def test_planted_bug_is_noticed(bug: str, tmp_path: Path) -> None:
    file, text, replacement, sanitizer = BUGS[bug]
    csrc = tmp_path / "csrc"
    shutil.copytree(build.CSRC, csrc)
    source = (csrc / file).read_text()
    assert source.count(text) == 1, f"{file} no longer has one {text!r}: plant this bug elsewhere"
    (csrc / file).write_text(source.replace(text, replacement))

    environment = build.sanitizer_environment(sanitizer) if sanitizer else dict(os.environ)
    environment |= {"FUSED_SCHED_TEST_CSRC": str(csrc), "PYTHONPATH": str(TESTS)}
    files = "test_clock_kernel.py test_metric_kernel.py test_kernels.py"
    command = f"-m pytest -o addopts= --noconftest -p no:cacheprovider -s -x -q {files}"
    result = subprocess.run(
        [sys.executable, *command.split()], env=environment, cwd=TESTS, capture_output=True, text=True, timeout=300
    )
    shutil.rmtree(build.library(sanitizer, csrc).parent)
    output = result.stdout + result.stderr
    assert (result.returncode == 0) == (bug == "none"), output[-3000:]
    if sanitizer == "thread":
        assert "data race" in output
