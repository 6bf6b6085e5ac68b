"""Write bitmaps: a word of 32 bits for each page, bit i = 1 when its sub-page i may be written."""

from __future__ import annotations

import importlib
import sys
from array import array
from collections.abc import Iterator, Sequence
from typing import Any, overload

from subpage.errors import BadInput, NotInstalled
from subpage.html import picture

PAGE, SUBPAGE = 4096, 128
OPEN = 0xFFFF_FFFF


class Bitmap(Sequence[int]):
    """The bitmaps of consecutive pages; item i is that of page ``gfn + i``.

    ``words`` is a ``memoryview`` of them, which numpy takes without a copy; ``etag`` goes with ``set_subpages``. ::

        >>> bitmap = Bitmap(0x10, [0xFFFFFFFE, 0xFFFFFFFF])
        >>> bitmap[0], bitmap.writable(0x10040), bitmap.writable(0x10080)
        (4294967294, False, True)
        >>> print(bitmap)
        0x10  .###############################
        0x11  ################################
    """

    def __init__(self, gfn: int, words: Sequence[int] | bytes, etag: str | None = None) -> None:
        self.gfn, self.etag = gfn, etag
        self.words: memoryview = memoryview(of_wire(words) if isinstance(words, bytes) else array("I", words))

    @overload
    def __getitem__(self, index: int) -> int: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[int]: ...
    def __getitem__(self, index: int | slice) -> int | Sequence[int]:
        found: Any = self.words[index]
        return list(found) if isinstance(index, slice) else int(found)

    def __len__(self) -> int:
        return len(self.words)

    def __iter__(self) -> Iterator[int]:
        return iter(self.words.tolist())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Bitmap) and (self.gfn, self.words) == (other.gfn, other.words)

    __hash__ = None  # type: ignore[assignment]

    def writable(self, gpa: int) -> bool:
        """Whether the sub-page of an address may be written. Raises IndexError outside of these pages."""
        page = (gpa // PAGE) - self.gfn
        if not 0 <= page < len(self.words):
            raise IndexError(f"{gpa:#x} is in none of the {len(self.words)} pages from {self.gfn:#x} on")
        return bool(self[page] >> (gpa % PAGE // SUBPAGE) & 1)

    def numpy(self) -> Any:
        """An array of ``uint32`` over the same memory. Raises NotInstalled."""
        return library("numpy").frombuffer(self.words, dtype="uint32")

    def __str__(self) -> str:
        rows = ("".join("#" if word >> bit & 1 else "." for bit in range(32)) for word in self)
        return "\n".join(f"{self.gfn + number:#x}  {row}" for number, row in enumerate(rows))

    def __repr__(self) -> str:
        return f"Bitmap({self.gfn:#x}, {len(self)} pages, {sum((~word & OPEN).bit_count() for word in self)} shut)"

    def _repr_html_(self) -> str:
        return picture(self.gfn, self.words.tolist() if len(self) < 10_000 else list(self.words[:10_000]))


def of_wire(data: bytes) -> array[int]:
    """Little-endian words as the service sends them."""
    words = array("I")
    words.frombytes(data[: len(data) // 4 * 4])
    if sys.byteorder == "big":
        words.byteswap()
    return words


def to_wire(access: Any) -> bytes:
    """One word, several, or a buffer of ``uint32``, little-endian. Raises BadInput."""
    if isinstance(access, bytes):
        return access
    try:
        given = [access] if isinstance(access, (int, str)) else access.words if isinstance(access, Bitmap) else access
        words = array("I", [int(word, 0) if isinstance(word, str) else int(word) for word in given])
    except (TypeError, ValueError, OverflowError):
        raise BadInput(f"access: must be words of 32 bits, as integers or as '0x…', not {access!r:.60}") from None
    if sys.byteorder == "big":
        words.byteswap()
    return words.tobytes()


def library(name: str) -> Any:
    """One of the libraries that the client uses where it is there. Raises NotInstalled."""
    try:
        return importlib.import_module(name)
    except ImportError:
        raise NotInstalled(f"{name} is not installed: pip install 'subpage-client[{name}]'") from None
