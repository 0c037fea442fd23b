"""Odd tensors: strides, views, sizes, misalignment, missing gradients.

Each element's update depends on nothing but the element, so every layout must give the bits that the same
numbers give in one contiguous, aligned tensor.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import DTYPES, assert_same, same_bits, set_grad, snapshot
from conftest import Backend

from fused_sched import FusedScheduledAdam, schedules

OPTIONS: dict[str, Any] = {"lr": 0.01, "weight_decay": 0.1, "amsgrad": True}
UPDATES = 3


def numbers(shape: tuple[int, ...], seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def contiguous_result(
    backend: Backend, start: torch.Tensor, grads: list[torch.Tensor], **options: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    param = torch.nn.Parameter(start.to(backend.device).contiguous().clone())
    optimizer = backend.optimizer([param], **{**OPTIONS, **options})
    for grad in grads:
        set_grad(param, grad.to(backend.device).contiguous().clone())
        optimizer.step()
    return param.detach(), optimizer.state[param]["exp_avg"]


def check_layout(
    backend: Backend,
    param: torch.Tensor,
    shape_grad: Callable[[torch.Tensor], torch.Tensor] = lambda grad: grad,
) -> None:
    """Steps a parameter as it is, with gradients laid out by `shape_grad`, beside the contiguous one."""
    start = param.detach().clone()
    grads = [shape_grad(numbers(tuple(param.shape), seed, param.dtype).to(backend.device)) for seed in range(UPDATES)]
    optimizer = backend.optimizer([param], **OPTIONS)
    address = param.data_ptr()
    for grad in grads:
        param.grad = grad
        optimizer.step()
    expected, expected_exp_avg = contiguous_result(backend, start, grads)
    assert param.data_ptr() == address
    assert same_bits(param.detach(), expected)
    exp_avg = optimizer.state[param]["exp_avg"]
    assert exp_avg.shape == param.shape
    assert same_bits(exp_avg, expected_exp_avg)


def parameter(backend: Backend, shape: tuple[int, ...], view: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """A leaf that is a view of a larger tensor, as `nn.Parameter(weight.t())` makes one."""
    leaf = view(numbers(shape, 99).to(backend.device)).detach().requires_grad_()
    assert leaf.is_leaf
    return leaf


VIEWS: dict[str, tuple[tuple[int, ...], Callable[[torch.Tensor], torch.Tensor]]] = {
    "transposed": ((5, 7), lambda t: t.t()),
    "permuted": ((2, 3, 4), lambda t: t.permute(2, 0, 1)),
    "column_slice": ((6, 8), lambda t: t[:, 2:5]),
    "row_slice": ((6, 8), lambda t: t[1:4]),
    "every_other": ((31,), lambda t: t[::2]),
    "single_column": ((9, 4), lambda t: t[:, :1]),
    "channels_last": ((2, 3, 4, 5), lambda t: t.contiguous(memory_format=torch.channels_last)),
    "channels_last_3d": ((2, 3, 2, 2, 2), lambda t: t.contiguous(memory_format=torch.channels_last_3d)),
    "one_channel": ((2, 1, 4, 5), lambda t: t.contiguous(memory_format=torch.channels_last)),
    "zero_dimensional": ((), lambda t: t),
    "size_one_dimensions": ((1, 5, 1), lambda t: t.as_strided((1, 5, 1), (77, 1, 33))),
    "transposed_slice": ((8, 9), lambda t: t[1:6, 2:8].t()),
}


@pytest.mark.parametrize("name", VIEWS)
def test_parameters_of_every_layout(name: str, backend: Backend) -> None:
    check_layout(backend, parameter(backend, *VIEWS[name]))


@pytest.mark.parametrize("name", ["column_slice", "row_slice", "every_other", "transposed_slice"])
def test_views_leave_the_rest_of_their_base_alone(name: str, backend: Backend) -> None:
    shape, view = VIEWS[name]
    base = numbers(shape, 3).to(backend.device)
    before = base.clone()
    param = view(base).requires_grad_()
    optimizer = backend.optimizer([param], **OPTIONS)
    param.grad = torch.ones_like(param)
    optimizer.step()
    mask = torch.zeros_like(base)
    view(mask).fill_(1)
    assert same_bits(base[mask == 0], before[mask == 0])
    assert not torch.any(base[mask == 1] == before[mask == 1])


GRADS: dict[str, tuple[tuple[int, ...], Callable[[torch.Tensor], torch.Tensor]]] = {
    "transposed": ((5, 7), lambda g: g.t().contiguous().t()),
    "expanded_scalar": ((4, 6), lambda g: g[:1, :1].expand(4, 6)),
    "expanded_row": ((4, 6), lambda g: g[:1].expand(4, 6)),
    "every_other": ((9,), lambda g: torch.stack([g, g], dim=-1)[..., 0]),
    "channels_last": ((2, 3, 4, 5), lambda g: g.contiguous(memory_format=torch.channels_last)),
    "slice": ((3, 5), lambda g: torch.nn.functional.pad(g, (1, 2, 3, 4))[3:6, 1:6]),
    "flipped_storage": ((7,), lambda g: g.flip(0).flip(0)),
}


@pytest.mark.parametrize("name", GRADS)
@pytest.mark.parametrize("format_name", list(DTYPES))
def test_gradients_of_every_layout(name: str, format_name: str, backend: Backend) -> None:
    shape, layout = GRADS[name]
    param = torch.nn.Parameter(numbers(shape, 99, DTYPES[format_name]).to(backend.device))
    check_layout(backend, param, layout)


def test_channels_last_parameter_with_contiguous_gradient(backend: Backend) -> None:
    param = parameter(backend, *VIEWS["channels_last"])
    check_layout(backend, param, lambda grad: grad.contiguous())


def test_gradient_layout_may_change_between_steps(backend: Backend) -> None:
    param = torch.nn.Parameter(numbers((4, 6), 1).to(backend.device))
    start = param.detach().clone()
    grads = [numbers((4, 6), seed).to(backend.device) for seed in range(3)]
    laid_out = [grads[0], grads[1].t().contiguous().t(), grads[2]]
    optimizer = backend.optimizer([param], **OPTIONS)
    for grad in laid_out:
        param.grad = grad
        optimizer.step()
    assert same_bits(param.detach(), contiguous_result(backend, start, grads)[0])


def test_module_made_channels_last_after_state_exists(backend: Backend) -> None:
    def train(convert: bool) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        module = torch.nn.Conv2d(3, 4, 3).to(backend.device)
        optimizer = backend.optimizer(module.parameters(), **OPTIONS)
        for index in range(4):
            if convert and index == 2:
                module.to(memory_format=torch.channels_last)
            for position, param in enumerate(module.parameters()):
                param.grad = numbers(tuple(param.shape), 10 * index + position).to(backend.device)
            optimizer.step()
        return snapshot(optimizer)

    assert_same(train(convert=True), train(convert=False))


def test_tied_weights_step_once(backend: Backend) -> None:
    first, second = torch.nn.Linear(3, 3, bias=False), torch.nn.Linear(3, 3, bias=False)
    second.weight = first.weight
    module = torch.nn.Sequential(first, second).to(backend.device)
    optimizer = backend.optimizer(module.parameters(), lr=0.5, eps=0.0)
    before = first.weight.detach().clone()
    first.weight.grad = torch.ones_like(first.weight)
    optimizer.step()
    torch.testing.assert_close(first.weight.detach(), before - 0.5)


# ---- sizes ---------------------------------------------------------------------------------------

# Around every width that loops and kernels know: vectors of 4, 8, 16, 32 elements, the padding of 256, tiles
# of 1024 to 4096, the CPU's 32768-element unit of work.
SIZES = (
    *range(70),
    *(width + delta for width in (96, 128, 255, 256, 512, 1024, 2048, 4096) for delta in (-1, 0, 1)),
    32767,
    32768,
    32769,
)


@pytest.mark.parametrize("format_name", list(DTYPES))
def test_sizes_do_not_matter(format_name: str, backend: Backend) -> None:
    """All sizes at once in one optimizer; each must be the beginning of the largest."""
    dtype = DTYPES[format_name]
    longest = max(SIZES)
    values = numbers((longest,), 0, dtype)
    grads = [numbers((longest,), seed, dtype).to(backend.device) for seed in (1, 2)]
    params = [torch.nn.Parameter(values[:size].clone().to(backend.device)) for size in SIZES]
    optimizer = backend.optimizer(params, **OPTIONS)
    for grad in grads:
        for param in params:
            param.grad = grad[: param.numel()].clone()
        optimizer.step()
    expected, expected_exp_avg = contiguous_result(backend, values, grads)
    for param in params:
        size = param.numel()
        assert same_bits(param.detach(), expected[:size]), size
        assert same_bits(optimizer.state[param]["exp_avg"], expected_exp_avg[:size]), size


@pytest.mark.parametrize("format_name", list(DTYPES))
def test_every_misalignment_and_nothing_else_is_written(format_name: str, backend: Backend) -> None:
    """Parameters and gradients start at every element of a vector; what lies around them stays."""
    dtype, margin, size = DTYPES[format_name], 32, 67
    values = numbers((size,), 0, dtype).to(backend.device)
    grads = [numbers((size,), seed, dtype).to(backend.device) for seed in (1, 2)]
    expected, _ = contiguous_result(backend, values, grads)
    sentinel = 123.0
    bases, params, grad_bases = [], [], []
    for shift in range(17):
        for grad_shift in (0, 1, shift):
            base = torch.full((size + 2 * margin,), sentinel, dtype=dtype, device=backend.device)
            base[shift : shift + size] = values
            grad_base = torch.full_like(base, sentinel)
            bases.append((base, shift))
            grad_bases.append((grad_base, grad_shift))
            params.append(base[shift : shift + size].requires_grad_())
    optimizer = backend.optimizer(params, **OPTIONS)
    for grad in grads:
        for param, (grad_base, shift) in zip(params, grad_bases, strict=True):
            grad_base[shift : shift + size] = grad
            param.grad = grad_base[shift : shift + size]
        optimizer.step()
    for (base, shift), (grad_base, grad_shift) in zip(bases, grad_bases, strict=True):
        assert same_bits(base[shift : shift + size], expected), shift
        assert same_bits(grad_base[grad_shift : grad_shift + size], grads[-1])
        for buffer, start in ((base, shift), (grad_base, grad_shift)):
            around = torch.cat([buffer[:start], buffer[start + size :]])
            assert bool((around == sentinel).all()), shift


def test_adjacent_parameters_of_one_buffer(backend: Backend) -> None:
    """Engines cut many parameters from one flat buffer: neighbours touch, nobody overlaps."""
    sizes = (1, 3, 8, 5, 64, 7, 0, 33)
    values = numbers((sum(sizes),), 0).to(backend.device)
    grads = [numbers((sum(sizes),), seed).to(backend.device) for seed in (1, 2)]
    flat, flat_grad = values.clone(), torch.empty_like(values)
    params = [part.requires_grad_() for part in flat.split(sizes)]
    optimizer = backend.optimizer(params, **OPTIONS)
    for grad in grads:
        flat_grad.copy_(grad)
        for param, part in zip(params, flat_grad.split(sizes), strict=True):
            param.grad = part
        optimizer.step()
    assert same_bits(flat.detach(), contiguous_result(backend, values, grads)[0])


# ---- what is missing -----------------------------------------------------------------------------


def test_missing_gradients_leave_parameters_alone(backend: Backend) -> None:
    params = [backend.parameter([float(i)]) for i in range(5)]
    optimizer = backend.optimizer(params, lr=0.5, weight_decay=0.5)
    for param in params[1::2]:
        param.grad = torch.ones_like(param)
    optimizer.step()
    assert [param.item() for param in params[0::2]] == [0.0, 2.0, 4.0]
    assert all(param.item() != float(i) for i, param in enumerate(params) if i % 2)
    assert all(not optimizer.state.get(param) for param in params[0::2])


def test_empty_tensors_are_counted_and_harmless(backend: Backend) -> None:
    """An FSDP shard may have no elements; its step counts all the same."""
    empty, full = backend.parameter(torch.empty(0, 3)), backend.parameter([1.0])
    optimizer = backend.optimizer([empty, full], amsgrad=True)
    for param in (empty, full):
        param.grad = torch.ones_like(param)
    optimizer.step()
    assert float(optimizer.state[empty]["step"]) == 1
    assert optimizer.state[empty]["exp_avg"].shape == (0, 3)
    alone = backend.parameter(torch.empty(0))
    only_empty = backend.optimizer([alone])
    alone.grad = torch.empty_like(alone)
    only_empty.step()
    assert only_empty.clock == 1


def test_frozen_parameters_are_left_alone(backend: Backend) -> None:
    frozen, live = backend.parameter([1.0]), backend.parameter([1.0])
    frozen.requires_grad_(False)
    optimizer = backend.optimizer([frozen, live], lr=0.5, weight_decay=0.5)
    live.grad = torch.ones_like(live)
    optimizer.step()
    assert frozen.item() == 1.0


def test_subclassed_parameters(backend: Backend) -> None:
    class Tagged(torch.nn.Parameter):
        pass

    tagged = Tagged(torch.ones(3, device=backend.device))
    optimizer = backend.optimizer([tagged], lr=0.5, eps=0.0)
    tagged.grad = torch.ones(3, device=backend.device)
    optimizer.step()
    assert tagged.tolist() == [0.5, 0.5, 0.5]


@pytest.mark.cuda
def test_parameters_of_several_devices_in_one_group(get_backend: Callable[[str], Backend]) -> None:
    cpu, gpu = get_backend("cpu"), get_backend("cuda")
    params = [backend.parameter([1.0, -2.0, 3.0]) for backend in (cpu, gpu)]
    optimizer = FusedScheduledAdam(params, lr=schedules.linear(0.1, 0.5, 4), weight_decay=0.1)
    for index in range(4):
        for param in params:
            param.grad = torch.full_like(param, 1.0 + index)
        optimizer.step()
    assert same_bits(*(param.detach() for param in params))
    assert optimizer.clock == 4


def test_many_tensors(backend: Backend) -> None:
    """More than one launch's tensor table holds (about 1,000)."""
    count = 2500 if backend.name != "reference" else 50
    params = [torch.nn.Parameter(torch.full((1 + i % 3,), float(i), device=backend.device)) for i in range(count)]
    optimizer = backend.optimizer(params, lr=0.5, eps=0.0)
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer.step()
    for i, param in enumerate(params):
        assert bool((param == i - 0.5).all()), i


def test_many_groups(backend: Backend) -> None:
    count = 40
    params = [torch.nn.Parameter(torch.zeros(3, device=backend.device)) for _ in range(count)]
    groups = [{"params": [param], "lr": 2.0**-i} for i, param in enumerate(params)]
    optimizer = backend.optimizer(groups, eps=0.0)
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer.step()
    # The first update is lr * sign(g), exact where (1-beta1)*1 / (1-beta1^1) is 1 after rounding: a few ulp.
    for i, param in enumerate(params):
        torch.testing.assert_close(param.detach(), torch.full_like(param, -(2.0**-i)), rtol=4 * 2.0**-24, atol=0)
    assert optimizer.last_lr() == [2.0**-i for i in range(count)]
