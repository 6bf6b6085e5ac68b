"""Page-modification logging and virtualization exceptions: what they leave in memory, and when they do not happen."""

from __future__ import annotations

import pytest

from engine.arch import access as acc
from engine.arch import controls as ctl
from engine.arch.access import READ, WRITE

from .bench_machine import LINEAR, Processor
from .vectors import GUEST_PTE, set_up

PAGE = 0x1000


def logged(p: Processor) -> list[int]:
    """The log from its first entry."""
    index = p.control(ctl.V_PML_INDEX)
    return [p.peek(p.tables["PMLB"] + 8 * i) for i in range(511, index if index < 512 else -1, -1)]


def log_machine(setup: str = "") -> Processor:
    p = Processor()
    set_up(p, f"AD-ALL; EPTP.AD=1; PML=1; {setup}")
    return p


@pytest.mark.parametrize(("access", "flags"), [(WRITE, 0x300), (READ, 0x100)], ids=["F01", "F03"])
def test_flags_of_the_leaf(access: int, flags: int) -> None:
    p = Processor()
    set_up(p, "EPTP.AD=1; PTE=0x35|b61; vec=1")
    assert p.access(access).reason == 0
    assert p.peek(p.leaf()) & 0x300 == flags


@pytest.mark.parametrize("setup", ["PTE=0x35", "PTE=0x35|b61; vec=0", "PTE=0x35|b61; L2E=0", "PTE=0x32", "PTE raw=0"])
def test_a_failing_access_sets_and_logs_nothing(setup: str) -> None:
    p = log_machine(setup)
    before = p.peek(p.leaf())
    assert p.access(WRITE).reason
    assert p.peek(p.leaf()) == before
    assert logged(p) == []


def test_a_page_is_logged_when_it_becomes_dirty() -> None:
    p = log_machine("PTE=0x137")
    assert p.access(READ).reason == 0
    assert logged(p) == []
    assert p.access(WRITE, linear=LINEAR + 0x123).reason == 0
    assert logged(p) == [LINEAR]
    assert p.access(WRITE).reason == 0
    assert logged(p) == [LINEAR]
    # a write that sub-page permissions allow is a write like any other
    set_up(p, "nextPTE=0x35|b61")
    p.poke(p.tables["L1"] + 16, 1)
    assert p.access(WRITE, linear=LINEAR + PAGE).reason == 0
    assert logged(p) == [LINEAR, LINEAR + PAGE]


def test_guest_paging_structures_are_logged_too() -> None:
    p = log_machine()
    p.poke(p.tables["gPT"], 0xA00137)
    assert p.access(READ).reason == 0
    assert logged(p) == [0xA00000]


def test_a_full_log_stops_the_access_before_it_happens() -> None:
    p = log_machine("PTE=0x137; PMLidx=FFFF")
    assert p.access(WRITE, circumstances=acc.NMI_UNBLOCKING)[:2] == (62, 0x1000)
    assert p.peek(p.leaf()) & 0x200 == 0
    set_up(p, "PMLidx=200")
    assert p.access(WRITE)[:2] == (62, 0)
    # nothing to set: no room needed
    assert p.access(READ).reason == 0
    set_up(p, "PMLidx=0")
    assert p.access(WRITE).reason == 0
    assert p.peek(p.tables["PMLB"]) == LINEAR
    assert p.control(ctl.V_PML_INDEX) == 0xFFFF


def test_two_pages_need_two_entries() -> None:
    p = log_machine("PTE=0x137; nextPTE=0x137; PMLidx=0")
    assert p.access(WRITE, linear=LINEAR + 0xFFC)[:2] == (62, 0)
    assert p.peek(p.leaf()) & 0x200 == 0
    assert p.control(ctl.V_PML_INDEX) == 0
    set_up(p, "PMLidx=1")
    assert p.access(WRITE, linear=LINEAR + 0xFFC).reason == 0
    assert [p.peek(p.tables["PMLB"] + 8 * i) for i in (1, 0)] == [LINEAR, LINEAR + PAGE]
    assert p.control(ctl.V_PML_INDEX) == 0xFFFF


