"""VMX instructions of L1: permissions, VMfail numbers, failed entries, MSR lists."""

from __future__ import annotations

from typing import Any

import pytest

from engine.arch.vmcs12 import VMCS12, VMCS12_REVISION
from engine.errors import Conflict
from engine.nested import (
    exit_to_l1,
    prepare_run,
    set_cpuid,
    set_msr,
    set_smm,
    vm_entry,
    vmclear,
    vmptrld,
    vmptrst,
    vmxoff,
    vmxon,
)
from engine.vcpu.vcpu import Vcpu
from tests.engine.nested.support import (
    ERAS,
    GM,
    MIN32,
    MIN64,
    NONE,
    SHADOW_WORD,
    SHADOWING,
    blob,
    do_set,
    make_vcpu,
    summary,
    vmcs12,
    vmx_cpuid,
)
from tests.engine.ram import Ram


def with_current(era: str, fields: dict[str, int] | None = None, **changes: int) -> tuple[Vcpu, Ram]:
    """In VMX operation with a current VMCS at 0x2000."""
    vcpu, ram = make_vcpu(era), Ram(words={0x1000: VMCS12_REVISION})
    ram.write(0x2000, vmcs12(fields or MIN32, **changes))
    vcpu.registers["cr4"] = 0x2000
    assert set_msr(vcpu, ram, 0x3A, 5)
    assert vmxon(vcpu, ram, 0x1000).result == "succeed"
    assert vmptrld(vcpu, ram, 0x2000).result == "succeed"
    return vcpu, ram


@pytest.mark.parametrize("era", ERAS)
def test_vmxon_rules(era: str) -> None:
    vcpu, ram = make_vcpu(era), Ram(words={0x1000: VMCS12_REVISION, 0x3000: SHADOW_WORD})
    assert vmxon(vcpu, ram, 0x1000).result == "#UD"
    vcpu.registers["cr4"] = 0x2000
    assert vmxon(vcpu, ram, 0x1000).result == "#GP"
    set_msr(vcpu, ram, 0x3A, 5)
    for address in (1, 1 << 45, 0x2000, 0x3000, 0x7F_FFFF_F000):
        assert vmxon(vcpu, ram, address).result == "vmfail-invalid"
    vcpu.registers.update(cr0=1, ss_ar_bytes=0xF3)
    assert vmxon(vcpu, ram, 0x1000).result == "#GP"
    vcpu.registers.update(ss_ar_bytes=0x93)
    assert vmxon(vcpu, ram, 0x1000).result == "succeed"
    assert summary(vcpu, ram) == (128, 0, 0x1000, NONE, 0, 0)
    assert vmxon(vcpu, ram, 0x1000).result == "vmfail-invalid"
    assert vmxoff(vcpu).result == "succeed"
    assert vmxoff(vcpu).result == "#UD"
    assert vmxon(make_vcpu(era, vmx=False), ram, 0x1000).result == "#UD"


@pytest.mark.parametrize("era", ERAS)
def test_pointer_instructions(era: str) -> None:
    vcpu, ram = with_current(era)
    assert vmptrst(vcpu).value == 0x2000
    for address, error in ((1, 9), (0x1000, 10), (0x4000, 11), (0x7F_FFFF_F000, 11)):
        result = vmptrld(vcpu, ram, address)
        assert (result.result, result.vm_instruction_error) == ("vmfail-valid", error)
    for address, error in ((1, 2), (0x1000, 3)):
        assert vmclear(vcpu, ram, address).vm_instruction_error == error
    assert vmxon(vcpu, ram, 0x1000).vm_instruction_error == 15
    ram.put(0x2008, 1, 4)
    vcpu.vmx.vmcs12[8] = 1
    assert vmclear(vcpu, ram, 0x2000).result == "succeed"
    assert ram.word(0x2008, 4) == 0
    assert VMCS12.get(ram.bytes[0x2000:0x3000], "vm_instruction_error") == 15
    assert vmptrst(vcpu).value == NONE
    assert vm_entry(vcpu, ram).result == "vmfail-invalid"
    ram.write(0x6000, vmcs12(MIN32))
    assert vmptrld(vcpu, ram, 0x6000).result == "succeed"
    assert vmptrld(vcpu, ram, 0x2000).result == "succeed"
    assert vmptrld(vcpu, ram, 0x2000).result == "succeed"


