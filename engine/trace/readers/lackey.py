"""``lackey``: what ``valgrind --tool=lackey --trace-mem=yes`` prints (Valgrind manual, Lackey; ``lk_main.c``).

``I  ADDRESS,SIZE`` is an instruction, `` L``, `` S`` and `` M`` its loads, stores and modifications, which follow it.
Valgrind's own messages, ``==PID==`` and ``--PID--``, are in the same stream.
"""

from __future__ import annotations

import re

from engine.arch import access as acc
from engine.trace.lines.patterns import (
    ACCESS,
    ADDRESS,
    KIND,
    PC,
    SIZE,
    B,
    Line,
    constant,
    copy,
    decimal,
    hexadecimal,
    keep,
    record,
    skip,
    sure,
    text,
    until,
)
from engine.trace.readers.tool_format import ToolFormat


def _data(letter: str, access: int, kind: int) -> Line:
    return record(
        f" {letter} ADDRESS,SIZE",
        *(text(f" {letter} "), sure(), hexadecimal(ADDRESS), text(","), decimal(SIZE)),
        *(constant(ACCESS, access), constant(KIND, kind)),
    )


_INSTRUCTION = record(
    "I  ADDRESS,SIZE",
    *(text("I  "), sure(), hexadecimal(PC), copy(PC, ADDRESS), keep(PC), text(","), decimal(SIZE)),
    *(constant(ACCESS, acc.EXECUTE), constant(KIND, acc.DATA)),
)

LACKEY = ToolFormat(
    name="lackey",
    tool="Valgrind's tool lackey",
    made="valgrind --tool=lackey --trace-mem=yes --log-file=trace.txt PROGRAM",
    address="process-virtual",
    reads="` L`, a load",
    writes="` S`, a store, and ` M`, a modification: kind read-modify-write",
    executes="`I`, an instruction: its address is the `pc` of the accesses that follow",
    columns=("gpa", "size", "access", "kind", "pc"),
    mark=re.compile(
        rb"^(?:==(?:[\d:.]+ )?\d+== Lackey,|I  [0-9a-f]{8,16},\d+\r?$| [LSM] [0-9a-f]{8,16},\d+\r?$)", re.MULTILINE
    ),
    lines=(
        _INSTRUCTION,
        _data("S", acc.WRITE, acc.DATA),
        _data("L", acc.READ, acc.DATA),
        _data("M", acc.WRITE, acc.READ_MODIFY_WRITE),
        # Behind the process with --time-stamp=yes: ==00:00:00:01.234 4242==
        skip("message of Valgrind", text("=="), decimal(B), until("==")),
        skip("message of Valgrind", text("--"), decimal(B), until("--")),
        skip("message of Valgrind", text("**"), decimal(B), until("**")),
        skip("superblock, of --trace-superblocks=yes", text("SB "), hexadecimal(B)),
    ),
)
