"""Nodes of a cluster on a machine that is busy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

_TRIES = 3


def begun(begin: Callable[[], Any]) -> Any:
    """A node: Ray waits half a minute for one, which may be too little on such a machine."""
    for left in reversed(range(_TRIES)):
        try:
            return begin()
        except Exception:  # of no narrower class
            if not left:
                raise
    raise AssertionError
