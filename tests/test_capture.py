"""CUDA graphs of steps: what a replay follows, in place, and what it cannot.

A graph keeps the arguments of its launches: the addresses in a `Call` and its tensor table. Without a GPU, running the
same arguments again is what a replay does; with one, the graph is real.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from cases import assert_same, snapshot
from conftest import Backend

from fused_sched import FusedScheduledAdam, schedules
from fused_sched.engine import CompiledEngine

LR = schedules.warmup_cosine(0.1, warmup_steps=3, total_steps=40)
MOMENTUM = schedules.linear(0.8, 0.95, 20)
_TABLES = ("tensors", "arenas")


class Training:
    """Two groups of parameters whose gradients stay where they are."""

    def __init__(self, backend: Backend, **options: Any) -> None:
        self.params = [
            backend.parameter([[1.0, -2.0], [3.0, 0.5]]),
            backend.parameter([0.5, 8.0, -0.25, 1.0], torch.bfloat16),
            backend.parameter([7.0, -1.0, 2.0]),
        ]
        for param in self.params:
            param.grad = torch.zeros_like(param)
        groups = [{"params": self.params[:2], "betas": (MOMENTUM, 0.99)}, {"params": self.params[2:], "lr": 0.25}]
        options = {"lr": LR, "weight_decay": 0.1, "max_grad_norm": 2.0, "skip_nonfinite": True, **options}
        self.optimizer = backend.optimizer(groups, **options)
        self.updates = 0

    def set_gradients(self) -> None:
        self.updates += 1
        for index, param in enumerate(self.params):
            assert param.grad is not None
            param.grad.fill_((index + 1) * (-0.75) ** self.updates)
        if self.updates % 5 == 4:
            self.params[2].grad[1] = torch.nan  # type: ignore[index]

    def engine(self) -> CompiledEngine:
        engine = self.optimizer._devices.first
        assert isinstance(engine, CompiledEngine)
        return engine

    def capture(self) -> Callable[[], object]:
        """A step that has been taken before, to be replayed; capturing takes none."""
        if self.params[0].is_cuda:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                self.optimizer.step()
            return graph.replay
        engine = self.engine()
        module, plan, live = engine.backend.module, engine._plan, engine._call
        assert module is not None
        assert plan is not None
        frozen = module.Call()
        for name in (name for name in dir(live) if not name.startswith("_")):
            setattr(frozen, name, getattr(live, name))
        tables = {"tensors": plan.rows.copy(), "arenas": plan.arenas.copy()}
        for name in _TABLES:
            setattr(frozen, name, tables[name].ctypes.data)
        self.optimizer._devices._captured = True

        def replay(tables: dict[str, np.ndarray] = tables) -> None:  # which stay alive with it
            module.step(frozen)

        return replay


def edit_options(training: Training) -> None:
    optimizer = training.optimizer
    optimizer.param_groups[0]["lr"] *= 0.5
    optimizer.param_groups[0]["betas"] = (optimizer.param_groups[0]["betas"][0], 0.9)
    optimizer.param_groups[1].update(lr=0.125, betas=(0.5, 0.75), eps=1e-3, weight_decay=0.5, maximize=True)
    optimizer.max_grad_norm = 0.5
    optimizer.skip_nonfinite = False
    optimizer.push_hyperparameters()


def stop_clipping(training: Training) -> None:
    training.optimizer.max_grad_norm = None
    training.optimizer.push_hyperparameters()


def set_schedules(training: Training) -> None:
    optimizer = training.optimizer
    optimizer.set_schedule(schedules.step_decay(0.5, 0.5, every=2))
    optimizer.set_schedule(schedules.linear(0.5, 0.9, 9), group=1, hyperparameter="beta1")
    optimizer.set_schedule(0.75, group=0, hyperparameter="beta1")
    optimizer.set_schedule(schedules.linear(0.0, 0.5, 9), hyperparameter="weight_decay")


def set_clock(training: Training) -> None:
    training.optimizer.set_clock(20)


def load_a_checkpoint(training: Training) -> None:
    """With other options than the live ones, of another time."""
    saved = copy.deepcopy(training.optimizer.state_dict())
    saved["param_groups"][0].update(lr=saved["param_groups"][0]["lr"] * 0.25, weight_decay=0.5)
    saved["param_groups"][1].update(lr=0.0625, lr_reference=0.0625, betas=(0.5, 0.75))
    for group in saved["param_groups"]:
        group["clock"] = 11
    for state in saved["state"].values():
        state["exp_avg"].mul_(2.0)
    training.optimizer.load_state_dict(saved)


def write_into_the_state(training: Training) -> None:
    for param in training.params:
        training.optimizer.state[param]["exp_avg_sq"].mul_(4.0)


def edit_a_parameter(training: Training) -> None:
    with torch.no_grad():
        training.params[1].copy_(torch.ones(4))


CHANGES = [
    edit_options,
    stop_clipping,
    set_schedules,
    set_clock,
    load_a_checkpoint,
    write_into_the_state,
    edit_a_parameter,
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_replays_follow(change: Callable[[Training], None], compiled: Backend) -> None:
    """Without a recapture, from the next replay on, with the bits of plain steps; some of them are skipped."""
    replayed, eager = Training(compiled), Training(compiled)
    for training in (replayed, eager):
        training.set_gradients()
        training.optimizer.step()
    replay = replayed.capture()
    for _ in range(6):
        for training in (replayed, eager):
            training.set_gradients()
        replay()
        eager.optimizer.step()
    assert_same(snapshot(replayed.optimizer), snapshot(eager.optimizer))
    for training in (replayed, eager):
        change(training)
    for _ in range(6):
        for training in (replayed, eager):
            training.set_gradients()
        replay()
        eager.optimizer.step()
        assert replayed.optimizer.lr_tensor.tolist() == eager.optimizer.lr_tensor.tolist()
    assert_same(snapshot(replayed.optimizer), snapshot(eager.optimizer))
    assert replayed.optimizer.clock == eager.optimizer.clock
    assert replayed.optimizer.last_lr() == eager.optimizer.last_lr(sync=True)
    np.testing.assert_equal(replayed.optimizer.history().tolist(), eager.optimizer.history().tolist())


def test_replays_and_plain_steps_alternate(compiled: Backend) -> None:
    replayed, eager = Training(compiled), Training(compiled)
    for training in (replayed, eager):
        training.set_gradients()
        training.optimizer.step()
    replay = replayed.capture()
    for step in range(8):
        for training in (replayed, eager):
            training.set_gradients()
        eager.optimizer.step()
        if step % 3:
            replay()
        else:
            replayed.optimizer.step()
    assert_same(snapshot(replayed.optimizer), snapshot(eager.optimizer))


def test_loading_brings_options_to_the_device(compiled: Backend) -> None:
    """Found by replays: the next one used the options from before the checkpoint, until push_hyperparameters()."""
    training = Training(compiled, max_grad_norm=None, skip_nonfinite=False)
    training.set_gradients()
    training.optimizer.step()
    replay = training.capture()
    saved = copy.deepcopy(training.optimizer.state_dict())
    saved["param_groups"][1].update(lr=0.0, lr_reference=0.0, weight_decay=0.0)
    training.optimizer.load_state_dict(saved)
    before = training.params[2].detach().clone()
    replay()
    assert torch.equal(training.params[2], before)


@contextmanager
def capturing(optimizer: FusedScheduledAdam, device: torch.device) -> Iterator[None]:
    """A capture; without a GPU, what makes the optimizer believe in one."""
    if device.type == "cuda":
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            yield
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(optimizer._devices, "_uses_cuda", True)
        for module in ("engine", "devices"):
            patch.setattr(f"fused_sched.{module}.is_capturing", lambda device: True)
        yield


def give_found_inf(training: Training) -> None:
    training.optimizer.found_inf = torch.zeros(())


def give_grad_scale(training: Training) -> None:
    training.optimizer.grad_scale = torch.ones(())


def give_a_rate(training: Training) -> None:
    training.optimizer.param_groups[1]["lr"] = torch.tensor(0.25)


@pytest.mark.filterwarnings("ignore:The CUDA Graph is empty:UserWarning")  # nothing is captured
@pytest.mark.parametrize(
    ("give", "name"),
    [(give_found_inf, "found_inf"), (give_grad_scale, "grad_scale"), (give_a_rate, "the lr of group 1")],
)
def test_values_on_the_host_cannot_be_captured(give: Callable[[Training], None], name: str, compiled: Backend) -> None:
    """A copy of them would be, from memory that may be another's when it is replayed."""
    training = Training(compiled)
    optimizer = training.optimizer
    training.set_gradients()
    give(training)
    optimizer.step()
    before, versions = snapshot(optimizer), [param._version for param in training.params]
    where = re.escape(str(compiled.device))
    with (
        capturing(optimizer, compiled.device),
        pytest.raises(RuntimeError, match=f"{name} is a tensor on cpu.*put one on {where} in its place"),
    ):
        optimizer.step()
    assert_same(snapshot(optimizer), before)
    assert versions == [param._version for param in training.params]
    assert optimizer.clock == 1
    optimizer.step()
    assert optimizer.clock == 2


