"""torch's ZeroRedundancyOptimizer in two processes: each updates some parameters. Started by test_torch.py.

It restores state parameter by parameter, without the groups of the optimizers that it gathered.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.distributed as dist
from ranks import Checks, run_checks
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import LambdaLR
from torch_distributed import (
    RATE,
    Alternating,
    Theirs,
    assert_close,
    assert_same_bits,
    model,
    ours,
    raised,
    train,
    weights,
)

from fused_sched import FusedScheduledAdam

CHECKS = Checks()


def sharded(module: torch.nn.Module, **options: Any) -> tuple[torch.nn.Module, ZeroRedundancyOptimizer]:
    wrapped = DistributedDataParallel(module, find_unused_parameters=isinstance(module, Alternating))
    options = {"lr": RATE, "weight_decay": 0.1, **options}
    return wrapped, ZeroRedundancyOptimizer(wrapped.parameters(), FusedScheduledAdam, **options)


def consolidated(optimizer: ZeroRedundancyOptimizer) -> dict[str, Any]:
    """The whole state, on every rank."""
    optimizer.consolidate_state_dict(to=0)
    state = [copy.deepcopy(optimizer.state_dict()) if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(state)
    assert state[0] is not None
    return state[0]


@CHECKS
def weights_are_those_of_torch() -> None:
    for views in (False, True):
        module, optimizer = sharded(model(), parameters_as_bucket_view=views)
        reference = DistributedDataParallel(model())
        train(module, optimizer, range(8))
        train(reference, Theirs(reference.parameters()), range(8))
        assert_close(module, reference)
        assert optimizer.optim.clock == 8
        assert optimizer.optim.last_lr() == [RATE(7)]


@CHECKS
def resumes_bit_for_bit() -> None:
    """Also where a rank's parameters took fewer updates than the clock, and back from a later update."""
    for build in (model, Alternating):
        for moments in ("fp32", "8bit"):
            module, optimizer = sharded(build(), moments=moments)
            train(module, optimizer, range(4))
            state, start = consolidated(optimizer), copy.deepcopy(module.state_dict())
            train(module, optimizer, range(4, 8))
            for steps_before in (0, 6):
                other, resumed = sharded(build(), moments=moments)
                train(other, resumed, range(steps_before))
                other.load_state_dict(start)
                resumed.load_state_dict(copy.deepcopy(state))
                assert resumed.optim.clock == 4
                train(other, resumed, range(4, 8))
                assert resumed.optim.clock == 8
                assert resumed.optim.last_lr() == [RATE(7)]
                assert_same_bits(weights(other), weights(module))


@CHECKS
def its_checkpoint_goes_on_in_one_optimizer_for_all() -> None:
    module, optimizer = sharded(model())
    optimizer.optim.set_clock(10)
    train(module, optimizer, range(4))
    alone = DistributedDataParallel(model())
    alone.load_state_dict(module.state_dict())
    single = ours(alone.parameters())
    single.load_state_dict(consolidated(optimizer))
    assert single.clock == 14
    for each in ((module, optimizer), (alone, single)):
        train(*each, range(4, 6))
    assert_same_bits(weights(alone), weights(module))


@CHECKS
def a_checkpoint_of_torchs_adamw_goes_on() -> None:
    """Also of one whose scheduler has left its latest rate in the groups."""
    reference = DistributedDataParallel(model())
    theirs = ZeroRedundancyOptimizer(reference.parameters(), torch.optim.AdamW, lr=RATE(0), weight_decay=0.1)
    scheduler = LambdaLR(theirs, lambda step: RATE(step) / RATE(0))
    train_scheduled(reference, theirs, scheduler, range(4))
    module, optimizer = sharded(model())
    module.load_state_dict(reference.state_dict())
    optimizer.load_state_dict(consolidated(theirs))
    assert optimizer.optim.clock == 4
    train(module, optimizer, range(4, 8))
    assert optimizer.optim.last_lr() == [RATE(7)]
    train_scheduled(reference, theirs, scheduler, range(4, 8))
    assert_close(module, reference)


def train_scheduled(module: torch.nn.Module, optimizer: Any, scheduler: LambdaLR, steps: range) -> None:
    for step in steps:
        train(module, optimizer, range(step, step + 1))
        scheduler.step()


@CHECKS
def the_norm_of_one_ranks_parameters_is_refused() -> None:
    module, optimizer = sharded(model())
    optimizer.optim.max_grad_norm = 0.01  # ZeroRedundancyOptimizer gives its own arguments to groups
    before = weights(module)
    assert "norm_reduce_hook" in raised(lambda: train(module, optimizer, range(1)))
    assert_same_bits(weights(module), before)
    optimizer.zero_grad()
    optimizer.optim.norm_reduce_hook = dist.all_reduce
    reference = DistributedDataParallel(model())
    train(module, optimizer, range(8))
    train(reference, Theirs(reference.parameters()), range(8), clip=True)
    assert_close(module, reference)


if __name__ == "__main__":
    run_checks(CHECKS)
