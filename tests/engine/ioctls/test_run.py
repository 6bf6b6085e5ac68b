"""KVM_RUN where no guest code runs: what it does all the same, in both eras."""

from __future__ import annotations

import struct

import pytest

from engine.abi import Reply, UserBuffer
from engine.arch.kvm_vcpu_structs import EVENTS, REGS, RUN, SREGS
from engine.vcpu.cpuid import supported_cpuid
from engine.vcpu.vcpu import Vcpu
from tests.engine.ioctls.bare_vcpu import Call, ioctl
from tests.engine.nested.support import ERAS, make_vcpu

PAGE = 2352
UNTOUCHED = 0xDEAD
SHUTDOWN, FAIL_ENTRY, INTR = 8, 9, 10
SREGS_AT = 304 + REGS.size
EVENTS_AT = SREGS_AT + SREGS.size


def run(vcpu: Vcpu, page: bytes | None = None, arg: int = 0, **fields: int) -> tuple[Reply, dict[str, int], bytes]:
    raw = bytearray(bytes(PAGE) if page is None else page)
    for name, value in {"exit_reason": UNTOUCHED, **fields}.items():
        RUN.put(raw, name, value)
    user = UserBuffer.of(bytes(raw))
    reply = ioctl(Call("KVM_RUN", "vcpu", user, arg, vcpu=vcpu))
    left = bytes(user.data or b"")
    return reply, {field.name: RUN.get(left, field.name) for field in RUN.named}, left


@pytest.mark.parametrize("era", ERAS)
@pytest.mark.parametrize("state", ["runnable", "uninitialized", "wait-for-sipi", "halted"])
def test_immediate_exit(era: str, state: str) -> None:
    vcpu = make_vcpu(era)
    vcpu.mp_state = state
    reply, page, _ = run(vcpu, immediate_exit=1)
    assert reply == Reply(-1, "EINTR") and page["exit_reason"] == UNTOUCHED
    assert vcpu.mp_state == state and not vcpu.has_run
    assert page["apic_base"] == 0xFEE0_0900 and page["ready_for_interrupt_injection"] == 1


@pytest.mark.parametrize("era", ERAS)
def test_no_guest_code_runs_here(era: str) -> None:
    vcpu = make_vcpu(era, vcpu_id=3)
    before = dict(vcpu.registers)
    reply, page, _ = run(vcpu)
    assert reply == Reply(0) and page["exit_reason"] == FAIL_ENTRY
    assert page["hardware_entry_failure_reason"] == (1 << 64) - 1
    assert page["cpu"] == (0 if era == "kvm-2019" else 3)
    assert vcpu.registers == {**before, "cr8": before.get("cr8", 0)} and vcpu.has_run


@pytest.mark.parametrize("era", ERAS)
@pytest.mark.parametrize("state", ["uninitialized", "wait-for-sipi", "halted"])
def test_who_waits_is_interrupted(era: str, state: str) -> None:
    vcpu = make_vcpu(era)
    vcpu.mp_state = state
    reply, page, _ = run(vcpu)
    assert reply == Reply(-1, "EINTR") and page["exit_reason"] == INTR and not vcpu.has_run


@pytest.mark.parametrize("era", ERAS)
def test_the_argument_is_0(era: str) -> None:
    vcpu = make_vcpu(era)
    reply, page, _ = run(vcpu, arg=1)
    assert reply == Reply(-1, "EINVAL") and page["exit_reason"] == UNTOUCHED and page["apic_base"] == 0


@pytest.mark.parametrize("era", ERAS)
def test_a_call_without_a_page(era: str) -> None:
    assert ioctl(Call("KVM_RUN", "vcpu", vcpu=make_vcpu(era))) == Reply(0)
    short = UserBuffer.of(bytes(12))
    assert ioctl(Call("KVM_RUN", "vcpu", short, vcpu=make_vcpu(era))) == Reply(0)
    assert bytes(short.data or b"") == struct.pack("<QI", 0, FAIL_ENTRY)


@pytest.mark.parametrize("era", ERAS)
def test_a_triple_fault_is_a_shutdown(era: str) -> None:
    vcpu = make_vcpu(era)
    vcpu.triple_fault = True
    assert run(vcpu)[1]["exit_reason"] == SHUTDOWN
    assert run(vcpu)[1]["exit_reason"] == FAIL_ENTRY


@pytest.mark.parametrize("era", ERAS)
def test_flags_of_the_page(era: str) -> None:
    vcpu = make_vcpu(era)
    vcpu.lapic_in_kernel = False
    page = run(vcpu, immediate_exit=1, cr8=7)[1]
    assert (page["if_flag"], page["ready_for_interrupt_injection"], page["cr8"]) == (0, 0, 7)
    vcpu.registers["rflags"] |= 1 << 9
    vcpu.smm = vcpu.vmx.guest_mode = True
    page = run(vcpu, immediate_exit=1, cr8=7)[1]
    assert (page["if_flag"], page["ready_for_interrupt_injection"]) == (1, 1)
    assert page["flags"] == (1 if era == "kvm-2019" else 5)
    vcpu.mov_ss_blocking = True
    assert run(vcpu, immediate_exit=1)[1]["ready_for_interrupt_injection"] == 0
    assert run(vcpu, immediate_exit=1, cr8=16)[0].errno == "EINVAL"
    vcpu.lapic_in_kernel = True
    assert run(vcpu, immediate_exit=1, cr8=16)[0].errno == "EINTR", "the page of an APIC in the kernel is not looked at"


@pytest.mark.parametrize("era", ERAS)
def test_registers_in_the_page(era: str) -> None:
    vcpu = make_vcpu(era)
    vcpu.cpuid = supported_cpuid("intel", True, 46)
    reply, _, raw = run(vcpu, immediate_exit=1, kvm_valid_regs=7)
    assert reply.errno == "EINTR"
    assert REGS.get(raw[304:], "rip") == 0xFFF0 and SREGS.get(raw[SREGS_AT:], "cr0") == 0x6000_0010
    assert EVENTS.get(raw[EVENTS_AT:], "flags") == 0xD
    page = bytearray(raw)
    REGS_RIP = REGS.by_name["rip"].offset
    page[304 + REGS_RIP : 304 + REGS_RIP + 8] = struct.pack("<Q", 0x1234)
    reply, told, raw = run(vcpu, bytes(page), immediate_exit=1, kvm_dirty_regs=7)
    assert reply.errno == "EINTR" and told["kvm_dirty_regs"] == 0 and vcpu.registers["rip"] == 0x1234
    for bad in ({"kvm_valid_regs": 8}, {"kvm_dirty_regs": 8}):
        assert run(vcpu, immediate_exit=1, **bad)[0].errno == "EINVAL"
    vcpu.mp_state = "uninitialized"
    assert run(vcpu, immediate_exit=1, kvm_dirty_regs=8)[0].errno == "EINTR"


@pytest.mark.parametrize("era", ERAS)
def test_registers_in_the_page_that_cannot_be(era: str) -> None:
    """What comes before is stored, and the bit of what was refused stays."""
    vcpu = make_vcpu(era)
    raw = bytearray(PAGE)
    at = SREGS_AT + SREGS.by_name["ia32_efer"].offset
    raw[at : at + 8] = struct.pack("<Q", 0x400)
    reply, told, _ = run(vcpu, bytes(raw), kvm_dirty_regs=7)
    assert reply.errno == "EINVAL" and told["kvm_dirty_regs"] == 6 and vcpu.registers["rip"] == 0
    assert told["exit_reason"] == UNTOUCHED
