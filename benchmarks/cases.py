"""What is measured: storage formats, sizes, models, groups; each a `Case`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatch

import torch

from . import shapes
from .shapes import Shape

#: Elements of a case that has to come from memory.
FROM_MEMORY = {"cpu": 16_800_000, "cuda": 1 << 28}
LARGEST = {"cpu": 1 << 24, "cuda": 1 << 30}
IN_CACHE = 1 << 16  # 1 MB of fp32 parameters, gradients and moments


@dataclass(frozen=True)
class Formats:
    """How a parameter, its master and its moments are stored."""

    name: str
    dtype: torch.dtype
    master: str
    moments: str


def _ladder() -> Iterator[Formats]:
    fp32, bf16 = torch.float32, torch.bfloat16
    yield Formats("fp32", fp32, "auto", "fp32")
    yield Formats("param32_bf16", fp32, "auto", "bf16")
    yield Formats("param32_8bit", fp32, "auto", "8bit")
    for master in ("fp32", "split16", "split8", "stochastic", "none"):
        for moments in ("fp32", "bf16", "8bit"):
            yield Formats(f"{master}_{moments}", bf16, master, moments)
    yield Formats("fp16_fp32_fp32", torch.float16, "fp32", "fp32")


#: By name: `master_moments` of bfloat16 parameters; fp32 ones are `fp32`, `param32_bf16` and `param32_8bit`.
LADDER = {formats.name: formats for formats in _ladder()}


@dataclass(frozen=True)
class Case:
    """One line of work, which several optimizers do in alternation."""

    suite: str
    name: str
    formats: Formats
    shapes: Sequence[Shape]
    peers: tuple[str, ...] = ("torch fused",)  # beside fused_sched
    num_groups: int = 1
    clips: bool = False
    schedules: bool = False  # the peers' rate, too, by a LambdaLR; ours always is
    moves_grads: bool = False  # every step finds its gradients elsewhere
    replays: bool = False  # a CUDA graph of the step
    num_threads: int | None = None
    burst: int = 1  # steps per sample, of those that take microseconds

    @property
    def key(self) -> str:
        return f"{self.suite}/{self.name}"

    @property
    def numel(self) -> int:
        return shapes.elements(list(self.shapes))


FP32_PEERS = (
    *("torch fused", "torch foreach", "torch for-loop"),
    *("DeepSpeed CPUAdam", "DeepSpeed FusedAdam", "apex FusedAdam", "TransformerEngine FusedAdam"),
)
LOW_BIT_PEERS = ("torch fused", "torchao 8-bit", "bitsandbytes 8-bit", "flashoptim")
BF16_PEERS = ("torch fused", "torch fused, bf16", "DeepSpeed CPUAdam, bf16")


def all_cases(device: str, num_elements: int | None = None) -> list[Case]:
    """Every case for a type of device; `num_elements`: of those from memory, and about the most of any."""
    from_memory = num_elements or FROM_MEMORY[device]
    largest = num_elements or LARGEST[device]
    return [
        *_formats(from_memory),
        *_tails(from_memory),
        *_in_cache(device),
        *_models(largest, num_elements is not None),
        *_many_tensors(device, from_memory),
        *_sizes(largest),
    ]


def select(cases: Sequence[Case], patterns: str) -> list[Case]:
    """Those whose suite or key matches one of the patterns, comma-separated: "formats,tail/*8bit".

    Raises ValueError for a pattern that nothing matches.
    """
    chosen: list[Case] = []
    for pattern in patterns.split(","):
        found = [case for case in cases if fnmatch(case.key, pattern) or case.suite == pattern]
        if not found:
            suites = ", ".join(dict.fromkeys(case.suite for case in cases))
            raise ValueError(f"no case is called {pattern!r}; suites are {suites}")
        chosen += [case for case in found if case not in chosen]
    return chosen


def _formats(numel: int) -> Iterator[Case]:
    special = {"fp32": FP32_PEERS, "none_fp32": BF16_PEERS, "none_8bit": LOW_BIT_PEERS, "split8_8bit": LOW_BIT_PEERS}
    for name, formats in LADDER.items():
        yield Case("formats", name, formats, shapes.flat(numel), special.get(name, ("torch fused",)))


def _tails(numel: int) -> Iterator[Case]:
    """Clipping by the global norm, step and schedule: what follows the backward pass."""
    for name in ("fp32", "split16_fp32", "split16_bf16", "split8_8bit"):
        yield Case("tail", name, LADDER[name], shapes.flat(numel), clips=True, schedules=True)


def _in_cache(device: str) -> Iterator[Case]:
    case = Case("cache", "step", LADDER["fp32"], shapes.flat(IN_CACHE), ("torch fused", "DeepSpeed CPUAdam"), burst=20)
    if device == "cpu":
        case = replace(case, num_threads=1)
    yield case
    kernels = ("fused_sched.ops", "fused_sched.ops, prepared", "torch kernel")
    yield replace(case, name="kernel alone", peers=kernels)
    yield replace(case, name="clip and step", clips=True)


def _models(largest: int, small: bool) -> Iterator[Case]:
    shrink, llama = shapes.shrunk_llama(max(largest, 1 << 25))
    models = {"ResNet-50": shapes.resnet50(), "GPT-2 124M": shapes.gpt2(), f"Llama 3 8B / {shrink}": llama}
    peers = ("torch fused", "DeepSpeed CPUAdam", "DeepSpeed FusedAdam", "apex FusedAdam")
    for name, model in models.items():
        if small and model is not llama:
            continue
        case = Case("models", f"{name} fp32", LADDER["fp32"], model, peers, clips=True, schedules=True)
        yield case
        yield replace(case, name=f"{name} split16_bf16", formats=LADDER["split16_bf16"], peers=("torch fused",))


def _many_tensors(device: str, from_memory: int) -> Iterator[Case]:
    fp32 = LADDER["fp32"]
    small = shapes.even(300, 64)
    # A loop over 300 tensors is thousands of launches, more than a GPU's queue holds: the time would be the host's.
    loop = ("torch for-loop",) if device == "cpu" else ()
    yield Case("host", "300 tensors", fp32, small, ("torch fused", "torch foreach", *loop))
    yield Case("host", "300 tensors with moved gradients", fp32, small, moves_grads=True)
    yield Case("host", "300 tensors clip and step", fp32, small, clips=True)
    yield Case("host", "1000 tensors", fp32, shapes.even(1000, 64))
    tail = Case("host", "1000 tensors tail", fp32, shapes.even(1000, 64), clips=True, schedules=True)
    if device == "cpu":
        # Thirty steps a sample: after another's step nothing of ours is in the caches. One thread: it is the host's
        # time. On a GPU torch's thirty would be more launches than its queue holds.
        tail = replace(tail, burst=30, num_threads=1)
    yield tail
    for num_groups in (1, 16, 465):
        yield Case("groups", f"{num_groups} of 465 tensors", fp32, shapes.even(465, 64), num_groups=num_groups)
    yield Case("tensors", "3000 of the size of one", fp32, shapes.even(3000, from_memory // 3000))
    if device == "cuda":
        yield Case("graph", "300 tensors", fp32, small, replays=True)
        yield Case("graph", "from memory", fp32, shapes.flat(from_memory), replays=True)
        yield Case("graph", "clip and step", fp32, shapes.flat(from_memory), clips=True, replays=True)


def _sizes(largest: int) -> Iterator[Case]:
    for name in ("fp32", "split16_bf16"):
        for exponent in range(10, largest.bit_length(), 2):
            numel = 1 << exponent
            burst = max(1, min(20, (1 << 18) // numel))
            yield Case("sizes", f"{name} 2^{exponent}", LADDER[name], shapes.flat(numel), burst=burst)
