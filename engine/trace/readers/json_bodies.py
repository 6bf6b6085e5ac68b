"""JSON bodies: ``{"accesses": [...]}`` as one document, and NDJSON with one access per line."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from engine.errors import TraceError
from engine.trace.columns import TraceChunk
from engine.trace.readers.base import Source, TraceReader, read_come
from engine.trace.readers.json_rows import BLOCK_BYTES, MAX_LINE_BYTES, DocumentRows
from engine.trace.readers.rows import CHUNK_ROWS, RowConverter

__all__ = ["BLOCK_BYTES", "MAX_LINE_BYTES", "JsonReader", "NdjsonReader"]


class JsonReader(TraceReader):
    """Reads one JSON document a block of whole records at a time."""

    def _chunks(self) -> Iterator[TraceChunk]:
        converter = RowConverter(self._carry)
        for rows in DocumentRows(self._source, converter):
            for start in range(0, len(rows), CHUNK_ROWS):
                chunk = converter.chunk(rows[start : start + CHUNK_ROWS])
                self.ignored_columns = tuple(converter.ignored)
                yield chunk


class NdjsonReader(TraceReader):
    """Reads one JSON object per line. Blank lines are skipped; the last line need not end."""

    def __init__(self, source: Source, carry: Sequence[str]) -> None:
        super().__init__(source, carry)
        self._lines = 0  # in the blocks before the current one
        self._converter = RowConverter(carry)

    def _chunks(self) -> Iterator[TraceChunk]:
        converter = self._converter
        for block in self._blocks():
            lines = block.split(b"\n")
            texts = list(filter(None, map(bytes.strip, lines)))
            for start in range(0, len(texts), CHUNK_ROWS):
                part = texts[start : start + CHUNK_ROWS]
                try:
                    chunk = converter.chunk(part)
                except TraceError as error:
                    if error.index is not None:
                        number = self._line_number(lines, start + error.index - converter.done)
                        error.rule = f"line {number}: {error.rule}"
                        error.args = (error.rule,)
                    raise
                self.ignored_columns = tuple(converter.ignored)
                yield chunk
            self._lines += len(lines)

    def _blocks(self) -> Iterator[bytes]:
        """The body in runs of whole lines, without the line end of the last."""
        tail = bytearray()
        while True:
            piece = read_come(self._source, BLOCK_BYTES)
            cut = piece.rfind(b"\n")
            first = piece.find(b"\n")
            if len(tail) + (len(piece) if first < 0 else first) > MAX_LINE_BYTES:
                rule = f"line {self._lines + 1} is longer than {MAX_LINE_BYTES} bytes"
                raise TraceError(rule, index=self._converter.done)
            if cut >= 0:
                block = bytes(tail + piece[:cut])
                tail = bytearray(piece[cut + 1 :])
                yield block
            else:
                tail += piece
            if not piece:
                if tail:
                    yield bytes(tail)
                return

    def _line_number(self, lines: list[bytes], row: int) -> int:
        """Number, from 1, of the line that holds the given row of the current block."""
        filled = [number for number, line in enumerate(lines) if line.strip()]
        return self._lines + filled[row] + 1
