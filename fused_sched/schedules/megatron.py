"""Schedules of Megatron-LM under their own names."""

from __future__ import annotations

from .library import LibrarySchedule


class MegatronSchedule(LibrarySchedule, library="megatron", abstract=True):
    """A schedule of Megatron-LM."""
