"""``csv``: tables of text with a line of names at the top, and commas, tabs or semicolons between the fields.

Columns have the names that trace columns have, or those that ``columns`` maps to them. Numbers are decimal or ``0x…``;
where JSON takes words, as for ``access``, so does this, and of accesses also what tools write. Blocks of whole lines
go through Arrow's reader: memory stays flat, and the number of a line at fault is known.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from pyarrow import csv

from engine.arch import access as acc
from engine.errors import TraceError
from engine.trace.columns import USABLE, TraceChunk, does_not_fit
from engine.trace.lines.scan import MAX_LINE_BYTES
from engine.trace.readers.base import Source, TraceReader, read_up_to
from engine.trace.readers.columnar import BatchConverter
from engine.trace.readers.flat import Batch, Kind, Sort, Whole
from engine.trace.readers.rows import NAMED
from engine.trace.readers.tool_format import ToolFormat
from engine.trace.taken import shown

BLOCK_BYTES = 1 << 21
MAX_COLUMNS = 256
DELIMITERS = b",\t;"

# What tools write besides the names of accesses.
_WORDS: Mapping[str, int] = {
    **dict.fromkeys(("r", "load", "l", "rd"), acc.READ),
    **dict.fromkeys(("w", "store", "s", "wr"), acc.WRITE),
    **dict.fromkeys(("x", "fetch", "ifetch", "i", "exec"), acc.EXECUTE),
}
_IN_WORDS = ("access", "kind", "linear", "source", "op")
_ROW = re.compile(r"Row #(\d+): ")
_NUMBER = Kind("a number", Sort.INTEGERS)


def parsed_columns(columns: str | None) -> dict[str, str]:
    """``gpa=addr,size=len`` as a mapping from the names of trace columns to those of the table. Raises TraceError."""
    found: dict[str, str] = {}
    for pair in columns.split(",") if columns else ():
        name, equals, given = (part.strip() for part in pair.partition("="))
        if not equals or not given or name not in USABLE or name in found:
            rule = f"must be COLUMN=NAME, with commas between them and each COLUMN once, one of {', '.join(USABLE)}"
            raise TraceError(rule, field="columns", value=columns)
        found[name] = given
    return found


class CsvReader(TraceReader):
    """Reads a table, a block of whole lines at a time. ``columns`` as in ``parsed_columns``."""

    def __init__(self, source: Source, carry: Sequence[str], tool: ToolFormat, columns: str | None) -> None:
        super().__init__(source, carry)
        self._named = parsed_columns(columns)
        self._said = columns
        self.taken = tool.taken({}, ())

    def _chunks(self) -> Iterator[TraceChunk]:
        line = 1
        table: _Table | None = None
        for block in self._blocks():
            if table is None:
                head, _, block = block.removeprefix(b"\xef\xbb\xbf").partition(b"\n")
                table = _Table(head, self._named, self._said, self._carry)
                self.ignored_columns = table.ignored
                line += 1
            if block:
                yield from table.chunks(block, line)
                line += block.count(b"\n")
        if table is None:
            raise TraceError("the table has no line of names at its top", index=0, field="body")

    def _blocks(self) -> Iterator[bytes]:
        """The body in runs of whole lines, each with its end, or without that of the last."""
        tail, lines = b"", 0
        while True:
            piece = read_up_to(self._source, BLOCK_BYTES)
            first, cut = piece.find(b"\n"), piece.rfind(b"\n") + 1
            if len(tail) + (len(piece) if first < 0 else first) > MAX_LINE_BYTES or len(piece) - cut > MAX_LINE_BYTES:
                number = lines + 1 + (piece.count(b"\n") if len(piece) - cut > MAX_LINE_BYTES else 0)
                rule = f"line {number}: the line has more than {MAX_LINE_BYTES} bytes"
                raise TraceError(rule, index=0, field="body")
            if cut:
                yield tail + bytes(piece[:cut])
                lines += piece.count(b"\n")
                tail = bytes(piece[cut:])
            else:
                tail += bytes(piece)
            if len(piece) < BLOCK_BYTES:
                if tail:
                    yield tail
                return


class _Table:
    """What the line of names says, and how blocks of lines below it are read."""

    def __init__(self, head: bytes, named: Mapping[str, str], said: str | None, carry: Sequence[str]) -> None:
        delimiter = max(DELIMITERS, key=head.count)
        titles = [title.strip().strip('"').strip() for title in _text(head).split(chr(delimiter))]
        if len(titles) > MAX_COLUMNS:
            raise TraceError(f"the table may have up to {MAX_COLUMNS} columns", index=0, field="body")
        for name, given in named.items():
            if titles.count(given) != 1:
                rule = f"names the column {given!r} for {name}; the table has {', '.join(titles)}: {shown(head)!r}"
                raise TraceError(rule, index=0, field="columns", value=said)
        ours = {given: name for name, given in named.items()}
        titles = [title if title in ours else _known(title, titles) for title in titles]
        # A column that another is mapped to means nothing under its own name.
        names = [ours.get(title, f"{title} (unmapped)" if title in named else title) for title in titles]
        if "gpa" not in names and "gva" not in names:
            rule = f"the table has no column gpa: name it with columns=gpa=NAME, of {', '.join(titles)}"
            raise TraceError(rule, index=0, field="columns", value=said or shown(head))
        if "arg" in names:
            raise TraceError("arguments of operations do not come in tables", index=0, field="arg")
        self._converter = BatchConverter([(name, _NUMBER) for name in names], carry)
        self.ignored = self._converter.plan.ignored
        self._read = self._converter.names
        types = {name: pa.uint64() for name in self._read}
        types |= {name: pa.dictionary(pa.int32(), pa.string()) for name in self._read if name in _IN_WORDS}
        self._options: dict[str, Any] = {
            "read_options": csv.ReadOptions(
                use_threads=False, block_size=BLOCK_BYTES + 2 * MAX_LINE_BYTES, column_names=names
            ),
            "parse_options": csv.ParseOptions(delimiter=chr(delimiter), ignore_empty_lines=True),
            "convert_options": csv.ConvertOptions(
                column_types=types,
                include_columns=list(self._read),
                null_values=[""],
                strings_can_be_null=True,
            ),
        }

    def chunks(self, block: bytes, line: int) -> Iterator[TraceChunk]:
        """The records of some lines, the first of which has a number."""
        done = self._converter.done
        try:
            table = csv.read_csv(pa.BufferReader(block), **self._options).combine_chunks()
        except pa.ArrowException as error:
            raise _at_fault(str(error), block, line, done) from error
        columns = {name: _column(name, table.column(name), done) for name in self._read}
        try:
            for chunk in self._converter.chunks(Batch(table.num_rows, columns, None)):
                _check_sizes(chunk, self._converter.done - len(chunk))
                yield chunk
        except TraceError as error:
            if error.index is not None and b"\n\n" not in block and b"\r\n\r\n" not in block:
                error.rule = f"line {line + error.index - done}: {error.rule}"
                error.args = (error.rule,)
            raise


def _check_sizes(chunk: TraceChunk, done: int) -> None:
    """Raise TraceError for an access of no bytes; ``done`` records came before the chunk."""
    none = chunk.records[:, 1] & np.uint64(0xFFFF) == 0 if chunk.columns is None else chunk.columns.size == 0
    if chunk.operations is None and none.any():
        raise TraceError("size must be from 1 to 65535", index=done + int(np.argmax(none)), field="size", value=0)


def _known(title: str, titles: Sequence[str]) -> str:
    """A name in capitals as that of the column that it is, unless there is one of that very name."""
    name = title.lower()
    return name if name in USABLE and titles.count(name) == 0 else title


def _text(head: bytes) -> str:
    try:
        return head.decode("utf-8")
    except UnicodeDecodeError as error:
        raise TraceError("line 1: the names of columns must be UTF-8", index=0, field="body") from error


def _column(name: str, column: pa.ChunkedArray, done: int) -> Whole:
    array = column.chunk(0) if column.num_chunks else pa.array([], column.type)
    null = array.is_null().to_numpy(zero_copy_only=False) if array.null_count else None
    if not pa.types.is_dictionary(array.type):
        return Whole(array.fill_null(0).to_numpy(zero_copy_only=False), null)
    values = np.array([_value(name, text) for text in array.dictionary.to_pylist()] or [0], dtype=np.int64)
    found: npt.NDArray[Any] = values[array.indices.fill_null(0).to_numpy(zero_copy_only=False)]
    if null is not None:
        found = np.where(null, 0, found)
    if len(found) and found.min() < 0:
        at = int(np.argmin(found))
        text = array.dictionary[array.indices[at].as_py()].as_py()
        raise does_not_fit(name, done + at, text, USABLE[name].limit, NAMED[name])
    return Whole(found.astype(np.uint64), null)


def _value(name: str, text: str) -> int:
    """What a word or a number stands for, -1 for nothing."""
    word = text.strip().lower()
    known: Mapping[str, int] = {**NAMED[name], **(_WORDS if name == "access" else {})}
    if word in known:
        return known[word]
    digits = word.removeprefix("0x")
    valid = re.fullmatch(r"[0-9a-f]{1,4}" if digits != word else r"[0-9]{1,4}", digits)
    return int(digits, 16 if digits != word else 10) if valid else -1


def _at_fault(said: str, block: bytes, line: int, done: int) -> TraceError:
    """The error for what Arrow refused, which tells the number of the row where it knows it."""
    found = _ROW.search(said)
    row = int(found[1]) - 1 if found else 0
    lines = block.split(b"\n", row + 1)
    text = shown(lines[row]) if row < len(lines) else ""
    rule = _ROW.sub("", said)[:300].replace("CSV conversion error to uint64: ", "no number from 0 to 2^64-1: ")
    where = f"line {line + row}" if found else f"a line from {line} on"
    rule = f"{where}: {rule}; numbers are decimal or 0x…"
    return TraceError(rule, index=done + row if found else done, field="body", value=text)
