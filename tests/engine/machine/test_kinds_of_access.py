"""Accesses of every kind, and by linear address, through VirtualMachine."""

from __future__ import annotations

import numpy as np
import pytest

from engine.arch import access as acc
from engine.arch import controls as ctl
from engine.arch.access import EXECUTE, READ, WRITE
from engine.errors import InvalidValue, Unsupported
from engine.kvm.slots import SlotSpec
from engine.machine import SubpageRange, VirtualMachine
from engine.state.config import HostConfig, VmConfig
from engine.trace.columns import TraceChunk
from engine.trace.session import ReplayOptions
from engine.trace.single import AccessRequest
from tests.engine.builders import load_word, store_word

PAGE = 0x1000
PML4, PDPT, PD, PT = 0x10000, 0x11000, 0x12000, 0x13000
GVA = 0x4000_5000
GPA = 0x20000


def machine(translation_cache: str = "off") -> VirtualMachine:
    vm = VirtualMachine.create(VmConfig(translation_cache=translation_cache), [SlotSpec(0, 0, 1 << 20)], spp=True)
    words = {PML4: PDPT | 3, PDPT + 8: PD | 3, PD: PT | 3, PT + 8 * 5: GPA | 3, PT + 8 * 6: GPA + 2 * PAGE | 3}
    for gpa, entry in words.items():
        store_word(vm, gpa, entry)
    vm.vcpus.set_vmcs(0, {"cr3": PML4})
    return vm


def test_an_access_by_linear_address() -> None:
    vm = machine()
    written = vm.access(AccessRequest(None, gva=GVA + 0x10, data=b"12345678"))
    assert written.allowed and written.gpa == GPA + 0x10 and written.exception is None
    assert vm.read_memory(GPA + 0x10, 8) == b"12345678"
    assert set(written.exits.resolution_names()) == {"mapped"}
    assert load_word(vm, PT + 8 * 5) == GPA | 0x63
    assert load_word(vm, PML4) == PDPT | 0x23
    read = vm.access(AccessRequest(None, gva=GVA + 0x10, access=READ))
    assert read.data == b"12345678" and len(read.exits) == 0
    # over two pages that are not neighbours
    vm.access(AccessRequest(None, gva=GVA + 0xFFC, data=b"abcdefgh"))
    assert vm.read_memory(GPA + 0xFFC, 4) + vm.read_memory(GPA + 2 * PAGE, 4) == b"abcdefgh"
    assert vm.access(AccessRequest(None, gva=GVA + 0xFFC, access=READ)).data == b"abcdefgh"


def test_page_faults_and_mmio_by_linear_address() -> None:
    vm = machine()
    fault = vm.access(AccessRequest(None, gva=0x7000))
    assert (fault.exception, fault.error_code, fault.fault_address) == ("#PF", 2, 0x7000)
    assert not fault.allowed and not fault.lands and fault.resolution == "exception" and fault.run is None
    assert vm.access(AccessRequest(None, gva=1 << 62)).exception == "#GP"
    store_word(vm, PT + 8 * 5, 1 << 30 | 3)
    assert vm.access(AccessRequest(None, gva=GVA)).resolution == "mmio"
    assert vm.counters()["exceptions"] == 2 and vm.counters()["mmio"] == 1


@pytest.mark.parametrize(
    ("on_violation", "lands"), [("skip", False), ("stop", False), ("allow", True), ("grant", True)]
)
def test_violations_by_linear_address(on_violation: str, lands: bool) -> None:
    vm = machine()
    vm.set_subpages([SubpageRange(GPA >> 12, 1, 0xFFFF_FFFE)])
    request = AccessRequest(None, gva=GVA, data=bytes(range(8)), on_violation=on_violation)
    result = vm.access(request)
    assert result.lands is lands and result.allowed is (on_violation == "grant" and lands)
    assert vm.read_memory(GPA, 8) == (bytes(range(8)) if lands else bytes(8))
    exits = result.exits
    last = int(np.flatnonzero(exits.column("denied"))[-1])
    assert (exits.column("gpa")[last], exits.column("gva")[last], exits.column("denied")[last]) == (GPA, GVA, 1)
    assert vm.counters()["violations"] == 1


