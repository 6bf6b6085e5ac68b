"""Whose replay computes now: so many at one time, tenants in rotation, and none that only waits for its body."""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from concurrent.futures import CancelledError, Future

from service.runtime.shares import Share


class Turns:
    """The turns of a service, of which each tenant has its share. From any thread."""

    def __init__(self, share: Share) -> None:
        self._share = share
        self._lock = threading.Lock()
        self._waiting: dict[str, deque[Future[None]]] = {}
        self._given = 0
        self._served: dict[str, int] = {}  # which turn of all was its last

    def of(self, tenant: str) -> Turn:
        return Turn(self, tenant)

    def ask(self, tenant: str) -> Future[None]:
        """Done when there is a turn for the tenant, whose it then is until ``give``."""
        asked: Future[None] = Future()
        with self._lock:
            self._waiting.setdefault(tenant, deque()).append(asked)
            self._grant()
        return asked

    def withdraw(self, tenant: str, asked: Future[None]) -> bool:
        """What was asked for is not wanted any more. False: it was given already."""
        with self._lock:
            line = self._waiting.get(tenant, deque())
            if asked in line:
                line.remove(asked)
                if not line:
                    del self._waiting[tenant]
        return asked.cancel()

    def give(self, tenant: str) -> None:
        """A turn has ended."""
        with self._lock:
            self._share.count(tenant, -1)
            self._grant()

    def _grant(self) -> None:
        while (tenant := self._next()) is not None:
            line = self._waiting[tenant]
            asked = line.popleft()
            if not line:
                del self._waiting[tenant]
            if asked.set_running_or_notify_cancel():
                self._given += 1
                self._served[tenant] = self._given
                self._share.count(tenant, 1)
                asked.set_result(None)

    def _next(self) -> str | None:
        """Of those that wait and may have one: who has the fewest, and then whose last was given first."""
        free = (name for name in self._waiting if self._share.room(name) > 0)
        return min(free, key=lambda name: (self._share.of(name), self._served.get(name, 0)), default=None)


class Turn:
    """The turn of one replay, which has it or does not. Its methods are called one at a time, but for ``abandon``."""

    def __init__(self, turns: Turns, tenant: str) -> None:
        self._turns = turns
        self._tenant = tenant
        self._asked: Future[None] | None = None
        self._abandoned = False
        self.held = False

    async def take(self) -> None:
        """Wait for it on the event loop."""
        asked = self._turns.ask(self._tenant)
        try:
            await asyncio.wrap_future(asked)
        except asyncio.CancelledError:
            if not self._turns.withdraw(self._tenant, asked):
                self._turns.give(self._tenant)  # it came at that moment
            raise
        self.held = True

    def again(self) -> bool:
        """Wait for it in a thread. False: it was abandoned, and is not held."""
        asked = self._asked = self._turns.ask(self._tenant)
        if self._abandoned:
            self._turns.withdraw(self._tenant, asked)
        try:
            asked.result()
        except CancelledError:
            return False
        self.held = True
        return True

    def give(self) -> None:
        """Let another have it; nothing if it is not held."""
        if self.held:
            self.held = False
            self._turns.give(self._tenant)

    def abandon(self) -> None:
        """Do not wait for it any longer."""
        self._abandoned = True
        if self._asked is not None:
            self._turns.withdraw(self._tenant, self._asked)
