"""State from one format into another: by loading, by changing a group's option, by writing to `state[p]`."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from cases import assert_same, same_bits, snapshot, through_a_file, values_of
from conftest import Backend

from fused_sched import FusedScheduledAdam, codec, conversion, precision


def state_of(optimizer: torch.optim.Optimizer) -> tuple[torch.Tensor, dict[str, Any]]:
    param = optimizer.param_groups[0]["params"][0]
    return param, optimizer.state[param]


def formats_of(dtype: torch.dtype) -> list[tuple[str, str]]:
    masters = {precision.resolve_master("auto", dtype)}
    for master in codec.MASTERS:
        try:
            masters.add(precision.resolve_master(master, dtype))
        except ValueError:
            continue
    return [(master, moments) for master in sorted(masters) for moments in codec.MOMENTS]


#: From every format into every other.
CONVERSIONS = [
    pytest.param(dtype, source, target, id=f"{str(dtype)[6:]}-{'+'.join(source)}-{'+'.join(target)}")
    for dtype in (torch.bfloat16, torch.float16, torch.float32)
    for source in formats_of(dtype)
    for target in formats_of(dtype)
]


def trained(
    backend: Backend,
    master: str,
    moments: str,
    updates: int = 5,
    dtype: torch.dtype = torch.bfloat16,
    numel: int = 100,
) -> FusedScheduledAdam:
    param = backend.parameter(torch.linspace(-2, 2, numel), dtype)
    optimizer = backend.optimizer([param], lr=1e-3, master=master, moments=moments)
    generator = torch.Generator().manual_seed(2)
    for _ in range(updates):
        param.grad = torch.randn(numel, generator=generator).to(param)
        optimizer.step()
    return optimizer


@pytest.mark.parametrize(("dtype", "source", "target"), CONVERSIONS)
def test_state_is_converted_to_the_live_formats(
    dtype: torch.dtype, source: tuple[str, str], target: tuple[str, str], get_backend: Any
) -> None:
    """Moments to nearest, within the target's bound; masters exactly where the target can hold them."""
    backend = get_backend("cpu")
    first = trained(backend, *source, dtype=dtype, numel=4096)
    second = trained(backend, *target, dtype=dtype, numel=4096, updates=0)
    param, state = state_of(first)
    live, _ = state_of(second)
    with torch.no_grad():
        live.copy_(param)
    second.load_state_dict(through_a_file(first.state_dict()))
    new = second.state[live]
    # To nearest: half of a code's step, of a value or of 2^-14 of the power of two that covers its group.
    relative = {"fp32": 0.0, "bf16": 2.0**-8, "8bit": 2.0**-4}[target[1]]
    for name in ("exp_avg", "exp_avg_sq"):
        old_value, new_value = codec.decode_moment(name, state), codec.decode_moment(name, new)
        assert old_value is not None
        assert new_value is not None
        error = np.abs(values_of(new_value.float()) - values_of(old_value.float()))
        largest = np.abs(values_of(old_value.float())).max()
        assert np.all(
            error <= relative * np.abs(values_of(old_value.float())) + (relative > 2.0**-8) * largest * 2.0**-16
        )
    exact, kept = conversion.exact_master(param, state), conversion.exact_master(live, new)
    if target[0] in ("none", "stochastic"):
        assert kept is None
    else:
        assert kept is not None
        wanted = param.float() if exact is None else exact
        # split8: half a unit of 16 digits, or a whole one where a master just below a tie meets the parameter below.
        bound = 2.0**-15 if target[0] == "split8" and source[0] != "split8" else 0.0
        assert bool(((kept - wanted).abs() <= bound * wanted.abs()).all())
    if source == target:
        assert_same(snapshot(second), snapshot(first))


