"""Traces with flushes: what each operation removes, what is stale without it, and which one is said to have missed."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from engine.arch import hypercall as hv
from engine.errors import TraceError
from engine.kvm.slots import SlotSpec
from engine.machine import VirtualMachine
from engine.state.config import HostConfig, VcpuConfig, VmConfig
from engine.trace import translations
from engine.trace.columns import TraceChunk
from engine.trace.object_hits import targets_of
from engine.trace.operations import Operations
from engine.trace.session import Replay, ReplayOptions
from engine.trace.single import AccessRequest
from tests.engine.builders import chunk, exits, replay, set_map, unchanged
from tests.engine.hyperv.flush_traces import (
    BLOCK,
    GVA,
    NEW,
    OLD,
    OTHER_SPACE,
    Row,
    access,
    call,
    flush,
    invlpg,
    mov_cr3,
    replayed,
    sparse,
    stale,
)
from tests.engine.hyperv.guests import CR3, CR4, hyperv_guest

PAGE = 0x1000
PCIDE = 1 << 17
POLICIES = ("kvm", "tlfs")
HYPERV: dict[str, Any] = {}
# The vCPU that goes stale: KVM's number, and its VP index.
VCPU, VP = 1, 5
FIRST = [access(VCPU, OLD), access(0, OLD)]
THEN = [access(0, OLD, GVA + PAGE * 7), access(VCPU, NEW)]


@pytest.fixture(params=POLICIES)
def policy(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def vm(policy: str) -> VirtualMachine:
    return guest(policy)


def guest(policy: str, **more: Any) -> VirtualMachine:
    return hyperv_guest((0, VP, 65), flush_policy=policy, **more)


def around(*rows: Row) -> list[Row]:
    """vCPU 1 uses the old frame, then ``rows``, then the new one."""
    return [*FIRST, *rows, *THEN]


# ---- what removes a translation

FITS: dict[str, list[Row]] = {
    "list": [flush(VP)],
    "list over several pages": [flush(VP, pages=[GVA - 2 * PAGE | 2])],
    "space": [call(hv.SPACE, address_space=CR3, processor_mask=1 << VP)],
    "every space": [call(hv.SPACE, flags=hv.ALL_SPACES, processor_mask=1 << VP)],
    "everyone": [call(hv.SPACE, flags=hv.ALL_SPACES | hv.ALL_PROCESSORS)],
    "list, sparse": [call(hv.LIST_EX, address_space=CR3, vp_set=sparse(VP, 65), ranges=(GVA,))],
    "space, sparse": [call(hv.SPACE_EX, address_space=CR3, vp_set=sparse(VP))],
    "fast list": [flush(VP, fast=True)],
    "fast space, sparse": [call(hv.SPACE_EX, fast=True, address_space=CR3, vp_set=sparse(VP))],
    "its own call": [flush(VP, vcpu=VCPU)],
    "mov-cr3": [mov_cr3(VCPU, CR3)],
    "mov-cr3 by address space": [{"op": 2, "vcpu": VCPU, "address_space": CR3}],
    "invlpg": [invlpg(VCPU, GVA + 0xABC)],
    "invlpg by argument": [{"op": 3, "vcpu": VCPU, "arg": GVA.to_bytes(8, "little").hex()}],
    "the second of two": [flush(0), flush(VP)],
    "two pages, one call each": [flush(VP, pages=[GVA + PAGE]), flush(VP)],
}


@pytest.mark.parametrize("name", FITS)
def test_what_removes_it(vm: VirtualMachine, name: str) -> None:
    result = replayed(vm, around(*FITS[name]))
    assert stale(result) == [] and result.translations.stale == 0
    assert all(item.outcome == "completed" for item in result.translations.operation_records)
    assert sum(item.dropped for item in result.translations.operation_records) >= 1


# ---- what does not, and what is said of it

MISSING: dict[str, tuple[list[Row], str | None]] = {
    "nothing": ([], None),
    "the wrong processor": ([flush(0)], "not-targeted"),
    "vCPU number for VP index": ([flush(VCPU)], "not-targeted"),
    "the wrong set": ([call(hv.SPACE_EX, address_space=CR3, vp_set=sparse(0, 65))], "not-targeted"),
    "an absent processor": ([flush(63)], "not-targeted"),
    "another page": ([flush(VP, pages=[GVA + PAGE])], "other-page"),
    "another page elsewhere": ([flush(0, pages=[GVA + PAGE])], None),
    "refused": ([flush(VP, rep_count=0)], "refused"),
    "refused for reserved bits": ([flush(VP, rep_start=1)], "refused"),
    "invlpg elsewhere": ([invlpg(0, GVA)], "local"),
    "invlpg of another page": ([invlpg(VCPU, GVA + PAGE)], "other-page"),
    "invlpg of another page elsewhere": ([invlpg(0, GVA + PAGE)], None),
    "invlpg of no address": ([invlpg(VCPU, 1 << 63)], "other-page"),
    "mov-cr3 elsewhere": ([mov_cr3(0, CR3)], None),
    "mov-cr3 that faults": ([mov_cr3(VCPU, 1 << 60)], "not-executed"),
    "bit 63 without PCIDs": ([mov_cr3(VCPU, CR3 | 1 << 63)], "not-executed"),
    "the nearest of several": ([invlpg(0, GVA), flush(0), flush(VP, pages=[GVA + PAGE])], "not-targeted"),
}


@pytest.mark.parametrize("name", MISSING)
def test_what_does_not(vm: VirtualMachine, name: str) -> None:
    rows, why = MISSING[name]
    result = replayed(vm, around(*rows))
    index = len(rows) + 3
    assert [item[:2] for item in stale(result)] == [(index, why)]
    assert result.translations.stale == 1 and vm.counters()["stale_accesses"] == 1
    (found,) = result.translations.stale_records
    assert (found.vcpu, found.vp_index, found.gva, found.address_space) == (VCPU, VP, GVA, CR3)
    assert (found.gpa, found.cached_gpa, found.cached_at, found.changed_after) == (NEW, OLD, 0, 1)
    needed = f"VP {VP} needed a flush of {GVA:#x} after record 1 and before record {index}"
    assert found.explanation.startswith(needed)
    assert ("there was none" in found.explanation) == (why is None)
    if found.missed_by is not None:
        assert f"at record {found.missed_by.index} " in found.explanation


def test_the_flush_that_missed_is_named(vm: VirtualMachine) -> None:
    (found,) = replayed(vm, around(flush(0), flush(0, 63))).translations.stale_records
    assert found.missed_by == translations.Miss(3, "hypercall", "not-targeted", (0,), 0)
    assert found.explanation.endswith(
        "HvCallFlushVirtualAddressList at record 3 flushed VPs {0}; VP 5 was not in its processor set"
    )


def test_the_status_of_a_refused_call_is_told(vm: VirtualMachine) -> None:
    result = replayed(vm, around(flush(VP, rep_count=0)))
    (found,) = result.translations.stale_records
    assert found.missed_by is not None and found.missed_by.status == 3
    assert "was refused with status 0x3 (INVALID_HYPERCALL_INPUT)" in found.explanation
    (performed,) = result.translations.operation_records
    assert performed.result == 3 and performed.targeted == performed.flushed == ()


def test_processors_of_extended_sets_need_extended_calls() -> None:
    vm = guest("tlfs")
    (found,) = replayed(vm, [access(2, OLD), access(2, NEW)]).translations.stale_records
    assert found.vp_index == 65 and "HvCallFlushVirtualAddressSpaceEx" in found.explanation


# What the policies read differently: (rows, why under kvm, why under tlfs); "" is not stale.
DIFFERENT: dict[str, tuple[list[Row], str, str]] = {
    "another address space": ([flush(VP, space=OTHER_SPACE)], "", "other-space"),
    "empty mask": ([flush()], "", "refused"),
    "reserved flag": ([flush(VP, flags=1 << 5)], "", "refused"),
    "everyone, with a set": (
        [call(hv.SPACE_EX, flags=hv.ALL_PROCESSORS, address_space=CR3, vp_set=sparse(0))],
        "left",
        "",
    ),
    "a large range": (
        # Nine pages of 2 MiB from 16 MiB before it; as small ones they end 8 MiB before it.
        [flush(VP, flags=hv.EXTENDED_RANGES, pages=[(GVA & ~0x1FFFFF) - (16 << 20) | hv.RANGE_LARGE | 8])],
        "left",
        "",
    ),
    "list of 16": ([flush(VP, pages=[GVA + PAGE * (n + 1) for n in range(16)])], "", "other-page"),
}


@pytest.mark.parametrize("name", DIFFERENT)
def test_two_policies(policy: str, name: str) -> None:
    rows, kvm, tlfs = DIFFERENT[name]
    why = kvm if policy == "kvm" else tlfs
    assert [item[1] for item in stale(replayed(guest(policy), around(*rows)))] == ([why] if why else [])


def test_second_level_flushes_are_about_other_tables() -> None:
    """They succeed, and miss nothing that has a linear address under KVM's own root."""
    result = replayed(guest("tlfs"), around(call(hv.GUEST_PHYSICAL_SPACE, address_space=OTHER_SPACE)))
    assert result.translations.operation_records[0].result == 0
    assert stale(result) == [(4, None, None)]


