"""What a policy means before anything runs: what ``subpage policy check`` finds."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from engine.arch.sppt import SUBPAGE_SHIFT
from engine.kvm.protections import ProtectedObject, Protection

_SUBPAGE = 1 << SUBPAGE_SHIFT
_PAGE = 4096

# Guest memory as (first address, first address behind it), ascending.
Ram = Sequence[tuple[int, int]]


@dataclass(frozen=True, slots=True)
class Checked:
    """One object: what it takes, and what comes with it.

    ``neighbours`` are the bytes of its sub-pages that are not its own; ``straddles`` says that an access to it can
    touch two pages. ``overlaps`` names objects with bytes of its own, ``shares`` those in the same sub-pages only.
    """

    name: str
    gpa: int
    size: int
    subpages: int
    pages: int
    neighbours: int
    straddles: bool
    outside: bool
    overlaps: tuple[str, ...]
    shares: tuple[str, ...]


def check(protection: Protection, ram: Ram | None) -> list[Checked]:
    """Every object of a protection against each other, and against memory where that is known."""
    order = sorted(range(len(protection.objects)), key=lambda at: protection.objects[at].first_subpage)
    ordered = [protection.objects[at] for at in order]
    met: list[tuple[set[str], set[str]]] = [(set(), set()) for _ in ordered]
    for one, other in _meetings(ordered):
        a, b = protection.objects[order[one]], protection.objects[order[other]]
        which = 0 if a.gpa < b.gpa + b.size and b.gpa < a.gpa + a.size else 1
        met[order[one]][which].add(b.name)
        met[order[other]][which].add(a.name)
    return [_checked(item, ram, *met[at]) for at, item in enumerate(protection.objects)]


def _meetings(ordered: Sequence[ProtectedObject]) -> Iterator[tuple[int, int]]:
    """Pairs of objects with a common sub-page, each with the one before that reaches furthest."""
    furthest = 0
    for at in range(1, len(ordered)):
        if ordered[at].first_subpage <= ordered[furthest].last_subpage:
            yield furthest, at
        if ordered[at].last_subpage > ordered[furthest].last_subpage:
            furthest = at


def _checked(item: ProtectedObject, ram: Ram | None, overlaps: set[str], shares: set[str]) -> Checked:
    subpages = item.last_subpage - item.first_subpage + 1
    return Checked(
        item.name,
        item.gpa,
        item.size,
        subpages,
        item.pages,
        subpages * _SUBPAGE - item.size,
        item.pages > 1 and item.gpa % _PAGE != 0,
        ram is not None and not _inside(ram, item.gpa, item.gpa + item.size),
        tuple(sorted(overlaps)),
        tuple(sorted(shares - overlaps)),
    )


def outside_ranges(protection: Protection, ram: Ram) -> list[int]:
    """Positions of the ranges of ``pages`` that are not all in memory."""
    ranges = enumerate(protection.ranges)
    return [at for at, item in ranges if not _inside(ram, item.gfn * _PAGE, (item.gfn + item.npages) * _PAGE)]


def merged(ram: Ram) -> Ram:
    """The same memory without ranges that touch."""
    found: list[tuple[int, int]] = []
    for begin, end in sorted(ram):
        if found and begin <= found[-1][1]:
            found[-1] = (found[-1][0], max(end, found[-1][1]))
        else:
            found.append((begin, end))
    return found


def _inside(ram: Ram, begin: int, end: int) -> bool:
    at = bisect_right(ram, begin, key=lambda part: part[0]) - 1
    return at >= 0 and end <= ram[at][1]


def report(protection: Protection, ram: Ram | None) -> dict[str, Any]:
    """All that is found, as JSON; ``outside_ram`` counts what has no memory, None where that is not known."""
    objects = check(protection, ram)
    ranges = [] if ram is None else outside_ranges(protection, ram)
    return {
        "name": protection.name,
        "objects": [{**asdict(item), "gpa": hex(item.gpa)} for item in objects],
        "subpages": protection.subpages,
        "pages": protection.pages,
        "neighbours": sum(item.neighbours for item in objects),
        "outside_ram": None if ram is None else sum(item.outside for item in objects) + len(ranges),
        "pages_outside_ram": ranges,
    }
