"""The precision ladder in training: exact where it says so, unbiased where it rounds, bit for bit on resume."""

from __future__ import annotations

import io
import math
from typing import Any

import numpy as np
import pytest
import torch
from cases import COMPRESSED, Case, Problem, assert_same, same_bits, snapshot, values_of
from conftest import Backend

from fused_sched import FusedScheduledAdam, codec, conversion, schedules

SPECIALS = (0.0, -0.0, math.inf, -math.inf, math.nan, 1e-45, -1e-45, 1e-40, 1e-38, 3.4e38, -3.4e38, 1e-20, 1.0, -2.5)


def bf16(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64).to(torch.bfloat16)


def state_of(optimizer: torch.optim.Optimizer) -> tuple[torch.Tensor, dict[str, Any]]:
    param = optimizer.param_groups[0]["params"][0]
    return param, optimizer.state[param]


# ---- split16 is an fp32 master ---------------------------------------------------------------------------


@pytest.mark.parametrize("decoupled", [True, False], ids=["decoupled", "l2"])
def test_split16_is_an_fp32_master_for_a_thousand_updates(decoupled: bool, backend: Backend) -> None:
    """Parameters, masters and moments, bit for bit, from and under values of every kind."""
    start = torch.cat([torch.cartesian_prod(bf16(*SPECIALS), bf16(*SPECIALS))[:, 0], torch.randn(44).bfloat16()])
    generator = torch.Generator().manual_seed(1)
    scales = torch.tensor([1e-30, 1e-6, 1.0, 1e6])
    runs = []
    for master in ("fp32", "split16"):
        param = backend.parameter(start, torch.bfloat16)
        options = {"weight_decay": 0.1, "decoupled_weight_decay": decoupled, "master": master}
        runs.append(
            backend.optimizer([param], lr=schedules.warmup_cosine(3e-2, warmup_steps=20, total_steps=1000), **options)
        )
    for index in range(1000):
        grad = torch.randn(len(start), generator=generator) * scales[index % 4]
        if index == 0:
            grad[: len(SPECIALS) ** 2] = torch.cartesian_prod(bf16(*SPECIALS), bf16(*SPECIALS))[:, 1].float()
        for optimizer in runs:
            param, _ = state_of(optimizer)
            param.grad = grad.bfloat16().to(backend.device)
            optimizer.step()
    (exact, exact_state), (split, split_state) = map(state_of, runs)
    assert same_bits(split.detach(), exact.detach())
    rebuilt = conversion.exact_master(split, split_state)
    assert rebuilt is not None
    assert same_bits(rebuilt, exact_state["master"])
    for key in ("exp_avg", "exp_avg_sq", "step"):
        assert same_bits(split_state[key], exact_state[key])
    assert exact.isfinite().sum() >= 44


@pytest.mark.parametrize("tag", ["split16", "split8"])
def test_zeroed_parameter_beside_a_stale_remainder_restarts(tag: str, backend: Backend) -> None:
    """Pruning writes zeros into parameters; the halves together would be the bits of a NaN."""
    param = backend.parameter([1.0, 1.0, -1.0], torch.bfloat16)
    optimizer = backend.optimizer([param], lr=1e-3, betas=(0.0, 0.0), eps=0.0, master=tag)
    for grad in (1.0, 1.0):
        param.grad = torch.full_like(param, grad)
        optimizer.step()
    (stream,) = codec.MASTERS[tag]
    assert (optimizer.state[param][stream.name] != 0).all()
    with torch.no_grad():
        param[1], param[2] = 0.0, -0.0
    param.grad = torch.ones_like(param)
    optimizer.step()
    assert param.tolist()[1:] == bf16(-1e-3, -1e-3).tolist()


# ---- stochastic rounding in training ---------------------------------------------------------------------


@pytest.mark.parametrize("moments", ["bf16", "8bit"])
def test_second_moment_follows_a_small_constant_gradient(moments: str, backend: Backend) -> None:
    """Per update it moves by 0.001 of the way to go, less than a quarter of bfloat16's step: rounded to nearest, it
    would stay below half the way.

    One rounding has at most the variance (distance moved) x (step), (1 - beta2) u with u = 2^-8 or 2^-5 between 0.5 and
    1; earlier ones fade by beta2^2, so that n of them add up to less than u / 2. Mean of 4096 elements, five sigma.
    """
    updates = 2000 if backend.name == "cpu" else 200
    param = backend.parameter(torch.zeros(4096))
    optimizer = backend.optimizer([param], lr=1e-6, betas=(0.9, 0.999), moments=moments)
    param.grad = torch.ones_like(param)
    for _ in range(updates):
        optimizer.step()
    value = codec.decode_moment("exp_avg_sq", optimizer.state[param])
    assert value is not None
    expected = 1.0 - 0.999**updates
    unit = 2.0**-8 if moments == "bf16" else 2.0**-5
    assert abs(float(value.double().mean()) - expected) <= 5.0 * math.sqrt(unit / 2 / 4096)


