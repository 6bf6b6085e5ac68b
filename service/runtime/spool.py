"""Bodies put aside in files, for replays that begin when they are here."""

from __future__ import annotations

import errno
import os
import tempfile
import threading
from pathlib import Path
from typing import IO, cast

from engine.errors import LimitExceeded
from service.problems import NotReady
from service.runtime.bodies import BodyPipe

_PIECE = 1 << 20
_NO_ROOM = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EROFS})


class JobStopped(Exception):
    """Raised in the thread of a replay that is to end without an effect."""


class Spool:
    """A body in a file, read by a replay; ``taken`` counts the bytes read, for whoever wants to know how far it is."""

    def __init__(self, file: IO[bytes], size: int) -> None:
        self._file = file
        self.size = size
        self.taken = 0
        self.stop = False

    def read(self, size: int = -1) -> bytes:
        self._check()
        data = self._file.read(size)
        self.taken += len(data)
        return data

    def readinto(self, target: memoryview) -> int:
        self._check()
        count = int(self._file.readinto(target))  # type: ignore[attr-defined]
        self.taken += count
        return count

    def _check(self) -> None:
        if self.stop:
            raise JobStopped

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    @property
    def closed(self) -> bool:
        return self._file.closed

    def close(self) -> None:
        self._file.close()


class Spools:
    """The bodies of unfinished jobs: files without names in ``folder``, together at most ``most`` bytes."""

    def __init__(self, most: int, folder: Path | None) -> None:
        self._most = most
        self._folder = str(folder) if folder else None
        self._counting = threading.Lock()
        self.used = 0

    def fill(self, pipe: BodyPipe) -> Spool:
        """Put a body aside; blocking. Raises LimitExceeded, NotReady when the disk takes no more."""
        size = 0
        try:
            file = cast("IO[bytes]", tempfile.TemporaryFile(dir=self._folder))  # noqa: SIM115 - closed with the job
            try:
                while piece := pipe.read(_PIECE):
                    self._count(len(piece))
                    size += len(piece)
                    file.write(piece)
                file.seek(0)
            except BaseException:
                file.close()
                raise
        except BaseException as error:
            self._count(-size)
            if isinstance(error, OSError) and error.errno in _NO_ROOM:
                raise NotReady(f"the body cannot be put aside: {(error.strerror or '').lower()}") from error
            raise
        return Spool(file, size)

    def free(self, spool: Spool) -> None:
        """A body is of no use any more."""
        spool.close()
        self._count(-spool.size)

    def _count(self, size: int) -> None:
        with self._counting:
            if size > 0 and self.used + size > self._most:
                rule = f"the bodies of unfinished jobs may take {self._most} bytes together"
                raise LimitExceeded(rule, field="max_job_bytes", value=self._most)
            self.used += size
