"""schedules.transformers against the installed library: LambdaLR over a torch optimizer, on random configurations."""

from __future__ import annotations

import inspect
import json
import math
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import ROUNDING
from transformers import optimization
from transformers.trainer_utils import SchedulerType

from fused_sched import schedules
from fused_sched._warnings import ScheduleWarning
from fused_sched.schedules import Schedule
from fused_sched.schedules.transformers import get_scheduler
from fused_sched.schedules.transformers.dispatch import FACTORIES

Config = dict[str, Any]

BY_STEP = sorted(set(FACTORIES) - {"reduce_lr_on_plateau", "greedy"})
TAKE_NO_TOTAL = ("constant", "constant_with_warmup", "inverse_sqrt")

rates = st.floats(1e-6, 1.0)
ratios = st.one_of(st.sampled_from([0.0, 1.0]), st.floats(-0.2, 1.5))
waves = st.one_of(st.sampled_from([0.0, 0.5, 1.0, -0.5]), st.floats(0.1, 3.0))
shapes = st.sampled_from(["linear", "cosine", "1-sqrt"])
min_lr = st.one_of(rates.map(lambda lr: {"min_lr": lr}), ratios.map(lambda r: {"min_lr_rate": r}))


@st.composite
def lengths(draw: st.DrawFn) -> Config:
    """num_warmup_steps and num_training_steps, often next to each other, now and then not whole."""
    warmup = draw(st.one_of(st.integers(-2, 60), st.floats(0.0, 20.0)))
    total = draw(st.one_of(st.integers(-1, 160), st.integers(-2, 2).map(lambda d: warmup + d)))
    return {"num_warmup_steps": warmup, "num_training_steps": total}


def optional(**arguments: st.SearchStrategy[Any]) -> st.SearchStrategy[Config]:
    return st.fixed_dictionaries({}, optional=arguments)


wsd = st.builds(
    lambda decay, length, rest: {"num_decay_steps": decay, **length, **rest},
    st.integers(-1, 60),
    st.integers(-5, 40).map(lambda n: {"num_stable_steps": n}),
    optional(warmup_type=shapes, decay_type=shapes, min_lr_ratio=ratios, num_cycles=waves),
)
SPECIFIC: dict[str, st.SearchStrategy[Config]] = {
    "linear": st.just({}),
    "cosine": optional(num_cycles=waves),
    "cosine_with_restarts": optional(num_cycles=st.one_of(st.integers(-2, 60), st.floats(-2.0, 5.0))),
    "polynomial": optional(
        # Not below minus the rate: (L - lr_end) + lr_end is the library's first value, which then loses digits.
        lr_end=st.floats(-1e-6, 0.5),
        power=st.one_of(st.sampled_from([0, 1, 2, -1]), st.floats(-1.5, 4.0)),
    ),
    "constant": st.just({}),
    "constant_with_warmup": st.just({}),
    "inverse_sqrt": optional(timescale=st.one_of(st.integers(-60, 60), st.floats(0.1, 500.0))),
    "cosine_with_min_lr": st.builds(lambda floor, rest: {**floor, **rest}, min_lr, optional(num_cycles=waves)),
    "cosine_warmup_with_min_lr": st.builds(
        lambda floor, rest: {**floor, **rest}, min_lr, optional(num_cycles=waves, warmup_lr_rate=ratios)
    ),
    "warmup_stable_decay": wsd,
}


def recorded(name: str, base_lr: float, default_lr: float, config: Config) -> tuple[list[float], Exception | None]:
    """The library's rates, with what it raised after them; it raises itself what its constructor raises."""
    group = {"params": [torch.nn.Parameter(torch.zeros(1))], "lr": base_lr}
    opt = torch.optim.SGD([group], lr=default_lr)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of two lengths that disagree
        live = optimization.get_scheduler(name, opt, **config)
    opt.step()
    w, n = config["num_warmup_steps"], config["num_training_steps"]
    n = 60 if n is None else n
    # A few waves: of more, the library's own cos(pi * num_cycles * 2 * progress) loses digits of its argument.
    used: list[float] = []
    for _ in range(int(max(w, 0) + 3 * max(1, n - w) + 5)):
        used.append(opt.param_groups[0]["lr"])
        try:
            live.step()
        except (ArithmeticError, ValueError) as error:
            return used, error
    return used, None


