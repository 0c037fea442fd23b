"""docs/frameworks.md runs, and so does DeepSpeed's tutorial."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import ranks

PAGE = (ranks.ROOT / "docs" / "frameworks.md").read_text()
SNIPPETS = {
    f"{section.splitlines()[0].split(':')[0]} {number}": code
    for section in re.split(r"^## ", PAGE, flags=re.M)[1:]
    for number, code in enumerate(re.findall(r"^```python\n(.*?)^```", section, re.M | re.S))
}
TUTORIAL = str(ranks.ROOT / "examples" / "deepspeed_warmup.py")

#: DeepSpeed would compile its collectives for CPUs first (deepspeed/comm/torch.py:47).
PREAMBLE = """\
import sys
if "deepspeed" in sys.argv[1]:
    import deepspeed, deepspeed.ops
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed("gloo", verbose=False)
"""
#: Threads of DeepSpeed abort some interpreters that end by themselves.
POSTAMBLE = "\nimport os; os._exit(0)\n"


def test_every_framework_has_one() -> None:
    named = ("Plain torch", "DeepSpeed", "Hugging Face Trainer", "Accelerate", "Lightning")
    assert {name.rsplit(" ", 1)[0] for name in SNIPPETS} == set(named)


@pytest.mark.parametrize("name", SNIPPETS)
def test_snippet(name: str, tmp_path: Path) -> None:
    script = tmp_path / "snippet.py"
    script.write_text(PREAMBLE + SNIPPETS[name] + POSTAMBLE)
    uses = "deepspeed" if "deepspeed" in SNIPPETS[name] else "-"
    processes = 2 if name.startswith("Plain torch") else 1
    ranks.start([sys.executable, str(script), uses], processes, tmp_path)


def facts(printed: str) -> list[str]:
    return [line for line in printed.splitlines() if re.match(r"Learning rate|Loss|Training step", line)]


@pytest.mark.parametrize(("steps", "rate"), [(1, "0.001"), (101, "0.01")])
def test_the_tutorial_prints_its_facts(steps: int, rate: str, tmp_path: Path) -> None:
    [printed] = ranks.start([sys.executable, TUTORIAL, "--steps", str(steps)], 1, tmp_path)
    learning_rate, loss, completed = facts(printed)
    assert learning_rate == f"Learning rate after warm-up: {rate}"
    assert re.fullmatch(r"Loss: -?\d+\.\d+", loss)
    assert completed == "Training step completed"


def test_the_tutorial_under_zero_3_with_two_processes(tmp_path: Path) -> None:
    first, second = ranks.start([sys.executable, TUTORIAL, "--zero-stage", "3"], 2, tmp_path)
    assert facts(first)[0] == "Learning rate after warm-up: 0.01"
    assert facts(first)[2] == "Training step completed"
    assert facts(second) == []


def test_importing_the_package_imports_no_framework() -> None:
    check = (
        "import sys, fused_sched, fused_sched.deepspeed, fused_sched.integrations.transformers\n"
        "found = {'deepspeed', 'transformers', 'lightning', 'accelerate', 'matplotlib'} & set(sys.modules)\n"
        "assert not found, found"
    )
    subprocess.run([sys.executable, "-c", check], check=True, cwd=ranks.ROOT)
