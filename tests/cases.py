"""One table of cases that drives the properties common to all backends, and what is needed to run one.

A case is plain data: groups of tensors and the options of the optimizer, schedules said twice (once in the
package's words, once as a plain function for the oracle). Adding a case is adding a row to `CASES`.
"""

from __future__ import annotations

import io
import math
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from oracle import Array, Options, Oracle, decode_codes

from fused_sched import FusedScheduledAdam, schedules

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}
NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class TwoWords:
    """A schedule in the package's words and as a function of the update index."""

    build: Callable[[], schedules.Schedule]
    function: Callable[[int], float]


def _warmup_cosine(index: int) -> float:
    if index < 2:
        return 1e-2 * (index + 1) / 2
    progress = min((index - 2) / 6, 1.0)
    return 1e-3 + (1e-2 - 1e-3) * 0.5 * (1.0 + math.cos(math.pi * progress))


LR = TwoWords(
    lambda: schedules.warmup_cosine(1e-2, warmup_steps=2, total_steps=8, end=1e-3),
    _warmup_cosine,
)
LR_STAIRS = TwoWords(lambda: schedules.step_decay(4e-2, 0.5, 2), lambda index: 4e-2 * 0.5 ** (index // 2))
BETA1 = TwoWords(lambda: schedules.linear(0.95, 0.85, 5), lambda index: 0.95 - 0.10 * min(index / 5, 1.0))
BETA2 = TwoWords(lambda: schedules.linear(0.9, 0.999, 6), lambda index: 0.9 + 0.099 * min(index / 6, 1.0))
BETA_LOW = TwoWords(lambda: schedules.linear(0.2, 0.8, 4), lambda index: 0.2 + 0.6 * min(index / 4, 1.0))
DECAY = TwoWords(lambda: schedules.linear(0.0, 0.2, 4), lambda index: 0.2 * min(index / 4, 1.0))


@dataclass(frozen=True)
class Tensors:
    """Parameters of one kind, one for each shape."""

    shapes: tuple[tuple[int, ...], ...]
    dtype: str = "fp32"
    grad_dtype: str | None = None


@dataclass(frozen=True)
class Case:
    name: str
    groups: tuple[tuple[tuple[Tensors, ...], dict[str, Any]], ...]
    options: dict[str, Any] = field(default_factory=dict)
    # Gradients of update i are scaled by 10^spread[i % len(spread)].
    spread: tuple[float, ...] = (0.0,)

    def __str__(self) -> str:
        return self.name


SHAPES: tuple[tuple[int, ...], ...] = ((1,), (7,), (3, 11), (257,), (2, 3, 5), ())
PLAIN = (Tensors(SHAPES),)
ALL_DTYPES = tuple(Tensors(((5,), (4, 9)), dtype) for dtype in DTYPES)
MIXED_GRADS = tuple(
    Tensors(((65,),), dtype, grad_dtype) for dtype in DTYPES for grad_dtype in DTYPES if dtype != grad_dtype
)


def one_group(name: str, tensors: tuple[Tensors, ...] = PLAIN, **options: Any) -> Case:
    return Case(name, ((tensors, {}),), options)


CASES: tuple[Case, ...] = (
    one_group("defaults"),
    one_group("decoupled_decay", lr=1e-2, weight_decay=0.1),
    one_group("l2_decay", lr=1e-2, weight_decay=0.1, decoupled_weight_decay=False),
    one_group("amsgrad", lr=1e-2, amsgrad=True, betas=(0.9, 0.5)),
    one_group("maximize", lr=1e-2, maximize=True, weight_decay=0.1),
    one_group("maximize_l2_amsgrad", maximize=True, weight_decay=0.1, decoupled_weight_decay=False, amsgrad=True),
    one_group("small_betas", lr=1e-2, betas=(0.0, 0.3)),
    one_group("zero_betas", lr=1e-2, betas=(0.0, 0.0)),
    one_group("zero_eps", eps=0.0),
    one_group("large_eps", eps=1e-3),
    one_group("zero_lr", lr=0.0, weight_decay=0.1),
    one_group("grad_divisor", lr=1e-2, grad_divisor=3.0),
    replace(one_group("gradients_of_all_sizes"), spread=(-9.0, 6.0, 0.0, 9.0)),
    one_group("scheduled_lr", lr=LR, weight_decay=0.1),
    one_group("scheduled_betas", lr=1e-2, betas=(BETA1, BETA2)),
    one_group("scheduled_through_half", lr=1e-2, betas=(BETA_LOW, BETA_LOW)),
    one_group("scheduled_weight_decay", lr=1e-2, weight_decay=DECAY),
    one_group("scheduled_l2", lr=LR, weight_decay=DECAY, decoupled_weight_decay=False),
    one_group("all_scheduled", lr=LR, betas=(BETA1, BETA2), weight_decay=DECAY, amsgrad=True),
    Case(
        "groups_of_their_own",
        (
            (PLAIN, {"lr": LR}),
            (PLAIN, {"lr": LR_STAIRS, "weight_decay": 0.0, "betas": (0.5, 0.9)}),
            (
                (Tensors(((33,),), "fp64"), Tensors(((9,),))),
                {"decoupled_weight_decay": False, "amsgrad": True},
            ),
            ((Tensors(((300,),)),), {"maximize": True, "eps": 1e-5, "betas": (BETA1, 0.99)}),
        ),
        {"lr": 3e-3, "weight_decay": 0.05},
    ),
    one_group("fp64", (Tensors(SHAPES, "fp64"),), lr=LR, weight_decay=DECAY),
    one_group(
        "fp64_l2_amsgrad",
        (Tensors(SHAPES, "fp64"),),
        amsgrad=True,
        weight_decay=0.1,
        decoupled_weight_decay=False,
    ),
    one_group("bf16_with_master", (Tensors(SHAPES, "bf16"),), lr=LR, weight_decay=0.1, master="fp32"),
    one_group(
        "bf16_master_l2",
        (Tensors(SHAPES, "bf16"),),
        weight_decay=0.1,
        decoupled_weight_decay=False,
        master="fp32",
    ),
    one_group("bf16_without_master", (Tensors(SHAPES, "bf16"),), lr=LR, weight_decay=0.1, master="none"),
    one_group("fp16_with_master", (Tensors(SHAPES, "fp16"),), lr=LR, amsgrad=True, master="fp32"),
    one_group("fp16_without_master", (Tensors(SHAPES, "fp16"),), lr=LR, master="none"),
    one_group("bf16_split", (Tensors(SHAPES, "bf16"),), lr=LR, weight_decay=DECAY, amsgrad=True, master="split16"),
    one_group("all_dtypes_by_default", ALL_DTYPES, lr=LR, weight_decay=0.1),
    one_group("all_dtypes_in_a_group", ALL_DTYPES, lr=LR, weight_decay=0.1, master="fp32"),
    one_group("all_dtypes_without_master", ALL_DTYPES, lr=LR, weight_decay=0.1, master="none"),
    one_group("gradients_of_another_dtype", MIXED_GRADS, lr=LR, weight_decay=0.1, master="fp32"),
    one_group("gradients_of_another_dtype_without_master", MIXED_GRADS, lr=LR, amsgrad=True, master="none"),
)


# Compressed state, which the oracle knows nothing of: its formats' error bounds are test_codec.py's, and what all
# backends make of it must be the same bits.
LADDER = (1, 15, 16, 17, 33, 257)
COMPRESSED: tuple[Case, ...] = tuple(
    one_group(
        f"{dtype}_{master}_{moments}",
        (Tensors(((9,),)), Tensors(tuple((n,) for n in LADDER), dtype), Tensors(((3, 11), ()), dtype, grad_dtype)),
        lr=LR,
        weight_decay=0.1,
        master=master,
        moments=moments,
        seed=7,
    )
    for dtype, masters, grad_dtype in (
        ("bf16", ("none", "fp32", "split16", "split8", "stochastic"), "fp32"),
        ("fp16", ("none", "fp32"), "bf16"),
        ("fp32", ("none",), "fp16"),
    )
    for master in masters
    for moments in ("fp32", "bf16", "8bit")
    if moments != "fp32" or master in ("split16", "split8", "stochastic")
)


def by_name(name: str) -> Case:
    return next(case for case in (*CASES, *COMPRESSED) if case.name == name)


def values_of(tensor: torch.Tensor) -> Array:
    """A tensor's values in float64, 16-bit ones through the oracle's own decoding."""
    tensor = tensor.detach().cpu().contiguous()
    if tensor.dtype in (torch.bfloat16, torch.float16):
        codes = tensor.view(torch.int16).numpy()
        return decode_codes(codes, NAMES[tensor.dtype])
    return tensor.numpy().astype(np.float64)


def set_grad(param: torch.Tensor, grad: torch.Tensor) -> None:
    """Hands over a gradient, of another dtype by the two ways the package documents."""
    if grad.dtype == param.dtype:
        param.grad = grad
    elif hasattr(param, "grad_dtype"):
        param.grad_dtype = grad.dtype
        param.grad = grad
    else:
        param.main_grad = grad  # type: ignore[attr-defined]


def grad_of(param: torch.Tensor) -> torch.Tensor:
    grad = param.grad if param.grad is not None else param.main_grad  # type: ignore[attr-defined]
    assert isinstance(grad, torch.Tensor)
    return grad


def _in_package_words(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(_in_package_words(item) for item in value)
    return value.build() if isinstance(value, TwoWords) else value


def _in_oracle_words(options: dict[str, Any]) -> Options:
    def function(value: Any) -> Any:
        return value.function if isinstance(value, TwoWords) else value

    renamed = {
        key: function(value) for key, value in options.items() if key not in ("betas", "master", "moments", "seed")
    }
    if "betas" in options:
        renamed["beta1"], renamed["beta2"] = map(function, options["betas"])
    if "decoupled_weight_decay" in renamed:
        renamed["decoupled"] = renamed.pop("decoupled_weight_decay")
    return Options(**renamed)


class Problem:
    """A case's parameters, its gradients and its oracles. Equal numbers each time one is made."""

    def __init__(self, case: Case, device: torch.device | str = "cpu") -> None:
        self.case = case
        self.rng = np.random.default_rng(zlib.crc32(case.name.encode()))
        self.device = device
        self.groups: list[dict[str, Any]] = []
        self.params: list[torch.Tensor] = []
        self.oracles: list[Oracle] = []
        self._grad_dtypes: list[torch.dtype] = []
        self.updates = 0
        for tensors, overrides in case.groups:
            options = {**case.options, **overrides}
            group: list[torch.Tensor] = []
            for kind in tensors:
                for shape in kind.shapes:
                    values = torch.from_numpy(np.asarray(self.rng.standard_normal(shape))).to(DTYPES[kind.dtype])
                    param = torch.nn.Parameter(values.to(device))
                    has_master = kind.dtype in ("bf16", "fp16") and options.get("master", "auto") != "none"
                    group.append(param)
                    oracle = Oracle(values_of(param), _in_oracle_words(options), kind.dtype, has_master)
                    self.oracles.append(oracle)
                    self._grad_dtypes.append(DTYPES[kind.grad_dtype or kind.dtype])
            self.params += group
            self.groups.append({"params": group, **{k: _in_package_words(v) for k, v in overrides.items()}})

    def optimizer(self, backend: str) -> FusedScheduledAdam:
        options = {key: _in_package_words(value) for key, value in self.case.options.items()}
        return FusedScheduledAdam(self.groups, backend=backend, **options)

    def set_grads(self) -> None:
        """The next update's gradients."""
        scale = 10.0 ** self.case.spread[self.updates % len(self.case.spread)]
        self.updates += 1
        for param, dtype in zip(self.params, self._grad_dtypes, strict=True):
            values = np.asarray(self.rng.standard_normal(tuple(param.shape)) * scale)
            set_grad(param, torch.from_numpy(values).to(dtype).to(self.device))

    def run(self, optimizer: torch.optim.Optimizer, updates: int) -> None:
        for _ in range(updates):
            self.set_grads()
            optimizer.step()

    def run_oracles(self) -> None:
        """Updates the oracles with the gradients that are set now."""
        for param, oracle in zip(self.params, self.oracles, strict=True):
            oracle.update(values_of(grad_of(param)), index=self.updates - 1)


def construct_and_step(params: list[torch.Tensor], backend: str = "auto") -> None:
    """Where parameters are refused, when constructed or when stepped, is left open."""
    optimizer = FusedScheduledAdam(params, backend=backend)
    for param in params:
        if param.is_floating_point() or param.is_complex():
            param.grad = torch.ones_like(param)
    optimizer.step()


def state_tensors(optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, torch.Tensor]]:
    """Every parameter and every tensor of its state, named by position."""
    position = 0
    for group in optimizer.param_groups:
        for param in group["params"]:
            yield f"{position}.param", param.detach()
            for key, value in sorted(optimizer.state[param].items() if param in optimizer.state else ()):
                if isinstance(value, torch.Tensor):
                    yield f"{position}.{key}", value
            position += 1


def snapshot(optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone().cpu() for name, tensor in state_tensors(optimizer)}


def through_a_file(value: Any) -> Any:
    """What a checkpoint is after it was saved and loaded."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal bit for bit, any NaN being equal to any NaN; -0 and 0 differ."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    a, b = a.detach().cpu().contiguous(), b.detach().cpu().contiguous()
    integers = _INTEGERS[a.element_size()]
    equal = a.view(integers) == b.view(integers)
    if a.dtype.is_floating_point:
        equal = equal | (a.isnan() & b.isnan())
    return bool(equal.all())


def assert_same(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert actual.keys() == expected.keys()
    different = [name for name in expected if not same_bits(actual[name], expected[name])]
    assert not different, f"{len(different)} of {len(expected)} tensors differ, first {different[0]}: " + (
        f"{actual[different[0]]} and {expected[different[0]]}"
    )
