"""The audit log: one JSON line for each mutation that was asked for, done or not. Lines are added and never changed."""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from collections import Counter
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from service.security.access import NOBODY, Principal
from service.security.tokens import without_tokens

logger = logging.getLogger("subpage")

STDERR = "-"

# What is written of a path or a query: the API's own are shorter.
MAX_TEXT = 1024
# Refused strangers who get a line each: so many at once, and one more each so many seconds. Others are counted.
STRANGERS_AT_ONCE = 20
STRANGER_SECONDS = 10.0


def outcome_of(status: int) -> str:
    """What became of a request: ``done``, ``refused``, ``failed``, or ``abandoned`` when nobody was answered (0)."""
    if status in (0, 499):
        return "abandoned"
    if status < 400:
        return "done"
    return "refused" if status < 500 else "failed"


def cut(text: str) -> str:
    """``text`` as far as it is written; what is left out is counted."""
    return text if len(text) <= MAX_TEXT else f"{text[:MAX_TEXT]}… ({len(text) - MAX_TEXT} more)"


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="microseconds")


class AuditLog:
    """Writes to the file ``target``, to standard error for ``-``, or, without a target, there while ``guarded()``.

    A line is one ``write`` to a file opened for appending, so lines of several processes do not mix. A line that cannot
    be written is reported in the log of the service and does not undo what it tells of.
    """

    def __init__(
        self,
        target: str | None,
        guarded: Callable[[], bool] = lambda: False,
        *,
        secret: str | None = None,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._target = target
        self._guarded = guarded
        self._file: int | None = None
        self._secret = secret
        self._monotonic = monotonic
        self._lines_left = float(STRANGERS_AT_ONCE)
        self._filled = monotonic()
        self._uncounted: Counter[int] = Counter()
        self._since = ""

    @property
    def on(self) -> bool:
        return self._target is not None or self._guarded()

    def write(self, event: str, principal: Principal | None, **members: Any) -> None:
        """Add a line: when, what ``event``, who, and ``members``."""
        if not self.on:
            return
        self._write_counted()
        self._write(event, principal, members)

    def refused_stranger(self, status: int, **members: Any) -> None:
        """A request of nobody that is known was refused: a line as ``write`` adds it, or one more in a count.

        Strangers cost nothing to their senders; a line for each would let them fill the disk.
        """
        if not self.on:
            return
        now = self._monotonic()
        self._lines_left = min(STRANGERS_AT_ONCE, self._lines_left + (now - self._filled) / STRANGER_SECONDS)
        self._filled = now
        if self._lines_left < 1:
            self._since = self._since or _now()
            self._uncounted[status] += 1
            return
        self._lines_left -= 1
        self.write("request", NOBODY, status=status, **members)

    def _write_counted(self) -> None:
        """Tell of those who were counted, if there are any."""
        if self._uncounted:
            statuses, self._uncounted = self._uncounted, Counter()
            since, self._since = self._since, ""
            counts = {str(status): count for status, count in sorted(statuses.items())}
            self._write("strangers-refused", None, {"since": since, "count": statuses.total(), "statuses": counts})

    def _write(self, event: str, principal: Principal | None, members: dict[str, Any]) -> None:
        record: dict[str, Any] = {"time": _now(), "event": event}
        if principal is not None:
            record |= {"token": principal.token, "name": principal.name, "tenant": principal.tenant}
        told = {name: cut(value) if isinstance(value, str) else value for name, value in members.items()}
        line = without_tokens(json.dumps(record | told, default=str), self._secret) + "\n"
        try:
            if self._target in (None, STDERR):
                sys.stderr.write(line)
            else:
                os.write(self._opened(), line.encode())
        except OSError:
            logger.exception("a line of the audit log was lost: %s", line.rstrip())

    def _opened(self) -> int:
        if self._file is None:
            # Opened when first needed, so that making an application touches no file.
            self._file = os.open(Path(str(self._target)), os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
        return self._file

    def close(self) -> None:
        if self.on:
            self._write_counted()
        if self._file is not None:
            os.close(self._file)
            self._file = None