@pytest.mark.parametrize("era", ERAS)
def test_permissions(era: str) -> None:
    vcpu, ram = make_vcpu(era), Ram()
    for result in (vm_entry(vcpu, ram), vmptrst(vcpu), vmptrld(vcpu, ram, 0), vmclear(vcpu, ram, 0), vmxoff(vcpu)):
        assert result.result == "#UD"
    vcpu, ram = with_current(era)
    vcpu.registers.update(cr0=1, ss_ar_bytes=0xF3)
    assert vm_entry(vcpu, ram).result == "#GP"
    vcpu.registers.update(ss_ar_bytes=0x93)
    vcpu.registers["ia32_efer"] = 0
    assert vm_entry(vcpu, ram).result == "entered"
    with pytest.raises(Conflict):
        vm_entry(vcpu, ram)
    with pytest.raises(Conflict):
        vmptrst(vcpu)


@pytest.mark.parametrize("era", ERAS)
@pytest.mark.parametrize(
    ("fields", "changes", "expected"),
    [
        (MIN32, {"launch_state": 1}, ("vmfail-valid", 4)),
        (MIN32, {"pin_based_vm_exec_control": 0}, ("vmfail-valid", 7)),
        (MIN32, {"host_cr0": 0}, ("vmfail-valid", 8)),
        (MIN32, {"guest_cr4": 0}, ("entry-failure", 0)),
        (MIN32, {"vmcs_link_pointer": 1}, ("entry-failure", 4)),
        (MIN32, {"guest_cr3": 1 << 39}, ("entry-failure", 0)),
        (MIN32, {"guest_cr4": 0x2020, "guest_cr3": 0x1_0000_0000}, ("entry-failure", 2)),
    ],
)
def test_refusals(era: str, fields: dict[str, int], changes: dict[str, int], expected: tuple[str, int]) -> None:
    vcpu, ram = with_current(era, fields, host_rip=0x99, **changes)
    result = vm_entry(vcpu, ram)
    if expected[0] == "vmfail-valid":
        assert (result.result, result.vm_instruction_error) == expected
        assert VMCS12.get(vcpu.vmx.vmcs12, "vm_instruction_error") == expected[1]
    else:
        assert (result.result, result.exit_qualification) == expected
        assert result.exit_reason == 0x8000_0021
        assert vcpu.registers["rip"] == 0x99
        assert VMCS12.get(vcpu.vmx.vmcs12, "vm_exit_reason") == 0x8000_0021
    assert not vcpu.vmx.guest_mode and not vcpu.vmx.run_pending


@pytest.mark.parametrize("era", ERAS)
def test_launch_state_and_blocking(era: str) -> None:
    vcpu, ram = with_current(era)
    assert vm_entry(vcpu, ram, launch=False).vm_instruction_error == 5
    vcpu.mov_ss_blocking = True
    assert vm_entry(vcpu, ram).vm_instruction_error == 26
    vcpu.mov_ss_blocking = False
    assert vm_entry(vcpu, ram).result == "entered"
    exit_to_l1(vcpu, ram, 10)
    assert vm_entry(vcpu, ram).vm_instruction_error == 4
    assert vm_entry(vcpu, ram, launch=False).result == "entered"


def test_address_space_size_is_compared_today() -> None:
    for era in ERAS:
        vcpu, ram = with_current(era, MIN64)
        result = vm_entry(vcpu, ram)
        if era == "kvm-2019":
            assert result.result == "entered"
        else:
            assert (result.vm_instruction_error, result.check) == (8, "host:address space")


