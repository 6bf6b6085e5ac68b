"""CPUID leaves that follow CR4, XCR0 and the local APIC, whatever user space put there."""

from __future__ import annotations

import pytest

from engine.arch.hyperv_cpuid import CpuidEntry, find_leaf
from engine.nested import set_cpuid
from engine.vcpu.runtime_cpuid import current_cpuid
from engine.vcpu.vcpu import Vcpu
from tests.engine.nested.support import ERAS, make_vcpu, vmx_cpuid

OSXSAVE, APIC, OSPKE = 1 << 27, 1 << 9, 1 << 4


def leaf(vcpu: Vcpu, function: int, index: int = 0) -> CpuidEntry:
    found = find_leaf(current_cpuid(vcpu), function, index)
    assert found is not None
    return found


def flags(vcpu: Vcpu) -> tuple[bool, bool, bool]:
    one = leaf(vcpu, 1)
    return bool(one.ecx & OSXSAVE), bool(one.edx & APIC), bool(leaf(vcpu, 7).ecx & OSPKE)


@pytest.mark.parametrize("era", ERAS)
def test_flags_follow_the_state(era: str) -> None:
    vcpu = make_vcpu(era)
    assert flags(vcpu) == (False, True, False)
    vcpu.registers["cr4"] = 1 << 18
    assert flags(vcpu) == (True, True, False)
    vcpu.registers["cr4"] = 1 << 22
    vcpu.msrs[0x1B] = 0xFEE0_0000
    assert flags(vcpu) == (False, False, True)


@pytest.mark.parametrize("era", ERAS)
def test_flags_are_not_user_space_s(era: str) -> None:
    vcpu = make_vcpu(era, cpuid=(CpuidEntry(1, ecx=OSXSAVE | 1), CpuidEntry(7, flags=1, ecx=OSPKE | 8)))
    assert (leaf(vcpu, 1).ecx, leaf(vcpu, 1).edx, leaf(vcpu, 7).ecx) == (1, APIC, 8)


@pytest.mark.parametrize("era", ERAS)
def test_a_leaf_of_another_index_stays(era: str) -> None:
    second = CpuidEntry(7, 1, flags=1, ecx=OSPKE)
    vcpu = make_vcpu(era, cpuid=(CpuidEntry(1), second, CpuidEntry(7, flags=1)))
    vcpu.registers["cr4"] = 1 << 22
    assert current_cpuid(vcpu)[1:] == (second, CpuidEntry(7, flags=1, ecx=OSPKE))


def test_2019_needs_leaf_1() -> None:
    for era in ERAS:
        vcpu = make_vcpu(era, cpuid=(CpuidEntry(7, flags=1, ecx=OSPKE),))
        assert bool(leaf(vcpu, 7).ecx & OSPKE) == (era == "kvm-2019")


@pytest.mark.parametrize("era", ERAS)
def test_the_xsave_area_has_the_components_of_xcr0(era: str) -> None:
    compacted, plain = CpuidEntry(0xD, 1, flags=1, eax=2, ebx=7), CpuidEntry(0xD, 1, flags=1, eax=1, ebx=7)
    for second, sizes in ((compacted, (0x240, 0x340)), (plain, (7, 7))):
        vcpu = make_vcpu(era, cpuid=(CpuidEntry(1), CpuidEntry(0xD, flags=1, eax=7, ebx=0x340, ecx=0x340), second))
        assert (leaf(vcpu, 0xD).ebx, leaf(vcpu, 0xD).ecx, leaf(vcpu, 0xD, 1).ebx) == (0x240, 0x340, sizes[0])
        vcpu.registers["xcr0"] = 7
        assert (leaf(vcpu, 0xD).ebx, leaf(vcpu, 0xD, 1).ebx) == (0x340, sizes[1])


def test_what_follows_the_state_is_no_new_content() -> None:
    vcpu = make_vcpu("kvm-latest", has_run=True)
    vcpu.registers["cr4"] = 1 << 18
    assert set_cpuid(vcpu, current_cpuid(vcpu)) is None
    assert set_cpuid(vcpu, vmx_cpuid()) is None
    assert set_cpuid(vcpu, vmx_cpuid(width=40)) == "EINVAL"
