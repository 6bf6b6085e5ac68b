"""Memory as nesting sees it: guest RAM by physical address, and the caller's memory at an ioctl argument."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Protocol

PAGE = 0x1000


class GuestMemory(Protocol):
    """Guest RAM. An address that no memory slot backs makes ``read`` return None and ``write`` return False."""

    def read(self, gpa: int, size: int) -> bytes | None:
        """``size`` bytes at ``gpa``."""

    def write(self, gpa: int, data: bytes) -> bool:
        """Store ``data`` at ``gpa``."""


class NoMemory:
    """A guest without any memory slot."""

    def read(self, gpa: int, size: int) -> bytes | None:
        """None: nothing is backed."""
        return None

    def write(self, gpa: int, data: bytes) -> bool:
        """False: nothing is backed."""
        return False


class Overlay:
    """Guest memory whose writes stay here, so that an operation can be tried without being applied."""

    def __init__(self, below: GuestMemory) -> None:
        self._below = below
        self._pages: dict[int, bytearray] = {}

    def read(self, gpa: int, size: int) -> bytes | None:
        """``size`` bytes at ``gpa`` as written here or else below."""
        below = self._below.read(gpa, size)
        if below is None or not self._pages:
            return below
        data = bytearray(below)
        for page, first, last in _pages(gpa, size):
            if page in self._pages:
                data[first - gpa : last - gpa] = self._pages[page][first - page : last - page]
        return bytes(data)

    def write(self, gpa: int, data: bytes) -> bool:
        """Keep ``data``; False when nothing backs the address below."""
        for page, first, last in _pages(gpa, len(data)):
            if page not in self._pages:
                contents = self._below.read(page, PAGE)
                if contents is None:
                    return False
                self._pages[page] = bytearray(contents)
            self._pages[page][first - page : last - page] = data[first - gpa : last - gpa]
        return True


def _pages(gpa: int, size: int) -> Iterable[tuple[int, int, int]]:
    for page in range(gpa & ~(PAGE - 1), gpa + size, PAGE):
        yield page, max(page, gpa), min(page + PAGE, gpa + size)


@dataclass
class UserBuffer:
    """The bytes at an ioctl argument: None is a NULL pointer, what lies past the end faults.

    ``read_only`` makes every copy to it fault.
    """

    data: bytearray | None
    read_only: bool = False

    @classmethod
    def of(cls, data: bytes | None, read_only: bool = False) -> UserBuffer:
        """A buffer with a copy of ``data``."""
        return cls(None if data is None else bytearray(data), read_only)

    def copy_from(self, offset: int, size: int) -> bytes | None:
        """``size`` bytes from ``offset``, None when that faults."""
        if self.data is None or offset + size > len(self.data):
            return None
        return bytes(self.data[offset : offset + size])

    def copy_to(self, offset: int, data: bytes) -> bool:
        """Store ``data`` at ``offset``. False when that faults; what fits before the fault is stored all the same."""
        if self.data is None or self.read_only:
            return False
        room = max(0, len(self.data) - offset)
        stored = data[:room]
        self.data[offset : offset + len(stored)] = stored
        return len(stored) == len(data)


@dataclass
class UserMemory:
    """The caller's other memory, which pointers inside ioctl structures address: segments of bytes."""

    segments: list[tuple[int, bytearray]] = field(default_factory=list)

    def read(self, address: int, size: int) -> bytes | None:
        """``size`` bytes at ``address``, None when any of them is missing."""
        for start, data in self.segments:
            if start <= address and address + size <= start + len(data):
                return bytes(data[address - start : address - start + size])
        return None

    def write(self, address: int, data: bytes) -> bool:
        """Store ``data`` at ``address``; False, storing nothing, when any byte is missing."""
        for start, segment in self.segments:
            if start <= address and address + len(data) <= start + len(segment):
                segment[address - start : address - start + len(data)] = data
                return True
        return False
