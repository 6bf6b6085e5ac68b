"""What one conformance vector says, what one run of it yields, and the image of vectors that the program reads."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Final

from . import layout


class Kind(IntEnum):
    """The instruction that makes the access; the order is that of the stubs in ``guest/stubs.asm``."""

    READ = 0
    WRITE = 1
    ADD = 2
    LOCK_ADD = 3
    XCHG = 4
    CMPXCHG = 5  # locked, and the comparison fails: still a write access, but the bytes do not change
    FETCH = 6


STORES: Final = frozenset(set(Kind) - {Kind.READ, Kind.FETCH})
READ_MODIFY_WRITES: Final = frozenset({Kind.ADD, Kind.LOCK_ADD, Kind.XCHG, Kind.CMPXCHG})

# VMCS controls.
SECONDARY_EPT: Final = 1 << 1
SECONDARY_SPP: Final = 1 << 23
EPTP_ACCESSED_DIRTY: Final = 1 << 6
EPTP_DEFAULT: Final = layout.EPT_PML4 | 0x1E  # write-back, four levels


@dataclass(frozen=True, slots=True)
class Page:
    """One test page: where it is, and the raw entries that lead to it.

    ``ept`` is PML4E, PDPTE, PDE, PTE and ``sppt`` is SPPL4E, SPPL3E, SPPL2E, SPPL1E (the vector), each stored at the
    place a well-formed walk for ``gpa`` finds it; an entry that points elsewhere simply hides those below it.
    ``data`` is the frame in which the bytes are looked for, 0 to not look.
    """

    gpa: int
    ept: tuple[int, int, int, int]
    sppt: tuple[int, int, int, int]
    guest_pte: int
    data: int


@dataclass(frozen=True, slots=True)
class Vector:
    """One access to ``size`` bytes at ``linear``, on a machine whose tables hold these entries.

    ``first`` is mapped at ``layout.LINEAR``, ``second`` on the linear page after it. ``table_pte`` is the EPT PTE of
    the page with their guest PTEs, ``table_sppt`` the SPPL4E to vector of that page. ``origin`` names the recipe.
    """

    origin: str
    kind: Kind
    size: int
    offset: int
    eptp: int
    spptp: int
    secondary: int
    first: Page
    second: Page
    table_pte: int
    table_sppt: tuple[int, int, int]

    @property
    def linear(self) -> int:
        """Linear address of the first byte."""
        return layout.LINEAR + self.offset

    @property
    def crosses(self) -> bool:
        """Whether the access touches the second page."""
        return self.offset + self.size > layout.PAGE

    @property
    def accessed_dirty(self) -> bool:
        """Whether EPT accessed and dirty flags are on."""
        return bool(self.eptp & EPTP_ACCESSED_DIRTY)

    @property
    def stored(self) -> int:
        """Bytes that change in memory if the access completes."""
        return self.size if self.kind in STORES and self.kind != Kind.CMPXCHG else 0

    def ept_slots(self) -> tuple[tuple[int, int, int, int], tuple[int, int, int, int]]:
        """Addresses of the entries in ``first.ept`` and ``second.ept``; the pages share what their GPAs share."""
        tops = (layout.NEAR_PDPT, layout.FAR_PDPT)
        firsts, seconds = (layout.FIRST_PD, layout.FIRST_PT), (layout.SECOND_PD, layout.SECOND_PT)
        return self._slots(layout.EPT_PML4, tops, firsts, seconds)

    def sppt_slots(self) -> tuple[tuple[int, int, int, int], tuple[int, int, int, int]]:
        """Addresses of the entries in ``first.sppt`` and ``second.sppt``."""
        tops = (layout.SPP_NEAR_L3, layout.SPP_FAR_L3)
        firsts = (layout.SPP_FIRST_L2, layout.SPP_FIRST_L1)
        seconds = (layout.SPP_SECOND_L2, layout.SPP_SECOND_L1)
        return self._slots(layout.SPP_L4, tops, firsts, seconds)

    def _slots(
        self, root: int, tops: tuple[int, int], firsts: tuple[int, int], seconds: tuple[int, int]
    ) -> tuple[tuple[int, int, int, int], tuple[int, int, int, int]]:
        one, two = self.first.gpa, self.second.gpa
        middle = firsts[0] if one >> 30 == two >> 30 else seconds[0]
        last = firsts[1] if one >> 21 == two >> 21 else seconds[1]
        return chain(one, root, tops, *firsts), chain(two, root, tops, middle, last)

    def memory(self) -> dict[int, int]:
        """Words that this vector stores on top of ``layout.base_memory()``, by address."""
        words: dict[int, int] = {}
        for page, slots in zip((self.second, self.first), reversed(self.ept_slots()), strict=True):
            words.update(zip(slots, page.ept, strict=True))
        for page, slots in zip((self.second, self.first), reversed(self.sppt_slots()), strict=True):
            words.update(zip(slots, page.sppt, strict=True))
        l3, l2, l1 = self.table_sppt
        words[layout.slot(layout.SPP_NEAR_L3, layout.TEST_PT, 3)] = l3
        words[layout.slot(layout.SPP_GUEST_L2, layout.TEST_PT, 2)] = l2
        words[layout.slot(layout.SPP_GUEST_L1, layout.TEST_PT, 1)] = l1
        words[layout.TEST_PT_ENTRY] = self.table_pte
        words[layout.guest_entry(layout.LINEAR)] = self.first.guest_pte
        words[layout.guest_entry(layout.LINEAR + layout.PAGE)] = self.second.guest_pte
        return words


def chain(gpa: int, root: int, tops: tuple[int, int], middle: int, last: int) -> tuple[int, int, int, int]:
    """Addresses of the four entries for a GPA in tables at ``root``, one of ``tops``, ``middle`` and ``last``."""
    top = tops[layout.index(gpa, 4)]
    tables = ((root, 4), (top, 3), (middle, 2), (last, 1))
    one, two, three, four = (layout.slot(table, gpa, level) for table, level in tables)
    return one, two, three, four


class Event(IntEnum):
    """How a run ended."""

    COMPLETED = 0
    EXIT = 1  # the access caused VM exit ``reason``
    EXCEPTION = 2  # the guest's own paging refused: ``reason`` is the exception vector
    ENTRY_FAILED = 3  # VM entry failed: ``reason`` is the VM-instruction error


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a vector.

    ``gla`` is the guest-linear address of an exit, CR2 of a #PF. ``landed`` counts the bytes that changed in the data
    frames. ``changed`` holds (address, new value) of every word of ``Vector.memory`` that the processor changed.
    """

    event: Event
    reason: int = 0
    qualification: int = 0
    gpa: int = 0
    gla: int = 0
    error_code: int = 0
    landed: int = 0
    changed: tuple[tuple[int, int], ...] = ()


