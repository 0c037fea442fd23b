"""Warnings of this package."""


class ScheduleWarning(UserWarning):
    """A schedule does something its owner may not expect."""
