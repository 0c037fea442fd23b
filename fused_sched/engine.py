"""One device's part of the optimizer: its clock, its groups' settings, and the calls into compiled code."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
import torch

from . import metric_rule, packing, precision
from .backends import Backend
from .history import Recorder
from .hyperparameters import SCHEDULABLE, GroupSettings, Source
from .norm import NormMemory, NormSettings
from .packing import Plan, Work


class Engine(Protocol):
    """What the optimizer asks of a device, compiled or not."""

    device: torch.device
    backend: Backend
    recorder: Recorder | None  # of the steps; on the first device only

    def push(self, settings: Sequence[GroupSettings], lr_tensors: Sequence[torch.Tensor | None]) -> None:
        """Make these settings the device's."""

    def push_norm(self, settings: NormSettings) -> None:
        """Make these settings the device's."""

    def lay_out(self, works: Sequence[Work]) -> None:
        """Prepare for calls with these tensors, which have been checked and have their state."""

    def rebind(self, grads: Sequence[torch.Tensor]) -> bool:
        """Prepare for a call with the same parameters again; False if they must be laid out anew."""

    @property
    def row_addresses(self) -> Sequence[int] | None:
        """Of the prepared call's tensors in a table that only wants new addresses of gradients; None: it wants more."""

    def sum_squares(self) -> torch.Tensor:
        """Sum the squares of the prepared call's gradients, into a 0-d float64 tensor that step() reads."""

    def step(
        self,
        tick: bool,
        found_inf: torch.Tensor | None = None,
        grad_scale: torch.Tensor | None = None,
        norm_is_reduced: bool = False,
    ) -> None:
        """Apply the prepared call; norm_is_reduced: what sum_squares() returned has become the sum of all devices."""

    def report(self, metric: torch.Tensor | float) -> None:
        """Advance the rates that follow metrics by one report."""

    def release(self) -> None:
        """The device will not be used again."""

    def forget_rates(self) -> None:
        """No rate was used yet."""

    def read_clock(self) -> int:
        """Updates applied so far; waits for the device."""

    def write_clock(self, step: int) -> None:
        """Set T."""

    @property
    def lr_tensor(self) -> torch.Tensor:
        """The rates just used, float64 [n_groups], on the device; NaN before the first step."""

    @property
    def grad_norm(self) -> torch.Tensor:
        """The norm of the latest step, 0-d float64, on the device; NaN before the first step."""


