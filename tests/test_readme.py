"""What the documentation claims: its examples run, its tables match the package, the demo reaches its accuracy."""

from __future__ import annotations

import doctest
import importlib
import pkgutil
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import Backend
from example_programs import run_program

import fused_sched
from fused_sched import FusedScheduledAdam, schedules

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
EXAMPLES = re.findall(r"^```python\n(.*?)^```", README, re.M | re.S)
MODULES = [
    module.name
    for module in pkgutil.walk_packages(fused_sched.__path__, "fused_sched.")
    # Lightning is installed for tests/frameworks only, which runs that example.
    if module.name.split(".")[-1] not in {"__main__", "_cpu", "_cuda", "lightning"}
]


def section(title: str) -> str:
    """The text under a heading of README.md."""
    return re.split(r"^#+ ", README.split(f"# {title}\n", 1)[1], maxsplit=1, flags=re.M)[0]


FOR_A_GPU = [number for number, example in enumerate(EXAMPLES) if "torch.cuda.is_available()" in example]


def run_example(number: int) -> None:
    exec(compile(EXAMPLES[number], f"README.md, example {number}", "exec"), {})


@pytest.mark.parametrize("number", range(len(EXAMPLES)))
def test_examples_run(number: int, capsys: pytest.CaptureFixture[str]) -> None:
    run_example(number)
    if number == 0:
        assert capsys.readouterr().out.startswith("200 [0.000")


@pytest.mark.cuda
@pytest.mark.parametrize("number", FOR_A_GPU)
def test_examples_run_on_a_gpu(number: int, get_backend: Callable[[str], Backend]) -> None:
    get_backend("cuda")
    run_example(number)


def test_capture_has_an_example() -> None:
    assert [number for number in FOR_A_GPU if "torch.cuda.graph(" in EXAMPLES[number]]


def test_the_first_example_is_short() -> None:
    assert len(EXAMPLES[0].splitlines()) <= 12


def test_every_schedule_is_in_the_table() -> None:
    table = "\n".join(line for line in section("Schedules").splitlines() if line.startswith("|"))
    named = set(re.findall(r"`(\w+)[(`]", table))
    assert named >= set(schedules.__all__) - {"Schedule"}
    assert all(hasattr(schedules, name) for name in named)


@pytest.mark.parametrize("module", MODULES)
def test_docstring_examples_run(module: str) -> None:
    names = {name: getattr(schedules, name) for name in schedules.__all__}
    assert doctest.testmod(importlib.import_module(module), extraglobs=names).failed == 0


def test_linked_files_exist() -> None:
    for text, folder in ((README, ROOT), ((ROOT / "CONTRIBUTING.md").read_text(), ROOT)):
        for target in re.findall(r"\]\(([^)#:]+)\)", text):
            assert (folder / target).exists(), target


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def test_the_demo_reaches_its_accuracy(device: str, tmp_path: Path, get_backend: Callable[[str], Backend]) -> None:
    if get_backend(device).name == "cuda":
        for package in ("matplotlib", "rich", "sklearn"):  # which its machine may not have
            pytest.importorskip(package)
    printed = run_program("digits.py", "--device", device, "--output", str(tmp_path), folder=tmp_path)
    accuracy = re.search(r"test accuracy\D+([\d.]+)%", printed)
    assert accuracy is not None
    assert float(accuracy[1]) >= 97.0
    rates = re.search(r"difference of a learning rate: (\S+)", printed)
    assert rates is not None
    assert float(rates[1]) <= 5e-3 * 2.0**-51  # two ulp of the peak: libm's cosine against the core's
    assert (tmp_path / "digits.png").stat().st_size > 10_000


def test_every_public_member_of_the_optimizer_has_an_example() -> None:
    for cls in FusedScheduledAdam.__mro__[: FusedScheduledAdam.__mro__.index(torch.optim.Optimizer)]:
        for name, member in vars(cls).items():
            if name.startswith("_") or not (callable(member) or isinstance(member, property)):
                continue
            assert ">>> " in (member.__doc__ or ""), name
