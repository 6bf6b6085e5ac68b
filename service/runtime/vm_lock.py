"""One lock per VM. Readers do not come here: they read the last published state and never wait."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from engine.errors import Busy


class VmLock:
    """Gives the right to mutate one machine to one task at a time, in the order of asking.

    Short mutations run inline on the event loop while they hold it; a replay holds it from its first byte to its
    publication and runs in a thread.
    """

    def __init__(self, timeout: float) -> None:
        self._lock = asyncio.Lock()
        self._timeout = timeout

    @property
    def held(self) -> bool:
        """Whether somebody has the right now."""
        return self._lock.locked()

    @asynccontextmanager
    async def hold(self, *, patient: bool = False) -> AsyncIterator[None]:
        """Wait for the right, at most the configured time, or as long as it takes if ``patient``.

        Raises Busy when it was not to be had.
        """
        await self.take(patient=patient)
        try:
            yield
        finally:
            self.give()

    async def take(self, *, patient: bool = False) -> None:
        """``hold`` without a context: ``give`` ends it."""
        if self._lock.locked() and not patient:
            try:
                async with asyncio.timeout(self._timeout):
                    await self._lock.acquire()
            except TimeoutError:
                raise Busy("another mutation of this machine is under way; try again") from None
        else:
            await self._lock.acquire()

    def give(self) -> None:
        """Let the next one have the right."""
        self._lock.release()
