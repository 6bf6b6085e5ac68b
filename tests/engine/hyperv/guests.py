"""A machine whose guest uses Hyper-V: page tables in its memory, translations filled by accesses."""

from __future__ import annotations

from typing import Any

from engine.arch.hyperv_cpuid import CpuidEntry
from engine.hyperv.caller import Caller
from engine.kvm.slots import SlotSpec
from engine.machine import VirtualMachine
from engine.machine.hypercalls import HypercallReport, HypercallRequest
from engine.state.config import HostConfig, VcpuConfig, VmConfig
from engine.trace.single import AccessRequest, AccessResult
from tests.engine.builders import store_word

PAGE = 0x1000
GUEST_OS_ID, ASSIST_MSR = 0x40000000, 0x40000073
OS_ID = 0x8100 << 48
TABLES = 0x100000  # where page tables are
CR3 = TABLES
P1, P2 = 0x11000, 0x12000  # two test pages
TEST_PAGE = 0x00007F0000001000
CR4 = 0x6F0

CPUID = (
    CpuidEntry(0x40000001, eax=0x31237648),
    CpuidEntry(0x40000003, eax=0x70, edx=0x4010),
    CpuidEntry(0x40000004, eax=0x804),
    CpuidEntry(0x4000000A, eax=0xA0101),
)
VMX_CPUID = (
    CpuidEntry(1, ecx=1 << 5),
    CpuidEntry(0x80000000, eax=0x80000008),
    CpuidEntry(0x80000008, eax=46 | 48 << 8),
)


def hyperv_guest(
    vp_indices: tuple[int, ...] = (0, 2, 65), *, host: HostConfig | None = None, cpuid: Any = CPUID, **config: Any
) -> VirtualMachine:
    """A guest with 16 MiB and GUEST_OS_ID set, all vCPUs on the page tables at CR3."""
    settings = VmConfig(
        vcpus=tuple(VcpuConfig(i, vp_index, cpuid) for i, vp_index in enumerate(vp_indices)),
        translation_cache="model",
        host=host or HostConfig(),
        **config,
    )
    vm = VirtualMachine.create(settings, [SlotSpec(0, 0, 16 << 20)])
    vm.nested.write_msrs(0, [(GUEST_OS_ID, OS_ID)])
    for at, entry in ((CR3, TABLES + PAGE), (TABLES + PAGE, TABLES + 2 * PAGE), (TABLES + 2 * PAGE, TABLES + 3 * PAGE)):
        store_word(vm, at + _index(at) * 8, entry | 0x67)
    if host is None or host.vendor == "intel":
        for i in range(len(vp_indices)):
            vm.vcpus.set_vmcs(i, {"cr3": CR3, "cr4": CR4})
    point(vm, P1)
    vm.write_memory(P1, bytes([1]) * 8)
    vm.write_memory(P2, bytes([2]) * 8)
    return vm


def _index(table: int) -> int:
    level = 4 - (table - TABLES) // PAGE
    return TEST_PAGE >> (12 + 9 * (level - 1)) & 511


def point(vm: VirtualMachine, page: int) -> None:
    """Let the test page be another one: the guest's store to its page table."""
    table = TABLES + 3 * PAGE
    store_word(vm, table + _index(table) * 8, page | 0x67)


def read(vm: VirtualMachine, vcpu: int) -> int:
    """The byte that a vCPU finds in the test page."""
    result: AccessResult = vm.access(AccessRequest(gpa=None, size=8, access=0, vcpu=vcpu, gva=TEST_PAGE))
    assert result.data is not None
    return result.data[0]


def call(vm: VirtualMachine, vcpu: int = 0, data: bytes | None = None, **registers: Any) -> HypercallReport:
    """A hypercall with those registers, its block at GPA 0x5000 when ``data`` is given."""
    if data is not None:
        registers.setdefault("rdx", 0x5000)
    return vm.hyperv.hypercall(vcpu, HypercallRequest(Caller(**registers), data))
