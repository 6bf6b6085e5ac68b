"""Hand-picked vectors: every rule of the manual at its boundary, once. GPAs, sizes and noise still vary by seed."""

from __future__ import annotations

from collections.abc import Iterator
from random import Random

from . import layout
from .draft import (
    ALL_SUBPAGES,
    HIGH_ADDRESS,
    L1E,
    L4E,
    PDE,
    PDPTE,
    PML4E,
    PTE,
    READ,
    RIGHTS,
    SPP_BIT,
    SUBPAGE,
    WRITE,
    Draft,
)
from .vectors import EPTP_ACCESSED_DIRTY, READ_MODIFY_WRITES, SECONDARY_SPP, Kind

SIMPLE = (Kind.READ, Kind.WRITE, Kind.FETCH)
READ_EXECUTE = RIGHTS & ~WRITE


def edges(rng: Random) -> Iterator[Draft]:
    """All of them."""
    for family in (
        *(rights, memory_types, reserved, ignored, not_present, large_pages, eligibility, subpages),
        *(sppt_entries, vectors_with_odd_bits, straddling, crossing, guest_pages, guest_tables, flags, entry_checks),
    ):
        yield from family(rng)


def _far(rng: Random, origin: str, leaf: int = 1) -> Draft:
    """A draft whose first page has a PML4E of its own."""
    while True:
        draft = Draft(rng, origin, leaf)
        if draft.top() == PML4E:
            return draft


def rights(rng: Random) -> Iterator[Draft]:
    """The lattice of R, W, X at every level, for every kind of access."""
    for position in (PML4E, PDPTE, PDE, PTE):
        for value in range(8):
            for kind in Kind:
                yield _far(rng, "edge: rights").rights(position, value).access(kind)


def memory_types(rng: Random) -> Iterator[Draft]:
    """All eight memory types, by page size."""
    for leaf in (1, 2, 3):
        for value in range(8):
            for kind in (Kind.READ, Kind.WRITE):
                draft = Draft(rng, "edge: memory type", leaf)
                draft.ept[0][4 - leaf] = draft.ept[0][4 - leaf] & ~0x38 | value << 3
                yield draft.access(kind)


def reserved(rng: Random) -> Iterator[Draft]:
    """Every reserved bit, at every level and page size, with and without the right that the access needs."""
    places = [
        *((1, PML4E, (3, 4, 5, 6, 7, *HIGH_ADDRESS)), (1, PDPTE, (3, 4, 5, 6, *HIGH_ADDRESS))),
        *((1, PDE, (3, 4, 5, 6, *HIGH_ADDRESS)), (1, PTE, HIGH_ADDRESS)),
        *((2, PDE, (*range(12, 21), *HIGH_ADDRESS)), (3, PDPTE, (*range(12, 30), *HIGH_ADDRESS))),
    ]
    for leaf, position, bits in places:
        for bit in bits:
            for value in (RIGHTS, READ):
                draft = _far(rng, "edge: reserved", leaf).rights(position, value).flip(position, bit)
                yield draft.access(rng.choice(SIMPLE))


def ignored(rng: Random) -> Iterator[Draft]:
    """Every ignored bit, one at a time."""
    for leaf, position in ((1, PML4E), (1, PDPTE), (1, PDE), (1, PTE), (2, PDE), (3, PDPTE)):
        bits = [6, 7] if (leaf, position) == (1, PTE) else [6] if leaf > 1 else []
        for bit in (*bits, 8, 9, 10, 11, *range(52, 64)):
            yield _far(rng, "edge: ignored", leaf).flip(position, bit).access(rng.choice(SIMPLE))


def not_present(rng: Random) -> Iterator[Draft]:
    """Entries without R, W and X, whose other bits then mean nothing; misconfigured entries below or above them."""
    for position in (PML4E, PDPTE, PDE, PTE):
        for junk in (0, 0x38, 0xFF8, 0x3F << 40, ((1 << 64) - 1) & ~RIGHTS):
            for kind in SIMPLE:
                draft = _far(rng, "edge: not present").access(kind)
                draft.ept[0][position] = junk
                if position != PTE:
                    draft.rights(PTE, WRITE)
                yield draft
    for position in (PML4E, PDPTE, PDE):
        draft = _far(rng, "edge: not present").access(Kind.READ).rights(position, WRITE)
        draft.ept[0][PTE] = 0
        yield draft


