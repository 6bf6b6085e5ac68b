"""Reading and writing MSRs of a vCPU, one by one and by the lists of a VM entry or exit.

The MSRs with rules are handled here: EFER, FEATURE_CONTROL, the VMX capability MSRs, four of Hyper-V's, APIC_BASE,
the microcode revision and HWCR.
Any other number is stored as it is, so that MSR lists and restores of a whole vCPU find their values again.
GUEST_OS_ID and HYPERCALL belong to the partition; a caller with several vCPUs writes them to each.
"""

from __future__ import annotations

from engine.arch import hyperv_cpuid as leaves
from engine.arch import vmx_msrs as vmx
from engine.arch.hyperv_cpuid import find_leaf
from engine.kvm.memory_views import GuestMemory
from engine.vcpu import cpuid as cpuid_facts
from engine.vcpu.apic_base import APIC_BASE, apic_base, in_x2apic_mode, takes_apic_base
from engine.vcpu.msr_numbers import HV_GUEST_OS_ID, HV_HYPERCALL, HV_VP_ASSIST_PAGE, HV_VP_INDEX, K7_HWCR
from engine.vcpu.vcpu import Vcpu
from engine.vcpu.vmx_capabilities import CR4_FIXED1

_FS_BASE, _GS_BASE = 0xC000_0100, 0xC000_0101
_SMM_MONITOR_CTL, _SMBASE = 0x9B, 0x9E
_MICROCODE_REVISION = 0x8B
_MICROCODE = frozenset({0x79, _MICROCODE_REVISION})
_FIRST_REVISION = {"intel": 1 << 32, "amd": 0x0100_0065}
# Bits of HWCR that are dropped: TLB cache and flush filter disable, IGNNE emulation.
_HWCR_DROPPED = 1 << 3 | 1 << 6 | 1 << 8
# Registers that are also MSRs.
_REGISTER_MSRS = {
    vmx.EFER: "ia32_efer",
    0x277: "ia32_pat",
    0x1D9: "ia32_debugctl",
    0x174: "sysenter_cs",
    0x175: "sysenter_esp",
    0x176: "sysenter_eip",
    0xD90: "bndcfgs",
    _FS_BASE: "fs_base",
    _GS_BASE: "gs_base",
}
REGISTER_MSR_NAMES = {
    vmx.EFER: "IA32_EFER",
    0x277: "IA32_PAT",
    0x1D9: "IA32_DEBUGCTL",
    0x174: "IA32_SYSENTER_CS",
    0x175: "IA32_SYSENTER_ESP",
    0x176: "IA32_SYSENTER_EIP",
    0xD90: "IA32_BNDCFGS",
    _FS_BASE: "IA32_FS_BASE",
    _GS_BASE: "IA32_GS_BASE",
}
_ENABLE = 0x1
# VMCALL; RET, and on AMD VMMCALL; RET
_HYPERCALL_CODE = {"intel": bytes((0x0F, 0x01, 0xC1, 0xC3)), "amd": bytes((0x0F, 0x01, 0xD9, 0xC3))}
# What the guest needs in CPUID 0x40000003.EAX for an MSR, where KVM holds it to its CPUID
_NEEDED = {
    HV_GUEST_OS_ID: leaves.FEATURES_EAX_HYPERCALL_MSRS,
    HV_HYPERCALL: leaves.FEATURES_EAX_HYPERCALL_MSRS,
    HV_VP_INDEX: leaves.FEATURES_EAX_VP_INDEX,
    HV_VP_ASSIST_PAGE: leaves.FEATURES_EAX_ASSIST_MSR,
}
_LIST_ENTRY = 16


def read_msr(vcpu: Vcpu, number: int, host: bool) -> int | None:
    """RDMSR by the guest, or KVM_GET_MSRS when ``host``. None when it faults."""
    if vmx.VMX_MSR_FIRST <= number <= vmx.VMX_MSR_LAST:
        return _read_capability(vcpu, number, host)
    if number in _REGISTER_MSRS:
        return vcpu.registers[_REGISTER_MSRS[number]]
    if not host and _withheld(vcpu, number):
        return None
    if number == HV_VP_INDEX:
        return vcpu.vp_index
    if number == APIC_BASE:
        return apic_base(vcpu)
    if number == _MICROCODE_REVISION:
        return vcpu.msrs.get(number, _FIRST_REVISION[vcpu.host.vendor])
    return vcpu.msrs.get(number, 0)


def write_msr(vcpu: Vcpu, memory: GuestMemory, number: int, value: int, host: bool) -> bool:
    """WRMSR by the guest, or KVM_SET_MSRS when ``host``. False when it faults, and then nothing has changed.

    Writing 0 to FEATURE_CONTROL from the host also leaves nested mode: ``operations.set_msr`` does that.
    """
    if vmx.VMX_MSR_FIRST <= number <= vmx.VMX_MSR_LAST:
        return host and _write_capability(vcpu, number, value)
    if number == vmx.IA32_FEATURE_CONTROL:
        return _write_feature_control(vcpu, value, host)
    if number == K7_HWCR:
        return _write_hwcr(vcpu, value)
    if number == _MICROCODE_REVISION and not host:
        return True
    if number == APIC_BASE and not takes_apic_base(vcpu, value, host):
        return False
    if not host and _withheld(vcpu, number):
        return False
    if number == HV_VP_INDEX:
        if not host or value & 0xFFFF_FFFF >= vcpu.host.max_vcpus:
            return False
        vcpu.vp_index = value & 0xFFFF_FFFF
        return True
    if number in (HV_GUEST_OS_ID, HV_HYPERCALL, HV_VP_ASSIST_PAGE):
        return _write_hyperv(vcpu, memory, number, value)
    if number in _REGISTER_MSRS:
        vcpu.registers[_REGISTER_MSRS[number]] = value
    else:
        vcpu.msrs[number] = value
    return True


