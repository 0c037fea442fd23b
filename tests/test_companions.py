"""A rate and the momentum or weight decay that its library's scheduler writes beside it."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from conftest import Backend

from fused_sched import FusedScheduledAdam, ScheduleWarning, schedules
from fused_sched.schedules import Schedule

ONE_CYCLE = schedules.deepspeed.OneCycle(cycle_min_lr=1e-4, cycle_max_lr=1e-3, cycle_first_step_size=4)
CYCLIC = schedules.torch.CyclicLR(base_lr=0.01, max_lr=0.1, step_size_up=5)
MEGATRON = schedules.megatron.OptimizerParamScheduler(
    init_lr=0.0,
    max_lr=0.01,
    min_lr=0.001,
    lr_warmup_steps=2,
    lr_decay_steps=20,
    lr_decay_style="cosine",
    start_wd=0.01,
    end_wd=0.1,
    wd_incr_steps=10,
    wd_incr_style="linear",
)
OWNERS = [ONE_CYCLE, CYCLIC, MEGATRON]


def param() -> torch.Tensor:
    p = torch.ones(4, requires_grad=True)
    p.grad = torch.ones(4)
    return p


def used(opt: FusedScheduledAdam) -> dict[str, float]:
    """The latest step's hyperparameters of the first group, from the device."""
    engine = opt._devices.first
    assert engine is not None
    return dict(zip(("lr", "beta1", "beta2", "weight_decay"), engine._values[0].tolist(), strict=True))


@pytest.mark.parametrize("schedule", OWNERS, ids=lambda s: s.word)
def test_the_rate_brings_its_companions(schedule: Schedule, compiled: Backend) -> None:
    opt = compiled.optimizer([compiled.parameter([1.0])], lr=schedule)
    opt.param_groups[0]["params"][0].grad = torch.ones(1, device=compiled.device)
    for t in range(12):
        opt.step()
        expected = {"beta1": 0.9, "beta2": 0.999, "weight_decay": 0.0}
        expected |= {name: companion(t) for name, companion in schedule.companions.items()}
        assert used(opt) == {"lr": schedule(t), **expected}


@pytest.mark.parametrize("schedule", OWNERS, ids=lambda s: s.word)
def test_plain_torch_uses_them_too(schedule: Schedule) -> None:
    trained = []
    for backend in ("cpu", "reference"):
        p = param()
        opt = FusedScheduledAdam([p], lr=schedule, backend=backend)
        for t in range(12):
            p.grad = torch.full((4,), 1.0 - 0.2 * t)  # a sign that changes tells momenta apart
            opt.step()
        trained.append(p.detach())
    assert torch.equal(*trained)


def test_deepspeed_sets_both_betas() -> None:
    assert set(ONE_CYCLE.companions) == {"beta1", "beta2"}
    assert ONE_CYCLE.companions["beta2"]([0, 1, 100]).tolist() == [0.99] * 3


@pytest.mark.parametrize("schedule", OWNERS, ids=lambda s: s.word)
def test_set_schedule_sets_them_for_one_group_or_all(schedule: Schedule) -> None:
    opt = FusedScheduledAdam([{"params": [param()]}, {"params": [param()]}])
    opt.set_schedule(schedule, group=1)
    names = {"lr", *schedule.companions}
    assert [set(record.schedules) for record in opt._records] == [set(), names]
    opt.set_schedule(schedule)
    assert [set(record.schedules) for record in opt._records] == [names, names]


@pytest.mark.parametrize("schedule", OWNERS, ids=lambda s: s.word)
def test_they_survive_copies_and_checkpoints(schedule: Schedule, recwarn: pytest.WarningsRecorder) -> None:
    for companion in schedule.companions.values():
        for other in (
            eval(repr(companion), vars(schedules)),
            pickle.loads(pickle.dumps(companion)),
            Schedule.from_dict(companion.to_dict()),
        ):
            assert other == companion
            assert other.program == companion.program
    opt = FusedScheduledAdam([param()], lr=schedule)
    opt.step()
    again = FusedScheduledAdam([param()], lr=schedule)
    again.load_state_dict(opt.state_dict())
    for one in (opt, again, copy.deepcopy(opt)):
        one.param_groups[0]["params"][0].grad = torch.ones(4)
        one.step()
    assert used(opt) == used(again)
    assert not recwarn.list


def test_a_hyperparameter_is_not_scheduled_twice() -> None:
    with pytest.raises(ValueError, match=r"beta1 is scheduled twice: by the lr, .*CyclicLR.* join\(\[lr\], \[\]\)"):
        FusedScheduledAdam([param()], lr=CYCLIC, betas=(schedules.constant(0.8), 0.999))
    alone = FusedScheduledAdam([param()], lr=schedules.join([CYCLIC], []), betas=(schedules.constant(0.8), 0.999))
    alone.step()
    assert used(alone)["beta1"] == 0.8


def test_a_momentum_that_reaches_one_is_refused_before_anything_changes() -> None:
    with pytest.warns(ScheduleWarning, match="momentum"):
        growing = schedules.deepspeed.OneCycle(
            cycle_min_lr=1e-4, cycle_max_lr=1e-3, cycle_first_step_size=4, decay_step_size=1, decay_mom_rate=0.1
        )
    opt = FusedScheduledAdam([param()], lr=0.1)
    with pytest.raises(ValueError, match=r"beta1 must stay in \[0, 1\)"):
        opt.set_schedule(growing)
    assert opt.param_groups[0]["lr"] == 0.1
    assert opt._records[0].schedules == {}


def test_combinations_are_of_the_rate_alone() -> None:
    for combined in (CYCLIC.scaled(0.5), CYCLIC.shifted(3), schedules.join([CYCLIC], []), CYCLIC * CYCLIC):
        assert combined.companions == {}
    assert schedules.constant(0.1).companions == {}
