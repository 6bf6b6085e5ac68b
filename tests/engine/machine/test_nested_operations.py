"""Nested state as part of a machine: whole changes, the durable form, one copy of everything."""

from __future__ import annotations

from typing import Any

import pytest

from engine.arch import kvm_nested_state as abi
from engine.arch.vmx_msrs import EFER, IA32_FEATURE_CONTROL, SEC_EPT, SEC_SHADOW_VMCS
from engine.errors import Conflict, InvalidValue, NotFound, Unsupported
from engine.ioctls import check_vm_extension
from engine.kvm.protections import ProtectedObject
from engine.kvm.slots import SlotSpec
from engine.machine import VirtualMachine
from engine.nested import enable_evmcs
from engine.state.config import HostConfig, VcpuConfig, VmConfig
from engine.vcpu.msr_numbers import HV_GUEST_OS_ID, HV_HYPERCALL, HV_VP_ASSIST_PAGE, HV_VP_INDEX
from tests.engine.builders import (
    PROFILES,
    Durable,
    machine,
    picture,
    protect,
    replay,
    round_trip,
    store_word,
    unchanged,
)
from tests.engine.nested.support import (
    ERAS,
    EV,
    GM,
    MIN32,
    NONE,
    RP,
    SHADOW_WORD,
    SHADOWING,
    WIDTH,
    blob,
    vmcs12,
    vmx_cpuid,
)

L2 = blob(flags=GM, data=vmcs12(MIN32))


def guest(profile: str, *, hyperv: bool = False, host: HostConfig | None = None, **config: Any) -> VirtualMachine:
    """A machine of the reference host whose vCPU 0 has VMX."""
    vm = machine(profile, spp=False, maxphyaddr=WIDTH, host=host or HostConfig(), **config)
    vm.nested.set_cpuid(0, vmx_cpuid(hyperv=hyperv))
    return vm


@pytest.mark.parametrize("era", ERAS)
def test_state_survives_the_durable_form(era: str) -> None:
    vm, disk = guest(era), Durable()
    store_word(vm, 0x5000, SHADOW_WORD, 4)
    disk.save(vm)
    data = blob(flags=GM | RP, size=8320, data=vmcs12(SHADOWING), shadow=vmcs12(revision=SHADOW_WORD))
    assert vm.nested.set_state(0, data).check == "V23"
    assert vm.counters()["frames_nested"] == 2
    disk.save(vm)
    for back in (round_trip(vm), disk.restore()):
        assert back.nested.state(0) == vm.nested.state(0)
        assert back.nested.vcpu(0) == vm.nested.vcpu(0)
        assert back.head()["nested"] == vm.head()["nested"]
    assert vm.nested.set_state(0, blob(vmxon=NONE, vmcs12_pa=NONE)).check == "V10"
    assert vm.counters()["frames_nested"] == 0
    assert disk.save(vm) and disk.restore().nested.state(0) == vm.nested.state(0)


def test_fresh_vcpus_cost_nothing_in_the_head() -> None:
    vm = machine(spp=False, vcpus=range(8))
    for vcpu in range(8):
        vm.nested.set_smm(vcpu, True)
        vm.nested.set_smm(vcpu, False)
    assert vm.head()["nested"] == {"vcpus": {}, "partition": {}, "lapic_in_kernel": True}


@pytest.mark.parametrize("era", ERAS)
def test_a_failure_after_leaving_nested_mode_is_published(era: str) -> None:
    vm = guest(era)
    assert vm.nested.set_state(0, L2).returns == 0
    with unchanged(vm):
        foretold, after = vm.nested.explain_state(0, blob(vmcs12_pa=0x1000))
        assert foretold.check == "V13" and after is not None
    assert vm.nested.set_state(0, blob(vmcs12_pa=0x1000)) == foretold
    assert vm.nested.state(0) == after and len(after) == abi.HEADER_SIZE


def test_nothing_is_published_when_the_caller_fails() -> None:
    vm = guest("kvm-2019")

    def fail() -> None:
        with vm.nested.change(0) as (vcpu, ram):
            vcpu.smm = True
            enable_evmcs(vcpu)
            assert ram.write(0x3000, b"x")
            raise ZeroDivisionError

    with unchanged(vm), pytest.raises(ZeroDivisionError):
        fail()


