"""Table K of the printed vectors, derived from the manual, and what goes with them: paging modes, shadow stacks."""

from __future__ import annotations

import numpy as np
import pytest

from engine.arch import access as acc
from engine.arch import controls as ctl
from engine.arch import ept as bits
from engine.arch.access import EXECUTE, READ, WRITE
from engine.cpu import access_check, control_registers, ept, instruction
from engine.state.default_host import EPT_VPID_CAP

from .bench_machine import ADVANCED, GUEST_PML4, GUEST_PT, LINEAR, SHADOW_STACK, VCPU, Processor, without
from .vectors import GUEST_PTE, set_up

B58, B57, B60 = 1 << 58, 1 << 57, 1 << 60
PAE_PDPT = 0xC04000


def outcome(result: instruction.Access) -> tuple[int, int, int]:
    return result.reason, result.qualification, result.gpa


def test_k01_k02_a_gpa_too_wide_for_four_levels() -> None:
    p = Processor(width=52)
    p.guest(GUEST_PTE, 1 << 48 | 0x63)
    assert outcome(p.access(READ)) == (48, 0x181, 1 << 48)
    assert outcome(p.access(WRITE)) == (48, 0x182, 1 << 48)


def test_k04_k05_five_levels() -> None:
    p = Processor(levels=5)
    assert p.enter() == 0
    assert p.access(WRITE).reason == 0
    p.poke(p.tables["root"], p.tables["PML4"] | 5)
    set_up(p, "PTE=0x437|b61; vec=1")
    assert p.access(WRITE).reason == 0
    assert outcome(p.access(WRITE, linear=LINEAR + 0x80)) == (48, 0x1AA, LINEAR + 0x80)
    for bit in range(3, 8):
        p.poke(p.tables["root"], p.tables["PML4"] | 7 | 1 << bit)
        assert outcome(p.access(READ))[:2] == (49, 0)


def test_k07_user_execute_alone_needs_execute_only_support() -> None:
    p = Processor(cap=without(EPT_VPID_CAP, bits.CAP_EXECUTE_ONLY))
    set_up(p, "MBEC=1; PTE=0x430")
    assert p.access(READ).reason == 49
    set_up(p, "PTE=0x34")
    assert p.access(READ).reason == 49


@pytest.mark.parametrize(
    ("cap", "entry", "raw"), [(bits.CAP_1G, "PDPTE", 0xB7), (bits.CAP_2M, "PDE", 0x8000B7)], ids=["K08", "2M"]
)
def test_k08_a_page_size_without_support(cap: int, entry: str, raw: int) -> None:
    p = Processor()
    set_up(p, f"G39; {entry}={raw}")
    assert p.access(READ).reason == 0
    p.m.caps[2] = without(int(p.m.caps[2]), cap)
    assert p.access(READ).reason == 49


def test_k10_k11_k13_paging_write_control() -> None:
    p = Processor()
    set_up(p, "paging-write=1; PTE=0x34|(1<<58)")
    assert p.access(EXECUTE).reason == 49
    p = Processor()
    set_up(p, "paging-write=1; EPTP.AD=1; gPTpage.PTE=0x31|(1<<58)")
    assert p.access(READ).reason == 0
    # paging writes alone: an ordinary write to that page is refused
    assert outcome(p.access(WRITE, linear=GUEST_PT)) == (48, 0x18A, GUEST_PT)
    p.poke(p.tables["PD"] + 8 * 5, p.tables["gPT"] | 5)
    p.poke(p.tables["gPT"], GUEST_PT | 0x35 | B58)
    assert outcome(p.access(READ)) == (48, 0xAB, GUEST_PTE)
    # without the control the bit means nothing
    p = Processor()
    set_up(p, "EPTP.AD=1; gPTpage.PTE=0x31|(1<<58)")
    assert outcome(p.access(READ)) == (48, 0x8B, GUEST_PTE)


def test_k14_pdptes_loaded_by_mov_to_cr3() -> None:
    p = Processor()
    p.vcpu({ctl.V_EFER: 0x800, ctl.V_CR4: 0x2620})
    trail, _, _ = instruction.scratch()
    # A page directory that maps 0x8xxxxx as the four-level tables do.
    p.guest(PAE_PDPT, 0xC05001)
    p.guest(0xC05000 + 8 * 4, GUEST_PT | 0x63)
    p.poke(p.tables["gUpper"] + 8 * 4, 0)
    load = control_registers.move_to_cr3(p.m, VCPU, np.int64(PAE_PDPT), trail)
    assert load == (48, 1, PAE_PDPT)
    assert p.control(ctl.V_CR3) == GUEST_PML4
    p.poke(p.tables["gUpper"] + 8 * 4, PAE_PDPT | 0x35)
    # reads stay reads with EPT flags on
    p.turn_on(ctl.V_EPTP, 1 << 6)
    assert control_registers.move_to_cr3(p.m, VCPU, np.int64(PAE_PDPT), trail) == (0, 0, 0)
    assert p.control(ctl.V_PDPTE0) == 0xC05001
    assert p.peek(p.tables["gUpper"] + 8 * 4) == PAE_PDPT | 0x35 | 0x100
    assert p.access(READ).reason == 0
    # 2 GBytes up the register is not present: #PF without any access
    p.poke(p.tables["PML4"], 0)
    assert p.access(WRITE, linear=2 << 30)[:5] == (-14, 0, 0, 2 << 30, 2)


