"""IA32_APIC_BASE of a vCPU: where its local APIC is and in which mode, and which values KVM takes.

Source: SDM vol. 3, "Local APIC Status and Location" and "x2APIC States"; kvm_apic_set_base of Linux 5.3 and 7.1.
"""

from __future__ import annotations

from engine.vcpu import cpuid as cpuid_facts
from engine.vcpu.vcpu import Vcpu

APIC_BASE = 0x1B
ENABLED = 1 << 11
X2APIC = 1 << 10
_BOOT = 1 << 8
_FIRST = 0xFEE0_0000 | ENABLED
_RESERVED = 0x2FF


def apic_base(vcpu: Vcpu) -> int:
    """The value, after RESET at first: enabled at its usual place, with a flag on the boot processor."""
    return vcpu.msrs.get(APIC_BASE, _FIRST | _BOOT if vcpu.vcpu_id == vcpu.boot_vcpu else _FIRST)


def in_x2apic_mode(vcpu: Vcpu) -> bool:
    """The registers of the local APIC are MSRs 0x800 to 0x8FF."""
    return bool(apic_base(vcpu) & X2APIC)


def takes_apic_base(vcpu: Vcpu, value: int, host: bool) -> bool:
    """Whether KVM takes ``value``: no bit that the guest CPUID lacks, and no x2APIC in an APIC that is off.

    The guest itself may not go from x2APIC back to xAPIC, nor switch an APIC that is off to x2APIC at once. Later
    kernels take the value that is there without looking at it.
    """
    old = apic_base(vcpu)
    if value == old and vcpu.kvm.vcpu.takes_same_apic_base:
        return True
    x2apic_known = cpuid_facts.features_ecx(vcpu.cpuid) & cpuid_facts.ECX1_X2APIC
    if value >> vcpu.maxphyaddr or value & _RESERVED or (value & X2APIC and not x2apic_known):
        return False
    if value & X2APIC and not value & ENABLED:
        return False
    if host:
        return True
    leaves_x2apic = bool(old & X2APIC) and value & (ENABLED | X2APIC) == ENABLED
    return not leaves_x2apic and not (value & X2APIC and not old & ENABLED)
