"""cast_to_bf16: what is cast, what is kept, and that nothing else about the model changes."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fused_sched import FusedScheduledAdam, cast_to_bf16


def network() -> nn.Sequential:
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.LayerNorm(16), nn.Linear(16, 16))
    model.append(nn.Linear(16, 16, bias=False))
    model[5].weight = model[4].weight
    model.register_buffer("table", torch.ones(3))
    model.register_buffer("count", torch.ones(3, dtype=torch.int64))
    return model


def wide(model: nn.Module) -> set[str]:
    return {name for name, value in model.state_dict().items() if value.dtype == torch.float32}


NORM = {"1.weight", "1.bias", "1.running_mean", "1.running_var"}


@pytest.mark.parametrize(
    ("keep", "expected"),
    [
        ([], set()),
        (["3"], {"3.weight", "3.bias"}),
        (["*.bias"], {"0.bias", "3.bias", "4.bias"}),
        (["table", "4.bias"], {"table", "4.bias"}),
        (["5"], {"4.weight", "5.weight"}),  # tied: one tensor has one dtype
        (["[03]"], {"0.weight", "0.bias", "3.weight", "3.bias"}),
    ],
)
def test_norms_with_running_statistics_and_patterns_are_kept(keep: list[str], expected: set[str]) -> None:
    assert wide(cast_to_bf16(network(), keep)) == expected | NORM


def test_model_stays_itself() -> None:
    model = network()
    params, grads = list(model.parameters()), [torch.randn_like(p) for p in model.parameters()]
    for param, grad in zip(params, grads, strict=True):
        param.grad = grad
    assert cast_to_bf16(model) is model
    assert all(new is old for new, old in zip(model.parameters(), params, strict=True))
    assert model[4].weight is model[5].weight
    for param, grad in zip(params, grads, strict=True):
        assert param.grad is not None
        assert torch.equal(param.grad, grad.to(param.dtype))
    assert model.count.dtype == torch.int64
    assert dict(model.named_buffers())["table"].dtype == torch.bfloat16


@pytest.mark.skipif(not hasattr(torch.Tensor, "grad_dtype"), reason="torch has no grad_dtype")
def test_dtype_that_was_set_for_gradients_stays() -> None:
    model = nn.Linear(2, 2)
    model.weight.grad_dtype = torch.float32
    for param in model.parameters():
        param.grad = torch.full_like(param, 1.0 + 2.0**-20)
    cast_to_bf16(model)
    assert [p.grad.dtype for p in model.parameters()] == [torch.float32, torch.bfloat16]
    assert bool((model.weight.grad == 1.0 + 2.0**-20).all())


def test_cast_model_trains_from_its_exact_weights() -> None:
    torch.manual_seed(0)
    model = network()
    whole = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = FusedScheduledAdam(cast_to_bf16(model).parameters(), lr=1e-3)
    optimizer.load_fp32_state_dict(model, whole)
    exact = optimizer.fp32_state_dict(model)
    assert all(torch.equal(exact[name], whole[name]) for name, _ in model.named_parameters())
    model(torch.randn(8, 1, 4, 4, dtype=torch.bfloat16)).float().square().mean().backward()
    optimizer.step()
    exact = optimizer.fp32_state_dict(model)
    assert all(not torch.equal(exact[name], whole[name]) for name, _ in model.named_parameters())
    assert model[1].running_mean.dtype == torch.float32
    assert bool((model[1].running_mean != 0).all())


def test_patterns_that_match_nothing_are_refused() -> None:
    model = network()
    with pytest.raises(ValueError, match=r"got '\*\.norm', which matches none"):
        cast_to_bf16(model, ["3", "*.norm"])
    with pytest.raises(TypeError, match=r"keep=\['3'\]"):
        cast_to_bf16(model, "3")
    assert all(p.dtype == torch.float32 for p in model.parameters())
