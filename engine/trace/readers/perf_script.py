"""``perf-script``: samples with addresses, as ``perf script`` prints them (perf-script(1); util/evsel_fprintf.c).

The order of fields is perf's, whatever was given to ``-F``: ``COMM PID/TID [CPU] SECONDS: PERIOD EVENT: ADDRESS
[SYMBOL] [|OP LOAD|…] [WEIGHT] IP [SYMBOL …]``; all but the event and the address may be missing. What a sample did is
in its data source (``-F +data_src``), else in the name of its event: ``mem-loads``, ``mem-stores``, … . A page fault
says neither: where the address is the instruction's own it is a fetch, otherwise it is taken for a write.
"""

from __future__ import annotations

import re

import numpy as np
from numpy.typing import NDArray

from engine.arch import access as acc
from engine.trace.lines import patterns as p
from engine.trace.lines.patterns import (
    ACCESS,
    ADDRESS,
    PC,
    TIME,
    A,
    B,
    Line,
    Parts,
    choice,
    constant,
    hexadecimal,
    maybe,
    record,
    rest,
    skip,
    spaces,
    stamp,
    text,
    until,
    within,
)
from engine.trace.readers.tool_format import Refinement, ToolFormat

ASSUMED_SIZE = 8
_SAMPLE, _FAULT, _CODE = 0, 1, 2  # tags: what it did is said; is to be worked out; is in an error code
_WRITE, _FETCH = 1 << 1, 1 << 4  # of a page fault's error code

# Words in the names of events, and what their samples did.
_EVENTS = (
    ("faults", acc.WRITE, _FAULT),
    *((word, acc.READ, _SAMPLE) for word in ("load", "LOAD")),
    *((word, acc.WRITE, _SAMPLE) for word in ("store", "STORE")),
)
_SHAPE = "COMM TID [CPU] SECONDS: EVENT: ADDRESS IP"
_SOURCE: tuple[Parts, ...] = (
    until("|OP "),
    text("|OP "),
    choice(ACCESS, LOAD=acc.READ, STORE=acc.WRITE, EXEC=acc.EXECUTE),
)

# What is behind the address: only the instruction; a data source that says nothing; further numbers, of which none is
# known to be it; the instruction and its symbol; anything else.
_BEHIND: tuple[tuple[Parts, ...], ...] = (
    (spaces(1), hexadecimal(PC)),
    (text(" "), until("|OP "), rest()),
    (spaces(1), hexadecimal(A), spaces(1), hexadecimal(B)),
    (spaces(1), hexadecimal(PC), text(" "), rest()),
    (text(" "), rest()),
    (),
)


def _event(word: str, *behind: Parts, access: int, tag: int) -> Line:
    """Samples of events with a word in their name."""
    return record(
        _SHAPE,
        *(maybe(stamp(TIME)), within(word, ": "), until(": "), text(": "), spaces(0), hexadecimal(ADDRESS)),
        *(*behind, constant(ACCESS, access)),
        tag=tag,
    )


class _Faults(Refinement):
    """What page faults were."""

    def __call__(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """The rows, each with an access."""
        fetch = (rows[:, p.TAG] == _FAULT) & (rows[:, PC] == rows[:, ADDRESS])
        rows[fetch, ACCESS] = acc.EXECUTE
        coded = rows[:, p.TAG] == _CODE
        code = rows[coded, A]
        access = np.where(code & _FETCH != 0, acc.EXECUTE, acc.READ)
        rows[coded, ACCESS] = np.where(code & _WRITE != 0, acc.WRITE, access)
        return rows


PERF_SCRIPT = ToolFormat(
    name="perf-script",
    tool="Linux' perf script",
    made="perf record -e page-faults -c 1 -d PROGRAM; perf script -F comm,tid,time,event,addr,ip > trace.txt",
    address="process-virtual",
    reads="data source `OP LOAD`, or an event with load in its name",
    writes="data source `OP STORE`, an event with store in its name, and a page fault that is no fetch",
    executes="data source `OP EXEC`, and a page fault at the address of its instruction",
    columns=("gpa", "access", "pc", "time"),
    mark=re.compile(
        rb"^[^#\n]{0,120}?(?:(?:page-|minor-|major-|\b)faults(?::\w+)?|[\w/=,.:-]*mem[_-](?:loads|stores)[\w/=,.:-]*"
        rb"|exceptions:page_fault_\w+): +(?:address=)?(?:0x)?[0-9a-f]+",
        re.MULTILINE,
    ),
    assumed_size=ASSUMED_SIZE,
    lines=(
        # Most lines, at once: nothing is behind the instruction.
        *(_event(word, *_BEHIND[0], access=access, tag=tag) for word, access, tag in _EVENTS),
        record(
            "… exceptions:page_fault_user: address=0xADDRESS ip=0xIP error_code=0xCODE",
            *(maybe(stamp(TIME)), until("page_fault_"), until(": "), text(": "), spaces(0)),
            *(
                text("address="),
                hexadecimal(ADDRESS),
                text(" ip="),
                hexadecimal(PC),
                text(" error_code="),
                hexadecimal(A),
            ),
            tag=_CODE,
        ),
        skip("page fault with a name in place of an address", until("page_fault_"), until(": address=")),
        record(
            "COMM TID [CPU] SECONDS: EVENT: ADDRESS |OP LOAD|…",
            *(maybe(stamp(TIME)), until(": "), text(": "), spaces(0), hexadecimal(ADDRESS), text(" ")),
            *(*_SOURCE, rest()),
        ),
        skip("prefetch", until("|OP PFETCH|")),
        *(_event(word, *each, access=access, tag=tag) for word, access, tag in _EVENTS for each in _BEHIND[1:]),
        skip("call chain", text("\t")),
        skip("heading", text("#")),
        skip("event of which neither name nor data source says what it did", stamp(TIME), until(": ")),
    ),
    refine=_Faults,
)
