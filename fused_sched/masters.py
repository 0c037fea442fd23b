"""Parameters at full precision: what users see of the masters, one by one or as a model's state dict."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from . import codec, conversion, dtensors, precision
from . import state as states
from .arena import Layout
from .base import OptimizerBase
from .update import Updates

_NARROW = (torch.bfloat16, torch.float16)


class ExactParameters(Updates):
    """The part of `FusedScheduledAdam` that reads and sets parameters exactly, as their masters have them."""

    @torch.no_grad()
    def fp32_params(self) -> Iterator[torch.Tensor]:
        """The exact value of every parameter, in the order of the groups: what the next update starts from.

        Yields new tensors, made one at a time, which training does not change: float32; float64 of float64 parameters.
        A parameter without a master is exactly what it holds, and all are so before the first step. As in a step, a
        parameter that was edited since wins over an "fp32" master; beside "split16" and "split8" it keeps what they add
        to it, at most half of its last place (`load_fp32_state_dict()` sets it exactly).

        Example:
            >>> import torch
            >>> from fused_sched import FusedScheduledAdam
            >>> p = torch.nn.Parameter(torch.ones(2, dtype=torch.bfloat16))
            >>> opt = FusedScheduledAdam([p], lr=2.0**-12)
            >>> p.sum().backward()
            >>> opt.step()
            >>> p.tolist(), [master.tolist() for master in opt.fp32_params()]
            ([1.0, 1.0], [[0.999755859375, 0.999755859375]])

        Source: apex's `amp.master_params(optimizer)`.
        """
        for group in self.param_groups:
            for param in group["params"]:
                yield exact_value(param, self.state.get(param, {}))

    @torch.no_grad()
    def fp32_state_dict(self, model: torch.nn.Module) -> dict[str, Any]:
        """`model.state_dict()` with every 16-bit parameter as the float32 tensor it stands for.

        Args:
            model: whose parameters this optimizer updates; frozen ones need not be the optimizer's.

        Returns a copy, which training does not change. Buffers and wider parameters keep their dtype; names of one
        tied parameter share one tensor. Raises ValueError if a 16-bit parameter of the model that can be trained is not
        in this optimizer, which then does not know its exact value.

        Example:
            >>> import torch
            >>> from fused_sched import FusedScheduledAdam
            >>> model = torch.nn.Linear(2, 1, bias=False).bfloat16()
            >>> opt = FusedScheduledAdam(model.parameters())
            >>> {name: value.dtype for name, value in opt.fp32_state_dict(model).items()}
            {'weight': torch.float32}
        """
        values = model.state_dict(keep_vars=True)
        _check_known(self, values)
        copies: dict[int, torch.Tensor] = {}
        for name, value in values.items():
            if isinstance(value, torch.Tensor):
                if id(value) not in copies:
                    trained = isinstance(value, torch.nn.Parameter) or value.requires_grad
                    widened = trained and value.dtype in _NARROW
                    copied = exact_value(value, self.state.get(value, {})) if widened else value.detach().clone()
                    copies[id(value)] = copied
                values[name] = copies[id(value)]
        return values

    @torch.no_grad()
    def load_fp32_state_dict(self, model: torch.nn.Module, state_dict: Mapping[str, Any]) -> None:
        """Set the model's parameters, and their masters exactly, from values at full precision.

        Args:
            model: whose parameters this optimizer updates.
            state_dict: of `fp32_state_dict()`, or the same model's `state_dict()` in any float dtype.

        A "fp32" or "split16" master becomes the float32 value itself, a "split8" one is rounded to 16 significant bits;
        parameters without a master, and frozen ones without state, are rounded to nearest. Moments, counts of steps and
        the clock stay, and so does memory that a captured CUDA graph uses. `opt.load_state_dict()` sets masters too, so
        call it before. Raises ValueError or TypeError, before anything has changed, if names, shapes or kinds of values
        are not the model's.

        Example:
            >>> import torch
            >>> from fused_sched import FusedScheduledAdam
            >>> model = torch.nn.Linear(2, 1, bias=False).bfloat16()
            >>> opt = FusedScheduledAdam(model.parameters())
            >>> opt.load_fp32_state_dict(model, {"weight": torch.tensor([[0.1, 0.2]])})
            >>> model.weight.tolist(), opt.fp32_state_dict(model)["weight"].tolist()
            ([[0.10009765625, 0.2001953125]], [[0.10000000149011612, 0.20000000298023224]])
        """
        self._refuse_offloaded("load_fp32_state_dict()")
        live = model.state_dict(keep_vars=True)
        _check_known(self, live)
        _check_values(live, state_dict)
        held = _held(self)
        ours = {id(value): name for name, value in live.items() if id(value) in held}
        targets = {name: live[name] for name in ours.values()}
        layouts = {
            name: Layout.of(param, held[id(param)])
            for name, param in targets.items()
            if param.requires_grad or self.state.has_state(param)
        }
        states.ensure(self.state, [targets[name] for name in layouts], layouts.values())
        # torch copies the rest, and the parameters of ours onto themselves.
        rest = copy.copy(state_dict)
        assert isinstance(rest, dict)
        rest.update({name: value.detach() for name, value in live.items() if id(value) in held})
        model.load_state_dict(rest)
        for name, param in targets.items():
            _set_exactly(param, self.state[param] if name in layouts else {}, layouts.get(name), state_dict[name])


def exact_value(param: torch.Tensor, state: Mapping[str, Any]) -> torch.Tensor:
    """A copy of the value that the kernels would compute the next update of a parameter from, placed as it is."""
    if dtensors.is_distributed(param):
        shard = exact_value(dtensors.local(param), dtensors.local_state(param, state))
        return dtensors.like(param, shard)
    kept = conversion.exact_master(param, state) if param.dtype in _NARROW else None
    if kept is None:
        return param.detach().to(precision.compute_dtype(param.dtype), copy=True)
    exact = torch.empty_like(param, dtype=torch.float32).copy_(kept)
    if state.get("master") is not None:
        ours = torch.empty_like(exact, dtype=param.dtype).copy_(param)
        codec.in_memory_order(exact).copy_(codec.decode_master("fp32", ours, {"master": exact}))
    return exact


def _set_exactly(param: torch.Tensor, state: Mapping[str, Any], layout: Layout | None, value: torch.Tensor) -> None:
    streams = codec.MASTERS[layout.master] if layout else ()
    if layout is None or not streams:
        param.copy_(value)
        return
    exact = torch.empty_strided(layout.shape, layout.stride, dtype=torch.float32, device=layout.device)
    exact.copy_(value)
    rounded, kept = codec.encode_master(layout.master, codec.in_memory_order(exact), layout.dtype)
    assert kept is not None
    codec.in_memory_order(state[streams[0].name]).copy_(kept)
    shaped = torch.empty_like(exact, dtype=layout.dtype)
    codec.in_memory_order(shaped).copy_(rounded)
    param.copy_(shaped)


def _held(optimizer: OptimizerBase) -> dict[int, dict[str, Any]]:
    """The group of every parameter, by the parameter's id."""
    return {id(param): group for group in optimizer.param_groups for param in group["params"]}