def test_kvm_on_hyperv(policy: str) -> None:
    """The machine's guest is L2 then, and its calls are served as those over HTTP are."""
    vm = guest(policy, host=HostConfig(hyperv=HYPERV))
    assert stale(replayed(vm, around(flush(VP)))) == []
    assert stale(replayed(guest(policy, host=HostConfig(hyperv=HYPERV)), around(flush(0)))) == [(4, "not-targeted", 2)]


@pytest.mark.parametrize("execution", ["exact", "kvm", "paranoid"])
def test_executions(policy: str, execution: str) -> None:
    """What is required goes in each of them; what is not goes in one."""
    vm = guest(policy, flush_execution=execution)
    assert stale(replayed(vm, around(flush(VP)))) == []
    missed = stale(replayed(guest(policy, flush_execution=execution), around(flush(0))))
    assert missed == ([] if execution == "paranoid" else [(4, "not-targeted", 2)])


def test_a_lock_suspends_the_flush(vm: VirtualMachine) -> None:
    vm.hyperv.set_tlb_lock(VCPU, True)
    result = replayed(vm, around(flush(VP)))
    assert stale(result) == [(4, "not-executed", 2)]
    (performed,) = result.translations.operation_records
    assert performed.outcome == "suspended" and performed.result is None


def test_without_an_identity_there_is_no_call(vm: VirtualMachine, policy: str) -> None:
    vm.nested.write_msrs(0, [(0x40000000, 0)])
    result = replayed(vm, around(flush(VP)))
    assert stale(result) == [(4, "not-executed", 2)]
    outcome = {"kvm": "native", "tlfs": "exception"}[policy]
    assert result.translations.operation_records[0].outcome == outcome


