"""Physical memory of the conformance machine: where every table lies and what it holds before a vector is applied.

The bare-metal program knows none of this: it stores the words given here, then the words of each vector. So the
machine that Bochs walks and the machine that the engine walks are described once, as ``{address: 64-bit word}``.

Guest memory is identity-mapped for the guest's own code, stack and paging structures (GPA = HPA, 2 MiB from
``GUEST_BASE``). Test pages lie elsewhere in guest-physical space, behind tables of their own, and their data in
``WINDOW``. The addresses of test tables have some of bits 20:13 set, so that turning such a table pointer into a large
page (bit 7) always leaves reserved address bits set.
"""

from __future__ import annotations

PAGE = 0x1000
RAM_SIZE = 64 << 20
MAXPHYADDR = 40
WORD = (1 << 64) - 1

# The guest's own memory.
GUEST_BASE = 0x200000
GUEST_CODE = 0x201000
GUEST_STACK = 0x203000  # initial RSP
GUEST_PML4 = 0x210000
GUEST_PDPT = 0x211000
GUEST_PD = 0x212000
TEST_PDPT = 0x213000
TEST_PD = 0x214000
TEST_PT = 0x215000  # maps the linear addresses of the test pages

# Linear address of the first test page; the second follows it.
LINEAR = 0x3A5C_1234_5000

# EPT. Test pages have GPA[47:39] 0 (near, sharing the PML4E with the guest) or 1 (far, all four levels their own).
EPT_PML4 = 0x406000
NEAR_PDPT = 0x408000
GUEST_EPT_PD = 0x40A000
GUEST_EPT_PT = 0x40C000
FAR_PDPT = 0x40E000
FIRST_PD, FIRST_PT = 0x416000, 0x418000
SECOND_PD, SECOND_PT = 0x41A000, 0x41C000

# SPPT.
SPP_L4 = 0x426000
SPP_NEAR_L3 = 0x428000
SPP_FAR_L3 = 0x42A000
SPP_FIRST_L2, SPP_FIRST_L1 = 0x42C000, 0x42E000
SPP_SECOND_L2, SPP_SECOND_L1 = 0x436000, 0x438000
SPP_GUEST_L2, SPP_GUEST_L1 = 0x43A000, 0x43C000

# Frames that stray table pointers lead to: all zeros, all ones, and no memory at all (reads as all ones).
ZEROS = 0x446000
ONES = 0x448000
ABSENT = 0x10_0000_6000

TABLES = (
    *(EPT_PML4, NEAR_PDPT, GUEST_EPT_PD, GUEST_EPT_PT, FAR_PDPT, FIRST_PD, FIRST_PT, SECOND_PD, SECOND_PT),
    *(SPP_L4, SPP_NEAR_L3, SPP_FAR_L3, SPP_FIRST_L2, SPP_FIRST_L1, SPP_SECOND_L2, SPP_SECOND_L1),
    *(SPP_GUEST_L2, SPP_GUEST_L1, ZEROS, ONES),
)

# Frames of test pages: 2 MiB of RAM that holds nothing else.
WINDOW = 0x2000000
WINDOW_PAGES = 512

# Raw bits used below.
GUEST_DEFAULT = 0x63  # P, R/W, A, D
GUEST_TABLE = 0x67  # P, R/W, U/S, A: the pages decide about U/S
EPT_TABLE = 0x107  # RWX, A
EPT_PAGE = 0x337  # RWX, WB, A, D
SPP_VALID = 1


def index(address: int, level: int) -> int:
    """Index into the table of ``level`` (4 = PML4 or SPPL4 ... 1) for an address; guest paging, EPT and SPPT agree."""
    return address >> (3 + 9 * level) & 511


def slot(table: int, address: int, level: int) -> int:
    """Address of the entry that translates ``address`` in ``table``."""
    return table + 8 * index(address, level)


def guest_entry(linear: int) -> int:
    """Address (GPA and HPA) of the guest PTE that maps a linear address of a test page."""
    return slot(TEST_PT, linear, 1)


# The EPT PTE of the page that holds those guest PTEs.
TEST_PT_ENTRY = slot(GUEST_EPT_PT, TEST_PT, 1)


def base_memory() -> dict[int, int]:
    """Every non-zero word of table memory that is the same for all vectors."""
    memory = {
        slot(GUEST_PML4, GUEST_BASE, 4): GUEST_PDPT | GUEST_TABLE,
        slot(GUEST_PDPT, GUEST_BASE, 3): GUEST_PD | GUEST_TABLE,
        slot(GUEST_PD, GUEST_BASE, 2): GUEST_BASE | GUEST_DEFAULT | 0x80,
        slot(GUEST_PML4, LINEAR, 4): TEST_PDPT | GUEST_TABLE,
        slot(TEST_PDPT, LINEAR, 3): TEST_PD | GUEST_TABLE,
        slot(TEST_PD, LINEAR, 2): TEST_PT | GUEST_TABLE,
        slot(EPT_PML4, GUEST_BASE, 4): NEAR_PDPT | EPT_TABLE,
        slot(NEAR_PDPT, GUEST_BASE, 3): GUEST_EPT_PD | EPT_TABLE,
        slot(GUEST_EPT_PD, GUEST_BASE, 2): GUEST_EPT_PT | EPT_TABLE,
        slot(SPP_L4, TEST_PT, 4): SPP_NEAR_L3 | SPP_VALID,
    }
    for page in range(GUEST_BASE, GUEST_BASE + (PAGE << 9), PAGE):
        memory[slot(GUEST_EPT_PT, page, 1)] = page | EPT_PAGE
    for address in range(ONES, ONES + PAGE, 8):
        memory[address] = WORD
    return memory
