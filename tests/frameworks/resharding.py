"""torch.distributed.checkpoint: four processes save ("save"), two go on ("load"). Started by test_torch.py."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from ranks import Checks, folder, run_checks
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    get_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)
from torch.distributed.tensor import distribute_tensor
from torch_distributed import FORMS, RATE, TOLERANCE, ours, sharded, train, weights

CHECKS = Checks()


def saved_by_four(form: str) -> None:
    module = sharded()
    optimizer = ours(module.parameters())
    train(module, optimizer, range(4))
    optimizer.param_groups[0]["lr"] *= 0.5
    states = get_state_dict(module, optimizer, options=FORMS[form])
    dcp.save(dict(zip(("model", "optimizer"), states, strict=True)), checkpoint_id=str(folder() / form))
    train(module, optimizer, range(4, 8))
    continued = weights(module)
    if dist.get_rank() == 0:
        torch.save(continued, folder() / f"{form}.pt")


def loaded_by_two(form: str) -> None:
    module = sharded()
    optimizer = ours(module.parameters())
    states = dict(zip(("model", "optimizer"), get_state_dict(module, optimizer, options=FORMS[form]), strict=True))
    assert optimizer.clock == 0, "a dry run of torch.distributed.checkpoint counted"
    dcp.load(states, checkpoint_id=str(folder() / form))
    set_state_dict(
        module,
        optimizer,
        model_state_dict=states["model"],
        optim_state_dict=states["optimizer"],
        options=FORMS[form],
    )
    assert optimizer.clock == 4
    train(module, optimizer, range(4, 8))
    assert optimizer.last_lr() == [0.5 * RATE(7)]
    for actual, expected in zip(weights(module), torch.load(folder() / f"{form}.pt"), strict=True):
        # The gradients of four processes are averaged in another order than those of two.
        torch.testing.assert_close(actual, expected, rtol=0, atol=TOLERANCE)


FULL = StateDictOptions(full_state_dict=True, cpu_offload=True)


def full_saved_by_four() -> None:
    module = sharded()
    optimizer = ours(module.parameters())
    train(module, optimizer, range(4))
    # A copy: the "step" of a whole state is the optimizer's own tensor, which goes on counting.
    state = copy.deepcopy(get_optimizer_state_dict(module, optimizer, options=FULL))
    start = weights(module)
    train(module, optimizer, range(4, 8))
    continued = weights(module)
    if dist.get_rank() == 0:
        torch.save((state, start, continued), folder() / "full.pt")


def full_loaded_by_two() -> None:
    state, start, expected = torch.load(folder() / "full.pt")  # tensors and primitives only
    module = sharded()
    for p, value in zip(module.parameters(), start, strict=True):
        with torch.no_grad():
            p.copy_(distribute_tensor(value, p.device_mesh, p.placements))
    optimizer = ours(module.parameters())
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_optimizer_state_dict(module, optimizer, state if dist.get_rank() == 0 else {}, options=options)
    assert optimizer.clock == 4, optimizer.clock
    train(module, optimizer, range(4, 8))
    for actual, wanted in zip(weights(module), expected, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=0, atol=TOLERANCE)


def registered(action: Callable[[str], None], form: str) -> Callable[[], None]:
    return lambda: action(form)


if __name__ == "__main__":
    saving = sys.argv[2] == "save"
    for _form in FORMS:
        CHECKS[_form] = registered(saved_by_four if saving else loaded_by_two, _form)
    CHECKS["full"] = full_saved_by_four if saving else full_loaded_by_two
    run_checks(CHECKS)
