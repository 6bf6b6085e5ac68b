"""Load kernels for calling, not for compiling more: half the memory, and most of the time.

numba keeps two forms of a kernel: machine code, and LLVM's bitcode for kernels that are compiled later and call it.
Where everything is compiled already, the second is read again only if, against expectation, it is needed.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable
from functools import partial
from typing import Any

from llvmlite import binding
from numba.core.compiler import CompileResult

from engine.warm.kernels import Kernel

_result: Any = CompileResult  # without type hints


def load_lean(of: Iterable[Kernel]) -> None:
    """From here on, these kernels are loaded from disk without their bitcode."""
    for kernel in of:
        kernel._cache._impl.rebuild = partial(_rebuild, kernel)


def _rebuild(kernel: Kernel, context: Any, payload: tuple[Any, ...]) -> Any:
    (name, kind, (code, _)), description, *rest = payload
    symbols = (
        description.llvm_func_name,
        description.llvm_cpython_wrapper_name,
        description.llvm_cfunc_wrapper_name,
    )
    # What numba looks for in the bitcode: which names the machine code defines.
    names = binding.parse_assembly("\n".join(f'@"{symbol}" = global i8 0' for symbol in symbols)).as_bitcode()
    result = _result._rebuild(context, (name, kind, (code, names)), description, *rest)
    result.library._shared_module = None
    result.library._get_module_for_linking = partial(_linkable, kernel, result)
    return result


def _linkable(kernel: Kernel, result: Any) -> Any:
    cache = kernel._cache
    key = cache._index_key(tuple(result.signature.args), result.library.codegen)
    (_, _, (_, bitcode)), *_ = cache._cache_file.load(key)
    return binding.parse_bitcode(bitcode)


def give_back() -> None:
    """Return memory that is free to the system, where the C library can: loading kernels leaves much of it."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
