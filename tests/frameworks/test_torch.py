"""Plain torch in several processes."""

from __future__ import annotations

from pathlib import Path

import pytest
import ranks
import torch_distributed
import zero_redundancy


@pytest.fixture(scope="module")
def outcomes() -> dict[str, str]:
    return ranks.outcomes("torch_distributed", 2)


@pytest.mark.parametrize("name", torch_distributed.CHECKS)
def test_two_processes(name: str, outcomes: dict[str, str]) -> None:
    assert not outcomes[name], outcomes[name]


@pytest.fixture(scope="module")
def redundancy() -> dict[str, str]:
    return ranks.outcomes("zero_redundancy", 2)


@pytest.mark.parametrize("name", zero_redundancy.CHECKS)
def test_zero_redundancy_optimizer(name: str, redundancy: dict[str, str]) -> None:
    assert not redundancy[name], redundancy[name]


@pytest.fixture(scope="module")
def resharded(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    shared: Path = tmp_path_factory.mktemp("resharded")
    saved = ranks.outcomes("resharding", 4, "save", shared=shared)
    assert not any(saved.values()), saved
    return ranks.outcomes("resharding", 2, "load", shared=shared)


@pytest.mark.parametrize("form", [*torch_distributed.FORMS, "full"])
def test_distributed_checkpoint_from_four_processes_to_two(form: str, resharded: dict[str, str]) -> None:
    assert not resharded[form], resharded[form]
