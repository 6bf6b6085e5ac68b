"""The tables of a guest hypervisor, walked for its guest: what the manuals refuse, no address comes out of."""

from __future__ import annotations

import pytest

from engine.arch.hyperv_cpuid import CpuidEntry
from engine.arch.hyperv_pages import VMCB_CONTROL_NESTED_CR3
from engine.arch.vmcs12 import put
from engine.hyperv.nested_paging import translate
from engine.vcpu.vcpu import Vcpu, VcpuHost
from tests.engine.ram import Ram

WIDTH = 46
ROOT = 0x1000
# One table a page from the root down; the walks begin at index 0 of each.
GPA = 0x123
FRAME = 0x40000000
ALL = 7
EPT_VPID = 0x0633_4141  # execute-only, four levels, UC and WB, 2 MiB and 1 GiB


def table(level: int, levels: int = 4) -> int:
    return ROOT + 0x1000 * (levels - level)


def cpuid_of(width: int) -> tuple[CpuidEntry, ...]:
    return CpuidEntry(0x8000_0000, eax=0x8000_0008), CpuidEntry(0x8000_0008, eax=width)


def ept_vcpu(*, levels: int = 4, capabilities: int = EPT_VPID, secondary: int = 2) -> Vcpu:
    vcpu = Vcpu(
        cpuid=cpuid_of(WIDTH),
        host=VcpuHost(vmx_capabilities={"IA32_VMX_EPT_VPID_CAP": capabilities}),
    )
    put(vcpu.vmx.vmcs12, "cpu_based_vm_exec_control", 1 << 31)
    put(vcpu.vmx.vmcs12, "secondary_vm_exec_control", secondary)
    put(vcpu.vmx.vmcs12, "ept_pointer", ROOT | (levels - 1) << 3 | 6)
    vcpu.vmx.guest_mode = True
    return vcpu


def npt_vcpu() -> Vcpu:
    vcpu = Vcpu(host=VcpuHost(vendor="amd"), cpuid=cpuid_of(WIDTH))
    vcpu.svm.vmcb12[VMCB_CONTROL_NESTED_CR3 : VMCB_CONTROL_NESTED_CR3 + 8] = ROOT.to_bytes(8, "little")
    vcpu.svm.vmcb12[0x90] = 1
    vcpu.svm.guest_mode = True
    return vcpu


def tables(entries: dict[int, int], levels: int = 4) -> Ram:
    """Tables in which each level leads to the next, and the PTE to FRAME; ``entries`` replaces those of some levels."""
    ram = Ram()
    for level in range(1, levels + 1):
        entry = FRAME | ALL if level == 1 else table(level - 1, levels) | ALL
        ram.put(table(level, levels), entries.get(level, entry) & (1 << 64) - 1)
    return ram


@pytest.mark.parametrize(
    ("entries", "why"),
    [
        ({1: FRAME | 2 << 3 | ALL}, "memory type 2 is reserved"),
        ({1: FRAME | 3 << 3 | ALL}, "memory type 3 is reserved"),
        ({1: FRAME | 7 << 3 | ALL}, "memory type 7 is reserved"),
        ({3: table(2) | 0x78 | ALL}, "bits 6:3 of a PDPTE that names a table"),
        ({2: table(1) | 0x08 | ALL}, "bits 6:3 of a PDE that names a table"),
        ({4: table(3) | 0x80 | ALL}, "bits 7:3 of a PML4E"),
        ({1: FRAME | 1 << 51 | ALL}, "bits 51:N"),
        ({1: FRAME | 1 << WIDTH | ALL}, "bits 51:N"),
        ({4: table(3) | 1 << 51 | ALL}, "bits 51:N, of a table"),
        ({1: FRAME | 2}, "writable and not readable"),
        ({2: table(1) | 6}, "writable and not readable, of a table"),
        ({2: 0x20_1000 | 0x80 | ALL}, "bit 12 of a 2-MiB leaf"),
        ({3: 0x4020_0000 | 0x80 | ALL}, "bit 21 of a 1-GiB leaf"),
        ({1: FRAME | 4}, "execute-only is no right to read"),
        ({1: FRAME}, "not present"),
        ({3: table(2) | 4}, "a right counts if all entries have it"),
        ({3: 1 << 30 | ALL}, "a table where no memory is"),
    ],
)
def test_ept_refuses(entries: dict[int, int], why: str) -> None:
    """SDM volume 3C, 29.3.3.1 and 29.3.3.2."""
    assert translate(ept_vcpu(), tables(entries), GPA) is None, why


