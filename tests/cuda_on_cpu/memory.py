"""Memory for a call of csrc/step.h: every buffer of its own, between sentinels, at a chosen misalignment."""

from __future__ import annotations

import os
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from . import abi, emulation

SENTINEL = 0xA5
GUARD_BYTES = 64
# AddressSanitizer watches what follows an allocation: there buffers end where their allocation ends.
GUARD_AFTER = 0 if os.environ.get("FUSED_SCHED_TEST_SANITIZER") == "address" else GUARD_BYTES


class Buffer:
    """Zeros of a NumPy dtype, `misalignment` elements past a 16-byte boundary."""

    def __init__(self, dtype: npt.DTypeLike, count: int, misalignment: int = 0) -> None:
        dtype = np.dtype(dtype)
        begin = GUARD_BYTES + misalignment * dtype.itemsize
        self.size = count * dtype.itemsize
        self.raw = np.full(begin + self.size + GUARD_AFTER, SENTINEL, np.uint8)
        assert self.raw.ctypes.data % 16 == 0
        self.begin = begin
        self.data = self.raw[begin : begin + self.size].view(dtype)
        self.data[...] = np.zeros((), dtype)

    @property
    def address(self) -> int:
        return self.raw.ctypes.data + self.begin

    def assert_sentinels(self) -> None:
        assert (self.raw[: self.begin] == SENTINEL).all(), "written before the buffer"
        assert (self.raw[self.begin + self.size :] == SENTINEL).all(), "written after the buffer"


