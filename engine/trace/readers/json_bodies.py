"""JSON bodies: ``{"accesses": [...]}`` as one document, and NDJSON with one access per line."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import msgspec

from engine.errors import TraceError
from engine.trace.columns import MalformedBody, TraceChunk
from engine.trace.readers.base import Source, TraceReader, read_up_to
from engine.trace.readers.rows import CHUNK_ROWS, RowConverter

MAX_LINE_BYTES = 1 << 20
BLOCK_BYTES = 1 << 18  # of NDJSON read at a time

# The rows stay undecoded until their chunk is due: bytes are a tenth of the size of objects.
_document = msgspec.json.Decoder(dict[str, msgspec.Raw])
_list = msgspec.json.Decoder(list[msgspec.Raw])


class JsonReader(TraceReader):
    """Reads one JSON document. It is held whole, as bytes; NDJSON is the streaming form."""

    def _chunks(self) -> Iterator[TraceChunk]:
        rows = self._rows()
        converter = RowConverter(self._carry)
        for start in range(0, len(rows), CHUNK_ROWS):
            texts = rows[start : start + CHUNK_ROWS]
            chunk = converter.chunk(texts)
            self.ignored_columns = tuple(converter.ignored)
            yield chunk

    def _rows(self) -> list[msgspec.Raw]:
        parts = []
        while part := self._source.read(1 << 20):
            parts.append(part)
        try:
            document = _document.decode(b"".join(parts))
            del parts
            for field in document:
                if field != "accesses":
                    raise TraceError("the body has the field accesses and no other", field=field)
            if "accesses" not in document:
                raise TraceError("the body must have the field accesses", field="accesses")
            return _list.decode(document["accesses"])
        except msgspec.ValidationError as error:
            raise TraceError(
                "the body must be an object whose field accesses is an array",
                field="accesses",
            ) from error
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise MalformedBody(f"the body is not JSON: {error}") from error


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
            piece = read_up_to(self._source, BLOCK_BYTES)
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
            if len(piece) < BLOCK_BYTES:
                if tail:
                    yield bytes(tail)
                return

    def _line_number(self, lines: list[bytes], row: int) -> int:
        """Number, from 1, of the line that holds the given row of the current block."""
        filled = [number for number, line in enumerate(lines) if line.strip()]
        return self._lines + filled[row] + 1
