"""C structures as tables: bytes to fields and back, without losing a bit.

A layout lists its fields with offset and size. The gaps between them become byte fields called ``reserved_<offset>``,
so every byte of the structure has a name and ``encode(decode(data)) == data`` for any contents and any length.

The JSON form of a field is a decimal number for counts and sizes, a ``"0x…"`` string for every other word and a
lower-case hex string for byte ranges. A byte range that holds only zeros is left out. Input is looser: words may be
numbers or strings, absent fields are zero. Little-endian throughout.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from engine.errors import InvalidValue

PARTIAL = "partial"

_NUMBER = re.compile(r"0x[0-9a-fA-F]+|[0-9]+")
_LONGEST_NUMBER = 32
_HEX = re.compile(r"(?:[0-9a-fA-F]{2})*")


class Field(NamedTuple):
    """One field. ``kind`` is ``word`` (hexadecimal in JSON), ``count`` (decimal) or ``bytes``."""

    name: str
    offset: int
    size: int
    kind: str = "word"

    @property
    def end(self) -> int:
        """Offset of the first byte after the field."""
        return self.offset + self.size


def parse_integer(value: Any, field: str, bits: int) -> int:
    """``value`` as an unsigned integer of ``bits`` bits: a number, a decimal string or a ``0x`` string.

    Raises InvalidValue when it is none of these or does not fit.
    """
    number = value
    if isinstance(value, str):
        plain = len(value) <= _LONGEST_NUMBER and _NUMBER.fullmatch(value)
        number = int(value, 16 if value.startswith("0x") else 10) if plain else None
    if isinstance(number, bool) or not isinstance(number, int) or not 0 <= number < 1 << bits:
        raise InvalidValue(f"must be an unsigned {bits}-bit integer or a 0x string", field=field, value=value)
    return number


def parse_bytes(value: Any, field: str, limit: int | None = None) -> bytes:
    """``value``, a hex string without 0x, as bytes, at most ``limit`` of them. Raises InvalidValue."""
    data = bytes.fromhex(value) if isinstance(value, str) and _HEX.fullmatch(value) else None
    if data is None:
        raise InvalidValue("must be a string of hex digits, two for each byte", field=field, value=value)
    if limit is not None and len(data) > limit:
        raise InvalidValue(f"must be at most {limit} bytes", field=field, value=value)
    return data


class Layout:
    """A structure of ``size`` bytes. ``fields`` may be given in any order and must not overlap."""

    def __init__(self, name: str, size: int, fields: Iterable[Field]) -> None:
        self.name = name
        self.size = size
        self.named = tuple(sorted(fields, key=lambda field: field.offset))
        self.fields = tuple(_with_gaps(name, size, self.named))
        self.by_name = {field.name: field for field in self.fields}
        self._spans = {field.name: slice(field.offset, field.end) for field in self.fields}

    def __contains__(self, name: str) -> bool:
        return name in self.by_name

    def get(self, data: bytes | bytearray, name: str) -> int:
        """The word called ``name`` in ``data``."""
        return int.from_bytes(data[self._spans[name]], "little")

    def put(self, data: bytearray, name: str, value: int) -> None:
        """Store ``value``, cut to the width of the field, in ``data``."""
        field = self.by_name[name]
        data[field.offset : field.end] = (value & ((1 << 8 * field.size) - 1)).to_bytes(field.size, "little")

    def decode(self, data: bytes) -> dict[str, Any]:
        """``data`` as JSON fields. Shorter data gives the fields it holds whole; a cut one is ``partial``, in hex."""
        if len(data) > self.size:
            raise InvalidValue(f"must have {self.size} bytes at most", field=self.name, value=len(data))
        document: dict[str, Any] = {}
        for field in self.fields:
            if field.offset >= len(data):
                break
            raw = data[field.offset : field.end]
            if field.kind == "bytes":
                if any(raw):
                    document[field.name] = raw.hex()
            elif len(raw) < field.size:
                document[PARTIAL] = raw.hex()
            else:
                number = int.from_bytes(raw, "little")
                document[field.name] = number if field.kind == "count" else hex(number)
        return document

    def encode(self, document: Mapping[str, Any], length: int | None = None) -> bytes:
        """The first ``length`` bytes (all when None) of the structure that ``document`` describes.

        Raises InvalidValue for unknown names, values that do not fit and fields that lie beyond ``length``.
        """
        end = self.size if length is None else length
        data = bytearray(end)
        for name, value in document.items():
            where = f"{self.name}.{name}"
            if name == PARTIAL:
                self._put_partial(data, value, where)
                continue
            field = self.by_name.get(name)
            if field is None:
                raise InvalidValue(f"must be a field of {self.name}", field=where, value=value)
            if field.kind == "bytes":
                room = max(0, min(field.size, end - field.offset))
                raw = parse_bytes(value, where, room)
                data[field.offset : field.offset + len(raw)] = raw
                continue
            number = parse_integer(value, where, 8 * field.size)
            if field.end > end:
                raise InvalidValue(f"must lie in the {end} bytes that are present", field=where, value=value)
            data[field.offset : field.end] = number.to_bytes(field.size, "little")
        return bytes(data)

    def _put_partial(self, data: bytearray, value: Any, where: str) -> None:
        cut = next((field for field in self.fields if field.offset < len(data) < field.end), None)
        if cut is None or cut.kind == "bytes":
            raise InvalidValue("must be left out: no field is cut at this length", field=where, value=value)
        raw = parse_bytes(value, where, len(data) - cut.offset)
        data[cut.offset : cut.offset + len(raw)] = raw


def _with_gaps(name: str, size: int, fields: tuple[Field, ...]) -> Iterable[Field]:
    position = 0
    for field in fields:
        if field.offset < position or field.end > size:
            raise ValueError(f"{name}.{field.name} overlaps its neighbour or the end of the structure")
        if field.offset > position:
            yield _gap(position, field.offset)
        yield field
        position = field.end
    if position < size:
        yield _gap(position, size)


def _gap(start: int, end: int) -> Field:
    return Field(f"reserved_{start}", start, end - start, "bytes")
