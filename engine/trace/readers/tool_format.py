"""What is known of a format that a tool writes: words for people, and what a reader needs."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
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


class Refinement:
    """What a format works out over the rows of one body, from several lines or several registers: here nothing.

    ``address`` and ``sizes`` say what a body turned out to have, where formats have both; ``dropped`` how many rows
    became no record, by reason.
    """

    address: AddressKind | None = None
    sizes: str | None = None

    def __init__(self) -> None:
        self.dropped: dict[str, int] = {}

    def __call__(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """Rows of registers for records, from rows of registers: perhaps fewer, in their order, perhaps the same."""
        return rows

    def drop(self, reason: str, count: int) -> None:
        """Count rows that become no record."""
        if count:
            self.dropped[reason] = self.dropped.get(reason, 0) + count


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
        "linear": p.LINEAR,
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
    once a body. Where a heading says what lines look like, ``fit`` makes them of the beginning of a body; where a line
    stands for several accesses, the register ``repeats`` has their number.
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
    refine: Callable[[], Refinement] = Refinement
    fit: Callable[[bytes], tuple[Line, ...]] | None = None
    repeats: int | None = None

    def fitted(self, head: bytes) -> ToolFormat:
        """The format as a body has it, by its beginning. Raises TraceError."""
        return self if self.fit is None else replace(self, lines=self.fit(head))

    @property
    def sizes(self) -> str:
        """Where sizes are from, in words."""
        return "as recorded" if self.assumed_size is None else f"assumed: {self.assumed_size} bytes"

    def taken(self, skipped: Mapping[str, int], first: tuple[SkippedLine, ...]) -> Taken:
        """What is said of a body of this format, of which these lines were skipped."""
        return Taken(self.name, self.address, self.sizes, skipped, first)