def large_pages(rng: Random) -> Iterator[Draft]:
    """2-MByte and 1-GByte pages: rights, and bit 61 and the vector that must not matter."""
    for leaf, position in ((2, PDE), (3, PDPTE)):
        for value in (1, 3, 4, 5, 7):
            for spp in (0, SPP_BIT):
                for kind in (*SIMPLE, Kind.ADD):
                    draft = _far(rng, "edge: large page", leaf).rights(position, value).access(kind)
                    draft.ept[0][position] = draft.ept[0][position] & ~SPP_BIT | spp
                    draft.sppt[0][L1E] = ALL_SUBPAGES
                    yield draft


def eligibility(rng: Random) -> Iterator[Draft]:
    """Which level lacks W, where bit 61 is, and whether the control is on; allowed, denied, and no SPPT at all."""
    for position in (PML4E, PDPTE, PDE, PTE, None):
        for marked in (PML4E, PDPTE, PDE, PTE):
            for control in (SECONDARY_SPP, 0):
                for vector, l4e in ((ALL_SUBPAGES, None), (0, None), (ALL_SUBPAGES, 0), (ALL_SUBPAGES, 0xFFF)):
                    draft = _far(rng, "edge: eligibility").access(rng.choice((Kind.WRITE, Kind.WRITE, *SIMPLE)))
                    if position is not None:
                        draft.rights(position, READ_EXECUTE)
                    for at in (PML4E, PDPTE, PDE, PTE):
                        draft.ept[0][at] = draft.ept[0][at] & ~SPP_BIT | (SPP_BIT if at == marked else 0)
                    draft.sppt[0][L1E] = vector
                    if l4e is not None:
                        draft.sppt[0][L4E] = l4e
                    draft.secondary = draft.secondary & ~SECONDARY_SPP | control
                    yield draft
    for position in (PML4E, PDPTE, PDE, PTE):
        for kind in (Kind.READ, Kind.WRITE, *sorted(READ_MODIFY_WRITES)):
            yield _far(rng, "edge: execute-only").access(kind).protect(ALL_SUBPAGES, position=position, rights=4)


def subpages(rng: Random) -> Iterator[Draft]:
    """Each sub-page alone allowed or alone denied, at its first and its last byte and just outside it."""
    for subpage in range(32):
        alone = 1 << 2 * subpage
        for vector in (alone, ALL_SUBPAGES ^ alone):
            for offset in (0, SUBPAGE - 1, -1, SUBPAGE):
                at = subpage * SUBPAGE + offset
                if 0 <= at < layout.PAGE:
                    draft = Draft(rng, "edge: sub-page").access(Kind.WRITE, 1).protect(vector)
                    draft.offset = at
                    yield draft


def sppt_entries(rng: Random) -> Iterator[Draft]:
    """Every bit of the upper SPPT entries with and without valid, over good and bad entries below."""
    for position in range(3):
        for bit in (None, *range(1, 12), *HIGH_ADDRESS, *range(52, 64)):
            for valid in (0, 1):
                draft = Draft(rng, "edge: SPPT entry").protect(ALL_SUBPAGES).store()
                flipped = 0 if bit is None else 1 << bit
                draft.sppt[0][position] = draft.sppt[0][position] & ~1 | valid | flipped
                if rng.random() < 0.3 and position < 2:
                    draft.sppt[0][position + 1] = rng.choice((0, 2, 3))
                yield draft


def vectors_with_odd_bits(rng: Random) -> Iterator[Draft]:
    """Odd bits of the vector, of the touched sub-page and of others."""
    for vector in (2, 1 | 1 << 63, ALL_SUBPAGES | 1 << 31, ALL_SUBPAGES << 1, (1 << 64) - 1):
        draft = Draft(rng, "edge: odd bits").protect(vector).access(Kind.WRITE)
        draft.offset = 0
        yield draft


def straddling(rng: Random) -> Iterator[Draft]:
    """Writes over two sub-pages, all four combinations of their bits."""
    for combination in range(4):
        for kind, size in ((Kind.WRITE, 2), (Kind.WRITE, 8), (Kind.WRITE, 16), (Kind.WRITE, 64), (Kind.XCHG, 8)):
            if combination == 1 and size != 8:  # the one that Bochs gets wrong: once per kind is enough
                continue
            draft = Draft(rng, "edge: straddle").access(kind, size, "straddle")
            low, high = draft.subpages
            granted = (combination & 1) << 2 * low | (combination >> 1) << 2 * high
            yield draft.protect(granted | ALL_SUBPAGES & ~(1 << 2 * low | 1 << 2 * high))


def crossing(rng: Random) -> Iterator[Draft]:
    """Accesses over two pages, each page in each of seven states."""
    for first in STATES:
        for second in STATES:
            for kind in (*SIMPLE, Kind.ADD):
                draft = Draft(rng, "edge: crossing").access(kind, where="cross")
                spoil(draft, 0, first)
                spoil(draft, 1, second)
                yield draft


