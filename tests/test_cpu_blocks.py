"""Blocks of 64 elements in AVX-512 registers give the bits of the loops that the other instruction sets run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import product

import pytest
import torch
from cases import assert_same, set_grad, snapshot
from conftest import Backend

NAMES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
MASTERS = {"fp32": ("none",), "bf16": ("none", "fp32", "split16", "split8", "stochastic"), "fp16": ("none", "fp32")}
COMBINATIONS = [(dtype, master) for dtype in MASTERS for master in MASTERS[dtype]]

#: Elements: several runs of blocks, and a tail that is neither a block nor a group.
NUMEL = 64 * 1100 + 45

Step = Callable[[str], dict[str, torch.Tensor]]


@pytest.fixture
def instruction_sets(get_backend: Callable[[str], Backend]) -> Iterator[tuple[str, ...]]:
    """Those that can run here; the loops of the last one are nobody's special case."""
    get_backend("cpu")
    from fused_sched import _cpu

    before = _cpu.instruction_set()
    yield tuple(name for name, supported in _cpu.instruction_sets() if supported)
    _cpu.set_instruction_set(before)


def patterns(numel: int, dtype: torch.dtype, seed: int, special: bool) -> torch.Tensor:
    """Values of every magnitude, subnormals and zeros of both signs; special: one block in 20 with what is
    not finite, or makes a moment so."""
    generator = torch.Generator().manual_seed(seed)
    exponent = torch.randint(-140, 60, (numel,), generator=generator).double()
    values = (torch.randn(numel, generator=generator).double() * 2.0**exponent).to(dtype)
    ordinary = torch.rand(numel, generator=generator) < 0.7
    values[ordinary] = torch.randn(int(ordinary.sum()), generator=generator).to(dtype)
    values[torch.rand(numel, generator=generator) < 0.05] = 0.0
    values[torch.rand(numel, generator=generator) < 0.01] *= -0.0
    values = torch.where(values.isfinite(), values, torch.ones((), dtype=dtype))
    if special:
        at = torch.randperm(numel, generator=generator)[: numel // 64 // 20]
        odd = torch.tensor([float("inf"), float("-inf"), float("nan"), 1e30])  # the last one's square is infinite
        values[at] = odd.to(dtype).repeat(len(at))[: len(at)]
    return values


def steps_of(
    backend: Backend,
    dtype: str,
    master: str,
    moments: str,
    grad: str,
    special: bool,
    numel: int = NUMEL,
    **options: object,
) -> dict[str, torch.Tensor]:
    param = torch.nn.Parameter(patterns(numel, NAMES[dtype], 1, special=False))
    optimizer = backend.optimizer([param], lr=1e-2, master=master, moments=moments, seed=3, **options)
    states = {}
    for step in range(3):
        set_grad(param, patterns(numel, NAMES[grad], 10 + step, special and step == 1))
        optimizer.step()
        states |= {f"{step}.{key}": value for key, value in snapshot(optimizer).items()}
    return states


def compare(instruction_sets: tuple[str, ...], run: Callable[[], dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    from fused_sched import _cpu

    results = []
    for name in instruction_sets:
        _cpu.set_instruction_set(name)
        results.append(run())
    for result in results[:-1]:
        assert_same(result, results[-1])
    return results[-1]


@pytest.mark.parametrize("moments", ["fp32", "bf16", "8bit"])
@pytest.mark.parametrize(("dtype", "master"), COMBINATIONS)
def test_values_of_every_kind(
    instruction_sets: tuple[str, ...], get_backend: Callable[[str], Backend], dtype: str, master: str, moments: str
) -> None:
    backend = get_backend("cpu")
    for grad, special in product(NAMES, (False, True)):
        compare(instruction_sets, lambda: steps_of(backend, dtype, master, moments, grad, special))  # noqa: B023


def test_more_than_caches_hold(instruction_sets: tuple[str, ...], get_backend: Callable[[str], Backend]) -> None:
    """From 2^22 elements on blocks ask for memory ahead."""
    backend = get_backend("cpu")
    sets = instruction_sets[:-1]  # the last one, without fused multiply-adds, would take seconds
    if len(sets) < 2:
        pytest.skip("one instruction set")
    compare(sets, lambda: steps_of(backend, "bf16", "split8", "8bit", "fp32", special=True, numel=(1 << 22) + 45))


@pytest.mark.parametrize("moments", ["bf16", "8bit"])
@pytest.mark.parametrize(
    "options",
    [
        {"weight_decay": 0.1},
        {"weight_decay": 0.1, "decoupled_weight_decay": False},
        {"weight_decay": 0.0, "maximize": True},
        {"betas": (0.3, 0.4), "weight_decay": 0.1},
        {"betas": (0.0, 0.99)},
        {"lr": 0.0},
    ],
    ids=str,
)
def test_options(
    instruction_sets: tuple[str, ...], get_backend: Callable[[str], Backend], options: dict[str, object], moments: str
) -> None:
    backend = get_backend("cpu")

    def run() -> dict[str, torch.Tensor]:
        chosen = {"lr": 1e-2, **options}
        param = torch.nn.Parameter(patterns(NUMEL, torch.bfloat16, 1, special=False))
        optimizer = backend.optimizer([param], master="split16", moments=moments, seed=3, **chosen)
        for step in range(3):
            param.grad = patterns(NUMEL, torch.bfloat16, 10 + step, special=step == 1)
            optimizer.step()
        return snapshot(optimizer)

    compare(instruction_sets, run)


@pytest.mark.parametrize("first_scales", [256, 127])
def test_any_state_of_8_bits(
    instruction_sets: tuple[str, ...], get_backend: Callable[[str], Backend], first_scales: int
) -> None:
    """Every code with every scale, NaNs and the scales of the largest floats, of subnormals and of nothing (above 240)
    among them; parameters and remainders of any bits, misaligned ones. first_scales: those below; blocks do not take
    first moments of scales from 127 on."""
    backend = get_backend("cpu")

    def run() -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(5)

        def any_bits(numel: int, low: int, high: int, dtype: torch.dtype) -> torch.Tensor:
            return torch.randint(low, high, (numel,), generator=generator).to(dtype)

        memory = any_bits(NUMEL + 1, -(2**15), 2**15, torch.int16).view(torch.bfloat16)
        params = [torch.nn.Parameter(memory[1:]), torch.nn.Parameter(memory[:-1].clone())]
        optimizer = backend.optimizer(params, lr=1e-2, master="split8", moments="8bit", seed=1)
        for param in params:
            param.grad = torch.zeros_like(param)
        optimizer.step()
        for param in params:
            state = optimizer.state[param]
            for name in ("exp_avg_code", "exp_avg_sq_code"):
                state[name].copy_(any_bits(NUMEL, 0, 256, torch.uint8).view(state[name].shape))
            groups = torch.arange(state["exp_avg_scale"].numel())
            state["exp_avg_scale"].copy_(groups.remainder(first_scales).to(torch.uint8))
            state["exp_avg_sq_scale"].copy_((groups // 4).remainder(256).to(torch.uint8))  # one for a block
            state["master_correction"].copy_(any_bits(NUMEL, -128, 128, torch.int8))
            # Codes of NaN in a few blocks only, or no block is left to look at.
            rare = torch.arange(NUMEL) // 64 % 10 != 0
            for name, magnitude, code in (("exp_avg_code", 0x7F, 0x7F), ("exp_avg_sq_code", 0xFF, 0xFF)):
                state[name][(state[name] & magnitude == code) & rare] = 1
            param.grad = torch.randn(NUMEL, generator=generator).bfloat16()
        optimizer.step()
        return snapshot(optimizer)

    assert compare(instruction_sets, run)


@pytest.mark.parametrize("master", ["fp32", "split16", "split8", "stochastic"])
def test_parameters_edited_outside(
    instruction_sets: tuple[str, ...], get_backend: Callable[[str], Backend], master: str
) -> None:
    """A third of the elements no longer rounds to what was kept beside them."""
    backend = get_backend("cpu")

    def run() -> dict[str, torch.Tensor]:
        param = torch.nn.Parameter(patterns(NUMEL, torch.bfloat16, 1, special=False))
        optimizer = backend.optimizer([param], lr=1e-2, master=master, moments="8bit", seed=3)
        for step in range(2):
            param.grad = patterns(NUMEL, torch.bfloat16, 10 + step, special=False)
            optimizer.step()
            param.data[::3] = patterns(NUMEL, torch.bfloat16, 20 + step, special=False)[::3]
        param.grad = patterns(NUMEL, torch.bfloat16, 12, special=False)
        optimizer.step()
        return snapshot(optimizer)

    compare(instruction_sets, run)


def test_scales_at_their_bounds(instruction_sets: tuple[str, ...], get_backend: Callable[[str], Backend]) -> None:
    """Groups whose largest moment is the last of its scale or the first of the next; of zeros; of tiny values only."""
    # 1.75 and 1.875 times a power of two are the last of a scale. The first moment is 0.5 x 3.5 and the second
    # 0.46875 x 2^2, and those of the next floats.
    bounds = torch.tensor([3.5, 2.0]).repeat_interleave(9).view(torch.int32)
    near = (bounds + torch.arange(-4, 5, dtype=torch.int32).repeat(2)).view(torch.float32)
    grad = torch.zeros(160, 18, 16)
    grad[:80, :, 3] = near * 2.0 ** torch.arange(-40, 40).view(80, 1)
    grad[80:120] = torch.randn(40, 18, 16, generator=torch.Generator().manual_seed(1)) * 2.0**-122
    backend = get_backend("cpu")

    def run() -> dict[str, torch.Tensor]:
        param = torch.nn.Parameter(torch.ones(grad.numel()))
        optimizer = backend.optimizer([param], lr=1e-2, betas=(0.5, 0.53125), moments="8bit", seed=3)
        param.grad = grad.flatten().clone()
        optimizer.step()
        return snapshot(optimizer)

    scales = {name: scale for name, scale in compare(instruction_sets, run).items() if name.endswith("scale")}
    assert len(scales) == 2
    assert all(scale[-40 * 18 :].max() == 0 for scale in scales.values())
