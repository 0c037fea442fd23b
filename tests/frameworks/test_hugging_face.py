"""Trainer and Accelerate on two processes."""

from __future__ import annotations

import pytest
import ranks
import trainer_runs


@pytest.fixture(scope="module")
def outcomes() -> dict[str, str]:
    return ranks.outcomes("trainer_runs", 2)


@pytest.mark.parametrize("name", trainer_runs.CHECKS)
def test_two_processes(name: str, outcomes: dict[str, str]) -> None:
    assert not outcomes[name], outcomes[name]
