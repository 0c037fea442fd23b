"""Options that a steady step does not read again: none that may have changed, by whomever and however.

As in test_steady.py, every change is made to two optimizers, of which one looks at everything in every step.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from cases import assert_same, snapshot
from conftest import Backend
from test_steady import Watched, needs_exchange_api
from test_steady import pair as steady_pair

from fused_sched import ops, schedules


def pair(backend: Backend, **options: Any) -> tuple[Watched, Watched]:
    ours, plain = steady_pair(backend, **options)
    for record in plain.optimizer._records:
        record.stands_for = lambda settings: False  # type: ignore[method-assign]
    step = plain.optimizer._devices.step

    def forgetful(*args: Any) -> None:
        for engine in plain.optimizer._devices.engines.values():
            engine._inputs = ()  # type: ignore[attr-defined]
        step(*args)

    plain.optimizer._devices.step = forgetful  # type: ignore[method-assign]
    return ours, plain


def group(watched: Watched, index: int = 0) -> dict[str, Any]:
    options: dict[str, Any] = watched.optimizer.param_groups[index]
    return options


def counted_settling(watched: Watched) -> list[int]:
    """Grows by one whenever options are brought to the devices."""
    settled: list[int] = []
    settle = watched.optimizer._settle
    watched.optimizer._settle = lambda *args: settled.append(1) or settle(*args)  # type: ignore
    return settled


@needs_exchange_api
def test_settled_options_are_not_settled_again(compiled: Backend) -> None:
    ours, plain = pair(compiled, lr=0.1)
    counts = []
    for watched in (ours, plain):
        counts.append(counted_settling(watched))
        for _ in range(3):
            watched.set_gradients()
            watched.optimizer.step()
        group(watched)["lr"] = 0.05
        for _ in range(3):
            watched.set_gradients()
            watched.optimizer.step()
    assert list(map(len, counts)) == [1, 6]
    assert_same(snapshot(ours.optimizer), snapshot(plain.optimizer))


CHANGES: list[Callable[[Watched], None]] = []


def noticed(change: Callable[[Watched], None]) -> Callable[[Watched], None]:
    CHANGES.append(change)
    return change


# ---- options of a group ------------------------------------------------------------------------------


@noticed
def scale_the_rate(watched: Watched) -> None:
    group(watched)["lr"] *= 0.5


@noticed
def put_the_rate_back(watched: Watched) -> None:
    lr = group(watched)["lr"]
    group(watched)["lr"] = 0.7
    watched.optimizer.push_hyperparameters()
    group(watched)["lr"] = lr


@noticed
def put_the_rate_back_after_a_failure(watched: Watched) -> None:
    lr = group(watched)["lr"]
    group(watched)["lr"] = "much"
    assert "lr must be a number" in watched.step()
    group(watched)["lr"] = lr


@noticed
def ask_for_the_next_rate_between(watched: Watched) -> None:
    group(watched)["lr"] *= 0.5
    assert watched.optimizer._next_rate(watched.optimizer._records[0]) != 0.0


@noticed
def give_a_rate_that_is_none(watched: Watched) -> None:
    group(watched)["lr"] = "much"


@noticed
def give_an_equal_number_of_another_type(watched: Watched) -> None:
    """float32's 0.1 is not float64's, though NumPy says that they are equal."""
    group(watched)["weight_decay"] = np.float32(0.1)
    group(watched)["betas"] = (np.float32(0.9), 0.999)
    watched.set_gradients()
    watched.optimizer.step()
    group(watched)["weight_decay"] = 0.1
    group(watched)["betas"] = (0.9, 0.999)


@noticed
def give_an_equal_number_for_a_tensor(watched: Watched) -> None:
    lr = torch.tensor(0.1)
    group(watched)["lr"] = lr
    watched.set_gradients()
    watched.optimizer.step()
    group(watched)["lr"] = 0.1
    watched.set_gradients()
    watched.optimizer.step()
    group(watched, -1)["eps"] = 1e-6  # has all settings pushed


@noticed
def give_a_tensor_for_the_rate(watched: Watched) -> None:
    """Equal to the number that it replaces."""
    group(watched)["lr"] = torch.tensor(group(watched)["lr"], dtype=torch.float64)


@noticed
def change_the_betas(watched: Watched) -> None:
    group(watched)["betas"] = (0.5, 0.75)


@noticed
def change_a_beta_in_its_list(watched: Watched) -> None:
    group(watched)["betas"] = [0.5, 0.75]
    assert watched.step() == ""
    assert watched.step() == ""
    group(watched)["betas"][0] = 0.25


@noticed
def change_eps(watched: Watched) -> None:
    group(watched, 1)["eps"] = 1.0


@noticed
def change_the_decay(watched: Watched) -> None:
    group(watched, 1)["weight_decay"] = 0.25


@noticed
def couple_the_decay(watched: Watched) -> None:
    group(watched, 1)["decoupled_weight_decay"] = False


@noticed
def ascend(watched: Watched) -> None:
    group(watched)["maximize"] = True


@noticed
def change_the_masters_format(watched: Watched) -> None:
    group(watched, 1)["master"] = "fp32"


@noticed
def change_the_moments_format(watched: Watched) -> None:
    group(watched)["moments"] = "bf16"


@noticed
def restore_a_clock(watched: Watched) -> None:
    group(watched)["clock"] = 6


@noticed
def restore_another_groups_options(watched: Watched) -> None:
    """As ZeRO-3 does from a universal checkpoint."""
    group(watched, 1).update(group_index=0, weight_decay=0.125)


@noticed
def drive_the_rate_by_torchs_scheduler(watched: Watched) -> None:
    group(watched)["initial_lr"] = 3.0


@noticed
def edit_a_hidden_group(watched: Watched) -> None:
    hidden = watched.optimizer.param_groups.pop()
    for _ in range(3):
        assert watched.step() == ""
    hidden["lr"] = "much"


# ---- and of the optimizer ----------------------------------------------------------------------------


@noticed
def set_a_schedule(watched: Watched) -> None:
    watched.optimizer.set_schedule(schedules.constant(0.25))


@noticed
def set_a_schedule_of_the_same_reference(watched: Watched) -> None:
    watched.optimizer.set_schedule(schedules.linear(0.1, 0.9, 4))


@noticed
def set_a_schedule_of_the_decay(watched: Watched) -> None:
    watched.optimizer.set_schedule(schedules.linear(0.1, 0.9, 4), group=1, hyperparameter="weight_decay")


@noticed
def end_a_schedule(watched: Watched) -> None:
    watched.optimizer.set_schedule(0.3, group=0)


@noticed
def follow_a_metric(watched: Watched) -> None:
    watched.optimizer.set_schedule(schedules.torch.ReduceLROnPlateau(factor=0.5, patience=0, base_lr=0.1))
    assert watched.step() == ""
    assert watched.step() == ""
    for metric in (1.0, 2.0):
        watched.optimizer.report_metric(metric)


@noticed
def set_the_clock(watched: Watched) -> None:
    watched.optimizer.set_clock(1)


@noticed
def clip_at_less(watched: Watched) -> None:
    watched.optimizer.max_grad_norm = 0.01


@noticed
def clip_no_more(watched: Watched) -> None:
    watched.optimizer.max_grad_norm = None


@noticed
def clip_at_less_and_push(watched: Watched) -> None:
    watched.optimizer.max_grad_norm = 0.01
    watched.optimizer.push_hyperparameters()


@noticed
def skip_nonfinite(watched: Watched) -> None:
    watched.optimizer.skip_nonfinite = True
    watched.params[0].grad.fill_(torch.inf)  # type: ignore[union-attr]


@noticed
def reduce_the_norm(watched: Watched) -> None:
    watched.optimizer.norm_reduce_hook = lambda squares: squares.mul_(1e6)


@noticed
def exchange_what_reduces_the_norm(watched: Watched) -> None:
    watched.optimizer.norm_reduce_hook = lambda squares: squares.mul_(1e3)
    for _ in range(2):
        assert watched.step() == ""
    watched.optimizer.norm_reduce_hook = lambda squares: squares.mul_(1e6)


@noticed
def reduce_the_norm_no_more(watched: Watched) -> None:
    reduce_the_norm(watched)
    for _ in range(2):
        assert watched.step() == ""
    watched.optimizer.norm_reduce_hook = None


@noticed
def scale_gradients(watched: Watched) -> None:
    device = watched.params[0].device
    watched.optimizer.grad_scale = torch.tensor(8.0, device=device)  # type: ignore[assignment]
    watched.optimizer.found_inf = torch.tensor(0.0, device=device)  # type: ignore[assignment]


@noticed
def find_an_infinity(watched: Watched) -> None:
    watched.optimizer.found_inf = torch.tensor(1.0, device=watched.params[0].device)  # type: ignore[assignment]


@noticed
def find_one_in_the_same_tensor(watched: Watched) -> None:
    scale_gradients(watched)
    assert watched.step() == ""
    watched.optimizer.found_inf.fill_(1.0)  # type: ignore[attr-defined]


@noticed
def scale_gradients_alone(watched: Watched) -> None:
    watched.optimizer.grad_scale = torch.tensor(8.0, device=watched.params[0].device)  # type: ignore[assignment]


@noticed
def scale_gradients_no_more(watched: Watched) -> None:
    scale_gradients(watched)
    assert watched.step() == ""
    del watched.optimizer.grad_scale, watched.optimizer.found_inf  # type: ignore[attr-defined]


@noticed
def give_a_scale_that_is_none(watched: Watched) -> None:
    watched.optimizer.grad_scale = 8.0  # type: ignore[assignment]


@noticed
def offload(watched: Watched) -> None:
    watched.optimizer.offload()


@noticed
def come_back_from_the_host(watched: Watched) -> None:
    watched.optimizer.offload()
    watched.optimizer.reload()


@noticed
def load_a_checkpoint(watched: Watched) -> None:
    saved = watched.optimizer.state_dict()
    for _ in range(2):
        assert watched.step() == ""
    watched.optimizer.load_state_dict(saved)


# ------------------------------------------------------------------------------------------------------


@needs_exchange_api
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@pytest.mark.parametrize("lr", [0.1, schedules.linear(0.1, 0.5, 8)], ids=["number", "schedule"])
def test_a_change_is_noticed(lr: Any, change: Callable[[Watched], None], compiled: Backend) -> None:
    ours, plain = pair(compiled, lr=lr)
    errors = []
    for watched in (ours, plain):
        watched.set_gradients()
        change(watched)
        errors.append(watched.step())
    assert errors[0] == errors[1]
    assert_same(snapshot(ours.optimizer), snapshot(plain.optimizer))
    if not errors[0]:
        for watched in (ours, plain):  # and settles, or does not, with the same results
            for _ in range(3):
                watched.set_gradients()
                assert watched.step() == ""
        assert_same(snapshot(ours.optimizer), snapshot(plain.optimizer))
        assert ours.optimizer.last_lr() == plain.optimizer.last_lr()


@needs_exchange_api
@pytest.mark.parametrize("change", ["item", "address"])
def test_a_tensor_rate_is_followed_in_its_place(change: str, compiled: Backend) -> None:
    both = pair(compiled, lr=torch.tensor(0.1, dtype=torch.float64))
    for watched in both:
        lr = group(watched)["lr"]
        for value in (0.5, 0.25):
            if change == "item":
                lr.fill_(value)
            else:
                lr.data = torch.tensor(value, dtype=torch.float64)
            watched.set_gradients()
            watched.optimizer.step()
    assert_same(*(snapshot(watched.optimizer) for watched in both))


def test_every_step_asks_for_the_number_of_threads(compiled: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    ours, _ = pair(compiled)
    param, grad = (torch.ones(4, device=compiled.device) for _ in range(2))
    moments = ops.state_like([param]), ops.state_like([param])
    prepared = ops.PreparedAdamW([param], [grad], *moments, ops.StepCounts(1, compiled.device), backend=compiled.name)
    for count in (5, 3):
        monkeypatch.setattr(torch, "get_num_threads", lambda count=count: count)
        ours.optimizer.step()
        prepared()
        for engine in ours.optimizer._devices.engines.values():
            assert engine._call.num_threads == count  # type: ignore[attr-defined]
        assert prepared._call.num_threads == (0 if compiled.device.type == "cuda" else count)
