"""LAPIC, XSAVE, XCRS and DEBUGREGS: checked as each kernel does, given back byte for byte, kept with the machine."""

from __future__ import annotations

import struct
from collections.abc import Iterator

import pytest

from engine.abi import VCPU, VM, Call, Reply, UserBuffer
from engine.arch.hyperv_cpuid import CpuidEntry
from engine.arch.kvm_vcpu_structs import DEBUGREGS
from engine.ioctls import IOCTLS, Target, as_created
from engine.machine import VirtualMachine
from engine.state.config import HostConfig
from tests.engine.builders import PROFILES, machine, round_trip

AMD = HostConfig(vendor="amd")
XCR0_ALL = CpuidEntry(0xD, flags=1, eax=7, ebx=0x340, ecx=0x340)
X2APIC = CpuidEntry(1, ecx=1 << 21)
APIC_BASE, X2APIC_MODE = 0x1B, 0xFEE0_0D00
ID, TPR, PPR, LDR, ICR, ICR2, TIMER, TMICT, TMCCT = 0x20, 0x80, 0xA0, 0xD0, 0x300, 0x310, 0x320, 0x380, 0x390


def vm_with(profile: str, *cpuid: CpuidEntry, host: HostConfig | None = None, irqchip: bool = True) -> VirtualMachine:
    """A machine with vCPU 0 and vCPU 5, made by ioctls."""
    vm = machine(profile, spp=False, vcpus=(), vcpu_room=2, host=host)
    as_created(vm)
    if irqchip:
        assert IOCTLS.perform(Target(profile, vm.config.host, vm), Call("KVM_CREATE_IRQCHIP", VM)) == Reply(0)
    for vcpu in (0, 5):
        vm.create_vcpu(vcpu)
        vm.nested.set_cpuid(vcpu, cpuid)
    return vm


def call(vm: VirtualMachine, name: str, data: bytes | None, vcpu: int = 5) -> tuple[str | None, bytes]:
    user = UserBuffer.of(data)
    reply = IOCTLS.perform(Target(vm.config.profile, vm.config.host, vm, vcpu), Call(name, VCPU, user))
    assert reply.returns == (0 if reply.errno is None else -1)
    return reply.errno, bytes(user.data or b"")


def get(vm: VirtualMachine, name: str, size: int, vcpu: int = 5) -> bytes:
    errno, data = call(vm, f"KVM_GET_{name}", bytes(size), vcpu)
    assert errno is None
    return data


def put(vm: VirtualMachine, name: str, data: bytes, vcpu: int = 5) -> str | None:
    return call(vm, f"KVM_SET_{name}", data, vcpu)[0]


def changed(page: bytes, at: int, value: int, size: int = 4) -> bytes:
    return page[:at] + value.to_bytes(size, "little") + page[at + size :]


def word(page: bytes, at: int, size: int = 4) -> int:
    return int.from_bytes(page[at : at + size], "little")


def both(vm: VirtualMachine) -> Iterator[VirtualMachine]:
    """The machine, and what comes back of it."""
    yield vm
    yield round_trip(vm)


SIZES = {"LAPIC": 1024, "XSAVE": 4096, "XCRS": 392, "DEBUGREGS": 128}


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("name", SIZES)
def test_what_is_got_can_be_set_and_faults_are_efault(profile: str, name: str) -> None:
    vm = vm_with(profile, XCR0_ALL)
    first = get(vm, name, SIZES[name])
    assert put(vm, name, first) is None
    for machine_ in both(vm):
        assert get(machine_, name, SIZES[name]) == first
    assert call(vm, f"KVM_GET_{name}", bytes(SIZES[name] - 1))[0] == "EFAULT"
    assert put(vm, name, first[:-1]) == "EFAULT" and put(vm, name, b"") == "EFAULT"


@pytest.mark.parametrize("profile", PROFILES)
def test_what_is_kept_costs_no_frame(profile: str) -> None:
    vm = vm_with(profile, XCR0_ALL)
    before = vm.frames_in_use
    assert put(vm, "LAPIC", bytes(range(256)) * 4) is None
    assert put(vm, "XSAVE", changed(bytes(range(256)) * 2, 24, 0x1F80).ljust(4096, b"\0")) is None
    assert vm.frames_in_use == before


