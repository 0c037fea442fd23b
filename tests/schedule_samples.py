"""One sensible example of every registered schedule, by its word: for docs/schedules.md and for completeness tests."""

from __future__ import annotations

import math
import warnings

from fused_sched import schedules
from fused_sched._warnings import ScheduleWarning
from fused_sched.schedules import Schedule

NAMES = {name: getattr(schedules, name) for name in schedules.__all__} | {"math": math}

#: Word: expression.
HOUSE = {
    # Curves.
    "constant": "constant(1e-3)",
    "linear": "linear(1e-3, 1e-4, steps=300)",
    "cosine": "cosine(1e-3, 1e-4, steps=300)",
    "polynomial": "polynomial(1e-3, 0.0, steps=300, power=2.0)",
    "exponential": "exponential(1e-3, 0.5, steps=100)",
    "inverse_sqrt": "inverse_sqrt(1e-3, warmup_steps=40)",
    "step_decay": "step_decay(1e-3, 0.5, every=100)",
    "table": "table([1e-3, 8e-4, 9e-4, 5e-4, 6e-4, 2e-4, 3e-4, 1e-4])",
    # Combinations.
    "join": "join([linear(0.0, 1e-3, 50), constant(1e-3), cosine(1e-3, 0.0, 150)], [50, 150])",
    "product": "linear(1e-3, 0.0, 300) * cosine(1.0, 0.3, 50).repeat(50)",
    "scaled": "cosine(1e-3, 1e-4, steps=300).scaled(0.5)",
    "shifted": "cosine(1e-3, 1e-4, steps=200).shifted(100)",
    "repeat": "cosine(1e-3, 1e-4, steps=100).repeat(100)",
    "companion": "deepspeed.OneCycle(1e-4, 1e-3, cycle_first_step_size=150).companions['beta1']",
    # Recipes.
    "warmup_linear": "warmup_linear(1e-3, warmup_steps=40, total_steps=400)",
    "warmup_cosine": "warmup_cosine(1e-3, warmup_steps=40, total_steps=400, end=1e-4)",
    "warmup_stable_decay": "warmup_stable_decay(1e-3, warmup_steps=40, total_steps=400, decay_steps=100)",
    "one_cycle": "one_cycle(1e-3, total_steps=400)",
}

