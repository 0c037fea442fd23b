"""Warnings of this package, shown at the line outside of it that caused them."""

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar


class ScheduleWarning(UserWarning):
    """A schedule does something its owner may not expect."""


#: Messages of the schedules that are being constructed or set together.
_said: ContextVar[set[str] | None] = ContextVar("said", default=None)


@contextmanager
def each_said_once() -> Iterator[None]:
    """Do not repeat a message: schedules of several groups may be odd in the same way."""
    token = _said.set(set())
    try:
        yield
    finally:
        _said.reset(token)


def warn_schedule(message: str) -> None:
    """Issue a ScheduleWarning on behalf of the nearest caller outside this package."""
    said = _said.get()
    if said is not None:
        if message in said:
            return
        said.add(message)
    level, frame = 1, sys._getframe()
    while frame.f_back is not None and _is_ours(frame.f_globals.get("__name__", "")):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, ScheduleWarning, stacklevel=level)


def _is_ours(module: str) -> bool:
    # The __init__ that dataclasses write has this package's module for its globals. torch's Optimizer.__init__ stands
    # between our constructor and our add_param_group.
    return module == "fused_sched" or module.startswith("fused_sched.") or module == "torch.optim.optimizer"