def test_bad_requests() -> None:
    vm = machine()
    for request in (
        AccessRequest(None),
        AccessRequest(None, gva=GVA, kind=acc.PAGING_READ, access=READ),
        AccessRequest(None, gva=GVA, linear=3),
        AccessRequest(GPA, kind=5),
        AccessRequest(GPA, kind=acc.READ_MODIFY_WRITE, access=READ),
        AccessRequest(GPA, linear=16),
    ):
        with pytest.raises(InvalidValue):
            vm.access(request)


def test_kinds_of_access_by_gpa() -> None:
    vm = machine()
    vm.access(AccessRequest(GPA))
    leaf = vm.tables.ept_entry(1, GPA).raw
    vm.tables.set_ept_entry(1, GPA, leaf & ~2 | 1 << 61)
    assert vm.walk(GPA, WRITE, kind=acc.PAGING_UPDATE).qualification == 0xAB
    told = vm.walk(GPA, READ, kind=acc.PAGING_READ)
    assert told.qualification == 0xAB and told.kind == "paging-read"
    assert told.sentence.endswith("does not permit a paging-read access")
    assert vm.walk(GPA, READ, kind=acc.PAGING_READ, linear=0).outcome == "allowed"
    assert vm.walk(GPA, WRITE, kind=acc.SHADOW_STACK, linear=1).outcome == "spp_miss"


def test_kinds_of_access_in_a_trace() -> None:
    vm = machine()
    vm.access(AccessRequest(GPA))
    leaf = vm.tables.ept_entry(1, GPA).raw
    vm.tables.set_ept_entry(1, GPA, leaf & ~0xC02 | 1 << 61)  # no right to restore either
    word1 = 8 | WRITE << 16 | acc.record_bits(acc.PAGING_UPDATE, acc.LINEAR_VALID)
    chunk = TraceChunk(np.array([[GPA, word1]], dtype=np.uint64), None, {}, kinds=True)
    with vm.replay(ReplayOptions(include="all")) as replay:
        replay.feed(chunk)
        result = replay.finish()
    assert result.exit_columns.column("qualification").tolist() == [0xAB]
    for word1, kinds in (
        (8 | WRITE << 16 | acc.record_bits(acc.DATA, 0), False),
        (8 | WRITE << 16 | 1 << 31, True),
        (8 | READ << 16 | acc.record_bits(acc.READ_MODIFY_WRITE, 1), True),
        (8 | READ << 16 | 5 << 24, True),
    ):
        with pytest.raises(InvalidValue), vm.replay(ReplayOptions()) as replay:
            replay.feed(TraceChunk(np.array([[GPA, word1]], dtype=np.uint64), None, {}, kinds=kinds))


def test_the_cache_outlives_a_change_of_the_tables_and_not_one_by_kvm() -> None:
    vm = machine("model")
    assert not vm.access(AccessRequest(GPA)).stale
    assert vm.access(AccessRequest(None, gva=GVA)).allowed
    kinds = {t.kind for t in vm.vcpus.tlb(0)}
    assert kinds == {"physical", "combined"}
    leaf = vm.tables.ept_entry(1, GPA)
    vm.tables.set_ept_entry(1, GPA, leaf.raw & ~2)
    for request in (AccessRequest(GPA), AccessRequest(None, gva=GVA)):
        result = vm.access(request)
        assert result.allowed and result.stale
    assert vm.counters()["stale_accesses"] == 2
    vm.vcpus.invept(0, 2, 0)
    result = vm.access(AccessRequest(GPA))
    assert result.allowed and not result.stale and result.exits.resolution_names() == ["write-restored"]
    vm.set_subpages([SubpageRange(GPA >> 12, 1, 0)])
    assert vm.vcpus.tlb(0) == []
    result = vm.access(AccessRequest(GPA))
    assert result.resolution == "violation" and not result.stale
    assert machine().vcpus.tlb(0) == []


def test_a_stale_record_is_listed_in_a_replay() -> None:
    vm = machine("model")
    vm.access(AccessRequest(GPA))
    vm.tables.set_ept_entry(1, GPA, 0)
    records = np.array([[GPA, 8 | WRITE << 16], [GPA + PAGE, 8 | WRITE << 16]], dtype=np.uint64)
    with vm.replay(ReplayOptions()) as replay:
        replay.feed(TraceChunk(records, None, {}))
        columns = replay.finish().exit_columns
    assert columns.column("stale").tolist() == [1]
    assert (columns.column("index").tolist(), columns.resolution_names()) == ([0], ["completed"])


