"""The whole state of one vCPU beside memory: registers, CPUID, MSRs, VMX and SVM; and its durable form.

Nothing here has rules; the operations are in the modules beside this one. Absent addresses are -1 as in the ABI.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from engine.arch.hyperv_cpuid import CpuidEntry, find_leaf
from engine.arch.kvm_nested_state import NO_ADDRESS
from engine.arch.vmcs12 import VMCS12_PAGE
from engine.errors import InvalidValue
from engine.state.profiles import KVM_2019, KvmVersion, kvm_version
from engine.vcpu import cpuid as cpuid_facts
from engine.vcpu.registers import RESET_REGISTERS
from engine.vcpu.vmx_capabilities import VmxCapabilities

# VmxState.evmptr: no enlightened VMCS; one is in use but not mapped yet; else its guest physical address.
EVMPTR_NONE = NO_ADDRESS
EVMPTR_PENDING = NO_ADDRESS - 1

MP_STATES = ("runnable", "halted", "wait-for-sipi")


@dataclass(frozen=True)
class VcpuHost:
    """The host, as far as a vCPU sees it.

    ``nested`` is the module parameter; ``ept`` says that the processor has EPT, without which no guest gets it.
    ``evmcs`` False is a kernel that does not offer the enlightened VMCS; the one that KVM itself may use on Hyper-V is
    another matter and not described here. ``shadow_vmcs`` says that the processor has VMCS shadowing.
    ``vmx_capabilities`` replaces capability MSRs by name.
    """

    vendor: str = "intel"
    nested: bool = True
    ept: bool = True
    evmcs: bool = True
    shadow_vmcs: bool = True
    maxphyaddr: int = 46
    smt_possible: bool = True
    max_vcpus: int = 1024
    vmx_capabilities: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.vendor not in ("intel", "amd"):
            raise InvalidValue("must be intel or amd", field="host.vendor", value=self.vendor)
        object.__setattr__(self, "vmx_capabilities", dict(self.vmx_capabilities))

    @property
    def intel(self) -> bool:
        """The host runs kvm_intel."""
        return self.vendor == "intel"

    def capabilities(self, profile: str) -> VmxCapabilities:
        """The capability values that a fresh vCPU starts with."""
        capabilities = VmxCapabilities.of_host(profile, self.vmx_capabilities)
        if not self.ept:
            capabilities.drop_ept()
        return capabilities


@dataclass(frozen=True)
class Enlightenment:
    """What the lower hypervisor remembers of the nested guest that was last entered, to serve its flush hypercalls.

    ``vm_id`` and ``vp_id`` name it, ``partition_page`` is the GPA of its partition assist page. ``features`` is the
    copy of the VP assist page's word. ``control`` is that of the VMCB: the enlightened VMCS is looked at as it is.
    """

    vm_id: int = 0
    vp_id: int = 0
    partition_page: int = NO_ADDRESS
    features: int = 0
    control: int = 0


@dataclass
class VmxState:
    """VMX operation of one vCPU: VMXON, the current VMCS and its cached pages, L2.

    ``sync_pending``: the cached vmcs12 is newer than the enlightened or hardware shadow copy. ``pages_pending``: the
    next run must resolve pages first. ``deadline`` is that of the preemption timer, in TSC ticks divided by 32.
    """

    vmxon: bool = False
    vmxon_pa: int = NO_ADDRESS
    current_pa: int = NO_ADDRESS
    smm_vmxon: bool = False
    smm_guest_mode: bool = False
    guest_mode: bool = False
    run_pending: bool = False
    mtf_pending: bool = False
    deadline: int | None = None
    evmptr: int = EVMPTR_NONE
    sync_pending: bool = False
    pages_pending: bool = False
    lower: Enlightenment = field(default_factory=Enlightenment)
    vmcs12: bytearray = field(default_factory=lambda: bytearray(VMCS12_PAGE))
    shadow: bytearray = field(default_factory=lambda: bytearray(VMCS12_PAGE))

    @property
    def in_operation(self) -> bool:
        """VMXON was executed, here or before SMM was entered."""
        return self.vmxon or self.smm_vmxon

    @property
    def evmcs_mapped(self) -> bool:
        """An enlightened VMCS is attached."""
        return self.evmptr not in (EVMPTR_NONE, EVMPTR_PENDING)

    def release_evmcs(self) -> None:
        """Detach the enlightened VMCS, and with it forget who its guest is."""
        self.evmptr = EVMPTR_NONE
        self.lower = Enlightenment()


@dataclass
class SvmState:
    """SVM of one vCPU: the global interrupt flag and, in L2, the VMCB the guest hypervisor used."""

    gif: bool = True
    guest_mode: bool = False
    run_pending: bool = False
    vmcb_pa: int = 0
    lower: Enlightenment = field(default_factory=Enlightenment)
    vmcb12: bytearray = field(default_factory=lambda: bytearray(VMCS12_PAGE))


@dataclass
class Vcpu:
    """One vCPU. ``registers`` are the live ones (L2's while in L2); ``msrs`` those that no other field owns.

    ``has_run``: KVM_RUN was called. ``enforces_cpuid`` is KVM_CAP_HYPERV_ENFORCE_CPUID, ``exception_payload`` is
    KVM_CAP_EXCEPTION_PAYLOAD, ``boot_vcpu`` the id of the boot processor: filled in by who opens the vCPU.
    ``mov_ss_blocking`` is the interrupt shadow of MOV SS. ``fail_allocation`` makes the next entry into VMX operation
    run out of memory, once; ``allocations`` counts such entries. ``tsc`` stands still unless the caller moves it.
    ``lapic`` and ``xsave`` are what was stored of the local APIC, ``lapic_x2apic`` in x2APIC mode, and of the extended
    state; nothing until then (see ``vcpu.lapic``, ``vcpu.extended_state``).
    """

    profile: str = KVM_2019
    host: VcpuHost = field(default_factory=VcpuHost)
    vcpu_id: int = 0
    vp_index: int = 0
    cpuid: tuple[CpuidEntry, ...] = ()
    lapic_in_kernel: bool = True
    exception_payload: bool = False
    boot_vcpu: int = 0
    enforces_cpuid: bool = False
    smm: bool = False
    has_run: bool = False
    mp_state: str = "runnable"
    mov_ss_blocking: bool = False
    triple_fault: bool = False
    fail_allocation: bool = False
    allocations: int = field(default=0, compare=False)
    tsc: int = 0
    evmcs_enabled: bool = False
    registers: dict[str, int] = field(default_factory=lambda: dict(RESET_REGISTERS))
    msrs: dict[int, int] = field(default_factory=dict)
    capabilities: VmxCapabilities = field(default_factory=VmxCapabilities)
    vmx: VmxState = field(default_factory=VmxState)
    svm: SvmState = field(default_factory=SvmState)
    lapic: bytes = b""
    lapic_x2apic: bool = False
    xsave: bytes = b""

    def __post_init__(self) -> None:
        kvm_version(self.profile)
        if not self.capabilities.controls:
            self.capabilities = self.host.capabilities(self.profile)

    @property
    def kvm(self) -> KvmVersion:
        """The kernel's column of the table of versions."""
        return kvm_version(self.profile)

    @property
    def vmx_allowed(self) -> bool:
        """Nesting is on and the guest CPUID has VMX."""
        return self.host.intel and self.host.nested and cpuid_facts.has_vmx(self.cpuid)

    @property
    def maxphyaddr(self) -> int:
        """Width of a guest physical address in bits."""
        return cpuid_facts.maxphyaddr(self.cpuid)

    @property
    def shows_kvm(self) -> bool:
        """The guest CPUID shows KVM: at its usual place, or behind the leaves of Hyper-V."""
        leaves = (find_leaf(self.cpuid, number) for number in (0x4000_0000, 0x4000_0100))
        return any(leaf is not None and leaf.ebx == cpuid_facts.KVM_SIGNATURE_EBX for leaf in leaves)

    @property
    def evmcs_visible(self) -> bool:
        """The enlightened VMCS takes effect: it is enabled and, in today's kernel, Hyper-V is in the guest CPUID."""
        return self.evmcs_enabled and (not self.kvm.nested.evmcs_needs_hyperv or cpuid_facts.has_hyperv(self.cpuid))

    def page_valid(self, address: int) -> bool:
        """``address`` is aligned to 4 KiB and within the guest's physical address width; 0 is fine."""
        return not address & 0xFFF and not address >> self.maxphyaddr

    @property
    def has_vmcs12(self) -> bool:
        """GET has a vmcs12 to report."""
        vmx = self.vmx
        if self.kvm.nested.map_pending:
            return vmx.current_pa != NO_ADDRESS or vmx.evmptr != EVMPTR_NONE
        return vmx.guest_mode or vmx.current_pa != NO_ADDRESS or vmx.evmcs_mapped

    def copy(self) -> Vcpu:
        """An independent copy."""
        twin = copy.copy(self)
        twin.registers = dict(self.registers)
        twin.msrs = dict(self.msrs)
        twin.capabilities = self.capabilities.copy()
        twin.vmx = replace(self.vmx, vmcs12=bytearray(self.vmx.vmcs12), shadow=bytearray(self.vmx.shadow))
        twin.svm = replace(self.svm, vmcb12=bytearray(self.svm.vmcb12))
        return twin

    def to_head(self) -> dict[str, Any]:
        """JSON form: numbers, strings, lists and objects; pages in hex without their trailing zeros."""
        head = {name: getattr(self, name) for name in _PLAIN}
        head["host"] = asdict(self.host)
        head["cpuid"] = [list(entry.words()) for entry in self.cpuid]
        head["registers"] = dict(self.registers)
        head["msrs"] = {str(number): value for number, value in self.msrs.items()}
        head["capabilities"] = self.capabilities.to_head()
        head["vmx"] = {**_with_hex_pages(vars(self.vmx)), "lower": asdict(self.vmx.lower)}
        head["svm"] = {**_with_hex_pages(vars(self.svm)), "lower": asdict(self.svm.lower)}
        return head

    @classmethod
    def from_head(cls, head: Mapping[str, Any]) -> Vcpu:
        """The inverse of ``to_head``."""
        plain = {name: head[name] for name in _PLAIN}
        return cls(
            **plain,
            host=VcpuHost(**head["host"]),
            cpuid=tuple(CpuidEntry(*entry) for entry in head["cpuid"]),
            registers=dict(head["registers"]),
            msrs={int(number): value for number, value in head["msrs"].items()},
            capabilities=VmxCapabilities.from_head(head["capabilities"]),
            vmx=VmxState(**{**_with_byte_pages(head["vmx"]), "lower": Enlightenment(**head["vmx"].get("lower", {}))}),
            svm=SvmState(**{**_with_byte_pages(head["svm"]), "lower": Enlightenment(**head["svm"].get("lower", {}))}),
        )


_PAGES = ("vmcs12", "shadow", "vmcb12")
_PLAIN = (
    "profile",
    "vcpu_id",
    "vp_index",
    "lapic_in_kernel",
    "smm",
    "has_run",
    "mp_state",
    "mov_ss_blocking",
    "triple_fault",
    "fail_allocation",
    "tsc",
    "evmcs_enabled",
)


def _with_hex_pages(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {name: bytes(value).rstrip(b"\0").hex() if name in _PAGES else value for name, value in fields.items()}


def _with_byte_pages(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: bytearray(bytes.fromhex(value).ljust(VMCS12_PAGE, b"\0")) if name in _PAGES else value
        for name, value in fields.items()
    }