@pytest.mark.parametrize("era", ERAS)
def test_shadow_vmcs(era: str) -> None:
    vcpu, ram = with_current(era, SHADOWING)
    ram.write(0x5000, vmcs12(revision=SHADOW_WORD, guest_rip=5))
    assert vm_entry(vcpu, ram).result == "entered"
    assert VMCS12.get(vcpu.vmx.shadow, "guest_rip") == 5
    assert summary(vcpu, ram) == (8320, GM + 2, 0x1000, 0x2000, 0, 0)
    vcpu, ram = with_current(era, MIN32, revision=SHADOW_WORD)
    assert vm_entry(vcpu, ram).result == "vmfail-invalid"


@pytest.mark.parametrize("era", ERAS)
def test_entry_msr_list(era: str) -> None:
    entries = [(0x174, 0, 0x10), (0x1234, 0, 7)]
    refused = [(0xC000_0100, 0, 1), (0x79, 0, 1), (0x480, 0, 1), (0x10, 1, 1)]
    for extra in (None, *refused):
        listed = entries if extra is None else [*entries, extra]
        vcpu, ram = with_current(era, vm_entry_msr_load_addr=0x7000, vm_entry_msr_load_count=len(listed))
        for n, (number, reserved, value) in enumerate(listed):
            ram.put(0x7000 + 16 * n, number, 4)
            ram.put(0x7004 + 16 * n, reserved, 4)
            ram.put(0x7008 + 16 * n, value)
        result = vm_entry(vcpu, ram)
        assert vcpu.msrs[0x1234] == 7
        if extra is None:
            assert result.result == "entered"
            assert vcpu.registers["sysenter_cs"] == 0x10
        else:
            assert (result.result, result.exit_reason, result.exit_qualification) == ("entry-failure", 0x8000_0022, 3)


@pytest.mark.parametrize("era", ERAS)
def test_exit_msr_lists(era: str) -> None:
    lists = {"vm_exit_msr_store_addr": 0x7000, "vm_exit_msr_store_count": 1}
    vcpu, ram = with_current(era, **lists, vm_exit_msr_load_addr=0x7100, vm_exit_msr_load_count=1)
    ram.put(0x7000, 0x1234, 4)
    ram.put(0x7100, 0xC000_0100, 4)
    vcpu.msrs[0x1234] = 0x77
    assert vm_entry(vcpu, ram).result == "entered"
    exit_to_l1(vcpu, ram, 10)
    assert ram.word(0x7008) == 0x77
    assert prepare_run(vcpu, ram).exit == "shutdown"


def test_a_list_longer_than_advertised_ends() -> None:
    vcpu, ram = with_current("kvm-2019", vm_entry_msr_load_count=0x1000)
    result = vm_entry(vcpu, ram)
    assert result.result == "entry-failure"
    assert result.exit_qualification is not None and result.exit_qualification <= 513


@pytest.mark.parametrize("era", ERAS)
@pytest.mark.parametrize(
    ("changes", "state"),
    [
        ({"guest_activity_state": 1}, "halted"),
        ({"guest_activity_state": 1, "vm_entry_intr_info_field": 1 << 31 | 2 << 8 | 2}, "runnable"),
        ({"guest_activity_state": 1, "guest_rflags": 0x200, "cpu_based_vm_exec_control": 0x0400_6176}, "runnable"),
    ],
)
def test_activity(era: str, changes: dict[str, Any], state: str) -> None:
    vcpu, ram = with_current(era, **changes)
    assert vm_entry(vcpu, ram).result == "entered"
    assert vcpu.mp_state == state
    assert vcpu.vmx.run_pending == (state == "runnable")


def test_wait_for_sipi_today() -> None:
    vcpu, ram = with_current("kvm-latest", guest_activity_state=3)
    assert vm_entry(vcpu, ram).result == "entered"
    assert vcpu.mp_state == "wait-for-sipi"