def test_the_page_log_through_kvm() -> None:
    vm = machine()
    vm.access(AccessRequest(GPA))
    leaf = vm.tables.ept_entry(1, GPA).raw
    log = vm.tables.new_frame()
    vm.vcpus.set_vmcs(0, {"secondary_controls": vm.vcpus.vmcs(0)["secondary_controls"] | 1 << 17, "pml_address": log})
    vm.tables.set_ept_entry(1, GPA, leaf & ~0x200)
    vm.vcpus.set_vmcs(0, {"pml_index": 0xFFFF})
    result = vm.access(AccessRequest(GPA + 8))
    assert result.allowed and result.exits.column("reason").tolist() == [62]
    assert result.exits.resolution_names() == ["log-emptied"]
    assert vm.vcpus.vmcs(0)["pml_index"] == 510
    assert vm.tables.ept_entry(1, GPA).raw & 0x200
    assert vm.counters()["exits_pml_full"] == 1


def test_a_virtualization_exception_through_kvm() -> None:
    vm = machine()
    vm.access(AccessRequest(GPA, access=READ))
    leaf = vm.tables.ept_entry(1, GPA).raw
    area = vm.tables.new_frame()
    vm.vcpus.set_vmcs(
        0, {"secondary_controls": vm.vcpus.vmcs(0)["secondary_controls"] | 1 << 18, "ve_information_address": area}
    )
    vm.tables.set_ept_entry(1, GPA, leaf & ~2)
    result = vm.access(AccessRequest(GPA, gva=GVA))
    assert result.exception == "#VE" and not result.allowed and result.run is None
    assert result.exits.column("qualification").tolist() == [0x1AA]
    # busy now
    assert vm.access(AccessRequest(None, gva=GVA)).exits.resolution_names()[-1] == "write-restored"


def test_a_restored_machine_has_its_fields_and_an_empty_cache() -> None:
    vm = machine("model")
    vm.access(AccessRequest(GPA))
    blocks = {(array, block): data for array, block, data in vm.changed_blocks()}
    again = VirtualMachine.restore(vm.head(), blocks)
    assert again.vcpus.vmcs(0) == vm.vcpus.vmcs(0)
    assert again.vcpus.tlb(0) == []


# ---- hosts without EPT: the memory slots alone decide


@pytest.mark.parametrize("on_violation", ["skip", "allow", "grant"])
def test_dirty_logs_know_what_lands_by_linear_address(on_violation: str) -> None:
    vm = machine()
    vm.set_subpages([SubpageRange(GPA >> 12, 1, 0xFFFF_FFFD)])
    vm.dirty.track("subpage")
    vm.access(AccessRequest(None, gva=GVA + 0x80, data=bytes(8), on_violation=on_violation))
    noted = vm.dirty.pages(GPA >> 12, 1)
    assert dict(zip(noted.gfns.tolist(), noted.maps.tolist(), strict=True)) == (
        {} if on_violation == "skip" else {GPA >> 12: 2}
    )


def without_ept() -> VirtualMachine:
    slots = [SlotSpec(0, 0, 1 << 20), SlotSpec(1, 1 << 20, 1 << 20, read_only=True)]
    return VirtualMachine.create(VmConfig(host=HostConfig(ept=False)), slots)


def test_a_host_without_ept_starts_without_it() -> None:
    vm = without_ept()
    controls = vm.vcpus.vmcs(0)["secondary_controls"]
    assert controls & (ctl.SECONDARY_EPT | ctl.SECONDARY_SPP | ctl.SECONDARY_UNRESTRICTED) == 0
    assert vm.vcpus.vm_entry(0).result == "VMsucceed"
    vm.vcpus.set_vmcs(0, {"secondary_controls": controls | ctl.SECONDARY_EPT})
    assert vm.vcpus.vm_entry(0).vm_instruction_error == 7
    with pytest.raises(Unsupported):
        vm.enable_spp()