@pytest.mark.filterwarnings("ignore:The CUDA Graph is empty:UserWarning")
def test_a_rate_on_the_host_is_not_pushed_into_a_capture(compiled: Backend) -> None:
    training = Training(compiled)
    training.set_gradients()
    give_a_rate(training)
    training.optimizer.step()
    with capturing(training.optimizer, compiled.device), pytest.raises(RuntimeError, match="lr of group 1 is a tensor"):
        training.optimizer.push_hyperparameters()


def test_a_scheduled_rate_on_the_host_is_no_value_on_the_host(compiled: Backend) -> None:
    """The host reads it, as a factor of the schedule, and the device has that."""
    training = Training(compiled)
    training.set_gradients()
    training.optimizer.param_groups[0]["lr"] = torch.tensor(training.optimizer.param_groups[0]["lr"])
    training.optimizer.step()
    with capturing(training.optimizer, compiled.device):
        training.optimizer.step()


@pytest.mark.parametrize(("num_tensors", "num_groups"), [(1, 1), (1000, 1), (465, 465)])
@pytest.mark.parametrize("max_grad_norm", [None, 1.0])
def test_two_launches_through_the_optimizer(
    num_tensors: int, num_groups: int, max_grad_norm: float | None, beside_cpu: Backend
) -> None:
    params = [beside_cpu.parameter([1.0, 2.0]) for _ in range(num_tensors)]
    for param in params:
        param.grad = torch.ones_like(param)
    per_group = num_tensors // num_groups
    groups = [{"params": params[i : i + per_group], "lr": 1e-3 * i} for i in range(0, num_tensors, per_group)]
    optimizer = beside_cpu.optimizer(groups, max_grad_norm=max_grad_norm)
    engine = optimizer._devices.engine(beside_cpu.device)
    assert isinstance(engine, CompiledEngine)
    for _ in range(2):
        optimizer.step()
        assert engine._call.launches == 2


