"""Waiting for what another thread or process brings about."""

from __future__ import annotations

import time
from collections.abc import Callable

PATIENCE = 120.0


def until(holds: Callable[[], bool], seconds: float = PATIENCE) -> None:
    """Wait until something is so; fails rather than for ever."""
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.005)
