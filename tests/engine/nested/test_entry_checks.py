"""Every VM-entry check: a vmcs12 that it refuses, in the kernels that have it; and the order of the checks."""

from __future__ import annotations

from typing import Any

import pytest

from engine.arch import vmx_msrs as vmx
from engine.arch.paging import canonical
from engine.nested import ENTRY_CHECKS
from engine.nested.entry_context import pat_valid
from engine.vcpu.vcpu import VcpuHost
from tests.engine.nested.entry_check_cases import APIC, CASES, EPT, GOOD_EPT, VALID, secondary
from tests.engine.nested.support import ERAS, GM, MIN32, MIN64, RP, blob, do_set, make_vcpu, vmcs12, vmx_cpuid
from tests.engine.ram import Ram

ALL_SECONDARY = {
    "IA32_VMX_PROCBASED_CTLS2": 0xFFFF_FFFF << 32,
    "IA32_VMX_TRUE_PINBASED_CTLS": 0xFF << 32 | 0x16,
    "IA32_VMX_TRUE_EXIT_CTLS": 0x10FF_FFFF << 32 | 0x36DFB,
    "IA32_VMX_TRUE_ENTRY_CTLS": 0x0011_FFFF << 32 | 0x11FB,
}


def label(era: str, changes: dict[str, int], flags: int = GM, **vcpu: Any) -> str:
    host = VcpuHost(maxphyaddr=39, vmx_capabilities=ALL_SECONDARY)
    fresh = make_vcpu(era, host=host, **vcpu)
    return do_set(fresh, Ram(), blob(flags=flags, data=vmcs12(MIN32, **changes))).label


@pytest.mark.parametrize("era", ERAS)
@pytest.mark.parametrize(("name", "changes"), CASES, ids=[f"{name}-{n}" for n, (name, _) in enumerate(CASES)])
def test_refused(name: str, changes: dict[str, int], era: str) -> None:
    check = next(check for check in ENTRY_CHECKS if check.name == name)
    if era in check.profiles:
        assert label(era, changes) == f"V21 {name}"
    else:
        assert label(era, changes) != f"V21 {name}"


@pytest.mark.parametrize("era", ERAS)
@pytest.mark.parametrize(
    "changes",
    [
        MIN64,
        secondary(EPT, **GOOD_EPT),
        secondary(EPT, ept_pointer=0x5E),
        secondary(EPT | vmx.SEC_UNRESTRICTED_GUEST, **GOOD_EPT, guest_cr0=0x20),
        secondary(vmx.SEC_VPID, virtual_processor_id=1),
        {"vm_exit_msr_load_count": 1, "vm_exit_msr_load_addr": 0x10},
        {"vm_entry_intr_info_field": VALID | 2 << 8 | 2},
        {"vm_entry_intr_info_field": VALID | 1 << 11 | 3 << 8 | 13},
        {"vm_entry_intr_info_field": VALID | 6 << 8 | 3, "vm_entry_instruction_len": 1},
        {"vm_entry_intr_info_field": VALID | 7 << 8},
        {"vm_exit_controls": 0x000B_6DFB, "host_ia32_pat": 0x0007_0406_0007_0406},
        {**MIN64, "vm_exit_controls": 0x0023_6FFB, "host_ia32_efer": 0xD01},
        {"vm_entry_controls": 0x51FB},
        {"guest_activity_state": 1},
        secondary(
            vmx.SEC_INTERRUPT_DELIVERY,
            pin_based_vm_exec_control=0x97,
            cpu_based_vm_exec_control=APIC,
            vm_exit_controls=0x3EDFB,
            posted_intr_nv=0xF2,
            posted_intr_desc_addr=0x40,
        ),
    ],
)
def test_accepted(changes: dict[str, int], era: str) -> None:
    assert label(era, changes) == "V23"


