"""Parameters at full precision: read, exported and set exactly, whatever format keeps them."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import pytest
import torch
from cases import assert_same, same_bits, snapshot, through_a_file
from conftest import Backend
from torch import nn

from fused_sched import FusedScheduledAdam, codec, conversion, schedules

BF16_MASTERS = ("fp32", "split16", "split8", "stochastic", "none")
EXACT = ("fp32", "split16")


class Tied(nn.Module):
    """Two names of one weight, a frozen parameter, buffers of two kinds, and parameters in other orders of memory."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 6)
        self.conv = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
        self.norm = nn.BatchNorm1d(6)
        self.head = nn.Linear(6, 7)
        self.head.weight = self.embedding.weight
        self.frozen = nn.Parameter(torch.linspace(0, 1, 5), requires_grad=False)


def trained(
    backend: Backend, dtype: torch.dtype, master: str, updates: int = 3, seed: int = 0
) -> tuple[Tied, FusedScheduledAdam]:
    torch.manual_seed(seed)
    model = Tied().to(backend.device, dtype)
    lr = schedules.warmup_cosine(1e-3, warmup_steps=2, total_steps=20)
    optimizer = backend.optimizer(model.parameters(), lr=lr, weight_decay=0.1, master=master)
    train(model, optimizer, updates)
    return model, optimizer


def train(model: nn.Module, optimizer: FusedScheduledAdam, updates: int, seed: int = 1) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(updates):
        for param in model.parameters():
            if param.requires_grad:
                param.grad = torch.randn(param.shape, generator=generator).to(param)
        optimizer.step()


# ---- reading ---------------------------------------------------------------------------------------------


def test_exact_values_of_all_exact_masters_are_the_same(backend: Backend) -> None:
    """fp32 keeps the value itself: it is the measure of split16's; split8 is within its bound of 2^-16 per update."""
    _, exact = trained(backend, torch.bfloat16, "fp32")
    model, split = trained(backend, torch.bfloat16, "split16")
    _, short = trained(backend, torch.bfloat16, "split8")
    masters = [exact.state[p].get("master", p.float()) for p in exact.param_groups[0]["params"]]
    for param, whole, ours, shorter in zip(
        model.parameters(), masters, split.fp32_params(), short.fp32_params(), strict=True
    ):
        assert ours.dtype == torch.float32
        assert same_bits(ours, whole)
        assert ours.stride() == param.stride()
        assert bool(((shorter - whole).abs() <= 3 * 2.0**-16 * whole.abs() + 1e-6).all())
    assert any(not same_bits(p.float(), v) for p, v in zip(model.parameters(), split.fp32_params(), strict=True))


@pytest.mark.parametrize("master", BF16_MASTERS)
def test_before_the_first_step_the_parameter_is_the_exact_value(master: str, backend: Backend) -> None:
    model, optimizer = trained(backend, torch.bfloat16, master, updates=0)
    for param, value in zip(model.parameters(), optimizer.fp32_params(), strict=True):
        assert same_bits(value, param.detach().float())
    assert not optimizer.state, "asking makes no state"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_wide_parameters_are_what_they_hold(dtype: torch.dtype, backend: Backend) -> None:
    model, optimizer = trained(backend, dtype, "auto")
    for param, value in zip(model.parameters(), optimizer.fp32_params(), strict=True):
        assert value.dtype == dtype
        assert same_bits(value, param.detach())
        assert value.data_ptr() != param.data_ptr()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_edited_parameter_wins_over_its_master(dtype: torch.dtype, backend: Backend) -> None:
    model, optimizer = trained(backend, dtype, "fp32")
    before = optimizer.fp32_state_dict(model)
    with torch.no_grad():
        model.head.bias[0] = 3.0
    after = optimizer.fp32_state_dict(model)
    assert after["head.bias"][0] == 3.0
    after["head.bias"][0] = before["head.bias"][0]
    for name, value in after.items():
        assert same_bits(value, before[name])


# ---- a model's state dict --------------------------------------------------------------------------------


def test_state_dict_is_the_models_with_whole_parameters(backend: Backend) -> None:
    model, optimizer = trained(backend, torch.bfloat16, "split16")
    whole, narrow = optimizer.fp32_state_dict(model), model.state_dict()
    assert list(whole) == list(narrow)
    assert whole["head.weight"] is whole["embedding.weight"]
    assert whole["norm.running_mean"].dtype == torch.bfloat16, "buffers are as they are"
    assert whole["norm.num_batches_tracked"].dtype == torch.int64
    assert same_bits(whole["frozen"], narrow["frozen"].float())
    names = {id(param): name for name, param in model.named_parameters()}
    for param, value in zip(optimizer.param_groups[0]["params"], optimizer.fp32_params(), strict=True):
        assert same_bits(whole[names[id(param)]], value)
    saved = through_a_file(whole)
    reference = Tied().to(backend.device)
    reference.load_state_dict(saved)
    assert same_bits(reference.head.weight.detach(), whole["embedding.weight"]), "any model in float32 loads it"


