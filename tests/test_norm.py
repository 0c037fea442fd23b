"""The norm through the optimizer: the same bits whatever is done to it, over devices, and in CUDA graphs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from cases import assert_same, snapshot
from conftest import Backend
from model_gradients import model_gradients, set_grads, start
from waiting import without_waiting

from fused_sched import FusedScheduledAdam, packing, schedules
from fused_sched import norm as norms
from fused_sched.backends import select
from fused_sched.devices import Devices
from fused_sched.norm import NormSettings

nan = math.nan


# -- same bits ------------------------------------------------------------------------------------------------


def mixed_gradients() -> list[torch.Tensor]:
    """Every dtype, several chunks, sizes that are no multiple of anything."""
    generator = torch.Generator().manual_seed(5)
    sizes = (1, 130, 4097, 20_000, 0, 70_001)
    dtypes = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
    return [torch.randn(n, generator=generator).to(dtype) for n in sizes for dtype in dtypes]


def norm_of(backend: Backend, grads: list[torch.Tensor], **options: object) -> float:
    params = [torch.nn.Parameter(torch.zeros_like(g, device=backend.device)) for g in grads]
    set_grads(params, grads)
    optimizer = backend.optimizer(params, max_grad_norm=1.0, **options)
    optimizer.step()
    return optimizer.grad_norm.item()


def test_norm_has_the_bits_of_the_cpu(beside_cpu: Backend, get_backend: Callable[[str], Backend]) -> None:
    assert norm_of(beside_cpu, mixed_gradients()) == norm_of(get_backend("cpu"), mixed_gradients())


@pytest.fixture
def num_threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def test_norm_does_not_depend_on_threads_or_instruction_set(
    get_backend: Callable[[str], Backend], num_threads: Callable[[int], None]
) -> None:
    cpu = get_backend("cpu")
    module = select("cpu", cpu.device).module
    assert module is not None
    chosen = module.instruction_set()
    results = set()
    try:
        for name, supported in module.instruction_sets():
            if supported:
                module.set_instruction_set(name)
                for threads in (1, 2, 5):
                    num_threads(threads)
                    results.add(norm_of(cpu, mixed_gradients()))
    finally:
        module.set_instruction_set(chosen)
    assert len(results) == 1


def test_norm_does_not_depend_on_packing(compiled: Backend) -> None:
    """Parameter order decides, not the groups, the arenas, the alignment of gradients, or empty tensors between."""
    grads = [g for g in mixed_gradients() if g.numel()]
    wanted = norm_of(compiled, grads)

    def optimizer(groups: list[list[torch.nn.Parameter]]) -> FusedScheduledAdam:
        return compiled.optimizer([{"params": group} for group in groups], max_grad_norm=1.0)

    params = [torch.nn.Parameter(torch.zeros_like(g, device=compiled.device)) for g in grads]
    set_grads(params, grads)
    grouped = optimizer([params[:3], params[3:4], params[4:]])
    grouped.step()
    assert grouped.grad_norm.item() == wanted

    late = optimizer([params[:7]])
    late.step()
    late.add_param_group({"params": [compiled.parameter(torch.ones(0)), *params[7:]]})  # state in arenas of its own
    late.step()
    assert late.grad_norm.item() == wanted

    for p, g in zip(params, grads, strict=True):
        buffer = torch.zeros(g.numel() + 1, dtype=g.dtype, device=compiled.device)
        p.grad = buffer[1:].copy_(g)  # aligned to its element and no more
    shifted = optimizer([params])
    shifted.step()
    assert shifted.grad_norm.item() == wanted


def test_chunks_of_a_large_gradient(get_backend: Callable[[str], Backend]) -> None:
    """2^26 + 5 elements are 16,385 tiles: chunks double, and one more of five elements is left."""
    cpu = get_backend("cpu")
    module = select("cpu", cpu.device).module
    assert module is not None
    grad = torch.ones(2**26 + 5, dtype=torch.float16)
    rows = np.zeros(1, packing.layout_dtype(module, "tensor"))
    rows["numel"], rows["grad"], rows["grad_format"] = grad.numel(), grad.data_ptr(), module.FORMATS["fp16"]
    groups = np.zeros(1, packing.layout_dtype(module, "group"))
    memory = norms.NormMemory(module, cpu.device)
    call = module.Call()
    call.tensors, call.num_tensors = rows.ctypes.data, 1
    call.groups, call.num_groups = groups.ctypes.data, 1
    arena = np.full(len(module.SLOTS), 64, np.uint64)  # of state that the norm does not touch
    call.arenas, call.num_arenas = arena.ctypes.data, 1
    assert module.num_norm_chunks(call) == 8193
    memory.reserve(8193)
    call.norm, call.chunk_sums, call.norm_is_reduced, call.num_threads = memory.address, memory.sums_address, 1, 2
    module.norm(call)
    assert memory.squares.item() == grad.numel()


# -- several devices ------------------------------------------------------------------------------------------


def test_norm_is_that_of_all_devices(compiled: Backend) -> None:
    """Two engines of one kind stand for two devices; what each clips by, and whether it skips, is one decision."""
    if compiled.name == "cuda":
        pytest.skip("stood for by test_norm_over_cpu_and_cuda")
    grads = model_gradients()
    whole = start(compiled)
    reference = compiled.optimizer(whole, lr=1e-2, max_grad_norm=1.0, skip_nonfinite=True)
    parts = start(compiled)
    halves = (parts[:2], parts[2:])
    optimizers = [compiled.optimizer(half, lr=1e-2, max_grad_norm=1.0, skip_nonfinite=True) for half in halves]
    devices = Devices(compiled.name, 0, 0)
    for index, optimizer in enumerate(optimizers):
        set_grads(halves[index], grads[:2] if index == 0 else grads[2:])
        optimizer.step()  # lays out
        optimizer.set_clock(0)
        engine = optimizer._devices.first
        assert engine is not None
        devices.engines[torch.device("cpu", index)] = engine
    devices.push_norm(NormSettings(1.0, True))
    set_grads(whole, grads)
    reference.step()
    devices.step(True, None, None)
    assert [engine.read_clock() for engine in devices.engines.values()] == [1, 1]
    assert [e.grad_norm.item() for e in devices.engines.values()] == [pytest.approx(reference.grad_norm.item())] * 2
    assert parts[5].grad is not None
    parts[5].grad[0] = nan
    before = [p.detach().clone() for p in parts]
    devices.step(True, None, None)
    assert [engine.read_clock() for engine in devices.engines.values()] == [1, 1]
    assert all(torch.equal(p, q) for p, q in zip(parts, before, strict=True))


def test_reduce_sums_devices_then_processes() -> None:
    squares = [torch.tensor(float(n), dtype=torch.float64) for n in (1, 2, 4)]
    seen = []

    def hook(total: torch.Tensor) -> None:
        seen.append(total.item())
        total.mul_(10.0)

    norms.reduce(squares, hook)
    assert seen == [7.0]
    assert [s.item() for s in squares] == [70.0] * 3


@pytest.mark.cuda
def test_norm_over_cpu_and_cuda(get_backend: Callable[[str], Backend]) -> None:
    get_backend("cuda")
    a, b = torch.nn.Parameter(torch.zeros(2)), torch.nn.Parameter(torch.zeros(2, device="cuda"))
    optimizer = FusedScheduledAdam([a, b], lr=1.0, betas=(0.0, 0.0), eps=1.0, max_grad_norm=6.5)
    a.grad, b.grad = torch.tensor([3.0, 4.0]), torch.tensor([0.0, 12.0], device="cuda")
    optimizer.step()
    assert optimizer.grad_norm.item() == 13.0
    assert b[1].item() == pytest.approx(-6.0 / 7.0, rel=1e-6)
    assert a[1].item() == pytest.approx(-2.0 / 3.0, rel=1e-6)


# -- CUDA graphs ----------------------------------------------------------------------------------------------


@pytest.fixture
def cuda(get_backend: Callable[[str], Backend]) -> Backend:
    return get_backend("cuda")


def capture(optimizer: FusedScheduledAdam) -> torch.cuda.CUDAGraph:
    """Of one step; its tensors have been stepped before."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step()
    return graph


