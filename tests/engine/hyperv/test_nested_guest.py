"""KVM as the L0 of a guest's own guests: what L1 sees of their flush hypercalls."""

from __future__ import annotations

from typing import Any

import pytest

from engine.machine import VirtualMachine
from engine.trace.single import AccessRequest
from tests.engine.builders import load_word, round_trip, store_word
from tests.engine.hyperv.nested_guests import (
    CLEAN_AT,
    CONTROL_AT,
    EPT12,
    IDS,
    L1_INPUT,
    L1_RIP,
    L2_INPUT,
    L2_RIP,
    PAGE_AT,
    PARTITION,
    VP_AT,
    assist,
    enter,
    evmcs,
    exit_field,
    nested_machine,
)
from tests.engine.hyperv.selftest_stages import xmm

from .flush_machine import words
from .guests import call

N01: dict[str, Any] = {"rcx": 0x10002, "r8": 3}
N02: dict[str, Any] = {"rcx": 0x10002, "r8": 2, **xmm(4)}


def in_l2(vm: VirtualMachine, vcpu: int = 0) -> bool:
    return vm.nested.vcpu(vcpu).vmx.guest_mode


@pytest.mark.parametrize("profile", ["kvm-2019", "kvm-latest"])
def test_served_without_an_exit(profile: str) -> None:
    vm = nested_machine(profile)
    for registers, flushed in (
        (N01, (0, 1, 2)),
        (N02, (1,)),
        ({"rcx": 0x30013, "r8": 2, **xmm(0, 2, 2)}, (2,)),
        ({"rcx": 0x100010003, "r8": 2, **xmm(6, 0x7F0000001000)}, (0, 1)),
        ({"rcx": 0x10002, "r8": 2}, (0, 1, 2)),
    ):
        rip = vm.nested.vcpu(0).registers["rip"]
        report = call(vm, **registers)
        outcome = report.outcome
        assert (outcome.l0, outcome.served_by, outcome.level, outcome.row) == ("kvm", 0, 2, "D10")
        assert (outcome.flushed, outcome.exit) == (flushed, None)
        assert in_l2(vm) and vm.nested.vcpu(0).registers["rip"] == rip + 3 == report.rip_after


def test_a_block_is_read_through_the_tables_of_l1() -> None:
    vm = nested_machine()
    outcome = call(vm, 0, words(0, 2, 2), rcx=2, rdx=L2_INPUT).outcome
    assert (outcome.result, outcome.flushed) == (0, (0,)) and load_word(vm, L1_INPUT + 8) == 2
    outcome = call(vm, rcx=2, rdx=0x6000).outcome
    assert (outcome.result, outcome.row, outcome.exit) == (3, "D8", None) and in_l2(vm)


@pytest.mark.parametrize(("change", "row"), [("control", "D3"), ("cpuid", "D1"), ("code", "D5")])
def test_reflected(change: str, row: str) -> None:
    vm = nested_machine()
    registers = dict(N01)
    if change == "control":
        store_word(vm, evmcs(0) + CONTROL_AT, 0, 4)  # L0 looks at the live page
    elif change == "cpuid":
        with vm.nested.change(0) as (vcpu, _):
            vcpu.cpuid = tuple(e if e.function != 0x4000000A else type(e)(e.function, eax=0x80101) for e in vcpu.cpuid)
    else:
        registers["rcx"] = 0x10008
    outcome = call(vm, **registers).outcome
    assert (outcome.outcome, outcome.row, outcome.served_by) == ("reflected", row, None)
    assert not in_l2(vm) and vm.nested.vcpu(0).registers["rip"] == L1_RIP
    assert exit_field(vm, 0, "vm_exit_reason") == 18
    assert exit_field(vm, 0, "vm_exit_instruction_len") == 3
    assert exit_field(vm, 0, "guest_rip") == L2_RIP
    assert load_word(vm, evmcs(0) + 0x2B4, 4) == 18 and load_word(vm, evmcs(0) + 0x2C8, 4) == 3


def test_direct_hypercall_is_looked_at_when_l2_is_entered() -> None:
    vm = nested_machine()
    store_word(vm, assist(0) + 32, 0)  # N13: while L2 runs
    assert call(vm, **N01).outcome.row == "D10"
    assert call(vm, rcx=0x10008).outcome.row == "D5"
    enter(vm, 0, launch=False)
    assert call(vm, **N01).outcome.row == "D4"