def test_stochastic_parameter_collects_updates_too_small_for_it(backend: Backend) -> None:
    """16 updates of an eighth of a step move the mean by two steps: binomials, five sigma of 4096 elements."""
    param = backend.parameter(torch.ones(4096), torch.bfloat16)
    step = 2.0**-7
    optimizer = backend.optimizer([param], lr=step / 8, betas=(0.0, 0.0), eps=0.0, master="stochastic")
    param.grad = -torch.ones_like(param)
    for _ in range(16):
        optimizer.step()
    moved = float(param.detach().double().mean() - 1.0)
    assert abs(moved - 2 * step) <= 5 * step * math.sqrt(16 * (1 / 8) * (7 / 8) / 4096)
    assert "master" not in optimizer.state[param]


def test_seed_and_place_of_a_parameter_change_what_is_drawn(backend: Backend) -> None:
    def train(seed: int) -> FusedScheduledAdam:
        params = [backend.parameter(torch.ones(500), torch.bfloat16) for _ in range(2)]
        optimizer = backend.optimizer(params, lr=1e-4, master="stochastic", seed=seed)
        for _ in range(4):
            for param in params:
                param.grad = -torch.ones_like(param)
            optimizer.step()
        return optimizer

    first, again, other = (snapshot(train(seed)) for seed in (3, 3, -1))
    assert_same(again, first)
    assert not same_bits(first["0.param"], first["1.param"])
    assert not same_bits(first["0.param"], other["0.param"])