# ---- local APIC


@pytest.mark.parametrize("profile", PROFILES)
def test_an_apic_after_reset(profile: str) -> None:
    vm = vm_with(profile)
    first, fifth = get(vm, "LAPIC", 1024, 0), get(vm, "LAPIC", 1024)
    assert (word(first, ID), word(fifth, ID)) == (0, 5 << 24)
    assert {at: word(fifth, at) for at in range(0, 1024, 4) if word(fifth, at)} == {
        ID: 5 << 24,
        0x30: 0x50014,
        0xE0: 0xFFFF_FFFF,
        0xF0: 0xFF,
        **dict.fromkeys(range(0x320, 0x380, 0x10), 1 << 16),
    }
    assert word(first, 0x350) == 0x700, "LINT0 of the boot processor"
    vm.nested.choose(boot_vcpu=5)
    assert [word(get(vm, "LAPIC", 1024, vcpu), 0x350) for vcpu in (0, 5)] == [1 << 16, 0x700]


@pytest.mark.parametrize("profile", PROFILES)
def test_an_apic_that_is_not_in_the_kernel(profile: str) -> None:
    vm = vm_with(profile, irqchip=False)
    assert call(vm, "KVM_GET_LAPIC", None)[0] == put(vm, "LAPIC", b"") == "EINVAL"


@pytest.mark.parametrize("profile", PROFILES)
def test_an_apic_is_given_back(profile: str) -> None:
    """All but what follows from the rest: the version and the processor priority."""
    vm = vm_with(profile)
    page = changed(changed(bytes(range(256)) * 4, TMICT, 0x4000_0000), TMCCT, 0x3000_0000)
    page = changed(page, TIMER, 0x1_00EC)
    assert put(vm, "LAPIC", page) is None
    serving = max(
        bit for at in range(8) for bit in range(32 * at, 32 * at + 32) if word(page, 0x100 + 16 * at) >> bit % 32 & 1
    )
    expected = changed(changed(page, 0x30, 0x50014), PPR, max(word(page, TPR) & 0xFF, serving & 0xF0))
    for machine_ in both(vm):
        assert get(machine_, "LAPIC", 1024) == expected
    assert get(vm, "LAPIC", 1024, 0) != expected


@pytest.mark.parametrize("profile", PROFILES)
def test_task_priority_is_cr8(profile: str) -> None:
    vm = vm_with(profile)
    assert put(vm, "LAPIC", changed(get(vm, "LAPIC", 1024), TPR, 0x74)) is None
    assert vm.nested.vcpu(5).registers["cr8"] == 7
    with vm.nested.change(5) as (vcpu, _):
        vcpu.registers["cr8"] = 9
    page = get(vm, "LAPIC", 1024)
    assert (word(page, TPR), word(page, PPR)) == (0x94, 0x94)


@pytest.mark.parametrize(
    ("count", "left", "mode", "told"), [(9, 4, 0, 4), (9, 10, 0, 9), (9, 0, 1, 9), (9, 0, 0, 0), (0, 4, 0, 0)]
)
def test_what_is_left_of_a_count(count: int, left: int, mode: int, told: int) -> None:
    """The kernel of 2019 gives the word as it was stored, today's what is left."""
    for profile, expected in (("kvm-2019", left), ("kvm-latest", told)):
        vm = vm_with(profile)
        page = changed(changed(changed(get(vm, "LAPIC", 1024), TMICT, count), TMCCT, left), TIMER, mode << 17)
        assert put(vm, "LAPIC", page) is None
        assert word(get(vm, "LAPIC", 1024), TMCCT) == expected


@pytest.mark.parametrize("profile", PROFILES)
def test_the_timer_to_a_deadline_loses_its_count(profile: str) -> None:
    vm = vm_with(profile, CpuidEntry(1, ecx=1 << 24))
    page = changed(changed(get(vm, "LAPIC", 1024), TMICT, 9), TIMER, 0b10 << 17)
    assert put(vm, "LAPIC", page) is None
    assert word(get(vm, "LAPIC", 1024), TMICT) == 0
    unknown = vm_with(profile)
    assert put(unknown, "LAPIC", page) is None
    assert word(get(unknown, "LAPIC", 1024), TMICT) == 9, "without it in CPUID there is no such mode"


