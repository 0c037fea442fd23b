"""What optimizer_from_config makes of a DeepSpeed configuration, and what it says about a wrong one."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from example_programs import run_program

from fused_sched import FusedScheduledAdam, ScheduleWarning, schedules
from fused_sched.deepspeed import optimizer_from_config, schedule_from_config

WARMUP = {"type": "WarmupLR", "params": {"warmup_min_lr": 0.001, "warmup_max_lr": 0.01, "warmup_num_steps": 100}}
ADAM = {"type": "Adam", "params": {"lr": 0.1}}


def parameter() -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.zeros(1))


def built(optimizer: Any = ADAM, scheduler: Any = WARMUP, **options: Any) -> FusedScheduledAdam:
    ds_config = {"train_batch_size": 8, "optimizer": optimizer, "scheduler": scheduler}
    return optimizer_from_config([parameter()], ds_config, **options)


def rates(opt: FusedScheduledAdam, num_updates: int) -> list[list[float]]:
    """The rates of each group by updates."""
    used = []
    for _ in range(num_updates):
        for group in opt.param_groups:
            group["params"][0].grad = torch.ones(1)
        opt.step()
        used.append(opt.last_lr())
    return [list(column) for column in zip(*used, strict=True)]


# What the sections mean.


def test_the_scheduler_becomes_the_rate() -> None:
    expected = schedules.deepspeed.WarmupLR(0.001, 0.01, 100)
    assert rates(built(), 110) == [expected(range(110)).tolist()]


@pytest.mark.parametrize(
    ("optimizer_type", "params", "decoupled", "weight_decay"),
    [
        ("Adam", {}, True, 0.0),
        ("adam", {"weight_decay": 0.3}, True, 0.3),
        ("Adam", {"adam_w_mode": False}, False, 0.0),
        ("Adam", {"torch_adam": True}, True, 0.01),
        ("Adam", {"torch_adam": True, "adam_w_mode": False}, False, 0.0),
        ("AdamW", {"adam_w_mode": False}, True, 0.0),
        ("ADAMW", {"torch_adam": True, "weight_decay": 0.0}, True, 0.0),
        ("AdamW", {"bias_correction": True, "set_grad_none": True, "fused": True, "differentiable": False}, True, 0.0),
    ],
)
def test_which_adam_it_is(optimizer_type: str, params: dict[str, Any], decoupled: bool, weight_decay: float) -> None:
    (group,) = built({"type": optimizer_type, "params": params}).param_groups
    assert group["decoupled_weight_decay"] is decoupled
    assert group["weight_decay"] == weight_decay


def test_parameters_of_adam_are_taken_over() -> None:
    params = {"lr": 0.2, "betas": [0.5, 0.9], "eps": 1e-3, "amsgrad": True, "maximize": True}
    (group,) = built({"type": "Adam", "params": params}, None).param_groups
    assert {name: group[name] for name in params} == {**params, "betas": (0.5, 0.9)}


@pytest.mark.parametrize("params", [{"type": "AdamW"}, {"type": "AdamW", "params": None}])
def test_an_optimizer_without_params_has_the_defaults(params: dict[str, Any]) -> None:
    (group,) = built(params, None).param_groups
    assert (group["lr"], group["betas"], group["eps"]) == (1e-3, (0.9, 0.999), 1e-8)


def test_options_win() -> None:
    opt = built({"type": "Adam", "params": {"lr": "auto", "weight_decay": "auto"}}, None, lr=0.5, weight_decay=0.25)
    assert (opt.param_groups[0]["lr"], opt.param_groups[0]["weight_decay"]) == (0.5, 0.25)
    read = built(ADAM, {"type": "WarmupLR", "params": {"warmup_num_steps": 5}}, lr=0.5, grad_divisor=2.0)
    assert rates(read, 10)[0][-1] == 0.5


def test_one_cycle_schedules_both_betas() -> None:
    params = {"cycle_min_lr": 0.1, "cycle_max_lr": 1.0, "cycle_first_step_size": 10}
    policy = schedules.deepspeed.OneCycle(**params)
    opt = built({"type": "Adam", "params": {"betas": [0.5, 0.6]}}, {"type": "OneCycle", "params": params})
    alone = schedules.join([policy], [])
    by_hand = FusedScheduledAdam([parameter()], lr=alone, betas=(policy.companions["beta1"], 0.99))
    assert rates(opt, 25) == rates(by_hand, 25)
    assert torch.equal(opt.param_groups[0]["params"][0], by_hand.param_groups[0]["params"][0])


def test_lists_have_an_entry_per_group() -> None:
    groups = [{"params": [parameter()]}, {"params": [parameter()], "weight_decay": 0.5}]
    scheduler = {"type": "WarmupLR", "params": {"warmup_max_lr": [0.1, 0.2], "warmup_num_steps": 5}}
    opt = optimizer_from_config(groups, {"optimizer": ADAM, "scheduler": scheduler})
    assert [column[-1] for column in rates(opt, 10)] == [0.1, 0.2]
    assert [group["weight_decay"] for group in opt.param_groups] == [0.0, 0.5]
    assert "lr" not in groups[0]  # the caller's are left alone


def test_each_groups_own_rate_is_read() -> None:
    groups = [{"params": [parameter()]}, {"params": [parameter()], "lr": torch.tensor(0.5)}]
    scheduler = {"type": "WarmupCosineLR", "params": {"total_num_steps": 20, "warmup_num_steps": 5}}
    opt = optimizer_from_config(groups, {"optimizer": ADAM, "scheduler": scheduler})
    expected = [schedules.deepspeed.WarmupCosineLR(20, 0.0, 5, base_lr=lr) for lr in (0.1, 0.5)]
    assert rates(opt, 30) == [schedule(range(30)).tolist() for schedule in expected]


def test_what_is_odd_about_all_groups_is_said_once() -> None:
    groups = [{"params": [parameter()], "lr": lr} for lr in (0.1, 0.2)]
    ds_config = {"optimizer": ADAM, "scheduler": {"type": "StepLR", "params": {"step_size": 2.5}}}
    with pytest.warns(ScheduleWarning, match="every 5 updates") as caught:
        optimizer_from_config(groups, ds_config)
    assert len(caught) == 1


def test_named_parameters_keep_their_names() -> None:
    model = torch.nn.Linear(2, 1)
    opt = optimizer_from_config(model.named_parameters(), {"optimizer": ADAM, "scheduler": WARMUP})
    assert opt.param_groups[0]["param_names"] == ["weight", "bias"]


@pytest.mark.parametrize(
    ("scheduler", "expected"),
    [
        ({"type": "StepLR", "params": {"step_size": 2, "gamma": 0.5}}, [0.1, 0.1, 0.05, 0.05, 0.025]),
        ({"type": "LinearLR", "params": {"start_factor": 0.5, "total_iters": 2, "last_epoch": -1}}, [0.05, 0.075, 0.1]),
        ({"type": "LambdaLR", "params": {"lr_lambda": lambda t: 1 / (t + 1), "num_steps": 2}}, [0.1, 0.05]),
    ],
)
def test_other_schedulers_are_torchs(scheduler: dict[str, Any], expected: list[float]) -> None:
    assert rates(built(ADAM, scheduler), len(expected))[0] == pytest.approx(expected, rel=1e-14)


def test_lists_of_torchs_cyclic_schedulers_have_an_entry_per_group() -> None:
    params = {"base_lr": [0.1, 0.2], "max_lr": [1.0, 2.0], "step_size_up": 4, "cycle_momentum": False}
    groups = [{"params": [parameter()]}, {"params": [parameter()]}]
    opt = optimizer_from_config(groups, {"optimizer": ADAM, "scheduler": {"type": "CyclicLR", "params": params}})
    assert [column[4] for column in rates(opt, 5)] == [1.0, 2.0]


# Files.


def test_a_file_is_read_as_the_dict(tmp_path: Path) -> None:
    path = tmp_path / "ds_config.json"
    path.write_text(json.dumps({"optimizer": ADAM, "scheduler": WARMUP}))
    for name in (path, str(path)):
        assert rates(optimizer_from_config([parameter()], name), 3) == rates(built(), 3)


def test_a_file_may_have_comments_as_in_hjson(tmp_path: Path) -> None:
    pytest.importorskip("hjson")
    path = tmp_path / "ds_config.json"
    path.write_text('{\n  # the peak\n  "scheduler": {"type": "WarmupLR", "params": {"warmup_max_lr": 0.1}},\n}')
    assert schedule_from_config(path) == schedules.deepspeed.WarmupLR(warmup_max_lr=0.1)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "ds_config.json is n"),
        ('{"optimizer": {}, "optimizer": {}}', '"optimizer" twice'),
        ("[1]", "must be a dict"),
    ],
)
def test_a_file_that_is_no_configuration(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "ds_config.json"
    path.write_text(text)
    with pytest.raises((TypeError, ValueError), match=message):
        optimizer_from_config([parameter()], path)


def test_without_hjson_the_remedy_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "hjson", None)
    path = tmp_path / "ds_config.json"
    path.write_text("{ # a comment\n}")
    with pytest.raises(ValueError, match="install hjson"):
        optimizer_from_config([parameter()], path)


def test_a_file_that_is_not_there() -> None:
    with pytest.raises(FileNotFoundError, match=r"ds_config\.json"):
        optimizer_from_config([parameter()], "no/ds_config.json")


# Errors name the key.

REFUSED: list[tuple[dict[str, Any], str]] = [
    ({}, 'no "optimizer" section'),
    ({"scheduler": WARMUP}, 'no "optimizer" section'),
    ({"optimiser": ADAM}, 'no key "optimiser"; did you mean "optimizer"'),
    ({"optimizer": ADAM, "schedular": WARMUP}, 'no key "schedular"; did you mean "scheduler"'),
    ({"optimizer": ADAM, "Scheduler": WARMUP}, 'no key "Scheduler"; did you mean "scheduler"'),
    ({"optimizer": "Adam"}, "optimizer must be a section"),
    ({"optimizer": {"params": {}}}, r"optimizer\.type must be the name"),
    ({"optimizer": {"type": "Adam", "parms": {}}}, 'optimizer has no key "parms"; did you mean "params"'),
    ({"optimizer": {"type": "FusedAdam", "params": {}}}, r'optimizer\.type .* got "FusedAdam".* mean "Adam"'),
    ({"optimizer": {"type": "Lamb", "params": {}}}, r'optimizer\.type .* got "Lamb".* let DeepSpeed build it'),
    ({"optimizer": {"type": "Adam", "params": [1]}}, r"optimizer\.params must be an object"),
    ({"optimizer": {"type": "Adam", "params": {"beta": [0, 0]}}}, r'optimizer\.params has no key "beta".* "betas"'),
    ({"optimizer": {"type": "Adam", "params": {"lr": "auto"}}}, r'optimizer\.params\.lr is "auto"'),
    ({"optimizer": {"type": "Adam", "params": {"lr": "1e-3"}}}, "lr must be a number"),
    ({"optimizer": {"type": "Adam", "params": {"lr": -1.0}}}, r"lr must be in \[0, inf\)"),
    ({"optimizer": {"type": "Adam", "params": {"betas": "auto"}}}, r'optimizer\.params\.betas is "auto"'),
    ({"optimizer": {"type": "Adam", "params": {"max_grad_norm": 1}}}, "max_grad_norm .* use gradient_clipping"),
    ({"optimizer": {"type": "Adam", "params": {"bias_correction": False}}}, "bias_correction must be true"),
    ({"optimizer": {"type": "Adam", "params": {"differentiable": True}}}, "differentiable must be false"),
    ({"optimizer": ADAM, "gradient_clipping": "auto"}, "gradient_clipping must be the largest norm"),
]
SCHEDULERS_REFUSED: list[tuple[Any, str]] = [
    ([], "scheduler must be a section"),
    ({"params": {}}, r"scheduler\.type must be the name"),
    ({"type": "WarmupLR"}, r"scheduler\.params is missing.* takes warmup_min_lr, warmup_max_lr"),
    ({"type": "WarmupLR", "param": {}}, 'scheduler has no key "param"; did you mean "params"'),
    ({"type": "warmuplr", "params": {}}, r'scheduler\.type "warmuplr" .* did you mean "WarmupLR"'),
    ({"type": "ReduceOnPlane", "params": {}}, r'scheduler\.type "ReduceOnPlane"'),
    ({"type": "DeepSpeedSchedule", "params": {}}, r'scheduler\.type "DeepSpeedSchedule" is neither'),
    ({"type": "WarmupLR", "params": {"warmup_steps": 1}}, r'scheduler\.params has no key "warmup_steps"; .*num_steps'),
    ({"type": "WarmupLR", "params": {"warmup_num_steps": "auto"}}, r'scheduler\.params\.warmup_num_steps is "auto"'),
    ({"type": "WarmupLR", "params": {"warmup_num_steps": 1e2}}, "warmup_num_steps must be a positive int"),
    ({"type": "WarmupLR", "params": {"base_lr": 0.1}}, r'scheduler\.params has no key "base_lr"'),
    (
        {"type": "WarmupLR", "params": {"last_batch_iteration": 9}},
        r"scheduler\.params\.last_batch_iteration must be -1",
    ),
    ({"type": "WarmupLR", "params": {"warmup_max_lr": [0.1, 0.2]}}, "warmup_max_lr must be .* 1 groups"),
    ({"type": "WarmupCosineLR", "params": {}}, r"scheduler\.params\.total_num_steps is missing"),
    ({"type": "OneCycle", "params": {"cycle_min_lr": 0.1}}, r"scheduler\.params\.cycle_max_lr is missing"),
    ({"type": "StepLR", "params": {}}, r"scheduler\.params\.step_size is missing"),
    ({"type": "StepLR", "params": {"step_size": 2, "gama": 0.5}}, r'scheduler\.params has no key "gama"; .*"gamma"'),
]


@pytest.mark.parametrize(
    ("ds_config", "message"),
    REFUSED + [({"optimizer": ADAM, "scheduler": scheduler}, message) for scheduler, message in SCHEDULERS_REFUSED],
)
def test_errors_name_the_key(ds_config: dict[str, Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        optimizer_from_config([parameter()], ds_config)


def test_a_rate_that_is_scheduled_twice_is_refused() -> None:
    with pytest.raises(ValueError, match="scheduled twice"):
        built(lr=schedules.constant(0.1))


def test_clipping_is_passed_on() -> None:
    ds_config = {"optimizer": ADAM, "gradient_clipping": 1.0}
    assert optimizer_from_config([parameter()], ds_config).max_grad_norm == 1.0
    assert optimizer_from_config([parameter()], ds_config, max_grad_norm=None).max_grad_norm is None
    assert optimizer_from_config([parameter()], {"optimizer": ADAM, "gradient_clipping": 0}).max_grad_norm is None
    assert optimizer_from_config([parameter()], {"optimizer": ADAM}).max_grad_norm is None


def test_a_tensor_is_no_list_of_parameters() -> None:
    with pytest.raises(TypeError, match="params argument"):
        optimizer_from_config(parameter(), {"optimizer": ADAM, "scheduler": WARMUP})


# The schedule alone.


@pytest.mark.parametrize(
    ("optimizer", "base_lr", "expected"),
    [
        ({"type": "Adam", "params": {"lr": 0.2}}, None, 0.2),
        ({"type": "Adam"}, None, 1e-3),
        ({"type": "Lamb", "params": {"lr": 0.2}}, None, 0.2),
        ({"type": "Adam", "params": {"lr": "auto"}}, 0.3, 0.3),
        (None, 0.3, 0.3),
    ],
)
def test_the_schedule_reads_the_rate(optimizer: Any, base_lr: float | None, expected: float) -> None:
    ds_config = {"optimizer": optimizer, "scheduler": {"type": "WarmupLR", "params": {}}}
    assert schedule_from_config(ds_config, base_lr=base_lr) == schedules.deepspeed.WarmupLR(base_lr=expected)


@pytest.mark.parametrize("optimizer", [None, {"type": "Lamb"}, {"type": "Adam", "params": {"lr": "auto"}}])
def test_a_rate_that_is_not_there_is_asked_for(optimizer: Any) -> None:
    with pytest.raises(ValueError, match="base_lr"):
        schedule_from_config({"optimizer": optimizer, "scheduler": {"type": "WarmupLR", "params": {}}})


def test_a_configuration_without_a_scheduler_has_no_schedule() -> None:
    with pytest.raises(ValueError, match='no "scheduler" section'):
        schedule_from_config({"optimizer": ADAM})


# The example.


def test_the_example_trains(tmp_path: Path) -> None:
    lines = run_program("deepspeed_config.py", folder=tmp_path).splitlines()
    assert lines[0] == "Learning rate after warm-up: 0.01"
    assert re.fullmatch(r"Loss: \d+\.\d+", lines[1])
    assert lines[2] == "Training step completed"
    assert not list(tmp_path.iterdir())
