"""Compressed bodies, decoded while they arrive: what each call gives is bounded, whatever the body claims."""

from __future__ import annotations

import lzma
import zlib
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Protocol

import zstandard

from engine.errors import TraceError
from engine.trace.columns import MalformedBody

# What is decoded at one time, so that a body of a few bytes cannot hold its reader or the memory.
PIECE = 1 << 18
# zstd gives no bound on what a call returns. A block has at least 4 bytes and decodes to 128 KiB at most, so a slice of
# this many bytes decodes to 8 MiB at most.
_ZSTD_SLICE = 256
# What a body may become: so many times what was sent of it, and these bytes in any case. Traces of one repeated record
# come to some hundreds; zstd itself would go to 32,000.
RATIO = 1000
ANYWAY = 64 << 20
# Members of gzip, streams of xz and frames of zstd without content that one body may have.
_MOST_EMPTY = 256
# RFC 9659: a decoder of the HTTP coding needs no larger window. ``zstd --long`` files are told so.
_ZSTD_WINDOW = 1 << 23
# What xz -9 needs to decode.
_XZ_MEMORY = 80 << 20


class Source(Protocol):
    """As those of readers: blocking; nothing means the end."""

    def read(self, size: int = -1, /) -> bytes:
        """Up to ``size`` bytes."""


class Decoder(Protocol):
    """One coded body. Faults raise what the library raises, one of FAULTS."""

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
            raise MalformedBody(rule, field="body")


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
            piece = self._member.decompress(data, PIECE)
            data = self._member.unconsumed_tail or self._member.unused_data
            while piece:
                self._empty.has_content = True
                yield piece
                # Input that is used up may still have output waiting.
                piece = self._member.decompress(b"", PIECE) if not data and len(piece) == PIECE else b""

    @property
    def complete(self) -> bool:
        return self._begun and self._member.eof


class Zstandard:
    """RFC 8878: one frame after the other, with windows of at most so many bytes."""

    def __init__(self, window: int = _ZSTD_WINDOW) -> None:
        self._context = zstandard.ZstdDecompressor(max_window_size=window)
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


class Xz:
    """The .xz format: one stream after the other."""

    def __init__(self) -> None:
        self._stream = self._new()
        self._empty = _Empty("xz")
        self._begun = False

    @staticmethod
    def _new() -> lzma.LZMADecompressor:
        return lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=_XZ_MEMORY)

    def feed(self, data: bytes) -> Iterator[bytes]:
        while data:
            if self._stream.eof:
                data = data.lstrip(b"\0")  # streams are padded with them
                if not data:
                    return
                self._empty.next_one()
                self._stream = self._new()
            self._begun = True
            piece = self._stream.decompress(data, PIECE)
            while piece:
                self._empty.has_content = True
                yield piece
                more = not self._stream.eof and not self._stream.needs_input
                piece = self._stream.decompress(b"", PIECE) if more else b""
            data = self._stream.unused_data if self._stream.eof else b""

    @property
    def complete(self) -> bool:
        return self._begun and self._stream.eof


FAULTS = (zlib.error, zstandard.ZstdError, lzma.LZMAError)
# By what a file of each begins with.
_MAGIC = {b"\x1f\x8b\x08": "gzip", b"\x28\xb5\x2f\xfd": "zstd", b"\xfd7zXZ\0": "xz"}
DECODERS: Mapping[str, Callable[[], Decoder]] = MappingProxyType({"gzip": Gzip, "zstd": Zstandard, "xz": Xz})


def compression_of(head: bytes | bytearray) -> str | None:
    """How a file is compressed that begins so, a name in DECODERS; None where it is not."""
    return next((name for magic, name in _MAGIC.items() if head.startswith(magic)), None)


def too_much(given: int, sent: int) -> str | None:
    """The rule that a body breaks of which so many bytes were sent, if it may not become as many as were given."""
    if given <= max(ANYWAY, RATIO * sent):
        return None
    return f"must not decode to more than {ANYWAY} bytes and {RATIO} times what is sent"


def decoded(head: bytes | bytearray, source: Source, limit: int) -> Source | None:
    """What a source gives when it is decoded, which begins with ``head``; None where it is not compressed.

    Reading raises TraceError past ``limit`` bytes, 0 for no limit, or what so many bytes may become, MalformedBody for
    a body that is not what it begins as.
    """
    name = compression_of(head)
    return None if name is None else _Decoded(name, DECODERS[name](), source, limit)


class _Decoded:
    def __init__(self, name: str, decoder: Decoder, source: Source, limit: int) -> None:
        self._name = name
        self._decoder = decoder
        self._source = source
        self._limit = limit
        self._pieces: Iterator[bytes] = iter(())
        self._left = memoryview(b"")
        self._sent = self._given = 0
        self._ended = False

    def read(self, size: int = -1, /) -> bytes:
        """Up to ``size`` bytes, nothing at the end."""
        while not self._left and not self._ended:
            self._left = memoryview(self._next())
        part = self._left if size < 0 else self._left[:size]
        self._left = self._left[len(part) :]
        return bytes(part)

    def _next(self) -> bytes:
        try:
            piece = next(self._pieces, b"")
        except FAULTS as fault:
            raise self._malformed() from fault
        if not piece:
            data = self._source.read(PIECE)
            self._sent += len(data)
            self._pieces = self._decoder.feed(bytes(data))
            if not data:
                self._ended = True
                if not self._decoder.complete:
                    raise self._malformed()
            return b""
        self._given += len(piece)
        if self._limit and self._given > self._limit:
            raise TraceError(f"must be at most {self._limit} bytes when decoded", field="body")
        if (rule := too_much(self._given, self._sent)) is not None:
            raise TraceError(rule, field="body")
        return piece

    def _malformed(self) -> MalformedBody:
        return MalformedBody(f"must be a complete {self._name} stream", field="body")