def test_differences_between_the_kernels() -> None:
    old, new = ERAS
    wide_code = {"vm_entry_intr_info_field": VALID | 1 << 11 | 3 << 8 | 13, "vm_entry_exception_error_code": 0x8000}
    assert (label(old, wide_code), label(new, wide_code)) == ("V21 ctl:event", "V23")
    control_protection = {"vm_entry_intr_info_field": VALID | 1 << 11 | 3 << 8 | 21}
    assert (label(old, control_protection), label(new, control_protection)) == ("V21 ctl:event", "V23")
    five_levels = secondary(EPT, ept_pointer=0x26)
    assert (label(old, five_levels), label(new, five_levels)) == ("V21 ctl:eptp", "V23")
    long_list = {"vm_exit_msr_load_count": 513}
    assert (label(old, long_list), label(new, long_list)) == ("V23", "V21 ctl:exitload")


def test_pending_runs_check_the_guest_efer() -> None:
    for era in ERAS:
        changes = {"vm_entry_controls": 0x91FB, "guest_ia32_efer": 0x400}
        assert label(era, changes) == "V23"
        assert label(era, changes, flags=GM + RP) == "V21 guest:guest efer"


@pytest.mark.parametrize("field", ["pin", "proc", "secondary", "exit", "entry", "vmfunc"])
def test_evmcs_masks_of_the_newest_kernel(field: str) -> None:
    name, changes = {
        "pin": ("pin_based_vm_exec_control", {"pin_based_vm_exec_control": 0x56}),
        "proc": ("cpu_based_vm_exec_control", {"cpu_based_vm_exec_control": 0x0400_6173}),
        "secondary": ("secondary_vm_exec_control", {"secondary_vm_exec_control": 1}),
        "exit": ("vm_exit_controls", {"vm_exit_controls": 0x0043_6DFB, "pin_based_vm_exec_control": 0x16}),
        "entry": ("vm_entry_controls", {"vm_entry_controls": 0x0008_11FB}),
        "vmfunc": ("vm_function_control", {"vm_function_control": 1}),
    }[field]
    got = label("kvm-latest", changes, evmcs=True, hyperv=True)
    reachable = field in ("pin", "secondary", "vmfunc")
    assert got.startswith("V21 ctl:")
    assert (got == f"V21 ctl:evmcs {name}") == reachable
    assert label("kvm-latest", changes, evmcs=True).find("evmcs") < 0


def test_ids_are_unique_and_in_order() -> None:
    names = [check.name for check in ENTRY_CHECKS]
    assert len(set(names)) == len(names)
    areas = [name.split(":")[0] for name in names]
    assert areas == sorted(areas, key=["ctl", "host", "guest"].index)


def test_small_predicates() -> None:
    assert canonical(0) and canonical((1 << 47) - 1) and canonical(0xFFFF_8000_0000_0000)
    assert not canonical(1 << 47) and canonical(1 << 47, 57)
    assert pat_valid(0x0007_0406_0007_0406) and not pat_valid(2)


def test_performance_counters_come_from_cpuid() -> None:
    from engine.arch.hyperv_cpuid import CpuidEntry

    counters = (*vmx_cpuid(), CpuidEntry(0xA, eax=2 | 4 << 8, edx=3))
    changes = {"vm_entry_controls": 0x31FB, "guest_ia32_perf_global_ctrl": 0x7_0000_000F}
    assert label("kvm-latest", changes, cpuid=counters) == "V23"
    changes["guest_ia32_perf_global_ctrl"] = 0x10
    assert label("kvm-latest", changes, cpuid=counters) == "V21 guest:guest perf"


@pytest.mark.parametrize("era", ERAS)
def test_a_host_without_ept_offers_none(era: str) -> None:
    vcpu = make_vcpu(era, host=VcpuHost(maxphyaddr=39, ept=False))
    data = vmcs12(MIN32, **secondary(EPT, **GOOD_EPT))
    assert do_set(vcpu, Ram(), blob(flags=GM, data=data)).label == "V21 ctl:sec"
    assert vcpu.capabilities.values["ept_vpid"] == 0xF01 << 32