# ---- checks ----------------------------------------------------------------------------------------------


def _check_known(optimizer: OptimizerBase, live: Mapping[str, Any]) -> None:
    held = _held(optimizer)
    unknown = [
        name
        for name, value in live.items()
        if isinstance(value, torch.Tensor) and value.requires_grad and value.dtype in _NARROW and id(value) not in held
    ]
    if unknown:
        raise ValueError(
            "every 16-bit parameter of the model that can be trained must be in this optimizer, which keeps its exact "
            f"value; got {_listed(unknown)}, which it does not hold. Pass the module whose parameters the optimizer "
            "was given, set requires_grad = False on those that are frozen, or, where an engine has put tensors of its "
            "own into the groups, use that engine's export"
        )


def _check_values(live: Mapping[str, Any], state_dict: Mapping[str, Any]) -> None:
    if not isinstance(state_dict, dict):
        raise TypeError(f"the state dict must be a dict of names to values, got {type(state_dict).__name__}")
    missing, unexpected = [k for k in live if k not in state_dict], [k for k in state_dict if k not in live]
    if missing or unexpected:
        found = [f"without {_listed(missing)}"] * bool(missing) + [f"with {_listed(unexpected)}"] * bool(unexpected)
        raise ValueError(
            f"the state dict must have the names of model.state_dict(), got one {' and '.join(found)}; was it made "
            "from another model, or from one wrapped in a module?"
        )
    first_names: dict[int, str] = {}
    for name, target in live.items():
        if not isinstance(target, torch.Tensor):
            continue
        if dtensors.is_distributed(target):
            raise TypeError(
                f"{name!r} must be a plain tensor to be set at full precision, got a DTensor; load the model in "
                "float32 before fully_shard() and before the optimizer is made"
            )
        value = state_dict[name]
        if not isinstance(value, torch.Tensor):
            raise TypeError(f"{name!r} must be a tensor, got {value!r} of type {type(value).__name__}")
        if value.shape != target.shape:
            raise ValueError(
                f"{name!r} must have the model's shape {tuple(target.shape)}, got {tuple(value.shape)}; was the state "
                "dict made from another model?"
            )
        if target.is_floating_point() and not value.is_floating_point():
            raise TypeError(f"{name!r} must have a float dtype, got {value.dtype}; give its value at full precision")
        first = first_names.setdefault(id(target), name)
        if not _same(value, state_dict[first]):
            raise ValueError(
                f"{first!r} and {name!r} are one tied parameter and must have one value, got two; untie them in the "
                "model, or give both names the same tensor"
            )


def _same(value: torch.Tensor, other: torch.Tensor) -> bool:
    if value is other:
        return True
    other = other.to(value.device)
    return bool(((value == other) | ((value != value) & (other != other))).all())


def _listed(names: list[str]) -> str:
    shown = ", ".join(map(repr, names[:5]))
    return shown if len(names) <= 5 else f"{shown} and {len(names) - 5} more"