@pytest.mark.parametrize("bit", [1, 2, 5, 6, 7, 8, 40, 52, 63])
def test_a_reserved_bit_in_a_pdpte_is_gp(bit: int) -> None:
    p = Processor()
    p.vcpu({ctl.V_EFER: 0x800})
    trail, _, _ = instruction.scratch()
    p.guest(PAE_PDPT + 24, 1 | 1 << bit)
    assert control_registers.move_to_cr3(p.m, VCPU, np.int64(PAE_PDPT), trail)[0] == -13
    p.guest(PAE_PDPT + 24, 1 << bit)
    assert control_registers.move_to_cr3(p.m, VCPU, np.int64(PAE_PDPT), trail)[0] == 0


def test_k16_cr3_is_translated_when_it_is_used() -> None:
    p = Processor()
    trail, _, _ = instruction.scratch()
    assert control_registers.move_to_cr3(p.m, VCPU, np.int64(0x4000_0000), trail) == (0, 0, 0)
    assert outcome(p.access(READ)) == (48, 0x81, 0x4000_0000)
    assert control_registers.move_to_cr3(p.m, VCPU, np.int64(1 << 40), trail)[0] == -13


def test_k17_paging_off_is_user_mode_and_writable() -> None:
    p = Processor(cap=ADVANCED)
    p.vcpu({ctl.V_CR0: 0x33})
    set_up(p, "PTE raw=0")
    assert outcome(p.access(WRITE)) == (48, 0x782, LINEAR)
    # linear addresses have 32 bits
    assert outcome(p.access(WRITE, linear=LINEAR | 1 << 32)) == (48, 0x782, LINEAR)


def test_k19_supervisor_shadow_stack() -> None:
    p = Processor(cap=SHADOW_STACK)
    set_up(p, "EPTP.SSS=1; PTE=0x31|(1<<60); gPTE=0x801000|0x61")
    assert p.access(WRITE, kind=acc.SHADOW_STACK).reason == 0
    p.poke(p.tables["PD"] + 8 * 4, p.tables["PT"] | 5)
    # the leaf's own W does not matter, that of an upper entry does; nor does SPP help
    assert outcome(p.access(WRITE, kind=acc.SHADOW_STACK)) == (48, 0x6000 | 0x18A, LINEAR)
    set_up(p, "PTE=0x31|(1<<60)|b61; vec=ALL")
    assert p.access(WRITE, kind=acc.SHADOW_STACK).reason == 48
    p.poke(p.tables["PD"] + 8 * 4, p.tables["PT"] | 7)
    set_up(p, "PTE=0x37")
    assert outcome(p.access(READ, kind=acc.SHADOW_STACK)) == (48, 0x2000 | 0x1B9, LINEAR)
    # an ordinary page is no shadow stack to the guest's paging
    set_up(p, "gPTE=0x801000|0x63")
    assert p.access(READ, kind=acc.SHADOW_STACK)[:5] == (-14, 0, 0, LINEAR, 0x41)


def test_k20_nmi_unblocking() -> None:
    p = Processor()
    set_up(p, "PTE=0x35|b61; L2E=0")
    assert outcome(p.access(WRITE, circumstances=acc.NMI_UNBLOCKING)) == (66, 0x1800, LINEAR)
    assert outcome(p.access(WRITE, circumstances=acc.ASYNCHRONOUS)) == (66, 0x10800, LINEAR)
    set_up(p, "L2E=L1|3")
    assert outcome(p.access(WRITE, circumstances=acc.NMI_UNBLOCKING)) == (66, 0x1000, LINEAR)
    set_up(p, "PTE=0x35")
    assert outcome(p.access(WRITE, circumstances=acc.NMI_UNBLOCKING)) == (48, 0x11AA, LINEAR)
    set_up(p, "PTE=0x32")
    assert outcome(p.access(WRITE, circumstances=acc.NMI_UNBLOCKING)) == (49, 0, LINEAR)


def test_k22_a_transactional_region_gets_nothing_from_spp() -> None:
    p = Processor()
    set_up(p, "PTE=0x35|b61; vec=ALL")
    assert outcome(p.access(WRITE, circumstances=acc.SPP_EXEMPT)) == (48, 0x1AA, LINEAR)