def ours_of(name: str, **arguments: Any) -> tuple[Schedule, list[str]]:
    """Our schedule, and what it warns of."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ScheduleWarning)
        schedule = get_scheduler(name, **arguments)
    return schedule, [str(warning.message) for warning in caught]


@st.composite
def configs(draw: st.DrawFn, name: str) -> tuple[float, float, Config]:
    config = draw(lengths()) | {"scheduler_specific_kwargs": draw(SPECIFIC[name])}
    if name == "warmup_stable_decay" and draw(st.booleans()):
        # One of the two lengths, or both.
        specific = config["scheduler_specific_kwargs"]
        config["num_training_steps"] = None
        if draw(st.booleans()):
            config["num_training_steps"] = draw(st.integers(0, 160))
            specific.pop("num_stable_steps")
    base_lr = draw(rates)
    return base_lr, draw(st.one_of(st.just(base_lr), rates)), config


@pytest.mark.parametrize("name", BY_STEP)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_values_errors_and_warnings(name: str, data: st.DataObject) -> None:
    base_lr, default_lr, config = data.draw(configs(name))
    arguments = {"base_lr": base_lr, "default_lr": default_lr, **config}
    try:
        expected, error = recorded(name, base_lr, default_lr, config)
    except (ArithmeticError, ValueError) as refused:
        with pytest.raises(type(refused)):
            ours_of(name, **arguments)
        return
    ours, odd = ours_of(name, **arguments)
    got = ours(range(len(expected)))
    assert np.abs(got - expected).max() <= ROUNDING * np.abs(expected).max()

    if error is not None:
        assert ours([len(expected), len(expected) + 1000]).tolist() == [got[-1]] * 2, "held from the error on"
    total = None if name in TAKE_NO_TOTAL else config["num_training_steps"]
    late = expected if total is None else expected[max(0, math.ceil(config["num_warmup_steps"]), math.ceil(total)) :]
    rises_again = total is not None and (np.diff(late) > 1e-9 * base_lr).any()
    if error is not None or rises_again or min(expected) < 0.0:
        assert len(odd) == 1, "what is odd is said once"
    assert len(odd) <= 1

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ScheduleWarning)
        names = {name: getattr(schedules, name) for name in schedules.__all__}
        assert eval(repr(ours), names) == ours
        assert Schedule.from_dict(json.loads(json.dumps(ours.to_dict()))) == ours


@pytest.mark.parametrize("warmup", [0, 1, 10])
@pytest.mark.parametrize("name", BY_STEP)
def test_the_ends_of_phases(name: str, warmup: int) -> None:
    """The bits of the library at the boundaries of every phase and one step around them."""
    specific = {
        "warmup_stable_decay": {"num_decay_steps": 20},
        "cosine_with_min_lr": {"min_lr_rate": 0.25},
        "cosine_warmup_with_min_lr": {"min_lr_rate": 0.25},
    }.get(name, {})
    config = {"num_warmup_steps": warmup, "num_training_steps": 50, "scheduler_specific_kwargs": specific}
    expected, _ = recorded(name, 0.5, 0.5, config)
    ours, _ = ours_of(name, base_lr=0.5, **config)
    around = [t for end in (0, warmup, 30, 50) for t in (end - 1, end, end + 1) if t >= 0]
    # One ulp of the rate: cos and pow are the core's own.
    assert np.abs(ours(around) - np.array(expected)[around]).max() <= np.spacing(0.5)
    assert ours.reference == 0.5


def test_names_arguments_and_defaults_are_the_librarys() -> None:
    assert set(FACTORIES) == {kind.value for kind in SchedulerType}
    for kind in SchedulerType:
        theirs = optimization.TYPE_TO_SCHEDULER_FUNCTION[kind]
        ours = FACTORIES[kind.value]
        assert ours.__name__ == theirs.__name__
        assert getattr(schedules.transformers, theirs.__name__) is ours
        if kind.value not in BY_STEP:
            continue
        wanted = {n: p.default for n, p in inspect.signature(theirs).parameters.items()}
        wanted = {n: default for n, default in wanted.items() if n not in ("optimizer", "last_epoch")}
        got = {n: p.default for n, p in inspect.signature(ours).parameters.items()}
        extra = {"base_lr": inspect.Parameter.empty}
        if "default_lr" in got:
            extra["default_lr"] = None
        assert list(got.items()) == list((wanted | extra).items())


SGD = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)


@pytest.mark.parametrize(
    ("name", "config", "says"),
    [
        ("lineer", {"num_warmup_steps": 1, "num_training_steps": 9}, "'lineer'"),
        ("linear", {"num_training_steps": 9}, "num_warmup_steps"),
        ("constant_with_warmup", {}, "num_warmup_steps"),
        ("cosine", {"num_warmup_steps": 1}, "num_training_steps"),
        (
            "linear",
            {"num_warmup_steps": 1, "num_training_steps": 9, "scheduler_specific_kwargs": {"power": 2}},
            "power",
        ),
        ("warmup_stable_decay", {"num_warmup_steps": 1, "num_training_steps": 9}, "num_decay_steps"),
        (
            "warmup_stable_decay",
            {"num_warmup_steps": 1, "scheduler_specific_kwargs": {"num_decay_steps": 3}},
            "num_stable_steps",
        ),
        (
            "warmup_stable_decay",
            {
                "num_warmup_steps": 1,
                "num_training_steps": 9,
                "scheduler_specific_kwargs": {"num_decay_steps": 3, "decay_type": "sqrt"},
            },
            "decay_type must be one of 'linear', 'cosine', '1-sqrt', got 'sqrt'",
        ),
        ("cosine_with_min_lr", {"num_warmup_steps": 1, "num_training_steps": 9}, "min_lr_rate"),
        (
            "cosine_warmup_with_min_lr",
            {
                "num_warmup_steps": 1,
                "num_training_steps": 9,
                "scheduler_specific_kwargs": {"min_lr": 0.1, "min_lr_rate": 0.1},
            },
            "min_lr and min_lr_rate",
        ),
        (
            "polynomial",
            {"num_warmup_steps": 1, "num_training_steps": 9, "scheduler_specific_kwargs": {"lr_end": 0.1}},
            "lr_end=0.1",
        ),
        ("polynomial", {"num_warmup_steps": 0, "num_training_steps": 0}, "num_training_steps"),
        (
            "inverse_sqrt",
            {"num_warmup_steps": 0, "scheduler_specific_kwargs": {"timescale": 0}},
            "timescale must be more than 0",
        ),
        ("greedy", {"scheduler_specific_kwargs": {"factor": 1.5}}, "factor"),
        ("reduce_lr_on_plateau", {"scheduler_specific_kwargs": {"factor": 1.5}}, "factor"),
    ],
)
def test_errors_are_the_librarys_and_say_what_to_do(name: str, config: Config, says: str) -> None:
    with pytest.raises((ValueError, TypeError, ArithmeticError)) as theirs:
        optimization.get_scheduler(name, SGD, **config)
    with pytest.raises(theirs.type) as ours:
        get_scheduler(name, base_lr=0.1, **config)
    assert ours.type is theirs.type
    assert says in str(ours.value)


def test_numbers_that_are_none_are_refused() -> None:
    for arguments in ({"base_lr": "0.1"}, {"base_lr": None}, {"base_lr": 0.1, "num_warmup_steps": True}):
        with pytest.raises(TypeError, match="must be a"):
            get_scheduler("linear", **{"num_warmup_steps": 1, "num_training_steps": 9, **arguments})
    with pytest.raises(ZeroDivisionError, match="min_lr_rate"):
        schedules.transformers.get_cosine_with_min_lr_schedule_with_warmup(1, 9, min_lr=0.1, base_lr=0.0)


def test_a_name_may_be_the_librarys_own() -> None:
    arguments = {"base_lr": 0.1, "num_warmup_steps": 1, "num_training_steps": 9}
    assert get_scheduler(SchedulerType.LINEAR, **arguments) == get_scheduler("linear", **arguments)


ODD = [
    ("linear", (10, 10), {}, "leaves no decay"),
    ("cosine", (10, 10), {}, "waves per update"),
    ("cosine", (10, 90), {}, r"up again; .*\[90\]"),
    ("cosine_warmup_with_min_lr", (10, 90), {"min_lr": 0.0, "warmup_lr_rate": -0.1}, "starts negative"),
    ("cosine_with_restarts", (10, 5), {}, "drops to 0 one update after"),
    ("polynomial", (10, 10), {}, "ZeroDivisionError at the step to update 10"),
    ("polynomial", (10, 90), {"power": -1}, "ZeroDivisionError at the step to update 90"),
    ("polynomial", (10, 5), {}, "lies inside num_warmup_steps=10"),
    ("polynomial", (10, 90), {"lr_end": -0.1}, "negative"),
    ("inverse_sqrt", (10, None), {"timescale": 0}, "arithmetic error, as timescale=0, at the step to update 10"),
    ("inverse_sqrt", (10, None), {"timescale": -5}, "arithmetic error, as timescale=-5, at the step to update 15"),
    ("warmup_stable_decay", (10, 90), {"num_decay_steps": 5, "num_stable_steps": 5}, "num_stable_steps=5 is used"),
    ("warmup_stable_decay", (10, 20), {"num_decay_steps": 15}, "shorten them by 5"),
    ("warmup_stable_decay", (10, 20), {"num_decay_steps": 0}, "at once"),
    (
        "warmup_stable_decay",
        (4.237168684686163, 48),
        {"num_decay_steps": 15, "decay_type": "1-sqrt"},
        "at the step to update 33, where",
    ),
    ("warmup_stable_decay", (10, 90), {"num_decay_steps": 5, "min_lr_ratio": -0.1}, "negative"),
    ("warmup_stable_decay", (10, 90), {"num_decay_steps": 5, "num_cycles": 0.75}, "rises again inside the decay"),
]


@pytest.mark.parametrize(("name", "lengths", "specific", "says"), ODD)
def test_what_is_odd_is_said_at_the_callers_line(
    name: str, lengths: tuple[float, float | None], specific: Config, says: str
) -> None:
    warmup, total = lengths
    with pytest.warns(ScheduleWarning, match=says) as caught:
        get_scheduler(
            name,
            base_lr=0.1,
            num_warmup_steps=warmup,
            num_training_steps=total,
            scheduler_specific_kwargs=specific,
        )
    assert [w.filename for w in caught] == [__file__]


@pytest.mark.parametrize(
    "name", ["linear", "cosine_with_restarts", "polynomial", "constant_with_warmup", "inverse_sqrt"]
)
def test_what_is_not_odd_warns_of_nothing(name: str) -> None:
    assert ours_of(name, base_lr=0.1, num_warmup_steps=10, num_training_steps=100)[1] == []


def test_metric_driven_factories() -> None:
    metrics = np.random.default_rng(0).random(40).tolist()
    for name in ("greedy", "reduce_lr_on_plateau"):
        opt = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
        live = optimization.get_scheduler(name, opt, scheduler_specific_kwargs={"patience": 2})
        expected = []
        for metric in metrics:
            expected.append(opt.param_groups[0]["lr"])
            live.step(metric)
        ours = get_scheduler(name, base_lr=0.1, scheduler_specific_kwargs={"patience": 2})
        assert ours.replay(metrics) == expected  # type: ignore[attr-defined]
