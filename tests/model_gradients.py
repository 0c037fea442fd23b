"""Parameters and gradients of a small model, for the tests of clipping."""

from __future__ import annotations

import torch
from conftest import Backend


def model_gradients(seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for shape in ((40, 30), (40,), (5,), (0,), (1,), (300,))]


def start(backend: Backend) -> list[torch.nn.Parameter]:
    return [backend.parameter(g * 0.1 + 1.0) for g in model_gradients(1)]


def set_grads(params: list[torch.nn.Parameter], grads: list[torch.Tensor]) -> None:
    for p, g in zip(params, grads, strict=True):
        p.grad = g.to(p.device, p.dtype, copy=True)
