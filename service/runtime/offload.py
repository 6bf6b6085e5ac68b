"""Work that takes longer than the event loop should be kept from others goes to a thread."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import anyio.to_thread

P = ParamSpec("P")
T = TypeVar("T")


async def maybe_in_thread(small: bool, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Call ``function`` here when the work is ``small``, well under a millisecond, and in a thread otherwise.

    A cancelled caller still waits for the thread, so that a mutation never runs on without its writer.
    """
    if small:
        return function(*args, **kwargs)
    return await anyio.to_thread.run_sync(functools.partial(function, *args, **kwargs))
