"""What the frameworks' tests share: several processes, and the frameworks themselves, without which they fail."""

from __future__ import annotations

import os

os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