#: Library: name: arguments.
LIBRARIES = {
    "deepspeed": {
        "LRRangeTest": "1e-4, 50, 2.0, lr_range_test_staircase=True",
        "OneCycle": "1e-4, 1e-3, 0.1, 100, decay_step_size=20",
        "WarmupLR": "0.0, 1e-3, 100",
        "WarmupDecayLR": "400, 0.0, 1e-3, 100",
        "WarmupCosineLR": "400, warmup_num_steps=50, warmup_type='linear', base_lr=1e-3",
    },
    "torch": {
        "LambdaLR": "lambda t: 1 / (1 + t / 50), base_lr=1e-3, num_steps=300",
        "MultiplicativeLR": "lambda t: 0.99, base_lr=1e-3, num_steps=300",
        "StepLR": "100, 0.5, base_lr=1e-3",
        "MultiStepLR": "[100, 250, 350], 0.5, base_lr=1e-3",
        "ConstantLR": "0.25, 100, base_lr=1e-3",
        "LinearLR": "0.1, 1.0, 100, base_lr=1e-3",
        "ExponentialLR": "0.99, base_lr=1e-3",
        "PolynomialLR": "300, 2.0, base_lr=1e-3",
        "CosineAnnealingLR": "300, 1e-4, base_lr=1e-3",
        "CosineAnnealingWarmRestarts": "50, 2, 1e-4, base_lr=1e-3",
        "CyclicLR": "1e-4, 1e-3, 50, mode='triangular2'",
        "OneCycleLR": "1e-3, 400",
        "ReduceLROnPlateau": "factor=0.5, patience=3, base_lr=1e-3",
        "SequentialLR": "[torch.LinearLR(0.1, 1.0, 50, base_lr=0.1), torch.CosineAnnealingLR(250, base_lr=0.1)], [50]",
        "ChainedScheduler": "[torch.LinearLR(0.1, 1.0, 50, base_lr=1e-3), torch.ExponentialLR(0.99, base_lr=1e-3)]",
        "Resumed": "torch.OneCycleLR(1e-3, 400), 100",
    },
    "transformers": {
        "get_constant_schedule": "base_lr=1e-3",
        "get_constant_schedule_with_warmup": "100, base_lr=1e-3",
        "get_linear_schedule_with_warmup": "50, 400, base_lr=1e-3",
        "get_cosine_schedule_with_warmup": "50, 400, base_lr=1e-3",
        "get_cosine_with_hard_restarts_schedule_with_warmup": "50, 400, 3, base_lr=1e-3",
        "get_cosine_with_min_lr_schedule_with_warmup": "50, 400, min_lr=1e-4, base_lr=1e-3",
        "get_cosine_with_min_lr_schedule_with_warmup_lr_rate": "50, 400, min_lr=1e-4, warmup_lr_rate=0.2, base_lr=1e-3",
        "get_polynomial_decay_schedule_with_warmup": "50, 400, 1e-4, 2.0, base_lr=1e-3",
        "get_inverse_sqrt_schedule": "40, base_lr=1e-3",
        "get_wsd_schedule": "50, 100, 400, decay_type='1-sqrt', base_lr=1e-3",
        "GreedyLR": "factor=0.5, patience=3, base_lr=0.01",
    },
    "optax": {
        "constant_schedule": "1e-3",
        "linear_schedule": "1e-3, 1e-4, 300",
        "polynomial_schedule": "1e-3, 1e-4, 2.0, 250, 50",
        "exponential_decay": "1e-3, 100, 0.5, staircase=True, end_value=2e-4",
        "cosine_decay_schedule": "1e-3, 300, alpha=0.1",
        "warmup_constant_schedule": "0.0, 1e-3, 100",
        "warmup_cosine_decay_schedule": "0.0, 1e-3, 50, 400, 1e-4",
        "warmup_exponential_decay_schedule": "0.0, 1e-3, 50, 100, 0.5, end_value=1e-4",
        "join_schedules": "[optax.linear_schedule(0.0, 1e-3, 50), optax.cosine_decay_schedule(1e-3, 250)], [50]",
        "sgdr_schedule": "[dict(init_value=0.0, peak_value=v, warmup_steps=20, decay_steps=100) for v in (4, 3, 2)]",
        "piecewise_constant_schedule": "1e-3, {100: 0.5, 200: 0.5, 300: 0.2}",
        "piecewise_interpolate_schedule": "'cosine', 2e-4, {100: 5.0, 250: 0.5, 350: 0.2}",
        "linear_onecycle_schedule": "400, 1e-3",
        "cosine_onecycle_schedule": "400, 1e-3",
    },
    "megatron": {
        "OptimizerParamScheduler": "0.0, 1e-3, 1e-4, 40, 400, 'WSD', 0.01, 0.1, 400, 'linear', wsd_decay_steps=100, "
        "lr_wsd_decay_style='minus_sqrt'",
    },
    "timm": {
        "CosineLRScheduler": "10, 1e-5, 1.0, 0.5, 3, 3, 1e-5, True, base_lr=1e-3, updates_per_epoch=12",
        "TanhLRScheduler": "30, -5.0, 3.0, 1e-5, warmup_t=3, base_lr=1e-3, updates_per_epoch=12",
        "PolyLRScheduler": "30, 2.0, 1e-5, warmup_t=3, warmup_prefix=True, base_lr=1e-3, updates_per_epoch=12",
        "StepLRScheduler": "8, 0.5, warmup_t=3, base_lr=1e-3, updates_per_epoch=12",
        "MultiStepLRScheduler": "[10, 20, 25], 0.5, warmup_t=3, base_lr=1e-3, updates_per_epoch=12",
        "WSDLRScheduler": "30, 10, 1e-5, warmup_t=3, base_lr=1e-3, updates_per_epoch=12",
    },
}

SAMPLES = HOUSE | {
    f"{library}.{name}": f"{library}.{name}({arguments})"
    for library, samples in LIBRARIES.items()
    for name, arguments in samples.items()
}


def words() -> dict[str, type[Schedule]]:
    """All registered schedules but those that only others are made of."""
    return {word: cls for word, cls in Schedule._words.items() if not cls.__name__.startswith("_")}


def evaluated(expression: str) -> Schedule:
    """The schedule of an expression in the words of `fused_sched.schedules`, without a warning of what is odd."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ScheduleWarning)
        return eval(expression, dict(NAMES))
