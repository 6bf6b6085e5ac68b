"""Hypercalls on a whole machine: translations that accesses left are found stale, flushed, and fresh again."""

from __future__ import annotations

from typing import Any

import pytest

from engine.cpu import frames
from engine.errors import InvalidValue, NotFound, Unsupported
from engine.hyperv.caller import Caller
from engine.machine import VirtualMachine
from engine.machine.hypercalls import HypercallRequest
from engine.state.config import HostConfig
from tests.engine.builders import assert_sound, round_trip
from tests.engine.hyperv.flush_machine import words
from tests.engine.hyperv.guests import CPUID, P1, P2, call, hyperv_guest, point, read
from tests.engine.hyperv.selftest_stages import STAGES, W1, W2, xmm

POLICIES = ({}, {"flush_policy": "tlfs"}, {"flush_execution": "paranoid"})


def combined(vm: VirtualMachine, vcpu: int) -> int:
    """Translations of linear addresses that a vCPU's cache holds."""
    return sum(entry.kind == "combined" for entry in vm.vcpus.tlb(vcpu))


@pytest.mark.parametrize("policy", POLICIES, ids=["kvm", "tlfs", "paranoid"])
def test_workers_see_the_new_page(policy: dict[str, str]) -> None:
    vm = hyperv_guest(**policy)
    page, other = P1, P2
    for registers, block, seeing in STAGES:
        old = 1 if page == P1 else 2
        assert [read(vm, w) for w in (W1, W2)] == [old, old]
        page, other = other, page
        point(vm, page)
        assert [read(vm, w) for w in (W1, W2)] == [old, old], "a worker's translation is cached"
        report = call(vm, 0, block, **registers)
        assert report.outcome.result is not None and report.outcome.result & 0xFFFF == 0
        assert report.rip_after == report.rip_before + 3
        for worker in seeing:
            assert read(vm, worker) == 3 - old
        for worker in (W1, W2):
            call(vm, 0, words(0, 3, 0), rcx=2)
            assert read(vm, worker) == 3 - old


def test_a_flush_of_all_reaches_more_vps_than_frames_are_spare() -> None:
    """Each VP that a flush is queued for takes a frame of its own for the change."""
    vps = range(frames.RESERVE + 60)
    vm = hyperv_guest(tuple(vps), profile="kvm-latest", host=HostConfig(nested=False))
    halted = range(1, len(vps), 2)
    for vcpu in halted:
        read(vm, vcpu)
        vm.hyperv.set_activity(vcpu, "halted")
    report = call(vm, 0, words(0, 3, 0), rcx=2)
    assert len(report.outcome.targeted) == len(vps)
    assert [vcpu for vcpu in vps if vm.hyperv.flush_queue(vcpu).own] == list(halted)
    vm.hyperv.set_activity(vps[-1], "running")
    assert not vm.hyperv.flush_queue(vps[-1]).own
    assert_sound(vm)


def test_a_flush_of_another_vp_leaves_the_stale_page() -> None:
    vm = hyperv_guest(flush_policy="tlfs")
    assert (read(vm, W1), read(vm, W2)) == (1, 1)
    point(vm, P2)
    report = call(vm, 0, words(0, 2, 4), rcx=2)
    assert (report.outcome.targeted, report.outcome.flushed) == ((2,), (2,))
    assert (read(vm, W1), read(vm, W2)) == (2, 1)


def test_a_halted_vp_flushes_before_it_runs_again() -> None:
    vm = hyperv_guest()
    assert read(vm, W1) == 1
    vm.hyperv.set_activity(W1, "halted")
    point(vm, P2)
    report = call(vm, 0, words(0, 2, 4), rcx=2)
    assert (report.outcome.targeted, report.outcome.flushed) == ((2,), ())
    assert combined(vm, W1) == 1
    assert len(vm.hyperv.flush_queue(W1).own) == 1
    assert read(vm, W1) == 2
    assert vm.hyperv.flush_queue(W1).own == () and vm.hyperv.flush_queue(W1).flushes == 1


def test_a_vp_that_wakes_does_what_was_queued() -> None:
    vm = hyperv_guest()
    vm.hyperv.set_activity(W1, "halted")
    call(vm, 0, words(0, 2, 4), rcx=2)
    assert vm.hyperv.activity(W1) == "halted"
    vm.hyperv.set_activity(W1, "running")
    assert vm.hyperv.flush_queue(W1).own == ()
    with pytest.raises(InvalidValue):
        vm.hyperv.set_activity(W1, "asleep")