def test_a_halted_processor_flushes_before_it_runs() -> None:
    vm = guest("kvm")
    vm.hyperv.set_activity(VCPU, "halted")
    result = replayed(vm, around(flush(VP)))
    (performed,) = result.translations.operation_records
    assert performed.targeted == (VP,) and performed.flushed == () and performed.left == 1
    assert stale(result) == [] and vm.hyperv.flush_queue(VCPU).own == ()


def test_the_block_may_be_in_memory_already(vm: VirtualMachine) -> None:
    row = flush(VP)
    vm.write_memory(BLOCK, bytes.fromhex(row["arg"])[24:])
    assert stale(replayed(vm, around({**row, "arg": row["arg"][:48]}))) == []


# ---- address spaces


def test_address_spaces_are_told_apart(vm: VirtualMachine) -> None:
    def by(space: int, gpa: int) -> Row:
        return access(VCPU, gpa, address_space=space)

    rows = [by(CR3, OLD), by(OTHER_SPACE, NEW), by(CR3, OLD), by(OTHER_SPACE, NEW)]
    assert stale(replayed(vm, rows)) == []
    assert vm.vcpus.vmcs(VCPU)["cr3"] == OTHER_SPACE
    spaces = [item.address_space for item in vm.vcpus.tlb(VCPU) if item.kind == "combined"]
    assert sorted(spaces) == [CR3, OTHER_SPACE]
    found = replayed(vm, [by(CR3, NEW), by(OTHER_SPACE, OLD)])
    assert [item.address_space for item in found.translations.stale_records] == [CR3, OTHER_SPACE]
    assert [item.cached_at for item in found.translations.stale_records] == [None, None]
    assert "since the translation was made" in found.translations.stale_records[0].explanation