# ---- tails -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_tensor_ends_inside_a_group(dtype: torch.dtype, backend: Backend) -> None:
    """As if the group went on with zeros; nothing behind the tensor is read or written."""
    for numel in (1, 7, 15, 16, 17, 31, 100, 255, 300):
        values = torch.randn(numel, generator=torch.Generator().manual_seed(numel))
        buffer = torch.full((numel + 64,), 7.5, dtype=dtype, device=backend.device)
        whole = torch.zeros(-(-numel // 16) * 16, dtype=dtype, device=backend.device)
        part = buffer[:numel]
        part.copy_(values)
        whole[:numel] = part
        results = []
        for param in (part, whole):
            leaf = param.detach().requires_grad_()
            optimizer = backend.optimizer([leaf], lr=1e-2, eps=1e-6, moments="8bit")
            for _ in range(3):
                leaf.grad = torch.zeros_like(leaf)
                leaf.grad[:numel] = values.to(leaf)
                optimizer.step()
            results.append((leaf.detach()[:numel], optimizer.state[leaf]))
        (short, short_state), (long, long_state) = results
        assert same_bits(short, long)
        assert same_bits(short_state["exp_avg_code"], long_state["exp_avg_code"][:numel])
        assert same_bits(short_state["exp_avg_scale"], long_state["exp_avg_scale"])
        assert (buffer[numel:] == 7.5).all()


# ---- resume ----------------------------------------------------------------------------------------------


def through_a_file(value: Any) -> Any:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


@pytest.mark.parametrize("case", COMPRESSED, ids=str)
def test_resumed_far_into_training(case: Case, backend: Backend) -> None:
    """Train 4 == train 2, save, load, train 2; the clock and the counts of steps are beyond what float32 counts."""
    clock = 2**24 if case.options["moments"] == "bf16" else 2**40
    problem = Problem(case, backend.device)
    optimizer = problem.optimizer(backend.name)
    problem.run(optimizer, 1)
    optimizer.set_clock(clock - 2)
    for param in problem.params:
        optimizer.state[param]["step_int64"].fill_(clock - 2)
        optimizer.state[param]["step"].fill_(clock - 2)
    problem.run(optimizer, 2)
    saved, weights = through_a_file(optimizer.state_dict()), [p.detach().clone() for p in problem.params]
    problem.run(optimizer, 2)

    again = Problem(case, backend.device)
    for _ in range(3):
        again.set_grads()
    with torch.no_grad():
        for param, weight in zip(again.params, weights, strict=True):
            param.copy_(weight)
    resumed = again.optimizer(backend.name)
    resumed.load_state_dict(saved)
    again.run(resumed, 2)
    assert resumed.clock == clock + 2
    assert int(resumed.state[again.params[0]]["step_int64"]) == clock + 2
    assert_same(snapshot(resumed), snapshot(optimizer))


def test_compressed_state_is_saved_as_it_is(backend: Backend) -> None:
    param = backend.parameter(torch.ones(4096), torch.bfloat16)
    optimizer = backend.optimizer([param], master="split8", moments="8bit")
    param.grad = torch.ones_like(param)
    optimizer.step()
    saved = through_a_file(optimizer.state_dict())["state"][0]
    streams = {key: value for key, value in saved.items() if isinstance(value, torch.Tensor) and value.numel() > 1}
    assert {key: value.dtype for key, value in streams.items()} == {
        "exp_avg_code": torch.uint8,
        "exp_avg_sq_code": torch.uint8,
        "exp_avg_scale": torch.uint8,
        "exp_avg_sq_scale": torch.uint8,
        "master_correction": torch.int8,
    }
    assert sum(value.nbytes for value in streams.values()) == 3.125 * 4096


# ---- from one format to another --------------------------------------------------------------------------

FORMATS = [
    (master, moments) for master in ("none", "fp32", "split16", "split8") for moments in ("fp32", "bf16", "8bit")
]


def trained(backend: Backend, master: str, moments: str, updates: int = 5) -> FusedScheduledAdam:
    param = backend.parameter(torch.linspace(-2, 2, 100), torch.bfloat16)
    optimizer = backend.optimizer([param], lr=1e-3, master=master, moments=moments)
    generator = torch.Generator().manual_seed(2)
    for _ in range(updates):
        param.grad = torch.randn(100, generator=generator).to(param)
        optimizer.step()
    return optimizer


@pytest.mark.parametrize("source", FORMATS, ids="-".join)
@pytest.mark.parametrize("target", FORMATS, ids="-".join)
def test_state_is_converted_to_the_live_formats(
    source: tuple[str, str], target: tuple[str, str], get_backend: Any
) -> None:
    """Moments to nearest, within the target's bound; masters exactly where the target can hold them."""
    backend = get_backend("cpu")
    first, second = trained(backend, *source), trained(backend, *target, updates=0)
    param, state = state_of(first)
    live, _ = state_of(second)
    with torch.no_grad():
        live.copy_(param)
    saved = through_a_file(first.state_dict())
    second.load_state_dict(saved)
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
    if target[0] == "none":
        assert kept is None
    else:
        assert kept is not None
        wanted = param.float() if exact is None else exact
        # split8 rounds twice: a master just below a tie can round to another parameter, beside which it keeps nothing.
        bound = 2.0**-8 if target[0] == "split8" and source[0] != "split8" else 0.0
        assert bool(((kept - wanted).abs() <= bound * wanted.abs()).all())
        assert float(((kept - wanted).abs() <= 2.0**-16 * wanted.abs()).float().mean()) > 0.95
    if source == target:
        assert_same(snapshot(second), snapshot(first))


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


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("exp_avg_code", torch.zeros(100), "must be a torch.uint8 tensor of shape"),
        ("exp_avg_code", torch.zeros(99, dtype=torch.uint8), "of shape \\(100,\\)"),
        ("exp_avg_scale", torch.zeros(100, dtype=torch.uint8), "of shape \\(7,\\)"),
        ("exp_avg_sq_scale", None, "give both"),
        ("master_remainder", torch.zeros(100, dtype=torch.int32), "must be a torch.int16 tensor"),
    ],
)
def test_codes_that_do_not_fit_are_refused(key: str, value: Any, message: str, backend: Backend) -> None:
    optimizer = trained(backend, "split16", "8bit")
    saved = through_a_file(optimizer.state_dict())
    before = snapshot(optimizer)
    if value is None:
        del saved["state"][0][key]
    else:
        saved["state"][0][key] = value
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(saved)
    assert_same(snapshot(optimizer), before)


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
    old = conversion.portable(param, state)["exp_avg"]
    new = conversion.portable(other, other_optimizer.state[other])["exp_avg"]
    # To nearest in groups of other neighbours: half a step of a value, or of the group's smallest normal code.
    assert bool(((new - old).abs() <= 2.0**-4 * old.abs() + 2.0**-17 * old.abs().max()).all())
