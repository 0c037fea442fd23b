"""A parameter's state in one format or another: what a state dict may hold, and how it gets into the kernels' own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from . import codec
from .arena import Entry, Layout, dense_stride, same_order

#: State of a float dtype, by its keys; and codes: key -> dtype, elements per entry.
_STREAMS = [s for table in (codec.MASTERS, codec.MOMENTS) for streams in table.values() for s in streams]
FLOATS = (*dict.fromkeys(s.name for s in _STREAMS if s.dtype.is_floating_point), "max_exp_avg_sq")
CODES = {s.name: (s.dtype, s.group) for s in _STREAMS if not s.dtype.is_floating_point}

_BOTH = ("exp_avg", "exp_avg_sq")


def check_source(param: torch.Tensor, source: Mapping[str, Any]) -> None:
    """Raise if values found in a state dict cannot be taken over for this parameter."""
    for key, value in source.items():
        if isinstance(value, torch.Tensor) and (value.is_meta or value.layout != torch.strided):
            what = "on the meta device, without values" if value.is_meta else f"of layout {value.layout}"
            raise ValueError(f"state {key!r} must be a dense tensor with values, got one {what}; load it onto a device")
    remedy = "was the checkpoint made from another model?"
    for key in FLOATS:
        value = source.get(key)
        if value is None:
            continue
        if not isinstance(value, torch.Tensor) or not value.is_floating_point():
            raise TypeError(f"state {key!r} must be a floating-point tensor, got {_describe(value)}")
        if value.shape != param.shape:
            raise ValueError(
                f"state {key!r} must have its parameter's shape {tuple(param.shape)}, got {tuple(value.shape)}; "
                f"{remedy}"
            )
    for key, (dtype, group) in CODES.items():
        value = source.get(key)
        if value is None:
            continue
        shape = tuple(param.shape) if group == 1 else (-(-param.numel() // group),)
        if not isinstance(value, torch.Tensor) or value.dtype != dtype or tuple(value.shape) != shape:
            raise ValueError(
                f"state {key!r} must be a {dtype} tensor of shape {shape} for this parameter, got {_describe(value)}; "
                f"{remedy}"
            )
    for name in _BOTH:
        code, scale = f"{name}_code", f"{name}_scale"
        if source.get(name) is None and (source.get(code) is None) != (source.get(scale) is None):
            raise ValueError(f"state {code!r} and {scale!r} mean something together only, got one of them; give both")
    for key in ("step", "step_int64"):
        value = source.get(key, 0)
        if isinstance(value, torch.Tensor) and value.numel() == 1:
            if value.device.type != "cpu":
                continue  # reading it would wait for the device; the clock ignores what is no count
            value = value.item()
        if not isinstance(value, (int, float)):
            raise TypeError(f"state {key!r} must be a number or a tensor of one element, got {_describe(value)}")
        if not 0 <= value < 2**63:
            raise ValueError(f"state {key!r} must be a count of updates, got {value!r}")


def check_both_moments(source: Mapping[str, Any]) -> None:
    """Raise ValueError if a checkpoint has one moment without the other.

    A second moment that starts afresh under an old first one would make the next update some thirty times too large.
    """
    found = [name for name in _BOTH if source.get(name) is not None or source.get(f"{name}_code") is not None]
    if len(found) == 1:
        raise ValueError(
            f"state must have 'exp_avg' and 'exp_avg_sq' or neither, got {found[0]!r} only; give both, or delete it to "
            "start afresh"
        )


def _describe(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"a {value.dtype} tensor of shape {tuple(value.shape)}"
    return f"{value!r} of type {type(value).__name__}"


@torch.no_grad()
def fill(entry: Entry, param: torch.Tensor, source: Mapping[str, Any]) -> None:
    """Copy values into the entry's own memory; what the source lacks starts fresh.

    State of the entry's own format is copied bit for bit; of another, converted, rounding to nearest. Values of a float
    dtype win over codes, which they were written to replace.
    """
    layout, targets = entry.layout, entry.tensors
    _fill_moments(layout, targets, source)
    if layout.amsgrad and source.get("max_exp_avg_sq") is not targets["max_exp_avg_sq"]:
        _copy_or_zero(targets["max_exp_avg_sq"], source.get("max_exp_avg_sq"))
    _fill_master(layout, targets, param, source)
    _fill_step(entry, source)


def _fill_moments(layout: Layout, targets: Mapping[str, torch.Tensor], source: Mapping[str, Any]) -> None:
    names = [stream.name for stream in codec.MOMENTS[layout.moments]]
    replaced = any(name not in names and source.get(name) is not None for name in _BOTH)
    if not replaced and all(_fits(targets[name], source.get(name)) for name in names):
        for name in names:
            if source[name] is not targets[name]:
                targets[name].copy_(source[name])
        return
    values = {name: _moment(name, source) for name in _BOTH}
    if all(value is None for value in values.values()):
        for name in names:
            targets[name].zero_()  # codes of zero, too
        return
    if layout.moments == "fp32":
        for name, value in values.items():
            if source.get(name) is not targets[name]:
                _copy_or_zero(targets[name], value)
        return
    zero = torch.zeros(layout.shape, dtype=torch.float32, device=layout.device)
    first, second = (zero if value is None else value for value in values.values())
    order = torch.empty_strided(layout.shape, layout.stride, dtype=torch.float32, device=layout.device)
    first, second = (codec.in_memory_order(torch.empty_like(order).copy_(value)) for value in (first, second))
    for elements, groups in _parts(layout.numel):
        for name, coded in codec.encode_moments(layout.moments, first[elements], second[elements]).items():
            of_part = groups if name.endswith("_scale") else elements
            codec.in_memory_order(targets[name])[of_part].copy_(coded)


def _fits(target: torch.Tensor, value: torch.Tensor | None) -> bool:
    """Whether a tensor's bits may be taken over as they are: scales belong to elements in one order of memory."""
    return (
        value is not None
        and value.dtype == target.dtype
        and (target.is_floating_point() or same_order(value.stride(), target.stride(), target.shape))
    )