@pytest.mark.cuda
def test_replay_equals_eager_with_skips(cuda: Backend) -> None:
    """A whole schedule, clipping and skipping, bit for bit; the limit and the recorder follow."""
    lr = schedules.warmup_cosine(1e-2, warmup_steps=3, total_steps=30)
    results, histories = [], []
    for captured in (False, True):
        params = start(cuda)
        optimizer = cuda.optimizer(params, lr=lr, max_grad_norm=1.0, skip_nonfinite=True)
        set_grads(params, model_gradients(0))
        optimizer.step()
        graph = capture(optimizer) if captured else None
        for step in range(1, 40):
            for p, g in zip(params, model_gradients(step), strict=True):
                assert p.grad is not None
                p.grad.copy_(g if step % 7 else g * nan)
            if step == 20:
                optimizer.max_grad_norm = 0.1
                optimizer.push_hyperparameters()
            if graph is None:
                optimizer.step()
            else:
                graph.replay()
        results.append(snapshot(optimizer))
        histories.append(optimizer.history())
    assert_same(results[1], results[0])
    np.testing.assert_equal(histories[1].tolist(), histories[0].tolist())
    assert histories[0]["skipped"].sum() == 5


@pytest.mark.cuda
def test_steps_do_not_wait(cuda: Backend) -> None:
    params = start(cuda)
    optimizer = cuda.optimizer(params, lr=schedules.linear(1.0, 0.0, 200), max_grad_norm=1.0, skip_nonfinite=True)
    set_grads(params, model_gradients())
    optimizer.step()
    optimizer.history(asynchronous=True).result()  # page-locked memory, of which torch keeps the blocks
    with without_waiting(cuda.device):
        for _ in range(100):
            optimizer.step()
        future = optimizer.history(asynchronous=True)
    assert len(future.result()) == 101


@pytest.mark.cuda
@pytest.mark.filterwarnings("ignore:The CUDA Graph is empty:UserWarning")  # the refused step's
def test_option_edited_before_a_capture_is_refused(cuda: Backend) -> None:
    params = start(cuda)
    optimizer = cuda.optimizer(params, max_grad_norm=1.0)
    set_grads(params, model_gradients())
    optimizer.step()
    optimizer.max_grad_norm = 2.0
    graph = torch.cuda.CUDAGraph()
    with (
        pytest.raises(RuntimeError, match=r"call opt.push_hyperparameters\(\) before capturing"),
        torch.cuda.graph(graph),
    ):
        optimizer.step()