@pytest.mark.parametrize(
    ("gpa", "access", "resolution"),
    [
        (0x5000, WRITE, "completed"),
        (0x5000, EXECUTE, "completed"),
        ((1 << 20) + 8, READ, "completed"),
        ((1 << 20) + 8, WRITE, "mmio"),
        ((1 << 20) - 4, WRITE, "mmio"),
        ((2 << 20) - 4, READ, "mmio"),
        (5 << 20, READ, "mmio"),
    ],
)
def test_slots_alone_decide_without_ept(gpa: int, access: int, resolution: str) -> None:
    vm = without_ept()
    told = vm.walk(gpa, access)
    assert (told.outcome, told.sentence, told.ept) == ("allowed", "allowed: EPT is off", ())
    # paging off: the linear address is the GPA
    vm.vcpus.set_vmcs(0, {"cr0": 0x33})
    for at in ({"gpa": gpa}, {"gpa": None, "gva": gpa}, {"gpa": gpa}):
        result = vm.access(AccessRequest(access=access, **at))  # type: ignore[arg-type]
        assert result.resolution == resolution and result.allowed is (resolution == "completed")
        assert (result.run is None) is result.allowed
    records = np.array([[gpa, 8 | READ << 16], [gpa, 8 | access << 16]] * 3, dtype=np.uint64)
    with vm.replay(ReplayOptions()) as replay:
        replay.feed(TraceChunk(records, None, {}))
        found = replay.finish()
    reads = 3 if resolution == "mmio" and access == READ else 0
    assert found.mmio == reads + (3 if resolution == "mmio" else 0)
    assert found.writes == (3 if access == WRITE else 0)
    assert vm.counters()["exits_ept_violation"] == 0


def test_ept_is_walked_without_spp() -> None:
    vm = VirtualMachine.create(VmConfig(host=HostConfig(spp=False)), [SlotSpec(0, 0, 1 << 20)])
    assert vm.access(AccessRequest(GPA)).exits.resolution_names() == ["mapped"]
    assert vm.counters()["exits_ept_violation"] == 1


# ---- where kinds differ


def test_a_known_refusal_is_that_of_a_plain_write_alone() -> None:
    """The fast path remembers how plain writes are refused; other kinds are refused in their own way."""
    vm = machine()
    vm.access(AccessRequest(GPA))
    vm.set_subpages([SubpageRange(GPA >> 12, 1, 0)])
    plain = 8 | WRITE << 16
    update = plain | acc.record_bits(acc.PAGING_UPDATE, acc.LINEAR_VALID)
    untranslated = plain | acc.record_bits(acc.DATA, 0)
    for words, found in (
        ((plain, plain, update, untranslated, plain), [0x1AA, 0x1AA, 0xAB, 0x2A, 0x1AA]),
        ((update, untranslated, update, plain), [0xAB, 0x2A, 0xAB, 0x1AA]),
    ):
        records = np.array([[GPA, word] for word in words], dtype=np.uint64)
        with vm.replay(ReplayOptions()) as replay:
            replay.feed(TraceChunk(records, None, {}, kinds=True))
            assert replay.finish().exit_columns.column("qualification").tolist() == found


def test_a_grant_of_what_is_not_the_reason_is_no_success() -> None:
    vm = machine()
    vm.access(AccessRequest(GPA))
    vm.set_subpages([SubpageRange(GPA >> 12, 1, 0)])
    request = AccessRequest(GPA, kind=acc.PAGING_UPDATE, on_violation="grant")
    for shown in (["violation", "violation"], ["violation"]):
        result = vm.access(request)
        assert not result.allowed and not result.lands and result.exits.resolution_names() == shown
    assert vm.counters()["violations"] == 2 and vm.counters()["grants"] == 1
    assert vm.access(AccessRequest(GPA, on_violation="grant")).resolution == "completed"


def test_an_exit_about_a_guest_table_is_eight_bytes_at_its_entry() -> None:
    vm = machine()
    vm.access(AccessRequest(PT, access=READ))
    vm.set_subpages([SubpageRange(PT >> 12, 1, 0)])
    result = vm.access(AccessRequest(None, size=64, gva=GVA, on_violation="allow"))
    columns = result.exits.columns
    last = {name: int(columns[name][-1]) for name in ("gpa", "gva", "size", "qualification", "subpages", "denied")}
    assert last == {"gpa": PT + 40, "gva": GVA, "size": 8, "qualification": 0xAB, "subpages": 1, "denied": 0}
    assert not result.lands and result.resolution == "violation"