def padded(numel: int) -> int:
    return -(-numel // abi.PADDING) * abi.PADDING


def chunk_lengths(numels: list[int]) -> list[int]:
    """The elements of every chunk of the norm, in order (csrc/core/norm.h)."""
    tiles = sum(-(-n // 4096) for n in numels)
    length = 4096 * max(1, -(-tiles // 16384))
    return [min(length, n - first) for n in numels for first in range(0, n, length)]


@dataclass(frozen=True)
class TensorSpec:
    numel: int
    param: str = "fp32"
    grad: str = "fp32"
    master: str = "none"
    amsgrad: bool = False
    moments: str = "fp32"
    param_misalignment: int = 0  # elements
    grad_misalignment: int = 0
    group: int = 0
    arena: int = 0
    ordinal: int = 0

    @property
    def compute(self) -> str:
        return "<f8" if self.param == "fp64" else "<f4"

    @property
    def slots(self) -> dict[str, tuple[npt.DTypeLike, int]]:
        """The state this tensor has: slot -> dtype, elements per entry."""
        moment = np.float64 if self.param == "fp64" else abi.MOMENT_STORAGE[self.moments]
        slots: dict[str, tuple[npt.DTypeLike, int]] = {"exp_avg": (moment, 1), "exp_avg_sq": (moment, 1)}
        if self.amsgrad:
            slots["max_exp_avg_sq"] = (self.compute, 1)
        if self.master in abi.MASTER_STORAGE:
            slots["master"] = (abi.MASTER_STORAGE[self.master], 1)
        if self.moments == "8bit":
            slots |= dict.fromkeys(("exp_avg_scale", "exp_avg_sq_scale"), (np.uint8, abi.SCALE_GROUP))
        return slots

    def entries(self, slot: str) -> int:
        """How many entries of a slot belong to the tensor; what follows is padding."""
        return -(-self.numel // self.slots[slot][1])


@dataclass(frozen=True)
class GroupSpec:
    """lr, beta1, beta2, weight_decay: numbers, or (scale, bytes of a program), or (scale, dtype name, value) for a
    0-d tensor."""

    lr: object = 1e-3
    beta1: object = 0.9
    beta2: object = 0.999
    weight_decay: object = 0.01
    eps: float = 1e-8
    grad_divisor: float = 1.0
    flags: int = abi.GROUP_DECOUPLED


@dataclass
class Problem:
    """Tensors, groups and everything else a call names, allocated; `call` runs it."""

    specs: list[TensorSpec]
    groups: list[GroupSpec] = field(default_factory=lambda: [GroupSpec()])
    seed: int = 2**63 + 12345

    def __post_init__(self) -> None:
        specs = self.specs
        self.params = [Buffer(abi.STORAGE[s.param], s.numel, s.param_misalignment) for s in specs]
        self.grads = [Buffer(abi.STORAGE[s.grad], s.numel, s.grad_misalignment) for s in specs]
        self.steps = [Buffer(abi.STEP_RECORD, 1) for _ in specs]
        self.clock = Buffer(abi.CLOCK, 1)
        self.values = Buffer(abi.VALUES, len(self.groups))
        self.scalars = Buffer(np.uint8, abi.SCALAR_SLOT_BYTES * len(specs))
        self.group_records = Buffer(abi.GROUP, len(self.groups))
        self.found_inf = Buffer(np.float32, 1)
        self.grad_scale = Buffer(np.float32, 1)
        self.norm = Buffer(abi.NORM, 1)
        self.norm.data["max_norm"], self.norm.data["grad_divisor"] = np.inf, 1.0
        self.chunk_sums = Buffer(abi.SQUARE_SUM, len(chunk_lengths([s.numel for s in specs])))
        self.history = Buffer(abi.HISTORY, 1)
        self.history_rows = Buffer(np.float64, 0)
        self.programs: list[Buffer] = []
        self.scalar_tensors: list[Buffer] = []
        for record, group in zip(self.group_records.data, self.groups, strict=True):
            self._fill_group(record, group)
        self.arenas: list[dict[str, Buffer]] = []
        self.offsets = [0] * len(specs)
        for index in range(1 + max((s.arena for s in specs), default=0)):
            members = [i for i, s in enumerate(specs) if s.arena == index]
            length = 0
            for i in members:
                self.offsets[i] = length
                length += padded(specs[i].numel)
            # All tensors of an arena keep a slot in one format; it has the slots any of them needs, no others.
            slots = {slot: kept for i in members for slot, kept in specs[i].slots.items()}
            assert all(slots[slot] == kept for i in members for slot, kept in specs[i].slots.items())
            self.arenas.append({slot: Buffer(dtype, length // group) for slot, (dtype, group) in slots.items()})

    def _fill_group(self, record: np.void, group: GroupSpec) -> None:
        record["eps"], record["grad_divisor"], record["flags"] = group.eps, group.grad_divisor, group.flags
        for name in abi.HYPERPARAMETERS:
            value = getattr(group, name)
            hyperparameter = record[name]
            hyperparameter["scale"] = value[0] if isinstance(value, tuple) else value
            if isinstance(value, tuple) and len(value) == 2:
                program = Buffer(np.uint8, len(value[1]))
                program.data[:] = np.frombuffer(value[1], np.uint8)
                self.programs.append(program)
                hyperparameter["program"] = program.address
            elif isinstance(value, tuple):
                tensor = Buffer(abi.STORAGE[value[1]], 1)
                tensor.data[0] = value[2]
                self.scalar_tensors.append(tensor)
                hyperparameter["tensor"] = tensor.address
                hyperparameter["tensor_format"] = abi.FORMATS[value[1]]

    def buffers(self) -> list[Buffer]:
        state = [buffer for arena in self.arenas for buffer in arena.values()]
        others = [self.clock, self.values, self.scalars, self.group_records, self.found_inf, self.grad_scale]
        others += [self.norm, self.chunk_sums, self.history, self.history_rows]
        return [*self.params, *self.grads, *self.steps, *state, *others, *self.scalar_tensors]

    def snapshot(self) -> list[bytes]:
        return [buffer.raw.tobytes() for buffer in self.buffers()]

    def restore(self, snapshot: list[bytes]) -> None:
        for buffer, raw in zip(self.buffers(), snapshot, strict=True):
            buffer.raw[:] = np.frombuffer(raw, np.uint8)

    def state(self, index: int) -> dict[str, npt.NDArray[np.generic]]:
        """The padded state of one tensor, as views."""
        offset = self.offsets[index]
        end = offset + padded(self.specs[index].numel)
        arena = self.arenas[self.specs[index].arena]
        return {
            slot: arena[slot].data[offset // group : end // group]
            for slot, (_, group) in self.specs[index].slots.items()
        }

    def scalars_of(self, index: int) -> np.void:
        begin = index * abi.SCALAR_SLOT_BYTES
        dtype = abi.SCALARS[self.specs[index].compute]
        return self.scalars.data[begin : begin + dtype.itemsize].view(dtype)[0]

    def draw_grads(self, seed: int = 0, scale: float = 1.0) -> None:
        """Finite gradients."""
        rng = np.random.default_rng(seed)
        for buffer, spec in zip(self.grads, self.specs, strict=True):
            values = rng.standard_normal(spec.numel) * scale
            buffer.data[:] = emulation.encode(values if spec.grad == "fp64" else values.astype(np.float32), spec.grad)

    def randomize(self, rng: np.random.Generator, special: float = 0.05) -> None:
        """Plausible values; a share of them zeros, subnormals, huge values, infinities and NaNs."""
        for index, spec in enumerate(self.specs):
            state = self.state(index)
            n = spec.numel
            kind = np.dtype(spec.compute)

            def draw(n: int = n, kind: np.dtype = kind) -> npt.NDArray[np.floating]:
                values = rng.standard_normal(n) * 10.0 ** rng.integers(-6, 2, n)
                odd = np.array([0.0, -0.0, 1e-40, 6e-8, 65519.0, 3e38, np.inf, -np.inf, np.nan])
                chosen = rng.random(n) < special
                return np.where(chosen, rng.choice(odd, n), values).astype(kind)

            with np.errstate(over="ignore"):
                param = draw()
                self.params[index].data[:] = emulation.encode(param, spec.param, spec.master == "fp32")
                if spec.param == "bf16" and spec.master in ("split16", "split8"):
                    self.params[index].data[:], state["master"][:n] = emulation.split(param, spec.master)
                self.grads[index].data[:] = emulation.encode(
                    draw().astype(np.float64 if spec.grad == "fp64" else np.float32), spec.grad
                )
            moments = {"exp_avg": draw(), "exp_avg_sq": np.abs(draw())}
            if spec.moments == "fp32":
                for slot, values in moments.items():
                    state[slot][:n] = values
            else:
                middle = np.full(n, 0x80080000, np.uint32)  # of both moments' draws
                for slot, stored in emulation.encode_moments(spec.moments, *moments.values(), middle).items():
                    state[slot][: spec.entries(slot)] = stored
            if spec.amsgrad:
                state["max_exp_avg_sq"][:n] = np.abs(draw())
            if spec.master == "fp32":
                # Every eighth parameter was edited and no longer is its master's rounding.
                state["master"][:n] = np.where(np.arange(n) % 8 == 3, param * np.float32(0.75), param)
            elif "master" in state:
                # A remainder that no float leaves beside a zero or an infinity.
                edited = rng.random(n) < special
                self.params[index].data[edited] = np.resize([0, 0x8000, 0x7F80], np.count_nonzero(edited))

    def record_history(self, num_groups: int | None = None) -> None:
        """From now on calls write to a ring, with columns for the groups there are or as many as said."""
        num_groups = len(self.groups) if num_groups is None else num_groups
        row_length = abi.HISTORY_COLUMNS + 2 * num_groups
        self.history_rows = Buffer(np.float64, abi.HISTORY_LENGTH * row_length)
        self.history.data[0] = (self.history_rows.address, row_length, num_groups, self.history.data["count"][0], 0)

    def rows(self) -> npt.NDArray[np.float64]:
        """The ring's rows: clock, norm, clip, skipped, then rate and decay of each group."""
        return self.history_rows.data.reshape(abi.HISTORY_LENGTH, -1)

    def call(
        self,
        tick: bool = True,
        found_inf: bool = False,
        grad_scale: bool = False,
        device: int = 0,
        norm: bool = False,
        norm_is_reduced: bool = False,
        num_threads: int = 0,
    ) -> abi.Call:
        self.tensor_table = np.zeros(len(self.specs), abi.TENSOR)
        for row, spec, param, grad, step, offset in zip(
            self.tensor_table, self.specs, self.params, self.grads, self.steps, self.offsets, strict=True
        ):
            row["param"], row["grad"], row["step"] = param.address, grad.address, step.address
            row["numel"], row["state_offset"], row["arena"] = spec.numel, offset, spec.arena
            row["group"], row["amsgrad"] = spec.group, spec.amsgrad
            row["param_format"], row["grad_format"] = abi.FORMATS[spec.param], abi.FORMATS[spec.grad]
            row["master"], row["moments"] = abi.MASTERS[spec.master], abi.MOMENTS[spec.moments]
            row["ordinal"] = spec.ordinal
        self.arena_table = np.zeros(len(self.arenas), abi.ARENA)
        for row, arena in zip(self.arena_table, self.arenas, strict=True):
            row["slot"] = [arena[slot].address if slot in arena else 0 for slot in abi.SLOTS]
        return abi.Call(
            tensors=self.tensor_table.ctypes.data,
            num_tensors=len(self.specs),
            arenas=self.arena_table.ctypes.data,
            num_arenas=len(self.arenas),
            clock=self.clock.address,
            groups=self.group_records.address,
            values=self.values.address,
            num_groups=len(self.groups),
            scalars=self.scalars.address,
            found_inf=self.found_inf.address if found_inf else 0,
            grad_scale=self.grad_scale.address if grad_scale else 0,
            norm=self.norm.address if norm else 0,
            chunk_sums=self.chunk_sums.address,
            history=self.history.address if self.history_rows.size else 0,
            seed=self.seed,
            norm_is_reduced=norm_is_reduced,
            tick=tick,
            device=device,
            num_threads=num_threads,
        )
