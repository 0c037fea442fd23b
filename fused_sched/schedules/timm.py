"""Schedules of timm under their own names."""

from __future__ import annotations

from .library import LibrarySchedule


class TimmSchedule(LibrarySchedule, library="timm", abstract=True):
    """A schedule of timm."""
