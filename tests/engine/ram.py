"""Guest memory for tests that need no machine."""

from __future__ import annotations

from collections.abc import Collection, Mapping

PAGE = 0x1000


class Ram:
    """Pages by their GPA, zero until written; everything else has no memory slot. By default the first 128 KiB."""

    def __init__(
        self, pages: Collection[int] = range(0, 0x20000, PAGE), *, words: Mapping[int, int] | None = None
    ) -> None:
        self.pages = frozenset(pages)
        self.bytes = bytearray(max(pages, default=0) + PAGE)
        for gpa, word in (words or {}).items():
            self.put(gpa, word, 4)

    def _has(self, gpa: int, size: int) -> bool:
        return all(page in self.pages for page in range(gpa & -PAGE, gpa + size, PAGE))

    def read(self, gpa: int, size: int) -> bytes | None:
        return bytes(self.bytes[gpa : gpa + size]) if self._has(gpa, size) else None

    def write(self, gpa: int, data: bytes) -> bool:
        if not self._has(gpa, len(data)):
            return False
        self.bytes[gpa : gpa + len(data)] = data
        return True

    def put(self, gpa: int, value: int, size: int = 8) -> None:
        self.bytes[gpa : gpa + size] = value.to_bytes(size, "little")

    def word(self, gpa: int, size: int = 8) -> int:
        return int.from_bytes(self.bytes[gpa : gpa + size], "little")
