"""The event log of a machine, followed through every interruption."""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from subpage.bodies import NDJSON
from subpage.core import Core
from subpage.errors import Problem, StreamBroken, Unauthenticated, Unreachable
from subpage.html import Document
from subpage.wire import document

LOG = logging.getLogger("subpage")

# A service shows at least this often that a stream lives, unless it was told otherwise; then it is begun anew.
SILENCE = 60.0
_ENDED = "the service ended it"
PAUSES = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0)


async def following(
    core: Core, vm: str, query: dict[str, Any], after: int | str | None, follow: bool
) -> AsyncGenerator[Document, None]:
    """Events after ``after``, none twice and none left out. Raises Problem, and Unreachable before there was one."""
    last: int | None = int(after) if isinstance(after, int) or (after and after.isdecimal()) else None
    if after == "latest":
        # As a number, or what happens during an interruption would be passed over.
        page = await core.document("getEvents", path={"vm": vm}, query={"after": after})
        last = int(page["last"])
    begun, failures = False, 0
    while True:
        headers = {"Accept": "text/event-stream" if follow else NDJSON}
        if last is not None:
            headers["Last-Event-ID"] = str(last)
        what = _ENDED
        try:
            options: dict[str, Any] = {"query": query, "headers": headers, "patience": SILENCE}
            async with aclosing(core.lines("getEvents", path={"vm": vm}, **options)) as lines:
                async for name, text in _fields(lines, follow):
                    begun, failures = True, 0
                    if name == "id":
                        last = int(text)
                    if name != "data":
                        continue
                    event = Document(document(text.encode()))
                    if event["kind"] == "end":
                        what = str(event["detail"].get("reason", what))
                        break
                    yield event
                    if event["id"] is not None:
                        last = event["id"]
            if what == "deleted" or (not follow and what == _ENDED):
                return
            if what == "unauthenticated":
                raise Unauthenticated({"detail": "the token was revoked or has expired"}, 401)
        except (Unreachable, StreamBroken) as error:
            what = str(error)
            if not begun:
                raise
        except Problem as problem:
            if problem.status not in (429, 503) or not begun:
                raise
            what = str(problem)
        if not failures:
            LOG.info("the events of %s broke off (%s); trying again", vm, what)
        await core.transport.sleep(PAUSES[min(failures, len(PAUSES) - 1)])
        failures += 1


async def _fields(lines: AsyncGenerator[bytes, None], follow: bool) -> AsyncGenerator[tuple[str, str], None]:
    """``data`` and ``id`` of Server-Sent Events; the service puts an event on one line. Or the lines of NDJSON.
    The id of an event counts once the event was taken, so it comes after it."""
    number = ""
    async for line in lines:
        text = line.decode("utf-8", "replace")
        if not follow:
            if text:
                yield "data", text
            continue
        name, _, value = text.partition(":")
        value = value.removeprefix(" ")
        if name == "id":
            number = value
        elif not text and number.isdecimal():
            yield "id", number
        else:
            yield name, value
