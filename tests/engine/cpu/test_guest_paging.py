"""Rights, faults and flags of guest paging, beyond the printed vectors."""

from __future__ import annotations

import pytest

from engine.arch import controls as ctl
from engine.arch.access import EXECUTE, READ, WRITE

from .bench_machine import GUEST_PD, GUEST_PDPT, GUEST_PML4, LINEAR, Processor
from .vectors import GUEST_PTE, set_up

SMEP = 1 << 20


def test_page_is_the_users_if_every_entry_says_so() -> None:
    p = Processor()
    p.vcpu({ctl.V_CPL: 3})
    set_up(p, "gU=1")
    assert p.access(READ).reason == 0
    for gpa in (GUEST_PML4, GUEST_PDPT, GUEST_PD + 32):
        p.guest(gpa, p.guest_word(gpa) & ~4)
        assert p.access(READ)[:5:4] == (-14, 5)
        p.guest(gpa, p.guest_word(gpa) | 4)


@pytest.mark.parametrize("cpl", [1, 2])
def test_cpl_1_and_2_are_supervisor(cpl: int) -> None:
    p = Processor()
    p.vcpu({ctl.V_CPL: cpl})
    assert p.access(WRITE).reason == 0
    p.guest(GUEST_PTE, LINEAR | 0x61)
    assert p.access(WRITE).error_code == 3


def test_fetch_is_reported_with_no_execute_or_smep() -> None:
    p = Processor()
    set_up(p, "gU=1")
    p.vcpu({ctl.V_EFER: 0x500, ctl.V_CR4: 0x2620 | SMEP})
    assert p.access(EXECUTE).error_code == 0x11
    p.guest(GUEST_PTE, 0)
    assert p.access(EXECUTE).error_code == 0x10
    p.vcpu({ctl.V_CR4: 0x2620})
    assert p.access(EXECUTE)[:5:4] == (-14, 0)


def test_guest_flags_of_a_write() -> None:
    p = Processor()
    entries = (GUEST_PML4, GUEST_PDPT, GUEST_PD + 32, GUEST_PTE)
    for gpa in entries:
        p.guest(gpa, p.guest_word(gpa) & ~0x60)
    assert p.access(WRITE).reason == 0
    assert [p.guest_word(gpa) & 0x60 for gpa in entries] == [0x20, 0x20, 0x20, 0x60]


def test_bit_7_of_a_guest_pml4e_is_reserved() -> None:
    p = Processor()
    p.guest(GUEST_PML4, p.guest_word(GUEST_PML4) | 0x80)
    assert p.access(READ).error_code == 9
