"""The one way in which engine functions are compiled: cached on disk, outside the GIL, without reference counting.

Kernels get every array from their caller and make none, so nothing has to be counted; leaving the counting in costs
an atomic operation for each array of a machine at each call, fifteen times the work of a page-table walk.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import numba

F = TypeVar("F", bound=Callable[..., object])

# numba's type hints do not list every option of its targets.
_njit: Any = numba.njit


def kernel(function: F) -> F:
    """Compile ``function`` with numba; ``NUMBA_DISABLE_JIT=1`` leaves it plain Python."""
    compiled: F = _njit(cache=True, nogil=True, boundscheck=False, error_model="numpy", _nrt=False)(function)
    return compiled
