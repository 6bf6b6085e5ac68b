"""The one way in which engine functions are compiled: cached on disk, outside the GIL."""

from collections.abc import Callable
from typing import TypeVar

import numba

F = TypeVar("F", bound=Callable[..., object])


def kernel(function: F) -> F:
    """Compile ``function`` with numba; ``NUMBA_DISABLE_JIT=1`` leaves it plain Python."""
    return numba.njit(cache=True, nogil=True, boundscheck=False, error_model="numpy")(function)  # type: ignore[no-any-return]
