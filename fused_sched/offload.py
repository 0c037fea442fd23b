"""Optimizer state out of the device's memory and back: for phases that need the memory for something else."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from . import dtensors
from . import state as states
from .arena import Entry
from .base import OptimizerBase
from .engine import is_capturing
from .pages import in_large_pages


class Offloading(OptimizerBase):
    """The part of `FusedScheduledAdam` that moves its state to the host and back."""

    _offloaded = False

    @torch.no_grad()
    def offload(self, *, pin_memory: bool = True, discard_graphs: bool = False) -> None:
        """Move the moments, masters and step counts of all parameters to the host's memory, until `reload()`.

        Args:
            pin_memory: page-locked host memory for what was on a GPU: faster both ways, but torch rounds each
                allocation up to a power of two bytes and keeps it for the next time.
            discard_graphs: CUDA graphs that captured `step()` will not be replayed any more. They hold the addresses
                of the memory that is freed, and `reload()` gets other addresses: capture anew after it.

        No bit changes. The clock, the schedules and `history()` stay where they are (some KB). Waits for the device;
        `torch.cuda.empty_cache()` then hands the memory to other processes. Tensors taken from `opt.state` before keep
        the memory they were taken from. State on the CPU is moved within it, so that a program does the same with and
        without a GPU. Until `reload()`, which is never done silently, `step()` and loading raise RuntimeError;
        `state_dict()`, `fp32_state_dict()` and copies work. A second `offload()` does nothing.

        Raises RuntimeError within the capture of a CUDA graph, or if `step()` was captured in one and `discard_graphs`
        is False; torch.OutOfMemoryError, or what the allocator raises. Nothing has changed then.

        Example:
            >>> import torch
            >>> from fused_sched import FusedScheduledAdam
            >>> p = torch.nn.Parameter(torch.ones(2))
            >>> opt = FusedScheduledAdam([p])
            >>> p.sum().backward()
            >>> opt.step()
            >>> opt.offload()
            >>> opt.state[p]["exp_avg"].device
            device(type='cpu')
            >>> opt.reload()
            >>> opt.step()
            >>> opt.clock
            2

        Source: DeepSpeed 0.19.8, `engine.offload_states()`.
        """
        if self._offloaded:
            return
        if any(map(is_capturing, self._devices.engines)):
            raise RuntimeError("offload() waits for the device, which the capture of a CUDA graph does not allow")
        if self._devices.captured and not discard_graphs:
            raise RuntimeError(
                "step() was captured in a CUDA graph, which would go on using the memory that offload() frees; pass "
                "discard_graphs=True if it will not be replayed any more, and capture anew after reload()"
            )
        self._move(to_host=True, pin_memory=pin_memory)
        if discard_graphs:
            self._devices.forget_graphs()
        self._offloaded = True

    @torch.no_grad()
    def reload(self) -> None:
        """Move the state back to its parameters' devices, to new addresses; without `offload()` it does nothing.

        Raises what the allocator raises where there is no room (torch.OutOfMemoryError); the state then stays on the
        host.

        Example:
            >>> import torch
            >>> from fused_sched import FusedScheduledAdam
            >>> FusedScheduledAdam([torch.zeros(2, requires_grad=True)]).reload()
        """
        if self._offloaded:
            self._move(to_host=False, pin_memory=False)
            self._offloaded = False

    def _refuse_offloaded(self, what: str) -> None:
        if self._offloaded:
            raise RuntimeError(f"{what} needs the state that offload() moved to the host; call opt.reload() before it")

    def _move(self, *, to_host: bool, pin_memory: bool) -> None:
        """Move all state, or none if memory runs out."""
        held = [(p, s, s.entry) for p, s in self.state.items() if isinstance(s, states.ParamState) and s.entry]
        memory = _memory(entry for _, _, entry in held)
        copies: dict[int, torch.Tensor] = {}
        if to_host:
            _finish(memory)  # steps on other streams, which the copies would not wait for
        for key, (tensor, device) in memory.items():
            pinned = to_host and pin_memory and tensor.is_cuda
            target = torch.empty_like(tensor, device="cpu" if to_host else device, pin_memory=pinned)
            copies[key] = (target if pinned else in_large_pages(target)).copy_(tensor, non_blocking=True)
        if to_host:
            _finish(memory)  # the copies: the host may read them, and any stream use what is freed
        for arena in {id(e.arena): e.arena for _, _, e in held if e.arena is not None}.values():
            arena.buffers = {slot: copies[id(buffer)] for slot, buffer in arena.buffers.items()}
            arena.records = copies[id(arena.records)]
        for param, param_state, entry in held:
            addresses = dict(zip(entry.tensors, entry.pointers, strict=True)) if entry.arena else _addresses(entry)
            if entry.arena is None:
                entry.tensors = {name: copies[id(tensor)] for name, tensor in entry.tensors.items()}
            else:
                entry.tensors = {name: entry.view(name) for name in entry.tensors}
                entry.pointers = entry.current_pointers()
            _show(param_state, param, addresses)
        self.state.memory = object()  # the tables that hold addresses are made anew


def _memory(held: Iterable[Entry]) -> dict[int, tuple[torch.Tensor, torch.device]]:
    """Every tensor that state lies in, by its id, with the device of its parameters."""
    found: dict[int, tuple[torch.Tensor, torch.device]] = {}
    for entry in held:
        tensors = entry.tensors.values() if entry.arena is None else entry.arena.all_buffers
        found |= {id(tensor): (tensor, entry.layout.device) for tensor in tensors}
    return found


def _finish(memory: dict[int, tuple[torch.Tensor, torch.device]]) -> None:
    """Wait for the GPUs that this memory is on."""
    for device in {tensor.device for tensor, _ in memory.values() if tensor.is_cuda}:
        torch.cuda.synchronize(device)


def _addresses(entry: Entry) -> dict[str, int]:
    return {name: tensor.data_ptr() for name, tensor in entry.tensors.items()}


def _show(param_state: states.ParamState, param: torch.Tensor, addresses: dict[str, int]) -> None:
    """Show the entry's tensors where those at `addresses` are shown; what somebody else put there stays."""
    assert param_state.entry is not None
    for name, value in dtensors.shown(param, param_state.entry.tensors).items():
        current = param_state.get(name)
        if isinstance(current, torch.Tensor) and dtensors.local(current).data_ptr() == addresses[name]:
            dict.__setitem__(param_state, name, value)
        else:
            param_state.mark()