def test_what_readers_hold_never_changes() -> None:
    vm = guest("kvm-latest")
    assert vm.nested.set_state(0, L2).returns == 0
    seen, page = vm.nested.vcpu(0), vm.nested.state(0)
    used = vm.nested.vcpu(0)
    used.vmx.vmcs12[:] = bytes(4096)
    used.registers["rip"] = used.msrs[1] = 77
    assert vm.nested.state(0) == page and vm.nested.vcpu(0) == seen


@pytest.mark.parametrize("era", ERAS)
def test_registers_are_those_of_the_vcpu_record(era: str) -> None:
    vm = guest(era)
    vm.vcpus.set_vmcs(0, {"cr3": 0x7000, "efer": 0x501, "cpl": 3})
    found = vm.nested.vcpu(0)
    assert found.registers["cr3"] == 0x7000 and found.registers["ss_ar_bytes"] >> 5 & 3 == 3
    assert vm.nested.msrs(0, [EFER])[0].host == 0x501
    assert vm.nested.write_msrs(0, [(EFER, 0x500)]).refused is None
    assert vm.vcpus.vmcs(0)["efer"] == 0x500 and vm.vcpus.vmcs(0)["cpl"] == 3


def test_partition_msrs_are_the_same_on_every_vcpu() -> None:
    vm = machine(spp=False, vcpus=(3, 9), vcpu_room=3)
    code = bytes((0x0F, 0x01, 0xC1, 0xC3))
    assert vm.nested.write_msrs(9, [(HV_GUEST_OS_ID, 0x8100), (HV_HYPERCALL, 0x2001)]).written == 2
    assert vm.read_memory(0x2000, 4) == code
    assert vm.nested.write_msrs(3, [(HV_VP_ASSIST_PAGE, 0x6001)]).refused is None
    for back in (vm, round_trip(vm)):
        assert [msr.host for msr in back.nested.msrs(3, [HV_GUEST_OS_ID, HV_HYPERCALL])] == [0x8100, 0x2001]
        assert back.nested.msrs(9, [HV_VP_ASSIST_PAGE])[0].host == 0
    vm.create_vcpu(4)
    assert vm.nested.msrs(4, [HV_GUEST_OS_ID])[0].host == 0x8100 and vm.nested.vcpu(4).vp_index == 2
    assert vm.nested.write_msrs(3, [(HV_GUEST_OS_ID, 0)], guest=True).written == 1
    assert vm.nested.msrs(9, [HV_HYPERCALL])[0].guest == 0x2000


def test_writes_stop_at_the_first_that_faults() -> None:
    vm = machine(spp=False)
    writes = [(0x11, 5), (IA32_FEATURE_CONTROL, 1 << 40), (0x12, 6)]
    done = vm.nested.write_msrs(0, writes)
    assert (done.written, done.refused) == (1, (IA32_FEATURE_CONTROL, 1 << 40))
    assert [msr.host for msr in vm.nested.msrs(0, [0x11, 0x12])] == [5, 0]


def test_cpuid_and_vp_index_come_from_the_creation() -> None:
    leaf = {"function": 1, "index": 0, "eax": 0, "ebx": 0, "ecx": 1 << 5, "edx": 0}
    config = VmConfig(vcpus=(VcpuConfig(4, 7, (leaf,)), VcpuConfig(2)))
    vm = VirtualMachine.create(config)
    (first, (entry,)), second = vm.nested.identities()
    assert first == 7 and entry.ecx == 1 << 5 and second == (2, ())
    vm.nested.write_msrs(2, [(HV_VP_INDEX, 9)])
    assert vm.nested.identities() == [(7, (entry,)), (9, ())]
    assert vm.nested.vcpu(4).vmx_allowed and not vm.nested.vcpu(2).vmx_allowed
    assert round_trip(vm).nested.identities() == vm.nested.identities()
    with pytest.raises(NotFound):
        vm.nested.vcpu(3)


def test_refused_cpuid_changes_nothing() -> None:
    vm = guest("kvm-latest")
    vm.nested.set_state(0, L2)
    with unchanged(vm), pytest.raises(InvalidValue):
        vm.nested.set_cpuid(0, ())


