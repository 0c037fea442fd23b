"""Every combination of formats that the backends have code for, and groups that take every branch of the update."""

from __future__ import annotations

from itertools import product

from . import abi
from .memory import GroupSpec, TensorSpec

Instance = tuple[str, str, str, str, bool]  # param, grad, master, moments, amsgrad

MASTERS = {"fp32": ["none"], "fp16": ["none", "fp32"], "bf16": ["none", "fp32", "split16", "split8", "stochastic"]}
MOMENTS = [("fp32", False), ("fp32", True), ("bf16", False), ("8bit", False)]
#: Gradients of every format go with every parameter.
CPU_INSTANCES: list[Instance] = [
    *(
        (param, grad, master, *moments)
        for param, masters in MASTERS.items()
        for grad, master, moments in product(abi.FORMATS, masters, MOMENTS)
    ),
    *(("fp64", grad, "none", "fp32", amsgrad) for grad, amsgrad in product(abi.FORMATS, (False, True))),
]
#: fp64 goes with fp64 alone. The gradient's format is looked up when a kernel runs.
CUDA_INSTANCES = [instance for instance in CPU_INSTANCES if (instance[0] == "fp64") == (instance[1] == "fp64")]


def instance_id(instance: Instance) -> str:
    param, grad, master, moments, amsgrad = instance
    return f"{param}-{grad}-{master}-{moments}" + ("-amsgrad" if amsgrad else "")


GROUPS = [
    GroupSpec(lr=1e-2, weight_decay=0.1),
    GroupSpec(lr=1e-2, weight_decay=0.1, flags=abi.GROUP_MAXIMIZE, grad_divisor=4.0),  # L2
    GroupSpec(lr=1e-3, beta1=0.3, beta2=0.4, weight_decay=0.0),
    GroupSpec(lr=1e-2, beta1=0.0, eps=0.0),
]


def mixed_specs() -> list[TensorSpec]:
    """Every gradient format; sizes around warps, vectors and chunks; some misaligned, some empty."""
    sizes = [0, 1, 7, 31, 32, 33, 127, 128, 129, 255, 256, 257, 4095, 4096, 4097, 9000]
    specs = []
    for index, (numel, grad) in enumerate((n, f) for n in sizes for f in abi.FORMATS):
        param = "fp64" if grad == "fp64" else "fp32"
        specs.append(TensorSpec(numel, param, grad, grad_misalignment=index % 5, arena=int(param == "fp64")))
    return specs
