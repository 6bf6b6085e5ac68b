"""LiME images: before each range of memory a header of 32 bytes (LiME, src/lime.h: ``lime_mem_range_header``)."""

from __future__ import annotations

import struct
from collections.abc import Iterator

from engine.errors import InvalidValue
from engine.images.base import Block, Image

# Magic, version, first address, last address, eight reserved bytes. A header is written as the machine keeps it.
_HEADER = struct.Struct("<IIQQ8x")
_MAGIC = 0x4C694D45
_VERSION = 1
# One for each 16 MiB, as AVML writes them, reaches 1 TiB.
_MOST_HEADERS = 1 << 16


class Lime(Image):
    """A LiME image of version 1."""

    format = "lime"

    def _blocks(self) -> Iterator[Block]:
        headers = 0
        while self._stream.peek(1):
            offset = self._stream.offset
            headers += 1
            if headers > _MOST_HEADERS:
                rule = f"an image has {_MOST_HEADERS} headers at most; there is another at byte {offset}"
                raise InvalidValue(rule, field="body", value=offset)
            magic, version, first, last = _HEADER.unpack(self._stream.take(_HEADER.size, "a header of LiME"))
            if magic != _MAGIC:
                rule = f"must be a LiME image: a header with the magic {_MAGIC:#x} is due at byte {offset}"
                raise InvalidValue(rule, field="body", value=hex(magic))
            if version != _VERSION:
                rule = f"must be LiME of version {_VERSION}, uncompressed; the header at byte {offset} says another"
                raise InvalidValue(rule, field="body", value=version)
            if last < first:
                rule = f"the last address of a range, {last:#x}, must not lie below its first; header at byte {offset}"
                raise InvalidValue(rule, field="body", value=hex(first))
            size = last - first + 1
            self.ranges.add(first, size, offset)
            yield from self._exactly(first, size, f"the range {first:#x} to {last:#x}")
        if not self._stream.offset:
            raise InvalidValue("must not be empty", field="body")
