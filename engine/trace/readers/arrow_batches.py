"""From the batches of an Arrow IPC stream to flat columns: views of the bytes that were sent, each within its buffer.

The layouts are those of the Arrow columnar format and of Message.fbs. A batch says how many records it has and where
its buffers are; both are checked against each other and against the budget before a byte of the body is read, and no
more is decompressed than the records need, whatever a buffer claims.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from engine.errors import TraceError
from engine.trace.readers.arrow_frames import Body, Message, Messages, size_of
from engine.trace.readers.arrow_schema import Field, Schema, Stored, buffers_of
from engine.trace.readers.budget import Budget
from engine.trace.readers.flat import Bits, Cells, Plain, Sort, Windows
from engine.trace.readers.flatbuffer import Table

# Fields of the tables RecordBatch, DictionaryBatch and BodyCompression
BATCH_LENGTH, BATCH_NODES, BATCH_BUFFERS, BATCH_COMPRESSION, BATCH_VIEWS = range(5)
DICTIONARY_ID, DICTIONARY_DATA, DICTIONARY_IS_DELTA = range(3)
COMPRESSION_CODEC, COMPRESSION_METHOD = 0, 1
CODECS = ("lz4", "zstd")
# A compressed buffer begins with its length in i64, -1 if it is stored as it is.
PREFIX, STORED = 8, -1

Bytes = npt.NDArray[np.uint8]
WHAT = "one Arrow record batch, with the dictionaries before it,"


class Need(NamedTuple):
    """A buffer that is wanted: where it is, and how many bytes the records need of it; None: all."""

    offset: int
    length: int
    need: int | None


class BatchReader:
    """Reads columns of batches that have the layout of ``schema``."""

    def __init__(self, messages: Messages, schema: Schema, budget: Budget) -> None:
        self._messages = messages
        self._schema = schema
        self._budget = budget
        self._taken = 0
        self._rooms: dict[tuple[str, int], Bytes] = {}  # what was decompressed to, used again: fresh pages cost more

    def read(self, message: Message, batch: Table, fields: list[Field]) -> tuple[int, dict[str, Any]]:
        """The number of records and the columns of a batch: what is in it, places in dictionaries as numbers.

        Raises TraceError and ``struct.error``.
        """
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
            count, nulls = nodes[field.node].tolist()
            if count != rows:
                raise _bad(field.name, f"it has {count} values in a batch of {rows} records")
            found = _needs(field, rows, nulls, buffers[first : first + 3].tolist(), message.body_length)
            if codec is None:
                _check_lengths(field.name, found)
            needs[field.name] = found
        body = self._body(needs, codec is not None)
        return rows, {field.name: self._column(field, rows, needs[field.name], body, codec) for field in fields}

    def _extra(self, batch: Table) -> list[int]:
        """How many buffers more each column of views has."""
        counts: list[int] = batch.words(BATCH_VIEWS, 1).ravel().tolist()
        if len(counts) != self._schema.views or (counts and min(counts) < 0):
            raise TraceError("an Arrow record batch does not have the columns of its schema")
        return counts

    def _body(self, needs: dict[str, list[Need]], packed: bool) -> Body:
        """The buffers that are wanted, or of those that are not compressed what is wanted of them."""
        wanted = [need for column in needs.values() for need in column]
        ranges = [
            (need.offset, need.length if packed or need.need is None else need.need) for need in wanted if need.length
        ]
        inflated = sum(need.need or 0 for need in wanted) if packed else 0
        self._taken = size_of(ranges) + inflated
        self._budget.check(self._taken, WHAT)
        return self._messages.body(ranges)

    def _column(self, field: Field, rows: int, needs: list[Need], body: Body, codec: str | None) -> Any:
        stored = field.places or field.stored
        validity, first, *rest = needs
        bitmap = self._buffer(field.name, 0, validity, body, codec) if validity.need else None
        data = self._buffer(field.name, 1, first, body, codec)
        if not rest:
            if stored.kind.sort is Sort.BYTES:
                return Cells(stored.width, data, bitmap)
            return Plain(data.view(stored.dtype), bitmap) if stored.dtype else Bits(data, bitmap)
        offsets = data.view(stored.dtype)
        end = int(offsets[rows]) if rows else 0
        if end < 0 or (codec is None and end > rest[0].length):
            raise _bad(field.name, "its offsets are not within its data")
        if codec is not None:
            self._budget.check(self._taken + end, WHAT)
        return Windows(offsets, self._buffer(field.name, 2, rest[0]._replace(need=end), body, codec), bitmap)

    def _buffer(self, name: str, which: int, need: Need, body: Body, codec: str | None) -> Bytes:
        """The bytes of a column's buffer that the records need."""
        wanted = need.need or 0
        if not wanted:
            return body.memory[:0]
        if codec is None:
            return body.view(need.offset, wanted)
        raw = body.view(need.offset, need.length)
        claimed = int(raw[:PREFIX].view("<i8")[0]) if len(raw) >= PREFIX else 0
        inflated = len(raw) - PREFIX if claimed == STORED else claimed
        if inflated < wanted:
            raise _bad(name, f"a buffer has {inflated} bytes where its records need {wanted}")
        if claimed == STORED:
            return raw[PREFIX : PREFIX + wanted]
        target = self._room(name, which, wanted)
        _inflate(name, raw[PREFIX:], target, codec)
        return target

    def _room(self, name: str, which: int, size: int) -> Bytes:
        """Memory for one buffer of a column, valid until the next batch."""
        room = self._rooms.get((name, which))
        if room is None or len(room) < size:
            room = self._rooms[name, which] = np.empty(size, dtype=np.uint8)
        return room[:size]


def _needs(field: Field, rows: int, nulls: int, buffers: list[list[int]], body_length: int) -> list[Need]:
    """The buffers of a column: validity, then values, or offsets and bytes."""
    stored = field.places or field.stored
    sizes: list[int | None] = [(rows + 7) // 8 if nulls else 0, _size(stored, rows)]
    if buffers_of(stored) == len(sizes) + 1:
        sizes.append(None)
    needs = []
    for (offset, length), need in zip(buffers, sizes, strict=False):
        if offset < 0 or length < 0 or offset + length > body_length:
            raise _bad(field.name, "a buffer is not within its batch")
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
