"""One lock per VM. Readers do not come here: they read the last published state and never wait."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from engine.errors import Busy


@dataclass(slots=True, eq=False)
class Place:
    """Somebody's place in the line. ``joins``: who has it may be let in while what came before is not yet committed.

    ``called`` is done when its wait is over: with True it has the right.
    """

    joins: bool
    called: asyncio.Future[bool] = field(default_factory=lambda: asyncio.get_running_loop().create_future())


class VmLock:
    """Gives the right to mutate one machine to one task at a time, in the order of asking.

    Short mutations run inline on the event loop while they hold it; a replay holds it from its first byte to its
    publication and runs in a thread.
    """

    def __init__(self, timeout: float) -> None:
        self._timeout = timeout
        self._line: deque[Place] = deque()
        self.held = False
        self._lent = False

    @property
    def lent(self) -> bool:
        """Whether nobody has the right that was lent, and nobody waits for it."""
        return self._lent and not self._line

    @property
    def next_joins(self) -> bool:
        """Whether somebody is next in line, and joins."""
        while self._line and self._line[0].called.done():
            self._line.popleft()  # gave up, and is about to leave
        return bool(self._line) and self._line[0].joins

    @asynccontextmanager
    async def hold(self, *, patient: bool = False) -> AsyncIterator[None]:
        """Wait for the right, at most the configured time, or as long as it takes if ``patient``.

        Raises Busy when it was not to be had.
        """
        place = self.ask()
        if place is not None:
            try:
                await self.turn(place, patient=patient)
            except BaseException:
                if not self.leave(place):
                    self.give()
                raise
        try:
            yield
        finally:
            self.give()

    def ask(self, *, joins: bool = False) -> Place | None:
        """None: the right is the caller's, until it says ``give``. Otherwise it waits at its place (``turn``)."""
        if not self.held or (self._lent and joins and not self._line):
            self.held, self._lent = True, False
            return None
        place = Place(joins)
        self._line.append(place)
        return place

    async def turn(self, place: Place, *, patient: bool = False) -> None:
        """Wait for the right. Raises Busy; whoever is interrupted here leaves its place (``leave``)."""
        if patient:
            await place.called
            return
        called = place.called
        limit = asyncio.get_running_loop().call_later(self._timeout, _call, called, False)
        try:
            in_time = await called
        finally:
            limit.cancel()
        if not in_time:
            raise Busy("another mutation of this machine is under way; try again")

    def leave(self, place: Place) -> bool:
        """Go out of the line. False: the right had come already, and is the caller's to give."""
        if place in self._line:
            self._line.remove(place)
        called = place.called
        return not called.done() or called.cancelled() or not called.result()

    def give(self) -> None:
        """Let the next one have the right."""
        while self._line:
            called = self._line.popleft().called
            if not called.done():
                called.set_result(True)
                return
        self.held = False

    def lend(self) -> bool:
        """Keep the right, and let one who joins have it who comes before ``recall``. False: somebody waits."""
        self._lent = not self._line
        return self._lent

    def recall(self) -> bool:
        """The right is lent no longer. False: somebody has taken it."""
        lent, self._lent = self._lent, False
        return lent


def _call(called: asyncio.Future[bool], in_time: bool) -> None:
    if not called.done():
        called.set_result(in_time)
