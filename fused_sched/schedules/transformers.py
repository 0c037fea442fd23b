"""Schedules of Hugging Face transformers under their own names."""

from __future__ import annotations

from .library import LibrarySchedule


class TransformersSchedule(LibrarySchedule, library="transformers", abstract=True):
    """A schedule of Hugging Face transformers."""
