"""Which protected objects a violation touches, and whether it touched their own bytes or only their neighbours.

Objects are byte ranges rounded outward to sub-pages, or to pages. Cutting the line of sub-pages at every end of a range
leaves pieces whose set of ranges does not change; a violation looks up the few pieces it touches.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from engine.arch.sppt import SUBPAGE_SHIFT
from engine.errors import LimitExceeded
from engine.jit import kernel, position
from engine.kvm.protections import ProtectedObject, covered_subpages
from engine.kvm.resolutions import VIOLATION
from engine.kvm.vcpu_run import EXIT_GPA, EXIT_INDEX, EXIT_REASON, EXIT_RECORD
from engine.trace.scattered import Scattered

# Ranges that lie on top of each other are stored once a piece; nesting thousands of them grows with the square.
MAX_MEMBERS = 1 << 24

HIT_VIOLATIONS = 0
HIT_COLLATERAL = 1
HIT_FIRST = 2
HIT_WORDS = 3


# A table of the sub-pages that were looked for last, by some bits of a product of their number: how many it has room
# for, where a few violations are to come and where many.
RECENT_FEW = 16
RECENT_MANY = 4096
RECENT_FACTOR = 0x9E37_79B1
RECENT_SHIFT = 20
RECENT_BITS = 0x7FFF_FFFF


class ObjectIndex(NamedTuple):
    """Lookup tables: ``cuts`` int64[p + 1] first sub-pages of pieces, ``offsets`` int64[p + 1] into ``members``
    (positions of ranges), ``ranges`` int64[r, 5] of [first byte, end, name position, first sub-page, last sub-page]."""

    cuts: NDArray[np.int64]
    offsets: NDArray[np.int64]
    members: NDArray[np.int64]
    ranges: NDArray[np.int64]


@dataclass(frozen=True)
class Targets:
    """Everything a replay needs to know of the objects of a machine.

    ``names`` are distinct, in order of definition; ``subpages`` how many sub-pages each covers.
    """

    names: tuple[str, ...]
    subpages: tuple[int, ...]
    index: ObjectIndex


def targets_of(objects: Sequence[ProtectedObject]) -> Targets:
    """Targets for a set of objects; ranges of one name are one object."""
    ranges: dict[str, list[ProtectedObject]] = {}
    for item in objects:
        ranges.setdefault(item.name, []).append(item)
    return Targets(
        tuple(ranges), tuple(covered_subpages(r) for r in ranges.values()), build_index(objects, tuple(ranges))
    )


def build_index(objects: Sequence[ProtectedObject], names: Sequence[str]) -> ObjectIndex:
    """Index for a set of objects, which may overlap; ``names`` are their distinct names."""
    position = {name: i for i, name in enumerate(names)}
    rows = [(o.gpa, o.gpa + o.size, position[o.name], o.first_subpage, o.last_subpage) for o in objects]
    return index_of(np.array(rows, np.int64).reshape(-1, 5))


def index_of(ranges: NDArray[np.int64]) -> ObjectIndex:
    """Index for ranges as ``ObjectIndex`` has them; see ``build_index``."""
    first = ranges[:, 3]
    end = ranges[:, 4] + 1
    cuts = np.unique(np.concatenate([first, end]))
    low = np.searchsorted(cuts, first)
    high = np.searchsorted(cuts, end)
    total = int((high - low).sum())
    if total > MAX_MEMBERS:
        raise LimitExceeded(f"overlapping objects may share {MAX_MEMBERS} pieces at most", field="objects", value=total)
    piece = np.concatenate([np.arange(a, b) for a, b in zip(low, high, strict=True)] or [np.zeros(0, np.int64)])
    owner = np.repeat(np.arange(len(ranges)), high - low)
    order = np.argsort(piece, kind="stable")
    offsets = np.searchsorted(piece[order], np.arange(max(len(cuts), 1))).astype(np.int64)
    return ObjectIndex(cuts.astype(np.int64), offsets, owner[order].astype(np.int64), ranges)


def no_recent(room: int = RECENT_FEW) -> NDArray[np.int64]:
    """Scratch for ``attribute``: int64[room, 2] of sub-page and piece, a power of two; -1 is no sub-page."""
    return np.full((room, 2), -1, dtype=np.int64)


@kernel
def piece_at(cuts, subpage):
    """Piece that holds a sub-page, -1 before the first."""
    low = 0
    high = cuts.shape[0]
    while low < high:
        middle = (low + high) >> 1
        if cuts[middle] <= subpage:
            low = middle + 1
        else:
            high = middle
    return low - 1


@kernel
def attribute(index, log, count, hits, seen, touched, recent):
    """Add the violations among ``count`` log records to ``hits`` (int64[names, HIT_WORDS]).

    ``seen`` and ``touched`` int64[names] are scratch: the last record that counted for a name, and the last one that
    touched its own bytes. Both start at -1, and so does the first index in ``hits``. ``recent`` is scratch, too
    (``no_recent``): pieces of sub-pages that were looked for.
    """
    cuts, offsets, members, ranges = index.cuts, index.offsets, index.members, index.ranges
    for row in range(count):
        if (log[row, EXIT_REASON] >> 16) & 0xFF != VIOLATION:
            continue
        begin = log[row, EXIT_GPA]
        end = begin + (log[row, EXIT_RECORD] & 0xFFFF)
        first = begin >> SUBPAGE_SHIFT
        last = (end - 1) >> SUBPAGE_SHIFT
        stamp = log[row, EXIT_INDEX]
        # Violations come back to the same sub-pages.
        at = position((first & RECENT_BITS) * RECENT_FACTOR >> RECENT_SHIFT & (recent.shape[0] - 1))
        if recent[at, 0] != first:
            recent[at, 0], recent[at, 1] = first, max(piece_at(cuts, first), 0)
        piece = recent[at, 1]
        while piece + 1 < cuts.shape[0] and cuts[position(piece)] <= last:
            for each in range(offsets[position(piece)], offsets[position(piece + 1)]):
                member = position(members[position(each)])
                name = position(ranges[member, 2])
                own = begin < ranges[member, 1] and ranges[member, 0] < end
                # Once for each name, however many of its ranges are touched.
                if seen[name] != stamp:
                    seen[name] = stamp
                    hits[name, HIT_VIOLATIONS] += 1
                    hits[name, HIT_COLLATERAL] += not own
                    if hits[name, HIT_FIRST] < 0:
                        hits[name, HIT_FIRST] = stamp
                    if own:
                        touched[name] = stamp
                elif own and touched[name] != stamp:
                    touched[name] = stamp
                    hits[name, HIT_COLLATERAL] -= 1
            piece += 1


@kernel
def fill_objects(index, gpas, sizes, offsets, positions, seen):
    """Name positions of the objects each access touches, ascending; returns how many there are.

    ``offsets`` int64[n + 1] is filled whole; ``positions`` as far as it reaches. ``seen`` int64[names] starts at -1.
    """
    used = 0
    for row in range(gpas.shape[0]):
        offsets[row] = used
        begin = np.int64(gpas[row])
        last = (begin + np.int64(sizes[row]) - 1) >> SUBPAGE_SHIFT
        piece = max(piece_at(index.cuts, begin >> SUBPAGE_SHIFT), 0)
        while piece + 1 < index.cuts.shape[0] and index.cuts[piece] <= last:
            for at in range(index.offsets[piece], index.offsets[piece + 1]):
                name = index.ranges[index.members[at], 2]
                if seen[name] != row:
                    seen[name] = row
                    if used < positions.shape[0]:
                        positions[used] = name
                    used += 1
            piece += 1
    offsets[gpas.shape[0]] = used
    return used


def objects_of(
    index: ObjectIndex, gpas: NDArray[np.uint64], sizes: NDArray[np.uint16]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(offsets int64[n + 1], name positions): the objects one of whose sub-pages each access touches."""
    offsets = np.zeros(len(gpas) + 1, dtype=np.int64)
    names = int(index.ranges[:, 2].max()) + 1 if len(index.ranges) else 0
    positions = np.zeros(len(gpas) + 64, dtype=np.int64)
    while True:
        used = fill_objects(index, gpas, sizes, offsets, positions, np.full(names, -1, dtype=np.int64))
        if used <= len(positions):
            return offsets, positions[:used]
        positions = np.zeros(used, dtype=np.int64)


def objects_of_scattered(
    index: ObjectIndex, gpas: NDArray[np.uint64], sizes: NDArray[np.uint16], scattered: Scattered
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The same of accesses some of which are scattered: each of their runs is looked for."""
    sizes = sizes.copy()
    first = np.flatnonzero(np.diff(scattered.rows, prepend=-1))
    sizes[scattered.rows[first]] = scattered.size[first]
    offsets, positions = objects_of(index, gpas, sizes)
    run_offsets, run_positions = objects_of(index, scattered.gpa, scattered.size)
    owner = np.concatenate(
        [
            np.repeat(np.arange(len(gpas)), np.diff(offsets)),
            np.repeat(scattered.rows, np.diff(run_offsets)),
        ]
    )
    pairs = np.unique(np.stack([owner, np.concatenate([positions, run_positions])], axis=1), axis=0)
    return np.searchsorted(pairs[:, 0], np.arange(len(gpas) + 1)), np.ascontiguousarray(pairs[:, 1])
