"""`step()` inside torch.compile: one operator, no graph break, no recompilation, the bits of an uncompiled step."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch._dynamo
from cases import Case, Problem, Tensors, assert_same, by_name, one_group, snapshot
from conftest import Backend
from torch._dynamo.testing import CompileCounterWithBackend
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, distribute_tensor

from fused_sched import FusedScheduledAdam, schedules
from fused_sched.devices import Call

# aot_eager hands the operator copies of the parameters, inductor the parameters themselves.
COMPILERS = ["eager", "aot_eager", "inductor"]
RAMP = schedules.linear(0.1, 0.0, 20)
TRACES_BACKWARD = hasattr(torch._dynamo.config, "trace_autograd_ops")


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture(params=COMPILERS)
def counter(request: pytest.FixtureRequest) -> CompileCounterWithBackend:
    """A compiler that counts the graphs it is given."""
    return CompileCounterWithBackend(request.param)


def compiled_step(optimizer: FusedScheduledAdam, counter: Any = "eager") -> Callable[[], None]:
    return torch.compile(lambda: optimizer.step(), backend=counter, fullgraph=True)


def ones(*shape: int) -> torch.nn.Parameter:
    param = torch.nn.Parameter(torch.ones(shape))
    param.grad = torch.ones(shape)
    return param


# ---- one graph, the same bits ----------------------------------------------------------------------------


COMPRESSED = one_group(
    "compressed",
    (Tensors(((9,),)), Tensors(((16,), (33, 3), ()), "bf16")),
    lr=schedules.cosine(1e-2, 1e-3, 20),
    master="split8",
    moments="8bit",
)


@pytest.mark.parametrize("case", [by_name("groups_of_their_own"), COMPRESSED], ids=str)
def test_twenty_scheduled_and_clipped_steps_are_one_graph(case: Case, counter: CompileCounterWithBackend) -> None:
    compiled, plain = Problem(case), Problem(case)
    optimizer, other = compiled.optimizer("cpu"), plain.optimizer("cpu")
    optimizer.max_grad_norm = other.max_grad_norm = 0.5
    step = compiled_step(optimizer, counter)
    for _ in range(20):
        compiled.set_grads()
        step()
    plain.run(other, 20)
    assert counter.frame_count == 1
    assert_same(snapshot(optimizer), snapshot(other))
    assert (optimizer.clock, optimizer.last_lr()) == (20, other.last_lr())
    assert (optimizer.history()["clip"] < 1.0).all()


def test_every_backend(backend: Backend) -> None:
    param, plain = backend.parameter([1.0, 2.0]), backend.parameter([1.0, 2.0])
    optimizer, other = backend.optimizer([param], lr=RAMP), backend.optimizer([plain], lr=RAMP)
    step = compiled_step(optimizer)
    for _ in range(3):
        param.grad, plain.grad = torch.ones_like(param), torch.ones_like(plain)
        step()
        other.step()
    assert_same(snapshot(optimizer), snapshot(other))


@pytest.mark.parametrize("compiler", ["eager", "inductor"])
def test_no_parameter_is_copied(compiler: str, monkeypatch: pytest.MonkeyPatch) -> None:
    params = [ones(3), ones(2, 2)]
    optimizer = FusedScheduledAdam(params, lr=RAMP)
    calls: list[Call] = []
    apply = optimizer._apply
    monkeypatch.setattr(optimizer, "_apply", lambda call, *scaling: (calls.append(call), apply(call, *scaling)))
    step = compiled_step(optimizer, compiler)
    step()
    step()
    assert [call.params is call.owners for call in calls] == [True, True]


def test_compiled_and_uncompiled_steps_alternate(counter: CompileCounterWithBackend) -> None:
    compiled, plain = Problem(by_name("all_scheduled")), Problem(by_name("all_scheduled"))
    optimizer, other = compiled.optimizer("cpu"), plain.optimizer("cpu")
    step = compiled_step(optimizer, counter)
    for _ in range(2):
        compiled.run(optimizer, 2)
        for _ in range(2):
            compiled.set_grads()
            step()
    plain.run(other, 8)
    assert_same(snapshot(optimizer), snapshot(other))


def test_nothing_but_other_gradients_recompiles() -> None:
    counter = CompileCounterWithBackend("eager")
    compiled, plain = Problem(by_name("groups_of_their_own")), Problem(by_name("groups_of_their_own"))
    optimizer, other = compiled.optimizer("cpu"), plain.optimizer("cpu")
    step = compiled_step(optimizer, counter)

    def edit(edited: FusedScheduledAdam, update: int) -> None:
        edited.param_groups[3]["lr"] *= 0.5
        edited.param_groups[1]["weight_decay"] += 0.01
        if update == 3:
            edited.set_schedule(RAMP)
        if update == 4:
            edited.set_clock(10)
        if update == 5:
            edited.max_grad_norm = 0.5
        if update == 6:
            edited.load_state_dict(copy.deepcopy(edited.state_dict()))

    for update in range(10):
        edit(optimizer, update)
        compiled.set_grads()
        step()
        edit(other, update)
        plain.run(other, 1)
    assert counter.frame_count == 1
    for problem, run in ((compiled, step), (plain, other.step)):
        for _ in range(2):
            problem.set_grads()
            problem.params[0].grad = None
            run()
    assert counter.frame_count == 2
    assert_same(snapshot(optimizer), snapshot(other))


def test_a_group_that_is_added_takes_part() -> None:
    counter = CompileCounterWithBackend("eager")
    param, late = ones(2), ones(3)
    optimizer = FusedScheduledAdam([param], lr=RAMP)
    step = compiled_step(optimizer, counter)
    step()
    optimizer.add_param_group({"params": [late], "lr": 0.5})
    step()
    step()
    assert late.tolist() == pytest.approx([0.0] * 3, abs=1e-6)
    assert counter.frame_count == 2


def test_one_compiled_function_steps_several_optimizers() -> None:
    step = torch.compile(lambda optimizer: optimizer.step(), backend="eager", fullgraph=True)
    params = [ones(2), ones(2)]
    optimizers = [FusedScheduledAdam([p], lr=rate) for p, rate in zip(params, (0.25, 0.5), strict=True)]
    for optimizer in optimizers:
        step(optimizer)
    assert [p[0].item() for p in params] == pytest.approx([0.75, 0.5])


def test_a_copied_optimizer_steps_itself() -> None:
    param = ones(2)
    params, optimizer = copy.deepcopy(([param], FusedScheduledAdam([param], lr=0.25)))
    params[0].grad = torch.ones(2)
    compiled_step(optimizer)()
    assert (param[0].item(), params[0][0].item()) == (1.0, 0.75)


def test_gradients_beside_the_parameter() -> None:
    """Megatron's: `p.main_grad` in place of `p.grad`."""
    param = torch.nn.Parameter(torch.ones(2, dtype=torch.bfloat16))
    param.main_grad = torch.ones(2)  # type: ignore[attr-defined]
    optimizer = FusedScheduledAdam([param], lr=0.25)
    compiled_step(optimizer)()
    assert param[0].item() == 0.75


