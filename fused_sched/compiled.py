"""`step()` inside `torch.compile`: one operator in the graph, which does what an uncompiled step does.

What a step does depends on addresses, on options and on what was stepped before, all of which a trace would freeze.
So only the parameters and gradients that take part are traced. Everything else happens when the operator runs, and a
rate, a limit of the norm or a schedule that changes recompiles nothing.
"""

from __future__ import annotations

import itertools
import weakref
from typing import TYPE_CHECKING

import torch

from . import dtensors, packing
from .devices import Call

if TYPE_CHECKING:
    from .base import OptimizerBase

_keys = itertools.count()
_optimizers: weakref.WeakValueDictionary[int, OptimizerBase] = weakref.WeakValueDictionary()


def register(optimizer: OptimizerBase) -> int:
    """A number that stands for the optimizer in graphs, as long as it lives."""
    key = next(_keys)
    _optimizers[key] = optimizer
    return key


def trace_step(optimizer: OptimizerBase) -> bool:
    """Put a step into the graph that is being traced; False, having done nothing, if it cannot go into one.

    Gradients are arguments because in a graph that holds the backward pass they are no parameter's yet.
    """
    params: list[torch.Tensor] = []
    grads: list[torch.Tensor] = []
    ordinals: list[int] = []
    ordinal = -1
    # Not optimizer.param_groups: where Dynamo (torch 2.13) sees that name on an optimizer it guards every option of
    # every group, and an edited lr would recompile.
    for group in optimizer._records.options:
        for param in group["params"]:
            ordinal += 1
            grad = packing.gradient_of(param)
            if grad is None:
                continue
            if dtensors.is_distributed(param):
                return False
            params.append(param)
            grads.append(grad)
            ordinals.append(ordinal)
    if params:
        found_inf, grad_scale = getattr(optimizer, "found_inf", None), getattr(optimizer, "grad_scale", None)
        was_enabled = torch.is_grad_enabled()
        with torch.no_grad():  # else inductor works on copies of what requires grad
            torch.ops.fused_sched.step_(params, grads, ordinals, optimizer._key, found_inf, grad_scale, was_enabled)
    return True


def trace_zero_grad(optimizer: OptimizerBase) -> None:
    """Drop all gradients in the graph that is being traced."""
    for group in optimizer._records.options:
        for param in group["params"]:
            param.grad = None


# -- the operator --------------------------------------------------------------------------------------------

# Parameters are declared as what they are: written. State is the optimizer's own memory and no argument: it would be
# copied by passes that make a graph functional, and updated in the copy.
_library = torch.library.Library("fused_sched", "FRAGMENT")  # type: ignore[no-untyped-call]
_library.define(  # type: ignore[no-untyped-call]
    "step_(Tensor(a!)[] params, Tensor[] grads, int[] ordinals, int optimizer, "
    "Tensor? found_inf, Tensor? grad_scale, bool grad_was_enabled) -> ()",
    # What the host does in a step (edited options, the tick rule) must not be recorded once and replayed for ever: the
    # compiler's own CUDA graphs leave the step out. A graph of the user's takes it in.
    tags=[tag] if (tag := getattr(torch.Tag, "cudagraph_unsafe", None)) is not None else [],
)


# Not torch.library.custom_op: its wrappers cost 2.5 ms per call with 1,000 parameters, this 0.4 (torch 2.13).
@torch.library.impl(_library, "step_", "CompositeExplicitAutograd")
def _step(
    params: list[torch.Tensor],
    grads: list[torch.Tensor],
    ordinals: list[int],
    optimizer: int,
    found_inf: torch.Tensor | None,
    grad_scale: torch.Tensor | None,
    grad_was_enabled: bool,
) -> None:
    try:
        with torch.no_grad():
            opt = _optimizers[optimizer]
            opt._apply(_call(opt, params, grads, ordinals), found_inf, grad_scale)
    except BaseException:
        torch.set_grad_enabled(grad_was_enabled)  # a graph that is left in the middle does not (torch 2.13)
        raise


def _call(opt: OptimizerBase, params: list[torch.Tensor], grads: list[torch.Tensor], ordinals: list[int]) -> Call:
    held = [(p, index) for index, group in enumerate(opt._records.options) for p in group["params"]]
    if [id(p) for group in opt.param_groups for p in group["params"]] != [id(p) for p, _ in held]:
        raise RuntimeError(
            "opt.param_groups holds other parameters than add_param_group() put there, and a compiled step knows only "
            "those; put them back, or call opt.step() outside of torch.compile"
        )
    owners = [held[ordinal][0] for ordinal in ordinals]
    groups = [held[ordinal][1] for ordinal in ordinals]
    # A compiler may hand over copies, which it copies back: those are updated, with the owners' state.
    if all(owner is param for owner, param in zip(owners, params, strict=True)):
        params = owners
    return Call(owners, params, grads, groups, ordinals)


@torch.library.register_fake("fused_sched::step_", lib=_library)  # type: ignore[untyped-decorator]
def _fake_step(*arguments: object) -> None:
    """Nothing but the parameters' values changes."""
