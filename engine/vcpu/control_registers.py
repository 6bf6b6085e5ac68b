"""What VMX and CPUID allow of CR0 and CR4: bits that are fixed in VMX operation, who may set CR4.VMXE and CR4.LA57.

Source: SDM vol. 3, "VMX-Fixed Bits in CR0" and "… CR4"; vmx_set_cr4 of Linux 5.3, vmx_is_valid_cr4 and
vmx_is_valid_cr0 of 7.1.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from engine.arch import vmx_msrs as vmx
from engine.arch.hyperv_cpuid import CpuidEntry
from engine.arch.paging import CR4_LA57
from engine.vcpu import cpuid as cpuid_facts
from engine.vcpu.registers import CR0_PE, CR0_PG, CR4_VMXE, active_secondary
from engine.vcpu.vcpu import Vcpu


def respects_fixed_bits(vcpu: Vcpu, register: str, value: int, relaxed: int = 0) -> bool:
    """``register``, cr0 or cr4, has the fixed bits as they must be; ``relaxed`` bits need not be set."""
    own = vcpu.capabilities.values
    fixed1 = own["cr0_fixed1"] if register == "cr0" else cpuid_facts.cr4_allowed(vcpu.cpuid)
    fixed0 = own[f"{register}_fixed0"] & ~relaxed
    return (value & fixed1 | fixed0) == value


def guest_cr0_valid(vcpu: Vcpu, value: int) -> bool:
    """CR0 of an L2 has its fixed bits; PE and PG are not among them where vmcs12 asks for an unrestricted guest."""
    offered = vcpu.capabilities.controls["secondary"].may1
    unrestricted = active_secondary(vcpu.vmx.vmcs12) & offered & vmx.SEC_UNRESTRICTED_GUEST
    return respects_fixed_bits(vcpu, "cr0", value, CR0_PE | CR0_PG if unrestricted else 0)


def vmx_allows_cr0(vcpu: Vcpu, value: int) -> bool:
    """The fixed bits of L2 while it runs, of VMX operation under VMXON."""
    if vcpu.vmx.guest_mode:
        return guest_cr0_valid(vcpu, value)
    return not vcpu.vmx.vmxon or respects_fixed_bits(vcpu, "cr0", value)


def vmx_allows_cr4(vcpu: Vcpu, value: int) -> bool:
    """VMXE only with VMX in the guest CPUID and outside of SMM; the fixed bits while the vCPU is in VMX operation."""
    if value & CR4_VMXE and (not vcpu.vmx_allowed or vcpu.smm):
        return False
    return not vcpu.vmx.vmxon or respects_fixed_bits(vcpu, "cr4", value)


def cpuid_allows_cr4(entries: Iterable[CpuidEntry], value: int) -> bool:
    """LA57 only where the guest CPUID has it. Linux 5.3 looks at this bit from 5.3.6 on (3ca94192278c)."""
    return not value & CR4_LA57 or cpuid_facts.has_la57(entries)


def vmcs_takes_cr4(entries: Sequence[CpuidEntry], value: int) -> bool:
    """The same of CR4 as a field that a client stores; a vCPU that was given no CPUID takes any value there."""
    return not entries or cpuid_allows_cr4(entries, value)