def load_msr_list(vcpu: Vcpu, memory: GuestMemory, address: int, count: int) -> int:
    """Load the MSRs that a list of 16-byte entries in guest memory names. 0, or the 1-based position that failed.

    Entries past the advertised maximum fail, in both kernels: in 2019 the list could be as long as memory.
    """
    for position in range(count):
        if position == longest_list(vcpu):
            return position + 1
        raw = memory.read(address + position * _LIST_ENTRY, _LIST_ENTRY)
        if raw is None:
            return position + 1
        number, reserved, value = _entry(raw)
        refused = number in (_FS_BASE, _GS_BASE, _SMM_MONITOR_CTL) or _never_listed(vcpu, number) or reserved
        if refused or not write_msr(vcpu, memory, number, value, host=False):
            return position + 1
    return 0


def store_msr_list(vcpu: Vcpu, memory: GuestMemory, address: int, count: int) -> int:
    """Store the MSRs that a list names into that list. 0, or the 1-based position that failed."""
    for position in range(count):
        if position == longest_list(vcpu):
            return position + 1
        where = address + position * _LIST_ENTRY
        raw = memory.read(where, _LIST_ENTRY)
        if raw is None:
            return position + 1
        number, reserved, _ = _entry(raw)
        if number == _SMBASE or _never_listed(vcpu, number) or reserved:
            return position + 1
        value = read_msr(vcpu, number, host=False)
        if value is None or not memory.write(where + 8, value.to_bytes(8, "little")):
            return position + 1
    return 0


def longest_list(vcpu: Vcpu) -> int:
    """Entries that an MSR list may have: 512 for each step of IA32_VMX_MISC bits 27:25."""
    return ((vcpu.capabilities.values["misc"] >> 25 & 7) + 1) * 512


def _entry(raw: bytes) -> tuple[int, int, int]:
    return tuple(int.from_bytes(raw[at:end], "little") for at, end in ((0, 4), (4, 8), (8, 16)))  # type: ignore[return-value]


def _never_listed(vcpu: Vcpu, number: int) -> bool:
    return (number >> 8 == 8 and in_x2apic_mode(vcpu)) or number in _MICROCODE


def _read_capability(vcpu: Vcpu, number: int, host: bool) -> int | None:
    if not vcpu.vmx_allowed:
        return None
    if number == CR4_FIXED1:
        return cpuid_facts.cr4_allowed(vcpu.cpuid)
    value = vcpu.capabilities.read(number)
    if value is None or host or vcpu.kvm.nested.evmcs_clears_controls or not vcpu.evmcs_visible:
        return value
    perf_global = bool(cpuid_facts.nested_ebx(vcpu.cpuid) & 1)
    return vcpu.capabilities.filtered_for_evmcs(number, value, perf_global)


def _write_capability(vcpu: Vcpu, number: int, value: int) -> bool:
    if not vcpu.vmx_allowed or vcpu.vmx.vmxon:
        return False
    own, host = vcpu.capabilities, vcpu.host.capabilities(vcpu.profile)
    return own.write(number, value, own if vcpu.kvm.vcpu.capabilities_only_shrink else host)


def _write_feature_control(vcpu: Vcpu, value: int, host: bool) -> bool:
    allowed = vmx.FEATURE_CONTROL_LOCKED
    if vcpu.vmx_allowed:
        allowed |= vmx.FEATURE_CONTROL_VMXON_IN_SMX | vmx.FEATURE_CONTROL_VMXON
    if host:
        allowed |= vcpu.kvm.vcpu.feature_control_of_host
    locked = vcpu.msrs.get(vmx.IA32_FEATURE_CONTROL, 0) & vmx.FEATURE_CONTROL_LOCKED
    if value & ~allowed or (locked and not host):
        return False
    vcpu.msrs[vmx.IA32_FEATURE_CONTROL] = value
    return True


def _write_hwcr(vcpu: Vcpu, value: int) -> bool:
    """HWCR takes the bits that KVM knows. In 2019 a write of none of them leaves the register as it was."""
    value &= ~_HWCR_DROPPED
    if value & ~vcpu.kvm.vcpu.hwcr_bits:
        return False
    if value or vcpu.kvm.vcpu.hwcr_clears:
        vcpu.msrs[K7_HWCR] = value
    return True


def _withheld(vcpu: Vcpu, number: int) -> bool:
    """Whether KVM keeps an MSR of Hyper-V from a guest whose CPUID does not show it."""
    if not vcpu.enforces_cpuid or number not in _NEEDED:
        return False
    leaf = find_leaf(vcpu.cpuid, leaves.LEAF_FEATURES)
    return leaf is None or not leaf.eax & _NEEDED[number]


def _write_hyperv(vcpu: Vcpu, memory: GuestMemory, number: int, value: int) -> bool:
    if number == HV_GUEST_OS_ID:
        if not value:
            vcpu.msrs[HV_HYPERCALL] = vcpu.msrs.get(HV_HYPERCALL, 0) & ~_ENABLE
    elif number == HV_HYPERCALL:
        if not vcpu.msrs.get(HV_GUEST_OS_ID):
            return True
        if value & _ENABLE and not memory.write(value & ~0xFFF, _HYPERCALL_CODE[vcpu.host.vendor]):
            return False
    elif value & _ENABLE and not memory.write(value & ~0xFFF, bytes(4)):
        # Only the APIC part of the assist page is cleared: the rest may be state that was just restored.
        return False
    vcpu.msrs[number] = value
    return True
