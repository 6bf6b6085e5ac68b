"""A second reading of the flush calls, written from the rules alone: sets and lists, no code of the engine.

Both functions take the input value and how to read words of the block; they give the status, the VP indices that are
flushed, and the names of the translations that go (``kvm``) or have to go (``tlfs``) on each of them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from .flush_machine import ENTRIES, VP_INDICES

# Words from a position on, or None where they are not there: (first, how many)
Reader = Callable[[int, int], list[int] | None]
WORD = 1 << 64
PAGE = 0x1000
SIZES = {12: PAGE, 21: PAGE << 9, 30: PAGE << 18}


class Answer(NamedTuple):
    """``status`` None: the parent gets a message instead."""

    status: int | None
    reps: int = 0
    vps: frozenset[int] = frozenset()
    entries: frozenset[str] = frozenset()


class Parts(NamedTuple):
    code: int
    fast: bool
    var: int
    nested: bool
    reps: int
    start: int
    reserved: int


def parts(control: int) -> Parts:
    bits = f"{control:064b}"[::-1]

    def field(low: int, high: int) -> int:
        return int(bits[low : high + 1][::-1], 2)

    reserved = field(27, 30) | field(44, 47) | field(60, 63)
    return Parts(field(0, 15), bits[16] == "1", field(17, 26), bits[31] == "1", field(32, 43), field(48, 59), reserved)


def members(mask: int, banks: list[int]) -> set[int]:
    """The VPs of a sparse set: its banks are packed in ascending order."""
    found, packed = set(), list(banks)
    for bank in range(64):
        if mask >> bank & 1 and packed:
            word = packed.pop(0)
            found |= {64 * bank + vp for vp in range(64) if word >> vp & 1}
    return found


def touched(first: int, pages: int, bits: int, linear: int) -> bool:
    """Whether bytes from ``first`` on, a number of pages, and the page of a translation have one in common.

    Bytes beyond 2^64 are those from 0 on. Those that are no linear address are in no translation.
    """
    size, end = SIZES[bits], first + pages * PAGE
    return any(first < at + size and at < end for at in (linear, linear + WORD))


def canonical(address: int) -> bool:
    return address >> 47 in (0, (1 << 17) - 1)


def simple(words: list[int]) -> list[tuple[int, int]]:
    return [(word & ~0xFFF, (word & 0xFFF) + 1) for word in words]


def within(ranges: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Without what lies beyond 2^64."""
    return [(first, min(pages, (WORD - first) // PAGE)) for first, pages in ranges]


def extended(words: list[int]) -> list[tuple[int, int]]:
    found = []
    for word in words:
        base, pages = word & ~0xFFF, (word & 0x7FF) + 1
        if word >> 11 & 1:
            base, pages = word & ~0x1FFFFF, pages * (1 << 18 if word >> 12 & 1 else 1 << 9)
        found.append((base, pages))
    return found


def covered(ranges: list[tuple[int, int]]) -> frozenset[str]:
    return frozenset(
        name
        for name, (_, linear, bits, _) in ENTRIES.items()
        if any(touched(first, pages, bits, linear) for first, pages in ranges)
    )


def kvm(control: int, read: Reader, *, each_page: bool) -> Answer:
    """Linux in its order; the caller may call and CPUID is not enforced.

    A range goes by each of its pages (7.1), or whole by its first address (6.16).
    """
    c = parts(control)
    everything, everyone = frozenset(ENTRIES), frozenset(VP_INDICES)
    if c.reserved or c.nested:
        return Answer(3)
    if c.code not in (0x02, 0x03, 0x13, 0x14):
        return Answer(2)
    rep, ex = c.code in (0x03, 0x14), c.code in (0x13, 0x14)
    if not ex and c.var:
        return Answer(3)
    if c.start or (c.reps == 0) == rep:
        return Answer(3)
    header = read(0, 4 if ex else 3)
    if header is None:
        return Answer(3)
    if ex:
        if c.var != header[3].bit_count():
            return Answer(3)
        if header[2]:
            vps = everyone
        else:
            if not c.var:
                return Answer(0, c.reps)
            banks = read(4, c.var)
            if banks is None:
                return Answer(3)
            vps = everyone & members(header[3], banks[:16])
    else:
        vps = everyone if header[1] & 1 or not header[2] else everyone & members(1, [header[2]])
    entries = everything
    if rep and c.reps <= 15:
        words = read((4 if ex else 3) + c.var, c.reps)
        if words is None:
            return Answer(3)
        entries = everything if WORD - 1 in words else covered(simple([w for w in words if each_page or canonical(w)]))
    return Answer(0, c.reps, vps, entries if vps else frozenset())


def tlfs(control: int, read: Reader, gpa: int, *, memory: Callable[[int, int], bool]) -> Answer:
    """The specification, in the order that a strict reader takes; guest addresses have 48 and 46 bits."""
    c = parts(control)
    if c.code not in (0x02, 0x03, 0x13, 0x14):
        return Answer(2)
    rep, ex = c.code in (0x03, 0x14), c.code in (0x13, 0x14)
    if c.reserved or c.nested or (c.var and not ex):
        return Answer(3)
    if (rep and c.start >= c.reps) or (not rep and (c.reps or c.start)):
        return Answer(3)
    words = (4 if ex else 3) + c.var + c.reps
    if c.fast:
        if words > 14:
            return Answer(3)
    else:
        if gpa % 8 or gpa % PAGE + 8 * words > PAGE or gpa + 8 * words > 1 << 46:
            return Answer(4)
        if not memory(gpa, 8 * words):
            return Answer(None)
    block = read(0, words)
    assert block is not None
    space, flags = block[0], block[1]
    if flags >> 4 or (flags & 8 and not rep) or (flags & 4 and rep):
        return Answer(5)
    if not flags & 2 and space >> 46:
        return Answer(5)
    if ex:
        if block[2] > 1 or c.var != block[3].bit_count():
            return Answer(5)
        named = set() if block[2] else members(block[3], block[4 : 4 + c.var])
    else:
        named = members(1, [block[2]])
    all_vps = bool(flags & 1) or (ex and block[2] == 1)
    if not all_vps and not named:
        return Answer(5)
    vps = frozenset(VP_INDICES) if all_vps else frozenset(VP_INDICES) & named
    entries = frozenset(ENTRIES)
    if rep:
        listed = block[words - c.reps + c.start :]
        entries = covered(within(extended(listed) if flags & 8 else simple(listed)))
    held = {
        name
        for name, (own, _, _, is_global) in ENTRIES.items()
        if (not flags & 4 if is_global else flags & 2 or own == space & ~0xFFF)
    }
    return Answer(0, c.reps, vps, entries & held if vps else frozenset())
