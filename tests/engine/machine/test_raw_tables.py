"""Raw table entries: stored as they are, walked as they are (SDM vol. 3C, 29.3)."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from engine.arch import access as acc
from engine.arch import ept as bits
from engine.cpu import frames
from engine.errors import Busy, InvalidValue
from engine.machine import VirtualMachine
from engine.state.config import HostConfig
from engine.trace.single import AccessRequest
from tests.engine.builders import READ, machine, refused, round_trip, unchanged

GPA = 0x2000
LEAF = GPA | 0x35
SPP = 1 << 61
ONES = (1 << 64) - 1
WIDTH = 40
ALL = 0x5555_5555_5555_5555


@pytest.fixture
def vm() -> VirtualMachine:
    """A machine whose page 2 has been touched, with a vector."""
    made = machine(maxphyaddr=WIDTH)
    made.access(AccessRequest(GPA))
    fill(made)
    return made


def fill(vm: VirtualMachine, gpa: int = GPA) -> None:
    """SPPT path for ``gpa``, with an empty vector."""
    for level in (4, 3, 2):
        if not vm.tables.sppt_entry(level, gpa).raw:
            vm.tables.set_sppt_entry(level, gpa, vm.tables.new_frame() | 1)


@pytest.mark.parametrize("raw", [0, 1, LEAF, ONES, 1 << 63, 0x8000_0000_0000_0037, 0xAAAA_AAAA_AAAA_AAAA])
@pytest.mark.parametrize("level", [1, 2, 3, 4])
def test_what_is_stored_is_read_back(vm: VirtualMachine, level: int, raw: int) -> None:
    for read, store in (
        (vm.tables.ept_entry, vm.tables.set_ept_entry),
        (vm.tables.sppt_entry, vm.tables.set_sppt_entry),
    ):
        before = read(level, GPA)
        stored = store(level, GPA, raw)
        assert stored == read(level, GPA) and stored.raw == raw
        assert (stored.table, stored.index, stored.level) == (before.table, before.index, level)


def test_the_entry_is_the_one_that_a_walk_shows(vm: VirtualMachine) -> None:
    vm.tables.set_ept_entry(1, GPA, LEAF | SPP)
    told = vm.walk(GPA)
    assert [vm.tables.ept_entry(level, GPA) for level in (4, 3, 2, 1)] == list(told.ept)
    assert [vm.tables.sppt_entry(level, GPA) for level in (4, 3, 2, 1)] == list(told.sppt)


def test_a_change_survives_the_durable_form(vm: VirtualMachine) -> None:
    vm.tables.set_ept_entry(1, GPA, ONES)
    again = round_trip(vm)
    assert again.tables.ept_entry(1, GPA) == vm.tables.ept_entry(1, GPA)
    assert again.counters()["frames_client"] == vm.counters()["frames_client"] == 3


@pytest.mark.parametrize(
    ("raw", "outcome"),
    [
        (GPA | 0x37, "allowed"),
        (GPA | 0x37 | 1 << 40, "ept_misconfiguration"),
        (GPA | 0x32, "ept_misconfiguration"),
        (0, "ept_violation"),
        (LEAF, "ept_violation"),
    ],
)
def test_a_leaf_decides(vm: VirtualMachine, raw: int, outcome: str) -> None:
    vm.tables.set_ept_entry(1, GPA, raw)
    assert vm.walk(GPA).outcome == outcome


def test_a_vector_decides_about_each_sub_page(vm: VirtualMachine) -> None:
    vm.tables.set_ept_entry(1, GPA, LEAF | SPP)
    vm.tables.set_sppt_entry(1, GPA, 0b0100)
    assert vm.walk(GPA + 0x80).outcome == "allowed"
    refusal = vm.walk(GPA)
    assert (refusal.outcome, refusal.qualification, refusal.denied) == ("ept_violation", 0x1AA, 1)


@pytest.mark.parametrize(
    ("level", "raw", "outcome", "qualification", "reserved"),
    [
        (1, ALL | 1 << 63, "spp_misconfiguration", 0, 1 << 63),
        (2, 0, "spp_miss", 0x800, 0),
        (2, 1 | 1 << 7, "spp_misconfiguration", 0, 1 << 7),
        (3, 1 | 1 << 40, "spp_misconfiguration", 0, 1 << 40),
        (4, 1 | 1 << 52, "spp_misconfiguration", 0, 1 << 52),
    ],
)
def test_malformed_sppt_entries(
    vm: VirtualMachine, level: int, raw: int, outcome: str, qualification: int, reserved: int
) -> None:
    vm.tables.set_ept_entry(1, GPA, LEAF | SPP)
    assert vm.tables.set_sppt_entry(level, GPA, raw).fields["reserved"] == reserved
    told = vm.walk(GPA)
    assert (told.outcome, told.qualification) == (outcome, qualification)


def test_absent_memory_reads_as_all_ones_and_takes_no_entry(vm: VirtualMachine) -> None:
    vm.tables.set_ept_entry(2, GPA, 0x7000_0000 | 7)
    entry = vm.tables.ept_entry(1, GPA)
    assert entry.absent and entry.raw == ONES and entry.table == 0x7000_0000
    assert vm.walk(GPA, READ).outcome == "ept_misconfiguration"
    with refused(vm, InvalidValue, "level", 1, "table memory; there is none at 0x70000000"):
        vm.tables.set_ept_entry(1, GPA, LEAF)


def test_an_entry_cannot_lead_to_what_is_no_table(vm: VirtualMachine) -> None:
    """Registers, vCPU records, layers and guest pages lie in the same arena."""
    vm.write_memory(GPA, b"x")
    vm.set_subpages([])
    m = vm.state.current.snapshot.machine
    tables = {int(frames.EPT), int(frames.SPPT), int(frames.CLIENT)}
    others = {int(k): frame for frame, k in enumerate(m.kind) if k not in tables and k != frames.FREE}
    assert {int(frames.STATE), int(frames.VCPU), int(frames.MEMORY)} <= set(others)
    for frame in others.values():
        vm.tables.set_ept_entry(2, GPA, int(frames.address_of(m, frame)) | 7)
        assert vm.tables.ept_entry(1, GPA).absent
        with unchanged(vm), pytest.raises(InvalidValue):
            vm.tables.set_ept_entry(1, GPA, 0)


def test_before_spp_is_enabled_there_is_no_sppt() -> None:
    vm = machine(spp=False)
    assert vm.tables.sppt_entry(4, 0).absent
    with refused(vm, InvalidValue, "level", 4, "table memory"):
        vm.tables.set_sppt_entry(4, 0, 1)


@pytest.mark.parametrize(
    ("call", "field", "value", "rule"),
    [
        (lambda t: t.ept_entry(0, GPA), "level", 0, "the EPT has levels 1 to 4"),
        (lambda t: t.ept_entry(5, GPA), "level", 5, "the EPT has levels 1 to 4"),
        (lambda t: t.sppt_entry(5, GPA), "level", 5, "the SPPT has levels 1 to 4"),
        (lambda t: t.sppt_entry(-1, GPA), "level", -1, "the SPPT has levels 1 to 4"),
        (lambda t: t.ept_entry(1, 1 << WIDTH), "gpa", 1 << WIDTH, "address width of 40 bits"),
        (lambda t: t.sppt_entry(1, -1), "gpa", -1, "address width of 40 bits"),
        (lambda t: t.set_ept_entry(1, 1 << WIDTH, 0), "gpa", 1 << WIDTH, "address width of 40 bits"),
        (lambda t: t.set_sppt_entry(0, GPA, 0), "level", 0, "the SPPT has levels 1 to 4"),
        (lambda t: t.set_ept_entry(1, GPA, 1 << 64), "raw", 1 << 64, "64 bits"),
        (lambda t: t.set_sppt_entry(1, GPA, -1), "raw", -1, "64 bits"),
        (lambda t: t.ept_entry(2, 1 << 39), "level", 2, "it ends at level 4, PML4E = 0x0"),
        (lambda t: t.set_ept_entry(3, 1 << 39, 0), "level", 3, "it ends at level 4"),
        (lambda t: t.set_sppt_entry(3, 1 << 39, 0), "level", 3, "it ends at level 4, SPPL4E = 0x0"),
    ],
)
def test_refused(vm: VirtualMachine, call: Callable[[object], object], field: str, value: int, rule: str) -> None:
    with refused(vm, InvalidValue, field, value, rule):
        call(vm.tables)


def test_a_page_above_ends_the_walk(vm: VirtualMachine) -> None:
    vm.tables.set_ept_entry(2, GPA, 0xB7)
    assert vm.tables.ept_entry(2, GPA).fields["page"] == 1
    with refused(vm, InvalidValue, "level", 1, "it ends at level 2, PDE = 0xb7"):
        vm.tables.ept_entry(1, GPA)


def test_five_levels() -> None:
    vm = machine(maxphyaddr=52)
    wide = 3 << 48 | GPA
    assert vm.tables.ept_entry(5, wide).raw == 0
    for level in (5, 4, 3, 2):
        vm.tables.set_ept_entry(level, wide, vm.tables.new_frame() | 7)
    vm.tables.set_ept_entry(1, wide, wide & ~0xFFF | 0x37)
    told = vm.walk(wide)
    assert told.outcome == "allowed" and told.ept[0].structure == "PML5E"
    assert told.ept[0].index == 3
    assert set(told.ept[0].fields) == {
        "read", "write", "execute", "page", "accessed", "user_execute", "suppress_ve", "address", "reserved",
    }  # fmt: skip
    assert vm.tables.set_ept_entry(5, wide, 0x87 | SPP).fields["reserved"] == 0x80
    assert vm.walk(wide).outcome == "ept_misconfiguration"


def test_four_levels_do_not_translate_a_wider_address() -> None:
    capability = HostConfig().capability("ept_vpid_cap") & ~bits.CAP_WALK_5
    vm = machine(maxphyaddr=49, host=HostConfig(vmx_capabilities={"ept_vpid_cap": capability}))
    with refused(vm, InvalidValue, "gpa", 1 << 48, "what 4 levels translate"):
        vm.tables.ept_entry(4, 1 << 48)


def test_new_frames_are_zero_and_distinct(vm: VirtualMachine) -> None:
    first, second = vm.tables.new_frame(), vm.tables.new_frame()
    assert first != second and first % 4096 == second % 4096 == 0 and first >> WIDTH == 0
    vm.tables.set_ept_entry(2, GPA, first | 7)
    assert vm.tables.ept_entry(1, GPA).raw == 0


def test_one_change_at_a_time(vm: VirtualMachine) -> None:
    with vm.state.change(), pytest.raises(Busy):
        vm.tables.set_ept_entry(1, GPA, 0)


def test_nothing_is_flushed() -> None:
    """An edit takes effect in a translation cache with the flush that the client owes it (29.4.3)."""
    vm = machine(maxphyaddr=WIDTH, translation_cache="model")
    vm.access(AccessRequest(GPA))
    vm.access(AccessRequest(GPA))
    before = vm.state.current.snapshot.machine.tlb.copy()
    vm.tables.set_ept_entry(1, GPA, LEAF)
    assert (vm.state.current.snapshot.machine.tlb == before).all()
    assert vm.walk(GPA).outcome == "ept_violation"


@pytest.mark.parametrize(
    ("leaf", "kind", "linear", "qualification"),
    [
        (LEAF, acc.DATA, acc.LINEAR_VALID, 0x1AA),
        (LEAF, acc.DATA, 0, 0x2A),
        (LEAF, acc.READ_MODIFY_WRITE, acc.LINEAR_VALID, 0x1AA),
        (LEAF, acc.PAGING_UPDATE, acc.LINEAR_VALID, 0xAB),
        (0, acc.PAGING_READ, 0, 0x1),
        (LEAF, acc.SHADOW_STACK, acc.LINEAR_VALID, 0x21AA),
        (GPA | 0x37, acc.READ_MODIFY_WRITE, acc.LINEAR_VALID, None),
    ],
)
def test_kinds_of_access(vm: VirtualMachine, leaf: int, kind: int, linear: int, qualification: int | None) -> None:
    vm.tables.set_ept_entry(1, GPA, leaf)
    told = vm.walk(GPA, kind=kind, linear=linear)
    # Without a linear address bits 11:9 are undefined, and a host may not report them at all.
    found = told.qualification if told.qualification is None else told.qualification & ~0xE00
    assert found == qualification
    if leaf == LEAF:
        assert acc.KIND_NAMES[kind] in told.sentence or kind == acc.DATA


@pytest.mark.parametrize(
    ("members", "field", "value"),
    [
        ({"kind": 5}, "kind", 5),
        ({"kind": -1}, "kind", -1),
        ({"linear": 16}, "linear", 16),
        ({"linear": acc.LINEAR_USER}, "linear", 2),
        ({"linear": 0, "kind": acc.PAGING_UPDATE}, "linear", 0),
        ({"kind": acc.PAGING_READ, "access": acc.WRITE}, "kind", "paging-read"),
        ({"kind": acc.READ_MODIFY_WRITE, "access": acc.READ}, "kind", "read-modify-write"),
        ({"kind": acc.SHADOW_STACK, "access": acc.EXECUTE}, "kind", "shadow-stack"),
    ],
)
def test_kinds_that_are_none(vm: VirtualMachine, members: dict[str, int], field: str, value: object) -> None:
    with refused(vm, InvalidValue, field, value, "must be 0 to|must fit in|only a data access|valid linear address"):
        vm.walk(GPA, **members)