def test_circumstances_reach_the_processor() -> None:
    vm = machine()
    vm.access(AccessRequest(GPA))
    vm.set_subpages([SubpageRange(GPA >> 12, 1, 0)])
    for bits, qualification in ((acc.NMI_UNBLOCKING, 0x11AA), (acc.ASYNCHRONOUS, 0x101AA), (0, 0x1AA)):
        assert vm.walk(GPA, circumstances=bits).qualification == qualification
        result = vm.access(AccessRequest(GPA, circumstances=bits))
        assert result.exits.column("qualification").tolist() == [qualification]
    vm.set_subpages([SubpageRange(GPA >> 12, 1, 1)])
    assert vm.access(AccessRequest(GPA, size=4)).allowed
    refused = vm.access(AccessRequest(GPA, size=4, circumstances=acc.SPP_EXEMPT))
    assert not refused.allowed and refused.exits.column("denied").tolist() == [0]
    with pytest.raises(InvalidValue, match="nmi-unblocking, spp-exempt"):
        vm.access(AccessRequest(GPA, circumstances=1))


def test_what_the_processor_itself_writes_may_be_in_guest_memory() -> None:
    vm = machine()
    vm.access(AccessRequest(None, gva=GVA))
    leaf = vm.tables.ept_entry(1, GPA).raw
    controls = vm.vcpus.vmcs(0)["secondary_controls"]
    vm.vcpus.set_vmcs(0, {"secondary_controls": controls | 1 << 17 | 1 << 18, "pml_address": 0x40000, "pml_index": 511})
    vm.vcpus.set_vmcs(0, {"ve_information_address": 0x41000, "eptp_index": 7})
    vm.tables.set_ept_entry(1, GPA, leaf & ~0x200)
    assert vm.access(AccessRequest(GPA + 8)).allowed
    assert load_word(vm, 0x40000 + 511 * 8) == GPA
    vm.tables.set_ept_entry(1, GPA, leaf & ~2)
    assert vm.access(AccessRequest(GPA + 8, gva=GVA)).exception == "#VE"
    assert [load_word(vm, 0x41000 + 8 * n) for n in range(5)] == [0xFFFF_FFFF_0000_0030, 0x1AA, GVA, GPA + 8, 7]
    vm.write_memory(0x41004, bytes(4))
    by_linear = vm.access(AccessRequest(None, gva=GVA + 16))
    assert (by_linear.exception, by_linear.gpa, by_linear.fault_address) == ("#VE", GPA + 16, GVA + 16)
    assert by_linear.exits.column("qualification").tolist() == [0x1AA]
    assert by_linear.exits.resolution_names() == ["exception"] and by_linear.run is None
    # busy, and where there is no memory, which reads as busy
    vm.vcpus.set_vmcs(0, {"ve_information_address": 1 << 30})
    assert vm.access(AccessRequest(GPA + 8)).exception is None


def test_nothing_lands_where_there_is_no_memory() -> None:
    """The tables say that the page may be written; no slot holds it."""
    vm = machine()
    vm.access(AccessRequest(GPA))
    nowhere = 2 << 20
    table = vm.tables.new_frame()
    vm.tables.set_ept_entry(2, nowhere, table | 7)
    vm.tables.set_ept_entry(1, nowhere, nowhere | 0x37)
    result = vm.access(AccessRequest(nowhere, data=bytes(8)))
    assert result.allowed and not result.lands
    read = vm.access(AccessRequest(nowhere, access=READ))
    assert read.allowed and read.data is None


