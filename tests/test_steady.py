"""The steady step's compiled pass: taken when a call repeats the last one, and never when anything about it changed.

Every change is made to two optimizers, of which one has no such pass: they must agree in every bit, or in their error.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import assert_same, snapshot
from conftest import Backend

from fused_sched import schedules, steady

needs_exchange_api = pytest.mark.skipif(
    steady._EXCHANGE_API is None, reason="this torch has no DLPack exchange API (2.10 has)"
)


class Watched:
    """An optimizer, and how often it looked closely at its tensors."""

    def __init__(self, backend: Backend, with_pass: bool, **options: Any) -> None:
        self.params = [
            backend.parameter([[1.0, -2.0], [3.0, 0.5]]),
            backend.parameter([4.0, -1.0, 2.0]),
            backend.parameter([0.5, 8.0, -0.25, 1.0], torch.bfloat16),
            backend.parameter([7.0]),  # has no gradient
        ]
        groups = [{"params": self.params[:2]}, {"params": self.params[2:], "weight_decay": 0.5}]
        options = {"lr": schedules.linear(0.1, 0.5, 8), "max_grad_norm": 2.0, **options}
        self.optimizer = backend.optimizer(groups, **options)
        self.close_looks = 0
        self.updates = 0
        collect = self.optimizer._collect

        def counted() -> Any:
            self.close_looks += 1
            return collect()

        self.optimizer._collect = counted  # type: ignore[method-assign]
        if not with_pass:
            self.optimizer._devices.steady_call = lambda *args: None  # type: ignore[method-assign]

    def set_gradients(self) -> None:
        self.updates += 1
        for index, param in enumerate(self.params[:3]):
            param.grad = torch.full_like(param, (index + 1) * (-0.5) ** self.updates)

    def step(self) -> str:
        """What went wrong; empty if nothing did."""
        try:
            self.optimizer.step()
        except (RuntimeError, TypeError, ValueError) as error:
            return f"{type(error).__name__}: {error}"
        return ""


def pair(backend: Backend, **options: Any) -> tuple[Watched, Watched]:
    """One with the pass and one without, after the steps in which they prepare themselves."""
    both = Watched(backend, True, **options), Watched(backend, False, **options)
    for watched in both:
        for _ in range(3):
            watched.set_gradients()
            watched.optimizer.step()
    return both


# ---- taken -------------------------------------------------------------------------------------------


@needs_exchange_api
@pytest.mark.parametrize("fresh", [True, False], ids=["new_gradients", "gradients_in_place"])
def test_a_steady_step_looks_at_nothing_twice(fresh: bool, compiled: Backend) -> None:
    ours, plain = pair(compiled)
    for watched in (ours, plain):
        for _ in range(4):
            if fresh:
                watched.set_gradients()
            else:
                for param in watched.params[:3]:
                    param.grad.mul_(-0.5)  # type: ignore[union-attr]
            watched.optimizer.step()
    assert (ours.close_looks, plain.close_looks) == (1, 7)
    assert_same(snapshot(ours.optimizer), snapshot(plain.optimizer))
    assert ours.optimizer.clock == 7
    assert [param._version for param in ours.params] == [param._version for param in plain.params]


@needs_exchange_api
def test_backward_and_zero_grad_are_steady(compiled: Backend) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2)).to(compiled.device)
    optimizer = compiled.optimizer(model.parameters(), lr=0.1)
    x = torch.ones(5, 3, device=compiled.device)
    looks = []
    collect = optimizer._collect
    optimizer._collect = lambda: looks.append(1) or collect()  # type: ignore[method-assign, func-returns-value]
    for _ in range(4):
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()
    assert len(looks) == 1


@needs_exchange_api
def test_options_may_change_in_a_steady_step(compiled: Backend) -> None:
    ours, plain = pair(compiled)
    for watched in (ours, plain):
        optimizer = watched.optimizer
        optimizer.param_groups[0]["lr"] *= 0.5
        optimizer.param_groups[1]["weight_decay"] = 0.25
        watched.set_gradients()
        optimizer.step()
        optimizer.max_grad_norm = None
        optimizer.set_schedule(schedules.constant(0.25), group=1)
        watched.set_gradients()
        optimizer.step()
        optimizer.set_clock(2)
        watched.set_gradients()
        optimizer.step()
        optimizer.load_state_dict(optimizer.state_dict())  # into memory in use
        watched.set_gradients()
        optimizer.step()
    assert ours.close_looks == 1
    assert_same(snapshot(ours.optimizer), snapshot(plain.optimizer))


# ---- what it must notice -----------------------------------------------------------------------------


class Tagged(torch.Tensor):
    pass


class Named(torch.nn.Parameter):
    pass


def first_grad(watched: Watched) -> torch.Tensor:
    grad = watched.params[0].grad
    assert grad is not None
    return grad


def move_a_parameter(watched: Watched) -> None:
    watched.params[0].data = watched.params[0].data.clone()


def transpose_a_parameter_in_its_place(watched: Watched) -> None:
    watched.params[0].data = watched.params[0].data.t()


def put_a_parameter_onto_another(watched: Watched) -> None:
    watched.params[1].data = watched.params[0].data.view(-1)[:3]


def convert_a_parameter(watched: Watched) -> None:
    param = watched.params[1]
    param.grad = None
    param.data = param.data.double()
    param.grad = torch.ones_like(param)


def lose_a_gradient(watched: Watched) -> None:
    watched.params[1].grad = None


def freeze_a_parameter(watched: Watched) -> None:
    watched.params[1].requires_grad_(False).grad = None


def gain_a_gradient(watched: Watched) -> None:
    watched.params[3].grad = torch.ones(1, device=watched.params[3].device)


def gain_a_main_grad(watched: Watched) -> None:
    watched.params[3].main_grad = torch.ones(1, device=watched.params[3].device)  # type: ignore[attr-defined]


def exchange_for_main_grad(index: int, dtype: torch.dtype, *shape: int) -> Callable[[Watched], None]:
    def change(watched: Watched) -> None:
        param = watched.params[index]
        param.grad = None
        param.main_grad = torch.ones(shape, dtype=dtype, device=param.device)  # type: ignore[attr-defined]

    change.__name__ = f"exchange_for_main_grad_{index}_{dtype}_{shape}"
    return change


def give_a_main_grad_that_is_no_tensor(watched: Watched) -> None:
    watched.params[3].main_grad = "gradient"  # type: ignore[attr-defined]


def transpose_a_gradient(watched: Watched) -> None:
    watched.params[0].grad = first_grad(watched).t().contiguous().t()


def expand_a_gradient(watched: Watched) -> None:
    watched.params[0].grad = first_grad(watched)[:1, :1].expand(2, 2)


def negate_a_gradient_lazily(watched: Watched) -> None:
    watched.params[0].grad = torch._neg_view(first_grad(watched))


def give_a_zero_tensor(watched: Watched) -> None:
    watched.params[0].grad = torch._efficientzerotensor((2, 2), device=watched.params[0].device)


def give_a_sparse_gradient(watched: Watched) -> None:
    watched.params[0].grad = first_grad(watched).to_sparse()


def give_a_gradient_of_a_subclass(watched: Watched) -> None:
    watched.params[0].grad = first_grad(watched).as_subclass(Tagged)


def make_a_parameter_one_of_a_subclass(watched: Watched) -> None:
    watched.params[0].__class__ = Named


def replace_a_moment(watched: Watched) -> None:
    state = watched.optimizer.state[watched.params[0]]
    state["exp_avg"] = state["exp_avg"] * 2.0


def point_a_moment_elsewhere(watched: Watched) -> None:
    state = watched.optimizer.state[watched.params[0]]
    state["exp_avg"].data = state["exp_avg"] * 2.0


def point_a_count_elsewhere_through_a_copy_of_the_dict(watched: Watched) -> None:
    copied = {**watched.optimizer.state[watched.params[0]]}
    copied["step"].data = torch.tensor(9.0, device=copied["step"].device)


def clear_the_state(watched: Watched) -> None:
    watched.optimizer.state.clear()


def remove_a_parameter(watched: Watched) -> None:
    del watched.optimizer.param_groups[0]["params"][0]


def exchange_parameters(watched: Watched) -> None:
    watched.optimizer.param_groups[0]["params"].reverse()


def replace_the_groups(watched: Watched) -> None:
    watched.optimizer.param_groups = [dict(group) for group in watched.optimizer.param_groups]


def reverse_the_groups(watched: Watched) -> None:
    watched.optimizer.param_groups.reverse()


def remove_a_group(watched: Watched) -> None:
    del watched.optimizer.param_groups[1]


def add_a_group(watched: Watched) -> None:
    extra = torch.nn.Parameter(torch.ones(2, device=watched.params[0].device))
    extra.grad = torch.ones_like(extra)
    watched.params.append(extra)
    watched.optimizer.add_param_group({"params": [extra]})


def keep_the_largest_second_moment(watched: Watched) -> None:
    watched.optimizer.param_groups[0]["amsgrad"] = True


CHANGES = [
    move_a_parameter,
    transpose_a_parameter_in_its_place,
    put_a_parameter_onto_another,
    convert_a_parameter,
    lose_a_gradient,
    freeze_a_parameter,
    gain_a_gradient,
    gain_a_main_grad,
    exchange_for_main_grad(2, torch.float32, 4),  # another kind of number and another width,
    exchange_for_main_grad(2, torch.float16, 4),  # only another kind,
    exchange_for_main_grad(1, torch.float16, 3),  # only another width
    exchange_for_main_grad(2, torch.bfloat16, 5),
    exchange_for_main_grad(2, torch.bfloat16, 4, 1),
    give_a_main_grad_that_is_no_tensor,
    transpose_a_gradient,
    expand_a_gradient,
    negate_a_gradient_lazily,
    give_a_zero_tensor,
    give_a_sparse_gradient,
    give_a_gradient_of_a_subclass,
    make_a_parameter_one_of_a_subclass,
    replace_a_moment,
    point_a_moment_elsewhere,
    point_a_count_elsewhere_through_a_copy_of_the_dict,
    clear_the_state,
    remove_a_parameter,
    exchange_parameters,
    replace_the_groups,
    reverse_the_groups,
    remove_a_group,
    add_a_group,
    keep_the_largest_second_moment,
]


@needs_exchange_api
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_change_is_noticed(change: Callable[[Watched], None], compiled: Backend) -> None:
    ours, plain = pair(compiled)
    errors = []
    for watched in (ours, plain):
        watched.set_gradients()
        change(watched)
        errors.append(watched.step())
    assert ours.close_looks == 2
    assert errors[0] == errors[1]
    assert_same(snapshot(ours.optimizer), snapshot(plain.optimizer))
    if errors[0]:
        return
    for watched in (ours, plain):  # and the pass serves again, or does not, with the same results
        for _ in range(3):
            for param in watched.params:
                if param.grad is not None:
                    param.grad = param.grad * 0.5
            watched.optimizer.step()
    assert_same(snapshot(ours.optimizer), snapshot(plain.optimizer))


@needs_exchange_api
def test_state_that_was_looked_at_long_ago_is_watched_as_long_as_somebody_has_it(compiled: Backend) -> None:
    ours, plain = pair(compiled)
    for watched in (ours, plain):
        optimizer = watched.optimizer
        kept = optimizer.state[watched.params[1]]["exp_avg_sq"]
        for _ in range(3):
            watched.set_gradients()
            optimizer.step()
        assert watched is plain or watched.close_looks == 1
        kept.data = kept * 3.0
        for _ in range(2):
            watched.set_gradients()
            optimizer.step()
        assert watched is plain or watched.close_looks == 2
    assert_same(snapshot(ours.optimizer), snapshot(plain.optimizer))


@needs_exchange_api
def test_a_gradient_that_stays_is_known_until_it_is_replaced_in_its_place(compiled: Backend) -> None:
    """By its own lazy negation: the same memory, shape and strides, in an object that may get the former's address."""
    ours, plain = pair(compiled)
    for watched in (ours, plain):
        for _ in range(3):  # seen twice, a gradient is no longer asked whether it is negated
            watched.optimizer.step()
        watched.params[0].grad = torch._neg_view(first_grad(watched).detach())
        watched.optimizer.step()
    assert ours.close_looks == 2
    assert_same(snapshot(ours.optimizer), snapshot(plain.optimizer))


@needs_exchange_api
def test_a_gradient_that_stays_is_known_only_where_it_is(compiled: Backend) -> None:
    """Its `.data` may be set to a lazily negated tensor of the same shape and strides."""
    ours, plain = pair(compiled)
    for watched in (ours, plain):
        for _ in range(3):
            watched.optimizer.step()
        first_grad(watched).data = torch._neg_view(torch.full_like(first_grad(watched), 3.0))
        watched.optimizer.step()
    assert ours.close_looks == 2
    assert_same(snapshot(ours.optimizer), snapshot(plain.optimizer))


@needs_exchange_api
def test_a_gradient_at_the_address_of_one_that_was_known_is_another(compiled: Backend) -> None:
    ours, plain = pair(compiled)
    for watched in (ours, plain):
        for _ in range(3):
            watched.optimizer.step()
        address, same_memory, others = id(first_grad(watched)), first_grad(watched).detach(), []
        watched.params[0].grad = None
        while id(negated := torch._neg_view(same_memory)) != address and len(others) < 1000:
            others.append(negated)
        watched.params[0].grad = negated
        watched.optimizer.step()
    assert ours.close_looks == 2
    assert_same(snapshot(ours.optimizer), snapshot(plain.optimizer))