def widened(param: torch.Tensor) -> None:
    param.main_grad = param.grad.float()  # type: ignore[attr-defined, union-attr]
    param.grad = None


def made_contiguous(param: torch.Tensor) -> None:
    param.grad = param.grad.contiguous()  # type: ignore[union-attr]


@pytest.mark.parametrize(("change", "dtype"), [(widened, torch.bfloat16), (made_contiguous, torch.float32)])
def test_gradients_that_the_graph_makes_are_not_taken_for_the_parameters(change: Any, dtype: torch.dtype) -> None:
    """The table was made for the graph's; the next eager step read the parameter's own as if they were like those."""
    results = []
    for compiles in (True, False):
        param = torch.nn.Parameter(torch.zeros(16, 32, dtype=dtype))
        optimizer = FusedScheduledAdam([param], lr=0.5)

        def step(param: torch.nn.Parameter = param, optimizer: FusedScheduledAdam = optimizer) -> None:
            change(param)
            optimizer.step()

        compiled = torch.compile(step, backend="eager", fullgraph=True) if compiles else step
        for index in range(5):
            param.main_grad = None  # type: ignore[attr-defined]
            param.grad = (torch.arange(512.0) + index).to(dtype).view(32, 16).t()
            (compiled if index < 2 else optimizer.step)()
        results.append(snapshot(optimizer))
    assert_same(*results)


def test_no_gradients_do_nothing() -> None:
    param = torch.nn.Parameter(torch.ones(2))
    optimizer = FusedScheduledAdam([param])
    compiled_step(optimizer)()
    assert optimizer.clock == 0


# ---- a whole training step -------------------------------------------------------------------------------


@pytest.mark.skipif(not TRACES_BACKWARD, reason="this torch cannot trace backward()")
@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
def test_forward_backward_and_step_are_one_graph(compiler: str) -> None:
    """Gradients are zeroed last: zeroed first, torch 2.13 gets its sources wrong, in this and in later compilations."""
    counter = CompileCounterWithBackend(compiler)
    params, plain = [ones(3), ones(2, 2)], [ones(3), ones(2, 2)]
    optimizer, other = (FusedScheduledAdam(p, lr=RAMP, max_grad_norm=1.0) for p in (params, plain))

    def forward(weights: list[torch.nn.Parameter], x: torch.Tensor) -> torch.Tensor:
        return sum(((p * x[0]).sum() for p in weights), torch.zeros(()))

    def train(x: torch.Tensor) -> torch.Tensor:
        loss = forward(params, x)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    step = torch.compile(train, backend=counter, fullgraph=True)
    optimizer.zero_grad()
    for x in torch.linspace(-1.0, 2.0, 20)[:, None]:
        with torch._dynamo.config.patch(trace_autograd_ops=True):
            loss = step(x)
        other.zero_grad()
        expected = forward(plain, x)
        expected.backward()
        other.step()
        assert torch.equal(loss, expected.detach())
    assert counter.frame_count == 1
    assert [p.grad for p in params] == [None, None]
    assert_same(snapshot(optimizer), snapshot(other))


