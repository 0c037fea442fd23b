"""Every schedule of DeepSpeed against the installed DeepSpeed, and a training against its engine."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterator
from dataclasses import MISSING, fields
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

with warnings.catch_warnings():
    warnings.filterwarnings("ignore", category=DeprecationWarning)  # of what DeepSpeed imports
    import deepspeed
    from deepspeed.ops.adam import FusedAdam
    from deepspeed.runtime import config as deepspeed_config
    from deepspeed.runtime import lr_schedules

from tolerances import ROUNDING

from fused_sched import ScheduleWarning, schedules
from fused_sched.deepspeed import optimizer_from_config

NAMES = lr_schedules.VALID_LR_SCHEDULES
Params = dict[str, Any]

expects_oddities = pytest.mark.filterwarnings("ignore::fused_sched.ScheduleWarning")


def drive(name: str, params: Params, num_updates: int, opt_lrs: tuple[float, ...] = (0.1,)) -> dict[str, np.ndarray]:
    """What DeepSpeed's scheduler makes each group use: arrays of updates by groups, up to an error of its own."""
    groups = [{"params": [torch.nn.Parameter(torch.zeros(1))], "lr": lr} for lr in opt_lrs]
    optimizer = torch.optim.Adam(groups)
    scheduler = getattr(lr_schedules, name)(optimizer, **params)
    used = []
    for _ in range(num_updates):
        used.append([(group["lr"], *group["betas"]) for group in optimizer.param_groups])
        try:
            scheduler.step()
        except ZeroDivisionError:
            break
    return dict(zip(("lr", "beta1", "beta2"), np.moveaxis(np.array(used), 2, 0), strict=True))


def assert_same(name: str, params: Params, num_updates: int = 200, opt_lrs: tuple[float, ...] = (0.1,)) -> None:
    expected = drive(name, params, num_updates, opt_lrs)
    ours = getattr(schedules.deepspeed, name).per_group(opt_lrs, **params)
    for group, schedule in enumerate(ours):
        assert set(schedule.companions) == ({"beta1", "beta2"} if getattr(schedule, "cycle_momentum", False) else set())
        for hyperparameter, one in {"lr": schedule, **schedule.companions}.items():
            values = expected[hyperparameter][:, group]
            error = np.abs(one(range(len(values))) - values).max()
            assert error <= ROUNDING * np.abs(values).max(), (hyperparameter, group)


rates = st.floats(1e-6, 1.0)
ratios = st.floats(0.0, 1.0)
momenta = st.floats(0.0, 0.999)
counts = st.integers(1, 60)
stairs = st.integers(-1, 12)
warmups = {"warmup_num_steps": counts, "warmup_type": st.sampled_from(["log", "linear"])}


def per_group(values: st.SearchStrategy[float]) -> st.SearchStrategy[Any]:
    """A number, or one for each of two groups."""
    return values | st.tuples(values, values).map(list)


REQUIRED: dict[str, dict[str, st.SearchStrategy[Any]]] = {
    "LRRangeTest": {},
    "OneCycle": {
        "cycle_min_lr": per_group(rates),
        "cycle_max_lr": per_group(rates),
        "cycle_first_step_size": counts,
    },
    "WarmupLR": warmups,
    "WarmupDecayLR": {"total_num_steps": st.integers(0, 120), **warmups},
    "WarmupCosineLR": {"total_num_steps": st.integers(0, 120), **warmups},
}
OPTIONAL: dict[str, dict[str, st.SearchStrategy[Any]]] = {
    "LRRangeTest": {
        "lr_range_test_min_lr": per_group(rates),
        "lr_range_test_step_size": counts,
        "lr_range_test_step_rate": st.floats(-2.0, 2.0),
        "lr_range_test_staircase": st.booleans(),
    },
    "OneCycle": {
        "decay_lr_rate": st.floats(0.0, 2.0),
        "cycle_second_step_size": st.integers(0, 60),
        "cycle_first_stair_count": stairs,
        "cycle_second_stair_count": stairs,
        "decay_step_size": st.integers(0, 20),
        "cycle_momentum": st.booleans(),
        "cycle_min_mom": per_group(momenta),
        "cycle_max_mom": per_group(momenta),
        "decay_mom_rate": st.floats(-0.1, 0.1),
    },
    "WarmupLR": {"warmup_min_lr": per_group(rates), "warmup_max_lr": per_group(rates)},
    "WarmupDecayLR": {"warmup_min_lr": per_group(rates), "warmup_max_lr": st.none() | per_group(rates)},
    "WarmupCosineLR": {"warmup_min_ratio": ratios, "cos_min_ratio": st.floats(-0.5, 1.5)},
}


