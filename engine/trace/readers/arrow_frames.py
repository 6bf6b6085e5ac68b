"""The message framing of an Arrow IPC stream.

A stream is a run of messages: the word 0xFFFFFFFF, the length of the metadata, the metadata (a flatbuffer), the body; a
length of zero ends it (Arrow columnar format, "IPC Streaming Format"). A stream that just stops cannot be told from a
complete one, so the end must be marked.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from engine.errors import TraceError
from engine.trace.readers.base import PIECE_BYTES, Source, read_into, read_up_to
from engine.trace.readers.flatbuffer import Table

MAX_METADATA_BYTES = 16 << 20

CONTINUATION = 0xFFFFFFFF
SCHEMA, DICTIONARY_BATCH, RECORD_BATCH = 1, 2, 3  # Message.header_type
# Fields of the table Message
MESSAGE_VERSION, MESSAGE_HEADER_TYPE, MESSAGE_HEADER, MESSAGE_BODY_LENGTH = 0, 1, 2, 3
# Bodies lie in memory at multiples of what Arrow recommends.
ALIGNMENT = 64


class Message(NamedTuple):
    """One message, whose body is still to be read: what it is, what it says, how long its body is."""

    version: int
    header_type: int
    header: Table
    body_length: int


class Messages:
    """The messages of a source. Each body is read with ``body`` or left out before the next message is asked for."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._unread = 0
        self.taken = 0  # bytes of the stream
        self._scratch = np.empty(PIECE_BYTES, dtype=np.uint8)  # for what is not wanted

    def __iter__(self) -> Iterator[Message]:
        """Up to the mark at the end. Raises ``TraceError`` without an index."""
        first = True
        while (metadata := self._metadata(first)) is not None:
            first = False
            try:
                message = Table.root(metadata)
                found = Message(
                    message.scalar(MESSAGE_VERSION, "<h"),
                    message.scalar(MESSAGE_HEADER_TYPE, "<B"),
                    message.child(MESSAGE_HEADER),
                    message.scalar(MESSAGE_BODY_LENGTH, "<q"),
                )
            except struct.error as error:
                raise TraceError("an Arrow message is not valid") from error
            if found.body_length < 0:
                raise TraceError("an Arrow message is not valid", value=found.body_length)
            self._unread = found.body_length
            yield found
            self._skip(self._unread)

    def body(self, ranges: list[tuple[int, int]], memory: npt.NDArray[np.uint8]) -> tuple[npt.NDArray[np.uint8], Body]:
        """The parts of the message's body at these offsets and lengths; others are not kept.

        They are in ``memory``, or in what is given back with them where that is too small.
        """
        spans = _spans(ranges)
        need = spans[-1].at + spans[-1].end - spans[-1].start if spans else 0
        if len(memory) < need:
            memory = np.empty(need, dtype=np.uint8)
        done = 0
        for span in spans:
            self._skip(span.start - done)
            target = memory[span.at : span.at + span.end - span.start]
            self._took(read_into(self._source, target.data), len(target))
            done = span.end
        self._skip(self._unread)  # before anything is made of it: a body that is cut off is none
        return memory, Body(memory, spans)

    def finish(self) -> None:
        """Check that nothing follows the mark at the end."""
        if self._source.read(1):
            raise TraceError("bytes follow the end of the Arrow stream")

    def _metadata(self, first: bool) -> bytes | bytearray | None:
        """That of the next message; None for the mark at the end."""
        prefix = read_up_to(self._source, 4)
        if not prefix and not first:
            raise TraceError("the Arrow stream is cut off: it has no end-of-stream mark")
        if len(prefix) < 4:
            raise TraceError("the body is not an Arrow IPC stream")
        length = int.from_bytes(prefix, "little")
        if length == CONTINUATION:  # streams written before Arrow 0.15 lack this word
            length = int.from_bytes(self._take(4), "little")
        if prefix == b"ARRO":
            raise TraceError("the body is an Arrow IPC file; the stream format is needed")
        if length > MAX_METADATA_BYTES:
            raise TraceError("the body is not an Arrow IPC stream" if first else "an Arrow message is not valid")
        return self._take(length) if length else None

    def _take(self, size: int) -> bytes | bytearray:
        data = read_up_to(self._source, size)
        self.taken += len(data)
        if len(data) < size:
            raise TraceError("the Arrow stream is cut off")
        return data

    def _skip(self, size: int) -> None:
        while size:
            piece = min(size, PIECE_BYTES)
            self._took(read_into(self._source, self._scratch[:piece].data), piece)
            size -= piece

    def _took(self, size: int, wanted: int) -> None:
        self._unread -= size
        self.taken += size
        if size < wanted:
            raise TraceError("the Arrow stream is cut off")


class _Span(NamedTuple):
    """A run of bytes of a body, and where it is in memory."""

    start: int
    end: int
    at: int


class Body(NamedTuple):
    """Parts of a body in memory."""

    memory: npt.NDArray[np.uint8]
    spans: list[_Span]

    def view(self, offset: int, length: int) -> npt.NDArray[np.uint8]:
        """Bytes that are within one of the parts."""
        for span in self.spans:
            if span.start <= offset and offset + length <= span.end:
                at = span.at + offset - span.start
                return self.memory[at : at + length]
        assert not length
        return self.memory[:0]


def size_of(ranges: list[tuple[int, int]]) -> int:
    """The memory that such parts of a body take."""
    spans = _spans(ranges)
    return spans[-1].at + spans[-1].end - spans[-1].start if spans else 0


def _spans(ranges: list[tuple[int, int]]) -> list[_Span]:
    """Some ranges in order, those that touch each other as one."""
    merged: list[list[int]] = []
    for offset, length in sorted(ranges):
        if merged and offset <= merged[-1][1]:
            merged[-1][1] = max(merged[-1][1], offset + length)
        elif length:
            merged.append([offset, offset + length])
    spans, at = [], 0
    for start, end in merged:
        spans.append(_Span(start, end, at + start % ALIGNMENT))
        at += -(-(end - start + start % ALIGNMENT) // ALIGNMENT) * ALIGNMENT
    return spans