def test_queues_are_volatile_and_statistics_are_not() -> None:
    vm = hyperv_guest()
    call(vm, 0, words(0, 2, 4), rcx=2)
    vm.hyperv.set_activity(W1, "halted")
    call(vm, 0, words(0, 2, 4), rcx=2)
    again = round_trip(vm)
    before, after = vm.hyperv.flush_queue(W1), again.hyperv.flush_queue(W1)
    assert before.own and not after.own and after.flushes == before.flushes == 1
    assert again.hyperv.flush_queue(0).hypercalls == 2
    assert again.hyperv.activity(W1) == "halted"


def test_a_tlb_lock_suspends_the_caller_until_it_is_released() -> None:
    vm = hyperv_guest()
    assert read(vm, W1) == 1
    vm.hyperv.set_tlb_lock(W1, True)
    report = call(vm, 0, words(0, 2, 4), rcx=2)
    assert (report.outcome.outcome, report.outcome.waits_for) == ("suspended", (W1,))
    assert report.rip_after == report.rip_before and combined(vm, W1) == 1
    assert call(vm, 0, words(0, 2, 0, 2, 2), rcx=0x20013).outcome.result == 0
    assert call(vm, W1, words(0, 2, 4), rcx=2).outcome.outcome == "completed"
    assert round_trip(vm).hyperv.tlb_locked(W1)
    vm.hyperv.set_tlb_lock(W1, False)
    assert call(vm, 0, words(0, 2, 4), rcx=2).outcome.result == 0


def test_the_callers_mode_is_that_of_its_vcpu() -> None:
    vm = hyperv_guest()
    vm.vcpus.set_vmcs(0, {"cpl": 3})
    assert call(vm, rcx=2).outcome.outcome == "exception"
    vm.vcpus.set_vmcs(0, {"cpl": 0, "efer": 0x101})
    assert dict(call(vm, rdx=0, rax=0x10002, rsi=3, rcx=0).outcome.registers) == {"rdx": 0, "rax": 0}
    vm.vcpus.set_vmcs(0, {"cr0": 0x10})
    assert call(vm, rcx=2).outcome.outcome == "exception"
    request = HypercallRequest(Caller(rcx=0x10002, r8=3), cpl=0, long_mode=True, protected=True)
    assert vm.hyperv.hypercall(0, request).outcome.result == 0


def test_without_an_os_id_the_call_is_kvms() -> None:
    vm = hyperv_guest()
    vm.nested.write_msrs(0, [(0x40000000, 0)])
    assert call(vm, rax=0xDEAD, rcx=2).outcome.outcome == "native"


def test_input_needs_memory_and_goes_nowhere_for_a_fast_call() -> None:
    vm = hyperv_guest()
    for registers in ({"rcx": 2, "rdx": 0xDEAD000}, {"rcx": 0x10002}):
        with pytest.raises(InvalidValue):
            call(vm, 0, words(0, 3, 0), **registers)
    with pytest.raises(NotFound):
        call(vm, 9, rcx=2)


def test_cpuid_is_enforced_on_demand() -> None:
    vm = hyperv_guest(cpuid=(), profile="kvm-latest")
    assert call(vm, 0, words(0, 3, 0), rcx=2).outcome.outcome == "native"
    vm.nested.set_cpuid(0, CPUID[:2])
    assert call(vm, 0, words(0, 3, 0), rcx=2).outcome.result == 0
    vm.hyperv.enforce_cpuid(0, True)
    assert vm.hyperv.enforces_cpuid(0)
    assert call(vm, 0, words(0, 3, 0), rcx=2).outcome.result == 6


def test_2019_has_no_enforcement_of_cpuid() -> None:
    vm = hyperv_guest(profile="kvm-2019")
    for enforced in (True, False):
        with pytest.raises(Unsupported) as caught:
            vm.hyperv.enforce_cpuid(0, enforced)
        assert caught.value.errno == "EINVAL"
    assert not vm.hyperv.enforcement_available() and not vm.hyperv.enforces_cpuid(0)


# KVM on Hyper-V


def on_hyperv(**leaves: Any) -> VirtualMachine:
    fail = leaves.pop("fail_allocation", False)
    cpuid = [{"function": name, "eax": eax} for name, eax in leaves.items()]
    return hyperv_guest((7, 2, 65), host=HostConfig(hyperv={"cpuid": cpuid, "fail_allocation": fail}))


