"""Where the compiled pass of a steady step cannot serve, and what it must not do."""

from __future__ import annotations

import gc
import shutil
import subprocess
import weakref
from pathlib import Path

import pytest
import torch
from cases import assert_same, snapshot
from conftest import Backend
from test_steady import Named, Watched, first_grad, needs_exchange_api, pair

from fused_sched import FusedScheduledAdam, steady

CSRC = Path(__file__).resolve().parent.parent / "csrc"

# ---- where it cannot serve ---------------------------------------------------------------------------


def test_parameters_of_a_subclass_are_left_to_the_close_look(compiled: Backend) -> None:
    named, plain = Named(torch.ones(3, device=compiled.device)), compiled.parameter([1.0, 1.0, 1.0])
    for param in (named, plain):
        optimizer = compiled.optimizer([param], lr=0.5)
        for _ in range(3):
            param.grad = torch.ones(3, device=compiled.device)
            optimizer.step()
        assert optimizer._devices._steady is None or param is plain
    assert torch.equal(named, plain)


def test_without_torchs_exchange_api_every_step_looks_closely(
    compiled: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(steady, "_EXCHANGE_API", None)
    ours, plain = pair(compiled)
    assert ours.close_looks == plain.close_looks == 3
    assert_same(snapshot(ours.optimizer), snapshot(plain.optimizer))


def test_copied_gradients_are_left_to_the_close_look(compiled: Backend) -> None:
    param = compiled.parameter([[1.0, 2.0], [3.0, 4.0]])
    optimizer = compiled.optimizer([param], lr=0.5, eps=0.0)
    for sign in (1.0, -1.0, 1.0):
        param.grad = torch.tensor([[sign, -sign], [sign, sign]], device=param.device).t()
        optimizer.step()
    plain = compiled.parameter([[1.0, 2.0], [3.0, 4.0]])
    beside = compiled.optimizer([plain], lr=0.5, eps=0.0)
    for sign in (1.0, -1.0, 1.0):
        plain.grad = torch.tensor([[sign, -sign], [sign, sign]], device=plain.device).t().contiguous()
        beside.step()
    assert torch.equal(param, plain)


@needs_exchange_api
def test_a_group_without_parameters_gets_one(compiled: Backend) -> None:
    first, second = compiled.parameter([1.0]), compiled.parameter([1.0])
    optimizer = compiled.optimizer([{"params": [first]}, {"params": []}], lr=0.5, eps=0.0)
    for param in (first, second):
        param.grad = torch.ones_like(param)
    for _ in range(3):
        optimizer.step()
    optimizer.param_groups[1]["params"].append(second)
    optimizer.step()
    assert second.item() == 0.5


# ---- what it must not do -----------------------------------------------------------------------------


@needs_exchange_api
def test_nothing_is_kept_alive(compiled: Backend) -> None:
    watched = Watched(compiled, True)
    grads = []
    for _ in range(4):
        watched.set_gradients()
        grads.append(weakref.ref(first_grad(watched)))
        watched.optimizer.step()
        watched.optimizer.step()
    watched.optimizer.zero_grad()
    gc.collect()
    assert [grad() for grad in grads] == [None] * 4
    optimizer: weakref.ref[FusedScheduledAdam] = weakref.ref(watched.optimizer)
    watched.params[0].owner = watched.optimizer  # type: ignore[attr-defined]  # a cycle through what is watched
    del watched
    gc.collect()
    assert optimizer() is None


@needs_exchange_api
def test_a_failed_step_changes_nothing_and_the_next_is_right(compiled: Backend) -> None:
    ours, plain = pair(compiled)
    for watched in (ours, plain):
        watched.set_gradients()
        before = [param.detach().clone() for param in watched.params]
        watched.optimizer.param_groups[0]["lr"] = "much"
        assert "lr must be a number" in watched.step()
        assert all(torch.equal(p, b) for p, b in zip(watched.params, before, strict=True))
        watched.optimizer.param_groups[0]["lr"] = 0.1
        assert watched.step() == ""
    assert_same(snapshot(ours.optimizer), snapshot(plain.optimizer))


def test_the_exchange_api_is_laid_out_as_torchs_header_says(tmp_path: Path) -> None:
    header = Path(torch.__file__).parent / "include" / "ATen" / "dlpack.h"
    if "DLPackExchangeAPI" not in (header.read_text() if header.exists() else "") or shutil.which("g++") is None:
        pytest.skip("needs g++ and the headers of torch 2.10 or newer")
    fields = {
        "DLPackVersion": ("major", "minor"),
        "DLDevice": ("device_type", "device_id"),
        "DLDataType": ("code", "bits", "lanes"),
        "DLTensor": ("data", "device", "ndim", "dtype", "shape", "strides", "byte_offset"),
        "DLPackExchangeAPI": ("managed_tensor_allocator", "dltensor_from_py_object_no_sync", "current_work_stream"),
    }
    checks = [f"static_assert(sizeof(fused_sched::{name}) == sizeof(::{name}));" for name in fields]
    checks += [
        f"static_assert(offsetof(fused_sched::{name}, {field}) == offsetof(::{name}, {field}));"
        for name, members in fields.items()
        for field in members
    ]
    checks.append("static_assert(offsetof(fused_sched::DLPackExchangeAPI, version) == 0);")
    checks.append("static_assert(fused_sched::kDLPackMajorVersion == DLPACK_MAJOR_VERSION);")
    source = tmp_path / "layout.cpp"
    includes = ["<stddef.h>", f'"{header}"', f'"{CSRC / "dlpack.h"}"']
    source.write_text("\n".join([*(f"#include {name}" for name in includes), *checks]) + "\n")
    result = subprocess.run(["g++", "-std=c++17", "-fsyntax-only", str(source)], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