@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("target", formats_of(torch.bfloat16), ids="+".join)
def test_conversions_whatever_the_default_dtype_is(
    target: tuple[str, str], default: torch.dtype, get_backend: Any
) -> None:
    """torch.set_default_dtype decides for what is made without a dtype."""
    backend = get_backend("cpu")
    saved = {portable: trained(backend, "fp32", "fp32").state_dict(portable=portable) for portable in (False, True)}
    results = []
    before = torch.get_default_dtype()
    for dtype in (before, default):
        loaded = [trained(backend, *target, updates=0) for _ in saved]
        torch.set_default_dtype(dtype)
        try:
            for optimizer, portable in zip(loaded, saved, strict=True):
                optimizer.load_state_dict(saved[portable])
                model = torch.nn.ParameterList([optimizer.param_groups[0]["params"][0]])
                optimizer.load_fp32_state_dict(model, optimizer.fp32_state_dict(model))
        finally:
            torch.set_default_dtype(before)
        results.append([snapshot(optimizer) for optimizer in loaded])
    for actual, expected in zip(*results, strict=True):
        assert_same(actual, expected)


def rounded_to_even(weight: torch.Tensor) -> torch.Tensor:
    return weight.to(torch.bfloat16)


def rounded_for(master: str, weight: torch.Tensor) -> torch.Tensor:
    return codec.encode_master(master, weight, torch.bfloat16)[0]


@pytest.mark.parametrize("master", ["split16", "split8"])
@pytest.mark.parametrize("rounded_by", ["even", "split16", "split8"])
def test_master_beside_a_parameter_that_others_rounded(master: str, rounded_by: str) -> None:
    """All lower halves at upper ones of every kind; checkpoints of others round ties to even."""
    upper = torch.tensor([0x0000, 0x0001, 0x0080, 0x3F80, 0x3F81, 0x3FFF, 0x7F7E, 0x7F7F, 0xBF80, 0xFF7E])
    bits = (upper[:, None] << 16 | torch.arange(1 << 16)).reshape(-1)
    weight = bits.to(torch.int32).view(torch.float32)
    param = rounded_to_even(weight) if rounded_by == "even" else rounded_for(rounded_by, weight)
    kept = codec.encode_beside(master, weight, param)
    back = codec.decode_master(master, param, {codec.MASTERS[master][0].name: kept})
    distance = (back.view(torch.int32).long() - weight.view(torch.int32).long()).abs()
    finite = back.isfinite()
    if rounded_by == master:  # the master's own rounding: as it encodes
        assert same_bits(kept, codec.encode_master(master, weight, torch.bfloat16)[1])
    # In last places of float32, of which 24 bits leave out eight; more only where what can be kept ends.
    usual = 0 if master == "split16" else 1 << 7
    most = {"even": 1, "split16": 0, "split8": 1 << 7}[rounded_by] if master == "split16" else 1 << 8
    assert bool((distance[finite] <= most).all())
    assert float((distance[finite] <= usual).double().mean()) > 0.99
    assert bool(back[~finite].isinf().all())
    assert bool((weight[~finite].abs() >= 2.0**128 - 2.0**111).all()), "half a unit of 16 digits below infinity"


@pytest.mark.parametrize("master", ["split16", "split8"])
def test_master_of_an_edited_parameter_starts_from_it(master: str) -> None:
    weight = torch.tensor([1.0, 1.0, -1.0, 0.5, float("nan"), 1e-45, 3.4e38])
    param = torch.tensor([1.0 + 2.0**-7, -1.0, 1.0, 0.0, 1.0, -0.0, float("-inf")], dtype=torch.bfloat16)
    assert not codec.encode_beside(master, weight, param).any()


