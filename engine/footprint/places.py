"""What a footprint is: the distinct places that traces access, each with how often and the first time.

What becomes of a plain access under a policy that nobody changes depends on where it is, on what it does and on the
memory slots, and on nothing that was before it. So a trace can be reduced to its places once, and asked for ever.

A place is a run of sub-pages (level ``spans``) or of bytes (level ``bytes``), apart by everything of an access that a
decision looks at: access, kind, source, and of a paging read whether it has a linear address (``what``). On request
also apart by a bucket of time and by the instruction.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from engine.arch import access as acc
from engine.arch.sppt import SUBPAGE_SHIFT
from engine.errors import InvalidValue
from engine.footprint.kernels import KIND_SHIFT, SOURCE_SHIFT, UNTRANSLATED

SPANS, BYTES = "spans", "bytes"
LEVELS = (SPANS, BYTES)
# Shift from an address to what a level counts in.
UNITS = {SPANS: SUBPAGE_SHIFT, BYTES: 0}

UNKNOWN = -1  # position of a trace: which one was first here is not known

MAX_ORIGINS = 1 << 16
# Places that are written to a file at one time, and memory of each meanwhile.
ROW_GROUP = 1 << 20
WRITTEN_BYTES = 80
INDEX_BITS = 46  # of the index of a record; the position of its trace is above


class By(NamedTuple):
    """What places are apart by beside where they are: buckets of ``time`` nanoseconds or of ``records`` records, 0 for
    none, and the address of the instruction."""

    time: int = 0
    records: int = 0
    pc: bool = False

    @property
    def buckets(self) -> bool:
        return bool(self.time or self.records)

    def validate(self) -> None:
        """Refuse what means nothing."""
        for name in ("time", "records"):
            if not 0 <= getattr(self, name) < 1 << 63:
                raise InvalidValue("must be from 1 to 2^63 - 1", field=f"by.{name}", value=getattr(self, name))
        if self.time and self.records:
            raise InvalidValue("is by time or by records, not by both", field="by", value=[self.time, self.records])


class Origin(NamedTuple):
    """A trace that is in a footprint.

    ``digest`` tells traces apart (SHA-256 of the body, in hexadecimal), ``name`` is for people, ``format`` and
    ``columns`` say how it was read, ``address`` whether its virtual addresses were taken (gva, flat).
    ``nanoseconds`` is how long it is, 0 where it has no times.
    """

    digest: str
    records: int
    format: str
    columns: tuple[str, ...]
    address: str = "gpa"
    name: str = ""
    nanoseconds: int = 0


@dataclass(frozen=True)
class Footprint:
    """Distinct places in order of ``begin``, ``extent``, ``what``, ``bucket`` and ``pc``: columns of one length.

    ``begin`` uint64 and ``extent`` int64 are sub-pages or bytes by ``level``; ``what`` uint8 (``kernels.what_of``);
    ``count`` int64, at least 1; ``trace`` int32 and ``first`` int64: the first access, as the least (position in
    ``origins``, index), UNKNOWN where it is not known; ``bucket`` uint64 and ``pc`` uint64 where ``by`` has them.
    ``origins`` are in order; one that was added twice is there twice.
    """

    level: str
    by: By
    origins: tuple[Origin, ...]
    begin: NDArray[np.uint64]
    extent: NDArray[np.int64]
    what: NDArray[np.uint8]
    count: NDArray[np.int64]
    trace: NDArray[np.int32]
    first: NDArray[np.int64]
    bucket: NDArray[np.uint64] | None = None
    pc: NDArray[np.uint64] | None = None

    def __len__(self) -> int:
        return len(self.begin)

    @property
    def records(self) -> int:
        """How many accesses."""
        return int(self.count.sum())

    @property
    def writes(self) -> int:
        """How many of them write."""
        return int(self.count[self.access == acc.WRITE].sum())

    @property
    def access(self) -> NDArray[np.uint8]:
        """0 read, 1 write, 2 execute."""
        return self.what & np.uint8(acc.ACCESS_MASK)

    @property
    def kind(self) -> NDArray[np.uint8]:
        """As the column of a trace."""
        return self.what >> np.uint8(KIND_SHIFT) & np.uint8(7)

    @property
    def source(self) -> NDArray[np.uint8]:
        """As the column of a trace."""
        return self.what >> np.uint8(SOURCE_SHIFT) & np.uint8(3)

    @property
    def translated(self) -> NDArray[np.bool_]:
        """False for a paging read without a linear address."""
        clear: NDArray[np.bool_] = self.what < np.uint8(UNTRANSLATED)
        return clear

    @property
    def last(self) -> NDArray[np.int64]:
        """The last sub-page or byte of each place."""
        return self.begin.view(np.int64) + self.extent - 1

    @property
    def first_subpage(self) -> NDArray[np.int64]:
        """The first sub-page of each place."""
        return self.begin.view(np.int64) >> SUBPAGE_SHIFT - UNITS[self.level]

    @property
    def last_subpage(self) -> NDArray[np.int64]:
        """The last sub-page of each place."""
        return self.last >> SUBPAGE_SHIFT - UNITS[self.level]

    @property
    def rank(self) -> NDArray[np.int64]:
        """The first access of each place as one number, the smaller the earlier; UNKNOWN where it is not known."""
        ranks = self.trace.astype(np.int64) << INDEX_BITS | self.first
        return np.where(self.trace == UNKNOWN, UNKNOWN, ranks)

    @property
    def nbytes(self) -> int:
        """Memory of its columns."""
        return sum(column.nbytes for column in self.columns().values())

    def columns(self) -> dict[str, NDArray[Any]]:
        """The columns by name, those that it has."""
        names = ("begin", "extent", "what", "bucket", "pc", "count", "trace", "first")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}


KEYS = ("begin", "extent", "what", "bucket", "pc")


def ordered(columns: dict[str, NDArray[Any]]) -> NDArray[np.int64]:
    """The order of rows by KEYS. One sort where the first three fit in a word, which is much faster; most rows are in
    order already, run by run, which this sort makes use of."""
    begin, extent, what = columns["begin"], columns["extent"], columns["what"]
    if not len(begin):
        return np.zeros(0, dtype=np.int64)
    others = [columns[name] for name in KEYS[:2:-1] if name in columns]
    low = begin.min()
    width = int(extent.max()).bit_length() + 8
    if others or int(begin.max() - low).bit_length() + width > 64:
        return np.lexsort((*others, what, extent, begin))
    word = (begin - low) << np.uint64(width) | extent.astype(np.uint64) << np.uint64(8) | what
    return np.argsort(word, kind="stable")


def made(level: str, by: By, origins: Sequence[Origin], columns: dict[str, NDArray[Any]]) -> Footprint:
    """A footprint of columns whose rows are in order and distinct."""
    return Footprint(level, by, tuple(origins), **columns)