@expects_oddities
@pytest.mark.parametrize("name", NAMES)
def test_random_configurations_of_two_groups(name: str) -> None:
    """240 updates hold every boundary of these schedules with its neighbours."""

    @settings(deadline=None, max_examples=80)
    @given(
        params=st.fixed_dictionaries(REQUIRED[name], optional=OPTIONAL[name]),
        opt_lrs=st.tuples(rates, rates),
    )
    def check(params: Params, opt_lrs: tuple[float, float]) -> None:
        assert_same(name, params, 240, opt_lrs)

    check()


CYCLE = {"cycle_min_lr": 0.01, "cycle_max_lr": 0.1}

#: Arguments whose effect their owner may not expect, and a word of the warning.
ODD: dict[str, list[tuple[Params, str]]] = {
    "LRRangeTest": [
        ({"lr_range_test_step_rate": -3.0, "lr_range_test_step_size": 7}, "turns negative"),
        ({"lr_range_test_min_lr": -0.1}, "turns negative"),
        ({"lr_range_test_step_rate": 0.0}, "0.001 at every update"),
        ({"lr_range_test_min_lr": 0.0}, "0.0 at every update"),
    ],
    "OneCycle": [
        ({**CYCLE, "cycle_min_lr": -0.05, "cycle_first_step_size": 9}, "turns negative"),
        ({**CYCLE, "cycle_first_step_size": 9, "cycle_second_step_size": 0}, "never used"),
        ({**CYCLE, "cycle_first_step_size": 9, "decay_lr_rate": 0.5}, "decay_step_size=0"),
        ({**CYCLE, "cycle_first_step_size": 9, "decay_mom_rate": 0.5}, "decay_step_size=0"),
        ({"cycle_min_lr": 0.1, "cycle_max_lr": 0.01, "cycle_first_step_size": 9}, "goes down before"),
        # With a pole at update 18 + 10, where DeepSpeed divides by zero.
        ({**CYCLE, "cycle_first_step_size": 9, "decay_lr_rate": -0.5, "decay_step_size": 5}, "near update 28"),
        ({**CYCLE, "cycle_first_step_size": 9, "decay_mom_rate": 0.01, "decay_step_size": 1}, "after update 29.1"),
        ({**CYCLE, "cycle_first_step_size": 9, "decay_mom_rate": -0.1, "decay_step_size": 1}, "after update 28"),
        ({**CYCLE, "cycle_first_step_size": 9, "cycle_max_mom": 1.0}, "after update 0"),
        ({**CYCLE, "cycle_first_step_size": 9.5, "cycle_second_step_size": 4.25}, "lasts for one update"),
        ({**CYCLE, "cycle_first_step_size": 9.5, "cycle_second_step_size": 0}, "never used"),
        ({**CYCLE, "cycle_first_step_size": 0.25, "cycle_second_step_size": 0.5}, "lasts for one update"),
    ],
    "WarmupLR": [
        ({"warmup_min_lr": -0.01, "warmup_num_steps": 20}, "turns negative"),
        ({"warmup_max_lr": 0.0, "warmup_num_steps": 20}, "0 at every update"),
        ({"warmup_min_lr": 0.5, "warmup_num_steps": 20}, "falls during"),
        ({"warmup_type": "cosine", "warmup_num_steps": 20}, 'taken for "log"'),
        ({"warmup_num_steps": 1}, "taken for 2"),
    ],
    "WarmupDecayLR": [
        ({"total_num_steps": 10, "warmup_num_steps": 20}, "without a decay"),
        ({"total_num_steps": 20, "warmup_num_steps": 20, "warmup_type": "linear"}, "without a decay"),
        ({"total_num_steps": -5, "warmup_num_steps": 20}, "without a decay"),
        ({"total_num_steps": 30.5, "warmup_num_steps": 30, "warmup_type": None}, 'taken for "log"'),
    ],
    "WarmupCosineLR": [
        ({"total_num_steps": 10, "warmup_num_steps": 20}, "without a decay"),
        ({"total_num_steps": 50, "warmup_num_steps": 20, "cos_min_ratio": 1.5}, "rises after"),
        ({"total_num_steps": 50, "warmup_num_steps": 20, "warmup_min_ratio": -0.5}, "turns negative"),
    ],
}


