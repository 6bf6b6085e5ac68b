"""``bochs``: what Bochs' debugger prints after ``trace-mem on`` (bx_debug/dbg_main.cc).

``[CPUn TYPE]: LIN 0xLINEAR PHY 0xPHYSICAL (len=N, MEMTYPE): 0xDATA`` is an access of an instruction. A
read-modify-write is two lines (cpu/access.cc): ``RW`` where it reads, and ``WR`` without ``LIN`` where it writes, which
gets its linear address from the ``RW`` before it. Other lines without ``LIN`` are the processor's own accesses, which
say behind a tab and ``;`` to what: ``PTE``, ``PDE``, ``VMCS`` and others. 64 bits of data are two words, the higher
first. Before 2.7, ``pl=`` was in the place of the memory type.
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
    GVA,
    KIND,
    LINEAR,
    SIZE,
    VALUE,
    VALUED,
    VCPU,
    A,
    B,
    Parts,
    choice_of,
    constant,
    decimal,
    hexadecimal,
    maybe,
    record,
    repeated,
    rest,
    skip,
    spaces,
    sure,
    text,
    until,
)
from engine.trace.readers.tool_format import Refinement, ToolFormat

# What an access does.
_TYPES = {"RD": acc.READ, "WR": acc.WRITE, "EX": acc.EXECUTE}
_SHADOW_TYPES = {"SRW": acc.READ, "SR": acc.READ, "SW": acc.WRITE}
_PAGING = dict.fromkeys(("PTE", "PDE", "PDPTE", "PML4E", "PML5E", "PDPTR0", "PDPTR1", "PDPTR2", "PDPTR3"), 0)

# Tags: reads before it writes; no linear address; an entry of a paging structure; another structure of the processor.
_HALF, _BARE, _WALK, _STRUCTURE = 1, 2, 3, 4


def _begin(types: dict[str, int]) -> tuple[Parts, ...]:
    """Up to the address, behind a prompt of the debugger if there is one."""
    prompt = maybe(text("<bochs:"), until("[CPU"))
    return (*prompt, text("[CPU"), decimal(VCPU), spaces(1), choice_of(ACCESS, types), text("]: "))


_LINEAR: tuple[Parts, ...] = (text("LIN "), sure(), hexadecimal(GVA), spaces(1), constant(LINEAR, acc.LINEAR_VALID))
_PHYSICAL: tuple[Parts, ...] = (
    *(text("PHY "), hexadecimal(ADDRESS), text(" (len="), decimal(SIZE), text(", "), until(")"), text(")")),
    maybe(text(": "), hexadecimal(VALUE), constant(VALUED, 1)),
    repeated(text(" "), hexadecimal(B)),
)
_SHAPE = "[CPUn TYPE]: LIN 0xLINEAR PHY 0xADDRESS (len=N, MEMTYPE): 0xDATA"
_BARE_SHAPE = "[CPUn TYPE]: PHY 0xADDRESS (len=N, MEMTYPE): 0xDATA"


class _Halves(Refinement):
    """Linear addresses of the second halves of read-modify-writes, kinds of the processor's accesses, and data."""

    def __init__(self) -> None:
        super().__init__()
        self._last = np.zeros((0, p.ROW_WORDS), dtype=np.int64)

    def __call__(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """The rows, completed."""
        if not len(rows):
            return rows
        both = np.concatenate((self._last, rows))
        self._last = rows[-1:].copy()
        before, here = both[:-1], both[1:]
        same = (before[:, [ADDRESS, SIZE, VCPU]] == here[:, [ADDRESS, SIZE, VCPU]]).all(axis=1)
        second = same & (before[:, p.TAG] == _HALF) & (here[:, p.TAG] == _BARE) & (here[:, ACCESS] == acc.WRITE)
        rows = both[len(both) - len(rows) :]
        at = np.flatnonzero(second) + 1 - (len(both) - len(rows))
        rows[at, GVA] = before[second, GVA]
        rows[at, LINEAR] = acc.LINEAR_VALID
        walk = rows[:, p.TAG] == _WALK
        writes = walk & (rows[:, ACCESS] == acc.WRITE)
        rows[walk, KIND] = acc.PAGING_READ
        rows[writes, KIND] = acc.PAGING_UPDATE
        rows[writes, LINEAR] = acc.LINEAR_VALID
        wide = rows[:, SIZE] == 8
        rows[wide, VALUE] = rows[wide, VALUE] << 32 | rows[wide, B]
        rows[rows[:, SIZE] > 8, VALUED] = 0
        return rows


BOCHS = ToolFormat(
    name="bochs",
    tool="Bochs' debugger after `trace-mem on`",
    made="bochs -q -rc COMMANDS > trace.txt",
    address="guest-physical",
    reads="`RD`, and `RW`, the first half of a read-modify-write; `SR` and `SRW` of shadow stacks",
    writes="`WR`, the second half of a read-modify-write among them; `SW` to shadow stacks",
    executes="`EX`",
    columns=("gpa", "size", "access", "kind", "linear", "vcpu", "gva", "value"),
    mark=re.compile(rb"^(?:<bochs:\d+> )?\[CPU\d+ [A-Z-]+\]: (?:LIN|PHY) 0x", re.MULTILINE),
    lines=(
        record(_SHAPE, *_begin(_TYPES), *_LINEAR, *_PHYSICAL),
        record(_SHAPE, *_begin({"RW": acc.READ}), *_LINEAR, *_PHYSICAL, tag=_HALF),
        record(_SHAPE, *_begin(_SHADOW_TYPES), *_LINEAR, *_PHYSICAL, constant(KIND, acc.SHADOW_STACK)),
        record(_BARE_SHAPE, *_begin(_TYPES | _SHADOW_TYPES), *_PHYSICAL, tag=_BARE),
        record(_BARE_SHAPE + "\t; PTE", *_begin(_TYPES), *_PHYSICAL, text("\t; "), choice_of(A, _PAGING), tag=_WALK),
        record(
            _BARE_SHAPE + "\t; STRUCTURE", *_begin(_TYPES), *_PHYSICAL, text("\t; "), sure(), rest(), tag=_STRUCTURE
        ),
        skip("prompt or command of the debugger", text("<bochs:")),
        skip("instruction, of `trace on`", text("("), decimal(A), text(").[")),
        skip("where the debugger stopped", text("Next at t=")),
        skip("message of the debugger", text("(0) ")),
        skip("banner of Bochs", text("=====")),
        skip("banner of Bochs", spaces(1), until("Bochs x86 Emulator")),
        skip("banner of Bochs", spaces(1), choice_of(A, {"Built from ": 0, "Compiled on ": 0, "Timestamp: ": 0})),
        skip("message of the debugger", text("Memory-Tracing ")),
        skip("message of Bochs", decimal(A), choice_of(B, {"i[": 0, "d[": 0, "e[": 0, "p[": 0})),
    ),
    refine=_Halves,
)
