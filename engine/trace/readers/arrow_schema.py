"""The schema of an Arrow IPC stream: what its columns hold, and which buffers of a batch are theirs.

Columns that a trace uses are flat: integers, numbers, bits and bytes, or a dictionary of these, or runs of numbers. Any
other is stepped over, whatever it is; for that its buffers and those of its children are counted (Arrow columnar
format, "Serialization and interprocess communication", and the tables of Schema.fbs). Nothing is made of a type but a
name, so a schema that refers to one field a million times costs as much as the fields that are allowed.
"""

from __future__ import annotations

import itertools
import struct
from typing import NamedTuple

from engine.errors import TraceError
from engine.trace.readers.flat import Kind, Sort
from engine.trace.readers.flatbuffer import Table

# Columns with the parts of nested ones.
MAX_FIELDS = 1024
MAX_DEPTH = 64

# Fields of the tables
SCHEMA_ENDIANNESS, SCHEMA_FIELDS = 0, 1
FIELD_NAME, FIELD_TYPE_TYPE, FIELD_TYPE, FIELD_DICTIONARY, FIELD_CHILDREN = 0, 2, 3, 4, 5
DICTIONARY_ID, DICTIONARY_INDEX = 0, 1
INT_BITS, INT_SIGNED = 0, 1
FLOAT_PRECISION = 0
UNION_MODE = 0
CELL_WIDTH = 0

# The union Type
INT, FLOAT, BINARY, BOOL, UNION, CELLS, LARGE_BINARY, RUNS, BINARY_VIEW, UTF8_VIEW = 2, 3, 4, 6, 14, 15, 19, 22, 23, 24
# Number of each: its name, and how many buffers it has itself in the metadata of version 5.
TYPES = {
    1: ("null", 0),
    INT: ("int", 2),
    FLOAT: ("float", 2),
    BINARY: ("binary", 3),
    5: ("string", 3),
    BOOL: ("bool", 2),
    7: ("decimal", 2),
    8: ("date", 2),
    9: ("time", 2),
    10: ("timestamp", 2),
    11: ("interval", 2),
    12: ("list", 2),
    13: ("struct", 1),
    UNION: ("union", 1),  # one more when dense
    CELLS: ("fixed_size_binary", 2),
    16: ("fixed_size_list", 1),
    17: ("map", 2),
    18: ("duration", 2),
    LARGE_BINARY: ("large_binary", 3),
    20: ("large_string", 3),
    21: ("large_list", 2),
    RUNS: ("run_end_encoded", 0),
    BINARY_VIEW: ("binary_view", 2),  # and as many as the batch says
    UTF8_VIEW: ("string_view", 2),
    25: ("list_view", 3),
    26: ("large_list_view", 3),
}
VERSION_4 = 3
FLOATS = ("<f2", "<f4", "<f8")


class Stored(NamedTuple):
    """How values lie in a batch: ``dtype`` of numbers or of offsets, "" for bits and for bytes of one ``width``."""

    kind: Kind
    dtype: str = ""
    width: int = 0


class Field(NamedTuple):
    """A column. ``node`` and ``buffer`` are the first of its in a batch, ``views`` how many columns of views precede.

    ``places`` is how the places in dictionary number ``dictionary`` lie, if it has one, ``ends`` how the ends of its
    runs do, if it has runs; ``stored`` is about its values.
    """

    name: str
    stored: Stored
    places: Stored | None
    dictionary: int
    node: int
    buffer: int
    views: int
    ends: Stored | None = None


class Schema(NamedTuple):
    """The columns, and how many nodes, buffers and columns of views each batch has."""

    fields: tuple[Field, ...]
    nodes: int
    buffers: int
    views: int


def read_schema(schema: Table, version: int) -> Schema:
    """What a table Schema says. Raises TraceError, ``struct.error`` and UnicodeDecodeError."""
    if schema.scalar(SCHEMA_ENDIANNESS, "<h"):
        raise TraceError("an Arrow stream must be little-endian")
    count = _Count(version)
    fields = []
    for table in schema.tables(SCHEMA_FIELDS):
        node, buffer, views = count.nodes, count.buffers, count.views
        count.add(table, 0)
        encoding = table.child(FIELD_DICTIONARY) if table.field(FIELD_DICTIONARY) else None
        ends, stored = None, _stored(table)
        if encoding is None and stored.kind.name == TYPES[RUNS][0]:
            ends, stored = _runs(table, stored)
        index = None
        if encoding is not None:
            index = _integers(encoding.child(DICTIONARY_INDEX)) if encoding.field(DICTIONARY_INDEX) else _INT32
        dictionary = 0 if encoding is None else encoding.scalar(DICTIONARY_ID, "<q")
        fields.append(Field(table.text(FIELD_NAME), stored, index, dictionary, node, buffer, views, ends))
    return Schema(tuple(fields), count.nodes, count.buffers, count.views)


