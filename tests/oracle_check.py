"""A case on a backend, held against its float64 oracles."""

from __future__ import annotations

import numpy as np
import tolerances
from cases import Case, Problem, values_of
from conftest import Backend

UPDATES = 6


def check_against_oracle(case: Case, backend: Backend) -> None:
    problem = Problem(case, backend.device)
    optimizer = problem.optimizer(backend.name)
    for _ in range(UPDATES):
        problem.run(optimizer, 1)
        problem.run_oracles()
    crossings = elements = 0
    for position, (param, oracle) in enumerate(zip(problem.params, problem.oracles, strict=True)):
        state = optimizer.state[param]
        assert float(state["step"]) == UPDATES
        error = np.abs(values_of(param) - oracle.param)
        assert np.all(error <= tolerances.param_bound(oracle)), f"param {position}: {error.max()}"
        if oracle.format_name in ("bf16", "fp16") and not oracle.master:
            crossings += int(np.count_nonzero(error))
            elements += error.size
        moments = ["exp_avg", "exp_avg_sq"] + (["max_exp_avg_sq"] if oracle.options.amsgrad else [])
        for key in moments:
            error = np.abs(values_of(state[key]) - getattr(oracle, key))
            assert np.all(error <= tolerances.state_bound(oracle, key)), f"{key} of {position}: {error.max()}"
        assert ("max_exp_avg_sq" in state) == oracle.options.amsgrad
    assert crossings <= tolerances.CROSSING_SHARE * elements
    assert optimizer.clock == UPDATES
