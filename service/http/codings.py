"""Coded request bodies (RFC 9110 section 8.4), decoded while they arrive and never past the limit of the call."""

from __future__ import annotations

import asyncio
import zlib
from collections.abc import Callable, Iterator
from typing import Protocol

import zstandard
from starlette.types import Message, Receive

from service.problems import BodyTooLarge, ServiceError

# What is decoded at one time, so that a body of a few bytes cannot hold the event loop or the memory.
_PIECE = 1 << 18
# zstd gives no bound on what a call returns. A block has at least 4 bytes and decodes to 128 KiB at most, so a slice of
# this many bytes decodes to 8 MiB at most.
_ZSTD_SLICE = 256
# What a body may become: so many times what was sent of it, and these bytes in any case. Traces of one repeated record
# come to some hundreds; zstd itself would go to 32,000.
_RATIO = 1000
_ANYWAY = 64 << 20
# Members of gzip and frames of zstd without content that one body may have.
_MOST_EMPTY = 256
# RFC 9659: a decoder of the HTTP coding needs no larger window.
_ZSTD_WINDOW = 1 << 23


class Decoder(Protocol):
    """One coded body. Faults raise what the library raises, a ``zlib.error`` or a ``zstandard.ZstdError``."""

    def feed(self, data: bytes) -> Iterator[bytes]:
        """What ``data`` adds, in bounded pieces."""

    @property
    def complete(self) -> bool:
        """Whether the body may end here."""


class _Empty:
    """Members or frames of one body without content: each costs time, and no limit on what is decoded counts it."""

    def __init__(self, coding: str) -> None:
        self._coding = coding
        self._count = 0
        self.has_content = False

    def next_one(self) -> None:
        """One has ended and another begins. Raises ``malformed-body`` when too many had no content."""
        self._count += not self.has_content
        self.has_content = False
        if self._count > _MOST_EMPTY:
            rule = f"must have at most {_MOST_EMPTY} parts of {self._coding} without content"
            raise ServiceError(rule, field="body", code="malformed-body")


class Gzip:
    """RFC 1952: one member after the other."""

    def __init__(self) -> None:
        self._member = zlib.decompressobj(zlib.MAX_WBITS | 16)
        self._empty = _Empty("gzip")
        self._begun = False

    def feed(self, data: bytes) -> Iterator[bytes]:
        while data:
            if self._member.eof:
                self._empty.next_one()
                self._member = zlib.decompressobj(zlib.MAX_WBITS | 16)
            self._begun = True
            piece = self._member.decompress(data, _PIECE)
            data = self._member.unconsumed_tail or self._member.unused_data
            while piece:
                self._empty.has_content = True
                yield piece
                # Input that is used up may still have output waiting.
                piece = self._member.decompress(b"", _PIECE) if not data and len(piece) == _PIECE else b""

    @property
    def complete(self) -> bool:
        return self._begun and self._member.eof


class Zstandard:
    """RFC 8878: one frame after the other."""

    def __init__(self) -> None:
        self._context = zstandard.ZstdDecompressor(max_window_size=_ZSTD_WINDOW)
        self._frame = self._context.decompressobj()
        self._empty = _Empty("zstd")
        self._begun = False

    def feed(self, data: bytes) -> Iterator[bytes]:
        view = memoryview(data)
        for first in range(0, len(view), _ZSTD_SLICE):
            part = bytes(view[first : first + _ZSTD_SLICE])
            while part:
                if self._frame.eof:
                    self._empty.next_one()
                    self._frame = self._context.decompressobj()
                self._begun = True
                piece = self._frame.decompress(part)
                part = self._frame.unused_data if self._frame.eof else b""
                if piece:
                    self._empty.has_content = True
                    yield piece

    @property
    def complete(self) -> bool:
        return self._begun and self._frame.eof


CODINGS: dict[str, Callable[[], Decoder]] = {"gzip": Gzip, "x-gzip": Gzip, "zstd": Zstandard}
ACCEPTED = "gzip, zstd, identity"


def decoded(receive: Receive, coding: str, limit: int, *, sparse: bool = False) -> Receive:
    """``receive`` with the body decoded.

    Reading raises BodyTooLarge past ``limit`` bytes or, unless it is ``sparse`` (zeros for the most part, which nobody
    keeps), what so many bytes may become, and ``malformed-body`` where the
    body is not what its coding says.
    """
    decoder = CODINGS[coding]()
    pieces: Iterator[bytes] = iter(())
    seen, sent, last, done = 0, 0, False, False

    async def reading() -> Message:
        nonlocal pieces, seen, sent, last, done
        while not done:
            try:
                # Not by the event loop: zstd lets the GIL go for each 128 KiB, and each time waits for those who count.
                piece = await asyncio.to_thread(_gathered, pieces)
            except (zlib.error, zstandard.ZstdError) as fault:
                raise _malformed(coding) from fault
            if piece:
                seen += len(piece)
                if seen > limit:
                    raise BodyTooLarge(f"must be at most {limit} bytes when decoded", field="body")
                if not sparse and seen > max(_ANYWAY, _RATIO * sent):
                    rule = f"must not decode to more than {_ANYWAY} bytes and {_RATIO} times what is sent"
                    raise BodyTooLarge(rule, field="body")
                return {"type": "http.request", "body": piece, "more_body": True}
            if last:
                if not decoder.complete:
                    raise _malformed(coding)
                done = True
                return {"type": "http.request", "body": b"", "more_body": False}
            message = await receive()
            if message["type"] != "http.request":
                return message
            sent += len(message.get("body", b""))
            pieces = decoder.feed(message.get("body", b""))
            last = not message.get("more_body", False)
        return await receive()

    return reading


def _gathered(pieces: Iterator[bytes]) -> bytes:
    """The next of them, together about ``_PIECE`` bytes; empty at their end."""
    parts, size = list[bytes](), 0
    for piece in pieces:
        parts.append(piece)
        size += len(piece)
        if size >= _PIECE:
            break
    return b"".join(parts)


def _malformed(coding: str) -> ServiceError:
    return ServiceError(f"must be a complete {coding} stream", field="body", code="malformed-body")