def _moment(name: str, source: Mapping[str, Any]) -> torch.Tensor | None:
    """A moment's values as a tensor of the parameter's shape, from whichever format the source has."""
    value = source.get(name)
    return _decoded(name, source) if value is None else value


def _decoded(name: str, state: Mapping[str, Any], dtype: torch.dtype = torch.float32) -> torch.Tensor | None:
    """A moment's values as a tensor that lies like its codes; None without codes."""
    codes, scales = state.get(f"{name}_code"), state.get(f"{name}_scale")
    if codes is None or scales is None:
        return None
    values = torch.empty_strided(codes.shape, dense_stride(codes), dtype=dtype, device=codes.device)
    flat_codes, flat_values = codec.in_memory_order(codes), codec.in_memory_order(values)
    for elements, groups in _parts(codes.numel()):
        part = {f"{name}_code": flat_codes[elements], f"{name}_scale": scales[groups]}
        decoded = codec.decode_moment(name, part)
        assert decoded is not None
        flat_values[elements].copy_(decoded)
    return values


def _parts(numel: int) -> Iterator[tuple[slice, slice]]:
    """Elements and their groups, few enough at a time for the dozen int64 tensors that each value passes through."""
    length = 2**22
    assert length % codec.GROUP == 0
    for start in range(0, numel, length):
        yield slice(start, start + length), slice(start // codec.GROUP, (start + length) // codec.GROUP)


def _shaped_like(flat: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Values in memory order as a tensor whose elements lie like those of another."""
    shaped = torch.empty_strided(like.shape, dense_stride(like), dtype=flat.dtype, device=flat.device)
    codec.in_memory_order(shaped).copy_(flat)
    return shaped


def _fill_master(
    layout: Layout, targets: Mapping[str, torch.Tensor], param: torch.Tensor, source: Mapping[str, Any]
) -> None:
    for stream in codec.MASTERS[layout.master]:
        target, value = targets[stream.name], source.get(stream.name)
        if value is target:
            continue
        replaced = stream.name != "master" and source.get("master") is not None
        if value is not None and not replaced:
            target.copy_(value)
            continue
        exact = exact_master(param, source)
        if stream.name == "master":
            target.copy_(param if exact is None else exact)
        elif exact is None:
            target.zero_()
        else:
            dense = torch.empty_like(target, dtype=torch.float32).copy_(exact)
            ours = torch.empty_like(target, dtype=layout.dtype).copy_(param)
            kept = codec.encode_beside(layout.master, codec.in_memory_order(dense), codec.in_memory_order(ours))
            codec.in_memory_order(target).copy_(kept)


def exact_master(param: torch.Tensor, source: Mapping[str, Any]) -> torch.Tensor | None:
    """The float32 value of a 16-bit parameter that its state completes, or the master it holds; None without."""
    if source.get("master") is not None:
        return source["master"]  # type: ignore[no-any-return]
    for master in ("split16", "split8"):
        name = codec.MASTERS[master][0].name
        if source.get(name) is not None and param.dtype == torch.bfloat16:
            kept = source[name].to(param.device)
            ours = torch.empty_like(kept, dtype=param.dtype).copy_(param)
            return _shaped_like(codec.decode_master(master, ours, {name: kept}), kept)
    return None


def _copy_or_zero(target: torch.Tensor, value: torch.Tensor | None) -> None:
    if value is None:
        target.zero_()
    else:
        target.copy_(value)


def portable(param: torch.Tensor, state: Mapping[str, Any], count: int) -> dict[str, Any]:
    """A parameter's state in the terms that torch's AdamW knows, moments in at least float32, and its exact master.

    count: the updates it has seen.
    """
    exported = {"step": _countable(state["step"], count)} if "step" in state else {}
    for name in (*_BOTH, "max_exp_avg_sq"):
        value = _moment(name, state)
        if value is not None:
            exported[name] = value.float() if value.dtype.itemsize < 4 else value
    master = exact_master(param, state)
    return exported if master is None else {**exported, "master": master}


def _countable(mirror: Any, count: int) -> Any:
    """The step for an optimizer that has no int64 beside it: in float64 where float32 would lose the count."""
    if count <= 2**24 or float(mirror) != torch.tensor(count, dtype=torch.float32).item():
        return mirror  # if they disagree, somebody wrote it
    return torch.tensor(count, dtype=torch.float64)


def for_zero(state: Mapping[str, Any]) -> dict[str, Any]:
    """A flat partition's state as DeepSpeed's ZeRO can convert it: 8-bit moments as bfloat16, in which they are exact.

    Its ds_to_universal takes "exp_avg" and "exp_avg_sq" out of every state and cuts the padding of the partition off
    every tensor, which scales are too short for (DeepSpeed 0.19.8, checkpoint/ds_to_universal.py, extract_zero_shards;
    runtime/zero/stage_1_and_2.py, _get_state_without_padding). Made in the host's memory.
    """
    codes = {key: value.cpu() for key, value in state.items() if key.endswith(("_code", "_scale"))}
    moments = {name: _decoded(name, codes, torch.bfloat16) for name in _BOTH}
    kept = {key: value for key, value in state.items() if key not in codes}
    return {**kept, **{name: value for name, value in moments.items() if value is not None}}


def _fill_step(entry: Entry, source: Mapping[str, Any]) -> None:
    mirror, count = entry.tensors["step"], entry.tensors["step_int64"]
    new_count = source.get("step_int64")
    new_mirror = source.get("step", 0 if new_count is None else new_count)
    if new_count is count and new_mirror is not mirror:
        new_count = new_mirror  # only the mirror was written
    elif new_mirror is mirror and new_count is not None and new_count is not count:
        new_mirror = new_count  # only the count was written
    for target, value in ((mirror, new_mirror), (count, new_mirror if new_count is None else new_count)):
        if value is target:
            continue
        if isinstance(value, torch.Tensor):
            target.copy_(value.reshape(()))
        else:
            target.fill_(value)