def test_a_lock_count_gives_an_exit_after_the_flush() -> None:
    vm = nested_machine()
    store_word(vm, PARTITION, 1, 4)
    outcome = call(vm, **N01).outcome
    assert (outcome.row, outcome.result, outcome.flushed) == ("D11", 0, (0, 1, 2))
    assert not in_l2(vm)
    assert exit_field(vm, 0, "vm_exit_reason") == 0x10000031
    assert exit_field(vm, 0, "exit_qualification") == exit_field(vm, 0, "vm_exit_intr_info") == 0
    assert exit_field(vm, 0, "guest_rip") == L2_RIP + 3
    assert load_word(vm, evmcs(0) + 0x2B4, 4) == 0x10000031 and load_word(vm, evmcs(0) + 0x330) == L2_RIP + 3
    enter(vm, 0, launch=False)
    assert vm.nested.vcpu(0).registers["rip"] == L2_RIP + 3


def test_a_partition_page_that_is_not_memory() -> None:
    vm = nested_machine()
    call(vm, rcx=8)
    store_word(vm, evmcs(0) + PAGE_AT, 0xFFFFFFFFFF000)
    store_word(vm, evmcs(0) + CLEAN_AT, 0, 4)
    enter(vm, 0, launch=False)
    outcome = call(vm, **N01).outcome
    assert (outcome.row, outcome.result, outcome.flushed, outcome.exit) == ("D9", 3, (0, 1, 2), None)


def test_a_clean_bit_keeps_the_old_id() -> None:
    for clean, found in ((0x8000, (1,)), (0, ())):
        vm = nested_machine()
        call(vm, 1, rcx=8)  # back to L1 on VP 1
        store_word(vm, evmcs(1) + CLEAN_AT, clean, 4)
        store_word(vm, evmcs(1) + VP_AT, 3, 4)
        enter(vm, 1, launch=False)
        assert call(vm, **N02).outcome.flushed == found  # N19
        assert vm.hyperv.partitions()[1].vp_id == (2 if clean else 3)


def test_a_released_enlightened_vmcs_forgets_its_guest() -> None:
    vm = nested_machine()
    call(vm, 1, rcx=8)
    assert vm.nested.execute(1, "vmclear", evmcs(1)).result == "succeed"
    assert (vm.hyperv.partitions()[1].vm_id, vm.hyperv.partitions()[1].vp_id) == (0, 0)
    call(vm, 2, rcx=8)
    assert vm.nested.execute(2, "vmxoff").result == "succeed"
    assert vm.hyperv.partitions()[2].vm_id == 0


def test_ids_survive_the_durable_form() -> None:
    vm = round_trip(nested_machine())
    assert [(p.vm_id, p.vp_id, p.running) for p in vm.hyperv.partitions()] == [(*ids, True) for ids in IDS]
    assert call(vm, **N01).outcome.row == "D10"


def test_each_mode_flushes_its_own_translations() -> None:
    vm = nested_machine()
    vm.hyperv.set_activity(1, "halted")
    assert call(vm, **N02).outcome.flushed == ()
    assert len(vm.hyperv.flush_queue(1).nested) == 1 and vm.hyperv.flush_queue(1).own == ()
    call(vm, 1, rcx=8)  # it runs, and flushes before that
    assert vm.hyperv.flush_queue(1).nested == ()
    call(vm, **N02)  # now it is in L1: what is for L2 waits
    assert len(vm.hyperv.flush_queue(1).nested) == 1
    vm.hyperv.service(1)
    assert len(vm.hyperv.flush_queue(1).nested) == 1
    enter(vm, 1, launch=False)
    vm.hyperv.service(1)
    assert vm.hyperv.flush_queue(1).nested == () and vm.hyperv.flush_queue(1).flushes == 2


def test_l1_flushes_what_was_derived_from_its_tables() -> None:
    vm = nested_machine(flush_policy="tlfs")
    for vcpu in (0, 1):
        vm.vcpus.set_vmcs(vcpu, {"cr0": 0x80000011, "cr3": 0})
        vm.access(AccessRequest(0x5000, access=0, vcpu=vcpu))
    assert all({entry.kind for entry in vm.vcpus.tlb(vcpu)} == {"physical"} for vcpu in (0, 1))
    call(vm, 3, rcx=8)
    assert call(vm, 3, words(EPT12 + 0x1000, 0), rcx=0xAF).outcome.result == 0
    assert len(vm.vcpus.tlb(0)) == 1
    report = call(vm, 3, words(EPT12 | 0x1E, 0, 0x5000), rcx=0x1000000B0)
    assert [effect.vcpu for effect in report.vps if effect.dropped] == [0, 1]
    assert vm.vcpus.tlb(0) == vm.vcpus.tlb(1) == []


def test_translations_carry_the_ids_of_their_guest() -> None:
    vm = nested_machine()
    before = vm.vcpus.vmcs(0)["vpid"]
    call(vm, rcx=8)
    assert vm.vcpus.vmcs(0)["vpid"] == before ^ 0x8000
    assert [hex(p.vp_id) for p in vm.hyperv.partitions()] == ["0x1", "0x2", "0x41", "0x1"]