@pytest.mark.parametrize("host", [None, AMD], ids=["intel", "amd"])
@pytest.mark.parametrize("profile", PROFILES)
def test_x2apic(profile: str, host: HostConfig | None) -> None:
    """The id is in the upper byte; today it is always that of the vCPU, and the command register is one on Intel."""
    vm = vm_with(profile, X2APIC, host=host)
    assert vm.nested.write_msrs(5, [(APIC_BASE, X2APIC_MODE)]).refused is None
    page = get(vm, "LAPIC", 1024)
    assert (word(page, ID), word(page, LDR)) == (5 << 24, 1 << 5)
    page = changed(changed(changed(page, ID, 0x2300_0000), LDR, 0x77), ICR, 0x4041)
    page = changed(changed(page, ICR + 4, 0x1111_1111), ICR2, 0x2222_2222)
    assert put(vm, "LAPIC", page) is None
    kept = 0x23 if profile == "kvm-2019" else 5
    one = profile == "kvm-latest" and host is None
    for machine_ in both(vm):
        told = get(machine_, "LAPIC", 1024)
        assert (word(told, ID), word(told, LDR)) == (kept << 24, (kept >> 4) << 16 | 1 << (kept & 15))
        assert word(told, ICR, 8) == (0x2222_2222_0000_4041 if one else 0x1111_1111_0000_4041)
        assert word(told, ICR2) == 0x2222_2222
    assert vm.nested.write_msrs(5, [(APIC_BASE, 0xFEE0_0000)]).refused is None
    assert vm.nested.write_msrs(5, [(APIC_BASE, 0xFEE0_0800)]).refused is None
    assert word(get(vm, "LAPIC", 1024), ID) == 5 << 24


# ---- extended state


def area(present: int, mxcsr: int = 0x1F80, fill: int = 0xA5) -> bytes:
    """An area with everything filled but the header."""
    whole = bytes([fill]) * 512 + present.to_bytes(8, "little") + bytes(56) + bytes([fill]) * 256
    return changed(whole, 24, mxcsr).ljust(4096, b"\0")


@pytest.mark.parametrize("profile", PROFILES)
def test_extended_state_after_reset(profile: str) -> None:
    told = get(vm_with(profile), "XSAVE", 4096)
    assert (word(told, 0, 2), word(told, 24), word(told, 512, 8)) == (0x37F, 0x1F80, 0)
    assert word(told, 28) == (0 if profile == "kvm-2019" else 0xFFFF)


def test_extended_state_of_2019_is_given_back() -> None:
    """The legacy part whatever is present, the rest of what is present and in the guest CPUID."""
    vm = vm_with("kvm-2019", XCR0_ALL)
    for present in (0, 1, 2, 7):
        given = area(present)
        assert put(vm, "XSAVE", given) is None
        expected = given if present & 4 else given[:576].ljust(4096, b"\0")
        for machine_ in both(vm):
            assert get(machine_, "XSAVE", 4096) == expected
    vm.nested.set_cpuid(5, ())
    assert word(get(vm, "XSAVE", 4096), 512, 8) == 3, "without leaf 0xD the guest has no AVX"


def test_extended_state_of_today_shows_what_is_present() -> None:
    vm = vm_with("kvm-latest", XCR0_ALL)
    given = area(7)
    assert put(vm, "XSAVE", given) is None
    software = struct.pack("<IIQI", 0x4650_5853, 836, 7, 832).ljust(48, b"\0")
    expected = given[:416] + bytes(48) + software + given[512:]
    for machine_ in both(vm):
        assert get(machine_, "XSAVE", 4096) == expected
        assert call(machine_, "KVM_GET_XSAVE2", bytes(4096)) == (None, expected)
    assert put(vm, "XSAVE", expected) is None and get(vm, "XSAVE", 4096) == expected
    for present, fcw, mxcsr, xmm in (
        (0, 0x37F, 0x1F80, 0),
        (1, 0xA5A5, 0x1F80, 0),
        (2, 0x37F, 0x1FA0, 0xA5),
        (4, 0x37F, 0x1FA0, 0),
    ):
        assert put(vm, "XSAVE", area(present, 0x1FA0)) is None
        told = get(vm, "XSAVE", 4096)
        assert (word(told, 0, 2), word(told, 24), told[160], word(told, 512, 8)) == (fcw, mxcsr, xmm, present)