def test_a_flush_of_one_space_leaves_the_other() -> None:
    vm = guest("tlfs")
    rows = [access(VCPU, OLD, address_space=CR3), access(VCPU, OLD, address_space=OTHER_SPACE), flush(VP)]
    rows += [access(VCPU, NEW, address_space=CR3), access(VCPU, NEW, address_space=OTHER_SPACE)]
    assert stale(replayed(vm, rows)) == [(4, "other-space", 2)]


def test_low_bits_of_cr3_are_no_page_tables(vm: VirtualMachine) -> None:
    rows = [access(VCPU, OLD, address_space=CR3 | 0x18), access(VCPU, NEW, address_space=CR3)]
    assert stale(replayed(vm, rows)) == [(1, None, None)]


def test_pcids(vm: VirtualMachine) -> None:
    """With them a load of CR3 removes those of its own, and bit 63 keeps even these."""
    vm.vcpus.set_vmcs(VCPU, {"cr4": CR4 | PCIDE})
    one, two = CR3 | 1, OTHER_SPACE | 2
    rows = [access(VCPU, OLD, address_space=one), mov_cr3(VCPU, two), mov_cr3(VCPU, one | 1 << 63), access(VCPU, NEW)]
    result = replayed(vm, rows)
    assert stale(result) == [(3, "kept", 2)]
    assert vm.vcpus.vmcs(VCPU)["cr3"] == one
    assert [item.dropped for item in result.translations.operation_records] == [0, 0]
    assert stale(replayed(vm, [mov_cr3(VCPU, two), access(VCPU, NEW, address_space=one)])) == [(1, "other-space", 0)]
    assert stale(replayed(vm, [mov_cr3(VCPU, one), access(VCPU, NEW)])) == []


def test_without_pcids_a_load_of_cr3_removes_every_space(vm: VirtualMachine) -> None:
    rows = [access(VCPU, OLD, address_space=CR3), mov_cr3(VCPU, OTHER_SPACE), access(VCPU, NEW, address_space=CR3)]
    assert stale(replayed(vm, rows)) == []


def test_an_operation_runs_under_its_address_space(vm: VirtualMachine) -> None:
    vm.vcpus.set_vmcs(VCPU, {"cr4": CR4 | PCIDE})
    rows = [access(VCPU, OLD, address_space=CR3 | 1), {**invlpg(VCPU, GVA), "address_space": CR3 | 2}]
    assert stale(replayed(vm, [*rows, access(VCPU, NEW, address_space=CR3 | 1)])) == [(2, "other-space", 1)]
    rows[1]["address_space"] = CR3 | 1
    assert stale(replayed(vm, [rows[1], access(VCPU, NEW, address_space=CR3 | 1)])) == []


# ---- what a stale access does


def test_it_takes_place_where_the_translation_leads(vm: VirtualMachine) -> None:
    """The write lands in the page that is no longer its own, and is judged there."""
    vm.enable_spp()
    set_map(vm, OLD >> 12, 0xFFFF_FFFE)
    rows = [access(VCPU, OLD + 0x80, GVA + 0x80), access(VCPU, NEW, GVA), access(VCPU, NEW, GVA)]
    result = replayed(vm, rows)
    assert exits(result, "index", "gpa", "denied") == [(1, OLD, 1)]
    # The violation removed the translation, as it does in a processor.
    assert stale(result) == [(1, None, None)] and result.violations == 1 and result.records == 3


