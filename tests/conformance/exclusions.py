"""Where Debian's Bochs 2.7 is wrong, by rule.

A rule explains a difference from the vector and both outcomes, as narrowly as the fault allows; a difference that no
rule explains is a failure. ``source`` names the section of the Intel SDM, volume 3C (order no. 326019-082), that
overrides Bochs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from . import layout
from .compare import EPT_MISCONFIGURATION, EPT_VIOLATION, SPP_EVENT, differing
from .draft import L1E, LARGE, ODD_BITS, PDE, PDPTE, PTE, READ, SPP_BIT, SUBPAGE, WRITE
from .vectors import READ_MODIFY_WRITES, STORES, Event, Outcome, Page, Vector

# Exit qualification of an EPT violation.
Q_READ, Q_WRITE, Q_LINEAR_VALID, Q_FINAL = 1 << 0, 1 << 1, 1 << 7, 1 << 8
Q_READABLE, Q_WRITABLE = 1 << 3, 1 << 4
GUEST_ACCESSED, GUEST_DIRTY = 1 << 5, 1 << 6


@dataclass(frozen=True, slots=True)
class Rule:
    """A known fault of Bochs; ``explains(vector, ours, bochs)`` for two outcomes that differ."""

    name: str
    fault: str
    source: str
    explains: Callable[[Vector, Outcome, Outcome], bool]


def explanation(vector: Vector, ours: Outcome, bochs: Outcome) -> Rule | None:
    """The first rule that explains the difference."""
    return next((rule for rule in RULES if rule.explains(vector, ours, bochs)), None)


def _violation(outcome: Outcome, *, bits: int, clear: int = 0) -> bool:
    """Whether the outcome is an EPT violation with these qualification bits set, and those clear."""
    exited = outcome.event == Event.EXIT and outcome.reason == EPT_VIOLATION
    return exited and outcome.qualification & (bits | clear) == bits


def _touched(vector: Vector, page: Page) -> list[int]:
    """Vector bits of the sub-pages of one page that the access touches, lowest first."""
    start, end = vector.offset, vector.offset + vector.size
    if page is vector.second:
        start, end = 0, end - layout.PAGE
    last = min(end, layout.PAGE) - 1
    return [page.sppt[L1E] >> 2 * subpage & 1 for subpage in range(start // SUBPAGE, last // SUBPAGE + 1)]


def _page_of(vector: Vector, gpa: int) -> Page | None:
    """The test page that an exit reports."""
    pages = (vector.first, vector.second)
    return next((page for page in pages if page.gpa == gpa & ~(layout.PAGE - 1)), None)


def _first_byte_only(vector: Vector, ours: Outcome, bochs: Outcome) -> bool:
    """Two sub-pages of one page, the first granted and the other not: Bochs lets the write through."""
    page = _page_of(vector, ours.gpa)
    denied = _violation(ours, bits=Q_WRITE | Q_FINAL, clear=Q_WRITABLE)
    if page is None or not denied or vector.kind not in STORES or vector.crosses:
        return False
    granted = _touched(vector, page)
    return granted[0] == 1 and 0 in granted and bochs.event == Event.COMPLETED


def _odd_bits(vector: Vector, ours: Outcome, bochs: Outcome) -> bool:
    """Odd bits of the vector: Bochs goes by the even ones."""
    page = _page_of(vector, ours.gpa)
    misconfigured = ours.event == Event.EXIT and ours.reason == SPP_EVENT and ours.qualification == 0
    if page is None or not misconfigured or not page.sppt[L1E] & ODD_BITS:
        return False
    if not _touched(vector, page)[0]:
        return _violation(bochs, bits=Q_WRITE | Q_FINAL, clear=Q_WRITABLE) and bochs.gpa == ours.gpa
    return bochs.event == Event.COMPLETED or (vector.crosses and bochs.gla > ours.gla)


def _large_page_bit_12(vector: Vector, ours: Outcome, bochs: Outcome) -> bool:
    """Bit 12 of an entry that maps a large page is reserved; Bochs ignores it."""
    page = _page_of(vector, ours.gpa)
    misconfigured = ours.event == Event.EXIT and ours.reason == EPT_MISCONFIGURATION
    if page is None or not misconfigured or (bochs.event == Event.EXIT and bochs.reason == EPT_MISCONFIGURATION):
        return False
    entry = page.ept[PDPTE] if page.ept[PDPTE] & LARGE else page.ept[PDE]
    return entry & LARGE != 0 and entry >> 12 & 1 == 1


def _unchecked_update(vector: Vector, ours: Outcome, bochs: Outcome) -> bool:
    """EPT flags off, and the page with the guest PTEs not writable: Bochs sets guest A or D there all the same."""
    paging_write = _violation(ours, bits=Q_READ | Q_WRITE | Q_READABLE | Q_LINEAR_VALID, clear=Q_FINAL | Q_WRITABLE)
    if vector.accessed_dirty or vector.table_pte & WRITE or not paging_write or bochs.gpa == ours.gpa:
        return False
    page, linear = (vector.first, layout.LINEAR) if ours.gla == vector.linear else (vector.second, vector.linear)
    if page is vector.second:
        linear = layout.LINEAR + layout.PAGE
    needed = GUEST_ACCESSED | (GUEST_DIRTY if vector.kind in STORES else 0)
    return ours.gpa == layout.guest_entry(linear) and page.guest_pte & needed != needed


def _paging_access_is_read_too(vector: Vector, ours: Outcome, bochs: Outcome) -> bool:
    """EPT flags on: a violation by a guest paging access has bits 0 and 1, Bochs sets bit 1 alone."""
    if not vector.accessed_dirty or differing(ours, bochs) != {"qualification"}:
        return False
    paging = _violation(ours, bits=Q_READ | Q_WRITE | Q_LINEAR_VALID, clear=Q_FINAL)
    return paging and ours.qualification == bochs.qualification | Q_READ


def _unreadable_update(vector: Vector, ours: Outcome, bochs: Outcome) -> bool:
    """A read-modify-write needs R, which SPP does not give; Bochs asks for W alone."""
    page = _page_of(vector, ours.gpa)
    refused = _violation(ours, bits=Q_WRITE | Q_FINAL, clear=Q_READABLE | Q_WRITABLE)
    if page is None or not refused or vector.kind not in READ_MODIFY_WRITES or not page.ept[PTE] & SPP_BIT:
        return False
    return all(entry & (READ | 4) for entry in page.ept) and not all(entry & READ for entry in page.ept)


def _flags_of_first_page(vector: Vector, ours: Outcome, bochs: Outcome) -> bool:
    """An access over two pages that fails on the second: Bochs has set the flags of the first page by then."""
    failed_on_second = bochs.gla == layout.LINEAR + layout.PAGE and not bochs.landed
    if not vector.crosses or not failed_on_second or differing(ours, bochs) != {"changed"}:
        return False
    before, extra = set(ours.changed), set(bochs.changed) - set(ours.changed)
    return before < set(bochs.changed) and {address for address, _ in extra} <= set(vector.ept_slots()[0])


RULES = (
    Rule(
        "first byte decides",
        "a write over two sub-pages is checked by the sub-page of its first byte",
        "29.3.4.2: the write is allowed only if the bits of all the sub-pages it accesses are 1",
        _first_byte_only,
    ),
    Rule(
        "odd vector bits",
        "reserved bits of the sub-page permission vector are not checked",
        "29.3.4.2: an odd bit of the vector that is 1 is an SPP misconfiguration",
        _odd_bits,
    ),
    Rule(
        "bit 12 of large pages",
        "bit 12 of an EPT entry that maps a 2-MByte or 1-GByte page is not treated as reserved",
        "29.3.2, tables 29-3 and 29-5: bits 20:12 and 29:12 are reserved",
        _large_page_bit_12,
    ),
    Rule(
        "unchecked guest A/D update",
        "without EPT accessed and dirty flags the processor's updates of guest entries are not checked against EPT",
        "29.3.3.2: setting an accessed or dirty flag in a guest paging structure is a data write",
        _unchecked_update,
    ),
    Rule(
        "paging access counted as write alone",
        "with EPT accessed and dirty flags a violation by a guest paging access has bit 1 of the qualification, not 0",
        "28.2.1, table 28-7, bit 0: such an access sets both bits",
        _paging_access_is_read_too,
    ),
    Rule(
        "read-modify-write of an unreadable page",
        "a read-modify-write of an execute-only page is granted by SPP as if it were a write",
        "29.3.3.2: a data read needs bit 0 of every entry, whatever SPP says about writes",
        _unreadable_update,
    ),
    Rule(
        "flags of the first page",
        "an access over two pages sets EPT accessed and dirty flags for the first page when the second refuses it",
        "29.3.5: a dirty flag says that the page was written, and nothing is written to either (29.3.4.1)",
        _flags_of_first_page,
    ),
)