def test_a_full_log_stops_a_guest_paging_write() -> None:
    p = log_machine("PMLidx=FFFF")
    p.poke(p.tables["gPT"], 0xA00137)
    assert p.access(READ)[:3] == (62, 0, GUEST_PTE)


def test_without_flags_or_control_nothing_is_logged() -> None:
    p = Processor()
    set_up(p, "PML=1; PMLidx=FFFF")
    assert p.access(WRITE).reason == 0
    p = log_machine("PTE=0x137")
    p.vcpu({ctl.V_SECONDARY: ctl.SECONDARY_EPT})
    assert p.access(WRITE).reason == 0
    assert logged(p) == []
    # a log outside table memory is lost, its index moves
    p = log_machine("PTE=0x137; PMLaddr=0x100000")
    assert p.access(WRITE).reason == 0
    assert p.control(ctl.V_PML_INDEX) == 510


def area(p: Processor) -> list[int]:
    return [p.peek(p.tables["VEB"] + 8 * i) for i in range(5)]


def test_the_information_area() -> None:
    p = Processor()
    set_up(p, "VE=1; PTE=0x35")
    p.vcpu({ctl.V_EPTP_INDEX: 0x1_0007})
    p.poke(p.tables["VEB"] + 32, 0xAAAA_BBBB_CCCC_DDDD)
    result = p.access(WRITE, linear=LINEAR + 0x10)
    assert result[:4] == (-20, 0x1AA, LINEAR + 0x10, LINEAR + 0x10)
    busy = 0xFFFF_FFFF << 32
    assert area(p) == [busy | 48, 0x1AA, LINEAR + 0x10, LINEAR + 0x10, 0xAAAA_BBBB_CCCC_0007]
    # busy now: the next one is a VM exit
    assert p.access(WRITE).reason == 48
    p.poke(p.tables["VEB"], 48)
    assert p.access(WRITE).reason == -20


def test_a_violation_by_guest_paging_is_convertible() -> None:
    p = Processor()
    set_up(p, "VE=1; gPTpage.PTE raw=0")
    assert p.access(READ)[:3] == (-20, 0x81, GUEST_PTE)
    assert area(p)[1:4] == [0x81, LINEAR, GUEST_PTE]


@pytest.mark.parametrize(
    "setup",
    [
        "VE=1; PTE=0x35|(1<<63)",
        "VE=1; PDE=1<<63",
        "VE=1; PTE=0x35; VEinfo[4]=1",
        "VE=1; PTE=0x35; VEaddr=0x100000",
        "PTE=0x35",
    ],
)
def test_not_convertible(setup: str) -> None:
    p = Processor()
    set_up(p, setup)
    assert p.access(WRITE).reason == 48


def test_the_deciding_entry_is_the_last_one_read() -> None:
    p = Processor()
    set_up(p, "VE=1; PDE=PT|5|(1<<63); PTE=0x37")
    assert p.access(WRITE).reason == -20
    set_up(p, "PDE=0; PTE=0x37|(1<<63); VEinfo[4]=0")
    assert p.access(WRITE).reason == -20


def test_no_exception_in_real_mode_nor_in_event_delivery_nor_from_tracing() -> None:
    p = Processor()
    set_up(p, "VE=1; PTE=0x35")
    assert p.access(WRITE, circumstances=acc.DELIVERY).reason == 48
    assert p.access(WRITE, circumstances=acc.ASYNCHRONOUS)[:2] == (48, 0x101AA)
    p.vcpu({ctl.V_CR0: 0})
    assert p.access(WRITE).reason == 48


def test_a_gpa_that_meets_no_entry_is_not_convertible() -> None:
    p = Processor(width=52)
    set_up(p, "VE=1")
    p.guest(GUEST_PTE, 1 << 48 | 0x63)
    assert p.access(WRITE).reason == 48


@pytest.mark.parametrize("setup", ["PTE=0x32", "PTE=0x35|b61; L2E=0", "PTE=0x35|b61; vec=2"])
def test_other_exits_are_never_converted(setup: str) -> None:
    p = Processor()
    set_up(p, f"VE=1; {setup}")
    assert p.access(WRITE).reason in (49, 66)
