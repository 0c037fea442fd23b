"""The precision ladder in training: exact where it says so, unbiased where it rounds, bit for bit on resume."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from cases import COMPRESSED, Case, Problem, assert_same, same_bits, snapshot, through_a_file
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


# ---- the same bits everywhere ----------------------------------------------------------------------------

COMBINATIONS = [
    pytest.param(dtype, master, moments, id=f"{str(dtype)[6:]}-{master}-{moments}")
    for dtype, masters in (
        (torch.bfloat16, tuple(codec.MASTERS)),
        (torch.float16, ("fp32",)),
        (torch.float32, ("none",)),
    )
    for master in masters
    for moments in codec.MOMENTS
]


@pytest.mark.parametrize(("dtype", "master", "moments"), COMBINATIONS)
def test_special_values_give_the_same_bits(
    dtype: torch.dtype, master: str, moments: str, beside_cpu: Backend, get_backend: Any
) -> None:
    specials = torch.tensor(SPECIALS, dtype=torch.float64).to(dtype)
    start, grad = torch.cartesian_prod(specials, specials).unbind(1)
    results = []
    for backend in (get_backend("cpu"), beside_cpu):
        param = backend.parameter(start, dtype)
        optimizer = backend.optimizer([param], lr=0.1, weight_decay=0.1, master=master, moments=moments)
        for turned in (False, True, False):  # other neighbours in a group
            param.grad = (grad.flip(0) if turned else grad).clone().to(backend.device)
            optimizer.step()
        results.append(snapshot(optimizer))
    assert_same(results[1], results[0])


@pytest.mark.parametrize(("dtype", "master", "moments"), COMBINATIONS)
def test_large_misaligned_tensors_give_the_same_bits(
    dtype: torch.dtype, master: str, moments: str, beside_cpu: Backend, get_backend: Any
) -> None:
    """More than a tile of the CPU's loops (512 elements) and a thread's share (32,768), beginning and ending anywhere,
    on one thread and on several."""

    def run(backend: Backend) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(6)

        def numbers(size: int, shift: int) -> torch.Tensor:
            return torch.randn(size + shift, generator=generator).to(backend.device, dtype)[shift:]

        params = [numbers(size, shift).requires_grad_() for size, shift in ((513, 1), (70_001, 3), (4_095, 0))]
        optimizer = backend.optimizer(params, lr=1e-2, weight_decay=0.1, master=master, moments=moments, seed=2)
        for shift in (0, 5):
            for param in params:
                param.grad = numbers(param.numel(), shift)
            optimizer.step()
        return snapshot(optimizer)

    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 5):
            torch.set_num_threads(threads)
            results.append(run(get_backend("cpu")))
    finally:
        torch.set_num_threads(before)
    assert_same(results[1], results[0])
    assert_same(run(beside_cpu), results[0])


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


@pytest.mark.parametrize("moments", list(codec.MOMENTS))
def test_replayed_call_draws_anew(moments: str, compiled: Backend) -> None:
    """A captured graph repeats one call with the arguments it was captured with: what is drawn follows the clock on the
    device, so that three replays are three updates."""
    runs = []
    for replayed in (True, False):
        param = compiled.parameter(torch.linspace(-2, 2, 500), torch.bfloat16)
        optimizer = compiled.optimizer([param], lr=schedules.linear(1e-3, 0.0, 9), master="stochastic", moments=moments)
        param.grad = torch.linspace(-1, 1, 500).to(param)
        optimizer.step()
        optimizer.step()
        (engine,) = optimizer._devices.engines.values()
        for _ in range(3):
            if replayed:
                engine._run(engine._module.step)  # type: ignore[attr-defined]
            else:
                optimizer.step()
        assert optimizer.clock == 5
        runs.append(snapshot(optimizer))
    assert_same(*runs)


# ---- edits -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("master", list(codec.MASTERS))
def test_edited_parameter_is_where_the_next_update_starts(master: str, backend: Backend) -> None:
    """Exactly, but for what a split master adds to it: at most half a last place, and it still rounds to it."""
    param = backend.parameter(torch.linspace(1, 2, 300), torch.bfloat16)
    optimizer = backend.optimizer([param], lr=1e-3, master=master)
    for _ in range(3):
        param.grad = torch.ones_like(param)
        optimizer.step()
    edited = torch.linspace(-4, -3, 300).to(param)
    with torch.no_grad():
        param.copy_(edited)
    exact = next(optimizer.fp32_params())
    if master.startswith("split"):
        assert bool(((exact - edited.float()).abs() <= 2.0**-7).all())
        assert not same_bits(exact, edited.float())
    else:
        assert same_bits(exact, edited.float())
    optimizer.param_groups[0]["lr"] = 0.0
    param.grad = torch.ones_like(param)
    optimizer.step()
    assert same_bits(param.detach(), edited)
    assert same_bits(next(optimizer.fp32_params()), exact)


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


@pytest.mark.parametrize("portable", [False, True], ids=["whole", "portable"])
@pytest.mark.parametrize("clock", [2**24, 2**24 + 3, 2**33 + 1])
def test_counts_beyond_float32_come_back(clock: int, portable: bool, backend: Backend) -> None:
    """Else the clock would move on by the difference, and a factor of the rate be taken for another optimizer's."""
    schedule = schedules.linear(1.0, 0.5, 2**34)

    def make() -> tuple[torch.Tensor, FusedScheduledAdam]:
        param = backend.parameter(torch.ones(20), torch.bfloat16)
        param.grad = torch.ones_like(param)
        return param, backend.optimizer([param], lr=schedule, moments="8bit")

    param, optimizer = make()
    optimizer.step()
    optimizer.set_clock(clock - 1)
    optimizer.state[param]["step_int64"].fill_(clock - 1)
    optimizer.state[param]["step"].fill_(clock - 1)
    optimizer.param_groups[0]["lr"] *= 0.25
    optimizer.step()
    saved = through_a_file(optimizer.state_dict(portable=portable))
    other, resumed = make()
    with torch.no_grad():
        other.copy_(param)
    resumed.load_state_dict(saved)
    assert resumed.clock == clock
    assert resumed.param_groups[0]["lr"] == 0.25
    assert_same(snapshot(resumed), snapshot(optimizer))
    for each in (optimizer, resumed):
        each.step()
    assert_same(snapshot(resumed), snapshot(optimizer))
    assert int(resumed.state[other]["step_int64"]) == resumed.clock == clock + 1
    if portable:
        theirs = torch.optim.AdamW([torch.nn.Parameter(torch.ones(20))])
        theirs.load_state_dict(saved)
        assert float(next(iter(theirs.state.values()))["step"]) == clock


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
