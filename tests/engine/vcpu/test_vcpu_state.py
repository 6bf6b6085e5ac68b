"""The vCPU state: durable form, copies, descriptions given by clients, registers, CPUID and MSRs."""

from __future__ import annotations

import json

import pytest

from engine.abi import UserBuffer, UserMemory
from engine.arch.hyperv_cpuid import CpuidEntry
from engine.arch.vmcs12 import VMCS12
from engine.errors import InvalidValue
from engine.kvm.memory_views import TrialMemory
from engine.machine import VirtualMachine
from engine.nested import exit_to_l1, reset, set_cpuid, set_msr
from engine.state.config import VmConfig
from engine.vcpu.cpuid import cr4_allowed, entries_from_json, entries_to_json, maxphyaddr, nested_ebx
from engine.vcpu.msrs import read_msr, write_msr
from engine.vcpu.vcpu import Vcpu, VcpuHost
from tests.engine.nested.support import ERAS, GM, MIN32, blob, do_set, make_vcpu, summary, vmcs12, vmx_cpuid
from tests.engine.ram import Ram


@pytest.mark.parametrize("era", ERAS)
def test_durable_form_round_trips(era: str) -> None:
    host = VcpuHost(vmx_capabilities={"IA32_VMX_VMFUNC": 0}, maxphyaddr=39)
    vcpu, ram = make_vcpu(era, host=host, evmcs=True), Ram()
    assert do_set(vcpu, ram, blob(flags=GM, data=vmcs12(MIN32, guest_rip=0x1234))).returns == 0
    head = json.loads(json.dumps(vcpu.to_head()))
    twin = Vcpu.from_head(head)
    assert twin == vcpu
    assert summary(twin, ram) == summary(vcpu, ram)


def test_copies_are_independent() -> None:
    vcpu, ram = make_vcpu("kvm-2019"), Ram()
    twin = vcpu.copy()
    do_set(twin, ram, blob(flags=GM, data=vmcs12(MIN32)))
    set_msr(twin, ram, 0x1234, 5)
    twin.capabilities.clear_for_evmcs()
    assert vcpu == make_vcpu("kvm-2019")


@pytest.mark.parametrize("era", ERAS)
def test_reset_leaves(era: str) -> None:
    vcpu, ram = make_vcpu(era), Ram()
    do_set(vcpu, ram, blob(flags=GM, data=vmcs12(MIN32)))
    reset(vcpu, ram)
    assert summary(vcpu, ram)[0] == 128


def test_descriptions_are_checked() -> None:
    with pytest.raises(InvalidValue):
        Vcpu(profile="kvm-2020")
    with pytest.raises(InvalidValue):
        VcpuHost(vendor="via")
    for name, value in (("IA32_VMX_NOTHING", 0), ("IA32_VMX_CR4_FIXED1", 0), ("IA32_VMX_BASIC", 1 << 64)):
        with pytest.raises(InvalidValue):
            Vcpu(host=VcpuHost(vmx_capabilities={name: value}))


def test_cpuid_as_json() -> None:
    entries = vmx_cpuid()
    assert entries_from_json(entries_to_json(entries)) == entries
    for bad in ({"eax": 1}, {"function": 1, "edi": 2}, {"function": 1 << 32}, {"function": "x"}):
        with pytest.raises(InvalidValue):
            entries_from_json([bad])


def test_cpuid_lookups() -> None:
    assert maxphyaddr(()) == 36
    assert maxphyaddr(entries_from_json([{"function": 0x80000000, "eax": 0x80000004}])) == 36
    assert maxphyaddr(vmx_cpuid(width=52)) == 52
    assert nested_ebx(()) == 0
    assert cr4_allowed(()) == 0x100
    assert cr4_allowed(vmx_cpuid()) & 0x2020 == 0x2020


@pytest.mark.parametrize("era", ERAS)
def test_msrs(era: str) -> None:
    vcpu, ram = make_vcpu(era), Ram()
    assert read_msr(vcpu, 0x480, host=True) == 0x00D8_1000_11E5_7ED0
    assert read_msr(vcpu, 0x489, host=False) == cr4_allowed(vcpu.cpuid)
    assert read_msr(make_vcpu(era, vmx=False), 0x480, host=True) is None
    assert not write_msr(vcpu, ram, 0x480, 0, host=False)
    assert write_msr(vcpu, ram, 0x3A, 5, host=False)
    assert not write_msr(vcpu, ram, 0x3A, 5, host=False)
    assert not set_msr(vcpu, ram, 0x3A, 1 << 21)
    assert set_msr(vcpu, ram, 0x40000002, 7)
    assert read_msr(vcpu, 0x40000002, host=False) == 7
    assert not write_msr(vcpu, ram, 0x40000002, 7, host=False)
    assert not set_msr(vcpu, ram, 0x40000002, 5000)


