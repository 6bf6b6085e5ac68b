"""Memory slots and sub-page permissions: KVM_SET_USER_MEMORY_REGION, KVM_INIT_SPP and the two calls about maps.

Slots by Linux 5.3 and 7.1 (`virt/kvm/kvm_main.c`), sub-pages by versions 4 and 12 of the series.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field

from tests.differential.calls import PAGE, WIDTH, World
from tests.differential.user_memory import Failed, User

FULL = 0xFFFF_FFFF
LOG_DIRTY, READ_ONLY = 1, 2
MOST_PAGES = (1 << 31) - 1
USER_END = 1 << 47
SLOTS = {"kvm-2019": 509, "kvm-latest": 32764}
MOST_IN_A_CALL = {"kvm-2019": 64, "kvm-latest": 512}
HEADER = 16


@dataclass
class Slot:
    """``maps`` has the pages, by their offset, that are not all ones."""

    gfn: int
    pages: int
    address: int
    flags: int
    maps: dict[int, int] = field(default_factory=dict)

    def has(self, gfn: int) -> bool:
        return self.gfn <= gfn < self.gfn + self.pages

    def overlaps(self, gfn: int, pages: int) -> bool:
        return self.gfn < gfn + pages and gfn < self.gfn + self.pages


class MemoryModel:
    """Slots by (address space, number), what is mapped by 4-KByte leaves, and the maps."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.slots: dict[tuple[int, int], Slot] = {}
        self.mapped: set[int] = set()
        self.spp = False
        self.until_failure = world.fail_allocation
        self.pages: dict[int, bytearray] = {}

    # ---- guest memory

    def slot_of(self, gfn: int) -> Slot | None:
        """The slot of a page, in address space 0: what the series looks at, and what this model reads of memory."""
        return next((slot for (space, _), slot in self.slots.items() if space == 0 and slot.has(gfn)), None)

    def touch(self, gpa: int) -> None:
        """A read by the guest: the page is mapped if there is one."""
        if self.slot_of(gpa // PAGE):
            self.mapped.add(gpa // PAGE)

    def load(self, gpa: int, size: int) -> bytes | None:
        """Bytes of one page of guest memory, None without a slot."""
        if self.slot_of(gpa // PAGE) is None:
            return None
        page = self.pages.get(gpa // PAGE, bytes(PAGE))
        return bytes(page[gpa % PAGE : gpa % PAGE + size])

    def store(self, gpa: int, data: bytes) -> None:
        """Bytes to one page, if it has a slot."""
        if self.slot_of(gpa // PAGE):
            page = self.pages.setdefault(gpa // PAGE, bytearray(PAGE))
            page[gpa % PAGE : gpa % PAGE + len(data)] = data

    # ---- slots

    def set_region(self, user: User) -> int:
        """KVM_SET_USER_MEMORY_REGION."""
        slot, flags, gpa, size, address = struct.unpack("<IIQQQ", user.read(0, 32))
        space, number = slot >> 16, slot & 0xFFFF
        pages = size // PAGE
        if (
            number >= SLOTS[self.world.profile]
            or flags & ~(LOG_DIRTY | READ_ONLY)
            or size % PAGE
            or gpa % PAGE
            or address % PAGE
            or address + size > USER_END
            or space > 1
            or gpa + size >= 1 << 64
            or pages > MOST_PAGES
        ):
            raise Failed("EINVAL")
        key = (space, number)
        old = self.slots.get(key)
        if pages == 0:
            if old is None:
                raise Failed("EINVAL")
            self._unmap(key, old)
            del self.slots[key]
            return 0
        moves = old is None or old.gfn != gpa // PAGE
        if old and (old.address != address or old.pages != pages or (old.flags ^ flags) & READ_ONLY):
            raise Failed("EINVAL")
        if moves:
            for other, taken in self.slots.items():
                if other[0] == space and other != key and taken.overlaps(gpa // PAGE, pages):
                    raise Failed("EEXIST")
            if gpa + size > 1 << WIDTH:
                raise Failed("EINVAL")
        if old is None:
            self.slots[key] = Slot(gpa // PAGE, pages, address, flags)
            return 0
        if moves:
            self._unmap(key, old)
        old.gfn, old.flags = gpa // PAGE, flags
        return 0

    def _unmap(self, key: tuple[int, int], slot: Slot) -> None:
        if key[0] == 0:
            self.mapped = {gfn for gfn in self.mapped if not slot.has(gfn)}

    # ---- sub-pages

    def allocate(self) -> None:
        """One allocation that is counted; ENOMEM when its time has come."""
        if self.until_failure is not None:
            self.until_failure -= 1
            if self.until_failure == 0:
                self.until_failure = None
                raise Failed("ENOMEM")

    @property
    def has_spp(self) -> bool:
        return self.world.intel and self.world.ept and self.world.spp

    def init_spp(self) -> int:
        """KVM_INIT_SPP."""
        if self.world.latest:
            raise Failed("ENOTTY")
        if not self.has_spp:
            raise Failed("EINVAL")
        return self._enable()

    def enable_spp(self) -> int:
        """KVM_ENABLE_CAP with KVM_CAP_X86_SPP, its flags already looked at."""
        if not self.world.latest:
            raise Failed("EINVAL")
        if self.world.nested:
            raise Failed("EPERM")
        if not self.has_spp:
            raise Failed("ENODEV")
        return self._enable()

    def _enable(self) -> int:
        if not self.spp:
            for _ in self.slots:
                self.allocate()
            self.spp = True
        return 0

    def _copy_in(self, user: User) -> tuple[int, int]:
        """gfn and npages of a call that is not refused; npages 0 is a call that does nothing."""
        if not self.spp:
            raise Failed("ENODEV")
        most = MOST_IN_A_CALL[self.world.profile]
        if not self.world.latest:
            user.read(0, HEADER + 4 * most)
            gfn, npages = struct.unpack("<QQ", user.read(0, HEADER))
            if not 1 <= npages <= most:
                raise Failed("EINVAL")
            return gfn, npages
        gfn, npages, flags = struct.unpack("<QII", user.read(0, HEADER))
        if flags or npages > most:
            raise Failed("EINVAL")
        if npages:
            self.allocate()
            user.read(0, HEADER + 4 * npages)
        return gfn, npages

    def get_access(self, user: User) -> int:
        """KVM_SUBPAGES_GET_ACCESS."""
        gfn, npages = self._copy_in(user)
        if npages == 0:
            return 0
        maps: list[int] = []
        for page in range(gfn, gfn + npages):
            slot = self.slot_of(page)
            if slot is None:
                break
            maps.append(slot.maps.get(page - slot.gfn, FULL))
        whole = len(maps) == npages
        if whole or not self.world.latest:
            user.write(HEADER, struct.pack(f"<{len(maps)}I", *maps))
        if not whole:
            raise Failed("EFAULT")
        return npages

    def set_access(self, user: User) -> int:
        """KVM_SUBPAGES_SET_ACCESS."""
        gfn, npages = self._copy_in(user)
        done_to_a_mapping = False
        for position in range(npages):
            page = gfn + position
            slot = self.slot_of(page)
            if slot is None:
                if done_to_a_mapping and not self.world.latest:
                    return 0
                raise Failed("EFAULT")
            done_to_a_mapping |= page in self.mapped
            slot.maps[page - slot.gfn] = user.number(HEADER + 4 * position, 4)
        if self.world.latest:
            self.mapped -= set(range(gfn, gfn + npages))
        return npages
