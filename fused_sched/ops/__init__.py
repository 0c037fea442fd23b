"""The kernels on tensors of your own: the update, the norm of gradients, the schedule on its device.

For microbenchmarks, and for optimizers that own their parameters' state and want the arithmetic alone. Everything here
is what `FusedScheduledAdam.step` runs, and has its bits.
"""

from .adamw import PreparedAdamW, adamw_
from .norm import grad_norm
from .schedule import evaluate
from .state import StepCounts, state_like

__all__ = ["PreparedAdamW", "StepCounts", "adamw_", "evaluate", "grad_norm", "state_like"]
