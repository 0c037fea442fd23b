"""Schedules of torch.optim.lr_scheduler under their own names, and the conversion of a live scheduler.

>>> from fused_sched import schedules
>>> schedules.torch.StepLR(30, base_lr=0.5)([0, 30]).tolist()
[0.5, 0.05]
"""

from ..metric import ReduceLROnPlateau
from .base import TorchSchedule
from .composition import ChainedScheduler, SequentialLR
from .conversion import Resumed, from_scheduler
from .cycles import CosineAnnealingLR, CosineAnnealingWarmRestarts, CyclicLR
from .decay import ConstantLR, ExponentialLR, LinearLR, MultiStepLR, PolynomialLR, StepLR
from .functions import LambdaLR, MultiplicativeLR
from .one_cycle import OneCycleLR

__all__ = [
    "ChainedScheduler",
    "ConstantLR",
    "CosineAnnealingLR",
    "CosineAnnealingWarmRestarts",
    "CyclicLR",
    "ExponentialLR",
    "LambdaLR",
    "LinearLR",
    "MultiStepLR",
    "MultiplicativeLR",
    "OneCycleLR",
    "PolynomialLR",
    "ReduceLROnPlateau",
    "Resumed",
    "SequentialLR",
    "StepLR",
    "TorchSchedule",
    "from_scheduler",
]