# -- on a GPU -------------------------------------------------------------------------------------------------


@pytest.fixture
def cuda(get_backend: Callable[[str], Backend]) -> Backend:
    return get_backend("cuda")


def model_of(cuda: Backend) -> torch.nn.Sequential:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.ReLU(), torch.nn.Linear(32, 4)).to(cuda.device)


@pytest.mark.cuda
@pytest.mark.parametrize("scaled", [False, True], ids=["plain", "grad_scaler"])
def test_a_whole_training_step(cuda: Backend, scaled: bool) -> None:
    """Forward, backward and step in one graph, with a GradScaler that skips: the bits of the same steps without one."""
    results = []
    for captured in (False, True):
        model = model_of(cuda)
        optimizer = cuda.optimizer(model.parameters(), lr=LR, max_grad_norm=1.0, skip_nonfinite=not scaled)
        scaler = torch.amp.GradScaler("cuda", init_scale=256.0, enabled=scaled)
        x = torch.zeros(8, 16, device=cuda.device)

        def train(model: Any = model, optimizer: Any = optimizer, scaler: Any = scaler, x: Any = x) -> None:
            optimizer.zero_grad()
            scaler.scale(model(x).square().mean()).backward()
            scaler.step(optimizer)
            scaler.update()

        def batch(step: int, x: torch.Tensor = x) -> None:
            x.copy_(torch.randn(x.shape, generator=torch.Generator().manual_seed(step)))
            if step % 7 == 5:
                x[0, 0] = torch.inf

        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # as torch asks: warm up on a stream of its own
            for step in range(3):
                batch(step)
                train()
        torch.cuda.current_stream().wait_stream(side)
        replay: Callable[[], object] = train
        if captured:
            graph = torch.cuda.CUDAGraph()
            optimizer.zero_grad()
            with torch.cuda.graph(graph):
                train()
            replay = graph.replay
        for step in range(3, 40):
            batch(step)
            replay()
            if step == 20:
                optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
                optimizer.set_schedule(schedules.linear(0.05, 0.0, 40))
        results.append((snapshot(optimizer), optimizer.history()))
    assert_same(results[1][0], results[0][0])
    np.testing.assert_equal(results[1][1].tolist(), results[0][1].tolist())
    assert results[0][1]["skipped"].sum() == 5
