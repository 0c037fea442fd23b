"""Rates that follow metrics, and metrics to follow, for several test files; needs none of the libraries they are of."""

from __future__ import annotations

from math import inf, nan

import pytest

from fused_sched.schedules.metric import GreedyLR, ReduceLROnPlateau

PLATEAU = ReduceLROnPlateau(factor=0.5, patience=1, cooldown=1, base_lr=0.1)
GREEDY = GreedyLR(factor=0.5, patience=1, warmup=1, smooth=True, window_size=3, min_lr=0.01, base_lr=0.1)
BOTH = pytest.mark.parametrize("schedule", [PLATEAU, GREEDY], ids=["plateau", "greedy"])
METRICS = [3.0, 2.0, 2.5, 2.25, 2.5, 1.5, 1.0, 0.5, 0.25, 2.0, 3.0, nan, 3.0, 4.0, 5.0, -1.0, inf, 2.0, 2.0, 2.0]