@pytest.mark.parametrize(
    ("setup", "kind", "access", "linear", "sentence"),
    [
        ({"leaf": 0x35}, acc.SHADOW_STACK, WRITE, 1, "PTE at {pte} does not permit a shadow-stack access"),
        ({"leaf": 0x35}, acc.PAGING_UPDATE, WRITE, 1, "PTE at {pte} does not permit a paging-update access"),
        ({"leaf": 0x35, "pde": 5}, acc.PAGING_UPDATE, WRITE, 1, "PDE at {pde} does not permit"),
        ({"leaf": 1 << 58 | 0x35}, acc.PAGING_UPDATE, WRITE, 1, "allowed: PTE at {pte} has paging-write access"),
        ({"leaf": 1 << 58 | 0x35, "pde": 5}, acc.PAGING_UPDATE, WRITE, 1, "PDE at {pde} does not permit"),
        ({"leaf": 0x35, "pde": 5}, acc.DATA, WRITE, 1, "PDE at {pde} does not permit write"),
        ({"leaf": 0x33}, acc.DATA, EXECUTE, 3, "PTE at {pte} does not permit execute through a user-mode"),
        (
            {"leaf": 0x437, "pde": 7},
            acc.DATA,
            EXECUTE,
            3,
            "PDE at {pde} does not permit execute through a user",
        ),
        ({"leaf": 0x433}, acc.DATA, EXECUTE, 1, "PTE at {pte} does not permit execute through a supervisor"),
        ({"leaf": 0x430}, acc.DATA, READ, 1, "PTE at {pte} does not permit read"),
        ({"leaf": 0x37, "pde": 0x403}, acc.DATA, EXECUTE, 1, "PDE at {pde} does not permit execute"),
        ({"leaf": 0}, acc.DATA, READ, 1, "not mapped: PTE at {pte} is not present (exit 48"),
        ({"leaf": 0x35}, acc.PAGING_READ, READ, 0, "allowed: every EPT entry used permits a paging-read access"),
    ],
)
def test_sentences(setup: dict[str, int], kind: int, access: int, linear: int, sentence: str) -> None:
    """EPT with mode-based execute control and paging-write control; every upper entry has all rights unless given."""
    host = HostConfig(vmx_capabilities={"procbased_ctls3": 12})
    vm = VirtualMachine.create(VmConfig(host=host), [SlotSpec(0, 0, 1 << 20)])
    vm.access(AccessRequest(GPA))
    for level in (4, 3, 2):
        entry = vm.tables.ept_entry(level, GPA)
        vm.tables.set_ept_entry(level, GPA, entry.raw & ~0x407 | (setup.get("pde", 0x407) if level == 2 else 0x407))
    vm.tables.set_ept_entry(1, GPA, setup["leaf"] | GPA if setup["leaf"] else 0)
    controls = vm.vcpus.vmcs(0)["secondary_controls"] & ~ctl.SECONDARY_SPP
    vm.vcpus.set_vmcs(
        0,
        {
            "secondary_controls": controls | ctl.SECONDARY_MBEC,
            "primary_controls": ctl.PRIMARY_SECONDARY | ctl.PRIMARY_TERTIARY,
            "tertiary_controls": ctl.TERTIARY_PAGING_WRITE,
        },
    )
    told = vm.walk(GPA, access, kind=kind, linear=linear)
    places = {entry.structure.lower(): f"{entry.table + 8 * entry.index:#x}" for entry in told.ept}
    assert told.sentence.startswith(sentence.format(**places)), told.sentence


def test_a_combined_translation_has_the_vector_of_its_physical_one() -> None:
    """Remembered from a physical entry, it answers as that one would, also when the tables have changed."""
    vm = machine("model")
    vm.access(AccessRequest(None, gva=GVA, access=READ))
    vm.set_subpages([SubpageRange(GPA >> 12, 1, 0xFFFF_FFFE)])
    vm.access(AccessRequest(GPA + 0x80))
    assert vm.access(AccessRequest(GPA + 0x80)).allowed
    assert vm.access(AccessRequest(None, gva=GVA + 0x80)).allowed
    (combined,) = [entry for entry in vm.vcpus.tlb(0) if entry.kind == "combined" and entry.address == GVA]
    assert combined.spp_vector == 0x5555_5555_5555_5554
    vm.tables.set_sppt_entry(1, GPA, 0)
    stale = vm.access(AccessRequest(None, gva=GVA + 0x80))
    assert stale.allowed and stale.stale


def test_linear_addresses_of_32_bits_are_cut_and_wrap() -> None:
    """Without paging they are GPAs of 32 bits; the second page of this access is page 0."""
    vm = VirtualMachine.create(VmConfig(), [SlotSpec(0, 0, 1 << 20), SlotSpec(1, (4 << 30) - PAGE, PAGE)], spp=True)
    vm.vcpus.set_vmcs(0, {"cr0": 0x33})
    top = (4 << 30) - 4
    result = vm.access(AccessRequest(None, gva=7 << 32 | top, data=b"abcdefgh"))
    assert result.allowed and result.gpa == top
    assert vm.read_memory(top, 4) + vm.read_memory(0, 4) == b"abcdefgh"
    assert result.exits.column("size").tolist() == [4, 4]
    assert result.exits.column("gpa").tolist() == [top, 0]
