"""Bodies that tools wrote: which format it is, where that is not said, and the reader of that format."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from engine.errors import TraceError
from engine.trace.columns import TraceChunk
from engine.trace.compressed import decoded
from engine.trace.option_names import TOOL_FORMATS
from engine.trace.readers.base import Source, TraceReader, read_up_to
from engine.trace.readers.champsim import ChampsimReader
from engine.trace.readers.formats import FORMATS, recognised
from engine.trace.readers.lines import LineReader
from engine.trace.readers.no_traces import unnamed_table, what_else

# Of the beginning of a body, by which it is recognised.
HEAD_BYTES = 1 << 16


class Continued:
    """A source whose beginning was read already."""

    def __init__(self, head: bytes | bytearray, source: Source) -> None:
        self._head = memoryview(head)
        self._source = source

    def read(self, size: int = -1, /) -> bytes:
        """What is left of the beginning, then what the source has."""
        if not self._head:
            return self._source.read(size)
        part = self._head if size < 0 else self._head[:size]
        self._head = self._head[len(part) :]
        return bytes(part)

    def readinto(self, target: memoryview) -> int:
        """The same in place."""
        in_place = getattr(self._source, "readinto", None)
        if not self._head and in_place is not None:
            return int(in_place(target))
        part = self.read(len(target))
        target[: len(part)] = part
        return len(part)


class ToolReader(TraceReader):
    """Reads a body of ``format``, or with ``auto`` one of the format that its beginning shows.

    One that is a file of gzip, zstd or xz is read as what is in it, of which there may be ``longest`` bytes; 0: any.
    """

    def __init__(
        self,
        format: str,
        source: Source,
        carry: Sequence[str],
        *,
        skip_unknown: bool = False,
        columns: str | None = None,
        longest: int = 0,
    ) -> None:
        super().__init__(source, carry)
        self._format = format
        self._named = columns
        self._longest = longest
        self._skip_unknown = skip_unknown

    def _chunks(self) -> Iterator[TraceChunk]:
        head = read_up_to(self._source, HEAD_BYTES)
        source: Source = Continued(head, self._source)
        plain = decoded(head, source, self._longest)
        if plain is not None:
            head = read_up_to(plain, HEAD_BYTES)
            source = Continued(head, plain)
        reader = self._reader(head, source)
        self.taken = reader.taken
        for chunk in reader:
            self.taken, self.ignored_columns = reader.taken, reader.ignored_columns
            self.valued = reader.valued
            yield chunk
        self.taken, self.ignored_columns = reader.taken, reader.ignored_columns

    def _reader(self, head: bytes | bytearray, source: Source) -> TraceReader:
        other = None if self._format in FORMATS else what_else(head)
        if other is not None:
            raise TraceError(f"the body {other}", index=0, field="body")
        tool = FORMATS.get(self._format) or recognised(head) or (FORMATS["csv"] if self._named else None)
        if tool is None:
            names = ", ".join(name for name in TOOL_FORMATS if name != "auto")
            hint = unnamed_table(head) or f"name one with format, of {names}"
            rule = f"the body is of no format that is recognised: {hint}"
            raise TraceError(rule, index=0, field="format", value=self._format)
        if tool.name == "csv":
            from engine.trace.readers.csv_tables import CsvReader  # noqa: PLC0415 - the Arrow library is 33 MB

            return CsvReader(source, self._carry, tool, self._named)
        if self._named is not None:
            raise TraceError(f"goes with csv; this is {tool.name}", field="columns", value=self._named)
        if tool.name == "champsim":
            return ChampsimReader(source, self._carry, tool)
        return LineReader(source, self._carry, tool.fitted(bytes(head)), skip_unknown=self._skip_unknown)
