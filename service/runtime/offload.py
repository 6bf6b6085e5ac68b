"""Work that takes longer than the event loop should be kept from others goes to a thread, and is waited for."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable
from concurrent.futures import Future
from typing import ParamSpec, TypeVar

import anyio.to_thread

from engine.errors import EngineError
from service.problems import ServiceError

P = ParamSpec("P")
T = TypeVar("T")


async def maybe_in_thread(small: bool, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Call ``function`` here when the work is ``small``, well under a millisecond, and in a thread otherwise.

    A cancelled caller still waits for the thread, so that a mutation never runs on without its lock.
    """
    if small:
        return function(*args, **kwargs)
    try:
        return await anyio.to_thread.run_sync(functools.partial(function, *args, **kwargs))
    except (EngineError, ServiceError) as refused:
        # Its traceback goes round in a circle through the thread's future, and would hold what the thread was given, a
        # body of 64 MiB perhaps, until the garbage collector comes by.
        raise refused.with_traceback(None) from refused.__cause__


async def finished(future: Future[T], unwanted: Callable[[], None] = lambda: None) -> T:
    """The outcome of a future that is waited for whatever happens: a cancelled caller takes note of it first.

    ``unwanted`` is then called, and may let it end sooner.
    """
    waiting = asyncio.wrap_future(future)
    cancelled = False
    while not waiting.done():
        try:
            await asyncio.wait((waiting,))
        except asyncio.CancelledError:
            cancelled = True
            unwanted()
    result = waiting.result()
    if cancelled:
        task = asyncio.current_task()
        assert task is not None
        # Delivered at the next wait, when the outcome has been taken note of.
        task.cancel()
    return result