def test_stop_and_start(vm: VirtualMachine) -> None:
    vm.enable_spp()
    set_map(vm, OLD >> 12, 0xFFFF_FFFE)
    rows = [
        access(VCPU, OLD + 0x80, GVA + 0x80, pc=7),
        {**flush(0), "pc": 0},
        access(VCPU, NEW, GVA, pc=8),
        access(VCPU, NEW, GVA, pc=9),
    ]
    result = replayed(vm, rows, on_violation="stop", carry=("pc",))
    assert result.stopped_at == 2 and result.records == 1 and stale(result) == [(2, "not-targeted", 1)]
    assert result.exit_columns.carry["pc"].tolist() == [8]
    result = replayed(vm, rows, on_violation="stop", start=result.stopped_at, carry=("pc",))
    assert result.stopped_at is None and result.records == 2 and stale(result) == []


def test_records_before_the_start_are_skipped_with_their_operations(vm: VirtualMachine) -> None:
    result = replayed(vm, around(flush(VP)), start=3)
    assert result.translations.operations == {"hypercall": 0, "mov-cr3": 0, "invlpg": 0}
    assert result.records == 2 and vm.hyperv.flush_queue(0).hypercalls == 0
    result = replayed(vm, around(flush(VP)), start=2)
    assert [item.index for item in result.translations.operation_records] == [2] and result.records == 2


@pytest.mark.parametrize("split", [1, 2, 3])
def test_chunks_do_not_matter(policy: str, split: int) -> None:
    rows = [*around(flush(0)), *around(flush(VP)), mov_cr3(0, CR3), access(2, OLD), access(2, NEW)]
    whole, parts = replayed(guest(policy), rows), replayed(guest(policy), rows, split=split)
    assert whole.translations == parts.translations and whole.translations.stale == 2
    assert whole.records == parts.records == 10


def test_every_use_counts_until_it_is_removed(vm: VirtualMachine) -> None:
    rows = [access(VCPU, OLD), *[access(VCPU, NEW)] * 5, flush(VP), access(VCPU, NEW)]
    assert [item[0] for item in stale(replayed(vm, rows))] == [1, 2, 3, 4, 5]


def test_a_page_that_comes_back_is_not_stale(vm: VirtualMachine) -> None:
    rows = [access(VCPU, OLD), access(0, NEW), access(VCPU, OLD), access(0, OLD)]
    found = replayed(vm, rows).translations.stale_records
    assert [(item.index, item.vcpu, item.changed_after) for item in found] == [(3, 0, 1)]


def test_what_changed_when_is_known_from_every_processor(vm: VirtualMachine) -> None:
    """The flush at record 1 came before the page was given away: it is not the one to blame."""
    rows = [access(VCPU, OLD), flush(0), access(0, OLD), access(0, OLD), access(VCPU, NEW)]
    assert stale(replayed(vm, rows)) == [(4, None, None)]


# ---- accesses


def test_an_access_over_two_pages(vm: VirtualMachine) -> None:
    """Pages side by side move together; of others each is told, and the access runs where it was recorded."""
    pair = [access(VCPU, OLD + 0xFFC, GVA + 0xFFC, size=8), access(VCPU, 0x20FFC, GVA + 0xFFC, size=8)]
    found = replayed(vm, pair).translations
    assert found.stale == 1 and [(item.gpa, item.cached_gpa) for item in found.stale_records] == [
        (0x20FFC, OLD + 0xFFC),
        (0x21000, OLD + 0x1000),
    ]
    found = replayed(vm, [flush(VP), access(VCPU, 0x30FFC, GVA + 0xFFC, size=8)]).translations
    assert [(item.gva, item.cached_gpa) for item in found.stale_records] == [(GVA + 0x1000, OLD + 0x1000)]
    assert {item.gpa for item in vm.vcpus.tlb(VCPU) if item.kind == "physical"} >= {0x30000, 0x31000}


