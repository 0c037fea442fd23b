"""Warnings of this package, shown at the line outside of it that caused them."""

import sys
import warnings


class ScheduleWarning(UserWarning):
    """A schedule does something its owner may not expect."""


def warn_schedule(message: str) -> None:
    """Issue a ScheduleWarning on behalf of the nearest caller outside this package."""
    level, frame = 1, sys._getframe()
    while frame.f_back is not None and _is_ours(frame.f_globals.get("__name__", "")):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, ScheduleWarning, stacklevel=level)


def _is_ours(module: str) -> bool:
    # The __init__ that dataclasses write has this package's module for its globals.
    return module == "fused_sched" or module.startswith("fused_sched.")
