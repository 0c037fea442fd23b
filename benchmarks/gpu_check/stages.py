"""What `make gpu-check` does: commands, how long each may take, and what stands in for them in a dry run."""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PYTHON = sys.executable

#: Elements of the updates that ncu looks at.
NCU_ELEMENTS, DRY_ELEMENTS = 1 << 26, 1 << 14
#: Bytes moved, how fast, how busy the issue slots, how many warps, how many registers.
NCU_METRICS = (
    "gpu__time_duration.sum,dram__bytes_read.sum,dram__bytes_write.sum,"
    "dram__throughput.avg.pct_of_peak_sustained_elapsed,lts__t_sector_hit_rate.pct,"
    "sm__inst_issued.avg.pct_of_peak_sustained_active,sm__warps_active.avg.pct_of_peak_sustained_active,"
    "launch__registers_per_thread"
)
SANITIZERS = ("memcheck", "racecheck", "synccheck", "initcheck")
DRY_TESTS = ["tests/test_norm.py"]
DRY_CASES = "formats/split16_fp32,formats/split16_bf16"


@dataclass(frozen=True)
class Stage:
    """A command with its limit in seconds."""

    name: str
    command: Sequence[str]
    limit: int
    environment: dict[str, str] = field(default_factory=dict)
    needs: str = ""  # a program that may be missing: the stage is then left out, and said to be


def stages(out: Path, dry_run: bool, architecture: str | None = None) -> list[Stage]:
    """In the order in which they are worth having: what comes last gets the time that is left.

    out: where everything is written. architecture: of the GPU, as in "90"; None: the build's defaults.
    """
    dry = ["--dry-run"] if dry_run else []
    selftest, schedule = str(out / "selftest" / "selftest"), str(out / "selftest" / "schedule")
    build = {"FUSED_SCHED_CUDA": "1", **({"FUSED_SCHED_CUDA_ARCHS": architecture} if architecture else {})}
    pytest = [PYTHON, "-m", "pytest", "-q", "-m", "cuda", "-p", "no:cacheprovider"]
    pytest.append("--continue-on-collection-errors")  # a package that only some tests need
    elements = str(DRY_ELEMENTS if dry_run else NCU_ELEMENTS)
    ncu = ["ncu", "--clock-control", "none", "--csv", "--page", "raw", "--kernel-name", "regex:update_kernel"]
    sanitizer = [] if dry_run else ["compute-sanitizer", "--error-exitcode", "99", "--tool"]
    bench = [PYTHON, "-m", "benchmarks", "--out", str(out)]
    bench += ["--quick", "--cases", DRY_CASES] if dry_run else "--device cuda --seconds 0.5 --budget 180".split()
    return [
        Stage("build", [PYTHON, "-m", "fused_sched"], 30)
        if dry_run
        else Stage("build", [PYTHON, "setup.py", "-q", "build_ext", "--inplace"], 180, build),
        Stage("build-selftest", [PYTHON, "-m", "benchmarks.gpu_check.build", str(out / "selftest"), *dry], 60),
        Stage("selftest", [selftest, "small" if dry_run else "check", schedule], 60),
        Stage("torch-checks", [PYTHON, "-m", "benchmarks.gpu_check.torch_checks", *dry], 60),
        Stage("cuda-tests", [*pytest, *(DRY_TESTS if dry_run else tests_for_gpu())], 150),
        Stage("benchmark", bench, 220),
        *(
            Stage(
                f"sanitizer-{tool}",
                [*(sanitizer and [*sanitizer, tool]), selftest, "small", schedule],
                45,
                needs="".join(sanitizer[:1]),
            )
            for tool in SANITIZERS
        ),
        Stage(
            "ncu",
            [*([] if dry_run else [*ncu, "--metrics", NCU_METRICS]), selftest, "once", schedule, elements],
            60,
            needs="" if dry_run else "ncu",
        ),
    ]


def tests_for_gpu() -> list[str]:
    """The files with tests for a GPU: the others need packages that its machine may not have."""
    wanted = re.compile(r"mark\.cuda|\bbeside_cpu\b|\bcompiled: Backend|\bbackend: Backend")
    files = sorted((ROOT / "tests").glob("test_*.py"))
    return [str(path.relative_to(ROOT)) for path in files if wanted.search(path.read_text())]


def missing(stage: Stage) -> str:
    """The program that a stage lacks here; empty if it can run."""
    return stage.needs if stage.needs and shutil.which(stage.needs) is None else ""
