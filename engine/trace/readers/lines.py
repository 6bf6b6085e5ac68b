"""Text of tools, line by line: streaming, by the patterns of its format (``trace.lines``)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from engine.errors import TraceError
from engine.trace.columns import ALONG, RECORD, USABLE, ChunkBuffer, TraceChunk, does_not_fit
from engine.trace.lines import patterns as p
from engine.trace.lines import scan
from engine.trace.operations import NO_SPACE, Operations
from engine.trace.readers.base import Source, TraceReader, read_into
from engine.trace.readers.formats import recognised
from engine.trace.readers.tool_format import COLUMN_REGISTERS, ToolFormat
from engine.trace.taken import SHOWN_CHARACTERS, SHOWN_LINES, SkippedLine, shown

BLOCK_BYTES = 1 << 20  # read at a time
# A line has at least four bytes for each row that it gives, so that one line always has room.
ROWS = 1 << 15
assert 4 * ROWS > scan.MAX_LINE_BYTES

# How many accesses a line may stand for, and the lines of a body together: they are replayed one by one.
MOST_REPEATS = 1 << 20
MOST_REPEATED = 1 << 28

_BOM = b"\xef\xbb\xbf"


class LineReader(TraceReader):
    """Reads a format of lines. Lines end with LF or CR LF; the last need not end.

    A line that the format is known to have beside its records is skipped and counted; one that is of none of its forms
    is an error, or with ``skip_unknown`` skipped and counted, too. A line that begins as a record and does not go on
    as one is always an error. Errors name the line. ``taken`` is complete when the last chunk has been read.
    """

    def __init__(self, source: Source, carry: Sequence[str], tool: ToolFormat, *, skip_unknown: bool = False) -> None:
        super().__init__(source, carry)
        self._tool = tool
        self._columns = _Columns(tool, carry)
        self._refine = tool.refine()
        self._program = p.compiled(tool.lines)
        self._reasons = p.reasons(tool.lines)
        self._unknown = skip_unknown
        self._text = np.zeros(BLOCK_BYTES + scan.MAX_LINE_BYTES + 2, dtype=np.uint8)
        self._rows = np.zeros((ROWS, p.ROW_WORDS), dtype=np.int64)
        self._kept = np.zeros(p.REGISTERS, dtype=np.int64)
        self._registers = np.zeros(2 * p.REGISTERS, dtype=np.int64)
        self._counts = np.zeros(len(self._reasons), dtype=np.int64)
        self._shown = np.zeros((SHOWN_LINES, scan.SHOWN_WORDS), dtype=np.int64)
        self._place = np.zeros(scan.PLACE_WORDS, dtype=np.int64)
        self._first: list[SkippedLine] = []
        self._done = 0
        self._repeats = 0
        self._set_taken()

    def _chunks(self) -> Iterator[TraceChunk]:
        held, ended = 0, False
        while not ended:
            held, ended = self._read(held)
            while True:
                status = scan.scan(
                    self._text,
                    held,
                    self._program,
                    self._unknown,
                    self._kept,
                    self._registers,
                    self._rows,
                    self._counts,
                    self._shown,
                    self._place,
                )
                yield from self._given()
                if status == scan.NEEDS_TEXT:
                    break
                if status != scan.FULL:
                    raise self._fault(int(status), held)
            begin = int(self._place[scan.AT])
            self._text[: held - begin] = self._text[begin:held]
            held -= begin
            self._place[scan.AT] = 0

    def _read(self, held: int) -> tuple[int, bool]:
        """Read on behind what is held of the text. How much is held then, and whether the body has ended."""
        begun = bool(self._place[scan.LINES]) or held > 0
        stored = read_into(self._source, self._text.data[held : held + BLOCK_BYTES])
        ended, held = stored < BLOCK_BYTES, held + stored
        if not begun and bytes(self._text[:3]) == _BOM:
            self._place[scan.AT] = len(_BOM)
        if ended and held > self._place[scan.AT] and self._text[held - 1] != 10:
            self._text[held] = 10
            held += 1
        return held, ended

    def _given(self) -> Iterator[TraceChunk]:
        """The chunk of the rows that a scan gave, and what it skipped."""
        for number, start, stop, reason in self._shown[: self._place[scan.SHOWN]].tolist():
            if len(self._first) < SHOWN_LINES:
                self._first.append(SkippedLine(number, self._reasons[reason], self._line_text(start, stop)))
        self._place[scan.SHOWN] = 0
        rows = self._refine(self._rows[: self._place[scan.ROWS]])
        self._place[scan.ROWS] = 0
        self._set_taken()
        for part in (rows,) if self._tool.repeats is None else self._repeated(rows, self._tool.repeats):
            if len(part):
                self.valued = part[:, p.VALUED] != 0
                yield self._columns.chunk(part, self._refused)
                self._done += len(part)

    def _repeated(self, rows: npt.NDArray[np.int64], register: int) -> Iterator[npt.NDArray[np.int64]]:
        """Each row as often as its register says, so many at a time as there is room for. Raises TraceError."""
        counts = rows[:, register]
        wrong = (counts < 1) | (counts > MOST_REPEATS)
        if wrong.any():
            row = int(np.argmax(wrong))
            rule = f"a line stands for 1 to {MOST_REPEATS} accesses"
            raise _at_line(int(rows[row, p.LINE]), rule, self._done + row, "body", int(counts[row]))
        ends = np.cumsum(counts)
        self._repeats += int(ends[-1]) if len(ends) else 0
        if self._repeats > MOST_REPEATED:
            rule = f"lines stand for more than {MOST_REPEATED} accesses together"
            raise _at_line(int(rows[-1, p.LINE]), rule, self._done, "body", self._repeats)
        for first in range(0, int(ends[-1]) if len(ends) else 0, ROWS):
            places = np.arange(first, min(first + ROWS, int(ends[-1])))
            yield rows[np.searchsorted(ends, places, side="right")]

    def _set_taken(self) -> None:
        reasons = {reason: n for reason, n in zip(self._reasons, self._counts.tolist(), strict=True) if n}
        found = self._refine
        taken = self._tool.taken(reasons | found.dropped, tuple(self._first))
        self.taken = taken._replace(address=found.address or taken.address, sizes=found.sizes or taken.sizes)

    def _refused(self, rows: npt.NDArray[np.int64], row: int, name: str, value: int, limit: int) -> TraceError:
        """The error for a number of a line that its column cannot hold."""
        error = does_not_fit(name, self._done + row, value, limit)
        rule = f"{name} must be from 1 to {limit}" if name == "size" else error.rule
        start = int(rows[row, p.AT])
        end = start + int(np.argmax(self._text[start:] == 10))
        rule = f"{rule}: {self._line_text(start, end)!r}"
        return _at_line(int(rows[row, p.LINE]), rule, self._done + row, name, value)

    def _fault(self, status: int, held: int) -> TraceError:
        """The error for the line at which the scan stands."""
        start, number = int(self._place[scan.AT]), int(self._place[scan.LINES]) + 1
        ends = np.flatnonzero(self._text[start:held] == 10)
        found = self._line_text(start, start + int(ends[0]) if len(ends) else held)
        name, form = self._tool.name, self._tool.lines[int(self._place[scan.FORM])].shape
        if status == scan.TOO_LONG:
            rule = f"the line has more than {scan.MAX_LINE_BYTES} bytes: no line of {name} is that long"
        elif status == scan.HAS_NUL:
            rule = f"the line has a NUL byte: {name} is text in UTF-8, not UTF-16 and not binary"
        elif status == scan.TOO_WIDE:
            rule = f"a number has more than 64 bits; {name} has {form!r} here"
        elif status == scan.BROKEN:
            rule = f"the line is not whole; {name} has {form!r} here"
        else:
            other = recognised(found.encode())
            forms = ", ".join(repr(line.shape) for line in self._tool.lines if line.reason is None)
            rule = f"the line is none of {name}, which has {forms}"
            if other is not None and other is not self._tool:
                rule += f"; it looks like {other.name}, and a body has one format"
            else:
                rule += "; skip_unknown (--skip-unknown) passes over such lines"
        return _at_line(number, rule, self._done, "body", found)

    def _line_text(self, start: int, stop: int) -> str:
        return shown(bytes(self._text[start : min(stop, start + 4 * SHOWN_CHARACTERS)]))


def _at_line(number: int, rule: str, index: int, field: str, value: Any) -> TraceError:
    return TraceError(f"line {number}: {rule}", index=index, field=field, value=value)


class _Columns:
    """From rows to chunks, for one body."""

    def __init__(self, tool: ToolFormat, carry: Sequence[str]) -> None:
        self._tool = tool
        self._names = tuple(name for name in tool.columns if name in RECORD)
        self._spaces = "address_space" in tool.columns
        used = (*self._names, *(("address_space",) if self._spaces else ()))
        self._buffer = ChunkBuffer(used, ROWS)
        self._extra = tuple(
            name for name in (*ALONG, "value") if name in tool.columns and (name in ALONG or name in carry)
        )
        for name in carry:
            if name not in tool.columns:
                rule = f"{tool.name} has no column {name} to carry; it has {', '.join(tool.columns)}"
                raise TraceError(rule, field="carry", value=name)
        if tool.assumed_size is not None:
            self._buffer.fill("size", np.full(ROWS, tool.assumed_size, dtype=np.uint64))

    def chunk(self, rows: npt.NDArray[np.int64], refused: Any) -> TraceChunk:
        """The chunk of some rows. Raises what ``refused`` makes for a value that its column cannot hold."""
        for name in self._names:
            values = _words(rows, name)
            limit = USABLE[name].limit
            wrong = values > limit
            if name == "size":
                wrong |= values == 0
            if wrong.any():
                row = int(np.argmax(wrong))
                raise refused(rows, row, name, int(values[row]), limit)
            self._buffer.fill(name, values)
        carry: dict[str, npt.NDArray[Any]] = {name: _words(rows, name) for name in self._extra}
        operations = None
        if self._spaces:
            spaces = _words(rows, "address_space")
            operations = Operations(np.zeros(0, dtype=np.int64), (), np.where(spaces == 0, np.uint64(NO_SPACE), spaces))
        return self._buffer.chunk(len(rows), carry, operations)


def _words(rows: npt.NDArray[np.int64], name: str) -> npt.NDArray[np.uint64]:
    return rows[:, COLUMN_REGISTERS[name]].copy().view(np.uint64)