def values_of(field: Field) -> Field:
    """The one column of the batches that bring the dictionary of a field."""
    return field._replace(places=None, node=0, buffer=0, views=0)


def buffers_of(stored: Stored) -> int:
    """How many a flat column has: validity and values, and for bytes of any length their offsets."""
    return 3 if stored.kind.sort is Sort.BYTES and stored.dtype else 2


class _Count:
    """Of what the batches have, field by field."""

    def __init__(self, version: int) -> None:
        self._version = version
        self._fields = 0
        self.nodes = self.buffers = self.views = 0

    def add(self, field: Table, depth: int) -> None:
        """A field and what is in it."""
        self._fields += 1
        if self._fields > MAX_FIELDS or depth > MAX_DEPTH:
            rule = f"there may be up to {MAX_FIELDS} columns, with the parts of nested ones, nested {MAX_DEPTH} deep"
            raise TraceError(rule)
        number = INT if field.field(FIELD_DICTIONARY) else field.scalar(FIELD_TYPE_TYPE, "<B")
        if number not in TYPES:
            raise TraceError(f"the column {field.text(FIELD_NAME)[:64]} has a type that is not known", value=number)
        self.nodes += 1
        self.buffers += TYPES[number][1]
        self.views += number in (BINARY_VIEW, UTF8_VIEW)
        if number == UNION:
            self.buffers += field.child(FIELD_TYPE).scalar(UNION_MODE, "<h") == 1
            self.buffers += self._version <= VERSION_4  # these had a validity bitmap
        # The parts of a dictionary's values are in the dictionary, not in the batch, but count as fields.
        before = self.nodes, self.buffers, self.views
        for part in field.tables(FIELD_CHILDREN):
            self.add(part, depth + 1)
        if field.field(FIELD_DICTIONARY):
            self.nodes, self.buffers, self.views = before


_INT32 = Stored(Kind("int32", Sort.INTEGERS), "<i4", 4)


def _stored(field: Table) -> Stored:
    """How the values of a field lie: in the batch, or in its dictionary."""
    number = field.scalar(FIELD_TYPE_TYPE, "<B")
    name = TYPES[number][0] if number in TYPES else ""
    if not name:
        raise TraceError(f"the column {field.text(FIELD_NAME)[:64]} has a type that is not known", value=number)
    if number == INT:
        return _integers(field.child(FIELD_TYPE))
    if number == FLOAT:
        precision = field.child(FIELD_TYPE).scalar(FLOAT_PRECISION, "<h")
        if not 0 <= precision < len(FLOATS):
            raise struct.error("a number of no such precision")
        return Stored(Kind(name, Sort.NUMBERS), FLOATS[precision], 2 << precision)
    if number == BOOL:
        return Stored(Kind(name, Sort.NUMBERS))
    if number in (BINARY, LARGE_BINARY):
        return Stored(Kind(name, Sort.BYTES), "<i4" if number == BINARY else "<i8", 4 if number == BINARY else 8)
    if number == CELLS:
        width = field.child(FIELD_TYPE).scalar(CELL_WIDTH, "<i")
        if width < 0:
            raise struct.error("bytes of a negative length")
        return Stored(Kind(f"{name}[{width}]", Sort.BYTES), "", width)
    return Stored(Kind(name, Sort.OTHER))


def _runs(field: Table, stored: Stored) -> tuple[Stored | None, Stored]:
    """How the ends of runs and their values lie; none, and the column as it is, where the values are no numbers."""
    parts = list(itertools.islice(field.tables(FIELD_CHILDREN), 3))
    if len(parts) != 2 or any(part.field(FIELD_DICTIONARY) for part in parts):
        return None, stored
    ends, values = map(_stored, parts)
    if ends.kind.sort is not Sort.INTEGERS or values.kind.sort not in (Sort.INTEGERS, Sort.NUMBERS):
        return None, stored
    return ends, values


def _integers(kind: Table) -> Stored:
    bits, signed = kind.scalar(INT_BITS, "<i"), kind.scalar(INT_SIGNED, "<B") != 0
    if bits not in (8, 16, 32, 64):
        raise struct.error("integers of no such width")
    sign = "" if signed else "u"
    return Stored(Kind(f"{sign}int{bits}", Sort.INTEGERS), f"<{sign or 'i'}{bits // 8}", bits // 8)
