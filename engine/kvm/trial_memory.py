"""Memory as nesting sees it: guest RAM by physical address."""

from __future__ import annotations

from collections.abc import Iterable
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
