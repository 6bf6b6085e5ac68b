"""Raw images: bytes of memory from one address on, and nothing else."""

from __future__ import annotations

from collections.abc import Iterator

from engine.errors import InvalidValue
from engine.images.base import TOP, Block, Image, ImageStream


class Raw(Image):
    """A raw image for ``gpa`` on."""

    format = "raw"

    def __init__(self, stream: ImageStream, gpa: int) -> None:
        super().__init__(stream)
        if not 0 <= gpa < TOP:
            raise InvalidValue("must lie below 2^52", field="gpa", value=gpa)
        self._gpa = gpa

    def _blocks(self) -> Iterator[Block]:
        at = self._gpa
        if self._passing:
            self._stream.drain()
            at += self._stream.offset
            self.ranges.add(self._gpa, self._stream.offset, 0)
        while len((block := self._next(at, TOP - at)).data):
            self.ranges.add(at, len(block.data), block.offset)
            yield block
            at += len(block.data)
        if at == self._gpa:
            raise InvalidValue("must not be empty", field="body")
        if at == TOP:
            raise InvalidValue(f"must lie below 2^52; byte {self._stream.offset} does not", field="body", value=hex(at))
