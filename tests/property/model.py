"""What a machine should do, said as plainly as possible: dictionaries, one sub-page and one byte at a time.

Nothing here comes from the engine, and nothing is fast.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

SUBPAGE = 128
PAGE = 4096
PER_PAGE = 32
READ, WRITE = 0, 1


class Refused(Exception):
    """The machine says no, and nothing changes."""


@dataclass
class Slot:
    gfn: int
    pages: int
    read_only: bool

    def gfns(self) -> range:
        return range(self.gfn, self.gfn + self.pages)


@dataclass
class Tally:
    """Totals of one replay."""

    records: int = 0
    writes: int = 0
    violations: int = 0
    page_granular: int = 0
    mmio: int = 0
    grants: int = 0
    stopped_at: int | None = None
    hits: Counter[str] = field(default_factory=Counter)
    collateral: Counter[str] = field(default_factory=Counter)
    first: dict[str, int] = field(default_factory=dict)
    violating: list[tuple[int, int, int]] = field(default_factory=list)  # index, page, refused sub-pages


class Model:
    """Slots, the layers of every sub-page as sets of sub-page numbers, and bytes by address."""

    def __init__(self) -> None:
        self.slots: dict[int, Slot] = {}
        self.denied: set[int] = set()
        self.granted: set[int] = set()
        self.protections: dict[str, list[tuple[str, int, int]]] = {}
        self.bytes: dict[int, int] = {}

    # ---- what is asked

    def slot_of(self, gfn: int) -> Slot | None:
        return next((slot for slot in self.slots.values() if gfn in slot.gfns()), None)

    def covered(self) -> set[int]:
        return {
            number
            for objects in self.protections.values()
            for _, gpa, size in objects
            for number in range(gpa // SUBPAGE, (gpa + size - 1) // SUBPAGE + 1)
        }

    def refuses(self, number: int, covered: set[int]) -> bool:
        return number in self.denied or (number in covered and number not in self.granted)

    def mask(self, gfn: int, layer: str) -> int:
        covered = self.covered()
        numbers = range(gfn * PER_PAGE, (gfn + 1) * PER_PAGE)
        test = {
            "effective": lambda n: not self.refuses(n, covered),
            "set": lambda n: n not in self.denied,
            "protected": lambda n: n in covered,
            "granted": lambda n: n in self.granted,
        }[layer]
        return sum(1 << s for s, number in enumerate(numbers) if test(number))

    def read(self, gpa: int, size: int) -> bytes:
        return bytes(self.bytes.get(address, 0) for address in range(gpa, gpa + size))

    # ---- what is done

    def set_slot(self, number: int, gfn: int, pages: int, read_only: bool) -> None:
        known = self.slots.get(number)
        new = Slot(gfn, pages, read_only)
        if known == new:
            return
        for other, slot in self.slots.items():
            if other != number and gfn < slot.gfn + slot.pages and slot.gfn < gfn + pages:
                raise Refused
        if known is not None:
            if (known.pages, known.read_only) != (pages, read_only) or known.gfn == gfn:
                raise Refused
            self._move(known, gfn)
        self.slots[number] = new

    def _move(self, old: Slot, gfn: int) -> None:
        pages = set(old.gfns())
        shift = gfn - old.gfn
        denied = {n for n in self.denied if n // PER_PAGE in pages}
        granted = {n for n in self.granted if n // PER_PAGE in pages}
        content = {a: b for a, b in self.bytes.items() if a // PAGE in pages}
        self._forget(old)
        self.denied |= {n + shift * PER_PAGE for n in denied}
        self.granted |= {n + shift * PER_PAGE for n in granted} & self.covered()
        self.bytes.update({a + shift * PAGE: b for a, b in content.items()})

    def _forget(self, slot: Slot) -> None:
        pages = set(slot.gfns())
        self.denied = {n for n in self.denied if n // PER_PAGE not in pages}
        self.granted = {n for n in self.granted if n // PER_PAGE not in pages}
        self.bytes = {a: b for a, b in self.bytes.items() if a // PAGE not in pages}

    def delete_slot(self, number: int) -> None:
        if number not in self.slots:
            raise Refused
        self._forget(self.slots.pop(number))

    def set_map(self, gfn: int, pages: int, mask: int) -> None:
        self._need_slots(range(gfn, gfn + pages))
        for page in range(gfn, gfn + pages):
            for s in range(PER_PAGE):
                number = page * PER_PAGE + s
                self.granted.discard(number)
                if mask >> s & 1:
                    self.denied.discard(number)
                else:
                    self.denied.add(number)

    def protect(self, name: str, objects: list[tuple[str, int, int]]) -> None:
        if name in self.protections:
            raise Refused
        for _, gpa, size in objects:
            self._need_slots(range(gpa // PAGE, (gpa + size - 1) // PAGE + 1))
        self.protections[name] = objects
        self.granted &= self.covered()

    def unprotect(self, name: str) -> None:
        if name not in self.protections:
            raise Refused
        del self.protections[name]
        self.granted &= self.covered()

    def write(self, gpa: int, data: bytes) -> None:
        self._need_slots(range(gpa // PAGE, (gpa + len(data) - 1) // PAGE + 1))
        self._store(gpa, data)

    def _store(self, gpa: int, data: bytes) -> None:
        self.bytes.update({gpa + i: byte for i, byte in enumerate(data)})

    def _need_slots(self, gfns: range) -> None:
        if any(self.slot_of(gfn) is None for gfn in gfns):
            raise Refused

    # ---- accesses

    def replay(self, rows: list[tuple[int, int, int]], on_violation: str) -> Tally:
        tally = Tally()
        for index, (gpa, size, access) in enumerate(rows):
            outcome, page, refused = self._attempt(gpa, size, access)
            guarded = access == WRITE and self._in_guarded_page(gpa, size)
            tally.page_granular += guarded
            if outcome == "violation":
                tally.violations += 1
                tally.violating.append((index, page, refused))
                self._count_objects(tally, index, gpa, size)
                if on_violation == "stop":
                    tally.stopped_at = index
                    return tally
                if on_violation == "grant":
                    tally.grants += 1
                    self._grant(gpa, size)
                    outcome, _, _ = self._attempt(gpa, size, access)
            tally.mmio += outcome == "mmio"
            tally.records += 1
            tally.writes += access == WRITE
        return tally

    def _pages(self, gpa: int, size: int) -> dict[int, list[int]]:
        """Touched sub-page numbers by page, low page first."""
        pages: dict[int, list[int]] = {}
        for number in range(gpa // SUBPAGE, (gpa + size - 1) // SUBPAGE + 1):
            pages.setdefault(number // PER_PAGE, []).append(number)
        return pages

    def _attempt(self, gpa: int, size: int, access: int) -> tuple[str, int, int]:
        covered = self.covered()
        for gfn, numbers in self._pages(gpa, size).items():
            slot = self.slot_of(gfn)
            if slot is None or (access == WRITE and slot.read_only):
                return "mmio", gfn, 0
            if access == WRITE:
                refused = sum(1 << n % PER_PAGE for n in numbers if self.refuses(n, covered))
                if refused:
                    return "violation", gfn, refused
        return "completed", 0, 0

    def _in_guarded_page(self, gpa: int, size: int) -> bool:
        covered = self.covered()
        return any(
            self.slot_of(gfn) is not None
            and any(self.refuses(n, covered) for n in range(gfn * PER_PAGE, (gfn + 1) * PER_PAGE))
            for gfn in self._pages(gpa, size)
        )

    def _grant(self, gpa: int, size: int) -> None:
        covered = self.covered()
        for gfn, numbers in self._pages(gpa, size).items():
            if self.slot_of(gfn) is None:
                continue
            for number in numbers:
                if self.refuses(number, covered):
                    self.denied.discard(number)
                    if number in covered:
                        self.granted.add(number)

    def _count_objects(self, tally: Tally, index: int, gpa: int, size: int) -> None:
        touched = {n for numbers in self._pages(gpa, size).values() for n in numbers}
        names: dict[str, bool] = {}
        for objects in self.protections.values():
            for name, start, length in objects:
                if touched & set(range(start // SUBPAGE, (start + length - 1) // SUBPAGE + 1)):
                    own = gpa < start + length and start < gpa + size
                    names[name] = names.get(name, False) or own
        for name, own in names.items():
            tally.hits[name] += 1
            tally.collateral[name] += not own
            tally.first.setdefault(name, index)