def test_direct_flush_needs_a_hyperv_that_has_it() -> None:
    for vm in (hyperv_guest(), on_hyperv(**{"0x4000000a": "0x00080101"}), on_hyperv(**{"0x40000004": 0x804})):
        assert not vm.hyperv.direct_flush_available()
        with pytest.raises(Unsupported) as caught:
            vm.hyperv.enable_direct_flush(0)
        assert caught.value.errno == "ENOTTY"
    vm = hyperv_guest(host=HostConfig(hyperv={}, evmcs=False))
    assert not vm.hyperv.direct_flush_available()
    vm = on_hyperv(fail_allocation=True)
    before = vm.hyperv.vmcs_of_kvm(0).page
    with pytest.raises(Unsupported) as caught:
        vm.hyperv.enable_direct_flush(0)
    assert caught.value.errno == "ENOMEM" and vm.hyperv.vmcs_of_kvm(0).page == before


def test_enabling_writes_the_enlightened_vmcs_and_running_the_vp_id() -> None:
    vm = on_hyperv()
    assert vm.hyperv.direct_flush_available()
    vm.hyperv.enable_direct_flush(0)
    page = vm.hyperv.vmcs_of_kvm(0).page
    assert page[0x344] & 1 and page[0x348:0x34C] == bytes(4)
    assert int.from_bytes(page[0x350:0x358], "little") >> 47 == 0x1FFFF
    assert int.from_bytes(page[0x358:0x360], "little") % 0x1000 == 0
    vm.hyperv.enable_direct_flush(0)
    assert vm.hyperv.vmcs_of_kvm(0).page == page
    read(vm, 0)
    page = vm.hyperv.vmcs_of_kvm(0).page
    assert (page[0x338:0x33C].hex(), page[0x348:0x34C].hex()) == ("ffff0000", "07000000")
    assist = vm.hyperv.vp_assist_page(0, of_kvm=True)
    assert (assist[0x20], assist[0x28]) == (1, 1)
    # each vCPU is enabled by itself, and all share the page
    assert not vm.hyperv.vmcs_of_kvm(1).page[0x344] & 1
    vm.hyperv.enable_direct_flush(1)
    assert vm.hyperv.vmcs_of_kvm(1).page[0x358:0x360] == page[0x358:0x360]
    assert round_trip(vm).hyperv.vmcs_of_kvm(0).page == page
    assert round_trip(vm).hyperv.direct_flush_enabled(0)


def test_hyperv_serves_what_it_is_asked_to_and_kvm_the_rest() -> None:
    vm = on_hyperv()
    for vcpu in range(3):
        assert read(vm, vcpu) == 1
    point(vm, P2)
    report = call(vm, 0, rcx=0x10002, r8=2, **xmm(4))
    outcome = report.outcome
    assert (outcome.l0, outcome.served_by, outcome.level, outcome.row) == ("hyperv", 1, 2, "D3")
    assert outcome.exit is not None and outcome.exit.reason == 18
    assert read(vm, W1) == 2
    for vcpu in range(3):
        vm.hyperv.enable_direct_flush(vcpu)
    point(vm, P1)
    assert (read(vm, W1), read(vm, W2)) == (2, 1)
    point(vm, P2)
    call(vm, 0, rcx=0x10002, r8=3)
    assert (read(vm, W1), read(vm, W2)) == (2, 2)
    point(vm, P1)
    outcome = call(vm, 0, rcx=0x30013, r8=2, **xmm(0, 2, 2)).outcome
    assert (outcome.served_by, outcome.row, outcome.exit, outcome.flushed) == (0, "D10", None, (65,))
    assert (read(vm, W1), read(vm, W2)) == (2, 1)


def test_a_hypercall_of_kvm_is_taken_for_a_flush() -> None:
    vm = on_hyperv()
    vm.hyperv.enable_direct_flush(0)
    read(vm, 0)
    outcome = call(vm, 0, rax=5, rcx=2, rdx=0x5000).outcome
    assert outcome.served_by == 0  # Hyper-V answers, whatever RAX says


def test_partitions_name_the_nested_vps() -> None:
    vm = on_hyperv()
    for vcpu in range(3):
        vm.hyperv.enable_direct_flush(vcpu)
        read(vm, vcpu)
    found = vm.hyperv.partitions()
    assert [(p.vp_index, p.vp_id, p.asks, p.direct, p.tlb_lock_count) for p in found] == [
        (7, 7, True, True, 0),
        (2, 2, True, True, 0),
        (65, 65, True, True, 0),
    ]
    assert len({p.vm_id for p in found}) == 1


@pytest.mark.parametrize(
    "hyperv", [{"no leaf": 1}, {"cpuid": [{"function": 1, "rax": 1}]}, {"cpuid": [{"function": "x"}]}, {"cpuid": [{}]}]
)
def test_a_host_that_cannot_be(hyperv: dict[str, Any]) -> None:
    with pytest.raises(InvalidValue):
        hyperv_guest(host=HostConfig(hyperv=hyperv))
