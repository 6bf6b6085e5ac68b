"""From the batches of an Arrow IPC stream to flat columns: views of the bytes that were sent, each within its buffer.

The layouts are those of the Arrow columnar format and of Message.fbs. A batch says how many records it has and where
its buffers are; both are checked against each other and against the budget before a byte of the body is read, and no
more is decompressed than the records need, whatever a buffer claims.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from engine.errors import TraceError
from engine.trace.readers.arrow_frames import Body, Message, Messages, size_of
from engine.trace.readers.arrow_schema import Field, Schema, Stored, buffers_of
from engine.trace.readers.budget import Budget
from engine.trace.readers.flat import Bits, Cells, Plain, Runs, Sort, Windows
from engine.trace.readers.flatbuffer import Table

# Fields of the tables RecordBatch, DictionaryBatch and BodyCompression
BATCH_LENGTH, BATCH_NODES, BATCH_BUFFERS, BATCH_COMPRESSION, BATCH_VIEWS = range(5)
DICTIONARY_ID, DICTIONARY_DATA, DICTIONARY_IS_DELTA = range(3)
COMPRESSION_CODEC, COMPRESSION_METHOD = 0, 1
CODECS = ("lz4", "zstd")
# A compressed buffer begins with its length in i64, -1 if it is stored as it is.
PREFIX, STORED = 8, -1

# That a column which is used has at most: its own three, or two of ends of runs and two of values.
MOST_BUFFERS = 4

Bytes = npt.NDArray[np.uint8]
Words = npt.NDArray[np.int64]
WHAT = "one Arrow record batch, with the dictionaries before it,"


class Need(NamedTuple):
    """A buffer that is wanted: where it is, and how many bytes the records need of it; None: all."""

    offset: int
    length: int
    need: int | None


@dataclasses.dataclass(slots=True)
class Room:
    """Memory for one batch, used again for another: fresh pages cost more. ``raw`` is for what was sent of it, the
    others for what buffers are decompressed to, by column and which of its buffers."""

    raw: Bytes = dataclasses.field(default_factory=lambda: np.empty(0, dtype=np.uint8))
    inflated: dict[tuple[str, int], Bytes] = dataclasses.field(default_factory=dict)

    def of(self, name: str, which: int, size: int) -> Bytes:
        """That of one buffer."""
        room = self.inflated.get((name, which))
        if room is None or len(room) < size:
            room = self.inflated[name, which] = np.empty(size, dtype=np.uint8)
        return room[:size]


class Wanted(NamedTuple):
    """What is wanted of a batch; ``size`` is the memory that it takes, as sent and inflated."""

    rows: int
    fields: list[Field]
    needs: dict[str, list[Need]]
    codec: str | None
    ranges: list[tuple[int, int]]
    size: int


class Read(NamedTuple):
    """That, as it was sent, and where it is inflated to."""

    wanted: Wanted
    body: Body
    room: Room


class BatchReader:
    """Reads columns of batches that have the layout of ``schema``."""

    def __init__(self, messages: Messages, schema: Schema, budget: Budget) -> None:
        self._messages = messages
        self._schema = schema
        self._budget = budget

    def wanted(self, message: Message, batch: Table, fields: list[Field]) -> Wanted:
        """What the records of a batch need of it. Raises TraceError and ``struct.error``."""
        rows = batch.scalar(BATCH_LENGTH, "<q")
        nodes, buffers = batch.words(BATCH_NODES, 2), batch.words(BATCH_BUFFERS, 2)
        extra = self._extra(batch)
        if len(nodes) != self._schema.nodes or len(buffers) != self._schema.buffers + sum(extra):
            raise TraceError("an Arrow record batch does not have the columns of its schema")
        if rows < 0:
            raise TraceError("an Arrow record batch has a number of records below 0", value=rows)
        codec = _codec(batch)
        needs: dict[str, list[Need]] = {}
        for field in fields:
            first = field.buffer + sum(extra[: field.views])
            found = _needs(field, rows, nodes[field.node :], buffers[first : first + MOST_BUFFERS], message.body_length)
            if codec is None:
                _check_lengths(field.name, found)
            needs[field.name] = found
        wanted = [need for column in needs.values() for need in column]
        packed = codec is not None
        # Of those that are not compressed, what is wanted of them.
        ranges = [
            (need.offset, need.length if packed or need.need is None else need.need) for need in wanted if need.length
        ]
        size = size_of(ranges) + (sum(need.need or 0 for need in wanted) if packed else 0)
        return Wanted(rows, fields, needs, codec, ranges, size)

    def read(self, message: Message, wanted: Wanted, room: Room, beside: int = 0) -> Read:
        """That in ``room``, while others take ``beside`` bytes. Raises TraceError."""
        self._budget.check(beside + wanted.size, WHAT)
        room.raw, body = self._messages.body(wanted.ranges, room.raw)
        return Read(wanted, body, room)

    def columns(self, read: Read) -> dict[str, Any]:
        """The columns of a batch: places in dictionaries as numbers. Raises TraceError. From any thread."""
        needs = read.wanted.needs
        return {field.name: self._column(field, read, needs[field.name]) for field in read.wanted.fields}

    def _extra(self, batch: Table) -> list[int]:
        """How many buffers more each column of views has."""
        counts: list[int] = batch.words(BATCH_VIEWS, 1).ravel().tolist()
        if len(counts) != self._schema.views or (counts and min(counts) < 0):
            raise TraceError("an Arrow record batch does not have the columns of its schema")
        return counts

    def _column(self, field: Field, read: Read, needs: list[Need]) -> Any:
        if field.ends is not None:
            return _runs(field, read, needs)
        stored = field.places or field.stored
        validity, first, *rest = needs
        bitmap = _buffer(field.name, 0, validity, read) if validity.need else None
        data = _buffer(field.name, 1, first, read)
        if not rest:
            if stored.kind.sort is Sort.BYTES:
                return Cells(stored.width, data, bitmap)
            return Plain(data.view(stored.dtype), bitmap) if stored.dtype else Bits(data, bitmap)
        offsets = data.view(stored.dtype)
        rows, codec = read.wanted.rows, read.wanted.codec
        end = int(offsets[rows]) if rows else 0
        if end < 0 or (codec is None and end > rest[0].length):
            raise _bad(field.name, "its offsets are not within its data")
        if codec is not None:
            self._budget.check(read.wanted.size + end, WHAT)
        return Windows(offsets, _buffer(field.name, 2, rest[0]._replace(need=end), read), bitmap)


def _runs(field: Field, read: Read, needs: list[Need]) -> Runs:
    """The column of runs, whose ends ascend and are those of all records."""
    assert field.ends is not None
    _, ends_need, validity, values_need = needs
    ends = _buffer(field.name, 1, ends_need, read).view(field.ends.dtype)
    data = _buffer(field.name, 3, values_need, read)
    bitmap = _buffer(field.name, 2, validity, read) if validity.need else None
    count, rows = len(ends), read.wanted.rows
    if rows and not (count and ends[0] > 0 and ends[-1] >= rows and (ends[1:] > ends[:-1]).all()):
        raise _bad(field.name, f"the ends of its runs do not ascend to its {rows} records")
    stored = Plain(data.view(field.stored.dtype), bitmap) if field.stored.dtype else Bits(data, bitmap)
    return Runs(ends, *stored.part(0, count))


def _buffer(name: str, which: int, need: Need, read: Read) -> Bytes:
    """The bytes of a column's buffer that the records need."""
    wanted = need.need or 0
    if not wanted:
        return read.body.memory[:0]
    codec = read.wanted.codec
    if codec is None:
        return read.body.view(need.offset, wanted)
    raw = read.body.view(need.offset, need.length)
    claimed = int(raw[:PREFIX].view("<i8")[0]) if len(raw) >= PREFIX else 0
    inflated = len(raw) - PREFIX if claimed == STORED else claimed
    if inflated < wanted:
        raise _bad(name, f"a buffer has {inflated} bytes where its records need {wanted}")
    if claimed == STORED:
        return raw[PREFIX : PREFIX + wanted]
    target = read.room.of(name, which, wanted)
    _inflate(name, raw[PREFIX:], target, codec)
    return target


