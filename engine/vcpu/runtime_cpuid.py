"""The CPUID leaves that follow the state of a vCPU, whatever user space put there: kvm_update_cpuid and its successor.

OSXSAVE and OSPKE are what CR4 says, APIC is whether the local APIC is on, and leaf 0xD has the size of the XSAVE area
for the components of XCR0. Source: arch/x86/kvm/cpuid.c of Linux 5.3 and 7.1; SDM vol. 2, CPUID.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

from engine.arch.hyperv_cpuid import CpuidEntry, find_leaf
from engine.vcpu import apic_base
from engine.vcpu.extended_state import AREA_SIZE, AVX, AVX_AT, xcr0
from engine.vcpu.registers import CR4_OSXSAVE, CR4_PKE
from engine.vcpu.vcpu import Vcpu

_ECX1_OSXSAVE, _EDX1_APIC, _ECX7_OSPKE = 1 << 27, 1 << 9, 1 << 4
_EAX13_COMPACTS = 1 << 1 | 1 << 3  # XSAVEC, XSAVES


def current_cpuid(vcpu: Vcpu) -> tuple[CpuidEntry, ...]:
    """What KVM_GET_CPUID2 gives, and CPUID in the guest: the leaves that were set, by the state of now."""
    return with_state(vcpu, vcpu.cpuid)


def with_state(vcpu: Vcpu, entries: tuple[CpuidEntry, ...]) -> tuple[CpuidEntry, ...]:
    """``entries`` as the vCPU would show them. In 2019 none is touched where leaf 1 is missing."""
    if vcpu.kvm.vcpu.runtime_cpuid_needs_leaf_1 and find_leaf(entries, 1) is None:
        return entries
    shown = list(entries)
    for (function, index), follow in _FOLLOWS.items():
        leaf = find_leaf(shown, function, index)
        if leaf is not None:
            shown[shown.index(leaf)] = follow(vcpu, leaf)
    return tuple(shown)


def _leaf_1(vcpu: Vcpu, leaf: CpuidEntry) -> CpuidEntry:
    osxsave = _ECX1_OSXSAVE if vcpu.registers["cr4"] & CR4_OSXSAVE else 0
    apic = _EDX1_APIC if apic_base.apic_base(vcpu) & apic_base.ENABLED else 0
    return replace(leaf, ecx=leaf.ecx & ~_ECX1_OSXSAVE | osxsave, edx=leaf.edx & ~_EDX1_APIC | apic)


def _leaf_7(vcpu: Vcpu, leaf: CpuidEntry) -> CpuidEntry:
    ospke = _ECX7_OSPKE if vcpu.registers["cr4"] & CR4_PKE else 0
    return replace(leaf, ecx=leaf.ecx & ~_ECX7_OSPKE | ospke)


def _leaf_13(vcpu: Vcpu, leaf: CpuidEntry) -> CpuidEntry:
    return replace(leaf, ebx=_xsave_size(vcpu))


def _leaf_13_compacted(vcpu: Vcpu, leaf: CpuidEntry) -> CpuidEntry:
    return replace(leaf, ebx=_xsave_size(vcpu)) if leaf.eax & _EAX13_COMPACTS else leaf


def _xsave_size(vcpu: Vcpu) -> int:
    """The standard form and the compacted one are of one size as long as AVX is the last component there is."""
    return AREA_SIZE if xcr0(vcpu) & AVX else AVX_AT


_FOLLOWS: Mapping[tuple[int, int], Callable[[Vcpu, CpuidEntry], CpuidEntry]] = {
    (1, 0): _leaf_1,
    (7, 0): _leaf_7,
    (0xD, 0): _leaf_13,
    (0xD, 1): _leaf_13_compacted,
}
