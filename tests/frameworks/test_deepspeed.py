"""DeepSpeed's engine on two processes: the grid of its configurations, its checkpoints, and who schedules."""

from __future__ import annotations

from pathlib import Path

import deepspeed_grid
import deepspeed_parallel
import deepspeed_usage
import pytest
import ranks
import universal_checkpoint


@pytest.fixture(scope="module")
def grid() -> dict[str, str]:
    return ranks.outcomes("deepspeed_grid", 2)


@pytest.mark.parametrize("name", deepspeed_grid.CHECKS)
def test_grid(name: str, grid: dict[str, str]) -> None:
    assert not grid[name], grid[name]


def test_the_grid_has_every_configuration() -> None:
    assert len({config.name for config in deepspeed_grid.GRID}) == 28


@pytest.fixture(scope="module")
def usage() -> dict[str, str]:
    return ranks.outcomes("deepspeed_usage", 2)


@pytest.mark.parametrize("name", deepspeed_usage.CHECKS)
def test_usage(name: str, usage: dict[str, str]) -> None:
    assert not usage[name], usage[name]


@pytest.fixture(scope="module")
def parallel() -> dict[str, str]:
    return ranks.outcomes("deepspeed_parallel", 2)


@pytest.mark.parametrize("name", deepspeed_parallel.CHECKS)
def test_models_in_parts(name: str, parallel: dict[str, str]) -> None:
    assert not parallel[name], parallel[name]


@pytest.fixture(scope="module")
def universal(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    shared: Path = tmp_path_factory.mktemp("universal")
    saved = ranks.outcomes("universal_checkpoint", 2, "save", shared=shared)
    assert not any(saved.values()), saved
    universal_checkpoint.convert(shared)
    return ranks.outcomes("universal_checkpoint", 1, "load", shared=shared)


@pytest.mark.parametrize("config", universal_checkpoint.CONFIGS, ids=str)
def test_universal_checkpoint_in_another_number_of_processes(
    config: universal_checkpoint.Config, universal: dict[str, str]
) -> None:
    assert not universal[config.name], universal[config.name]