def test_hypercall_page() -> None:
    vcpu, ram = make_vcpu("kvm-2019"), Ram()
    assert set_msr(vcpu, ram, 0x40000001, 0x3001)
    assert read_msr(vcpu, 0x40000001, host=True) == 0
    assert set_msr(vcpu, ram, 0x40000000, 1)
    assert set_msr(vcpu, ram, 0x40000001, 0x3001)
    assert ram.read(0x3000, 4) == bytes((0x0F, 0x01, 0xC1, 0xC3))
    assert not set_msr(vcpu, ram, 0x40000001, 1 << 40 | 1)
    assert set_msr(vcpu, ram, 0x40000000, 0)
    assert read_msr(vcpu, 0x40000001, host=True) == 0x3000


def test_memory_helpers() -> None:
    ram = Ram()
    over = TrialMemory(ram)
    assert over.write(0x1FFE, b"abcd")
    assert over.read(0x1FFE, 4) == b"abcd" and over.read(0x1FFC, 8) == b"\0\0abcd\0\0"
    assert over.read(0x5000, 4) == bytes(4)
    assert not over.write(1 << 40, b"x")
    assert over.read(1 << 40, 1) is None
    assert not any(ram.bytes)
    with VirtualMachine.create(VmConfig()).nested.change(0) as (_, nothing):
        assert nothing.read(0, 1) is None and not nothing.write(0, b"x")
    user = UserMemory([(0x1000, bytearray(4))])
    assert user.write(0x1002, b"ab") and user.read(0x1000, 4) == b"\0\0ab"
    assert not user.write(0x1003, b"ab") and user.read(0xFFF, 2) is None
    assert UserBuffer.of(None).copy_from(0, 0) is None


def test_linear_address_width_of_cpuid() -> None:
    narrow = (CpuidEntry(0x8000_0008, eax=39 | 47 << 8),)
    for era, sticks in zip(ERAS, (True, False), strict=True):
        vcpu = Vcpu(profile=era)
        assert set_cpuid(vcpu, narrow) == "EINVAL"
        assert (vcpu.cpuid == narrow) == sticks
        assert set_cpuid(vcpu, (CpuidEntry(0x8000_0008, eax=39),)) is None


def test_classic_control_msrs_report_the_bits_that_true_ones_let_go() -> None:
    vcpu = make_vcpu("kvm-2019")
    values = {0x481: 0x16, 0x482: 0x0401_E172, 0x483: 0x36DFF, 0x484: 0x11FF}
    assert {number: (read_msr(vcpu, number, host=True) or 0) & 0xFFFF_FFFF for number in values} == values


def test_registers_that_are_msrs() -> None:
    vcpu, ram = make_vcpu("kvm-2019"), Ram()
    assert set_msr(vcpu, ram, 0x277, 0x0606_0606_0606_0606)
    assert vcpu.registers["ia32_pat"] == read_msr(vcpu, 0x277, host=False) == 0x0606_0606_0606_0606


@pytest.mark.parametrize("era", ERAS)
def test_conditional_registers_move_with_their_controls(era: str) -> None:
    pending = {
        "vm_entry_controls": 0x51FB | 1 << 16,
        "guest_ia32_pat": 0x0606_0606_0606_0606,
        "guest_bndcfgs": 0x1000,
        "cpu_based_vm_exec_control": 0x8420_6172,
        "secondary_vm_exec_control": 0x202,
        "ept_pointer": 0x1E,
        "pin_based_vm_exec_control": 0x17,
        "guest_cr4": 0x2020,
        "guest_pdptr2": 0x5001,
        "guest_intr_status": 0x1234,
        "vm_exit_controls": 0x00AB_6DFB,
        "host_ia32_pat": 0x0404_0404_0404_0404,
        "host_ia32_efer": 1,
    }
    capabilities = {
        "IA32_VMX_PROCBASED_CTLS2": 0xFFFF << 32,
        "IA32_VMX_TRUE_EXIT_CTLS": 0x00FF_FFFF << 32 | 0x36DFB,
        "IA32_VMX_TRUE_ENTRY_CTLS": 0x0001_FFFF << 32 | 0x11FB,
    }
    vcpu, ram = make_vcpu(era, host=VcpuHost(vmx_capabilities=capabilities)), Ram()
    result = do_set(vcpu, ram, blob(flags=GM | 2, data=vmcs12(MIN32, **pending)))
    assert result.label == "V23"
    names = ("ia32_pat", "bndcfgs", "pdptr2", "intr_status")
    assert [vcpu.registers[name] for name in names] == [0x0606_0606_0606_0606, 0x1000, 0x5001, 0x1234]
    vcpu.registers.update(pdptr2=0x6001, intr_status=0x99)
    exit_to_l1(vcpu, ram, 10)
    assert VMCS12.get(vcpu.vmx.vmcs12, "guest_pdptr2") == 0x6001
    assert VMCS12.get(vcpu.vmx.vmcs12, "guest_intr_status") == 0x99
    assert [vcpu.registers[name] for name in ("ia32_pat", "bndcfgs", "ia32_efer")] == [0x0404_0404_0404_0404, 0, 1]
