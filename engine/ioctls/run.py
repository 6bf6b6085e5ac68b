"""KVM_RUN: everything that it does but running guest code, of which there is none here.

The program's run page is the call's data, struct kvm_run from its first byte on; a call without data has a page of
zeros that nobody sees. What lies past the end of the data is neither read nor written: a run page does not fault.

With ``immediate_exit`` the answer is EINTR and ``exit_reason`` stays as it was, whatever the vCPU waits for. A vCPU
that waits (not initialised, for a SIPI, halted) is interrupted at once, as by a signal: EINTR and KVM_EXIT_INTR. One
that would run ends with KVM_EXIT_FAIL_ENTRY and a failure reason of all ones, which no processor gives: the state is
ready, and guest code does not run here. A restored enlightened VMCS is attached before, and a triple fault delivered,
as by the kernel. Source: Linux 5.3 and 7.1, kvm_arch_vcpu_ioctl_run, sync_regs, store_regs, post_kvm_run_save.
"""

from __future__ import annotations

from engine.abi import Call, Reply, UserBuffer, failed
from engine.arch import kvm_vcpu_structs as abi
from engine.ioctls.registers import events_bytes, regs_bytes, set_events, set_regs, set_sregs, sregs_bytes
from engine.ioctls.vcpu_rows import Get, Put, changing
from engine.kvm.memory_views import GuestMemory
from engine.nested.operations import prepare_run
from engine.vcpu.apic_base import apic_base
from engine.vcpu.vcpu import Vcpu

EXIT_SHUTDOWN, EXIT_FAIL_ENTRY, EXIT_INTR, EXIT_INTERNAL_ERROR = 8, 9, 10, 17
NO_GUEST_CODE = (1 << 64) - 1

_WAITING = ("uninitialized", "wait-for-sipi", "halted", "ap-reset-hold")
_RFLAGS_IF = 1 << 9
_INTERRUPT_SHADOW = 0b11

# Registers that a run page can carry: the bit that says so, where, how many bytes, and how they are read and stored.
_SYNCED: tuple[tuple[int, int, int, Get, Put], ...] = (
    (abi.SYNC_REGS, abi.RUN_SYNC_AT, abi.REGS.size, regs_bytes, set_regs),
    (abi.SYNC_SREGS, abi.RUN_SYNC_AT + abi.REGS.size, abi.SREGS.size, sregs_bytes, set_sregs),
    (
        abi.SYNC_EVENTS,
        abi.RUN_SYNC_AT + abi.REGS.size + abi.SREGS.size,
        abi.EVENTS.size,
        events_bytes,
        set_events,
    ),
)


class RunPage:
    """The run page of a call: words by name, blocks by place."""

    def __init__(self, user: UserBuffer) -> None:
        self._user = user

    def get(self, name: str) -> int:
        """A word; 0 past the end."""
        field = abi.RUN.by_name[name]
        return int.from_bytes(self.block(field.offset, field.size), "little")

    def put(self, name: str, value: int) -> None:
        """Store a word, as far as there is room for it."""
        field = abi.RUN.by_name[name]
        self.store(field.offset, value.to_bytes(field.size, "little"))

    def block(self, at: int, size: int) -> bytes:
        """Bytes; zeros past the end."""
        raw = bytearray(size)
        self._user.copy_into(raw, at, size)
        return bytes(raw)

    def store(self, at: int, raw: bytes) -> None:
        """Store bytes as far as there is room."""
        self._user.copy_to(at, raw)


def run(vcpu: Vcpu, memory: GuestMemory, call: Call) -> Reply:
    """The argument is 0, else EINVAL."""
    if call.arg:
        return failed("EINVAL")
    page = RunPage(call.user)
    reply = _entered(vcpu, memory, page)
    for bit, at, _, get, _ in _SYNCED:
        if page.get("kvm_valid_regs") & bit:
            page.store(at, get(vcpu))
    _note(vcpu, page)
    return reply


def _entered(vcpu: Vcpu, memory: GuestMemory, page: RunPage) -> Reply:
    immediate = bool(page.get("immediate_exit"))
    if vcpu.mp_state == "uninitialized":
        return failed("EINTR") if immediate else _interrupted(page)
    if (page.get("kvm_valid_regs") | page.get("kvm_dirty_regs")) & ~abi.SYNC_ALL:
        return failed("EINVAL")
    for bit, at, size, _, put in _SYNCED:
        dirty = page.get("kvm_dirty_regs")
        if dirty & bit:
            if put(vcpu, memory, page.block(at, size)) is not None:
                return failed("EINVAL")
            page.put("kvm_dirty_regs", dirty & ~bit)
    if not vcpu.lapic_in_kernel:
        if page.get("cr8") >> 4:
            return failed("EINVAL")
        vcpu.registers["cr8"] = page.get("cr8")
    if immediate:
        return failed("EINTR")
    if vcpu.smm and vcpu.mp_state == "wait-for-sipi":
        return failed("EINVAL")
    return _interrupted(page) if vcpu.mp_state in _WAITING else _run(vcpu, memory, page)


def _interrupted(page: RunPage) -> Reply:
    page.put("exit_reason", EXIT_INTR)
    return failed("EINTR")


def _run(vcpu: Vcpu, memory: GuestMemory, page: RunPage) -> Reply:
    outcome = prepare_run(vcpu, memory)
    if outcome.exit == "shutdown":
        page.put("exit_reason", EXIT_SHUTDOWN)
    elif outcome.exit is not None:
        page.put("exit_reason", EXIT_INTERNAL_ERROR)
        page.put("hardware_entry_failure_reason", outcome.suberror or 0)  # suberror, and no words after it
    else:
        page.put("exit_reason", EXIT_FAIL_ENTRY)
        page.put("hardware_entry_failure_reason", NO_GUEST_CODE)
        if vcpu.kvm.vcpu.run_tells_cpu:
            page.put("cpu", vcpu.vcpu_id)
    return Reply(0)


def _note(vcpu: Vcpu, page: RunPage) -> None:
    """What a run page says of the vCPU after every KVM_RUN."""
    registers = vcpu.registers
    allowed = bool(registers["rflags"] & _RFLAGS_IF)
    shadowed = vcpu.mov_ss_blocking or registers["interruptibility_info"] & _INTERRUPT_SHADOW
    waiting = any(registers.get(name, 0) for name in ("exception_injected", "interrupt_injected", "nmi_injected"))
    nested = vcpu.kvm.vcpu.run_tells_guest_mode and (vcpu.vmx.guest_mode or vcpu.svm.guest_mode)
    page.put("if_flag", allowed)
    page.put("flags", (abi.RUN_SMM if vcpu.smm else 0) | (abi.RUN_GUEST_MODE if nested else 0))
    page.put("cr8", registers.get("cr8", 0))
    page.put("apic_base", apic_base(vcpu))
    page.put("ready_for_interrupt_injection", vcpu.lapic_in_kernel or (allowed and not shadowed and not waiting))


ROWS = (changing("KVM_RUN", run),)