@pytest.mark.parametrize("profile", PROFILES)
def test_extended_state_that_is_refused(profile: str) -> None:
    vm, old = vm_with(profile, XCR0_ALL), profile == "kvm-2019"
    before = get(vm, "XSAVE", 4096)
    assert put(vm, "XSAVE", area(8)) == put(vm, "XSAVE", area(1 << 63)) == "EINVAL"
    assert put(vm, "XSAVE", area(1, 0x1_0000)) == "EINVAL"
    assert get(vm, "XSAVE", 4096) == before
    today = None if old else "EINVAL"
    assert put(vm, "XSAVE", changed(area(0), 520, 1)) == today, "XCOMP_BV"
    assert put(vm, "XSAVE", changed(area(0), 575, 1, 1)) == today, "reserved"
    assert put(vm, "XSAVE", area(0, 0x1_0000)) == ("EINVAL" if old else None), "MXCSR is of no component here"
    assert put(vm_with(profile, host=AMD), "XSAVE", area(1, 0x2_0000)) is None
    if old:
        assert call(vm, "KVM_GET_XSAVE2", bytes(4096))[0] == "EINVAL"


# ---- XCR0


def xcrs(*values: tuple[int, int], count: int | None = None, flags: int = 0) -> bytes:
    head = struct.pack("<II", len(values) if count is None else count, flags)
    return (head + b"".join(struct.pack("<IIQ", number, 0, value) for number, value in values)).ljust(392, b"\0")


@pytest.mark.parametrize("profile", PROFILES)
def test_xcr0(profile: str) -> None:
    vm = vm_with(profile, XCR0_ALL)
    assert get(vm, "XCRS", 392) == xcrs((0, 1))
    for value in (1, 3, 7):
        assert put(vm, "XCRS", xcrs((0, value))) is None
        for machine_ in both(vm):
            assert get(machine_, "XCRS", 392) == xcrs((0, value))
    for bad in (0, 2, 5, 6, 8 | 7, 1 << 63 | 7):
        assert put(vm, "XCRS", xcrs((0, bad))) == "EINVAL"
    assert put(vm, "XCRS", xcrs((0, 3), flags=1)) == put(vm, "XCRS", xcrs((0, 3), count=17)) == "EINVAL"
    assert put(vm, "XCRS", xcrs((1, 0xFFFF), (0, 3), (0, 0))) is None, "the first that is of XCR0"
    assert get(vm, "XCRS", 392) == xcrs((0, 3))
    assert put(vm, "XCRS", xcrs((1, 0))) is None and put(vm, "XCRS", xcrs()) is None
    vm.nested.set_cpuid(5, ())
    assert put(vm, "XCRS", xcrs((0, 3))) == "EINVAL" and put(vm, "XCRS", xcrs((0, 1))) is None


# ---- debug registers


@pytest.mark.parametrize("profile", PROFILES)
def test_debug_registers(profile: str) -> None:
    vm = vm_with(profile)
    assert DEBUGREGS.get(get(vm, "DEBUGREGS", 128), "dr6") == 0xFFFF_0FF0
    assert DEBUGREGS.get(get(vm, "DEBUGREGS", 128), "dr7") == 0x400
    given = bytearray(128)
    for name, value in {"dr0": 1 << 63, "dr3": 7, "dr6": 0xFFFF_FFFF, "dr7": 0x1_2345}.items():
        DEBUGREGS.put(given, name, value)
    assert put(vm, "DEBUGREGS", bytes(given)) is None
    for machine_ in both(vm):
        assert get(machine_, "DEBUGREGS", 128) == bytes(given)
    for name, value in (("dr6", 1 << 32), ("dr7", 1 << 63), ("flags", 1)):
        bad = bytearray(given)
        DEBUGREGS.put(bad, name, value)
        assert put(vm, "DEBUGREGS", bytes(bad)) == "EINVAL"
    assert get(vm, "DEBUGREGS", 128) == bytes(given)
    given[64:] = b"\x01" * 64
    assert put(vm, "DEBUGREGS", bytes(given)) is None
    assert get(vm, "DEBUGREGS", 128)[56:] == bytes(72), "what is reserved is not kept"
