"""Accesses of every kind, and by linear address, through VirtualMachine."""

from __future__ import annotations

import numpy as np
import pytest

from engine.arch import access as acc
from engine.arch.access import READ, WRITE
from engine.config import VmConfig
from engine.errors import InvalidValue
from engine.kvm.slots import SlotSpec
from engine.machine import SubpageRange, VirtualMachine
from engine.trace.columns import TraceChunk
from engine.trace.session import ReplayOptions
from engine.trace.single import AccessRequest

PAGE = 0x1000
PML4, PDPT, PD, PT = 0x10000, 0x11000, 0x12000, 0x13000
GVA = 0x4000_5000
GPA = 0x20000


def machine(translation_cache: str = "off") -> VirtualMachine:
    vm = VirtualMachine.create(VmConfig(translation_cache=translation_cache), [SlotSpec(0, 0, 1 << 20)], spp=True)
    words = {PML4: PDPT | 3, PDPT + 8: PD | 3, PD: PT | 3, PT + 8 * 5: GPA | 3, PT + 8 * 6: GPA + 2 * PAGE | 3}
    for gpa, word in words.items():
        vm.write_memory(gpa, word.to_bytes(8, "little"))
    vm.vcpus.set_vmcs(0, {"cr3": PML4})
    return vm


def word(vm: VirtualMachine, gpa: int) -> int:
    return int.from_bytes(vm.read_memory(gpa, 8), "little")


def test_an_access_by_linear_address() -> None:
    vm = machine()
    written = vm.access(AccessRequest(None, gva=GVA + 0x10, data=b"12345678"))
    assert written.allowed and written.gpa == GPA + 0x10 and written.exception is None
    assert vm.read_memory(GPA + 0x10, 8) == b"12345678"
    assert set(written.exits.resolution_names()) == {"mapped"}
    assert word(vm, PT + 8 * 5) == GPA | 0x63
    assert word(vm, PML4) == PDPT | 0x23
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
    vm.write_memory(PT + 8 * 5, (1 << 30 | 3).to_bytes(8, "little"))
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