def _needs(field: Field, rows: int, nodes: Words, buffers: Words, body_length: int) -> list[Need]:
    """The buffers of a column: validity, then values, or offsets and bytes; of one with runs those of ends and values.

    ``nodes`` and ``buffers`` begin with its own.
    """
    count, nulls = nodes[0].tolist()
    if count != rows:
        raise _bad(field.name, f"it has {count} values in a batch of {rows} records")
    if field.ends is None:
        return _flat(field.name, field.places or field.stored, rows, nulls, buffers, body_length)
    (runs, _), (values, nulls) = nodes[1:3].tolist()
    if not 0 <= runs <= rows or values != runs:
        raise _bad(field.name, f"it has {runs} runs and {values} values of them in a batch of {rows} records")
    ends = _flat(field.name, field.ends, runs, 0, buffers, body_length)
    return [*ends, *_flat(field.name, field.stored, runs, nulls, buffers[2:], body_length)]


def _flat(name: str, stored: Stored, rows: int, nulls: int, buffers: Words, body_length: int) -> list[Need]:
    sizes: list[int | None] = [(rows + 7) // 8 if nulls else 0, _size(stored, rows)]
    if buffers_of(stored) == len(sizes) + 1:
        sizes.append(None)
    needs = []
    for (offset, length), need in zip(buffers.tolist(), sizes, strict=False):
        if offset < 0 or length < 0 or offset + length > body_length:
            raise _bad(name, "a buffer is not within its batch")
        needs.append(Need(offset, length, need))
    return needs


def _check_lengths(name: str, needs: list[Need]) -> None:
    """Buffers that are not compressed have what their records need."""
    for need in needs:
        if need.need is not None and need.length < need.need:
            raise _bad(name, f"a buffer has {need.length} bytes where its records need {need.need}")


def _size(stored: Stored, rows: int) -> int:
    """Bytes of the first buffer of values."""
    if stored.kind.sort is Sort.BYTES:
        return (rows + 1 if rows else 0) * stored.width if stored.dtype else rows * stored.width
    return rows * stored.width if stored.dtype else (rows + 7) // 8


def _codec(batch: Table) -> str | None:
    if not batch.field(BATCH_COMPRESSION):
        return None
    compression = batch.child(BATCH_COMPRESSION)
    number = compression.scalar(COMPRESSION_CODEC, "<b")
    if not 0 <= number < len(CODECS) or compression.scalar(COMPRESSION_METHOD, "<b"):
        raise TraceError("an Arrow record batch is compressed by lz4 or zstd, buffer by buffer", value=number)
    return CODECS[number]


def _inflate(name: str, data: Bytes, target: Bytes, codec: str) -> None:
    """Fill ``target`` with what ``data`` decompresses to. Its pages are touched as that comes."""
    import pyarrow as pa  # noqa: PLC0415 - 33 MB, which a stream that is not compressed does without

    try:
        with pa.CompressedInputStream(pa.BufferReader(pa.py_buffer(data)), codec) as stream:
            stored = stream.readinto(target.data)
    except (pa.ArrowException, OSError) as error:
        raise _bad(name, str(error)) from error
    if stored < len(target):
        raise _bad(name, f"a buffer decompresses to {stored} bytes where its records need {len(target)}")


def _bad(name: str, rule: str) -> TraceError:
    return TraceError(f"the column {name} is not valid: {rule}", field=name)