@pytest.mark.parametrize("row", [{"source": 1}, {"source": 2}, {"kind": 2, "access": 0}, {"kind": 3}])
def test_what_is_not_by_a_linear_address(vm: VirtualMachine, row: Row) -> None:
    result = replayed(vm, [access(VCPU, OLD), access(VCPU, NEW, **row)])
    assert stale(result) == []
    assert [item.gpa for item in vm.vcpus.tlb(VCPU) if item.kind == "combined"] == [OLD]


def test_without_linear_addresses_nothing_is_stale(vm: VirtualMachine) -> None:
    rows = [{"gpa": OLD, "vcpu": VCPU}, invlpg(0, GVA), {"gpa": NEW, "vcpu": VCPU, "address_space": CR3}]
    assert stale(replayed(vm, rows)) == []


def test_accesses_without_memory_are_not_remembered(vm: VirtualMachine) -> None:
    rows = [access(VCPU, 0xFEE00000), access(VCPU, OLD), access(VCPU, OLD)]
    result = replayed(vm, rows)
    assert result.mmio == 1 and stale(result) == []


def test_reads_and_fetches_are_remembered_too(vm: VirtualMachine) -> None:
    rows = [access(VCPU, OLD, access=0), access(VCPU, NEW), flush(VP), access(VCPU, NEW, access=2), access(VCPU, OLD)]
    assert [item[0] for item in stale(replayed(vm, rows))] == [1, 4]


def test_a_translation_serves_later_accesses(vm: VirtualMachine) -> None:
    """Those by gva, which the one cache serves as well: a trace has made it stale."""
    replayed(vm, [access(VCPU, NEW)])
    found = vm.access(AccessRequest(gpa=None, gva=GVA, vcpu=VCPU))
    assert (found.gpa, found.stale) == (NEW, True)  # the page tables say OLD


def test_the_cache_serves_the_trace(vm: VirtualMachine) -> None:
    vm.access(AccessRequest(gpa=None, gva=GVA, vcpu=VCPU))
    (found,) = replayed(vm, [access(VCPU, NEW)]).translations.stale_records
    assert (found.cached_gpa, found.cached_at, found.changed_after) == (OLD, None, None)


def test_a_user_sees_its_own_pages(vm: VirtualMachine) -> None:
    vm.vcpus.set_vmcs(VCPU, {"cpl": 3})
    replayed(vm, [access(VCPU, OLD)])
    assert vm.access(AccessRequest(gpa=None, gva=GVA, vcpu=VCPU)).allowed


def test_hosts_without_ept(policy: str) -> None:
    vm = guest(policy, host=HostConfig(ept=False))
    rows = [access(VCPU, OLD), flush(0), access(VCPU, NEW), flush(VP), access(VCPU, NEW), access(0, 0xFEE00000)]
    result = replayed(vm, rows)
    assert stale(result) == [(2, "not-targeted", 1)] and result.mmio == 1
    assert [(item.kind, item.gpa) for item in vm.vcpus.tlb(VCPU)] == [("linear", NEW)]
    assert vm.vcpus.tlb(0) == []


def test_nested_guests_have_translations_of_their_own(vm: VirtualMachine) -> None:
    """The tags of the vCPU are those of its accesses: what L1 cached does not serve L2."""
    replayed(vm, [access(VCPU, OLD)])
    vm.vcpus.set_vmcs(VCPU, {"vpid": 77})
    assert stale(replayed(vm, [access(VCPU, NEW)])) == []
    vm.vcpus.set_vmcs(VCPU, {"vpid": 2})
    assert stale(replayed(vm, [access(VCPU, NEW)])) == [(0, None, None)]