def test_k23_a_write_to_the_apic_access_page_is_a_plain_write() -> None:
    p = Processor()
    set_up(p, "PTE=0x35|b61; vec=ALL")
    assert p.access(WRITE).reason == 0


def test_guest_paging_verification() -> None:
    p = Processor()
    set_up(p, "verification=1; PTE=0x37|(1<<57)")
    # every guest entry's page must have paging-write access
    assert outcome(p.access(READ)) == (48, 0x81B9, LINEAR)
    for page in range(3):
        p.poke(p.tables["gUpper"] + 8 * page, 0xC00000 + page * 0x1000 | 0x37 | B58)
    assert outcome(p.access(READ)) == (48, 0x81B9, LINEAR)
    p.poke(p.tables["gPT"], GUEST_PT | 0x37 | B58)
    assert p.access(READ).reason == 0
    # missing rights are reported as such
    set_up(p, "PTE=0x35|(1<<57)")
    p.poke(p.tables["gPT"], GUEST_PT | 0x37)
    assert outcome(p.access(WRITE)) == (48, 0x1AA, LINEAR)
    # SPP does not get round it
    set_up(p, "PTE=0x35|(1<<57)|b61; vec=ALL")
    assert outcome(p.access(WRITE)) == (48, 0x81AA, LINEAR)
    p.vcpu({ctl.V_TERTIARY: 0})
    assert p.access(WRITE).reason == 0


# Four-level privileges: guest PTE flags, CPL, CR4 and RFLAGS bits, access, error code of the #PF or None.
SMEP, SMAP, AC = 1 << 20, 1 << 21, 1 << 18


@pytest.mark.parametrize(
    ("flags", "cpl", "cr4", "rflags", "access", "error"),
    [
        (0x63, 3, 0, 0, READ, 5),
        (0x63, 3, 0, 0, WRITE, 7),
        (0x67, 3, 0, 0, WRITE, None),
        (0x65, 3, 0, 0, WRITE, 7),
        (0x61, 0, 0, 0, WRITE, 3),
        (0x67, 0, SMEP, 0, EXECUTE, 0x11),
        (0x63, 0, SMEP, 0, EXECUTE, None),
        (0x67, 0, SMEP, 0, READ, None),
        (0x67, 0, SMAP, 0, READ, 1),
        (0x67, 0, SMAP, 0, WRITE, 3),
        (0x67, 0, SMAP, AC, WRITE, None),
        (0x67, 0, SMAP, 0, EXECUTE, None),
        (0x63, 0, SMAP, 0, WRITE, None),
        (0x62, 0, 0, 0, EXECUTE, 0x10),
        (1 << 63 | 0x63, 0, 0, 0, EXECUTE, 0x11),
        (1 << 63 | 0x63, 0, 0, 0, READ, None),
        (1 << 51 | 0x63, 0, 0, 0, READ, 9),
        (1 << 40 | 0x63, 3, 0, 0, WRITE, 0xF),
        (1 << 52 | 0x63, 0, 0, 0, READ, None),
    ],
)
def test_guest_privileges(flags: int, cpl: int, cr4: int, rflags: int, access: int, error: int | None) -> None:
    p = Processor()
    set_up(p, "gU=1")
    p.guest(GUEST_PTE, LINEAR | flags)
    p.vcpu({ctl.V_CPL: cpl, ctl.V_CR4: 0x2620 | cr4, ctl.V_RFLAGS: rflags})
    result = p.access(access)
    assert result == ((0, 0, LINEAR, LINEAR, 0, 0, False) if error is None else (-14, 0, 0, LINEAR, error, 0, False))


def test_write_protect_and_no_execute_are_switches() -> None:
    p = Processor()
    p.vcpu({ctl.V_CR0: 0x8000_0033})
    set_up(p, "gPTE=0x801000|0x61")
    assert p.access(WRITE).reason == 0
    p.vcpu({ctl.V_CPL: 3})
    set_up(p, "gU=1")
    assert p.access(WRITE).error_code == 7
    p.vcpu({ctl.V_CPL: 0, ctl.V_EFER: 0x500})
    set_up(p, "gPTE=0x801000|0x63|(1<<63)")
    assert p.access(READ).error_code == 9


@pytest.mark.parametrize(("level", "raw"), [(2, 0x8000E3), (3, 0xE3)])
def test_large_guest_pages(level: int, raw: int) -> None:
    p = Processor()
    slot = {2: 0xC00000 + 8 * 4, 3: 0xC01000}[level]
    p.guest(slot, raw)
    assert outcome(p.access(WRITE)) == (0, 0, LINEAR)
    p.guest(slot, raw | 1 << 13)
    assert p.access(WRITE).error_code == 0xB
    p.guest(GUEST_PML4, p.guest_word(GUEST_PML4) | 0x80)
    assert p.access(WRITE).error_code == 0xB


