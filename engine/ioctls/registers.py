"""KVM_GET and KVM_SET of REGS, SREGS and VCPU_EVENTS: registers and events of a vCPU.

Each ``…_bytes`` gives the structure of a GET; each ``set_…`` takes that of a SET and returns None or the errno.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

from engine.arch import kvm_vcpu_structs as abi
from engine.arch import vmx_msrs as vmx
from engine.ioctls.registry import Target, offered
from engine.ioctls.vcpu_rows import getting, setting
from engine.kvm.memory_views import GuestMemory
from engine.machine import VirtualMachine
from engine.nested.operations import set_smm
from engine.vcpu import cpuid as cpuid_facts
from engine.vcpu.apic_base import APIC_BASE, apic_base, takes_apic_base
from engine.vcpu.control_registers import cpuid_allows_cr4, vmx_allows_cr0, vmx_allows_cr4
from engine.vcpu.msrs import read_msr
from engine.vcpu.registers import CR0_PE, CR0_PG, CR4_OSXSAVE, CR4_PAE, SEGMENTS, TABLES
from engine.vcpu.vcpu import Vcpu

CAP_VCPU_EVENTS = 41

_RFLAGS_FIXED = 0x2
_CR0_CD, _CR0_NW = 1 << 30, 1 << 29
_CR8_RESERVED = ~0xF
# CR4 bits that every guest may set: VME to OSXMMEXCPT.
_CR4_BASIC = 0x7FF
_STI, _MOV_SS = 1 << 0, 1 << 1
_SOFT_EXCEPTIONS = (3, 4)
_NMI_VECTOR = 2

# Events that are kept as they were set.
_KEPT_EVENTS = (
    *("exception_injected", "exception_nr", "exception_has_error_code", "exception_error_code"),
    *("exception_pending", "exception_has_payload", "exception_payload"),
    *("interrupt_injected", "interrupt_nr", "interrupt_soft", "nmi_injected", "nmi_masked"),
)


def regs_bytes(vcpu: Vcpu) -> bytes:
    """struct kvm_regs."""
    raw = bytearray(abi.REGS.size)
    for name in abi.GENERAL_REGISTERS:
        abi.REGS.put(raw, name, vcpu.registers.get(name, 0))
    return bytes(raw)


def registers_of(machine: VirtualMachine, vcpu: int, msrs: Sequence[int] = ()) -> tuple[bytes, bytes, tuple[int, ...]]:
    """struct kvm_regs, struct kvm_sregs and the MSRs asked for, of one moment; 0 for an MSR that the vCPU lacks.

    ``vcpu`` is a KVM vCPU id. Raises NotFound.
    """
    seen = machine.nested.vcpu(vcpu)
    return regs_bytes(seen), sregs_bytes(seen), tuple(read_msr(seen, index, host=True) or 0 for index in msrs)


def set_regs(vcpu: Vcpu, memory: GuestMemory, raw: bytes) -> str | None:
    """KVM_SET_REGS: everything is taken; bit 1 of RFLAGS is always set."""
    for name in abi.GENERAL_REGISTERS:
        vcpu.registers[name] = abi.REGS.get(raw, name)
    vcpu.registers["rflags"] |= _RFLAGS_FIXED
    return None


def sregs_bytes(vcpu: Vcpu) -> bytes:
    """struct kvm_sregs. A segment is present when it is usable."""
    raw, registers = bytearray(abi.SREGS.size), vcpu.registers
    for name in SEGMENTS:
        rights = registers[f"{name}_ar_bytes"]
        for part in ("base", "limit", "selector"):
            abi.SREGS.put(raw, f"{name}_{part}", registers[f"{name}_{part}"])
        for bit in abi.ACCESS_BITS:
            abi.SREGS.put(raw, f"{name}_{bit.name}", rights >> bit.shift & bit.mask)
        unusable = bool(rights & abi.ACCESS_UNUSABLE)
        abi.SREGS.put(raw, f"{name}_present", not unusable)
        abi.SREGS.put(raw, f"{name}_unusable", unusable)
    for name in TABLES:
        for part in ("base", "limit"):
            abi.SREGS.put(raw, f"{name}_{part}", registers[f"{name}_{part}"])
    for name in ("cr0", "cr2", "cr3", "cr4", "cr8", "ia32_efer"):
        abi.SREGS.put(raw, name, registers.get(name, 0))
    abi.SREGS.put(raw, "apic_base", apic_base(vcpu))
    return bytes(raw)


def set_sregs(vcpu: Vcpu, memory: GuestMemory, raw: bytes) -> str | None:
    """KVM_SET_SREGS. Nothing is taken when the values cannot be together.

    A CR0 or CR4 that VMX does not allow is one of these today. In 2019 any CR0 is taken; the old CR4 stays, whole, and
    all the rest is taken.
    So does, in both, a CR8 above 15: what kvm_set_cr8 answers is ignored.
    """
    given = {name: abi.SREGS.get(raw, name) for name in ("cr0", "cr2", "cr3", "cr4", "cr8", "ia32_efer", "apic_base")}
    apic = given.pop("apic_base")
    if not _sregs_valid(vcpu, given, bool(abi.SREGS.get(raw, "cs_l"))) or not takes_apic_base(vcpu, apic, host=True):
        return "EINVAL"
    vcpu.msrs[APIC_BASE] = apic
    lost_svm = vcpu.registers["ia32_efer"] & vmx.EFER_SVME and not given["ia32_efer"] & vmx.EFER_SVME
    if not vmx_allows_cr4(vcpu, given["cr4"]):
        del given["cr4"]
    if given["cr8"] & _CR8_RESERVED:
        del given["cr8"]
    vcpu.registers.update(given)
    for name in SEGMENTS:
        for part in ("base", "limit", "selector"):
            vcpu.registers[f"{name}_{part}"] = abi.SREGS.get(raw, f"{name}_{part}")
        vcpu.registers[f"{name}_ar_bytes"] = _access_rights(vcpu, raw, name)
    for name in TABLES:
        for part in ("base", "limit"):
            vcpu.registers[f"{name}_{part}"] = abi.SREGS.get(raw, f"{name}_{part}")
    if lost_svm and not vcpu.host.intel:
        # Without SVME there is no nested guest, and the interrupt flag of SVM is set.
        vcpu.svm.guest_mode = vcpu.svm.run_pending = False
        vcpu.svm.gif = True
    return None


def events_bytes(vcpu: Vcpu) -> bytes:
    """struct kvm_vcpu_events. Software exceptions are not reported: their length is not known.

    A pending exception passes for an injected one, too, unless KVM_CAP_EXCEPTION_PAYLOAD tells the two apart.
    """
    raw = bytearray(abi.EVENTS.size)
    for name in (*_KEPT_EVENTS, "nmi_pending", "smi_pending", "smi_smm_inside_nmi", "smi_latched_init"):
        abi.EVENTS.put(raw, name, vcpu.registers.get(name, 0))
    if vcpu.registers.get("exception_nr", 0) in _SOFT_EXCEPTIONS:
        abi.EVENTS.put(raw, "exception_injected", 0)
        abi.EVENTS.put(raw, "exception_pending", 0)
    elif vcpu.registers.get("exception_pending", 0) and not vcpu.exception_payload:
        abi.EVENTS.put(raw, "exception_injected", 1)
    blocking = vcpu.registers["interruptibility_info"]
    shadow = (abi.SHADOW_MOV_SS if vcpu.mov_ss_blocking else 0) | (abi.SHADOW_STI if blocking & _STI else 0)
    abi.EVENTS.put(raw, "interrupt_shadow", shadow)
    abi.EVENTS.put(raw, "smi_smm", vcpu.smm)
    payload = abi.EVENT_PAYLOAD if vcpu.exception_payload else 0
    abi.EVENTS.put(raw, "flags", abi.EVENT_NMI_PENDING | abi.EVENT_SHADOW | abi.EVENT_SMM | payload)
    return bytes(raw)


def set_events(vcpu: Vcpu, memory: GuestMemory, raw: bytes) -> str | None:
    """KVM_SET_VCPU_EVENTS. Payloads need KVM_CAP_EXCEPTION_PAYLOAD, triple faults a capability that nobody has enabled.

    Where payloads are given an exception is pending, with one perhaps, or injected; where they are not it is injected.
    """
    flags = abi.EVENTS.get(raw, "flags")
    payload = abi.EVENT_PAYLOAD if vcpu.exception_payload else 0
    if flags & ~(abi.EVENT_NMI_PENDING | abi.EVENT_SIPI_VECTOR | abi.EVENT_SHADOW | abi.EVENT_SMM | payload):
        return "EINVAL"
    dropped = {"exception_pending", "exception_has_payload"}
    if flags & abi.EVENT_PAYLOAD:
        dropped = {"exception_injected"} if abi.EVENTS.get(raw, "exception_pending") else {"exception_has_payload"}

    def given(name: str) -> int:
        return 0 if name in dropped else abi.EVENTS.get(raw, name)

    excepted = given("exception_injected") or given("exception_pending")
    if excepted and (given("exception_nr") > 31 or given("exception_nr") == _NMI_VECTOR):
        return "EINVAL"
    entering = given("smi_smm") or given("smi_pending")
    excluded = vcpu.kvm.vcpu.smm_excludes_waiting and vcpu.mp_state == "wait-for-sipi"
    if flags & abi.EVENT_SMM and entering and excluded:
        return "EINVAL"
    for name in _KEPT_EVENTS:
        vcpu.registers[name] = given(name)
    if flags & abi.EVENT_SIPI_VECTOR and vcpu.lapic_in_kernel:
        vcpu.registers["sipi_vector"] = given("sipi_vector") & 0xFF
    if flags & abi.EVENT_NMI_PENDING:
        vcpu.registers["nmi_pending"] = given("nmi_pending")
    if flags & abi.EVENT_SHADOW:
        shadow = given("interrupt_shadow")
        vcpu.mov_ss_blocking = bool(shadow & abi.SHADOW_MOV_SS)
        blocked = (_STI if shadow & abi.SHADOW_STI else 0) | (_MOV_SS if vcpu.mov_ss_blocking else 0)
        old = vcpu.registers["interruptibility_info"]
        vcpu.registers["interruptibility_info"] = old & ~(_STI | _MOV_SS) | blocked
    if flags & abi.EVENT_SMM:
        set_smm(vcpu, memory, bool(given("smi_smm")))
        for name in ("smi_pending", "smi_smm_inside_nmi", "smi_latched_init"):
            vcpu.registers[name] = given(name)
    return None


def _sregs_valid(vcpu: Vcpu, given: dict[str, int], cs_long: bool) -> bool:
    cr0, cr4, efer = given["cr0"], given["cr4"], given["ia32_efer"]
    features = cpuid_facts.features_ecx(vcpu.cpuid)
    if cr4 & CR4_OSXSAVE and not features & cpuid_facts.ECX1_XSAVE:
        return False
    if efer & vmx.EFER_LME and cr0 & CR0_PG:
        if not cr4 & CR4_PAE or not efer & vmx.EFER_LMA:
            return False
        if vcpu.kvm.vcpu.strict_sregs and given["cr3"] >> vcpu.maxphyaddr:
            return False
    elif efer & vmx.EFER_LMA or cs_long:
        return False
    if not cpuid_allows_cr4(vcpu.cpuid, cr4):
        return False
    if not vcpu.kvm.vcpu.strict_sregs:
        return True
    cr0_valid = not (cr0 >> 32 or cr0 & (_CR0_CD | _CR0_NW) == _CR0_NW or cr0 & (CR0_PG | CR0_PE) == CR0_PG)
    cr4_valid = not cr4 & ~(_CR4_BASIC | cpuid_facts.cr4_allowed(vcpu.cpuid))
    return cr0_valid and cr4_valid and vmx_allows_cr0(vcpu, cr0) and vmx_allows_cr4(vcpu, cr4)


def _access_rights(vcpu: Vcpu, raw: bytes, name: str) -> int:
    rights = 0
    for bit in abi.ACCESS_BITS:
        rights |= (abi.SREGS.get(raw, f"{name}_{bit.name}") & bit.mask) << bit.shift
    if abi.SREGS.get(raw, f"{name}_unusable") or not rights & abi.ACCESS_PRESENT:
        return abi.ACCESS_UNUSABLE | (rights if vcpu.kvm.vcpu.strict_sregs else 0)
    return rights


CHECKED: Mapping[int, Callable[[Target], int]] = MappingProxyType({CAP_VCPU_EVENTS: offered})

ROWS = (
    getting("REGS", regs_bytes),
    setting("REGS", abi.REGS.size, set_regs),
    getting("SREGS", sregs_bytes),
    setting("SREGS", abi.SREGS.size, set_sregs),
    getting("VCPU_EVENTS", events_bytes),
    setting("VCPU_EVENTS", abi.EVENTS.size, set_events),
)
