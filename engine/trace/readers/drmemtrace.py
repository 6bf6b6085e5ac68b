"""``drmemtrace``: what DynamoRIO's view tool prints (clients/drcachesim/tools/view.cpp, "drmemtrace: View tool").

``RECORD INSTRUCTION: THREAD read|write SIZE byte(s) @ 0xADDRESS by PC 0xPC``, ``… ifetch SIZE byte(s) @ 0xADDRESS …``
and ``… <marker: …>``. Addresses are virtual. A trace that was made with ``-use_physical`` has, before the first access
to each page and whenever its frame changes, a pair of markers with a physical address and the virtual address that it
belongs to ("Physical Addresses" in its documentation): from the first pair on addresses are physical, and an access to
a page that no pair was about has none. Marker time is in microseconds, and the accesses up to the next are given it.
"""

from __future__ import annotations

import re

import numpy as np
from numpy.typing import NDArray

from engine.arch import access as acc
from engine.errors import TraceError
from engine.trace.lines import patterns as p
from engine.trace.lines.patterns import (
    ACCESS,
    ADDRESS,
    GVA,
    PC,
    SIZE,
    TIME,
    A,
    B,
    Line,
    Parts,
    choice_of,
    constant,
    copy,
    decimal,
    emit,
    hexadecimal,
    keep,
    line,
    maybe,
    record,
    rest,
    skip,
    spaces,
    sure,
    text,
    until,
)
from engine.trace.readers.tool_format import Refinement, ToolFormat

_PHYSICAL, _VIRTUAL, _NONE = 1, 2, 3  # tags of markers
_PAGE_BITS = 12
MAX_PAGES = 1 << 22  # of one mapping: 16 GiB that a process uses

_PREFIX: tuple[Parts, ...] = (
    maybe(spaces(0), decimal(A), spaces(1), decimal(B), text(":")),
    maybe(spaces(0), decimal(A), text(":")),  # up to 2022: RECORD: TTHREAD
    *(spaces(0), until(" "), spaces(1)),
)
_AT: tuple[Parts, ...] = (spaces(0), decimal(SIZE), text(" byte(s) @ "), sure(), hexadecimal(ADDRESS))


def _marker(words: str, tag: int) -> Line:
    return line(
        f"<marker: {words} 0xADDRESS>",
        *_PREFIX,
        text(f"<marker: {words} "),
        sure(),
        hexadecimal(ADDRESS),
        text(">"),
        emit(tag),
    )