@pytest.mark.parametrize(
    ("profile", "host", "errno"),
    [
        ("kvm-2019", {"nested": False}, "ENOTTY"),
        ("kvm-2019", {"vendor": "amd"}, "ENODEV"),
        ("kvm-latest", {"vendor": "amd"}, "ENOTTY"),
        ("kvm-latest", {"nested_evmcs": False}, "EINVAL"),
    ],
)
def test_enlightened_vmcs_where_there_is_none(profile: str, host: dict[str, Any], errno: str) -> None:
    vm = machine(profile, spp=False, host=HostConfig(**host))
    with unchanged(vm), pytest.raises(Unsupported) as caught:
        vm.nested.enable_evmcs(0)
    assert caught.value.errno == errno


def test_enlightened_vmcs_lives_in_guest_memory() -> None:
    vm = guest("kvm-latest", hyperv=True)
    assert vm.nested.enable_evmcs(0) == 0x0101
    assist = bytearray(64)
    assist[40], assist[48:56] = 1, (0x3000).to_bytes(8, "little")
    vm.write_memory(0x2000, bytes(assist))
    vm.write_memory(0x3000, b"\x01\0\0\0")
    vm.nested.write_msrs(0, [(HV_VP_ASSIST_PAGE, 0x2001)])
    assert vm.nested.set_state(0, blob(flags=EV, vmcs12_pa=NONE)).returns == 0
    assert vm.nested.evmcs(0).pending and vm.nested.evmcs(0).attached is None
    assert vm.nested.prepare_run(0).exit is None
    found = vm.nested.evmcs(0)
    assert (found.attached, found.wanted, found.visible, found.pending) == (0x3000, 0x3000, True, False)
    assert found.fields is not None and found.fields["revision_id"] == "0x1"
    assert round_trip(vm).nested.evmcs(0) == found
    assert found.lost["pin"] == 0x40


def test_memory_behind_no_slot_and_behind_a_read_only_one() -> None:
    vm = guest("kvm-2019")
    vm.set_slot(SlotSpec(5, 0x800000, 0x1000, read_only=True))
    ram = vm.nested.ram()
    assert ram.read(0x800000, 4) == bytes(4)
    for gpa in (0x900000, (1 << 64) - 0x1000, (1 << 64) - 1, 0x3FFFFE):
        assert ram.read(gpa, 8) is None, hex(gpa)
    with vm.nested.change(0) as (_, changing):
        assert not changing.write(0x800000, b"x") and not changing.write((1 << 64) - 8, b"x" * 8)
        assert changing.write(0x1FFF, b"ab")
    assert vm.read_memory(0x1FFF, 2) == b"ab"
    with pytest.raises(TypeError):
        ram.write(0, b"x")


def test_capabilities_follow_the_processor() -> None:
    lacking = HostConfig(vmx_capabilities={"procbased_ctls2": 0x2 << 32, "ept_vpid_cap": 0x6114140})
    capabilities = guest("kvm-latest", host=lacking).nested.vcpu(0).capabilities
    assert capabilities.controls["secondary"].may1 == SEC_EPT | SEC_SHADOW_VMCS
    assert capabilities.values["ept_vpid"] & (1 << 21 | 1 << 7 | 1) == 0
    given = HostConfig(vmx_capabilities={"IA32_VMX_MISC": 0x123})
    assert guest("kvm-2019", host=given).nested.vcpu(0).capabilities.values["misc"] == 0x123
    with pytest.raises(InvalidValue):
        guest("kvm-2019", host=HostConfig(vmx_capabilities={"IA32_VMX_PINBASED_CTLS": 1}))


@pytest.mark.parametrize("era", ERAS)
def test_the_allocation_that_fails_is_counted(era: str) -> None:
    vm = guest(era, host=HostConfig(fail_allocation=2))
    assert vm.nested.set_state(0, blob(vmxon=NONE, vmcs12_pa=NONE)).returns == 0
    assert vm.nested.explain_state(0, blob())[0].returns == 0
    assert vm.allocations.failing == 2
    assert vm.nested.set_state(0, blob()).returns == 0
    for machine_ in (round_trip(vm), vm):
        assert machine_.allocations.failing == 1
        result = machine_.nested.set_state(0, blob())
        assert (result.check, result.errno) == ("V11", "ENOMEM")
        assert len(machine_.nested.state(0)) == abi.HEADER_SIZE and machine_.allocations.failing is None
        assert machine_.nested.set_state(0, blob()).returns == 0


# ---- sub-page protection


