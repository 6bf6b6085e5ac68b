"""``hyperdbg``: lines that a script of HyperDbg's ``!monitor`` prints (docs.hyperdbg.org, "!monitor").

What a line looks like is for the script; ``printf("[+] 0x%llx hit, process id: 0x%llx, core: 0x%llx, context (address):
0x%llx, rip: 0x%llx, access: write\\n", …)`` prints what is read here. Of a line, ``context (address):`` or ``context:``
with the address is required; ``core:``, ``rip:`` and ``access:`` may be anywhere in it or missing, then it is a write.
Numbers are hexadecimal, with WinDbg's `` ` `` between their halves or without. ``$context`` is the virtual address.
"""

from __future__ import annotations

import re

import numpy as np
from numpy.typing import NDArray

from engine.arch import access as acc
from engine.trace.lines.patterns import (
    ACCESS,
    ADDRESS,
    KIND,
    PC,
    SPACE,
    VCPU,
    A,
    B,
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
)
from engine.trace.readers.tool_format import Refinement, ToolFormat

ASSUMED_SIZE = 8

_ACCESSES = {"write": acc.WRITE, "read": acc.READ, "execute": acc.EXECUTE, "exec": acc.EXECUTE, "rw": acc.WRITE}
_ACCESSES |= {"Write": acc.WRITE, "Read": acc.READ, "Execute": acc.EXECUTE}
_ACCESSES |= {"w": acc.WRITE, "r": acc.READ, "x": acc.EXECUTE, "W": acc.WRITE, "R": acc.READ, "X": acc.EXECUTE}


_SHAPE = "… core: 0xN, context (address): 0xADDRESS, rip: 0xRIP, access: write|read|execute"


class _Halves(Refinement):
    """Numbers in two halves: KIND says so of the address, SPACE of the instruction; A and B have the lower ones."""

    def __call__(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """The rows, with whole numbers."""
        for whole, lower, halved in ((ADDRESS, A, KIND), (PC, B, SPACE)):
            some = rows[:, halved] != 0
            rows[some, whole] = rows[some, whole] << 32 | rows[some, lower]
        return rows


HYPERDBG = ToolFormat(
    name="hyperdbg",
    tool="a script of HyperDbg's !monitor",
    made='!monitor rw FROM TO script { printf("[+] … context (address): 0x%llx, rip: 0x%llx, access: …\\n", …); }',
    address="guest-virtual",
    reads="`access: read`",
    writes="`access: write`, and lines that do not say",
    executes="`access: execute`",
    columns=("gpa", "access", "vcpu", "pc"),
    mark=re.compile(rb"^[^\n]{0,200}?\bcontext(?: \(address\))?: *(?:0x)?[0-9a-f`]{8,17}", re.MULTILINE),
    assumed_size=ASSUMED_SIZE,
    lines=(
        # What was typed, which may have the words of a record: `HyperDbg> …`, in the kernel `0: kHyperDbg> …`.
        skip("command of HyperDbg", text("HyperDbg>")),
        skip("command of HyperDbg", decimal(A), text(": kHyperDbg>")),
        record(
            _SHAPE,
            *(until("context"), text("context"), maybe(text(" (address)")), text(":"), sure(), spaces(0)),
            *(hexadecimal(ADDRESS), constant(ACCESS, acc.WRITE)),
            maybe(text("`"), hexadecimal(A), constant(KIND, 1)),
            maybe(start(), until("core: "), text("core: "), hexadecimal(VCPU)),
            maybe(start(), until("rip: "), text("rip: "), hexadecimal(PC)),
            maybe(text("`"), hexadecimal(B), constant(SPACE, 1)),
            maybe(start(), until("access: "), text("access: "), choice_of(ACCESS, _ACCESSES)),
            rest(),
        ),
        skip("message of HyperDbg", text("[*] ")),
        skip("message of HyperDbg", text("debuggee is running")),
    ),
    refine=_Halves,
)