def test_from_adamw_and_back_through_the_smallest_state(backend: Backend) -> None:
    """A float32 model of torch's AdamW goes on in bfloat16 with split8 and 8-bit moments, and back."""
    generator = torch.Generator().manual_seed(3)

    def model(dtype: torch.dtype) -> torch.nn.Linear:
        torch.manual_seed(4)
        return torch.nn.Linear(40, 30).to(backend.device, dtype)

    def train(model: torch.nn.Module, optimizer: torch.optim.Optimizer, updates: int) -> None:
        for _ in range(updates):
            for param in model.parameters():
                param.grad = torch.randn(param.shape, generator=generator).to(param)
            optimizer.step()

    wide, narrow, again = model(torch.float32), model(torch.bfloat16), model(torch.float32)
    theirs = torch.optim.AdamW(wide.parameters(), lr=1e-3, amsgrad=False)
    train(wide, theirs, 5)
    ours = backend.optimizer(narrow.parameters(), master="split8", moments="8bit")
    ours.load_state_dict(through_a_file(theirs.state_dict()))
    ours.load_fp32_state_dict(narrow, through_a_file(wide.state_dict()))
    assert (ours.clock, ours.param_groups[0]["lr"], ours.bytes_per_param() < 4.0) == (5, 1e-3, True)
    for old, new in zip(wide.parameters(), ours.fp32_params(), strict=True):
        assert bool(((new - old).abs() <= 2.0**-16 * old.abs()).all())
    for old, new in zip(wide.parameters(), narrow.parameters(), strict=True):
        for name in ("exp_avg", "exp_avg_sq"):
            value, expected = conversion.portable(new, ours.state[new], 1)[name], theirs.state[old][name]
            assert bool(((value - expected).abs() <= 2.0**-4 * expected.abs() + 2.0**-16 * expected.abs().max()).all())
    train(narrow, ours, 3)
    exact = ours.fp32_state_dict(narrow)
    again.load_state_dict(through_a_file(exact))
    back = torch.optim.AdamW(again.parameters())
    back.load_state_dict(through_a_file(ours.state_dict(portable=True)))
    for mine, its in zip(narrow.parameters(), again.parameters(), strict=True):
        values = conversion.portable(mine, ours.state[mine], 1)
        assert same_bits(back.state[its]["exp_avg"], values["exp_avg"])
        assert same_bits(back.state[its]["exp_avg_sq"], values["exp_avg_sq"])
        assert float(back.state[its]["step"]) == 8
    train(again, back, 1)
    third = backend.optimizer(narrow.parameters(), master="split8", moments="8bit")
    third.load_state_dict(through_a_file(back.state_dict()))
    third.load_fp32_state_dict(narrow, again.state_dict())
    assert third.clock == 9
    assert all(bool(p.isfinite().all()) for p in third.fp32_params())


def test_format_changed_in_the_group_converts_state(backend: Backend) -> None:
    optimizer = trained(backend, "split16", "fp32")
    param, state = state_of(optimizer)
    exact = conversion.exact_master(param, state)
    assert exact is not None
    optimizer.param_groups[0].update(master="fp32", moments="8bit", lr=0.0)
    param.grad = torch.zeros_like(param)
    optimizer.step()
    assert same_bits(state["master"], exact)
    assert "master_remainder" not in state
    assert "exp_avg" not in state
    assert state["exp_avg_code"].dtype == torch.uint8


def test_moment_written_over_codes_wins(backend: Backend) -> None:
    optimizer = trained(backend, "split16", "8bit")
    param, state = state_of(optimizer)
    state["exp_avg_sq"] = torch.full_like(param, 4.0, dtype=torch.float32)
    optimizer.param_groups[0].update(betas=(0.9, 0.0))
    param.grad = torch.full_like(param, 2.0)
    optimizer.step()
    value = codec.decode_moment("exp_avg_sq", state)
    assert value is not None
    assert (value == 4.0).all()


def test_scales_follow_the_order_of_memory(backend: Backend) -> None:
    """A channels-last parameter's codes keep their order through a file, and are converted into another order."""

    def make(memory_format: torch.memory_format) -> tuple[torch.Tensor, FusedScheduledAdam]:
        values = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(5)) * torch.logspace(-3, 3, 5)
        param = torch.nn.Parameter(values.to(backend.device).contiguous(memory_format=memory_format))
        return param, backend.optimizer([param], lr=1e-3, moments="8bit")

    param, optimizer = make(torch.channels_last)
    for _ in range(3):
        param.grad = param.detach().clone()
        optimizer.step()
    saved = through_a_file(optimizer.state_dict())
    state = optimizer.state[param]
    same, same_optimizer = make(torch.channels_last)
    same_optimizer.load_state_dict(saved)
    for key in ("exp_avg_code", "exp_avg_scale", "exp_avg_sq_code", "exp_avg_sq_scale"):
        assert same_bits(same_optimizer.state[same][key], state[key])
    other, other_optimizer = make(torch.contiguous_format)
    other_optimizer.load_state_dict(saved)
    old = conversion.portable(param, state, 1)["exp_avg"]
    new = conversion.portable(other, other_optimizer.state[other], 1)["exp_avg"]
    # To nearest in groups of other neighbours: half a step of a value, or of the group's smallest normal code.
    assert bool(((new - old).abs() <= 2.0**-4 * old.abs() + 2.0**-17 * old.abs().max()).all())
