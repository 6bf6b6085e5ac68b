"""Rules of the processor that the printed vectors leave out; each was found by a fault that no other test noticed."""

from __future__ import annotations

import numpy as np
import pytest

from engine.arch import access as acc
from engine.arch import controls as ctl
from engine.arch import ept as bits
from engine.arch.access import EXECUTE, READ, WRITE
from engine.cpu import access_check, instruction
from engine.state.config import EPT_VPID_CAP

from .bench_machine import GUEST_PD, GUEST_PDPT, GUEST_PML4, LINEAR, SHADOW_STACK, VCPU, Processor, without
from .vectors import GUEST_PTE, set_up

SMEP = 1 << 20
OTHER = LINEAR + 0x1000


def test_execute_only_needs_support_without_mbec_too() -> None:
    p = Processor(cap=without(EPT_VPID_CAP, bits.CAP_EXECUTE_ONLY))
    set_up(p, "PTE=0x34")
    assert p.access(EXECUTE)[:2] == (49, 0)


def test_wide_gpa_is_no_other_page() -> None:
    p = Processor(width=52)
    p.guest(GUEST_PTE, 1 << 48 | LINEAR | 0x63)
    assert p.access(READ)[:3] == (48, 0x181, 1 << 48 | LINEAR)


def test_paging_write_needs_write_in_every_upper_entry() -> None:
    p = Processor()
    set_up(p, "paging-write=1; gPTpage.PTE=0x31|(1<<58)")
    trail, _, _ = instruction.scratch()
    how = np.int64(acc.describe(WRITE, acc.PAGING_UPDATE))
    assert access_check.check(p.m, VCPU, np.int64(GUEST_PTE), np.int64(8), how, trail) == (0, 0, 0)
    p.poke(p.tables["PDPT"], p.tables["PD"] | 5)
    assert access_check.check(p.m, VCPU, np.int64(GUEST_PTE), np.int64(8), how, trail)[:2] == (48, 0x8B)


def test_user_shadow_stack_goes_by_the_ordinary_rights() -> None:
    p = Processor(cap=SHADOW_STACK)
    set_up(p, "gU=1; EPTP.SSS=1; PTE=0x31|(1<<60); gPTE=0x801000|0x65")
    p.vcpu({ctl.V_CPL: 3})
    assert p.access(WRITE, kind=acc.SHADOW_STACK).reason == 48
    set_up(p, "PTE=0x33")
    assert p.access(WRITE, kind=acc.SHADOW_STACK).reason == 0


def test_bit_61_means_nothing_without_the_control() -> None:
    p = Processor()
    set_up(p, "SPP=0; PTE=0x35|b61; vec=ALL")
    assert p.access(WRITE)[:2] == (48, 0x1AA)
    set_up(p, "L4E=0")
    assert p.access(WRITE)[:2] == (48, 0x1AA)


def test_read_modify_write_needs_read_whatever_the_vector() -> None:
    p = Processor()
    p.m.caps[3] = 1
    set_up(p, "PTE=0x34|b61; vec=ALL")
    assert p.access(WRITE).reason == 0
    assert p.access(WRITE, kind=acc.READ_MODIFY_WRITE)[:2] == (48, 0x1A2)


def test_user_execute_is_reported_under_mbec_only() -> None:
    p = Processor()
    set_up(p, "PTE=0x435")
    assert p.access(WRITE)[:2] == (48, 0x1AA)
    set_up(p, "MBEC=1")
    assert p.access(WRITE)[:2] == (48, 0x1EA)


def test_pages_without_bit_57_are_not_verified() -> None:
    p = Processor()
    set_up(p, "verification=1; PTE=0x37")
    assert p.access(READ).reason == 0
    set_up(p, "PTE=0x37|(1<<57)")
    assert p.access(READ)[:2] == (48, 0x81B9)


@pytest.mark.parametrize("entry", ["L4E", "L3E", "L2E"])
def test_invalid_entry_with_reserved_bits_is_a_miss(entry: str) -> None:
    p = Processor()
    set_up(p, f"PTE=0x35|b61; vec=1; {entry}=0xFFE|(1<<52)")
    assert p.access(WRITE)[:2] == (66, 0x800)


def test_flags_of_every_entry() -> None:
    p = Processor()
    set_up(p, "EPTP.AD=1")
    assert p.access(WRITE).reason == 0
    flags = [p.peek(a) & 0x300 for a in (p.tables["root"], p.tables["PDPT"], p.tables["PD"] + 32, p.leaf())]
    assert flags == [0x100, 0x100, 0x100, 0x300]


def test_mapping_of_a_read_refuses_no_write() -> None:
    p = Processor(model=True)
    set_up(p, "PTE=0x35|b61; vec=1")
    assert p.access(READ).reason == 0
    assert p.access(WRITE)[::6] == (0, False)


def test_vpid_tags_combined_mappings() -> None:
    p = Processor(model=True)
    p.vcpu({ctl.V_SECONDARY: ctl.SECONDARY_EPT | ctl.SECONDARY_VPID, ctl.V_VPID: 1})
    assert p.access(READ).gpa == LINEAR
    p.guest(GUEST_PTE, OTHER | 0x63)
    p.vcpu({ctl.V_VPID: 2})
    assert p.access(READ)[2::4] == (OTHER, False)
    p.vcpu({ctl.V_VPID: 1})
    assert p.access(READ)[2::4] == (LINEAR, True)


def test_global_mapping_serves_every_pcid() -> None:
    p = Processor(model=True)
    p.vcpu({ctl.V_CR4: 0x26A0 | 1 << 17})
    p.guest(GUEST_PTE, LINEAR | 0x163)
    assert p.access(READ).gpa == LINEAR
    p.guest(GUEST_PTE, OTHER | 0x163)
    p.vcpu({ctl.V_CR3: GUEST_PML4 | 3})
    assert p.access(READ)[2::4] == (LINEAR, True)
    p.m.tlb[1:, 0] = 0
    assert p.access(READ)[2::4] == (OTHER, False)


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


def test_write_after_a_read_sets_the_guests_dirty_flag() -> None:
    p = Processor(model=True)
    p.guest(GUEST_PTE, LINEAR | 0x23)
    assert p.access(READ).reason == 0
    assert p.guest_word(GUEST_PTE) & 0x40 == 0
    assert p.access(WRITE).reason == 0
    assert p.guest_word(GUEST_PTE) & 0x40


def test_bit_7_of_a_guest_pml4e_is_reserved() -> None:
    p = Processor()
    p.guest(GUEST_PML4, p.guest_word(GUEST_PML4) | 0x80)
    assert p.access(READ).error_code == 9
