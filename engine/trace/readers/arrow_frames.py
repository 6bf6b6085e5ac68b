"""The message framing of an Arrow IPC stream, checked before Arrow acts on it.

A stream is a run of messages: the word 0xFFFFFFFF, the length of the metadata, the metadata (a flatbuffer), the body; a
length of zero ends it (Arrow columnar format, "IPC Streaming Format"). Arrow itself takes a stream that just stops for
a complete one and allocates what a message claims, so both are checked here: the end must be marked, and sizes must be
within bounds. Layouts are those of Message.fbs and Schema.fbs of the Arrow format.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

import numpy as np

from engine.errors import TraceError
from engine.trace.readers.base import Source, read_into, read_up_to

MAX_METADATA_BYTES = 16 << 20
MAX_BATCH_BYTES = 1 << 30  # of one message, as sent and decompressed

CONTINUATION = 0xFFFFFFFF
DICTIONARY_BATCH, RECORD_BATCH = 2, 3  # Message.header_type
# Field numbers of the tables that are looked at
MESSAGE_HEADER_TYPE, MESSAGE_HEADER, MESSAGE_BODY_LENGTH = 1, 2, 3
DICTIONARY_DATA = 1
BATCH_BUFFERS, BATCH_COMPRESSION = 2, 3
BUFFER_BYTES = 16  # i64 offset, i64 length


class _Table(NamedTuple):
    """A flatbuffer table at a position of the metadata."""

    data: bytes | bytearray | memoryview
    position: int

    def integer(self, code: str, offset: int) -> int:
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

    def scalar(self, number: int, code: str) -> int:
        position = self.field(number)
        return self.integer(code, position) if position else 0

    def child(self, number: int) -> _Table:
        position = self.field(number)
        if not position:
            raise struct.error("missing table")
        return _Table(self.data, position + self.integer("<I", position))


class MessageSource:
    """A file-like object that hands a stream to Arrow message by message. Raises ``TraceError`` without an index.

    A record batch is valid until the next one is read.
    """

    closed = False

    def __init__(self, source: Source) -> None:
        self._source = source
        self._pieces: list[memoryview] = []
        self._first: list[memoryview] | None = None
        self._ended = False
        self._body = np.empty(0, dtype=np.uint8)
        # Only that it failed: Arrow may keep this object for good, and an exception holds all frames that it passed.
        self.failed = False

    def read(self, size: int = -1) -> memoryview | bytes:
        """Up to ``size`` bytes, never across the pieces of a message, which is how Arrow asks for them."""
        try:
            if not self._pieces and not self._ended:
                self._pieces = self._next_message()
                self._first = self._first or list(self._pieces)
        except Exception:
            self.failed = True
            raise
        if not self._pieces:
            return b""
        piece = self._pieces[0]
        if 0 <= size < len(piece):
            self._pieces[0] = piece[size:]
            return piece[:size]
        del self._pieces[0]
        return piece

    def rewind(self) -> None:
        """Give the first message, the schema, once more. Only valid before the second was asked for."""
        self._pieces = list(self._first or [])

    def finish(self) -> None:
        """Check that nothing follows the mark at the end."""
        if self._source.read(1):
            raise TraceError("bytes follow the end of the Arrow stream")

    def close(self) -> None:
        """The source belongs to the caller."""

    def _take(self, size: int) -> bytes | bytearray:
        data = read_up_to(self._source, size)
        if len(data) < size:
            raise TraceError("the Arrow stream is cut off")
        return data

    def _take_body(self, header_type: int, size: int) -> memoryview:
        """Record batches share one piece of memory, untouched pages of which cost nothing; dictionaries stay."""
        if header_type != RECORD_BATCH:
            return memoryview(self._take(size))
        if len(self._body) < size:
            self._body = np.empty(size, dtype=np.uint8)
        body = self._body.data[:size]
        if read_into(self._source, body) < size:
            raise TraceError("the Arrow stream is cut off")
        return body

    def _next_message(self) -> list[memoryview]:
        prefix = read_up_to(self._source, 4)
        if not prefix and self._first is not None:
            raise TraceError("the Arrow stream is cut off: it has no end-of-stream mark")
        if len(prefix) < 4:
            raise TraceError("the body is not an Arrow IPC stream")
        length = int.from_bytes(prefix, "little")
        if length == CONTINUATION:  # streams written before Arrow 0.15 lack this word
            prefix += self._take(4)
            length = int.from_bytes(prefix[4:], "little")
        if length == 0:
            self._ended = True
            return [memoryview(prefix)]
        if prefix == b"ARRO":
            raise TraceError("the body is an Arrow IPC file; the stream format is needed")
        if length > MAX_METADATA_BYTES:
            what = "the body is not an Arrow IPC stream" if self._first is None else "an Arrow message is not valid"
            raise TraceError(what)
        metadata = self._take(length)
        try:
            root = _Table(metadata, 0)
            message = _Table(metadata, root.integer("<I", 0))
            body_length = message.scalar(MESSAGE_BODY_LENGTH, "<q")
            if not 0 <= body_length <= MAX_BATCH_BYTES:
                raise _too_large(body_length)
            body = self._take_body(message.scalar(MESSAGE_HEADER_TYPE, "<B"), body_length)
            _check_decompressed_size(message, body)
        except struct.error as error:
            raise TraceError("an Arrow message is not valid") from error
        return [memoryview(part) for part in (prefix, metadata, body) if part]


def _check_decompressed_size(message: _Table, body: memoryview) -> None:
    """Add up what the compressed buffers of a batch claim.

    Each starts with its decompressed length as i64, or with -1 if it is stored as it is.
    """
    header_type = message.scalar(MESSAGE_HEADER_TYPE, "<B")
    if header_type not in (DICTIONARY_BATCH, RECORD_BATCH):
        return
    batch = message.child(MESSAGE_HEADER)
    if header_type == DICTIONARY_BATCH:
        batch = batch.child(DICTIONARY_DATA)
    if not batch.field(BATCH_COMPRESSION) or not batch.field(BATCH_BUFFERS):
        return
    position = batch.child(BATCH_BUFFERS).position
    total = 0
    for entry in range(batch.integer("<I", position)):
        start = position + 4 + BUFFER_BYTES * entry
        offset, length = batch.integer("<q", start), batch.integer("<q", start + 8)
        if length:
            total += max(_Table(body, 0).integer("<q", offset), 0)
    if total > MAX_BATCH_BYTES:
        raise _too_large(total)


def _too_large(size: int) -> TraceError:
    return TraceError(f"one Arrow record batch may have up to {MAX_BATCH_BYTES} bytes", value=size)