def test_zeroing_gradients_compiles(counter: CompileCounterWithBackend) -> None:
    params = [ones(3), ones(2)]
    optimizer = FusedScheduledAdam(params, lr=0.25)

    def step() -> None:
        optimizer.step()
        optimizer.zero_grad()

    torch.compile(step, backend=counter, fullgraph=True)()
    assert [(p[0].item(), p.grad) for p in params] == [(0.75, None)] * 2
    assert counter.frame_count == 1


# ---- beside it -------------------------------------------------------------------------------------------


def test_what_the_step_wrote_is_read_after_it() -> None:
    param = ones(4)
    optimizer = FusedScheduledAdam([param], lr=RAMP, max_grad_norm=1.0)

    def step() -> torch.Tensor:
        optimizer.step()
        return optimizer.grad_norm + optimizer.lr_tensor

    broken = torch.compile(step, backend="eager")
    for update in range(2):
        param.grad = torch.full((4,), update + 1.0)
        assert broken().tolist() == [2.0 * (update + 1) + RAMP(update)]
    torch._dynamo.reset()  # what was compiled for one is taken for the other
    with pytest.raises(torch._dynamo.exc.Unsupported):
        torch.compile(step, backend="eager", fullgraph=True)()


def test_grad_scaler_calls_a_compiled_step() -> None:
    counter = CompileCounterWithBackend("eager")
    param = torch.nn.Parameter(torch.ones(2))
    optimizer = FusedScheduledAdam([param], lr=RAMP)
    optimizer.step = torch.compile(optimizer.step, backend=counter, fullgraph=True)  # type: ignore[method-assign]
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=1)
    for factor in (1.0, float("inf"), 1.0, 1.0):
        scaler.scale((param * factor).sum()).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    assert counter.frame_count == 1
    assert optimizer.clock == 3
    assert param[0].item() == pytest.approx(1.0 - RAMP(0) - RAMP(1) - RAMP(2))


def test_errors_come_through_and_change_nothing(counter: CompileCounterWithBackend) -> None:
    param = ones(2)
    optimizer = FusedScheduledAdam([param], lr=0.25)
    optimizer.found_inf = torch.zeros(2)  # type: ignore[attr-defined]
    step = compiled_step(optimizer, counter)
    with pytest.raises(TypeError, match="found_inf must be a tensor of one element"):
        step()
    assert (param[0].item(), optimizer.clock) == (1.0, 0)
    assert torch.is_grad_enabled()


def test_other_parameters_in_the_groups_are_refused() -> None:
    """As engines put there for the time of a call. torch 2.11 runs a frame that raised as it is, which updates them."""
    param, flat = ones(2), ones(2)
    optimizer = FusedScheduledAdam([param], lr=0.25)
    optimizer.param_groups = [{**optimizer.param_groups[0], "params": [flat]}]
    step = compiled_step(optimizer)
    if torch.__version__.startswith("2.11."):
        step()
        assert (param[0].item(), flat[0].item()) == (1.0, 0.75)
        return
    with pytest.raises(RuntimeError, match="holds other parameters"):
        step()
    assert (param[0].item(), flat[0].item()) == (1.0, 1.0)


@pytest.mark.usefixtures("one_process")
def test_distributed_parameters_break_the_graph() -> None:
    mesh = init_device_mesh("cpu", (1,))
    param = torch.nn.Parameter(distribute_tensor(torch.ones(2), mesh, [Replicate()]))
    optimizer = FusedScheduledAdam([param], lr=0.25)
    step = torch.compile(lambda: optimizer.step(), backend="eager")
    for _ in range(2):
        param.grad = distribute_tensor(torch.ones(2), mesh, [Replicate()])
        step()
    assert param.to_local().tolist() == pytest.approx([0.5, 0.5])
    assert optimizer.clock == 2


def test_the_operator_is_declared_rightly() -> None:
    param = ones(3)
    optimizer = FusedScheduledAdam([param], lr=0.25)
    arguments = ([param.detach()], [torch.ones(3)], [0], optimizer._key, None, None, True)
    operator = torch.ops.fused_sched.step_.default
    torch.library.opcheck(
        operator, arguments, test_utils=("test_schema", "test_autograd_registration", "test_faketensor")
    )
    assert optimizer.clock >= 1
