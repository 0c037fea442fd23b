"""State that lies elsewhere than the last step left it when a checkpoint is loaded: the next step must find it.

The prepared step holds addresses; one that went on with the old ones would write to memory that was freed.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable

import pytest
import torch
from cases import assert_same, snapshot
from conftest import Backend

from fused_sched import FusedScheduledAdam

SHAPE = (40, 30)


def offload_and_reload(optimizer: FusedScheduledAdam) -> None:
    optimizer.offload()
    optimizer.reload()


def delete_each(optimizer: FusedScheduledAdam) -> None:
    for param in list(optimizer.state):
        del optimizer.state[param]


def take_each(optimizer: FusedScheduledAdam) -> None:
    while optimizer.state:
        optimizer.state.popitem()


def replace(optimizer: FusedScheduledAdam) -> None:
    optimizer.state = defaultdict(dict)


def assign_each(optimizer: FusedScheduledAdam) -> None:
    for param in list(optimizer.state):
        optimizer.state[param] = {}


Way = Callable[[FusedScheduledAdam], None]
WAYS: list[Way] = [
    offload_and_reload,
    lambda optimizer: optimizer.state.clear(),
    delete_each,
    take_each,
    lambda optimizer: optimizer.state.pop(next(iter(optimizer.state))),
    replace,
    assign_each,
]
IDS = ["offloaded", "cleared", "deleted", "popped", "one popped", "replaced", "assigned"]


class Run:
    """Two parameters, whose gradients lie as they do (repeats are recognised at once) or in another order."""

    def __init__(self, backend: Backend, dtype: torch.dtype, transposed: bool) -> None:
        generator = torch.Generator().manual_seed(0)
        draw = lambda: torch.randn(SHAPE, generator=generator).to(backend.device, dtype)  # noqa: E731
        self.model = torch.nn.ParameterList([draw(), draw()])
        self.optimizer = backend.optimizer(self.model.parameters(), lr=0.1)
        self.grads = [[draw(), draw()] for _ in range(5)]
        if transposed:
            self.grads = [[g.t().contiguous().t() for g in step] for step in self.grads]

    def steps(self, first: int, end: int) -> None:
        for grads in self.grads[first:end]:
            for param, grad in zip(self.model, grads, strict=True):
                param.grad = grad
            self.optimizer.step()


@pytest.mark.parametrize("transposed", [False, True], ids=["plain", "transposed"])
@pytest.mark.parametrize("held", [False, True], ids=["freed", "held"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("way", WAYS, ids=IDS)
def test_a_checkpoint_loaded_after_it(
    backend: Backend, way: Way, dtype: torch.dtype, held: bool, transposed: bool
) -> None:
    expected, run = (Run(backend, dtype, transposed) for _ in range(2))
    for each in (expected, run):
        each.steps(0, 2)
    saved = copy.deepcopy(run.optimizer.state_dict())
    kept = dict(run.optimizer.state) if held else None  # and with it the memory that the old addresses name
    way(run.optimizer)
    run.optimizer.load_state_dict(saved)
    new_memory = [torch.zeros(SHAPE, device=backend.device) for _ in range(8)]  # freed memory, given out again
    for each in (expected, run):
        each.steps(2, 5)
    assert_same(snapshot(run.optimizer), snapshot(expected.optimizer))
    assert not any(tensor.any() for tensor in new_memory)
    assert run.optimizer.clock == 5
    del kept


@pytest.mark.parametrize("transposed", [False, True], ids=["plain", "transposed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_exact_parameters_loaded_after_it(backend: Backend, dtype: torch.dtype, transposed: bool) -> None:
    expected, run = (Run(backend, dtype, transposed) for _ in range(2))
    for each in (expected, run):
        each.steps(0, 2)
        exact = each.optimizer.fp32_state_dict(each.model)
        if each is run:
            offload_and_reload(each.optimizer)
        each.optimizer.load_fp32_state_dict(each.model, exact)
        each.steps(2, 5)
    assert_same(snapshot(run.optimizer), snapshot(expected.optimizer))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_exact_parameters_loaded_into_state_that_is_gone(backend: Backend, dtype: torch.dtype) -> None:
    run, fresh = (Run(backend, dtype, transposed=False) for _ in range(2))
    run.steps(0, 2)
    exact = run.optimizer.fp32_state_dict(run.model)
    run.optimizer.state.clear()
    for each in (run, fresh):
        each.optimizer.load_fp32_state_dict(each.model, exact)
        each.steps(2, 5)
    assert_same(snapshot(run.optimizer), snapshot(fresh.optimizer))


def test_loading_one_model_leaves_what_was_written_to_anothers_state(backend: Backend) -> None:
    """Two models, one optimizer: values written to the second's state were forgotten."""
    models = [torch.nn.Linear(4, 4, bias=False, device=backend.device) for _ in range(2)]
    optimizer = backend.optimizer([model.weight for model in models], lr=0.1)
    for _ in range(2):
        for model in models:
            model.weight.grad = torch.ones_like(model.weight)
        optimizer.step()
    optimizer.state[models[1].weight]["exp_avg"] = torch.zeros(4, 4, device=backend.device)
    optimizer.load_fp32_state_dict(models[0], optimizer.fp32_state_dict(models[0]))
    optimizer.step()
    assert optimizer.state[models[1].weight]["exp_avg"][0, 0].item() == pytest.approx(0.1)