@pytest.mark.parametrize(
    ("entries", "gpa", "found"),
    [
        ({}, GPA, FRAME | GPA),
        ({1: FRAME | 6 << 3 | ALL}, GPA, FRAME | GPA),
        ({1: FRAME | 1 << 3 | 1}, GPA, FRAME | GPA),
        ({1: FRAME | 0x80 | ALL}, GPA, FRAME | GPA),  # bit 7 of a PTE is ignored
        ({1: FRAME | 1 << (WIDTH - 1) | ALL}, GPA, FRAME | 1 << (WIDTH - 1) | GPA),
        ({1: FRAME | 0xFFF << 52 | ALL}, GPA, FRAME | GPA),  # 63:52 are ignored
        ({2: 0x20_0000 | 0x80 | ALL}, 0x1F_FFFF, 0x3F_FFFF),
        ({3: 0x4000_0000 | 0x80 | ALL}, 0x3FFF_FFFF, 0x7FFF_FFFF),
        ({}, 1 << 48, None),
    ],
)
def test_ept_translates(entries: dict[int, int], gpa: int, found: int | None) -> None:
    assert translate(ept_vcpu(), tables(entries), gpa) == found


def test_what_the_capabilities_of_the_vcpu_do_not_offer_is_misconfigured() -> None:
    """29.3.3.1: a page size without support has bit 7 reserved, as execute-only entries are without theirs."""
    assert translate(ept_vcpu(capabilities=EPT_VPID & ~(1 << 16)), tables({2: 0x20_0087}), GPA) is None
    assert translate(ept_vcpu(capabilities=EPT_VPID & ~(1 << 17)), tables({3: 0x4000_0087}), GPA) is None
    assert translate(ept_vcpu(capabilities=EPT_VPID & ~1), tables({1: FRAME | 4}), GPA) is None
    assert translate(ept_vcpu(capabilities=EPT_VPID & ~1), tables({1: FRAME | 5}), GPA) == FRAME | GPA


def test_a_walk_of_five_levels() -> None:
    vcpu = ept_vcpu(levels=5)
    assert translate(vcpu, tables({}, 5), GPA) == FRAME | GPA
    assert translate(vcpu, tables({5: table(4, 5) | 0x80 | ALL}, 5), GPA) is None  # bits 7:3 of a PML5E
    ram = tables({}, 5)
    ram.put(table(5, 5) + 8, table(4, 5) | ALL)
    assert translate(vcpu, ram, 1 << 48) == FRAME
    assert translate(vcpu, ram, 1 << 57) is None


@pytest.mark.parametrize("width", [36, 52])
def test_the_width_is_that_of_the_vcpus_cpuid(width: int) -> None:
    vcpu = ept_vcpu()
    vcpu.cpuid = cpuid_of(width)
    ram = tables({1: FRAME | 1 << 40 | ALL})
    assert translate(vcpu, ram, GPA) == (FRAME | 1 << 40 | GPA if width == 52 else None)


@pytest.mark.parametrize(
    ("entries", "found"),
    [
        ({}, FRAME | GPA),
        ({1: FRAME | 5}, FRAME | GPA),
        ({1: FRAME | 0x80 | 0x10 | ALL}, FRAME | GPA),  # PAT and PCD
        ({1: FRAME | 1 << 63 | 1 << 52 | ALL}, FRAME | GPA),  # execute-disable, and bits for software
        ({2: 0x20_0000 | 0x1000 | 0x80 | ALL}, 0x20_0000 | GPA),  # PAT of a large page
        ({3: 0x4000_0000 | 0x180 | ALL}, 0x4000_0000 | GPA),  # global
        ({1: FRAME | 6}, None),  # not present, whatever else it says
        ({1: FRAME | 3}, None),  # an access of the guest is a user's
        ({3: table(2) | 3}, None),
        ({1: FRAME | 1 << WIDTH | ALL}, None),
        ({4: table(3) | 1 << 51 | ALL}, None),
        ({4: table(3) | 0x80 | ALL}, None),
        ({4: table(3) | 0x100 | ALL}, None),
        ({3: table(2) | 0x100 | ALL}, None),
        ({2: table(1) | 0x100 | ALL}, FRAME | GPA),
        ({2: 0x20_2000 | 0x80 | ALL}, None),
        ({3: 0x4020_0000 | 0x80 | ALL}, None),
    ],
)
def test_nested_paging_of_amd(entries: dict[int, int], found: int | None) -> None:
    """APM volume 2, 5.4 and 15.25: entries of four-level paging."""
    assert translate(npt_vcpu(), tables(entries), GPA) == found


def test_nested_paging_of_amd_has_four_levels() -> None:
    assert translate(npt_vcpu(), tables({}), 1 << 48) is None
