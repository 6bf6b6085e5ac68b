"""Memory slots: which guest-physical pages are RAM (KVM_SET_USER_MEMORY_REGION).

What kernels allow differently is ``LimitRows`` of ``engine.state.profiles``.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from engine.cpu.access_over_pages import page_part, place
from engine.cpu.frames import Machine
from engine.cpu.memory_slots import SLOT_GFN, SLOT_PAGES, SMM_PAGE, find_slot
from engine.errors import InvalidValue
from engine.jit import kernel, short_kernel

ADDRESS_SPACES = 2  # 0, and 1 for system-management mode
MAX_SLOT_PAGES = (1 << 31) - 1  # KVM_MEM_MAX_NR_PAGES
USER_TOP = (1 << 47) - 0x1000  # TASK_SIZE_MAX with four levels of paging

PAGE_SHIFT = 12
PAGE_SIZE = 1 << PAGE_SHIFT
HOST_PAGE_SIZES = (1 << 12, 1 << 21, 1 << 30)

# A row of Machine.slots; the words that say where its pages are ``cpu.memory_slots`` knows.
SLOT_FLAGS = 2
SLOT_ID = 3
SLOT_LEVEL = 4  # of the leaf that maps one of its host pages
SLOT_WORDS = 6

SLOT_LOG_DIRTY = 1 << 0  # KVM_MEM_LOG_DIRTY_PAGES
SLOT_READ_ONLY = 1 << 1  # KVM_MEM_READONLY


def key_of(slot: int, address_space: int) -> int:
    """The ``slot`` member of struct kvm_userspace_memory_region: bits 31:16 address space, bits 15:0 number."""
    return address_space << 16 | slot


@dataclass(frozen=True, slots=True)
class SlotSpec:
    """One memory slot: ``size`` bytes of guest RAM at ``gpa``.

    ``host_page_size`` is the page size that backs it, ``userspace_addr`` where it is in the memory of whoever runs the
    machine, ``log_dirty`` KVM_MEM_LOG_DIRTY_PAGES.
    """

    slot: int
    gpa: int
    size: int
    read_only: bool = False
    host_page_size: int = PAGE_SIZE
    address_space: int = 0
    log_dirty: bool = False
    userspace_addr: int = 0

    @property
    def key(self) -> int:
        return key_of(self.slot, self.address_space)

    @property
    def gfn(self) -> int:
        return self.gpa >> PAGE_SHIFT

    @property
    def first_page(self) -> int:
        """Number of its first page as kernels have it, for either address space (see ``cpu.memory_slots``)."""
        return self.gfn | (SMM_PAGE if self.address_space else 0)

    @property
    def pages(self) -> int:
        return self.size >> PAGE_SHIFT

    @property
    def flags(self) -> int:
        """Flags of struct kvm_userspace_memory_region."""
        return (SLOT_READ_ONLY if self.read_only else 0) | (SLOT_LOG_DIRTY if self.log_dirty else 0)

    def validate_number(self, slots: int) -> None:
        """Refuse a number that an address space with that many slots has not."""
        if not 0 <= self.slot < slots:
            raise InvalidValue(f"must be 0 to {slots - 1}", field="slot", value=self.slot)
        if not 0 <= self.address_space < ADDRESS_SPACES:
            raise InvalidValue(
                "must be 0, or 1 for system-management mode",
                field="address_space",
                value=self.address_space,
            )

    def validate_place(self) -> None:
        """Refuse what does not lie on page bounds."""
        if self.gpa < 0 or self.gpa % PAGE_SIZE:
            raise InvalidValue("must be a multiple of 4096", field="gpa", value=self.gpa)
        if self.size <= 0 or self.size % PAGE_SIZE:
            raise InvalidValue("must be a multiple of 4096 and not 0", field="size", value=self.size)
        if self.host_page_size not in HOST_PAGE_SIZES:
            raise InvalidValue(
                "must be 4096, 2097152 or 1073741824 bytes", field="host_page_size", value=self.host_page_size
            )

    def validate_width(self, width: int) -> None:
        """Refuse what the guest's MAXPHYADDR does not reach."""
        if self.gpa + self.size > 1 << width:
            raise InvalidValue(
                f"must keep the slot within the guest-physical address width of {width} bits",
                field="gpa",
                value=self.gpa,
            )

    def overlaps(self, other: SlotSpec) -> bool:
        """Whether two slots share a page of one address space."""
        return (
            self.address_space == other.address_space
            and self.gpa < other.gpa + other.size
            and other.gpa < self.gpa + self.size
        )


def check_pages(m: Machine, width: int, gfn: int, pages: int, field: str, value: int | None = None) -> None:
    """Refuse pages that are not all in memory slots of a guest with ``width`` address bits.

    ``value`` is what was given, where that is not the GFN.
    """
    given = gfn if value is None else value
    if gfn < 0 or gfn + pages > 1 << (width - PAGE_SHIFT):
        rule, errno = f"must lie within the guest-physical address width of {width} bits", "EINVAL"
    else:
        missing = int(first_page_without_slot(m, gfn, pages))
        if missing < 0:
            return
        rule, errno = f"must have a memory slot for every page; GFN {missing:#x} has none", "EFAULT"
    if value is None and gfn >= PAGE_SIZE and first_page_without_slot(m, gfn >> PAGE_SHIFT, 1) < 0:
        rule += f"; it looks like an address, whose GFN is {gfn >> PAGE_SHIFT:#x}"
    raise InvalidValue(rule, field=field, value=given, errno=errno)


def slot_row(spec: SlotSpec) -> tuple[int, ...]:
    """A row of Machine.slots."""
    level = HOST_PAGE_SIZES.index(spec.host_page_size) + 1
    return (spec.first_page, spec.pages, spec.flags, spec.slot, level, spec.userspace_addr >> PAGE_SHIFT)


def slot_table(specs: Iterable[SlotSpec]) -> NDArray[np.int64]:
    """int64[n, SLOT_WORDS], sorted by first page, as kernels look it up: those of address space 1 are last."""
    rows = sorted(slot_row(spec) for spec in specs)
    return np.array(rows, dtype=np.int64).reshape(len(rows), SLOT_WORDS)


@kernel
def writable_bytes(m, gpa, size):
    """Whether slots that are not read-only hold all of a byte range."""
    done = 0
    while done < size:
        at = place(m, gpa, done)
        position = find_slot(m, at >> PAGE_SHIFT)
        if position < 0 or m.slots[position, SLOT_FLAGS] & SLOT_READ_ONLY:
            return False
        done += page_part(at, at + size - done)
    return True


@short_kernel
def first_page_without_slot(m, gfn, pages):
    """First page of a range that no slot holds, -1 when every page has one."""
    at = gfn
    end = gfn + pages
    while at < end:
        position = find_slot(m, at)
        if position < 0:
            return at
        at = m.slots[position, SLOT_GFN] + m.slots[position, SLOT_PAGES]
    return -1
