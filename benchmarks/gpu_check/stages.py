"""What `make gpu-check` does: commands, how long each may take, and what stands in for them in a dry run."""

from __future__ import annotations

import os
import re
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from glob import glob
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PYTHON = sys.executable

#: Elements of the updates that ncu looks at.
NCU_ELEMENTS, DRY_ELEMENTS = 1 << 26, 1 << 14
NCU_KERNELS = ("update_kernel", "norm_kernel", "clock_kernel")
#: Bytes moved, how fast, how busy the issue slots, how many warps, how many registers.
NCU_METRICS = (
    *("gpu__time_duration.sum", "dram__bytes_read.sum", "dram__bytes_write.sum"),
    *("dram__throughput.avg.pct_of_peak_sustained_elapsed", "lts__t_sector_hit_rate.pct"),
    *("sm__inst_issued.avg.pct_of_peak_sustained_active", "sm__warps_active.avg.pct_of_peak_sustained_active"),
    "launch__registers_per_thread",
)
#: What a slow kernel waits for. In a run of their own: ncu measures nothing where it does not know one name.
NCU_MORE_METRICS = (
    "gpu__time_duration.sum",
    "sm__inst_executed_pipe_alu.avg.pct_of_peak_sustained_active",
    *("lts__t_sectors_op_write.sum", "lts__t_sectors_op_read.sum"),
    "smsp__average_warps_issue_stalled_long_scoreboard_per_issue_active.ratio",
    "smsp__average_warps_issue_stalled_no_instruction_per_issue_active.ratio",
)
#: What ncu says where it is not allowed to count, or somebody else does.
NCU_REFUSES = r"LibraryNotLoaded|ERR_NVGPUCTRPERM|driver resource was unavailable"
SANITIZERS = ("memcheck", "racecheck", "synccheck", "initcheck")
SANITIZER_REFUSES = r"Device not supported"
DRY_TESTS = ["tests/test_norm.py"]
TINY = ["--dry-run", "--elements", str(DRY_ELEMENTS), "--rounds", "1"]
DRY_CASES = "formats/split16_fp32,formats/split16_bf16"
#: Where CUDA's tools are installed, which often are not on PATH.
TOOLS = ("/usr/local/cuda/bin", "/opt/nvidia/nsight-compute/*")


@dataclass(frozen=True)
class Stage:
    """A command with its limit in seconds."""

    name: str
    command: Sequence[str]
    limit: int
    environment: dict[str, str] = field(default_factory=dict)
    needs: str = ""  # a program that may be missing: the stage is then left out, and said to be
    refuses: str = ""  # what that program says where it cannot work: the stage is left, too
    shows: str = ""  # what the output of a stage that did its work has: a tool may end well and have done nothing


def stages(out: Path, dry_run: bool, architecture: str | None = None) -> list[Stage]:
    """In the order in which they are worth having: what comes last gets the time that is left.

    out: where everything is written. architecture: of the GPU, as in "90"; None: the build's defaults.
    """
    dry = ["--dry-run"] if dry_run else []
    selftest, schedule = str(out / "selftest" / "selftest"), str(out / "selftest" / "schedule")
    # A dry run needs the CPU's module alone, but builds CUDA's, too, where there is a toolkit: it must not replace a
    # build with it by one without.
    build = {
        "FUSED_SCHED_REQUIRE_CPU": "1",
        **({} if dry_run else {"FUSED_SCHED_CUDA": "1"}),
        **({"FUSED_SCHED_CUDA_ARCHS": architecture} if architecture else {}),
    }
    bench = [PYTHON, "-m", "benchmarks", "--out", str(out)]
    bench += ["--quick", "--cases", DRY_CASES] if dry_run else "--device cuda --seconds 0.5 --budget 180".split()
    by_file = [PYTHON, "-m", "benchmarks.gpu_check.tests_by_file"]
    return [
        Stage("build", [PYTHON, "setup.py", "-q", "build_ext", "--inplace"], 400 if dry_run else 150, build),
        # The first import of torch on a machine takes a minute and more.
        Stage("build-selftest", [PYTHON, "-m", "benchmarks.gpu_check.build", str(out / "selftest"), *dry], 150),
        Stage("selftest", [selftest, "small" if dry_run else "check", schedule], 120),
        Stage("torch-checks", [PYTHON, "-m", "benchmarks.gpu_check.torch_checks", *dry], 60),
        Stage("benchmark", bench, 220),
        Stage(
            "cuda-tests",
            [*by_file, *(DRY_TESTS if dry_run else tests_for_gpu())],
            200,
            {} if dry_run else {"FUSED_SCHED_REQUIRE_CUDA": "1"},  # skipped tests would look like good ones
        ),
        *(_sanitizer(tool, [selftest, "small", schedule], dry_run) for tool in SANITIZERS),
        *(
            _ncu(name, metrics, [selftest, "once", schedule, str(DRY_ELEMENTS if dry_run else NCU_ELEMENTS)], dry_run)
            for name, metrics in (("ncu", NCU_METRICS), ("ncu-more", NCU_MORE_METRICS))
        ),
        Stage("tune", [*_tune(out, architecture), *(TINY if dry_run else [])], 200),
    ]


def _tune(out: Path, architecture: str | None) -> list[str]:
    target = ["--architecture", architecture] if architecture else []
    command = [PYTHON, "-m", "benchmarks.gpu_check.tune", str(out / "selftest")]
    return [*command, "--out", str(out / "tune.json"), *target]


def _sanitizer(tool: str, command: list[str], dry_run: bool) -> Stage:
    name, done = f"sanitizer-{tool}", "small: every byte equal"
    if dry_run:
        return Stage(name, command, 45, shows=done)
    words = ["compute-sanitizer", "--error-exitcode", "99", "--tool", tool]
    return Stage(name, [*words, *command], 45, needs=words[0], refuses=SANITIZER_REFUSES, shows=done)


def _ncu(name: str, metrics: Sequence[str], command: list[str], dry_run: bool) -> Stage:
    if dry_run:
        return Stage(name, command, 60)
    # The self-test switches profiling on for its last steps, when the clocks are those of a GPU at work.
    words = ["ncu", "--clock-control", "none", "--profile-from-start", "off", "--csv", "--page", "raw"]
    words += ["--kernel-name", f"regex:{'|'.join(NCU_KERNELS)}", "--metrics", ",".join(metrics)]
    return Stage(name, [*words, *command], 60, needs="ncu", refuses=NCU_REFUSES, shows=NCU_KERNELS[0])


def tests_for_gpu() -> list[str]:
    """The files with tests for a GPU: the others need packages that its machine may not have."""
    wanted = re.compile(r"mark\.cuda|\bbeside_cpu\b|\bcompiled: Backend|\bbackend: Backend")
    files = sorted((ROOT / "tests").glob("test_*.py"))
    return [str(path.relative_to(ROOT)) for path in files if wanted.search(path.read_text())]


def search_path() -> str:
    """PATH for a stage: what is on it goes first, then the tools' folders, newest versions first."""
    folders = [folder for pattern in TOOLS for folder in sorted(glob(pattern), reverse=True)]
    return os.pathsep.join([os.environ.get("PATH", os.defpath), *folders])


def missing(stage: Stage) -> str:
    """The program that a stage lacks here; empty if it can run."""
    return stage.needs if stage.needs and shutil.which(stage.needs, path=search_path()) is None else ""
