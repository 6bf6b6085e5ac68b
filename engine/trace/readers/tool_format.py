"""What is known of a format that a tool writes: words for people, and what a reader needs."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from engine.trace.lines import patterns as p
from engine.trace.lines.patterns import Line
from engine.trace.taken import SkippedLine, Taken

# Whose addresses a trace has: those of a guest's physical memory, those that its page tables translate, or those of a
# process that has no guest around it. A trace with both of a guest counts as physical.
AddressKind = Literal["guest-physical", "guest-virtual", "process-virtual"]

TEXT, CSV, OCTETS = "text/plain", "text/csv", "application/octet-stream"

# Rows of registers in, rows of registers out: what a format works out from several lines, or from several registers.
Refine = Callable[[NDArray[np.int64]], NDArray[np.int64]]


def as_they_are(rows: NDArray[np.int64]) -> NDArray[np.int64]:
    """Each row is a record."""
    return rows


# Which register has which column. What becomes of VALUE is for the column ``value``, as many bytes as were accessed.
COLUMN_REGISTERS: Mapping[str, int] = MappingProxyType(
    {
        "gpa": p.ADDRESS,
        "size": p.SIZE,
        "access": p.ACCESS,
        "kind": p.KIND,
        "vcpu": p.VCPU,
        "gva": p.GVA,
        "pc": p.PC,
        "time": p.TIME,
        "value": p.VALUE,
        "address_space": p.SPACE,
    }
)


@dataclass(frozen=True)
class ToolFormat:
    """One format.

    ``tool`` and ``made`` say in a line each whose it is and how such a file is made; ``address`` which address becomes
    the column ``gpa``. ``assumed_size`` is the size of every access where the tool does not say it, None where it does.
    ``reads``, ``writes``, ``executes`` say what is one. ``media`` are the media types that it is sent as. ``mark``
    finds the first line (of a binary format: the beginning) that only this format has. ``columns`` are those that its
    records have. Formats of lines have ``lines`` and, for what single lines do not say, ``refine``, which is called
    once a body and returns a function over rows; rows may become fewer, but stay in order.
    """

    name: str
    tool: str
    made: str
    address: AddressKind
    reads: str
    writes: str
    executes: str
    columns: tuple[str, ...]
    mark: re.Pattern[bytes] | None = None
    media: tuple[str, ...] = (TEXT,)
    assumed_size: int | None = None
    lines: tuple[Line, ...] = ()
    refine: Callable[[], Refine] = field(default=lambda: as_they_are)

    @property
    def sizes(self) -> str:
        """Where sizes are from, in words."""
        return "as recorded" if self.assumed_size is None else f"assumed: {self.assumed_size} bytes"

    def taken(self, skipped: Mapping[str, int], first: tuple[SkippedLine, ...]) -> Taken:
        """What is said of a body of this format, of which these lines were skipped."""
        return Taken(self.name, self.address, self.sizes, skipped, first)