def test_paging_of_32_bits() -> None:
    p = Processor()
    p.vcpu({ctl.V_CR4: 0x10, ctl.V_EFER: 0, ctl.V_CR3: 0xC04000})
    p.guest(0xC04000 + 4 * 2, 0xC05023)  # linear 8 MBytes: an odd and an even entry of the directory
    p.guest(0xC05000, 0x801023 << 32 | 0x802023)
    assert outcome(p.access(WRITE)) == (0, 0, LINEAR)
    assert p.guest_word(0xC05000) == 0x801063 << 32 | 0x802023
    assert outcome(p.access(READ, linear=0x800123)) == (0, 0, 0x802123)
    p.guest(0xC04000 + 4 * 2, 0x8000A3)
    assert outcome(p.access(WRITE)) == (0, 0, LINEAR)
    p.guest(0xC04000 + 4 * 2, 0x8000A3 | 1 << 21)
    assert p.access(WRITE).error_code == 0xB
    p.guest(0xC04000 + 4 * 2, 0x8000A3 | 1 << 13)  # GPA bit 32
    assert outcome(p.access(READ)) == (48, 0x181, 1 << 32 | LINEAR)
    p.vcpu({ctl.V_CR4: 0})
    p.guest(0xC04000 + 4 * 2, 0xC050A3)
    assert outcome(p.access(WRITE)) == (0, 0, LINEAR)


def test_five_level_guest() -> None:
    p = Processor()
    p.guest(0xC04000 + 8, GUEST_PML4 | 0x63)
    p.vcpu({ctl.V_CR4: 0x2620 | 1 << 12, ctl.V_CR3: 0xC04000})
    assert outcome(p.access(READ, linear=LINEAR | 1 << 48)) == (0, 0, LINEAR)
    assert p.access(READ, linear=1 << 57).reason == -13


@pytest.mark.parametrize("linear", [1 << 47, 1 << 63, (1 << 64) - (1 << 47) - 8])
def test_a_non_canonical_address_is_gp(linear: int) -> None:
    assert Processor().access(READ, linear=linear).reason == -13


def test_guest_flags_are_set_by_accesses_of_their_own() -> None:
    p = Processor()
    for gpa in (GUEST_PML4, 0xC01000, 0xC00000 + 32, GUEST_PTE):
        p.guest(gpa, p.guest_word(gpa) & ~0x60)
    p.access(READ)
    assert [p.guest_word(gpa) & 0x60 for gpa in (GUEST_PML4, 0xC01000, 0xC00000 + 32, GUEST_PTE)] == [32] * 4
    # the update comes before the page itself is looked at
    set_up(p, "PTE raw=0")
    assert outcome(p.access(WRITE)) == (48, 0x182, LINEAR)
    assert p.guest_word(GUEST_PTE) & 0x60 == 0x60


def test_without_ept_there_is_nothing_to_refuse() -> None:
    p = Processor()
    set_up(p, "PTE raw=0; gPTpage.PTE raw=0")
    p.vcpu({ctl.V_SECONDARY: 0})
    assert outcome(p.access(WRITE)) == (0, 0, LINEAR)
    p.vcpu({ctl.V_SECONDARY: ctl.SECONDARY_EPT, ctl.V_PRIMARY: 0})
    assert outcome(p.access(WRITE)) == (0, 0, LINEAR)


def test_switches_of_the_unsettled_questions() -> None:
    p = Processor()
    set_up(p, "PTE=0x34|b61; vec=ALL")
    assert outcome(p.access(WRITE)) == (48, 0x1A2, LINEAR)
    p.m.caps[3] = 1
    assert p.access(WRITE).reason == 0
    set_up(p, "PTE=0x35")
    assert p.access(WRITE, kind=acc.READ_MODIFY_WRITE).qualification == 0x1AA
    p.m.caps[8] = 1
    assert p.access(WRITE, kind=acc.READ_MODIFY_WRITE).qualification == 0x1AB
    assert p.access(WRITE).qualification == 0x1AA


def test_spp_index_ignores_the_fifth_level() -> None:
    p = Processor(width=52, levels=5)
    trail = np.zeros((ept.TRAIL_ROWS, 4), dtype=np.int64)
    p.poke(p.tables["root"] + 8, p.tables["PML4"] | 7)
    set_up(p, "PTE=0x35|b61; vec=1")
    how = np.int64(acc.describe(WRITE))
    for high in (0, 1 << 48):
        assert access_check.check(p.m, VCPU, np.int64(LINEAR | high), np.int64(8), how, trail)[0] == 0
        assert access_check.check(p.m, VCPU, np.int64(LINEAR | high | 0x80), np.int64(8), how, trail) == (48, 0x1AA, 2)
