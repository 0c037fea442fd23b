"""What is refused: with which error, whether it says what to do, and that nothing was changed."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import assert_same, snapshot
from conftest import Backend

from fused_sched import FusedScheduledAdam, schedules

NAN, INF = math.nan, math.inf

# option, unusable values
NUMBERS: dict[str, tuple[Any, ...]] = {
    "lr": (-1e-3, NAN, INF, -INF, "1e-3", None),
    "betas": ((1.0, 0.999), (0.9, 1.0), (-0.1, 0.9), (0.9, NAN), (0.9,), (0.9, 0.99, 0.999), 0.9, None),
    "eps": (-1e-8, NAN, INF, "small"),
    "weight_decay": (-0.1, NAN, INF, "much"),
    "grad_divisor": (0.0, -1.0, NAN, INF, "two"),
    "backend": ("gpu", "", None),
    "master": ("fp64", "bf16", "", None, 3),
    "moments": ("fp16", "int8", "", None),
}


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name, values in NUMBERS.items() for value in values], ids=repr
)
def test_unusable_option_is_refused_when_constructed(name: str, value: Any) -> None:
    param = torch.nn.Parameter(torch.ones(2))
    with pytest.raises((ValueError, TypeError)) as raised:
        FusedScheduledAdam([param], **{name: value})
    assert (name if name != "betas" else "beta") in str(raised.value)
    if value != "":
        got = next((item for item in value if not 0 <= item < 1), value) if isinstance(value, tuple) else value
        assert str(got) in str(raised.value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        (name, value)
        for name in ("lr", "betas", "eps", "weight_decay", "master", "moments")
        for value in NUMBERS[name][:2]
    ],
    ids=repr,
)
def test_unusable_group_option_is_refused_and_adds_no_group(name: str, value: Any) -> None:
    optimizer = FusedScheduledAdam([torch.nn.Parameter(torch.ones(2))])
    with pytest.raises((ValueError, TypeError)):
        optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(2))], name: value})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize("name", ["split16", "split8", "stochastic"])
def test_masters_of_bf16_bits_are_refused_for_fp16_parameters(name: str) -> None:
    half = torch.nn.Parameter(torch.ones(2, dtype=torch.float16))
    with pytest.raises(ValueError, match=f"'fp32' or 'none', got '{name}'"):
        FusedScheduledAdam([half], master=name)
    optimizer = FusedScheduledAdam([torch.nn.Parameter(torch.ones(2))], master=name)  # which ignores it
    with pytest.raises(ValueError, match=name):
        optimizer.add_param_group({"params": [half]})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize("name", ["split16", "split8", "stochastic"])
def test_model_converted_to_fp16_is_refused_before_anything_changes(name: str) -> None:
    param = torch.nn.Parameter(torch.ones(2, dtype=torch.bfloat16))
    optimizer = FusedScheduledAdam([param], master=name)
    param.data = param.data.half()
    param.grad = torch.ones_like(param)
    with pytest.raises(ValueError, match=name):
        optimizer.step()
    assert optimizer.clock == 0
    assert param.tolist() == [1.0, 1.0]


@pytest.mark.parametrize("name", ["bf16", "8bit"])
def test_amsgrad_needs_fp32_moments(name: str) -> None:
    param = torch.nn.Parameter(torch.ones(2))
    with pytest.raises(ValueError, match=f"amsgrad=True needs moments='fp32', got '{name}'"):
        FusedScheduledAdam([param], moments=name, amsgrad=True)
    optimizer = FusedScheduledAdam([param], moments=name)
    optimizer.param_groups[0]["amsgrad"] = True
    param.grad = torch.ones_like(param)
    with pytest.raises(ValueError, match="amsgrad"):
        optimizer.step()
    assert param.tolist() == [1.0, 1.0]


@pytest.mark.parametrize("option", [{"max_grad_norm": 1.0}, {"skip_nonfinite": True}], ids=repr)
def test_planned_options_say_so(option: dict[str, Any]) -> None:
    with pytest.raises(NotImplementedError, match=next(iter(option))):
        FusedScheduledAdam([torch.nn.Parameter(torch.ones(2))], **option)


@pytest.mark.parametrize("name", ["fused", "foreach", "capturable", "differentiable"])
def test_options_of_torchs_adam_say_what_to_do_instead(name: str) -> None:
    param = torch.nn.Parameter(torch.ones(2))
    with pytest.raises((TypeError, ValueError), match=name):
        FusedScheduledAdam([param], **{name: True})
    with pytest.raises((TypeError, ValueError), match=name):
        FusedScheduledAdam([{"params": [param], name: True}])


def test_unknown_option_is_a_type_error() -> None:
    with pytest.raises(TypeError, match="learning_rate"):
        FusedScheduledAdam([torch.nn.Parameter(torch.ones(2))], learning_rate=0.1)  # type: ignore[call-arg]


def test_options_after_weight_decay_are_keyword_only() -> None:
    with pytest.raises(TypeError):
        FusedScheduledAdam([torch.nn.Parameter(torch.ones(2))], 1e-3, (0.9, 0.99), 1e-8, 0.0, True)  # type: ignore[misc]


@pytest.mark.parametrize("schedule", [schedules.constant(1.0), schedules.linear(0.5, 1.5, 100)], ids=repr)
@pytest.mark.parametrize("position", [0, 1])
def test_momentum_schedule_that_reaches_one_is_refused(schedule: Any, position: int) -> None:
    betas: list[Any] = [0.9, 0.99]
    betas[position] = schedule
    with pytest.raises(ValueError, match=f"beta{position + 1}"):
        FusedScheduledAdam([torch.nn.Parameter(torch.ones(2))], betas=tuple(betas))


def construct_and_step(params: list[torch.Tensor], backend: str = "auto") -> None:
    """Where parameters are refused, when constructed or when stepped, is left open."""
    optimizer = FusedScheduledAdam(params, backend=backend)
    for param in params:
        if param.is_floating_point() or param.is_complex():
            param.grad = torch.ones_like(param)
    optimizer.step()


# ---- parameters ----------------------------------------------------------------------------------


def test_no_parameters() -> None:
    with pytest.raises(ValueError, match="empty"):
        FusedScheduledAdam([])


def test_one_tensor_instead_of_a_list() -> None:
    with pytest.raises(TypeError):
        FusedScheduledAdam(torch.nn.Parameter(torch.ones(2)))  # type: ignore[arg-type]


def test_parameter_that_is_no_leaf() -> None:
    with pytest.raises(ValueError, match="leaf"):
        FusedScheduledAdam([torch.ones(2, requires_grad=True) * 2.0])


def test_duplicate_parameters_across_groups() -> None:
    param = torch.nn.Parameter(torch.ones(2))
    with pytest.raises(ValueError, match="more than one parameter group"):
        FusedScheduledAdam([{"params": [param]}, {"params": [param]}])


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128, torch.int32], ids=str)
def test_parameter_of_an_unsupported_dtype(dtype: torch.dtype) -> None:
    param = torch.ones(2, dtype=dtype)
    if dtype.is_complex:
        param.requires_grad_()
    with pytest.raises((ValueError, TypeError), match=str(dtype).replace("torch.", "")):
        construct_and_step([param])


def test_sparse_parameter() -> None:
    param = torch.eye(3).to_sparse().requires_grad_()
    with pytest.raises((ValueError, TypeError, RuntimeError), match=r"(?i)sparse"):
        construct_and_step([param])


# ---- steps: each error leaves everything as it was -----------------------------------------------


def overlapping(backend: Backend) -> list[torch.Tensor]:
    base = torch.ones(10, device=backend.device)
    return [base[0:6].detach().requires_grad_(), base[5:10].detach().requires_grad_()]


def overlapping_behind_another(backend: Backend) -> list[torch.Tensor]:
    """A column, an element between its rows, and a row that crosses the column."""
    base = torch.ones(4, 4, device=backend.device)
    return [part.detach().requires_grad_() for part in (base[:, 0], base[0, 1:2], base[2, 0:2])]


def expanded(backend: Backend) -> list[torch.Tensor]:
    return [torch.ones(1, device=backend.device).expand(4).detach().requires_grad_()]


def self_overlapping(backend: Backend) -> list[torch.Tensor]:
    base = torch.ones(10, device=backend.device)
    return [base.as_strided((3, 4), (2, 1)).detach().requires_grad_()]


@pytest.mark.parametrize(
    "make",
    [overlapping, overlapping_behind_another, expanded, self_overlapping],
    ids=lambda make: make.__name__,
)
def test_parameters_that_overlap_are_refused(make: Callable[[Backend], list[torch.Tensor]], backend: Backend) -> None:
    params = make(backend)
    good = backend.parameter([1.0])
    before = [param.detach().clone() for param in params]
    with pytest.raises((ValueError, RuntimeError), match=r"(?i)overlap|share memory"):
        construct_and_step([good, *params], backend.name)
    assert all(torch.equal(param.detach(), value) for param, value in zip(params, before, strict=True))
    assert good.item() == 1.0


def test_same_memory_in_two_parameters_is_refused(backend: Backend) -> None:
    first = backend.parameter([1.0, 2.0])
    second = torch.nn.Parameter(first.data)
    with pytest.raises((ValueError, RuntimeError), match=r"(?i)overlap|memory"):
        construct_and_step([first, second], backend.name)
    assert first.tolist() == [1.0, 2.0]


def test_parameters_made_to_overlap_later_are_refused(backend: Backend) -> None:
    params = [backend.parameter([1.0, 2.0]), backend.parameter([3.0, 4.0])]
    optimizer = backend.optimizer(params)
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer.step()
    params[1].data = params[0].data
    before = snapshot(optimizer)
    with pytest.raises((ValueError, RuntimeError), match=r"(?i)overlap|memory"):
        optimizer.step()
    assert_same(snapshot(optimizer), before)
    assert optimizer.clock == 1


def test_interleaved_parameters_do_not_overlap(backend: Backend) -> None:
    """Columns of one matrix share its range of addresses and no element."""
    base = torch.zeros(4, 2, device=backend.device)
    params = [base[:, i].detach().requires_grad_() for i in range(2)]
    optimizer = backend.optimizer(params, lr=0.5, eps=0.0)
    for i, param in enumerate(params):
        param.grad = torch.full((4,), 1.0 - 2.0 * i, device=backend.device)
    optimizer.step()
    assert base.tolist() == [[-0.5, 0.5]] * 4


def with_sparse_grad(param: torch.Tensor) -> None:
    param.grad = torch.eye(2, device=param.device).to_sparse()


def with_complex_grad(param: torch.Tensor) -> None:
    if hasattr(param, "grad_dtype"):
        param.grad_dtype = None
    try:
        param.grad = torch.ones(2, 2, dtype=torch.complex64, device=param.device)
    except (RuntimeError, TypeError):
        param.main_grad = torch.ones(2, 2, dtype=torch.complex64, device=param.device)  # type: ignore[attr-defined]


def with_integer_main_grad(param: torch.Tensor) -> None:
    param.main_grad = torch.ones(2, 2, dtype=torch.int32, device=param.device)  # type: ignore[attr-defined]


def with_main_grad_elsewhere(param: torch.Tensor) -> None:
    param.main_grad = torch.ones(2, 2, device="meta")  # type: ignore[attr-defined]


def with_main_grad_of_another_shape(param: torch.Tensor) -> None:
    param.main_grad = torch.ones(4, device=param.device)  # type: ignore[attr-defined]


def with_nan_lr(param: torch.Tensor) -> dict[str, Any]:
    param.grad = torch.ones_like(param)
    return {"lr": NAN}


def with_beta_of_one(param: torch.Tensor) -> dict[str, Any]:
    param.grad = torch.ones_like(param)
    return {"betas": (0.9, 1.0)}


def with_negative_decay(param: torch.Tensor) -> dict[str, Any]:
    param.grad = torch.ones_like(param)
    return {"weight_decay": -1.0}


def with_infinite_eps(param: torch.Tensor) -> dict[str, Any]:
    param.grad = torch.ones_like(param)
    return {"eps": INF}


def with_unknown_master(param: torch.Tensor) -> dict[str, Any]:
    param.grad = torch.ones_like(param)
    return {"master": "half"}


def with_state_of_another_shape(param: torch.Tensor) -> dict[str, Any]:
    param.grad = torch.ones_like(param)
    return {"state": ("exp_avg", torch.zeros(3, device=param.device))}


STEP_ERRORS: list[Callable[[torch.Tensor], dict[str, Any] | None]] = [
    with_sparse_grad,
    with_complex_grad,
    with_integer_main_grad,
    with_main_grad_elsewhere,
    with_main_grad_of_another_shape,
    with_nan_lr,
    with_beta_of_one,
    with_negative_decay,
    with_infinite_eps,
    with_unknown_master,
    with_state_of_another_shape,
]


@pytest.mark.parametrize("spoil", STEP_ERRORS, ids=lambda spoil: spoil.__name__)
@pytest.mark.parametrize("updates", [0, 2])
def test_failed_step_changes_nothing(
    spoil: Callable[[torch.Tensor], dict[str, Any] | None], updates: int, backend: Backend
) -> None:
    """The spoilt parameter comes last, after good ones in two groups: none of them may have been stepped."""
    params = [backend.parameter(torch.ones(2, 2) * (i + 1)) for i in range(3)]
    groups = [{"params": params[:1], "lr": 0.1}, {"params": params[1:]}]
    optimizer = backend.optimizer(groups, lr=schedules.linear(0.1, 0.5, 4), weight_decay=0.1)
    for _ in range(updates):
        for param in params:
            param.grad = torch.ones_like(param)
        optimizer.step()
    for param in params:
        param.grad = torch.ones_like(param)
    params[-1].grad = None
    edits = spoil(params[-1]) or {}
    key_and_value = edits.pop("state", None)
    if key_and_value is not None:
        optimizer.state[params[-1]][key_and_value[0]] = key_and_value[1]
    optimizer.param_groups[-1].update(edits)

    before = snapshot(optimizer)
    versions = [param._version for param in params]
    groups_before = copy.deepcopy([{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups])
    with pytest.raises((ValueError, TypeError, RuntimeError, NotImplementedError)):
        optimizer.step()
    assert_same(snapshot(optimizer), before)
    assert [param._version for param in params] == versions
    assert repr([{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]) == repr(groups_before)
    assert optimizer.clock == updates


def test_step_goes_on_after_the_fault_is_removed(backend: Backend) -> None:
    def run(fail: bool) -> dict[str, torch.Tensor]:
        param = backend.parameter(torch.ones(2, 2))
        optimizer = backend.optimizer([param], lr=schedules.linear(0.1, 0.5, 4))
        for index in range(4):
            if fail and index in (0, 2):
                with_sparse_grad(param)
                with pytest.raises((ValueError, TypeError, RuntimeError), match=r"(?i)sparse"):
                    optimizer.step()
                param.grad = None
            param.grad = torch.full_like(param, 1.0 + index)
            optimizer.step()
        assert optimizer.clock == 4
        return snapshot(optimizer)

    assert_same(run(fail=True), run(fail=False))


@pytest.mark.parametrize(
    "name",
    ["found_inf", "grad_scale"],
)
def test_scaler_attributes_without_a_value_change_nothing(name: str, backend: Backend) -> None:
    param = backend.parameter([1.0])
    optimizer = backend.optimizer([param])
    param.grad = torch.ones_like(param)
    setattr(optimizer, name, torch.ones((), device="meta"))
    with pytest.raises((ValueError, TypeError, RuntimeError, NotImplementedError)):
        optimizer.step()
    assert param.item() == 1.0
    assert optimizer.clock == 0


def test_missing_backend_says_what_is_missing() -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises((RuntimeError, ValueError), match="cuda"):
        construct_and_step([torch.nn.Parameter(torch.ones(1))], "cuda")