@pytest.mark.parametrize(("name", "params", "word"), [(name, *case) for name, cases in ODD.items() for case in cases])
def test_odd_configurations_warn_and_are_followed(name: str, params: Params, word: str) -> None:
    with pytest.warns(ScheduleWarning, match=word) as caught:
        assert_same(name, params)
    assert len(caught) == 1


@pytest.mark.parametrize("decay_lr_rate", [2.2e-311, -2.2e-311])
def test_a_decay_that_would_take_longer_than_any_double_says(decay_lr_rate: float) -> None:
    cycle = {**CYCLE, "cycle_first_step_size": 9, "decay_lr_rate": decay_lr_rate, "decay_step_size": 1}
    assert_same("OneCycle", cycle)


#: The lengths that people use: DeepSpeed's defaults, and the configurations of its documentation.
USUAL: list[tuple[str, Params]] = [
    ("LRRangeTest", {}),
    ("LRRangeTest", {"lr_range_test_step_size": 200, "lr_range_test_step_rate": 5, "lr_range_test_staircase": False}),
    ("OneCycle", CYCLE),
    (
        "OneCycle",
        {
            "cycle_first_step_size": 1000,
            "cycle_first_stair_count": 500,
            "cycle_second_step_size": 1000,
            "cycle_second_stair_count": 500,
            "decay_step_size": 1000,
            "cycle_min_lr": 0.0001,
            "cycle_max_lr": 0.0010,
            "decay_lr_rate": 0.001,
            "cycle_min_mom": 0.85,
            "cycle_max_mom": 0.99,
            "decay_mom_rate": 0.0,
        },
    ),
    ("WarmupLR", {}),
    ("WarmupLR", {"warmup_min_lr": 0.001, "warmup_max_lr": 0.01, "warmup_num_steps": 100}),
    ("WarmupDecayLR", {"total_num_steps": 4000}),
    ("WarmupDecayLR", {"total_num_steps": 4e3, "warmup_max_lr": None, "warmup_type": "linear"}),
    ("WarmupCosineLR", {"total_num_steps": 4000}),
    ("WarmupCosineLR", {"total_num_steps": 4000, "warmup_min_ratio": 0.1, "warmup_type": "linear"}),
]


@pytest.mark.parametrize(("name", "params"), USUAL)
def test_usual_configurations_do_not_warn(name: str, params: Params) -> None:
    assert_same(name, params, num_updates=4500)


# Construction.


@pytest.mark.parametrize("name", NAMES)
def test_arguments_are_deepspeeds(name: str) -> None:
    theirs = dict(inspect.signature(getattr(lr_schedules, name)).parameters)
    del theirs["optimizer"], theirs["last_batch_iteration"]
    ours = [field for field in fields(getattr(schedules.deepspeed, name)) if not field.kw_only]
    assert [field.name for field in ours] == list(theirs)
    for field in ours:
        default = inspect.Parameter.empty if field.default is MISSING else field.default
        assert default == theirs[field.name].default


