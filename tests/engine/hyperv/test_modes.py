"""Who may call and in which form: privilege level, mode, CPUID privileges, 32-bit callers."""

from __future__ import annotations

from dataclasses import replace

import pytest

from engine.arch import hyperv_cpuid as leaves
from engine.errors import InvalidValue
from engine.hyperv.caller import Caller
from engine.hyperv.privileges import Privileges

from .flush_machine import INPUT, PRIVILEGES, FlushMachine, names, words

POLICIES = ("kvm", "tlfs")
S01 = words(0, 2, 4)
ENFORCED = replace(PRIVILEGES, enforced=True)
NO_REMOTE = replace(ENFORCED, recommendations=leaves.RECOMMEND_EX_PROCESSOR_MASKS)
NO_SETS = replace(ENFORCED, recommendations=leaves.RECOMMEND_REMOTE_FLUSH)
NO_XMM = replace(ENFORCED, features_edx=leaves.FEATURES_EDX_EXTENDED_RANGES)
F01 = Caller(rcx=0x10002, r8=2, xmm=(4, 0, 0, 0, 0, 0))


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("caller", [Caller(rcx=2, cpl=3), Caller(rcx=2, cpl=1), Caller(rcx=2, protected=False)])
def test_only_the_kernel_in_protected_mode_calls(policy: str, caller: Caller) -> None:  # M01, M02
    machine = FlushMachine(policy)
    done = machine.call(caller)
    assert (done.outcome, done.rip_advance, done.result, done.registers) == ("exception", 0, None, {})
    assert len(machine.held(0)) == 8


@pytest.mark.parametrize("os_id", [0, 5])
def test_without_an_identity_kvm_takes_the_call_for_its_own(os_id: int) -> None:  # M03
    machine = FlushMachine(privileges=replace(PRIVILEGES, os_id=os_id, hyperv=False))
    machine.context = replace(
        machine.context, privileges=replace(PRIVILEGES, os_id=0) if not os_id else machine.context.privileges
    )
    machine.write(S01)
    done = machine.call(Caller(rax=0xDEAD, rcx=2, rdx=INPUT))
    assert (done.outcome, done.registers, done.rip_advance) == ("native", {"rax": 0xFFFFFFFFFFFFFC18}, 3)
    assert len(machine.held(2)) == 8
    assert machine.call(Caller(rax=0xDEAD, rcx=2, rdx=INPUT, cpl=3)).registers == {"rax": (1 << 64) - 1}
    assert machine.call(Caller(rax=5)).registers == {"rax": 0}
    assert machine.call(Caller(rax=0xDEAD, long_mode=False)).registers == {"rax": 0xFFFFFC18}


def test_without_an_identity_there_is_no_hypercall_by_the_specification() -> None:
    machine = FlushMachine("tlfs", privileges=replace(PRIVILEGES, os_id=0))
    assert machine.call(F01).outcome == "exception"


@pytest.mark.parametrize(
    ("privileges", "control", "kvm", "tlfs"),
    [
        (NO_REMOTE, 0x2, 6, 6),  # M04
        (NO_SETS, 0x20013, 6, 6),
        (NO_REMOTE, 0x20013, 6, 0),  # KVM wants both bits
        (NO_REMOTE, 0x08000002, 6, 6),  # M06
        (replace(NO_REMOTE, enforced=False), 0x2, 0, 6),
        (replace(ENFORCED, recommendations=leaves.RECOMMEND_LOCAL_FLUSH), 0x2, 6, 0),
        (NO_REMOTE, 0xBEEF, 2, 2),
    ],
)
def test_privileges(privileges: Privileges, control: int, kvm: int, tlfs: int) -> None:
    block = words(0, 2, 0, 1, 4) if control & 0xFF == 0x13 else S01
    for policy, status in (("kvm", kvm), ("tlfs", tlfs)):
        machine = FlushMachine(policy, privileges=privileges)
        assert machine.slow(control, block).registers == {"rax": status}
        assert (len(machine.held(2)) == 8) == (status != 0)