def is_capturing(device: torch.device) -> bool:
    """Whether what is launched on the device now goes into a CUDA graph."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


class CompiledEngine:
    """Runs the clock and the update of `csrc/step.h` on one device."""

    def __init__(self, backend: Backend, device: torch.device, seed: int) -> None:
        assert backend.module is not None
        self.backend = backend
        self.device = device
        self._is_cuda = device.type == "cuda"
        self._module = backend.module
        self._call = self._module.Call()
        self._call.device = device.index or 0
        self._call.seed = seed
        layouts = {name: packing.layout_dtype(self._module, name) for name in ("clock", "group", "values", "scalars")}
        self._group_dtype = layouts["group"]
        self._scalar_bytes = layouts["scalars"].itemsize
        self._clock = torch.zeros(layouts["clock"].itemsize // 8, dtype=torch.int64, device=device)
        self._call.clock = self._clock.data_ptr()
        self._values = torch.zeros(0, layouts["values"].itemsize // 8, dtype=torch.float64, device=device)
        self._groups = torch.zeros(0, dtype=torch.uint8, device=device)
        self._programs: dict[bytes, torch.Tensor] = {}
        self._machines = torch.zeros(0, dtype=torch.uint8, device=device)  # a record per group, once one has a machine
        self._metric = torch.zeros((), dtype=torch.float64, device=device)
        self._scalars = torch.zeros(0, dtype=torch.uint8, device=device)
        # Buffers that grew: a graph captured before still reads and writes the memory it was captured with.
        self._retired: list[torch.Tensor] = []
        self._pushed: list[GroupSettings] = []
        self._lr_copies: list[tuple[torch.Tensor, torch.Tensor]] = []  # (device buffer, the user's tensor elsewhere)
        self._lr_tensors: list[torch.Tensor | None] = []  # alive while the records hold their addresses
        self._plan: Plan | None = None
        self._inputs: tuple[int, ...] = ()  # of the latest call, as it has them
        self._scaler_values: list[torch.Tensor] = []  # alive until the next call
        self._norm: NormMemory | None = None  # once it is wanted
        self._norm_settings = NormSettings()
        self.recorder: Recorder | None = None

    # -- settings ------------------------------------------------------------------------------------------

    def push(self, settings: Sequence[GroupSettings], lr_tensors: Sequence[torch.Tensor | None]) -> None:
        for buffer, tensor in self._lr_copies:
            buffer.copy_(tensor.detach().reshape(()), non_blocking=self.device.type != "cpu")
        if list(settings) == self._pushed:
            return
        self._refuse_upload_into_capture()
        replaced = [buffer for buffer, _ in self._lr_copies]
        replaced += [t for t in self._lr_tensors if t is not None and not any(t is new for new in lr_tensors)]
        self._lr_tensors = list(lr_tensors)
        self._lr_copies = []
        programs: dict[bytes, torch.Tensor] = {}
        records = np.zeros(len(settings), self._group_dtype)
        for index, group in enumerate(settings):
            record = records[index]
            for name in SCHEDULABLE:
                self._pack_source(record, name, getattr(group, name), lr_tensors[index], programs)
            record["eps"] = group.eps
            record["grad_divisor"] = group.grad_divisor
            flags = self._module.GROUP_FLAGS
            record["flags"] = flags["decoupled"] * group.decoupled | flags["maximize"] * group.maximize
        if self._values.shape[0] < len(settings):
            old = self._values
            self._retired.append(old)
            shape = (len(settings), old.shape[1])
            self._values = torch.full(shape, math.nan, dtype=torch.float64, device=self.device)
            self._values[: old.shape[0]].copy_(old)
        # Programs first: the records point to them. The records are written in place, so that a captured graph
        # follows; what they pointed to may go once this stream has passed.
        replaced += [old for program, old in self._programs.items() if program not in programs]
        self._keep_until_passed(replaced)
        self._programs = programs
        if self._groups.numel() < records.nbytes:
            self._retired.append(self._groups)
            self._groups = torch.zeros(2 * records.nbytes, dtype=torch.uint8, device=self.device)
        self._groups[: records.nbytes].copy_(self._to_device(records.tobytes()), non_blocking=True)
        self._push_machines(settings)
        self._call.groups = self._groups.data_ptr()
        self._call.values = self._values.data_ptr()
        self._call.num_groups = len(settings)
        self._pushed = list(settings)

    def _keep_until_passed(self, tensors: Sequence[torch.Tensor]) -> None:
        """Keep memory that is let go until the current stream has come to here.

        Else it could be given out again on the stream that it was allocated on, while a clock on this one reads it.
        """
        if self._is_cuda:
            stream = torch.cuda.current_stream(self.device)
            for tensor in tensors:
                if tensor.device == self.device:
                    tensor.record_stream(stream)

    def _refuse_upload_into_capture(self) -> None:
        if is_capturing(self.device):
            raise RuntimeError(
                "options changed since the last step, and the capture of a CUDA graph would record their upload; call "
                "opt.push_hyperparameters() before capturing"
            )

    def push_norm(self, settings: NormSettings) -> None:
        if settings == self._norm_settings:
            return
        self._refuse_upload_into_capture()
        memory = self._norm_memory()
        memory.write(settings, self._to_device)
        self._call.norm = memory.address if settings.wanted else 0
        self._norm_settings = settings
        self._reserve_norm()

    def _norm_memory(self) -> NormMemory:
        if self._norm is None:
            self._norm = NormMemory(self._module, self.device)
        return self._norm

    def _reserve_norm(self) -> None:
        if self._norm is not None:
            self._norm.reserve(self._module.num_norm_chunks(self._call))
            self._call.chunk_sums = self._norm.sums_address

    def _pack_source(
        self,
        record: np.void,
        name: str,
        source: Source,
        lr_tensor: torch.Tensor | None,
        programs: dict[bytes, torch.Tensor],
    ) -> None:
        record[f"{name}.scale"] = source.scale
        if source.schedule is not None:
            program = source.schedule.program
            if program not in programs:
                known = self._programs.get(program)
                programs[program] = self._to_device(program) if known is None else known
            record[f"{name}.program"] = programs[program].data_ptr()
        elif source.machine is not None:
            record[f"{name}.tensor"] = source.machine.on(self.device).data_ptr()
            record[f"{name}.tensor_format"] = self._module.FORMATS["fp64"]
        elif source.tensor_dtype is not None:
            assert lr_tensor is not None
            tensor = self._on_device(lr_tensor)
            record[f"{name}.tensor"] = tensor.data_ptr()
            record[f"{name}.tensor_format"] = self._module.FORMATS[precision.FORMATS[tensor.dtype]]

    def _push_machines(self, settings: Sequence[GroupSettings]) -> None:
        machines = [group.lr.machine for group in settings]
        if not self._machines.numel() and not any(machines):
            return
        # One record per group, written in place: a captured report follows, too.
        records = metric_rule.pack_records(
            None if machine is None else (machine.rule, machine.on(self.device).data_ptr()) for machine in machines
        )
        if self._machines.numel() < len(records):
            self._retired.append(self._machines)
            self._machines = torch.zeros(2 * len(records), dtype=torch.uint8, device=self.device)
        self._machines[: len(records)].copy_(self._to_device(records), non_blocking=True)

    def _on_device(self, tensor: torch.Tensor) -> torch.Tensor:
        if tensor.device == self.device:
            return tensor
        buffer = torch.empty((), dtype=tensor.dtype, device=self.device)
        buffer.copy_(tensor.detach().reshape(()), non_blocking=self.device.type != "cpu")
        self._lr_copies.append((buffer, tensor))
        return buffer

    def _to_device(self, content: bytes) -> torch.Tensor:
        host = torch.frombuffer(bytearray(content), dtype=torch.uint8)
        if self._is_cuda:
            host = host.pin_memory()
        return host.to(self.device, non_blocking=True)

    # -- the call ------------------------------------------------------------------------------------------

    def lay_out(self, works: Sequence[Work]) -> None:
        plan = self._plan = Plan(works, self.backend)
        plan.bind([w.grad for w in works])
        self._call.tensors = plan.rows.ctypes.data
        self._call.num_tensors = len(plan.rows)
        self._call.arenas = plan.arenas.ctypes.data
        self._call.num_arenas = len(plan.arenas)
        if self._scalars.numel() < len(works) * self._scalar_bytes:
            self._retired.append(self._scalars)
            self._scalars = torch.zeros(2 * len(works) * self._scalar_bytes, dtype=torch.uint8, device=self.device)
            self._call.scalars = self._scalars.data_ptr()
        self._call.history = 0 if self.recorder is None else self.recorder.address
        self._reserve_norm()

    def rebind(self, grads: Sequence[torch.Tensor]) -> bool:
        return self._plan is not None and self._plan.bind(grads)

    @property
    def row_addresses(self) -> Sequence[int] | None:
        return None if self._plan is None else self._plan.row_addresses

    def sum_squares(self) -> torch.Tensor:
        self._set_inputs(0, 0, True, False)
        self._call.launches = 0
        self._run(self._module.norm)
        return self._norm_memory().squares

    def step(
        self,
        tick: bool,
        found_inf: torch.Tensor | None = None,
        grad_scale: torch.Tensor | None = None,
        norm_is_reduced: bool = False,
    ) -> None:
        self._scaler_values = []
        self._set_inputs(self._address_of(found_inf), self._address_of(grad_scale), norm_is_reduced, tick)
        if norm_is_reduced:
            self._run(self._module.clock)
            self._run(self._module.update)
        else:
            self._run(self._module.step)
        if self._plan is not None:
            self._plan.finish()

    def _set_inputs(self, *inputs: int) -> None:
        """Of a call: addresses of found_inf and grad_scale, whether the norm is reduced elsewhere, whether it ticks."""
        inputs = (*inputs, torch.get_num_threads())
        if inputs != self._inputs:  # setting them takes 0.3 us
            call = self._call
            call.found_inf, call.grad_scale, call.norm_is_reduced, call.tick, call.num_threads = inputs
            self._inputs = inputs

    def _run(self, function: Callable[[Any], None]) -> None:
        if self._is_cuda:
            self._call.stream = torch.cuda.current_stream(self.device).cuda_stream
            # Torch makes the device current, so that _cuda finds it so and need not return to one that this
            # process may never have used: since CUDA 12 making a device current creates its context.
            with torch.cuda.device(self.device):
                function(self._call)
        else:
            function(self._call)

    def _address_of(self, scalar: torch.Tensor | None) -> int:
        if scalar is None:
            return 0
        # Waits for a copy to the CPU, whose loops read at once; one to a GPU is ordered by its stream.
        non_blocking = self.device.type != "cpu"
        scalar = scalar.detach().to(device=self.device, dtype=torch.float32, non_blocking=non_blocking)
        self._scaler_values.append(scalar)
        return scalar.data_ptr()

    def report(self, metric: torch.Tensor | float) -> None:
        if isinstance(metric, torch.Tensor):
            self._metric.copy_(metric.reshape(()), non_blocking=self.device.type != "cpu")
        else:
            self._metric.fill_(metric)
        device, stream = self._call.device, 0
        arguments = (self._metric.data_ptr(), self._machines.data_ptr(), len(self._pushed), device)
        if self._is_cuda:
            stream = torch.cuda.current_stream(self.device).cuda_stream
            with torch.cuda.device(self.device):
                self._module.report_metric(*arguments, stream)
        else:
            self._module.report_metric(*arguments, stream)

    def release(self) -> None:
        for group in self._pushed:
            if group.lr.machine is not None:
                group.lr.machine.forget(self.device)

    def forget_rates(self) -> None:
        self._values.fill_(math.nan)

    @property
    def grad_norm(self) -> torch.Tensor:
        return self._norm_memory().norm

    # -- clock ---------------------------------------------------------------------------------------------

    def read_clock(self) -> int:
        return int(self._clock[0].item())

    def write_clock(self, step: int) -> None:
        self._clock.zero_()
        self._clock[0].fill_(step)

    @property
    def lr_tensor(self) -> torch.Tensor:
        return self._values[:, 0]
