"""One implementation, two ways to call it.

Each operation is written once, as a coroutine over a ``Transport``. A transport that blocks never suspends: there the
coroutine runs to its end in one step, and the caller sees a plain function. Objects that await hand it to the caller.
"""

from __future__ import annotations

import functools
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Iterator
from types import MethodType
from typing import Any, Concatenate, Generic, ParamSpec, TypeVar, cast, overload

P = ParamSpec("P")
A = TypeVar("A")
B = TypeVar("B")
T = TypeVar("T")


class Blocking:
    """Objects whose operations return when they are done."""


class Awaiting:
    """Objects whose operations are awaited, and whose streams are read with ``async for``."""


def run(awaitable: Awaitable[T]) -> T:
    """The result of what never suspends."""
    coroutine = cast(Coroutine[Any, Any, T], awaitable)
    try:
        coroutine.send(None)
    except StopIteration as done:
        return cast(T, done.value)
    raise RuntimeError("a transport that blocks has suspended")


class _Streamed(Generic[T]):
    def __init__(self, source: AsyncGenerator[T, None]) -> None:
        self._source = source


class Stream(_Streamed[T]):
    """What comes in the course of time, one after the other. Close it, or use it as a context, to stop early."""

    def __iter__(self) -> Iterator[T]:
        return self

    def __next__(self) -> T:
        try:
            return run(self._source.__anext__())
        except StopAsyncIteration:
            raise StopIteration from None

    def __enter__(self) -> Stream[T]:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def close(self) -> None:
        """End the stream, and the connection under it."""
        run(self._source.aclose())


class AsyncStream(_Streamed[T]):
    """As ``Stream``, for ``async for`` and ``async with``."""

    def __aiter__(self) -> AsyncStream[T]:
        return self

    async def __anext__(self) -> T:
        return await self._source.__anext__()

    async def __aenter__(self) -> AsyncStream[T]:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """End the stream, and the connection under it."""
        await self._source.aclose()


class Method(Generic[P, B, A]):
    """A method of both kinds of objects, over the function ``flow``: blocking ones are given a B, awaiting ones an A.

    ``uses`` are the operations that it calls. Of a class, it is ``flow`` itself: so ``help`` shows it, and so flows
    call each other."""

    def __init__(self, flow: Callable[..., Any], uses: tuple[str, ...], blocking: Any, awaiting: Any) -> None:
        self.flow, self.uses = flow, uses
        self._blocking = functools.wraps(flow)(lambda *given, **named: blocking(flow(*given, **named)))
        self._awaiting = functools.wraps(flow)(lambda *given, **named: awaiting(flow(*given, **named)))
        functools.update_wrapper(cast(Any, self), flow)

    @overload
    def __get__(self, instance: None, owner: type) -> Callable[..., Any]: ...
    @overload
    def __get__(self, instance: Blocking, owner: type) -> Callable[P, B]: ...
    @overload
    def __get__(self, instance: Awaiting, owner: type) -> Callable[P, A]: ...
    def __get__(self, instance: object | None, owner: type) -> Callable[..., Any]:
        if instance is None:
            return self.flow
        return MethodType(self._awaiting if isinstance(instance, Awaiting) else self._blocking, instance)


def operation(
    *uses: str,
) -> Callable[[Callable[Concatenate[Any, P], Coroutine[Any, Any, T]]], Method[P, T, Coroutine[Any, Any, T]]]:
    """Make a coroutine function a method of both kinds of objects."""
    return lambda flow: Method(flow, uses, run, lambda coroutine: coroutine)


def stream(
    *uses: str,
) -> Callable[[Callable[Concatenate[Any, P], AsyncGenerator[T, None]]], Method[P, Stream[T], AsyncStream[T]]]:
    """Make what gives an asynchronous generator a method of both kinds of objects."""
    return lambda flow: Method(flow, uses, Stream, AsyncStream)