def test_state_dict_is_a_copy(backend: Backend) -> None:
    for dtype in (torch.bfloat16, torch.float32):
        model, optimizer = trained(backend, dtype, "auto")
        whole = optimizer.fp32_state_dict(model)
        kept = {name: value.clone() for name, value in whole.items()}
        train(model, optimizer, 1)
        with torch.no_grad():
            model.norm.running_mean.add_(1.0)
        assert all(same_bits(whole[name], value) for name, value in kept.items())


@pytest.mark.parametrize("updates", [0, 3])
@pytest.mark.parametrize("master", BF16_MASTERS)
def test_round_trip(master: str, updates: int, backend: Backend) -> None:
    """Into another model and optimizer, before their first step or after some: exact where the master is."""
    model, optimizer = trained(backend, torch.bfloat16, master)
    whole = optimizer.fp32_state_dict(model)
    other, second = trained(backend, torch.bfloat16, master, updates, seed=5)
    second.load_fp32_state_dict(other, through_a_file(whole))
    for ours, value in zip(other.parameters(), model.parameters(), strict=True):
        assert same_bits(ours.detach(), value.detach())
    for value, expected in zip(second.fp32_params(), optimizer.fp32_params(), strict=True):
        assert same_bits(value, expected), "split8 holds what split8 held"
    assert second.clock == updates


@pytest.mark.parametrize("master", BF16_MASTERS)
def test_values_from_elsewhere_are_taken_within_the_masters_bound(master: str, backend: Backend) -> None:
    """Each rounds once: bfloat16 by 2^-8 of a value without a master, split8 by 2^-16, the others not at all."""
    torch.manual_seed(3)
    wanted = Tied().to(backend.device).state_dict()
    model, optimizer = trained(backend, torch.bfloat16, master)
    optimizer.load_fp32_state_dict(model, wanted)
    bound = {"fp32": 0.0, "split16": 0.0, "split8": 2.0**-16}.get(master, 2.0**-8)
    whole = optimizer.fp32_state_dict(model)
    for name, param in model.named_parameters():
        limit = bound if param.requires_grad else 2.0**-8
        assert bool(((whole[name] - wanted[name]).abs() <= limit * wanted[name].abs()).all()), name
        assert bool(((param.detach().float() - wanted[name]).abs() <= 2.0**-8 * wanted[name].abs()).all()), name
    assert torch.equal(model.norm.running_mean, wanted["norm.running_mean"].bfloat16())


@pytest.mark.parametrize("updates", [0, 2])
def test_training_goes_on_from_the_loaded_value(updates: int, backend: Backend) -> None:
    """split16 and fp32 agree to the bit from then on, in the memory that they had."""
    wanted = {"p": torch.linspace(-1, 1, 300) / 3}
    models = [nn.ParameterDict({"p": torch.ones(300)}).to(backend.device, torch.bfloat16) for _ in range(2)]
    split, exact = (
        backend.optimizer(m.parameters(), lr=1e-4, master=tag)
        for m, tag in zip(models, ("split16", "fp32"), strict=True)
    )
    for model, optimizer in zip(models, (split, exact), strict=True):
        train(model, optimizer, updates)
        optimizer.load_fp32_state_dict(model, wanted)
        pointers = [v.data_ptr() for v in optimizer.state[model["p"]].values()]
        train(model, optimizer, 3, seed=2)
        assert pointers == [v.data_ptr() for v in optimizer.state[model["p"]].values()], "a captured graph goes on"
    assert same_bits(models[0]["p"].detach(), models[1]["p"].detach())
    assert same_bits(next(split.fp32_params()), exact.state[models[1]["p"]]["master"])
    assert int(exact.state[models[1]["p"]]["step"]) == updates + 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16], ids=str)
def test_round_trip_of_other_parameters(dtype: torch.dtype, backend: Backend) -> None:
    model, optimizer = trained(backend, dtype, "auto")
    whole = optimizer.fp32_state_dict(model)
    other, second = trained(backend, dtype, "auto", seed=5)
    second.load_fp32_state_dict(other, whole)
    for value, expected in zip(second.fp32_params(), optimizer.fp32_params(), strict=True):
        assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert same_bits(value, expected)


