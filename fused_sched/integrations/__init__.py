"""What frameworks need beyond a torch optimizer; each module here imports its framework, and nothing imports them."""

from __future__ import annotations

from typing import Any

from ..optimizer import FusedScheduledAdam


def unwrapped(optimizer: Any) -> FusedScheduledAdam | None:
    """The FusedScheduledAdam inside a framework's wrappers; None if there is another optimizer in them.

    >>> import torch
    >>> from fused_sched import FusedScheduledAdam
    >>> from fused_sched.integrations import unwrapped
    >>> unwrapped(torch.optim.SGD([torch.zeros(2, requires_grad=True)])) is None
    True
    """
    while optimizer is not None and not isinstance(optimizer, FusedScheduledAdam):
        optimizer = getattr(optimizer, "optimizer", None)
    return optimizer