def test_input_in_xmm_registers_is_a_feature() -> None:
    for policy in POLICIES:
        machine = FlushMachine(policy, privileges=NO_XMM)
        assert machine.call(F01).outcome == "exception"  # M07
        assert len(machine.held(2)) == 8
        assert machine.slow(2, S01).result == 0
    lenient = replace(NO_XMM, enforced=False)
    assert FlushMachine("kvm", privileges=lenient).call(F01).result == 0
    assert FlushMachine("tlfs", privileges=lenient).call(F01).outcome == "exception"
    # M09: KVM looks at reserved bits first
    assert FlushMachine("kvm", privileges=NO_XMM).call(replace(F01, rcx=0x08010002)).result == 3


@pytest.mark.parametrize(
    ("control", "kvm", "tlfs"),
    [
        (0x10015, None, 2),  # sends interrupts, but is one of those with input in XMM registers
        (0x15, 2, 2),
        (0x100AF, 2, 5),  # fits two general registers, where R8 holds flags that are not 0
        (0x1000100B0, 2, None),
        (0x1BEEF, 2, 2),
    ],
)
def test_which_calls_have_input_in_xmm_registers(control: int, kvm: int | None, tlfs: int | None) -> None:
    for policy, status in (("kvm", kvm), ("tlfs", tlfs)):
        done = FlushMachine(policy, privileges=NO_XMM).call(replace(F01, rcx=control))
        assert done.result == status and done.outcome == ("exception" if status is None else "completed")


@pytest.mark.parametrize("policy", POLICIES)
def test_a_32_bit_caller_uses_pairs(policy: str) -> None:
    machine = FlushMachine(policy)
    page = 0x7F0000001000 << 64
    done = machine.call(Caller(rdx=1, rax=0x10003, rcx=0x1000, xmm=(1 | page, 0, 0, 0, 0, 0), long_mode=False))  # M10
    assert done.registers == {"rdx": 1, "rax": 0}
    assert (done.result, done.flushed) == (0x100000000, (0,))
    assert names(done.effects[0].required) == "A"
    machine = FlushMachine(policy)
    machine.write(S01)
    done = machine.call(Caller(rax=2, rcx=INPUT, long_mode=False))  # M12
    assert (done.registers, done.flushed) == ({"rdx": 0, "rax": 0}, (2,))


def test_upper_halves_do_not_count_in_32_bit_mode() -> None:
    machine = FlushMachine()
    machine.write(S01)
    high = 0xDEAD << 32
    done = machine.call(Caller(rax=high | 2, rdx=high, rbx=high, rcx=high | INPUT, rdi=high, long_mode=False))
    assert (done.result, done.flushed) == (0, (2,))


@pytest.mark.parametrize(
    "caller",
    [Caller(rcx=1 << 64), Caller(xmm=(0,) * 5), Caller(xmm=(1 << 128, 0, 0, 0, 0, 0)), Caller(cpl=4), Caller(r8=-1)],
)
def test_registers_hold_what_they_can(caller: Caller) -> None:
    with pytest.raises(InvalidValue):
        FlushMachine().call(caller)


@pytest.mark.parametrize(
    ("cpuid", "control", "block", "status"),
    [  # hyperv_features: the stages with flush calls
        ({}, 0xBEEF, words(0, 0, 0), 2),
        ({}, 0x2, words(0, 0, 0), 6),
        ({"recommendations": 4}, 0x2, words(0, 0, 0), 0),
        ({"recommendations": 4}, 0x13, words(0, 0, 0, 0), 6),
        ({"recommendations": 0x804}, 0x13, words(0, 0, 0, 0), 0),
        ({"recommendations": 0x804}, 0x10002, b"", None),
        ({"recommendations": 0x804, "features_edx": 0x10}, 0x10002, b"", 0),
    ],
)
def test_features_appear_one_by_one(cpuid: dict[str, int], control: int, block: bytes, status: int | None) -> None:
    privileges = Privileges(hyperv=True, os_id=1, enforced=True, features_eax=0x20, **cpuid)
    done = FlushMachine(privileges=privileges).slow(control, block)
    assert (done.outcome == "exception") if status is None else done.result == status
