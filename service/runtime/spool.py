"""Bodies put aside in files, for replays that begin when they are here."""

from __future__ import annotations

import errno
import os
import tempfile
from pathlib import Path
from typing import IO, cast

from service.problems import NotReady
from service.runtime.bodies import Upload
from service.runtime.offload import maybe_in_thread
from service.runtime.shares import Share, Tenants, one_tenant

# What is written to memory on the event loop.
_INLINE = 1 << 16
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
    """The bodies of unfinished jobs, and of calls whose format needs all of it: files without names in ``folder``,
    together at most ``most`` bytes, of which each tenant has its share. Used from the event loop."""

    def __init__(self, most: int, folder: Path | None, tenants: Tenants = one_tenant) -> None:
        what = "bytes may be in the bodies of unfinished jobs and in Parquet bodies"
        self._share = Share("max_job_bytes", most, what, tenants, firm=True)
        self._folder = str(folder) if folder else None

    @property
    def used(self) -> int:
        """Bytes that they take."""
        return self._share.used

    async def fill(self, upload: Upload, tenant: str, memory: int = 0) -> Spool:
        """Put a body aside, in memory while it has up to ``memory`` bytes. To be freed by the caller.

        Raises LimitExceeded, NotReady when the disk takes no more.
        """
        size = 0

        try:
            file = self._file(memory)
            try:
                while piece := await upload.gathered():
                    arrived = sum(map(len, piece))
                    self._share.take(tenant, arrived)
                    size += arrived
                    await maybe_in_thread(size <= min(memory, _INLINE), file.writelines, piece)
                file.seek(0)
            except BaseException:
                file.close()
                raise
        except BaseException as error:
            self._share.count(tenant, -size)
            if isinstance(error, OSError) and error.errno in _NO_ROOM:
                raise NotReady(f"the body cannot be put aside: {(error.strerror or '').lower()}") from error
            raise
        return Spool(file, size)

    def _file(self, memory: int) -> IO[bytes]:
        if memory:  # without any, such a file would never leave the memory
            return cast("IO[bytes]", tempfile.SpooledTemporaryFile(memory, dir=self._folder))
        return cast("IO[bytes]", tempfile.TemporaryFile(dir=self._folder))

    def free(self, spool: Spool, tenant: str) -> None:
        """A body is of no use any more."""
        spool.close()
        self._share.count(tenant, -spool.size)
