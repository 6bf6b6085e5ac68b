"""Files behind memory slots: below directories that the operator lists, opened for reading, never written.

What is opened is what is looked at: a name is resolved once, and the file that it led to is the one that is checked, by
where it is, and read. Machines with the same file share its descriptor, which is closed when no state of a machine has
the slot any more.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

from engine.errors import EngineError, InvalidValue, LimitExceeded
from engine.kvm.slot_files import SlotFile
from service.platform.allowed_files import NotAFile, looked_at, reopened, within

# In a directory of the list, stands for the tenant that asks.
TENANT_WORD = "{tenant}"
LONGEST_PATH = 4096

FileState = Literal["attached", "changed", "missing"]

_WHERE = "the directories of memory_files"


class MemoryFile:
    """A file that is open for as long as somebody has this object. Its ``descriptor`` is -1 where it could not be
    opened, and ``reason`` says why."""

    def __init__(self, descriptor: int, reason: str | None = None) -> None:
        self.descriptor = descriptor
        self.reason = reason
        if descriptor >= 0:
            weakref.finalize(self, os.close, descriptor)

    def fingerprint(self) -> tuple[int, int]:
        """Size in bytes, and when it was written last, ns since 1970."""
        now = os.fstat(self.descriptor)
        return now.st_size, now.st_mtime_ns


def state_of(file: SlotFile) -> tuple[FileState | None, str | None]:
    """What has become of an attached file, and why it cannot be read; None where nobody looked."""
    opened = file.opened
    if not isinstance(opened, MemoryFile):
        return None, None
    if opened.descriptor < 0:
        return "missing", opened.reason
    return ("attached" if opened.fingerprint() == (file.size, file.modified) else "changed"), None


class MemoryFiles:
    """The files that machines of this process may have. Everything here may wait for a disk: call it in a thread."""

    def __init__(self, directories: Sequence[Path], most: int) -> None:
        self._directories = [str(directory) for directory in directories]
        self._most = most
        self._open: weakref.WeakValueDictionary[tuple[int, int], MemoryFile] = weakref.WeakValueDictionary()
        self._lock = threading.Lock()

    def attach(self, path: str, offset: int, tenant: str) -> SlotFile:
        """The file of a tenant at ``path``, open. Raises InvalidValue, or LimitExceeded where too many are open."""
        opened = self._opened(path, tenant)
        size, modified = opened.fingerprint()
        return SlotFile(path, offset, size, modified, opened)

    def reopening(self, tenant: str) -> Callable[[SlotFile], MemoryFile]:
        """Opens what a machine of ``tenant`` had attached when it was stored, or says why it is not there."""

        def reopen(file: SlotFile) -> MemoryFile:
            try:
                return self._opened(file.path, tenant)
            except EngineError as error:
                return MemoryFile(-1, error.rule)

        return reopen

    def _opened(self, path: str, tenant: str) -> MemoryFile:
        allowed = [directory.replace(TENANT_WORD, tenant) for directory in self._directories]
        if not allowed:
            raise _refused("no file may be behind a slot: memory_files lists no directory", path)
        if not within(path, allowed) or ".." in path.split("/") or "\0" in path or len(path) > LONGEST_PATH:
            raise _refused(f"must be an absolute path, without .., below {' or '.join(allowed)}", path)
        try:
            with looked_at(path, allowed, _WHERE, "a file, or shared memory") as found:
                about = os.fstat(found)
                with self._lock:
                    return self._shared(found, (about.st_dev, about.st_ino))
        except NotAFile as error:
            raise _refused(str(error), path) from None

    def _shared(self, found: int, key: tuple[int, int]) -> MemoryFile:
        known = self._open.get(key)
        if known is not None:
            return known
        if len(self._open) >= self._most:
            rule = f"at most {self._most} files may be behind slots at one time, over all machines"
            raise LimitExceeded(rule, field="max_memory_files", value=self._most)
        opened = self._open[key] = MemoryFile(reopened(found))
        return opened


def _refused(rule: str, path: str) -> InvalidValue:
    return InvalidValue(rule, field="backing.file", value=path)
