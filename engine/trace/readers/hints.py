"""Bodies that are not what they were sent as: whoever cannot read one says what it looks like."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from engine.errors import TraceError
from engine.trace.columns import TraceChunk
from engine.trace.readers.base import Source, TraceReader
from engine.trace.readers.formats import mistaken

HEAD_BYTES = 4096


class Remembered:
    """A source whose beginning is remembered while it is read."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self.head = bytearray()

    def read(self, size: int = -1, /) -> bytes:
        """As the source."""
        piece = self._source.read(size)
        if len(self.head) < HEAD_BYTES:
            self.head += piece[: HEAD_BYTES - len(self.head)]
        return piece

    def readinto(self, target: memoryview) -> int:
        """As the source, where it can."""
        in_place = getattr(self._source, "readinto", None)
        if in_place is None:
            piece = self.read(len(target))
            target[: len(piece)] = piece
            return len(piece)
        stored = int(in_place(target))
        if len(self.head) < HEAD_BYTES:
            self.head += target[: min(stored, HEAD_BYTES - len(self.head))]
        return stored

    def __getattr__(self, name: str) -> Any:
        return getattr(self._source, name)


class HintingReader(TraceReader):
    """Another reader, whose errors about the first record say what the body looks like, if that is something."""

    def __init__(self, source: Source, make: Callable[[Source], TraceReader]) -> None:
        super().__init__(source, ())
        self._seen = Remembered(source)
        self._reader = make(self._seen)

    def _chunks(self) -> Iterator[TraceChunk]:
        try:
            for chunk in self._reader:
                self.ignored_columns = self._reader.ignored_columns
                yield chunk
        except TraceError as error:
            hint = None if error.index else mistaken(self._beginning())
            if hint is not None:
                error.rule = f"{error.rule}; {hint}"
                error.args = (error.rule,)
            raise
        self.ignored_columns = self._reader.ignored_columns

    def _beginning(self) -> bytes:
        """Of the body; a file's end is read first."""
        if hasattr(self._source, "seek"):
            seekable: Any = self._source
            seekable.seek(0)
            return bytes(seekable.read(HEAD_BYTES))
        return bytes(self._seen.head)