STATES = ("open", "read-only", "absent", "misconfigured", "granted", "denied", "missed")


def spoil(draft: Draft, page: int, state: str) -> None:
    """Put one page of a page-crossing access in a state, by its PTE and its SPPT entries alone."""
    if state == "read-only":
        draft.rights(PTE, READ, page)
    elif state == "absent":
        draft.rights(PTE, 0, page)
    elif state == "misconfigured":
        draft.rights(PTE, WRITE, page)
    elif state == "granted":
        draft.protect(ALL_SUBPAGES, page)
    elif state == "denied":
        draft.protect(0, page)
    elif state == "missed":
        draft.protect(ALL_SUBPAGES, page)
        draft.sppt[page][2] = 0


def guest_pages(rng: Random) -> Iterator[Draft]:
    """Guest PTE flags against the state of the page: #PF comes before any event on the final address."""
    for flags in (0, 0x62, 0x61, 0x63, 0x65, 0x67, 1 << 63 | 0x63, 1 << 51 | 0x63, 1 << 40 | 0x63, 0x1E0 | 0x63):
        for state in ("open", "absent", "misconfigured", "denied", "missed"):
            for kind in (*SIMPLE, Kind.ADD):
                draft = Draft(rng, "edge: guest page").access(kind)
                draft.guest_flags[0] = flags
                spoil(draft, 0, state)
                yield draft


def guest_tables(rng: Random) -> Iterator[Draft]:
    """EPT rights of the page that holds the guest's PTEs, guest accessed and dirty flags, EPT flags on and off."""
    for raw in (0x37, 0x35, 0x33, 0x31, 0x34, 0x30, 0x32, 0x1F, SPP_BIT | 0x35, SPP_BIT | 0x34, 1 << 45 | 0x37):
        for flags in (0x63, 0x43, 0x23, 0x03, 0x61, 0x00):
            for on in (0, EPTP_ACCESSED_DIRTY):
                for kind in (Kind.READ, Kind.WRITE):
                    draft = Draft(rng, "edge: guest table").access(kind)
                    draft.table_pte = layout.TEST_PT | raw
                    draft.guest_flags[0] = flags
                    draft.eptp = draft.eptp & ~EPTP_ACCESSED_DIRTY | on
                    if kind == Kind.WRITE and flags == 0x63:
                        spoil(draft, 0, rng.choice(STATES))
                    yield draft


def flags(rng: Random) -> Iterator[Draft]:
    """EPT accessed and dirty flags from every start, by page size and kind of access, allowed and not."""
    for leaf in (1, 2, 3):
        for start in (0, 0x100, 0x200, 0x300):
            for kind in Kind:
                for right in (RIGHTS, READ):
                    draft = _far(rng, "edge: flags", leaf).access(kind).rights(4 - leaf, right)
                    draft.eptp |= EPTP_ACCESSED_DIRTY
                    for position in range(5 - leaf):
                        draft.ept[0][position] = draft.ept[0][position] & ~0x300 | start
                    yield draft
    for start in (0, 0x100, 0x300):
        for vector in (ALL_SUBPAGES, 0):
            draft = Draft(rng, "edge: flags").store().protect(vector)
            draft.eptp |= EPTP_ACCESSED_DIRTY
            draft.ept[0][PTE] = draft.ept[0][PTE] & ~0x300 | start
            yield draft


def entry_checks(rng: Random) -> Iterator[Draft]:
    """EPTP and SPPTP that VM entry must refuse, and their neighbours that it must take."""
    for low in range(0x80):
        if low & 0x38 in (0x18, 0x20, 0x10) or not low & 7:
            draft = Draft(rng, "edge: entry").access(Kind.READ)
            draft.eptp = layout.EPT_PML4 | low
            yield draft
    for bit in (7, 8, 9, 10, 11, *HIGH_ADDRESS, *range(52, 64)):
        draft = Draft(rng, "edge: entry").access(Kind.READ)
        draft.eptp |= 1 << bit
        yield draft
    for bit in (None, *range(12), *HIGH_ADDRESS, *range(52, 64)):
        for control in (SECONDARY_SPP, 0):
            draft = Draft(rng, "edge: entry").store().protect(ALL_SUBPAGES)
            draft.spptp |= 0 if bit is None else 1 << bit
            draft.secondary = draft.secondary & ~SECONDARY_SPP | control
            yield draft
    draft = Draft(rng, "edge: entry").access(Kind.READ)
    draft.secondary = SECONDARY_SPP
    yield draft
