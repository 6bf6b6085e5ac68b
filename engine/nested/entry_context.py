"""What a VM-entry check looks at, and the row of the tables of checks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from engine.arch import vmx_msrs as vmx
from engine.arch.hyperv_cpuid import find_leaf
from engine.arch.vmcs12 import REVISION_MASK, SHADOW_INDICATOR, VMCS12_REVISION, get
from engine.kvm.memory_views import GuestMemory
from engine.state.profiles import PROFILES, ProfileName
from engine.vcpu import cpuid as cpuid_facts
from engine.vcpu.control_registers import respects_fixed_bits
from engine.vcpu.registers import active_secondary
from engine.vcpu.vcpu import Vcpu

# Controls that a context keeps at hand, and their fields.
_CONTROLS = {
    "pin": "pin_based_vm_exec_control",
    "proc": "cpu_based_vm_exec_control",
    "secondary": "secondary_vm_exec_control",
    "exit": "vm_exit_controls",
    "entry": "vm_entry_controls",
}


class EntryContext:
    """One vmcs12 about to be entered. The controls are read once; everything else through ``get``."""

    def __init__(self, vcpu: Vcpu, memory: GuestMemory) -> None:
        self.vcpu = vcpu
        self.memory = memory
        self.kvm = vcpu.kvm
        self.page = vcpu.vmx.vmcs12
        self.run_pending = vcpu.vmx.run_pending
        self.capabilities = vcpu.capabilities
        self.width = vcpu.maxphyaddr
        self.pin = self.get("pin_based_vm_exec_control")
        self.proc = self.get("cpu_based_vm_exec_control")
        self.secondary = active_secondary(self.page)
        self.exit = self.get("vm_exit_controls")
        self.entry = self.get("vm_entry_controls")

    def get(self, name: str) -> int:
        """A field of vmcs12."""
        return get(self.page, name)

    def page_valid(self, name: str) -> bool:
        """The field holds a page address within the guest's physical address width."""
        return self.vcpu.page_valid(self.get(name))

    def legal(self, address: int) -> bool:
        """``address`` is within the guest's physical address width."""
        return not address >> self.width

    def cr_valid(self, register: str, value: int, relaxed: int = 0) -> bool:
        """CR0 or CR4 respects the fixed bits; ``relaxed`` bits need not be set."""
        return respects_fixed_bits(self.vcpu, register, value, relaxed)

    def efer_valid(self, value: int) -> bool:
        """No reserved bit of EFER: SCE, and LME, LMA, NX where the guest CPUID has them."""
        leaf = find_leaf(self.vcpu.cpuid, 0x8000_0001)
        features = 0 if leaf is None else leaf.edx
        allowed = vmx.EFER_SCE
        allowed |= vmx.EFER_LME | vmx.EFER_LMA if features & cpuid_facts.EDX8_LONG_MODE else 0
        allowed |= vmx.EFER_NX if features & cpuid_facts.EDX8_NX else 0
        return not value & ~allowed

    def perf_global_valid(self, value: int) -> bool:
        """No bit of PERF_GLOBAL_CTRL for a counter that leaf 0xA of the guest CPUID does not have."""
        leaf = find_leaf(self.vcpu.cpuid, 0xA)
        if leaf is None or not leaf.eax & 0xFF:
            return value == 0
        counters = (1 << (leaf.eax >> 8 & 0xFF)) - 1 | ((1 << (leaf.edx & 0x1F)) - 1) << 32
        return not value & ~counters


class ReadingContext(EntryContext):
    """One that remembers the ``last`` field of vmcs12 that was asked for."""

    def __init__(self, vcpu: Vcpu, memory: GuestMemory) -> None:
        super().__init__(vcpu, memory)
        self.last: str | None = None

    def get(self, name: str) -> int:
        self.last = name
        return super().get(name)

    def __getattribute__(self, name: str) -> Any:
        if name in _CONTROLS:
            self.last = _CONTROLS[name]
        return super().__getattribute__(name)


@dataclass(frozen=True)
class EntryCheck:
    """One check: ``fails`` is true when the VM entry is refused; ``says`` is what would have been accepted."""

    name: str
    says: str
    fails: Callable[[EntryContext], bool]
    profiles: tuple[ProfileName, ...] = PROFILES


def pat_valid(value: int) -> bool:
    """Each byte of a PAT is a memory type: 0, 1, 4, 5, 6 or 7."""
    return all(value >> shift & 0xFF in (0, 1, 4, 5, 6, 7) for shift in range(0, 64, 8))


def revision_matches(word: int) -> bool:
    """The 31-bit revision is KVM's; the shadow indicator is not compared."""
    return word & REVISION_MASK == VMCS12_REVISION


def is_shadow(word: int) -> bool:
    """Bit 31: a shadow VMCS."""
    return bool(word & SHADOW_INDICATOR)
