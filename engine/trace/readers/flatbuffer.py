"""Tables of a flatbuffer, read in place and within it.

Nothing is believed: a position outside the buffer is a ``struct.error``, as is a table that should be there and is not.
The format is that of the FlatBuffers documentation, "FlatBuffers internals".
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

# A string is copied for each table that names it, and any number can name one of megabytes.
MAX_TEXT = 256


class Table(NamedTuple):
    """A table at a position of the buffer."""

    data: bytes | bytearray | memoryview
    position: int

    @classmethod
    def root(cls, data: bytes | bytearray | memoryview) -> Table:
        """The table that the buffer holds."""
        return cls(data, Table(data, 0).integer("<I", 0))

    def integer(self, code: str, offset: int) -> int:
        """A number, ``code`` as in ``struct``, at an offset of the buffer."""
        if offset < 0:
            raise struct.error("offset before the start")
        value: int = struct.unpack_from(code, self.data, offset)[0]
        return value

    def field(self, number: int) -> int:
        """Position of a field, or 0 when it has its default."""
        vtable = self.position - self.integer("<i", self.position)
        slot = 4 + 2 * number
        offset = self.integer("<H", vtable + slot) if slot + 2 <= self.integer("<H", vtable) else 0
        return self.position + offset if offset else 0

    def scalar(self, number: int, code: str, default: int = 0) -> int:
        """A field that is a number."""
        position = self.field(number)
        return self.integer(code, position) if position else default

    def child(self, number: int) -> Table:
        """A field that is a table."""
        position = self.field(number)
        if not position:
            raise struct.error("missing table")
        return Table(self.data, position + self.integer("<I", position))

    def text(self, number: int) -> str:
        """A field that is a string of up to MAX_TEXT bytes, "" by default. Raises UnicodeDecodeError."""
        if not self.field(number):
            return ""
        at = self.child(number).position
        length = self.integer("<I", at)
        if length > MAX_TEXT:
            raise struct.error(f"a name has more than {MAX_TEXT} bytes")
        if at + 4 + length > len(self.data):
            raise struct.error("a string runs past the end")
        return str(bytes(self.data[at + 4 : at + 4 + length]), "utf-8")

    def tables(self, number: int) -> Iterator[Table]:
        """The tables of a field that is a vector of them; as many as it says, which may be more than it has."""
        if not self.field(number):
            return
        at = self.child(number).position
        for entry in range(self.integer("<I", at)):
            where = at + 4 + 4 * entry
            yield Table(self.data, where + self.integer("<I", where))

    def words(self, number: int, width: int) -> npt.NDArray[np.int64]:
        """A field that is a vector of structs of ``width`` i64 each: int64[n, width]."""
        if not self.field(number):
            return np.zeros((0, width), dtype=np.int64)
        at = self.child(number).position
        count = self.integer("<I", at)
        if at + 4 + 8 * width * count > len(self.data):
            raise struct.error("a vector runs past the end")
        return np.frombuffer(self.data, dtype="<i8", count=width * count, offset=at + 4).reshape(count, width)