def test_a_load_of_cr3_may_exit() -> None:
    """With PAE paging it reads guest memory: KVM maps it, or there is none."""
    vm = guest("tlfs")
    vm.vcpus.set_vmcs(VCPU, {"efer": 0, "cr4": 1 << 5})
    result = replayed(vm, [mov_cr3(VCPU, 0x700000), mov_cr3(VCPU, 0xF0000000)])
    assert [item.outcome for item in result.translations.operation_records] == ["completed", "exit"]
    assert vm.vcpus.vmcs(VCPU)["cr3"] == 0x700000 and result.exits["ept_violation"] == 2


# ---- refusals

BAD: dict[str, tuple[Row, str, Any, str]] = {
    "another place of the page": (access(VCPU, NEW + 8), "gva", GVA, "bits 11:0"),
    "an address space that CR3 cannot hold": (
        access(VCPU, NEW, address_space=1 << 60),
        "address_space",
        1 << 60,
        "CR3",
    ),
    "the same of an invlpg": ({**invlpg(0, GVA), "address_space": 1 << 60}, "address_space", 1 << 60, "CR3"),
    "an unknown vCPU": (invlpg(7, GVA), "vcpu", 7, "the id of a vCPU of this machine"),
    "a vCPU beyond all": (invlpg(65535, GVA), "vcpu", 65535, "the id of a vCPU of this machine"),
    "a block without memory": (
        {"op": 1, "arg": (b"".join(w.to_bytes(8, "little") for w in (2, 1 << 40, 0)) + bytes(24)).hex()},
        "arg",
        hex(1 << 40),
        "guest memory",
    ),
    "an access of nothing": (access(VCPU, NEW, size=0), "size", 0, "at least one byte"),
}


@pytest.mark.parametrize("name", BAD)
def test_refused(vm: VirtualMachine, name: str) -> None:
    row, field, value, rule = BAD[name]
    before = vm.vcpus.tlb(VCPU)
    with unchanged(vm), pytest.raises(TraceError, match=rule) as caught:
        replayed(vm, [*around(flush(VP)), mov_cr3(VCPU, OTHER_SPACE), row])
    assert (caught.value.index, caught.value.field, caught.value.value) == (6, field, value)
    assert vm.vcpus.tlb(VCPU) == before


@pytest.mark.parametrize(
    ("row", "field"), [(mov_cr3(0, OTHER_SPACE), "op"), (access(0, OLD, address_space=0), "address_space")]
)
def test_there_is_a_cache(row: Row, field: str) -> None:
    vm = VirtualMachine.create(VmConfig(), [SlotSpec(0, 0, 1 << 24)])
    with unchanged(vm), pytest.raises(TraceError, match="translation_cache model") as caught:
        replayed(vm, [row])
    assert (caught.value.index, caught.value.field) == (0, field)


@pytest.mark.parametrize("on_violation", ["skip", "ask"])
def test_a_column_of_nothing_but_accesses_needs_no_cache(on_violation: str) -> None:
    vm = VirtualMachine.create(VmConfig(), [SlotSpec(0, 0, 1 << 24)])
    assert replayed(vm, [access(0, OLD), access(0, OLD)], on_violation=on_violation).records == 2


# ---- sizes


