"""The one way in which engine functions are compiled: cached on disk, outside the GIL, without reference counting.

Kernels get every array from their caller and make none, so nothing has to be counted; leaving the counting in costs
an atomic operation for each array of a machine at each call, fifteen times the work of a page-table walk.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import numba
from numba.core import types
from numba.extending import intrinsic

F = TypeVar("F", bound=Callable[..., object])

# numba's type hints do not list every option of its targets, nor what compiled code may call.
_njit: Any = numba.njit
_intrinsic: Any = intrinsic
_config: Any = numba.config


def _compiled(function: F, *, nogil: bool) -> F:
    compiled: F = _njit(cache=True, nogil=nogil, boundscheck=False, error_model="numpy", _nrt=False)(function)
    return compiled


def kernel(function: F) -> F:
    """Compile ``function`` with numba; ``NUMBA_DISABLE_JIT=1`` leaves it plain Python."""
    return _compiled(function, nogil=True)


def short_kernel(function: F) -> F:
    """The same for a call of microseconds: it keeps the GIL.

    Who lets go of it for so short a time waits for every thread that wanted it meanwhile.
    """
    return _compiled(function, nogil=False)


def stands_alone() -> None:
    """Said in a kernel: it stays a function of its own in the machine code of its callers.

    How a loop is compiled otherwise depends on whatever is compiled around it, down to which values stay in registers.
    """


def _without_inlining(_: Any) -> Any:
    def mark(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        builder.function.attributes.add("noinline")
        return context.get_dummy_value()

    return types.void(), mark


if not _config.DISABLE_JIT:
    stands_alone = _intrinsic(_without_inlining)
