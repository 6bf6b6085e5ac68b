"""Driving kernels that stop when frames run out: give them room, enter again."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from engine.cpu.ept import TRAIL_ROWS
from engine.state.frame_store import Draft


def new_trail() -> NDArray[np.int64]:
    """Scratch for a walk."""
    return np.zeros((TRAIL_ROWS, 4), dtype=np.int64)


def run_all(draft: Draft, count: int, step: Callable[[int], int]) -> None:
    """Run a kernel that stops when frames run out until it has done ``count``; ``step`` goes on where it is told."""
    done = 0
    while done < count:
        draft.ensure()
        done = int(step(done))
