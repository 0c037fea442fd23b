"""The flight recorder, through the optimizer: what it says of each step, for how long, and its picture."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable
from concurrent.futures import Future

import numpy as np
import pytest
import torch
from conftest import Backend

from fused_sched import FusedScheduledAdam, plot, schedules
from fused_sched import history as recorder

nan = math.nan

LR = schedules.linear(1.0, 0.0, 8)
DECAY = schedules.linear(0.0, 0.25, 4)


def optimizer_of(backend: Backend, **options: object) -> tuple[torch.nn.Parameter, FusedScheduledAdam]:
    param = backend.parameter(torch.ones(2))
    param.grad = torch.tensor([3.0, 4.0], device=backend.device)
    return param, backend.optimizer([param], **options)


def test_says_what_every_step_used(backend: Backend) -> None:
    a, b = (backend.parameter(torch.ones(2)) for _ in range(2))
    groups = [{"params": [a]}, {"params": [b], "lr": 0.5, "weight_decay": DECAY}]
    optimizer = backend.optimizer(groups, lr=LR, max_grad_norm=1.0, skip_nonfinite=True, grad_divisor=2.0)
    for value in (6.0, nan, 0.6):
        a.grad = torch.tensor([value, 0.0], device=backend.device)
        b.grad = torch.tensor([0.0, 8.0 * value / 6.0], device=backend.device)
        optimizer.step()
    recorded = optimizer.history()
    assert recorded.dtype == np.dtype(
        [("clock", "<i8"), ("lr", "<f8", (2,)), ("weight_decay", "<f8", (2,)), ("grad_norm", "<f8"), ("clip", "<f8"),
         ("skipped", "?")]
    )  # fmt: skip
    assert recorded["clock"].tolist() == [1, 1, 2]
    assert recorded["skipped"].tolist() == [False, True, False]
    np.testing.assert_equal(recorded["lr"], [[1.0, 0.5], [nan, nan], [0.875, 0.5]])
    np.testing.assert_equal(recorded["weight_decay"], [[0.0, 0.0], [nan, nan], [0.0, 0.0625]])
    np.testing.assert_allclose(recorded["grad_norm"], [5.0, nan, 0.5], rtol=1e-6)
    np.testing.assert_allclose(recorded["clip"], [0.2, nan, 1.0], rtol=1e-6)


def test_without_a_norm(backend: Backend) -> None:
    _, optimizer = optimizer_of(backend, lr=LR)
    optimizer.step()
    row = optimizer.history()[0]
    np.testing.assert_equal(row.tolist()[-3:], (nan, 1.0, False))


def test_scalers_skips_are_in_it(backend: Backend) -> None:
    """found_inf, before any update was applied."""
    _, optimizer = optimizer_of(backend, lr=LR, max_grad_norm=1.0)
    optimizer.found_inf = torch.tensor(1.0, device=backend.device)  # type: ignore[attr-defined]
    optimizer.step()
    optimizer.found_inf.fill_(0.0)
    optimizer.step()
    recorded = optimizer.history()
    np.testing.assert_equal(recorded[["clock", "skipped"]].tolist(), [(0, True), (1, False)])
    np.testing.assert_equal(recorded["lr"].tolist(), [[nan], [1.0]])
    assert recorded["grad_norm"].tolist() == [5.0, 5.0]  # of a skipped step, too


def test_empty_before_the_first_step(backend: Backend) -> None:
    _, optimizer = optimizer_of(backend)
    for recorded in (optimizer.history(), optimizer.history(asynchronous=True).result()):
        assert recorded.shape == (0,)
        assert recorded["lr"].shape == (0, 1)


def test_keeps_the_latest_4096(compiled: Backend) -> None:
    _, optimizer = optimizer_of(compiled, lr=1e-3)
    for _ in range(recorder.LENGTH + 3):
        optimizer.step()
    recorded = optimizer.history()
    assert recorded["clock"].tolist() == list(range(4, recorder.LENGTH + 4))


def test_groups_added_later(backend: Backend) -> None:
    _, optimizer = optimizer_of(backend, lr=LR)
    optimizer.step()
    late = backend.parameter(torch.ones(3))
    late.grad = torch.ones(3, device=backend.device)
    optimizer.add_param_group({"params": [late], "lr": 0.25})
    optimizer.step()
    np.testing.assert_equal(optimizer.history()["lr"], [[1.0, nan], [0.875, 0.25]])


def test_one_row_for_the_parts_of_an_update(backend: Backend) -> None:
    """ZeRO steps sub-groups one by one, with the groups swapped: no call is an update of its own."""
    params = [backend.parameter(torch.ones(2)) for _ in range(3)]
    for p in params:
        p.grad = torch.ones(2, device=backend.device)
    optimizer = backend.optimizer(params, lr=LR)
    for _ in range(2):
        for p in params:
            optimizer.param_groups[0]["params"] = [p]
            optimizer.step()
    recorded = optimizer.history()
    assert recorded["clock"].tolist() == [1, 2]
    assert recorded["lr"].tolist() == [[1.0], [0.875]]


def test_loading_and_setting_the_clock_keep_it(backend: Backend) -> None:
    _, optimizer = optimizer_of(backend, lr=LR)
    optimizer.step()
    checkpoint = copy.deepcopy(optimizer.state_dict())
    optimizer.step()
    optimizer.load_state_dict(checkpoint)
    optimizer.step()
    optimizer.set_clock(6)
    optimizer.step()
    assert optimizer.history()["clock"].tolist() == [1, 2, 2, 7]
    assert optimizer.history()["lr"][:, 0].tolist() == [LR(0), LR(1), LR(1), LR(6)]


def test_copies_start_their_own(backend: Backend) -> None:
    _, optimizer = optimizer_of(backend, lr=LR)
    optimizer.step()
    for clone in (pickle.loads(pickle.dumps(optimizer)), copy.deepcopy(optimizer)):
        assert len(clone.history()) == 0
    assert len(optimizer.history()) == 1


def test_future_holds_the_steps_so_far(backend: Backend) -> None:
    _, optimizer = optimizer_of(backend, lr=LR)
    optimizer.step()
    future = optimizer.history(asynchronous=True)
    optimizer.step()
    assert isinstance(future, Future)
    assert len(future.result(timeout=60)) == 1
    assert len(optimizer.history()) == 2


@pytest.mark.cuda
def test_moves_with_the_model(get_backend: Callable[[str], Backend]) -> None:
    get_backend("cuda")
    model = torch.nn.Linear(3, 2)
    optimizer = FusedScheduledAdam(model.parameters(), lr=LR, max_grad_norm=1.0)
    for device in ("cpu", "cuda", "cpu"):
        model.to(device)
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        optimizer.step()
    assert optimizer.history()["lr"][:, 0].tolist() == [1.0, 0.875, 0.75]


def test_memory_is_what_the_docstring_says(compiled: Backend) -> None:
    _, optimizer = optimizer_of(compiled, lr=LR)
    optimizer.step()
    assert optimizer._devices.recorder._rows.nbytes == 4096 * (32 + 16 * 1)
    assert "4096 * (32 + 16 * n_groups) bytes" in (FusedScheduledAdam.history.__doc__ or "")


def test_constants_are_those_of_the_compiled_code(compiled: Backend) -> None:
    _, optimizer = optimizer_of(compiled)
    engine = optimizer._devices.engine(compiled.device)
    module = engine.backend.module
    assert module is not None
    assert (module.HISTORY_LENGTH, module.HISTORY_COLUMNS) == (recorder.LENGTH, recorder.COLUMNS)
    assert [name for name, _, _ in module.LAYOUTS["history"][1]] == ["rows", "row_length", "num_groups", "count", "row"]
    assert module.LAYOUTS["history"][0] == 8 * 5


@pytest.mark.cuda
def test_replays_write_it_and_follow_to_a_wider_ring(get_backend: Callable[[str], Backend]) -> None:
    cuda = get_backend("cuda")
    _, optimizer = optimizer_of(cuda, lr=LR, max_grad_norm=1.0)
    optimizer.step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step()
        with pytest.raises(RuntimeError, match="call it after the capture"):
            optimizer.history()
    graph.replay()
    late = cuda.parameter(torch.ones(3))
    late.grad = torch.ones(3, device="cuda")
    optimizer.add_param_group({"params": [late], "lr": 0.25})
    optimizer.step()
    graph.replay()
    recorded = optimizer.history()
    assert recorded["clock"].tolist() == [1, 2, 3, 4]
    np.testing.assert_equal(recorded["lr"], [[1.0, nan], [0.875, nan], [0.75, 0.25], [0.625, nan]])


# -- the picture ----------------------------------------------------------------------------------------------


@pytest.fixture
def recorded() -> np.ndarray:
    steps = np.zeros(6, recorder.dtype_of(2))
    steps["clock"] = [1, 2, 2, 2, 3, 4]
    steps["lr"] = [[1.0, 0.1], [2.0, 0.2], [nan, nan], [nan, nan], [3.0, 0.3], [4.0, 0.4]]
    steps["grad_norm"] = [0.5, 2.0, math.inf, nan, 4.0, 0.25]
    steps["clip"] = [1.0, 0.5, nan, nan, 0.25, 1.0]
    steps["skipped"] = [False, False, True, True, False, False]
    return steps


def test_picture_shows_rates_norms_and_skips(recorded: np.ndarray) -> None:
    figure = pytest.importorskip("matplotlib.figure").Figure()
    assert plot.history(recorded, figure) is figure
    rates, norms = figure.axes
    assert [line.get_ydata().tolist() for line in rates.lines[:2]] == [[1.0, 2.0, 3.0, 4.0], [0.1, 0.2, 0.3, 0.4]]
    assert rates.lines[0].get_xdata().tolist() == [1, 2, 3, 4]
    assert [text.get_text() for text in rates.get_legend().get_texts()] == ["group 0", "group 1", "2 skipped"]
    line, clipped, skip = norms.lines
    assert line.get_ydata().tolist() == [0.5, 2.0, 4.0, 0.25]
    assert clipped.get_ydata().tolist() == [2.0, 4.0]
    assert list(skip.get_xdata()) == [2.5, 2.5]
    assert norms.get_yscale() == "log"
    assert norms.get_xlabel() == "update"
    figure.savefig("/dev/null", format="svg")


def test_picture_without_norms_has_one_row(recorded: np.ndarray) -> None:
    recorded["grad_norm"] = nan
    figure = plot.history(recorded, pytest.importorskip("matplotlib.figure").Figure())
    assert [axes.get_ylabel() for axes in figure.axes] == ["learning rate"]
    assert figure.axes[0].get_xlabel() == "update"


def test_picture_of_what_is_no_history(recorded: np.ndarray) -> None:
    with pytest.raises(TypeError, match=r"what opt.history\(\) returns is drawn, got array"):
        plot.history(np.zeros(3))
    with pytest.raises(ValueError, match="at least one step is needed, got none; draw it after"):
        plot.history(recorded[:0])
