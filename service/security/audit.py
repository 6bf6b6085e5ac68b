"""The audit log: one JSON line for each mutation that was asked for, done or not. Lines are added and never changed."""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from service.security.access import Principal

logger = logging.getLogger("subpage")

STDERR = "-"


def outcome_of(status: int) -> str:
    """What became of a request: ``done``, ``refused``, ``failed``, or ``abandoned`` when nobody was answered (0)."""
    if status in (0, 499):
        return "abandoned"
    if status < 400:
        return "done"
    return "refused" if status < 500 else "failed"


class AuditLog:
    """Writes to the file ``target``, to standard error for ``-``, or, without a target, there while ``guarded()``.

    A line is one ``write`` to a file opened for appending, so lines of several processes do not mix. A line that cannot
    be written is reported in the log of the service and does not undo what it tells of.
    """

    def __init__(self, target: str | None, guarded: Callable[[], bool] = lambda: False) -> None:
        self._target = target
        self._guarded = guarded
        self._file: int | None = None

    @property
    def on(self) -> bool:
        return self._target is not None or self._guarded()

    def write(self, event: str, principal: Principal | None, **members: Any) -> None:
        """Add a line: when, what ``event``, who, and ``members``."""
        if not self.on:
            return
        record: dict[str, Any] = {"time": datetime.now(UTC).isoformat(timespec="microseconds"), "event": event}
        if principal is not None:
            record |= {"token": principal.token, "name": principal.name, "tenant": principal.tenant}
        line = json.dumps(record | members, default=str) + "\n"
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
        if self._file is not None:
            os.close(self._file)
            self._file = None
