"""``gem5``: text of the debug flags ``MemoryAccess`` (src/mem/abstract_mem.cc) and ``Exec`` (src/cpu/exetrace.cc).

``TICK: MEMORY: Write from REQUESTOR of size N on address 0xADDRESS data 0xDATA C`` is an access that reached a memory,
by its physical address; older versions name no requestor. ``TICK: CPU: A0 T0 : 0xPC @SYMBOL : INSTRUCTION : CLASS :
D=0xDATA A=0xADDRESS`` is an instruction, with the virtual address of what it loads or stores and without its size.
Behind caches the two are not the same accesses; where a body has both, those that reached memory are taken. Ticks are
picoseconds unless the simulation was told otherwise.
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
    KIND,
    PC,
    SIZE,
    TIME,
    VALUE,
    VALUED,
    VCPU,
    A,
    Line,
    Parts,
    choice_of,
    constant,
    decimal,
    hexadecimal,
    maybe,
    record,
    rest,
    skip,
    spaces,
    start,
    sure,
    text,
    until,
    within,
)
from engine.trace.readers.tool_format import Refinement, ToolFormat

ASSUMED_SIZE = 8
TICKS_PER_NANOSECOND = 1000
_MEMORY, _INSTRUCTION = 1, 2

_TICK: tuple[Parts, ...] = maybe(spaces(0), decimal(TIME), text(": "))

# What a memory did, and the classes of operations that access memory (src/cpu/FuncUnit.py).
_LABELS = (
    ("Read/Write", acc.WRITE, acc.READ_MODIFY_WRITE),
    ("Write", acc.WRITE, acc.DATA),
    ("Read", acc.READ, acc.DATA),
    ("IFetch", acc.EXECUTE, acc.DATA),
)
_DID = np.array([(access, kind) for _, access, kind in _LABELS])
_CLASSES = {"MemWrite : ": acc.WRITE, "MemRead : ": acc.READ, "Store : ": acc.WRITE, "Load : ": acc.READ}


def _memory(*name: Parts) -> Line:
    """An access of a memory of some name. A is its place in ``_LABELS``."""
    return record(
        "TICK: MEMORY: Write|Read|IFetch from REQUESTOR of size N on address 0xADDRESS data 0xDATA C",
        *(*_TICK, *name, choice_of(A, {label: number for number, (label, *_) in enumerate(_LABELS)})),
        maybe(text(" from "), within("cpu", " of size"), text("cpu"), decimal(VCPU)),
        maybe(text(" from "), within("cores", " of size"), text("cores"), decimal(VCPU)),
        *(until(" of size "), text(" of size "), sure(), decimal(SIZE), text(" on address "), hexadecimal(ADDRESS)),
        maybe(text(" data "), hexadecimal(VALUE), constant(VALUED, 1)),
        maybe(text(" C")),
        maybe(text(" U")),
        tag=_MEMORY,
    )


_NAME: tuple[Parts, ...] = (until(": "), text(": "))


def _instruction(name: str) -> Line:
    return record(
        "TICK: CPU: T0 : 0xPC @SYMBOL : INSTRUCTION : CLASS : D=0xDATA A=0xADDRESS",
        *(until("A=0x"), start(), until(name), until(" A=0x"), text(" A="), sure(), hexadecimal(ADDRESS)),
        *(maybe(text(" "), rest()), p.Part(p.END), start()),
        *_TICK,
        maybe(within("cpu", " "), text("cpu"), decimal(VCPU)),
        maybe(within("cores", " "), text("cores"), decimal(VCPU)),
        maybe(until(" : 0x"), text(" : "), hexadecimal(PC)),
        *(constant(ACCESS, _CLASSES[name]), constant(SIZE, ASSUMED_SIZE), rest()),
        tag=_INSTRUCTION,
    )


class _Flags(Refinement):
    """Which of the two kinds of lines are the records of a body: those of memories, if it has any."""

    def __call__(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """The records among the rows. Raises TraceError where lines of memories come after the first records."""
        memory = rows[:, p.TAG] == _MEMORY
        if self.address is None and len(rows):
            physical = bool(memory.any())
            self.address = "guest-physical" if physical else "guest-virtual"
            self.sizes = "as recorded" if physical else f"assumed: {ASSUMED_SIZE} bytes"
        if self.address == "guest-virtual" and memory.any():
            line = int(rows[int(np.argmax(memory)), p.LINE])
            rule = f"line {line}: the first of MemoryAccess after many of Exec only: convert them apart"
            raise TraceError(rule, field="body")
        if self.address == "guest-physical":
            self.drop("instruction: the lines of MemoryAccess are the records", len(rows) - int(memory.sum()))
            rows = rows[memory]
            rows[:, [ACCESS, KIND]] = _DID[rows[:, A]]
        rows[:, TIME] //= TICKS_PER_NANOSECOND
        return rows


GEM5 = ToolFormat(
    name="gem5",
    tool="gem5's debug flags MemoryAccess and Exec",
    made="gem5.opt --debug-flags=MemoryAccess --debug-file=trace.txt CONFIG",
    address="guest-physical",
    reads="`Read` of a memory; without such lines, classes of instructions that end in MemRead or Load",
    writes="`Write` of a memory, and `Read/Write`: kind read-modify-write; else classes that end in MemWrite or Store",
    executes="`IFetch` of a memory",
    columns=("gpa", "size", "access", "kind", "vcpu", "pc", "time", "value"),
    mark=re.compile(
        rb"^(?:gem5 Simulator System"
        rb"|[^\n]{0,200}: (?:Read/Write|Write|Read|IFetch) (?:from \S+ )?of size \d+ on address 0x"
        rb"|[^\n]{0,300} : (?:Mem|FloatMem|Simd|Vector)\w*(?:Read|Write|Load|Store) : )",
        re.MULTILINE,
    ),
    lines=(
        *(_memory(*_NAME), _memory(*_NAME, *_NAME)),
        *(_instruction(name) for name in _CLASSES),
        skip("predicated false", until("Predicated False")),
        skip("instruction without an access", *_TICK, spaces(0), until(" T"), text(" T"), decimal(A), text(" : ")),
        skip("instruction without an access", *_TICK, spaces(0), until(" : 0x")),
        skip("other message of gem5", spaces(0), decimal(TIME), text(": "), until(": ")),
        skip("other message of gem5", until(".cc:"), text(".cc:"), decimal(A), text(": ")),
        skip("other message of gem5", text("gem5 ")),
        skip("other message of gem5", text("warn: ")),
        skip("other message of gem5", text("info: ")),
        skip("other message of gem5", text("hack: ")),
        skip("other message of gem5", text("Global frequency set at ")),
        skip("other message of gem5", text("command line: ")),
        skip("other message of gem5", text("Exiting @ tick ")),
        skip("other message of gem5", text("**** REAL SIMULATION ****")),
    ),
    refine=_Flags,
)
