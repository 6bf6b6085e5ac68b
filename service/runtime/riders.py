"""What is stored in the same transaction as the changes that a task makes, whichever changes those are.

A job is done when its replay is committed, not a moment earlier or later; a request is never carried out without its
Idempotency-Key being taken. Both ride with the commit instead of following it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from service.storage.records import Change, Side

Rider = Callable[[Change], Side | None]
"""Says what to store beside a change; None for nothing."""

_RIDERS: ContextVar[tuple[Rider, ...]] = ContextVar("riders", default=())


@contextmanager
def riding(rider: Rider) -> Iterator[None]:
    """Ask ``rider`` about every change that this task hands to the store within the context."""
    token = _RIDERS.set((*_RIDERS.get(), rider))
    try:
        yield
    finally:
        _RIDERS.reset(token)


def sides_of(change: Change) -> list[Side]:
    """What the riders of this task say."""
    return [side for rider in _RIDERS.get() if (side := rider(change)) is not None]