REFUSED: list[tuple[str, Params]] = [
    ("LRRangeTest", {"lr_range_test_step_size": 0}),
    ("LRRangeTest", {"lr_range_test_step_size": 10.0}),
    ("LRRangeTest", {"lr_range_test_min_lr": [0.1, 0.2]}),
    ("LRRangeTest", {"lr_range_test_rate": 1.0}),
    ("OneCycle", {"cycle_min_lr": 0.1}),
    ("OneCycle", {**CYCLE, "cycle_first_step_size": 0}),
    ("OneCycle", {**CYCLE, "cycle_first_step_size": "ten"}),
    ("OneCycle", {**CYCLE, "cycle_first_step_size": None}),
    ("OneCycle", {**CYCLE, "cycle_second_step_size": -1}),
    ("OneCycle", {**CYCLE, "decay_step_size": None}),
    ("OneCycle", {**CYCLE, "cycle_max_lr": [0.1, 0.2, 0.3]}),
    ("OneCycle", {**CYCLE, "cycle_min_mom": []}),
    ("WarmupLR", {"warmup_num_steps": 0}),
    ("WarmupLR", {"warmup_num_steps": 10.0}),
    ("WarmupLR", {"warmup_num_steps": None}),
    ("WarmupLR", {"warmup_min_lr": "0"}),
    ("WarmupLR", {"warmup_min_lr": [0.0, 0.0]}),
    ("WarmupDecayLR", {}),
    ("WarmupDecayLR", {"total_num_steps": "100"}),
    ("WarmupDecayLR", {"total_num_steps": 100, "warmup_num_steps": -3}),
    ("WarmupCosineLR", {"total_num_steps": None}),
    ("WarmupCosineLR", {"total_num_steps": 100, "warmup_num_steps": 0}),
    ("WarmupCosineLR", {"total_num_steps": 100, "warmup_max_lr": 0.1}),
]


@pytest.mark.parametrize(("name", "params"), REFUSED)
def test_a_constructor_raises_where_deepspeeds_does(name: str, params: Params) -> None:
    with pytest.raises((TypeError, ValueError)) as theirs:
        drive(name, params, 0)
    with pytest.raises(theirs.type):
        getattr(schedules.deepspeed, name).per_group([0.1], **params)


def test_a_rate_that_is_read_must_be_given() -> None:
    with pytest.raises(ValueError, match="base_lr"):
        schedules.deepspeed.WarmupLR()
    with pytest.raises(ValueError, match="base_lr"):
        schedules.deepspeed.WarmupDecayLR(100, warmup_max_lr=None)
    with pytest.raises(TypeError, match="base_lr"):
        schedules.deepspeed.WarmupCosineLR(100)


@pytest.mark.parametrize(("name", "params"), USUAL)
def test_repr_and_dict_rebuild_the_schedule(name: str, params: Params) -> None:
    (schedule,) = getattr(schedules.deepspeed, name).per_group([0.1], **params)
    assert eval(repr(schedule), vars(schedules)) == schedule
    assert schedules.Schedule.from_dict(schedule.to_dict()) == schedule


def test_equal_groups_share_one_schedule_and_all_groups_a_warning() -> None:
    for _ in range(2):  # each call says it
        with pytest.warns(ScheduleWarning) as caught:
            first, second, third = schedules.deepspeed.WarmupLR.per_group([0.1, 0.2, 0.1], warmup_num_steps=1)
        assert first is third
        assert second.base_lr == 0.2
        assert [w.filename for w in caught] == [__file__]
    with pytest.warns(ScheduleWarning) as caught:
        schedules.deepspeed.WarmupLR.per_group([0.1, 0.2], warmup_max_lr=None, warmup_min_lr=[0.3, 0.4])
    assert len(caught) == 2


def test_true_counts_as_one_step() -> None:
    rise = schedules.deepspeed.LRRangeTest(lr_range_test_step_size=True)
    assert repr(rise) == "deepspeed.LRRangeTest(lr_range_test_step_size=1)"
    with pytest.warns(ScheduleWarning, match="warmup_num_steps=1 is taken for 2"):
        schedules.deepspeed.WarmupCosineLR(100, warmup_num_steps=True, base_lr=0.1)


# The engine.


