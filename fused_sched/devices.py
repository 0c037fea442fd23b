"""All devices of one optimizer: which engine runs which parameters, and one clock over them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from . import arena, backends, norm, packing
from . import state as states
from .engine import CompiledEngine, Engine, is_capturing
from .history import Recorder
from .hyperparameters import GroupSettings
from .norm import NormSettings
from .packing import Work
from .reference import ReferenceEngine
from .steady import SteadyCall


class Call(NamedTuple):
    """What one call of step() updates: parameters, their gradients, the index of each one's group, and its place
    among all parameters of the groups.

    The owners are what the groups hold and the state is kept for. Where one is a DTensor, the parameter is its shard.
    """

    owners: list[torch.Tensor]
    params: list[torch.Tensor]
    grads: list[torch.Tensor]
    groups: list[int]
    ordinals: list[int]


class Devices:
    """Engines by device, and the call they are prepared for."""

    def __init__(self, backend: str, clock: int, seed: int) -> None:
        backends.check_name(backend)
        self.backend = backend
        self._seed = seed
        self.engines: dict[torch.device, Engine] = {}
        self._uses_cuda = False
        self.recorder = Recorder()
        self.norm_settings = NormSettings()
        self._initial_clock = clock
        self._mirror = clock  # T as the host knows it
        self._mirror_is_exact = True  # false while only the device knows: steps that may skip, captured graphs
        self._captured = False  # replays move the clock without telling the host
        self._last_index: int | None = None  # of the clock, in the latest step
        self._checked_places: list[tuple[Any, ...]] = []  # of parameters known not to overlap
        self._prepared_for: tuple[Any, ...] | None = None
        self._prepared_options: list[tuple[Any, ...]] = []
        self._prepared_memory: object = None  # of the state
        self._routes: list[tuple[Engine, list[int]]] = []
        self._steady: SteadyCall | None = None  # the prepared call, where the compiled pass can watch it

    def engine(self, device: torch.device) -> Engine:
        """The engine of a device, made when first needed, with the others' clock."""
        engine = self.engines.get(device)
        if engine is None:
            backend = backends.select(self.backend, device)
            engine_type = ReferenceEngine if backend.module is None else CompiledEngine
            engine = engine_type(backend, device, self._seed)
            engine.write_clock(self.read_clock())
            self.engines[device] = engine
            self._uses_cuda |= device.type == "cuda"
        return engine

    @property
    def first(self) -> Engine | None:
        return next(iter(self.engines.values()), None)

    def _is_prepared(self, state: states.StateMap, options: Sequence[Mapping[str, Any]] | None) -> bool:
        """Whether the tables still hold for this state and, if given, these options."""
        if state.changed or state.memory is not self._prepared_memory:
            return False
        return options is None or _layout_options(options) == self._prepared_options

    def steady_call(
        self, state: states.StateMap, groups: Sequence[dict[str, Any]], options: Sequence[Mapping[str, Any]] | None
    ) -> SteadyCall | None:
        """The prepared call, prepared again, if one with these groups repeats it; None: look closely.

        options: of all groups; None: those of the last step.
        """
        steady = self._steady
        if steady is None or not self._is_prepared(state, options):
            return None
        if state.shown:
            steady.add_state(state.take_shown())
        return steady if steady.repeats(groups) else None

    def rebind(self, state: states.StateMap, call: Call, options: Sequence[Mapping[str, Any]]) -> bool:
        """Prepare for a call like the last one; False if its tensors must be laid out anew."""
        if _key(call) != self._prepared_for or not self._is_prepared(state, options):
            return False
        return all(engine.rebind([call.grads[i] for i in indices]) for engine, indices in self._routes)

    def watch(self, state: states.StateMap, call: Call, groups: Sequence[dict[str, Any]]) -> SteadyCall:
        """Have repeats of the call, for which everything has just been prepared, recognised by the compiled pass."""
        addresses = [0] * sum(len(group["params"]) for group in groups)  # of rows of the tables; 0: no gradient
        # The table is made for these gradients; compiled code may hand over others than the parameters show.
        plain = call.params is call.owners and all(
            packing.gradient_of(p) is g for p, g in zip(call.owners, call.grads, strict=True)
        )
        for engine, indices in self._routes:
            rows = engine.row_addresses
            plain = plain and rows is not None
            for i, address in zip(indices, rows or (), strict=False):
                addresses[call.ordinals[i]] = address
        steady = SteadyCall(call)
        module = next(engine.backend.module for engine, _ in self._routes)
        plain = plain and steady.watch(module, groups, addresses)
        self._steady = steady if plain else None
        if plain:
            state.shown.clear()
            steady.add_state(e for p in call.owners if (e := state.entry_of(p)) is not None and e.shown)
        return steady

    def allocate(self, state: states.StateMap, call: Call, options: Sequence[Mapping[str, Any]]) -> None:
        """Check the tensors of a call, then make their state; nothing has been changed when this raises."""
        self._prepared_for = self._steady = None
        for p, g in zip(call.params, call.grads, strict=True):
            packing.check_work(p, g)
        places = [(p.data_ptr(), p.shape, p.stride(), p.dtype) for p in call.params]
        if places != self._checked_places:
            packing.check_overlap(call.params)
            self._checked_places = places
        layouts = [arena.Layout.of(p, options[i]) for p, i in zip(call.params, call.groups, strict=True)]
        for device in dict.fromkeys(p.device for p in call.params):
            self.engine(device)
        states.ensure(state, call.owners, layouts)
        state.changed = False  # what else was written waits until a call with its parameter lays out anew

    def lay_out(self, state: states.StateMap, call: Call, options: Sequence[Mapping[str, Any]]) -> None:
        """Make state and the engines' tables ready for a call; nothing has been changed when this raises."""
        if any(is_capturing(p.device) for p in call.params):
            raise RuntimeError(
                "this step must prepare memory (its first, or one with other tensors or written state), which the "
                "capture of a CUDA graph does not allow; call step() once with the same tensors before capturing"
            )
        self.allocate(state, call, options)
        self._drop_engines_without_parameters(options)
        assert self.first is not None
        self.recorder.prepare(self.first.device, len(options))
        self.first.recorder = self.recorder
        works = [Work(p, g, group, state[o].entry, ordinal) for o, p, g, group, ordinal in zip(*call, strict=True)]
        self._routes = []
        # Also those without a tensor in this call: their clocks tick with the others.
        for device, engine in self.engines.items():
            indices = [i for i, p in enumerate(call.params) if p.device == device]
            engine.lay_out([works[i] for i in indices])
            self._routes.append((engine, indices))
        self._prepared_for, self._prepared_options = _key(call), _layout_options(options)
        self._prepared_memory = state.memory

    def _drop_engines_without_parameters(self, options: Sequence[Mapping[str, Any]]) -> None:
        """The model moved to another device: what stayed behind would be asked for the clock first."""
        used = {p.device for o in options for p in o["params"]}
        for device in [d for d in self.engines if used and d not in used]:
            self.engines.pop(device).release()

    def push(self, settings: Sequence[GroupSettings], lr_tensors: Sequence[torch.Tensor | None]) -> None:
        for engine in self.engines.values():
            engine.push(settings, lr_tensors)

    def refuse_host_values(self, values: Iterable[tuple[str, object]]) -> None:
        """Raise if one of these values, named, is a tensor on the host and a CUDA graph is captured.

        Nothing keeps its memory for the replays, and newer versions of torch refuse the copy in the middle of the step.
        """
        if not self._uses_cuda:
            return
        for name, value in values:
            if not isinstance(value, torch.Tensor) or value.device.type == "cuda":
                continue
            for device in filter(is_capturing, self.engines):
                raise RuntimeError(
                    f"{name} is a tensor on {value.device}, and the capture of a CUDA graph would record its address "
                    f"for all replays; put one on {device} in its place before capturing and, for a rate, call "
                    "opt.push_hyperparameters()"
                )

    def push_norm(self, settings: NormSettings) -> None:
        for engine in self.engines.values():
            engine.push_norm(settings)
        self.norm_settings = settings

    def step(
        self,
        tick: bool,
        found_inf: torch.Tensor | None,
        grad_scale: torch.Tensor | None,
        norm_reduce_hook: Callable[[torch.Tensor], object] | None = None,
    ) -> None:
        """Apply the prepared call on every device; what the hook raises leaves all values as they were."""
        engines = self.engines.values()
        reduces = self.norm_settings.wanted and (norm_reduce_hook is not None or len(engines) > 1)
        if reduces:
            with torch.no_grad():
                norm.reduce([engine.sum_squares() for engine in engines], norm_reduce_hook)
        for engine in engines:
            engine.step(tick, found_inf, grad_scale, reduces)
        self._mirror += tick
        self._last_index = self._mirror - 1
        if self._uses_cuda:  # elsewhere nothing is captured, and the device itself is asked
            self._captured |= any(map(is_capturing, self.engines))
            may_skip = found_inf is not None or self.norm_settings.skip_nonfinite
            self._mirror_is_exact &= not may_skip and not self._captured

    def report(self, metric: torch.Tensor | float) -> None:
        """Advance every rate that follows metrics, on every device; nothing has been changed when this raises."""
        for device in filter(is_capturing, self.engines):
            if not isinstance(metric, torch.Tensor) or metric.device != device:
                raise RuntimeError(
                    "the capture of a CUDA graph would record the metric's value for all replays; report a tensor on "
                    f"{device} while capturing"
                )
        for engine in self.engines.values():
            engine.report(metric)

    @property
    def captured(self) -> bool:
        """Whether a step was captured in a CUDA graph, which may be replayed."""
        return self._captured

    def forget_graphs(self) -> None:
        """No graph that captured a step will be replayed again."""
        self._captured = False
        self.read_clock()

    def read_clock(self) -> int:
        """T, exact; waits for the first device."""
        if self.first is None:
            return self._initial_clock
        self._mirror, self._mirror_is_exact = self.first.read_clock(), not self._captured
        return self._mirror

    def peek_clock(self) -> int:
        """T without waiting for a CUDA device, unless only the device can know whether a step was skipped."""
        if self._mirror_is_exact and self.first is not None and self.first.device.type == "cuda":
            return self._mirror
        return self.read_clock()

    def write_clock(self, step: int) -> None:
        for engine in self.engines.values():
            engine.write_clock(step)
        self._initial_clock = self._mirror = step
        self._mirror_is_exact = not self._captured

    def used_rates(self, sync: bool, settings: Sequence[GroupSettings]) -> list[float]:
        """The latest step's rate of each group; NaN where there was none, shorter where groups are new.

        settings: of the latest step. Waits for a CUDA device only as `peek_clock` does, or for a rate that only the
        device knows.
        """
        if self.first is None:
            return []
        on_device = sync or self.first.device.type != "cuda" or not self._mirror_is_exact
        if on_device or any(group.lr.only_on_device for group in settings):
            rates: list[float] = self.first.lr_tensor.tolist()
            return rates
        if self._last_index is None:
            return []
        return [group.lr.value(self._last_index, None) for group in settings]

    def forget_rates(self) -> None:
        """A checkpoint was loaded: what was used before it is not its latest step's."""
        self._last_index = None
        for engine in self.engines.values():
            engine.forget_rates()


def _key(call: Call) -> tuple[Any, ...]:
    """What must be equal for a prepared call to serve again; the tensors are looked at apart."""
    shards = [] if call.params is call.owners else [id(p) for p in call.params]
    return [id(p) for p in call.owners], shards, call.groups, call.ordinals


def _layout_options(options: Sequence[Mapping[str, Any]]) -> list[tuple[Any, ...]]:
    """What the state's layout depends on."""
    return [(o["master"], o["moments"], o["amsgrad"]) for o in options]
