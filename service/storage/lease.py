"""One process per store: a lock that dies with its holder, taken before anything is read.

The lock keeps honest processes apart. What proves ownership is the epoch in the store, which each new owner raises and
each transaction checks: an owner whose lock was lost without its knowing can write nothing (ADR 6).
"""

from __future__ import annotations

import fcntl
import os
from pathlib import Path
from typing import Protocol

import sqlalchemy as sa

from service.storage.urls import SQLITE, StoreUrl

# Any two constant words name the lock of this application in a PostgreSQL database.
_ADVISORY = (0x5355_4250, 0x4147_4531)


class LeaseLost(Exception):
    """Another process owns the store, or may."""


class Lease(Protocol):
    """Taken once, checked before each commit and while idle, released by the end of the process at the latest."""

    def take(self, connection: sa.Connection) -> bool:
        """Whether the lock is ours now; does not wait."""
        ...

    def check(self, connection: sa.Connection) -> None:
        """Raises LeaseLost, or the driver's error when the connection that holds the lock is gone."""
        ...

    def release(self) -> None: ...


class FileLease:
    """A file beside the database, locked with flock(2)."""

    def __init__(self, path: Path) -> None:
        self._path = path.with_name(path.name + ".lock")
        self._file: int | None = None

    def take(self, connection: sa.Connection) -> bool:
        if self._file is not None:
            return True
        file = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(file)
            return False
        self._file = file
        if not self._is_ours():
            self.release()
        return self._file is not None

    def _is_ours(self) -> bool:
        """Whether the path still names the file that we locked: whoever finds another one there can lock that."""
        assert self._file is not None
        try:
            return os.path.samestat(os.fstat(self._file), self._path.stat())
        except FileNotFoundError:
            return False

    def check(self, connection: sa.Connection) -> None:
        if self._file is None or not self._is_ours():
            raise LeaseLost

    def release(self) -> None:
        if self._file is not None:
            os.close(self._file)
            self._file = None


class AdvisoryLease:
    """A session-level advisory lock of PostgreSQL, on the connection that writes: no lock, no writing."""

    def take(self, connection: sa.Connection) -> bool:
        return bool(connection.execute(sa.select(sa.func.pg_try_advisory_lock(*_ADVISORY))).scalar_one())

    def check(self, connection: sa.Connection) -> None:
        connection.execute(sa.select(1))

    def release(self) -> None:
        """The lock ends with its connection, which the owner closes."""


def lease_of(url: StoreUrl) -> Lease:
    if url.kind == SQLITE:
        assert url.path is not None
        return FileLease(url.path)
    return AdvisoryLease()