def test_lists_are_bounded_and_totals_exact(vm: VirtualMachine, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("engine.trace.timed", "engine.machine.trace_operations"):
        monkeypatch.setattr(f"{module}.MOST_LISTED", 3)
    monkeypatch.setattr("engine.trace.timed.FOUND_ROWS", 20)
    rows = [access(VCPU, OLD), *[access(VCPU, NEW), invlpg(0, GVA)] * 5]
    found = replayed(vm, rows).translations
    assert found.stale == 5 and [item.index for item in found.stale_records] == [1, 3, 5] and found.stale_dropped == 2
    assert [item.index for item in found.operation_records] == [2, 4, 6] and found.operations_dropped == 2
    assert found.operations == {"hypercall": 0, "mov-cr3": 0, "invlpg": 5}
    found = replayed(vm, [access(VCPU, NEW)] * 5).translations
    assert found.stale == 5 and [item.index for item in found.stale_records] == [0, 1, 2] and found.stale_dropped == 2


def test_what_is_noted_is_taken_when_there_is_no_more_room(vm: VirtualMachine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine.trace.timed.FOUND_ROWS", 20)
    rows = [access(VCPU, OLD), *[access(VCPU, NEW)] * 12]
    assert [item[0] for item in stale(replayed(vm, rows))] == list(range(1, 13))


def test_only_the_last_operations_are_looked_through(vm: VirtualMachine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine.machine.trace_operations.MOST_SEARCHED", 2)
    assert stale(replayed(vm, around(flush(0), invlpg(0, GVA), invlpg(0, GVA + PAGE)))) == [(6, "local", 3)]


def test_frames_run_out_and_come_back() -> None:
    """A trace that needs more frames than there are is entered again where it was: each page needs its own table."""
    vm = guest("kvm")
    vm.set_slot(SlotSpec(1, 1 << 30, 2 << 30))
    far = [(1 << 30) + (n << 21) for n in range(1000)]
    rows = [access(n & 1, gpa, gpa, address_space=CR3 | (n & 2) << 2) for n, gpa in enumerate(far)]
    result = replayed(vm, rows)
    assert result.records == 1000 and result.mmio == 0 and stale(result) == []
    assert vm.counters()["frames_ept"] > 1000


def test_a_full_log_is_taken_and_gone_on_with(vm: VirtualMachine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine.trace.session.LOG_ROWS", 160)
    rows = [access(VCPU, n << 12, n << 12) for n in range(1, 120)]
    result = replayed(vm, [*rows, access(VCPU, OLD, 1 << 12)], include="all")
    assert len(result.exit_columns) == 119 and stale(result) == [(119, None, None)]


def test_traces_without_operations_are_as_before(vm: VirtualMachine) -> None:
    """A gva alone is told in exit records, and translates nothing."""
    result = replay(vm, chunk([(OLD, 8, 1, VCPU), (NEW, 8, 1, VCPU)], gva=[GVA, GVA]))
    assert (
        result.translations == translations.Translations(operations={"hypercall": 0, "mov-cr3": 0, "invlpg": 0})
        and stale(result) == []
    )
    assert [item.kind for item in vm.vcpus.tlb(VCPU)] == ["physical", "physical"]


def test_the_machine_comes_back_from_its_durable_form(vm: VirtualMachine) -> None:
    replayed(vm, around(flush(0), mov_cr3(VCPU, OTHER_SPACE)))
    head = json.loads(json.dumps(vm.head()))
    blocks = {(array, block): data for array, block, data in vm.changed_blocks()}
    back = VirtualMachine.restore(head, blocks)
    assert back.vcpus.vmcs(VCPU)["cr3"] == OTHER_SPACE and back.vcpus.tlb(VCPU) == []
    assert back.hyperv.flush_queue(0).hypercalls == 1


def test_other_replays_refuse_operations(vm: VirtualMachine) -> None:
    """They would be passed over there."""
    operations = Operations(np.zeros(0, dtype=np.int64), (), np.zeros(1, dtype=np.uint64))
    beside = replace(chunk([OLD]), operations=operations)
    with vm.state.change() as draft, pytest.raises(TraceError, match="takes no operations") as caught:
        Replay(draft, ReplayOptions(), targets_of(())).feed(beside)
    assert (caught.value.index, caught.value.field) == (0, "op")


def test_vcpus_that_are_numbered_with_gaps() -> None:
    config = VmConfig(vcpus=(VcpuConfig(0), VcpuConfig(9)), translation_cache="model")
    vm = VirtualMachine.create(config, [SlotSpec(0, 0, 1 << 24)])
    result = replayed(vm, [access(9, OLD), invlpg(0, GVA), access(9, NEW)])
    assert stale(result) == [(2, "local", 1)]
    with vm.replay(ReplayOptions()) as run:
        assert run.feed(_empty()) and run.finish().records == 0


def _empty() -> Any:
    none = np.zeros(0, dtype=np.uint64)
    return TraceChunk(np.zeros((0, 2), dtype=np.uint64), None, {}, False, Operations(none.astype(np.int64), (), none))