def test_special_values_and_sliced_parameters(backend: Backend) -> None:
    specials = torch.tensor([0.0, -0.0, float("inf"), -float("inf"), float("nan"), 1e-45, 3.4e38, 1.0 + 2.0**-20])
    model = nn.Module()
    sliced = torch.zeros(8, 3, dtype=torch.bfloat16, device=backend.device)[:, 1]
    model.p = nn.Parameter(sliced)
    assert not model.p.is_contiguous()
    optimizer = backend.optimizer([model.p], lr=0.0)
    train(model, optimizer, 1)
    optimizer.load_fp32_state_dict(model, {"p": specials})
    assert same_bits(optimizer.fp32_state_dict(model)["p"].cpu(), specials)
    assert model.p[6].isinf(), "the parameter rounds to infinity, its master does not"


def test_state_that_waits_to_be_taken_over_counts(backend: Backend) -> None:
    """Loaded and written state reaches the kernels with the next step; what it means is known before."""
    model, optimizer = trained(backend, torch.bfloat16, "split16")
    whole = list(optimizer.fp32_params())
    optimizer.param_groups[0]["master"] = "fp32"
    for value, expected in zip(optimizer.fp32_params(), whole, strict=True):
        assert same_bits(value, expected)
    optimizer.load_fp32_state_dict(model, {k: 2 * v for k, v in optimizer.fp32_state_dict(model).items()})
    head = model.head.bias
    assert same_bits(optimizer.state[head]["master"], 2 * whole[[id(p) for p in model.parameters()].index(id(head))])
    exact = conversion.exact_master(head, optimizer.state[head])
    assert exact is optimizer.state[head]["master"]


def test_metadata_and_extra_state_survive(backend: Backend) -> None:
    class Extra(nn.Linear):
        note: Any = "new"

        def get_extra_state(self) -> Any:
            return self.note

        def set_extra_state(self, state: Any) -> None:
            self.note = state

    model = Extra(2, 2).to(backend.device, torch.bfloat16)
    optimizer = backend.optimizer(model.parameters())
    model.note = "old"
    whole = optimizer.fp32_state_dict(model)
    assert isinstance(whole, OrderedDict)
    assert whole._metadata == model.state_dict()._metadata  # type: ignore[attr-defined]
    model.note = "newer"
    optimizer.load_fp32_state_dict(model, whole)
    assert model.note == "old"


# ---- refusals --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda sd: sd.pop("head.bias"), ValueError, "without 'head.bias'"),
        (lambda sd: sd.update(other=torch.zeros(1)), ValueError, "with 'other'"),
        (lambda sd: sd.update({"head.bias": torch.zeros(3)}), ValueError, r"shape \(7,\), got \(3,\)"),
        (lambda sd: sd.update({"head.bias": torch.zeros(7, dtype=torch.int64)}), TypeError, "float dtype, got"),
        (lambda sd: sd.update({"head.bias": [0.0] * 7}), TypeError, "must be a tensor, got"),
        (lambda sd: sd.update({"head.weight": torch.zeros(7, 6)}), ValueError, "one tied parameter"),
    ],
)
def test_other_values_are_refused_and_change_nothing(change: Any, error: type, message: str, backend: Backend) -> None:
    model, optimizer = trained(backend, torch.bfloat16, "split16")
    wanted = {name: torch.zeros_like(value) for name, value in optimizer.fp32_state_dict(model).items()}
    wanted["head.weight"] = wanted["embedding.weight"] + 1.0
    wanted["embedding.weight"] = wanted["head.weight"]
    change(wanted)
    before, buffers = snapshot(optimizer), [b.clone() for b in model.buffers()]
    with pytest.raises(error, match=message):
        optimizer.load_fp32_state_dict(model, wanted)
    assert_same(snapshot(optimizer), before)
    assert all(same_bits(b, old) for b, old in zip(model.buffers(), buffers, strict=True))


def test_no_dict_is_refused() -> None:
    model = nn.Linear(2, 2)
    with pytest.raises(TypeError, match="must be a dict"):
        FusedScheduledAdam(model.parameters()).load_fp32_state_dict(model, [("weight", 0)])  # type: ignore[arg-type]


def test_trained_parameter_of_another_optimizer_is_refused() -> None:
    """Its exact value is not known here; under ZeRO-like engines, whose groups hold flat tensors, none is."""
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)).bfloat16()
    optimizer = FusedScheduledAdam(model[0].parameters())
    whole = {name: value.float() for name, value in model.state_dict().items()}
    for call in (lambda: optimizer.fp32_state_dict(model), lambda: optimizer.load_fp32_state_dict(model, whole)):
        with pytest.raises(ValueError, match=r"'1\.weight', '1\.bias', which it does not hold"):
            call()
    assert list(optimizer.fp32_state_dict(model[0])) == ["weight", "bias"]
    model[1].requires_grad_(False)
    assert optimizer.fp32_state_dict(model)["1.weight"].dtype == torch.float32


def test_every_master_is_covered() -> None:
    assert set(BF16_MASTERS) == set(codec.MASTERS)
