"""What an access may do by the entries of EPT and SPPT, beyond the printed vectors."""

from __future__ import annotations

import numpy as np
import pytest

from engine.arch import access as acc
from engine.arch import controls as ctl
from engine.arch import ept as bits
from engine.arch.access import EXECUTE, READ, WRITE
from engine.cpu import access_check, instruction
from engine.state.default_host import EPT_VPID_CAP

from .bench_machine import LINEAR, SHADOW_STACK, VCPU, Processor, without
from .vectors import GUEST_PTE, set_up


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
