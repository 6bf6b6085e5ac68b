"""The compact protocol of Thrift, as far as bounding a Parquet file needs it: steps over values and reads numbers.

The format is that of "Thrift compact protocol encoding". Data that ends too early is an IndexError. ``written`` makes
such data, of the few structs that the directory of a small file has.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

TRUE, FALSE, BYTE, I16, I32, I64, DOUBLE, BINARY, LIST, SET, MAP, STRUCT = range(1, 13)
LAST_FIELD = (1 << 15) - 1
MAX_DEPTH = 64


class TooMuch(Exception):
    """More is in the data than its reader may unfold."""


class Walk:
    """A position in the data. ``left`` is how many bytes the library that reads it may come to take for it.

    A struct takes some hundred bytes whatever is in it, and an element of a list takes some.
    """

    STRUCT_BYTES = 512
    ELEMENT_BYTES = 32

    def __init__(self, data: bytes | bytearray, left: int) -> None:
        self.data = data
        self.at = 0
        self.left = left

    def varint(self) -> int:
        """An unsigned number."""
        value = shift = 0
        while True:
            byte = self.data[self.at]
            self.at += 1
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value
            shift += 7
            if shift > 63:
                raise IndexError("a number without an end")

    def integer(self, kind: int = I64) -> int:
        """A signed one. What does not fit its type is refused: others take what fits."""
        value, bits = self.varint(), 32 if kind == I32 else 64
        if value >> bits:
            raise IndexError(f"a number of more than {bits} bits")
        return value >> 1 ^ -(value & 1)

    def binary(self) -> bytes:
        """Bytes."""
        size = self.varint()
        if self.at + size > len(self.data):
            raise IndexError("bytes past the end")
        self.at += size
        return bytes(self.data[self.at - size : self.at])

    def fields(self) -> Iterator[tuple[int, int]]:
        """Number and type of each field of a struct, whose value is read or stepped over before the next.

        Numbers ascend, as every writer has them: of a field that is there twice readers take one or the other, and of
        a number that does not fit 16 bits what fits.
        """
        self._take(self.STRUCT_BYTES)
        last = 0
        while head := self._byte():
            number = last + (head >> 4) if head >> 4 else self.integer()
            if not last < number <= LAST_FIELD:
                raise IndexError("fields that are not in order")
            yield number, head & 15
            last = number

    def elements(self) -> tuple[int, int]:
        """How many elements a list has, and of which type."""
        head = self._byte()
        count = head >> 4 if head >> 4 < 15 else self.varint()
        self._take(self.ELEMENT_BYTES * count)
        return count, head & 15

    def skip(self, kind: int, depth: int = 0) -> None:
        """Step over a value."""
        if depth > MAX_DEPTH:
            raise TooMuch
        if kind in (BYTE, DOUBLE):
            self.at += 1 if kind == BYTE else 8
        elif kind in (I16, I32, I64):
            self.varint()
        elif kind == BINARY:
            size = self.varint()
            self.at += size
        elif kind in (LIST, SET):
            count, inner = self.elements()
            for _ in range(count):
                self._skip_element(inner, depth)
        elif kind == MAP:
            self._skip_map(depth)
        elif kind == STRUCT:
            for _, inner in self.fields():
                self.skip(inner, depth + 1)
        elif kind not in (TRUE, FALSE):
            raise IndexError("a type that is none")
        if self.at > len(self.data):
            raise IndexError("a value past the end")

    def _skip_element(self, kind: int, depth: int) -> None:
        if kind in (TRUE, FALSE):
            self.at += 1
        else:
            self.skip(kind, depth + 1)

    def _skip_map(self, depth: int) -> None:
        count = self.varint()
        self._take(2 * self.ELEMENT_BYTES * count)
        kinds = self._byte() if count else 0
        for _ in range(count):
            self._skip_element(kinds >> 4, depth)
            self._skip_element(kinds & 15, depth)

    def _byte(self) -> int:
        byte = self.data[self.at]
        self.at += 1
        return byte

    def _take(self, size: int) -> None:
        self.left -= size
        if self.left < 0:
            raise TooMuch


# A struct to be written: of each field, by number, its type and value; a list has the type of its elements beside them.
Value = dict[int, tuple[int, Any]]


def written(struct: Value) -> bytes:
    """A struct of integers, bytes, structs and short lists."""
    out = bytearray()
    last = 0
    for number, (kind, value) in struct.items():
        out.append((number - last) << 4 | kind)
        out += _written(kind, value)
        last = number
    return bytes(out) + b"\0"


def _written(kind: int, value: Any) -> bytes:
    if kind in (I32, I64):
        return _varint(value << 1 ^ value >> 63)
    if kind == BINARY:
        return _varint(len(value)) + bytes(value)
    if kind == STRUCT:
        return written(value)
    inner, items = value
    assert kind == LIST and len(items) < 15
    return bytes([len(items) << 4 | inner]) + b"".join(_written(inner, item) for item in items)


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])
