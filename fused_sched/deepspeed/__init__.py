"""DeepSpeed: its configuration as this optimizer and schedule, and its engine with this optimizer inside.

Importing this does not import DeepSpeed, which only `register` and `initialize` need.
"""

from .config import optimizer_from_config, schedule_from_config
from .engine import initialize, register

__all__ = ["initialize", "optimizer_from_config", "register", "schedule_from_config"]