def test_writes_of_l2_go_past_sub_page_protection_in_2019() -> None:
    vm = machine("kvm-2019", vcpus=(0, 1), maxphyaddr=WIDTH)
    vm.nested.set_cpuid(0, vmx_cpuid())
    protect(vm, "secret", (0x6000, 128))
    assert vm.nested.set_state(0, L2).returns == 0
    rows = [(0x6000, 8, 1, 0), (0x6080, 8, 1, 0), (0x6000, 8, 1, 1), (0x6000, 8, 0, 0), (0x5FFC, 8, 1, 0)]
    result = replay(vm, rows)
    assert (result.unenforced_writes, result.violations, result.page_granular_violations) == (2, 1, 4)
    assert result.writes == 4 and vm.counters()["unenforced_writes"] == 2
    assert vm.nested.set_state(0, blob(vmxon=NONE, vmcs12_pa=NONE)).returns == 0
    assert replay(vm, rows).unenforced_writes == 0


@pytest.mark.parametrize("profile", PROFILES)
def test_writes_of_l2_to_whole_pages_are_refused_without_sub_page_protection(profile: str) -> None:
    vm = machine(profile, spp=False, vcpus=(0, 1), maxphyaddr=WIDTH)
    vm.nested.set_cpuid(0, vmx_cpuid())
    vm.protect("secret", [ProtectedObject("secret", 0x6000, 128, "page")])
    assert vm.nested.set_state(0, L2).returns == 0
    result = replay(vm, [(0x6000, 8, 1, 0), (0x6F00, 8, 1, 0), (0x6000, 8, 1, 1), (0x6000, 8, 0, 0), (0x5FFC, 8, 1, 0)])
    assert (result.unenforced_writes, result.violations, result.page_granular_violations) == (0, 4, 4)


def test_today_sub_page_protection_and_nesting_exclude_each_other() -> None:
    vm = machine("kvm-latest", spp=False, host=HostConfig(nested=True))
    with unchanged(vm), pytest.raises(Conflict) as caught:
        vm.enable_spp()
    assert caught.value.errno == "EPERM"
    vm = guest("kvm-latest")
    assert vm.nested.vcpu(0).vmx_allowed
    vm.nested.set_state(0, L2)
    with unchanged(vm), pytest.raises(Conflict):
        vm.enable_spp()
    vm.nested.set_state(0, blob(vmxon=NONE, vmcs12_pa=NONE))
    vm.enable_spp()
    assert not vm.nested.host().nested and not vm.nested.vcpu(0).vmx_allowed
    assert vm.nested.set_state(0, L2).check == "V3a"


def test_every_operation_reads_what_was_published() -> None:
    vm = guest("kvm-2019")
    before = picture(vm)
    for read in (vm.nested.state, vm.nested.vcpu, vm.nested.evmcs, vm.nested.msrs, vm.nested.hyperv_cpuid):
        read(0)
    assert picture(vm) == before
    assert check_vm_extension(vm, 157) == 8320 and check_vm_extension(vm, 1) == 0


def test_instructions() -> None:
    vm = guest("kvm-2019")
    with pytest.raises(InvalidValue):
        vm.nested.execute(0, "vmcall")
    assert vm.nested.execute(0, "vmxon", 0x1000).result == "#UD"
    vm.vcpus.set_vmcs(0, {"cr4": 0x2000 | vm.vcpus.vmcs(0)["cr4"]})
    assert vm.nested.execute(0, "vmxon", 0x1000).result == "#GP"
    vm.nested.write_msrs(0, [(IA32_FEATURE_CONTROL, 5)])
    assert vm.nested.execute(0, "vmxon", 0x1000).result == "vmfail-invalid"
    for page in (0x1000, 0x2000):
        vm.write_memory(page, vmcs12(MIN32))
    assert vm.nested.execute(0, "vmxon", 0x1000).result == "succeed"
    assert vm.nested.execute(0, "vmptrld", 0x2000).result == "succeed"
    assert vm.nested.execute(0, "vmptrst").value == 0x2000
    vm.vcpus.set_vmcs(0, {"interruptibility": 2})
    assert vm.nested.execute(0, "vmlaunch").vm_instruction_error == 26
    assert round_trip(vm).nested.vcpu(0).mov_ss_blocking
    vm.vcpus.set_vmcs(0, {"interruptibility": 0})
    assert vm.nested.execute(0, "vmlaunch").result == "entered"
    with unchanged(vm), pytest.raises(Conflict):
        vm.nested.execute(0, "vmlaunch")
    with pytest.raises(Unsupported):
        machine(spp=False, host=HostConfig(vendor="amd")).nested.execute(0, "vmxoff")
