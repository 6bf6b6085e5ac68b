"""How far work is that has no body of its own to be measured by."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(slots=True)
class Told:
    """Records that were counted so far, and how much of the work is done, 0 to 1. From any thread."""

    records_done: int = 0
    share: float = 0.0


Follow = Callable[[Told], object]
"""Is given what tells how far work is when it begins."""