class _Pages(Refinement):
    """The pages of markers, by which virtual addresses become physical."""

    def __init__(self) -> None:
        super().__init__()
        self._frames: dict[int, int] = {}
        self._virtual_rows = False
        self._physical: int | None = None

    def __call__(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """The accesses among the rows. Raises TraceError where markers come after accesses without."""
        marked = np.flatnonzero(rows[:, p.TAG])
        rows[:, TIME] *= 1000
        if self.address is None and not len(marked):
            self._virtual_rows = self._virtual_rows or len(rows) > 0
            return rows
        return self._translated(rows, marked)

    def _translated(self, rows: NDArray[np.int64], marked: NDArray[np.intp]) -> NDArray[np.int64]:
        if self.address is None:
            self._begin(rows, int(marked[0]))
        kept: list[NDArray[np.int64]] = []
        first = 0
        for position in [*marked.tolist(), len(rows)]:
            if position > first:
                kept.append(self._segment(rows[first:position]))
            if position < len(rows):
                self._learn(rows[position])
            first = position + 1
        return np.concatenate(kept) if kept else rows[:0]

    def _begin(self, rows: NDArray[np.int64], marker: int) -> None:
        if self._virtual_rows or marker > 0:
            number = int(rows[marker, p.LINE])
            rule = f"line {number}: the first marker of a physical address comes after accesses, which have none"
            raise TraceError(rule, field="body")
        self.address = "guest-physical"

    def _learn(self, marker: NDArray[np.int64]) -> None:
        """Take in a marker."""
        address = int(marker[ADDRESS].astype(np.uint64))
        if marker[p.TAG] == _PHYSICAL:
            self._physical = address
        elif marker[p.TAG] == _NONE:
            self._frames.pop(address >> _PAGE_BITS, None)
        elif self._physical is not None:
            self._frames[address >> _PAGE_BITS] = self._physical >> _PAGE_BITS
            self._physical = None
            if len(self._frames) > MAX_PAGES:
                raise TraceError(
                    f"line {int(marker[p.LINE])}: markers are about more than {MAX_PAGES} pages", field="body"
                )

    def _segment(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """Accesses between two markers, those with a physical address."""
        addresses = rows[:, ADDRESS].astype(np.uint64)
        pages, inverse = np.unique(addresses >> np.uint64(_PAGE_BITS), return_inverse=True)
        frames = np.array([self._frames.get(page, -1) for page in pages.tolist()], dtype=np.int64)[inverse]
        known = frames >= 0
        self.drop("access to a page without a marker of its physical address", int((~known).sum()))
        rows[:, GVA] = rows[:, ADDRESS]
        rows[:, ADDRESS] = frames << _PAGE_BITS | rows[:, ADDRESS] & ((1 << _PAGE_BITS) - 1)
        return rows[known]


DRMEMTRACE = ToolFormat(
    name="drmemtrace",
    tool="DynamoRIO's drmemtrace, view tool",
    made="drrun -t drcachesim -indir DIR -tool view 2> trace.txt",
    address="process-virtual",
    reads="`read`",
    writes="`write`",
    executes="`ifetch`",
    columns=("gpa", "size", "access", "gva", "pc", "time"),
    mark=re.compile(
        rb"^(?:<--record#-> <--instr#->: |<record#>: T<tid> |[^\n]{0,80}(?:<marker: version \d+>| \d+ byte\(s\) @ 0x))",
        re.MULTILINE,
    ),
    lines=(
        record(
            "RECORD INSTRUCTION: THREAD read|write SIZE byte(s) @ 0xADDRESS by PC 0xPC",
            *_PREFIX,
            choice_of(ACCESS, {"write ": acc.WRITE, "read ": acc.READ}),
            *(*_AT, copy(ADDRESS, GVA), maybe(text(" by PC "), hexadecimal(PC))),
        ),
        skip("instruction that is not fetched again", *_PREFIX, text("ifetch "), until(" non-fetched instruction")),
        record(
            "RECORD INSTRUCTION: THREAD ifetch SIZE byte(s) @ 0xADDRESS INSTRUCTION",
            *(*_PREFIX, text("ifetch "), constant(ACCESS, acc.EXECUTE), *_AT, copy(ADDRESS, PC), copy(ADDRESS, GVA)),
            maybe(text(" "), rest()),
        ),
        _marker("physical address for following virtual:", _PHYSICAL),
        _marker("virtual address for prior physical:", _VIRTUAL),
        _marker("physical address not available for", _NONE),
        line(
            "<marker: timestamp MICROSECONDS>",
            *_PREFIX,
            text("<marker: timestamp "),
            sure(),
            decimal(TIME),
            text(">"),
            keep(TIME),
        ),
        skip("marker", *_PREFIX, text("<marker: "), until(">")),
        skip("end of a thread", *_PREFIX, text("<thread "), until(">")),
        skip("entry of another type", *_PREFIX, text("<entry type "), until(">")),
        skip("prefetch or flush", *_PREFIX, text("pref"), until(" byte(s) @ 0x")),
        skip("prefetch or flush", *_PREFIX, text("iflush "), until(" byte(s) @ 0x")),
        skip("prefetch or flush", *_PREFIX, text("dflush "), until(" byte(s) @ 0x")),
        skip("heading", text("Output format:")),
        skip("heading", text("<--record#->")),
        skip("heading", text("<record#>: ")),
        skip("heading", text("-----")),
        skip("totals", text("View tool results:")),
        skip("totals", text("=====")),
        skip("totals", spaces(0), decimal(A), text(" : total instructions")),
        skip("further bytes of an instruction", *_PREFIX[:-1], spaces(20)),
        skip("further bytes of an instruction", spaces(20)),
    ),
    refine=_Pages,
)