def test_cpuid_freezes_today() -> None:
    other = vmx_cpuid(vmx=False)
    for era in ERAS:
        latest = era == "kvm-latest"
        vcpu, ram = make_vcpu(era), Ram()
        assert do_set(vcpu, ram, blob(flags=GM, data=vmcs12(MIN32))).returns == 0
        assert set_cpuid(vcpu, vcpu.cpuid) is None
        assert set_cpuid(vcpu, other) == ("EINVAL" if latest else None)
        vcpu = make_vcpu(era)
        prepare_run(vcpu, ram)
        assert set_cpuid(vcpu, other) == ("EINVAL" if latest else None)


def test_smm_toggle_leaves_today() -> None:
    for era in ERAS:
        vcpu, ram = make_vcpu(era), Ram()
        do_set(vcpu, ram, blob())
        set_smm(vcpu, ram, True)
        assert vcpu.smm
        assert summary(vcpu, ram)[0] == (128 if era == "kvm-latest" else 4224)


@pytest.mark.parametrize("era", ERAS)
def test_capability_msrs(era: str) -> None:
    vcpu, ram = make_vcpu(era), Ram()
    pin = 0x48D
    assert set_msr(vcpu, ram, pin, 0x3F << 32 | 0x16)
    assert not set_msr(vcpu, ram, pin, 0x3F << 32 | 0x06)
    assert not set_msr(vcpu, ram, pin, 0xFF << 32 | 0x16)
    assert set_msr(vcpu, ram, pin, 0x7F << 32 | 0x16) == (era == "kvm-latest")
    assert not set_msr(vcpu, ram, 0x481, 0x7F << 32 | 0x16)
    assert not set_msr(vcpu, ram, 0x487, 0)
    assert not set_msr(vcpu, ram, 0x489, 0)
    assert set_msr(vcpu, ram, 0x480, 0x00D8_1000_11E5_7ED0)
    assert not set_msr(vcpu, ram, 0x480, 0x00D8_1000_11E5_7ED1)
    assert not set_msr(vcpu, ram, 0x480, 0x00D9_1000_11E5_7ED0)
    assert set_msr(vcpu, ram, 0x485, 0x2000_0045)
    assert not set_msr(vcpu, ram, 0x485, 0x2001_0065)
    assert set_msr(vcpu, ram, 0x486, 0x8000_0031)
    assert not set_msr(vcpu, ram, 0x486, 0x21)
    assert set_msr(vcpu, ram, 0x491, 0)
    assert not set_msr(vcpu, ram, 0x491, 2)
    assert set_msr(vcpu, ram, 0x48C, 0)
    assert set_msr(vcpu, ram, 0x48A, 0x2E)
    do_set(vcpu, ram, blob())
    assert not set_msr(vcpu, ram, pin, 0x3F << 32 | 0x16)
    assert not set_msr(make_vcpu(era, vmx=False), ram, pin, 0x3F << 32 | 0x16)


@pytest.mark.parametrize("era", ERAS)
def test_lowered_capabilities_are_what_the_checks_use(era: str) -> None:
    vcpu, ram = make_vcpu(era), Ram()
    assert set_msr(vcpu, ram, 0x48D, 0x3F << 32 | 0x16)
    data = vmcs12(MIN32, pin_based_vm_exec_control=0x56)
    assert do_set(vcpu, ram, blob(flags=GM, data=data)).label == "V21 ctl:pin"


def test_exit_refreshes_the_timer_today() -> None:
    for era in ERAS:
        vcpu, ram = make_vcpu(era), Ram()
        data = vmcs12(
            MIN32, pin_based_vm_exec_control=0x56, vm_exit_controls=0x0043_6DFB, vmx_preemption_timer_value=100
        )
        assert do_set(vcpu, ram, blob(flags=GM, data=data)).returns == 0
        vcpu.tsc = 40 << 5
        exit_to_l1(vcpu, ram, 52)
        left = int.from_bytes(vcpu.vmx.vmcs12[928:932], "little")
        assert left == (100 if era == "kvm-2019" else 60)
