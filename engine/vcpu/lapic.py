"""The registers of a vCPU's local APIC as KVM_GET_LAPIC and KVM_SET_LAPIC have them: the first kilobyte of its page.

What is set is kept as the kernel keeps it: the version is KVM's, the processor priority follows from what is in
service, and in x2APIC mode the id and the logical destination are those of the vCPU. Nothing is delivered and no timer
runs. CR8 is the upper half of the task priority. Source: Linux 5.3 and 7.1, arch/x86/kvm/lapic.c (kvm_apic_get_state,
kvm_apic_set_state, kvm_apic_state_fixup, kvm_lapic_reset).
"""

from __future__ import annotations

from engine.arch.kvm_vcpu_structs import LAPIC_SIZE
from engine.vcpu.apic_base import in_x2apic_mode
from engine.vcpu.cpuid import features_ecx
from engine.vcpu.vcpu import Vcpu

ID, VERSION, TASK_PRIORITY, PROCESSOR_PRIORITY = 0x20, 0x30, 0x80, 0xA0
LOGICAL_DESTINATION, DESTINATION_FORMAT, SPURIOUS, IN_SERVICE = 0xD0, 0xE0, 0xF0, 0x100
COMMAND, COMMAND_HIGH = 0x300, 0x310
LVT_TIMER, LVT_LINT0, LVT_ERROR = 0x320, 0x350, 0x370
INITIAL_COUNT, CURRENT_COUNT = 0x380, 0x390

KVM_VERSION = 0x0005_0014  # six entries in the local vector table
_MASKED, _EXTINT = 1 << 16, 0x700
_TIMER_MODE, _PERIODIC, _TSC_DEADLINE = 0b11 << 17, 0b01 << 17, 0b10 << 17
_ECX1_TSC_DEADLINE = 1 << 24
_PRIORITY_CLASS = 0xF0


def at_reset(vcpu_id: int, *, boots: bool) -> bytearray:
    """The registers after RESET; LINT0 of the boot processor takes external interrupts."""
    page = bytearray(LAPIC_SIZE)
    _put(page, ID, (vcpu_id & 0xFF) << 24)
    _put(page, VERSION, KVM_VERSION)
    _put(page, DESTINATION_FORMAT, 0xFFFF_FFFF)
    _put(page, SPURIOUS, 0xFF)
    for entry in range(LVT_TIMER, LVT_ERROR + 1, 0x10):
        _put(page, entry, _MASKED)
    if boots:
        _put(page, LVT_LINT0, _EXTINT)
    return page


def state_bytes(vcpu: Vcpu) -> bytes:
    """struct kvm_lapic_state."""
    page = bytearray(vcpu.lapic) if vcpu.lapic else at_reset(vcpu.vcpu_id, boots=vcpu.vcpu_id == vcpu.boot_vcpu)
    own_mode, x2apic = bool(vcpu.lapic_x2apic), in_x2apic_mode(vcpu)
    if own_mode != x2apic:
        _put(page, ID, vcpu.vcpu_id if x2apic else (vcpu.vcpu_id & 0xFF) << 24)
        if x2apic:
            _put(page, LOGICAL_DESTINATION, _x2apic_destination(vcpu.vcpu_id))
    priority = _get(page, TASK_PRIORITY)
    cr8 = vcpu.registers.get("cr8", 0)
    if priority >> 4 & 0xF != cr8:
        _put(page, TASK_PRIORITY, cr8 << 4 | priority & 4)
        _put(page, PROCESSOR_PRIORITY, _processor_priority(page))
    if vcpu.kvm.vcpu.lapic_timer_reported:
        _put(page, CURRENT_COUNT, _current_count(page, _timer_mode(vcpu, page)))
    if x2apic:
        rules = vcpu.kvm.vcpu
        _put(page, ID, (vcpu.vcpu_id if rules.x2apic_id_fixed else _get(page, ID)) << 24)
        if rules.x2apic_command_is_one and vcpu.host.intel:
            _put(page, COMMAND_HIGH, _get(page, COMMAND + 4))
    return bytes(page)


def set_state(vcpu: Vcpu, raw: bytes) -> None:
    """Take struct kvm_lapic_state; no value is refused while user space has not asked for x2APIC ids of 32 bits."""
    page = bytearray(raw)
    x2apic = in_x2apic_mode(vcpu)
    if x2apic:
        rules = vcpu.kvm.vcpu
        own = vcpu.vcpu_id if rules.x2apic_id_fixed else _get(page, ID) >> 24
        _put(page, ID, own)
        _put(page, LOGICAL_DESTINATION, _x2apic_destination(own))
        if rules.x2apic_command_is_one and vcpu.host.intel:
            _put(page, COMMAND + 4, _get(page, COMMAND_HIGH))
    _put(page, VERSION, KVM_VERSION)
    _put(page, PROCESSOR_PRIORITY, _processor_priority(page))
    modes = (_timer_mode(vcpu, vcpu.lapic), _timer_mode(vcpu, page))
    if (modes[0] == _TSC_DEADLINE) != (modes[1] == _TSC_DEADLINE):
        _put(page, INITIAL_COUNT, 0)
    vcpu.lapic, vcpu.lapic_x2apic = bytes(page), x2apic
    vcpu.registers["cr8"] = _get(page, TASK_PRIORITY) >> 4 & 0xF


def _x2apic_destination(apic_id: int) -> int:
    return (apic_id >> 4) << 16 | 1 << (apic_id & 0xF)


def _processor_priority(page: bytearray) -> int:
    """The task priority, or the class of the highest vector in service if that is higher."""
    words = [_get(page, IN_SERVICE + 0x10 * at) for at in range(8)]
    serving = max((32 * at + word.bit_length() - 1 for at, word in enumerate(words) if word), default=0)
    task = _get(page, TASK_PRIORITY) & 0xFF
    return task if task & _PRIORITY_CLASS >= serving & _PRIORITY_CLASS else serving & _PRIORITY_CLASS


def _timer_mode(vcpu: Vcpu, page: bytes | bytearray) -> int:
    """The mode of the timer: bit 18 counts where the guest CPUID has the deadline mode."""
    mode = _get(page, LVT_TIMER) & _TIMER_MODE
    return mode if features_ecx(vcpu.cpuid) & _ECX1_TSC_DEADLINE else mode & _PERIODIC


def _current_count(page: bytearray, mode: int) -> int:
    """What is left of the count that was set; time stands still."""
    first = _get(page, INITIAL_COUNT)
    if mode == _TSC_DEADLINE or not first:
        return 0
    left = _get(page, CURRENT_COUNT)
    return first if left > first or (not left and mode == _PERIODIC) else left


def _get(page: bytes | bytearray, register: int) -> int:
    return int.from_bytes(page[register : register + 4], "little")


def _put(page: bytearray, register: int, value: int) -> None:
    page[register : register + 4] = (value & 0xFFFF_FFFF).to_bytes(4, "little")