@pytest.fixture(scope="module")
def engine_is_possible(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A process group of one, and no compilation of a collective for it (50 s)."""
    rendezvous = tmp_path_factory.mktemp("rendezvous") / "store"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LOCAL_RANK", "0")
        patch.setitem(deepspeed.ops.__compatible_ops__, "deepspeed_shm_comm", False)
        torch.distributed.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=0, world_size=1)
        yield
        torch.distributed.destroy_process_group()


WARMUP = {"type": "WarmupLR", "params": {"warmup_min_lr": 0.001, "warmup_max_lr": 0.01, "warmup_num_steps": 30}}
POLICY = {"cycle_min_lr": 0.001, "cycle_max_lr": 0.01, "cycle_first_step_size": 20, "cycle_second_step_size": 10}
TRAININGS: list[tuple[str, Params, Params | None]] = [
    ("Adam", {"lr": 0.1, "weight_decay": 0.5}, WARMUP),
    ("Adam", {"lr": 0.1, "weight_decay": 0.5, "adam_w_mode": False}, WARMUP),
    ("AdamW", {"lr": 0.1, "weight_decay": 0.5, "adam_w_mode": False}, WARMUP),
    ("ADAMW", {"lr": 0.1}, None),
    ("Adam", {"betas": [0.5, 0.9], "eps": 1e-3, "amsgrad": True}, {"type": "OneCycle", "params": POLICY}),
    ("Adam", {"lr": 0.05}, {"type": "WarmupCosineLR", "params": {"total_num_steps": 40, "warmup_num_steps": 10}}),
    ("Adam", {"lr": 0.05}, {"type": "StepLR", "params": {"step_size": 10, "gamma": 0.5}}),
]


@pytest.mark.parametrize(("optimizer_type", "params", "scheduler"), TRAININGS)
def test_a_training_follows_the_engines(
    engine_is_possible: None, optimizer_type: str, params: Params, scheduler: Params | None
) -> None:
    ds_config: Params = {
        "train_batch_size": 8,
        "gradient_clipping": 0.0,
        # DeepSpeed's own Adam would have to be compiled.
        "optimizer": {"type": optimizer_type, "params": {**params, "torch_adam": True}},
    }
    if scheduler is not None:
        ds_config["scheduler"] = scheduler
    torch.manual_seed(0)
    images, targets = torch.randn(8, 10), torch.randn(8, 1)
    models = [torch.nn.Linear(10, 1) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    engine, theirs, _, _ = deepspeed.initialize(
        model=models[0], model_parameters=models[0].parameters(), config=ds_config
    )
    ours = optimizer_from_config(models[1].parameters(), ds_config)
    for _ in range(50):
        used = theirs.param_groups[0]["lr"]
        engine.backward(torch.nn.functional.mse_loss(engine(images), targets))
        engine.step()
        ours.zero_grad()
        torch.nn.functional.mse_loss(models[1](images), targets).backward()
        ours.step()
        assert ours.last_lr()[0] == pytest.approx(used, rel=ROUNDING, abs=0.0)
    for expected, got in zip(models[0].parameters(), models[1].parameters(), strict=True):
        # Two roundings of float32 in each of 50 updates of at most 0.1; another Adam is off by 1e-2 and more.
        assert (expected - got).abs().max() <= 1e-5


def test_what_is_known_of_deepspeeds_optimizers() -> None:
    """The defaults and names that optimizer_from_config has by heart."""
    defaults = {name: p.default for name, p in inspect.signature(FusedAdam).parameters.items()}
    opt = optimizer_from_config([torch.nn.Parameter(torch.zeros(1))], {"optimizer": {"type": "Adam"}})
    for name in ("lr", "betas", "eps", "weight_decay", "amsgrad"):
        assert opt.defaults[name] == defaults[name]
    assert opt.defaults["decoupled_weight_decay"] is defaults["adam_w_mode"] is deepspeed_config.ADAM_W_MODE_DEFAULT
    assert {"adam", "adamw"} <= set(deepspeed_config.DEEPSPEED_OPTIMIZERS)
    # Said in the docstring: there is no clipping here to be on by default.
    assert deepspeed_config.get_gradient_clipping({}) == 1.0
