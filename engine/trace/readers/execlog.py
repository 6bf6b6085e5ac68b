"""``execlog``: what QEMU's plugin ``execlog`` logs (contrib/plugins/execlog.c, docs/about/emulation.rst).

``VCPU, 0xPC, [0xOPCODE, ]"INSTRUCTION"`` and, for each of its accesses in their order, ``, load|store, 0xADDRESS``
and in system emulation ``, DEVICE``; then registers that changed, ``, NAME -> 0xVALUE``, if they were asked for. With a
device the address is physical; user emulation has neither.
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
    PC,
    VCPU,
    A,
    Line,
    Parts,
    choice,
    decimal,
    emit,
    hexadecimal,
    line,
    maybe,
    repeated,
    rest,
    skip,
    sure,
    text,
    until,
    within,
)
from engine.trace.readers.tool_format import AddressKind, Refinement, ToolFormat

ASSUMED_SIZE = 8
_SYSTEM, _USER = 1, 2
_EMULATIONS: tuple[tuple[int, AddressKind], ...] = ((_SYSTEM, "guest-physical"), (_USER, "process-virtual"))

_INSTRUCTION: tuple[Parts, ...] = (
    *(decimal(VCPU), text(", 0x"), hexadecimal(PC), text(", ")),
    maybe(text("0x"), hexadecimal(A), text(", ")),
    *(text('"'), until('"'), text('"')),
)
_ACCESS: tuple[Parts, ...] = (
    *(text(", "), choice(ACCESS, load=acc.READ, store=acc.WRITE)),
    *(text(", 0x"), hexadecimal(ADDRESS)),
)
_RAM: tuple[Parts, ...] = (*_ACCESS, text(", RAM"), emit(_SYSTEM))
_SHAPE = 'VCPU, 0xPC, "INSTRUCTION", load|store, 0xADDRESS, DEVICE'
_REGISTERS: tuple[Parts, ...] = (text(", "), within(" -> ", ","), rest())


def _user(*end: Parts) -> Line:
    return line(
        'VCPU, 0xPC, "INSTRUCTION", load|store, 0xADDRESS', *_INSTRUCTION, repeated(*_ACCESS, emit(_USER)), *end
    )


class _Emulation(Refinement):
    """Whether a log is of system or of user emulation: one or the other throughout."""

    def __call__(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """The same rows. Raises TraceError where the one becomes the other."""
        for tag, address in _EMULATIONS:
            found = np.flatnonzero(rows[:, p.TAG] == tag)
            if not len(found):
                continue
            if self.address not in (None, address):
                line = int(rows[found[0], p.LINE])
                rule = f"line {line}: an access with a device and one without: a log is of system or of user emulation"
                raise TraceError(rule, field="body")
            self.address = address
        return rows


EXECLOG = ToolFormat(
    name="execlog",
    tool="QEMU's plugin execlog",
    made="qemu-system-x86_64 -plugin libexeclog.so -d plugin -D trace.txt …",
    address="guest-physical",
    reads="`load`",
    writes="`store`",
    executes="none: instructions have a virtual address only, which is the `pc` of their accesses",
    columns=("gpa", "access", "vcpu", "pc"),
    mark=re.compile(rb'^\d+, 0x[0-9a-f]+, (?:0x[0-9a-f]+, )?"[^"\n]*"(?:, |\r?$)', re.MULTILINE),
    assumed_size=ASSUMED_SIZE,
    lines=(
        # RAM is no word of another form: most lines, at once.
        line(_SHAPE, *_INSTRUCTION, *_RAM, repeated(*_RAM)),
        skip("instruction without an access", *_INSTRUCTION, p.Part(p.END)),
        skip("instruction without an access", *_INSTRUCTION, *_REGISTERS),
        _user(),
        _user(*_REGISTERS),
        line(
            _SHAPE,
            *(*_INSTRUCTION, sure()),
            repeated(*_ACCESS, text(", "), until(", "), emit(_SYSTEM)),
            maybe(*_ACCESS, text(", "), rest(), emit(_SYSTEM)),
            maybe(*_REGISTERS),
        ),
    ),
    refine=_Emulation,
)
