"""The one way in which engine functions are compiled: cached on disk, outside the GIL, without reference counting.

Kernels get every array from their caller and make none, so nothing has to be counted; leaving the counting in costs
an atomic operation for each array of a machine at each call, fifteen times the work of a page-table walk.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import numba
import numpy as np
from numba.core import types
from numba.core.caching import UserProvidedCacheLocator
from numba.extending import intrinsic as _numba_intrinsic

F = TypeVar("F", bound=Callable[..., object])

# numba's type hints do not list every option of its targets, nor what compiled code may call.
_njit: Any = numba.njit
intrinsic: Any = _numba_intrinsic
_config: Any = numba.config
_locator: Any = UserProvidedCacheLocator

COMPILED = not _config.DISABLE_JIT

_ROOT = Path(__file__).parent.parent


class KernelLocator(_locator):  # type: ignore[misc]
    """Names the files of a kernel by its module's place in the engine, not on this disk.

    The folder that they lie in is named by all sources, so the same kernel of another copy of them is the same code.
    """

    @classmethod
    def get_suitable_cache_subpath(cls, py_file: str) -> str:
        """Where below the folder of all kernels those of ``py_file`` go."""
        folder = Path(py_file).resolve().parent
        if folder.is_relative_to(_ROOT):
            return str(folder.relative_to(_ROOT.parent))
        return str(super().get_suitable_cache_subpath(py_file))


_config.CACHE_LOCATOR_CLASSES = f"{__name__}.{KernelLocator.__qualname__}"


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


def _itself(number: int) -> int:
    return number


# Of a number that is an index and never negative: numba counts others from the end, which is a compare and an add.
position: Any = np.uint64 if COMPILED else _itself


def stands_alone() -> None:
    """Said in a kernel: it stays a function of its own in the machine code of its callers.

    How a loop is compiled otherwise depends on whatever is compiled around it, down to which values stay in registers.
    """


def _without_inlining(_: Any) -> Any:
    def mark(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        builder.function.attributes.add("noinline")
        return context.get_dummy_value()

    return types.void(), mark


if COMPILED:
    stands_alone = intrinsic(_without_inlining)
