"""Parquet files whose directories lie: taken apart, changed, and put together again."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

# Fields of FileMetaData, RowGroup, ColumnChunk and ColumnMetaData.
NUM_ROWS, ROW_GROUPS, COLUMNS, METADATA, VALUES, PATH = 3, 4, 1, 3, 5, 3
# Types of the compact protocol of Thrift.
_FALSE, _BYTE, _I64, _DOUBLE, _BINARY, _LIST, _STRUCT = 2, 3, 6, 7, 8, 9, 12

_MORE = 1 << 17

Tree = dict[int, Any]  # the fields of a struct: (type, value) by number; a list has (type, elements) as its value


def refooted(body: bytes, change: Callable[[Tree], None]) -> bytes:
    """The file with its directory changed."""
    length = int.from_bytes(body[-8:-4], "little")
    tree, _ = _read(body[-8 - length : -8], 0, _STRUCT)
    change(tree)
    footer = _written(_STRUCT, tree)
    return body[: -8 - length] + footer + len(footer).to_bytes(4, "little") + b"PAR1"


def rows(count: int) -> Callable[[Tree], None]:
    """Another number of records in all, as the directory says it."""

    def change(tree: Tree) -> None:
        tree[NUM_ROWS] = (_I64, count)

    return change


def chunks(tree: Tree, group: int = 0) -> list[Tree]:
    """The columns of a row group."""
    found: list[Tree] = tree[ROW_GROUPS][1][1][group][COLUMNS][1][1]
    return found


def values(count: int, *, everywhere: bool = True, agreed: bool = True) -> Callable[[Tree], None]:
    """Another number of values in the chunks of the first row group, or in its first one; ``agreed`` with the number of
    records."""

    def change(tree: Tree) -> None:
        more = count - chunks(tree)[0][METADATA][1][VALUES][1]
        for chunk in chunks(tree) if everywhere else chunks(tree)[:1]:
            chunk[METADATA][1][VALUES] = (_I64, count)
        if agreed:
            tree[NUM_ROWS] = (_I64, tree[NUM_ROWS][1] + more)

    return change


def _below(tree: Tree) -> None:
    """A part below 0, which the other one makes up for."""
    for group, factor in ((0, -1), (1, 3)):
        for chunk in chunks(tree, group):
            chunk[METADATA][1][VALUES] = (_I64, factor * chunk[METADATA][1][VALUES][1])


def _repeated(tree: Tree) -> None:
    chunks(tree).append(chunks(tree)[0])


def _missing(tree: Tree) -> None:
    del chunks(tree)[0]


def _unnamed(tree: Tree) -> None:
    """What nobody looks for is named, and says more than there is: the library goes by the place."""
    for chunk in chunks(tree):
        chunk[METADATA][1][PATH] = (_LIST, (_BINARY, [b"other"]))
    values(_MORE)(tree)


# Of a file whose first two row groups are equally long.
LIES: Mapping[str, Callable[[Tree], None]] = {
    "no records": rows(0),
    "one record": rows(1),
    "records below 0": rows(-(1 << 60)),
    "more records": rows(_MORE),
    "a column of fewer values": values(1, everywhere=False, agreed=False),
    "columns of fewer values": values(1),
    "columns of more values": values(_MORE),
    "values below 0": values(-1),
    "values below 0 that others make up for": _below,
    "a column twice": _repeated,
    "a column missing": _missing,
    "columns named otherwise": _unnamed,
}


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        value |= (data[at] & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if data[at - 1] < 0x80:
            return value, at


def _read(data: bytes, at: int, kind: int) -> tuple[Any, int]:
    if kind == _STRUCT:
        tree: Tree = {}
        number = 0
        while head := data[at]:
            at += 1
            if head >> 4:
                number += head >> 4
            else:
                number, at = _varint(data, at)
                number = number >> 1
            if head & 15 <= _FALSE:
                tree[number] = (head & 15, None)
            else:
                value, at = _read(data, at, head & 15)
                tree[number] = (head & 15, value)
        return tree, at + 1
    if kind == _LIST:
        head, at = data[at], at + 1
        count = head >> 4
        if count == 15:
            count, at = _varint(data, at)
        items = []
        for _ in range(count):
            item, at = _read(data, at, head & 15)
            items.append(item)
        return (head & 15, items), at
    if kind in (_BYTE, _DOUBLE):
        end = at + (1 if kind == _BYTE else 8)
        return data[at:end], end
    value, at = _varint(data, at)
    if kind == _BINARY:
        return data[at : at + value], at + value
    return value >> 1 ^ -(value & 1), at


def _wide(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def _written(kind: int, value: Any) -> bytes:
    if kind == _STRUCT:
        parts, last = [], 0
        for number, (inner, member) in sorted(value.items()):
            parts.append(bytes([(number - last) << 4 | inner]) + (b"" if inner <= _FALSE else _written(inner, member)))
            last = number
        return b"".join(parts) + b"\0"
    if kind == _LIST:
        inner, items = value
        head = bytes([len(items) << 4 | inner]) if len(items) < 15 else bytes([0xF0 | inner]) + _wide(len(items))
        return head + b"".join(_written(inner, item) for item in items)
    if kind in (_BYTE, _DOUBLE):
        return bytes(value)
    if kind == _BINARY:
        return _wide(len(value)) + bytes(value)
    return _wide((value << 1 ^ value >> 63) & (1 << 64) - 1)
