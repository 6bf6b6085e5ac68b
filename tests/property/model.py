"""What a machine should do, said as plainly as possible: dictionaries, one sub-page and one byte at a time.

Nothing here comes from the engine, and nothing is fast.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

SUBPAGE = 128
PAGE = 4096
PER_PAGE = 32
FULL = 0xFFFF_FFFF
READ, WRITE, EXECUTE = 0, 1, 2
RIGHT_OF = {READ: "r", WRITE: "w", EXECUTE: "x"}


class Refused(Exception):
    """The machine says no, and nothing changes."""


@dataclass
class Slot:
    gfn: int
    pages: int
    read_only: bool
    log_dirty: bool = False

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
    """Slots, the layers of every sub-page as sets of sub-page numbers, bytes by address, and what is dirty.

    ``written`` has the sub-pages written since the last harvest, ``harvests`` by number those not acknowledged,
    ``log`` the pages that KVM's log has. ``lacking`` has the rights out of ``rx`` that a page lacks.
    """

    def __init__(self, profile: str) -> None:
        self.profile = profile
        self.slots: dict[int, Slot] = {}
        self.lacking: dict[int, set[str]] = {}
        self.tracking = "off"
        self.method = "write-protect"
        self.written: set[int] = set()
        self.log: set[int] = set()
        self.harvests: dict[int, dict[int, int]] = {}
        self.harvested = 0
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

    def set_slot(self, number: int, gfn: int, pages: int, read_only: bool, log_dirty: bool) -> None:
        known = self.slots.get(number)
        new = Slot(gfn, pages, read_only, log_dirty)
        if known == new:
            return
        for other, slot in self.slots.items():
            if other != number and gfn < slot.gfn + slot.pages and slot.gfn < gfn + pages:
                raise Refused
        if known is not None:
            if (known.pages, known.read_only) != (pages, read_only):
                raise Refused
            if known.gfn != gfn:
                self._move(known, gfn)
        self.slots[number] = new
        if not log_dirty:
            self.log -= set(new.gfns())

    def _move(self, old: Slot, gfn: int) -> None:
        pages = set(old.gfns())
        shift = gfn - old.gfn
        denied = {n for n in self.denied if n // PER_PAGE in pages}
        granted = {n for n in self.granted if n // PER_PAGE in pages}
        written = {n for n in self.written if n // PER_PAGE in pages}
        log = self.log & pages
        lacking = {page: rights for page, rights in self.lacking.items() if page in pages}
        content = {a: b for a, b in self.bytes.items() if a // PAGE in pages}
        self._forget(old)
        self.written |= {n + shift * PER_PAGE for n in written}
        self.log |= {page + shift for page in log}
        self.lacking.update({page + shift: rights for page, rights in lacking.items()})
        self.denied |= {n + shift * PER_PAGE for n in denied}
        self.granted |= {n + shift * PER_PAGE for n in granted} & self.covered()
        self.bytes.update({a + shift * PAGE: b for a, b in content.items()})

    def _forget(self, slot: Slot) -> None:
        pages = set(slot.gfns())
        self.denied = {n for n in self.denied if n // PER_PAGE not in pages}
        self.granted = {n for n in self.granted if n // PER_PAGE not in pages}
        self.bytes = {a: b for a, b in self.bytes.items() if a // PAGE not in pages}
        self.written = {n for n in self.written if n // PER_PAGE not in pages}
        self.lacking = {page: rights for page, rights in self.lacking.items() if page not in pages}
        self.log -= pages

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
        self.note_host_write(gpa, len(data))

    def _store(self, gpa: int, data: bytes) -> None:
        self.bytes.update({gpa + i: byte for i, byte in enumerate(data)})

    def host_event(self, event: str, gfn: int | None, pages: int) -> None:
        """What the host does to its pages changes nothing that a guest or a tool can tell."""
        if gfn is not None:
            self._need_slots(range(gfn, gfn + pages))
        elif event not in ("zap", "shrink"):
            raise Refused

    def _need_slots(self, gfns: range) -> None:
        if any(self.slot_of(gfn) is None for gfn in gfns):
            raise Refused

    # ---- page access

    def page_access(self, gfn: int) -> tuple[str, int]:
        """Rights as letters, and the write bitmap."""
        bitmap = self.mask(gfn, "set")
        return "".join(r for r in "rwx" if (bitmap == FULL if r == "w" else r not in self.lacking.get(gfn, ()))), bitmap

    def set_page_access(self, entries: list[tuple[int, str | None, int | None]], mode: str) -> list[str]:
        results: list[str] = []
        before = (set(self.denied), set(self.granted), dict(self.lacking))
        for gfn, rights, bitmap in entries:
            if mode == "stop-at-first" and results and results[-1] != "applied":
                results.append("not-tried")
                continue
            done = self._set_one(gfn, rights, bitmap)
            if not done and mode == "atomic":
                self.denied, self.granted, self.lacking = before
                raise Refused
            results.append("applied" if done else "refused")
        return results

    def _set_one(self, gfn: int, rights: str | None, bitmap: int | None) -> bool:
        if self.slot_of(gfn) is None or (rights is None and bitmap is None):
            return False
        now, stored = self.page_access(gfn)
        if bitmap is None:
            assert rights is not None
            bitmap = FULL if "w" in rights else 0 if stored == FULL else stored
        elif rights is None:
            rights = now.replace("w", "") + ("w" if bitmap == FULL else "")
        if ("w" in rights) != (bitmap == FULL) or ("w" in rights and "r" not in rights):
            return False
        self.lacking[gfn] = {r for r in "rx" if r not in rights}
        self.set_map(gfn, 1, bitmap)
        return True

    # ---- what is dirty

    def track(self, tracking: str, method: str) -> None:
        self.tracking, self.method = tracking, method
        if tracking == "off":
            self.written.clear()
        if tracking == "page":
            for gfn in self.by_page(self.written):
                self.written |= set(range(gfn * PER_PAGE, (gfn + 1) * PER_PAGE))

    def harvest(self) -> tuple[int, dict[int, int]]:
        if not self.harvests:
            if self.tracking == "off":
                raise Refused
            self.harvested += 1
            self.harvests[self.harvested] = self.by_page(self.written)
            self.written.clear()
        return next(iter(self.harvests.items()))

    def acknowledge(self, number: int) -> bool:
        if not 1 <= number <= self.harvested:
            raise Refused
        return self.harvests.pop(number, None) is not None

    def take_log(self, number: int) -> set[int]:
        slot = self.slots.get(number)
        if slot is None or not slot.log_dirty:
            raise Refused
        taken = {page - slot.gfn for page in self.log if page in slot.gfns()}
        self.log -= set(slot.gfns())
        return taken

    @staticmethod
    def by_page(numbers: set[int]) -> dict[int, int]:
        pages: dict[int, int] = {}
        for number in numbers:
            pages[number // PER_PAGE] = pages.get(number // PER_PAGE, 0) | 1 << number % PER_PAGE
        return pages

    def note_host_write(self, gpa: int, size: int) -> None:
        for gfn, numbers in self._pages(gpa, size).items():
            self._note(gfn, numbers)
            self._log(gfn)

    def _note(self, gfn: int, numbers: list[int]) -> None:
        if self.slot_of(gfn) is None or self.tracking == "off":
            return
        whole = range(gfn * PER_PAGE, (gfn + 1) * PER_PAGE)
        self.written |= set(whole if self.tracking == "page" else numbers)

    def _log(self, gfn: int) -> None:
        slot = self.slot_of(gfn)
        if slot is not None and slot.log_dirty:
            self.log.add(gfn)

    def _note_faults(self, passed: dict[int, list[int]], last: int | None, landed: bool) -> None:
        """What the faults of a guest's write noted; ``passed`` are the pages that let it, ``last`` did not.

        A fault comes before its write, and knows nothing of the pages after it. The processor's own log has pages
        that were really written. KVM's log of the first series misses pages that are protected in part, that of the
        later ones has them when a write to them was tried.
        """
        for gfn, numbers in passed.items():
            by_fault = self.tracking == "subpage" or self.method == "write-protect"
            if by_fault or landed:
                self._note(gfn, numbers)
            guarded = self.mask(gfn, "effective") != FULL
            if landed if self.method == "pml" else not (guarded and self.profile == "kvm-2019"):
                self._log(gfn)
        if last is not None and self.method == "write-protect" and self.profile == "kvm-latest":
            self._log(last)

    # ---- accesses

    def replay(self, rows: list[tuple[int, int, int]], on_violation: str) -> Tally:
        tally = Tally()
        for index, (gpa, size, access) in enumerate(rows):
            outcome, page, refused = self._attempt(gpa, size, access)
            guarded = access == WRITE and self._in_guarded_page(gpa, size)
            tally.page_granular += guarded or (outcome == "violation" and access != WRITE)
            if outcome == "violation":
                tally.violations += 1
                tally.violating.append((index, page, refused))
                self._count_objects(tally, index, gpa, size)
                if on_violation == "stop":
                    tally.stopped_at = index
                    return tally
                if on_violation == "allow" and access == WRITE and self.may_store(gpa, size):
                    self.note_host_write(gpa, size)
                if on_violation == "grant" and access == WRITE and self._grant(gpa, size):
                    tally.grants += 1
                    outcome, _, _ = self._attempt(gpa, size, access)
            tally.mmio += outcome == "mmio"
            tally.records += 1
            tally.writes += access == WRITE
        return tally

    def may_store(self, gpa: int, size: int) -> bool:
        slots = [self.slot_of(gfn) for gfn in self._pages(gpa, size)]
        return all(slot is not None and not slot.read_only for slot in slots)

    def _pages(self, gpa: int, size: int) -> dict[int, list[int]]:
        """Touched sub-page numbers by page, low page first."""
        pages: dict[int, list[int]] = {}
        for number in range(gpa // SUBPAGE, (gpa + size - 1) // SUBPAGE + 1):
            pages.setdefault(number // PER_PAGE, []).append(number)
        return pages

    def _attempt(self, gpa: int, size: int, access: int) -> tuple[str, int, int]:
        covered = self.covered()
        passed: dict[int, list[int]] = {}
        for gfn, numbers in self._pages(gpa, size).items():
            slot = self.slot_of(gfn)
            if slot is None or (access == WRITE and slot.read_only):
                self._note_faults(passed, None, landed=False)
                return "mmio", gfn, 0
            gone = self.lacking.get(gfn, set())
            if RIGHT_OF[access] in gone or (access == WRITE and "r" in gone):
                self._note_faults(passed, None, landed=False)
                return "violation", gfn, 0
            if access == WRITE:
                refused = sum(1 << n % PER_PAGE for n in numbers if self.refuses(n, covered))
                if refused:
                    self._note_faults(passed, gfn, landed=False)
                    return "violation", gfn, refused
                passed[gfn] = numbers
        self._note_faults(passed, None, landed=True)
        return "completed", 0, 0

    def _in_guarded_page(self, gpa: int, size: int) -> bool:
        covered = self.covered()
        return any(
            self.slot_of(gfn) is not None
            and any(self.refuses(n, covered) for n in range(gfn * PER_PAGE, (gfn + 1) * PER_PAGE))
            for gfn in self._pages(gpa, size)
        )

    def _grant(self, gpa: int, size: int) -> bool:
        covered = self.covered()
        opened = False
        if any("r" in self.lacking.get(gfn, ()) for gfn in self._pages(gpa, size)):
            return False
        for gfn, numbers in self._pages(gpa, size).items():
            if self.slot_of(gfn) is None:
                continue
            for number in numbers:
                if self.refuses(number, covered):
                    opened = True
                    self.denied.discard(number)
                    if number in covered:
                        self.granted.add(number)
        return opened

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
