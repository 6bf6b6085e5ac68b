"""One implementation, two ways to call it.

Each operation is written once, as a coroutine over a ``Transport``. A transport that blocks never suspends: there the
coroutine runs to its end in one step, and the caller sees a plain function. Objects that await hand it to the caller.
"""

from __future__ import annotations

import functools
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Iterator
from typing import Any, Concatenate, Generic, ParamSpec, TypeVar, cast, overload

P = ParamSpec("P")
T = TypeVar("T")
S = TypeVar("S")


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


class Stream(Generic[T]):
    """What comes in the course of time, one after the other. Close it, or use it as a context, to stop early."""

    def __init__(self, source: AsyncGenerator[T, None]) -> None:
        self._source = source

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


class AsyncStream(Generic[T]):
    """As ``Stream``, for ``async for`` and ``async with``."""

    def __init__(self, source: AsyncGenerator[T, None]) -> None:
        self._source = source

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


class Method:
    """A method of both kinds of objects, over the function ``flow``; ``uses`` are the operations that it calls."""

    def __init__(self, flow: Callable[..., Any], uses: tuple[str, ...], blocking: Any, awaiting: Any) -> None:
        self.flow, self.uses, self._blocking, self._awaiting = flow, uses, blocking, awaiting
        functools.update_wrapper(cast(Any, self), flow)

    def bound(self, instance: object | None) -> Callable[..., Any]:
        """What ``instance`` has of it; the function itself, so that ``help`` shows it, where there is none."""
        flow: Any = self.flow
        if instance is None:
            return self.flow
        kind = self._awaiting if isinstance(instance, Awaiting) else self._blocking
        bound: Any = functools.wraps(flow)(lambda *given, **named: kind(flow(instance, *given, **named)))
        return cast(Callable[..., Any], bound)


class Operation(Method, Generic[P, T]):
    """A method that is a coroutine function inside."""

    @overload
    def __get__(self, instance: None, owner: type) -> Callable[..., Any]: ...
    @overload
    def __get__(self, instance: Blocking, owner: type) -> Callable[P, T]: ...
    @overload
    def __get__(self, instance: Awaiting, owner: type) -> Callable[P, Coroutine[Any, Any, T]]: ...
    def __get__(self, instance: object | None, owner: type) -> Callable[..., Any]:
        return self.bound(instance)


class Streaming(Method, Generic[P, T]):
    """A method that is an asynchronous generator inside."""

    @overload
    def __get__(self, instance: None, owner: type) -> Callable[..., Any]: ...
    @overload
    def __get__(self, instance: Blocking, owner: type) -> Callable[P, Stream[T]]: ...
    @overload
    def __get__(self, instance: Awaiting, owner: type) -> Callable[P, AsyncStream[T]]: ...
    def __get__(self, instance: object | None, owner: type) -> Callable[..., Any]:
        return self.bound(instance)


def operation(
    *uses: str,
) -> Callable[[Callable[Concatenate[Any, P], Coroutine[Any, Any, T]]], Operation[P, T]]:
    """Make a coroutine function a method of both kinds of objects."""
    return lambda flow: Operation(flow, uses, run, lambda coroutine: coroutine)


def stream(
    *uses: str,
) -> Callable[[Callable[Concatenate[Any, P], AsyncGenerator[T, None]]], Streaming[P, T]]:
    """Make an asynchronous generator function a method of both kinds of objects."""
    return lambda flow: Streaming(flow, uses, Stream, AsyncStream)