# The image that guest/main.c reads: a header padded to a sector, base words, then the vectors. Little-endian.
MAGIC: Final = 0x52544356_50505553
HEADER: Final = struct.Struct("<8Q")
RECORD: Final = struct.Struct("<IBBHQQQIIII")
POKE: Final = struct.Struct("<QQ")
SECTOR: Final = 512


def encode(vectors: Sequence[Vector]) -> bytes:
    """The disk image part that carries base memory and vectors."""
    base = _pokes(layout.base_memory().items())
    body = bytearray(base)
    for number, vector in enumerate(vectors):
        words = vector.memory()
        body += RECORD.pack(
            *(number, vector.kind, vector.size, len(words)),
            *(vector.linear, vector.eptp, vector.spptp),
            *(vector.secondary, vector.first.data, vector.second.data, 0),
        )
        body += _pokes(words.items())
    places = (layout.GUEST_PML4, layout.GUEST_CODE, layout.GUEST_STACK)
    header = HEADER.pack(MAGIC, len(body), len(base) // POKE.size, len(vectors), *places, 0)
    image = header.ljust(SECTOR, b"\0") + bytes(body)
    return image.ljust(-(-len(image) // SECTOR) * SECTOR, b"\0")


def _pokes(words: Iterable[tuple[int, int]]) -> bytes:
    return b"".join(POKE.pack(address, value) for address, value in words)
