"""What is refused: with which error, whether it says what to do, and that nothing was changed."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from cases import construct_and_step

from fused_sched import FusedScheduledAdam, ScheduleWarning, schedules

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


@pytest.mark.parametrize("where", ["default", "group", "both groups"])
def test_warning_of_a_schedule_comes_once_and_at_the_callers_line(where: str) -> None:
    """The constructor reads its options for the defaults and again for every group, inside torch's own __init__."""
    odd, even = schedules.linear(1e-2, -1e-3, 10), schedules.constant(0.1)
    groups: list[dict[str, Any]] = [{"params": [torch.nn.Parameter(torch.ones(2))]} for _ in range(2)]
    for group in {"default": [], "group": groups[1:], "both groups": groups}[where]:
        group["lr"] = odd
    with pytest.warns(ScheduleWarning, match="negative") as caught:
        optimizer = FusedScheduledAdam(groups, lr=odd if where == "default" else even)
    assert [warning.filename for warning in caught] == [__file__]
    with pytest.warns(ScheduleWarning, match="negative") as caught:  # another call says it again
        optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(2))], "lr": odd})
    assert [warning.filename for warning in caught] == [__file__]


@pytest.mark.parametrize(
    ("name", "value", "error", "says"),
    [
        ("max_grad_norm", 0.0, ValueError, "must be positive, got 0.0; pass None"),
        ("max_grad_norm", -1, ValueError, "must be positive, got -1; pass None"),
        ("max_grad_norm", float("nan"), ValueError, "must be positive, got nan"),
        ("max_grad_norm", "1", TypeError, "must be a number or None, got '1' of type str; pass float"),
        ("max_grad_norm", True, TypeError, "must be a number or None, got True"),
        ("skip_nonfinite", 1, TypeError, "must be True or False, got 1 of type int; pass a bool"),
    ],
)
def test_options_of_the_norm(name: str, value: Any, error: type[Exception], says: str) -> None:
    param = torch.nn.Parameter(torch.ones(2))
    with pytest.raises(error, match=says):
        FusedScheduledAdam([param], **{name: value})
    optimizer = FusedScheduledAdam([param])
    before = getattr(optimizer, name)
    with pytest.raises(error, match=says):
        setattr(optimizer, name, value)
    assert getattr(optimizer, name) == before
    with pytest.raises(ValueError, match=f"{name} is one for the whole optimizer; pass it to the constructor"):
        FusedScheduledAdam([{"params": [param], name: value}])


def test_norm_that_is_not_computed_says_how_to_get_it() -> None:
    with pytest.raises(RuntimeError, match=r"max_grad_norm is None.*pass max_grad_norm=float\('inf'\)"):
        _ = FusedScheduledAdam([torch.nn.Parameter(torch.ones(2))]).grad_norm


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


def test_missing_backend_says_what_is_missing() -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises((RuntimeError, ValueError), match="cuda"):
        construct_and_step([torch.nn.Parameter(torch.ones(1))], "cuda")
