"""Schedules of DeepSpeed under their own names."""

from __future__ import annotations

from .library import LibrarySchedule


class DeepSpeedSchedule(LibrarySchedule, library="deepspeed", abstract=True):
    """A schedule of DeepSpeed."""
