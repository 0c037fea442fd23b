"""Schedules of optax under their own names."""

from __future__ import annotations

from .library import LibrarySchedule


class OptaxSchedule(LibrarySchedule, library="optax", abstract=True):
    """A schedule of optax."""
