"""The binary façade: capability vectors, Hyper-V CPUID vectors, levels, and what hyperv_cpuid asserts."""

from __future__ import annotations

from typing import Any

import pytest

from engine.abi import SYSTEM, VCPU, VM, Reply, UserBuffer, UserMemory
from engine.arch.hyperv_cpuid import CpuidEntry, pack_entry, unpack_entries
from engine.ioctls import IOCTLS
from engine.vcpu.vcpu import Vcpu, VcpuHost
from tests.engine.ioctls.bare_vcpu import Call, ioctl
from tests.engine.nested.support import ERAS, EV, NONE, blob, do_set, make_vcpu, vmx_cpuid
from tests.engine.ram import Ram

POINTER = 0x1000


def enable(vcpu: Vcpu, cap: int = 163, flags: int = 0, pointer: int = POINTER) -> tuple[Reply, int]:
    raw = cap.to_bytes(4, "little") + flags.to_bytes(4, "little") + pointer.to_bytes(8, "little")
    memory = UserMemory([(POINTER, bytearray(b"\xee\xee"))])
    reply = ioctl(Call("KVM_ENABLE_CAP", VCPU, UserBuffer.of(raw.ljust(104, b"\0")), memory=memory, vcpu=vcpu))
    return reply, int.from_bytes(memory.segments[0][1], "little")


def hv_cpuid(call: Call, nent: int, room: int = 20) -> tuple[Reply, int, tuple[CpuidEntry, ...], bytes]:
    call.user = UserBuffer.of(nent.to_bytes(4, "little") + bytes(4) + b"\xee" * 40 * room)
    reply = ioctl(call)
    assert call.user.data is not None
    data = bytes(call.user.data)
    count = int.from_bytes(data[:4], "little")
    return reply, count, unpack_entries(data[8 : 8 + 40 * count]), data


def on_vcpu(vcpu: Vcpu, **fields: Any) -> Call:
    return Call("KVM_GET_SUPPORTED_HV_CPUID", VCPU, vcpu=vcpu, **fields)


@pytest.mark.parametrize("era", ERAS)
def test_k01_k09(era: str) -> None:
    for vmx in (True, False):
        vcpu = make_vcpu(era, vmx=vmx)
        assert enable(vcpu) == (Reply(0), 0x0101)
        assert enable(vcpu) == (Reply(0), 0x0101)


@pytest.mark.parametrize("era", ERAS)
def test_k03_flags(era: str) -> None:
    vcpu = make_vcpu(era)
    assert enable(vcpu, flags=1) == (Reply(-1, "EINVAL"), 0xEEEE)
    assert not vcpu.evmcs_enabled


@pytest.mark.parametrize("era", ERAS)
def test_k04_a_fault_does_not_disable(era: str) -> None:
    vcpu = make_vcpu(era)
    assert enable(vcpu, pointer=0)[0] == Reply(-1, "EFAULT")
    assert vcpu.evmcs_enabled
    assert do_set(vcpu, Ram(), blob(vmxon=NONE, vmcs12_pa=NONE, flags=EV)).returns == 0


def test_k06_no_hook() -> None:
    amd, plain = VcpuHost(vendor="amd"), VcpuHost(nested=False)
    for era, host, errno in (
        ("kvm-2019", amd, "ENODEV"),
        ("kvm-latest", amd, "ENOTTY"),
        ("kvm-2019", plain, "ENOTTY"),
        ("kvm-2019", VcpuHost(evmcs=False), "ENOTTY"),
        ("kvm-latest", VcpuHost(evmcs=False), "EINVAL"),
    ):
        assert enable(make_vcpu(era, host=host))[0] == Reply(-1, errno)
    assert enable(make_vcpu("kvm-latest", host=plain)) == (Reply(0), 0)


@pytest.mark.parametrize("era", ERAS)
def test_k07_unknown(era: str) -> None:
    assert enable(make_vcpu(era), cap=0xFFFF)[0] == Reply(-1, "EINVAL")
    short = Call("KVM_ENABLE_CAP", VCPU, UserBuffer.of(bytes(103)), vcpu=make_vcpu(era))
    assert ioctl(short) == Reply(-1, "EFAULT")


@pytest.mark.parametrize(
    ("era", "evmcs", "nent", "expected"),
    [
        ("kvm-2019", False, 5, None),
        ("kvm-latest", False, 5, None),
        ("kvm-2019", False, 6, 6),
        ("kvm-latest", False, 6, None),
        ("kvm-2019", True, 6, None),
        ("kvm-2019", True, 7, 7),
        ("kvm-latest", True, 7, None),
        ("kvm-2019", True, 10, 7),
        ("kvm-latest", True, 10, 10),
        ("kvm-latest", False, 0, None),
        ("kvm-2019", False, 0, None),
    ],
)
def test_l02_to_l08(era: str, evmcs: bool, nent: int, expected: int | None) -> None:
    reply, count, entries, data = hv_cpuid(on_vcpu(make_vcpu(era, evmcs=evmcs)), nent)
    if expected is None:
        assert (reply, count) == (Reply(-1, "E2BIG"), nent)
        assert set(data[8:]) == {0xEE}
        return
    assert (reply, count) == (Reply(0), expected)
    assert set(data[8 + 40 * expected :]) == {0xEE}
    leaves = {entry.function: entry for entry in entries}
    if evmcs:
        assert leaves[0x4000000A].eax == (0x101 if era == "kvm-2019" else 0xA0101)
        assert leaves[0x40000004].eax == (0x4C2C if era == "kvm-2019" else 0x4E2C)


def test_l09_system_device() -> None:
    for era, expected in (("kvm-2019", Reply(-1, "EINVAL")), ("kvm-latest", Reply(0))):
        call = Call("KVM_GET_SUPPORTED_HV_CPUID", SYSTEM, profile=era)
        reply, count, entries, _ = hv_cpuid(call, 10)
        assert reply == expected
        if reply.returns == 0:
            assert (count, entries[-1].eax) == (10, 0xA0101)
    call = Call("KVM_GET_SUPPORTED_HV_CPUID", SYSTEM, profile="kvm-latest", host=VcpuHost(nested=False))
    assert hv_cpuid(call, 10)[2][-1].eax == 0xA0000


def test_hyperv_cpuid_of_2019() -> None:
    vcpu = make_vcpu("kvm-2019")
    assert hv_cpuid(on_vcpu(vcpu), 0)[0].errno == "E2BIG"
    for count in (6, 7):
        reply, nent, entries, data = hv_cpuid(on_vcpu(vcpu), 20)
        assert (reply.returns, nent) == (0, count)
        assert all(0x40000000 <= entry.function <= 0x4000000A for entry in entries)
        assert all(entry.index == entry.flags == 0 for entry in entries)
        assert all(data[8 + 40 * n + 28 : 48 + 40 * n] == bytes(12) for n in range(nent))
        assert enable(vcpu)[0].returns == 0
    assert (entries[0].eax, entries[3].eax, entries[5].eax) == (0x4000000A, 0x2AFF, 288)


@pytest.mark.parametrize("apic", [False, True])
@pytest.mark.parametrize("smt", [False, True])
def test_hyperv_cpuid_newest(apic: bool, smt: bool) -> None:
    vcpu = make_vcpu("kvm-latest", host=VcpuHost(smt_possible=smt), lapic_in_kernel=apic)
    for version in (0, 0x0101):
        _, nent, entries, _ = hv_cpuid(on_vcpu(vcpu), 20)
        leaves = {entry.function: entry for entry in entries}
        assert nent == 10
        assert max(leaves) == leaves[0x40000000].eax == 0x40000082
        assert bool(leaves[0x40000003].edx >> 19 & 1) == apic
        assert bool(leaves[0x40000004].eax >> 10 & 1) == apic
        assert bool(leaves[0x40000004].eax >> 18 & 1) != smt
        assert bool(leaves[0x40000004].eax >> 14 & 1) == bool(version)
        assert leaves[0x4000000A].eax == 0xA0000 | version
        assert enable(vcpu)[0].returns == 0


def test_hv_cpuid_faults() -> None:
    vcpu = make_vcpu("kvm-2019")
    assert ioctl(on_vcpu(vcpu)) == Reply(-1, "EFAULT")
    assert ioctl(on_vcpu(vcpu, user=UserBuffer.of(bytes(7)))) == Reply(-1, "EFAULT")
    assert ioctl(on_vcpu(vcpu, user=UserBuffer.of(b"\x06" + bytes(7)))) == Reply(-1, "EFAULT")
    frozen = UserBuffer.of(b"\x06" + bytes(8 + 240), read_only=True)
    assert ioctl(on_vcpu(vcpu, user=frozen)) == Reply(-1, "EFAULT")


@pytest.mark.parametrize(
    ("cap", "host", "old", "new"),
    [
        (157, VcpuHost(), 8320, 8320),
        (157, VcpuHost(nested=False), 0, 8320),
        (157, VcpuHost(vendor="amd"), 0, 4224),
        (163, VcpuHost(), 1, 1),
        (163, VcpuHost(nested=False), 1, 1),
        (163, VcpuHost(vendor="amd"), 1, 0),
        (163, VcpuHost(evmcs=False), 0, 0),
        (167, VcpuHost(), 1, 1),
        (191, VcpuHost(), 0, 1),
        (1, VcpuHost(), 0, 0),
    ],
)
def test_check_extension(cap: int, host: VcpuHost, old: int, new: int) -> None:
    for era, expected in zip(ERAS, (old, new), strict=True):
        for level in (SYSTEM, VM):
            assert ioctl(Call("KVM_CHECK_EXTENSION", level, arg=cap, host=host, profile=era)) == Reply(expected)


def test_wrong_levels() -> None:
    vcpu = make_vcpu("kvm-2019")
    assert ioctl(Call("KVM_SET_NESTED_STATE", SYSTEM)).errno == "EINVAL"
    assert ioctl(Call("KVM_SET_NESTED_STATE", VM)).errno == "ENOTTY"
    assert ioctl(Call("KVM_CHECK_EXTENSION", VCPU, vcpu=vcpu)).errno == "EINVAL"
    assert ioctl(Call("KVM_GET_SUPPORTED_CPUID", VCPU, vcpu=vcpu)).errno == "EINVAL"
    assert "KVM_SET_NESTED_STATE" in IOCTLS.names and "KVM_SET_ONE_REG" not in IOCTLS.names


@pytest.mark.parametrize("era", ERAS)
def test_supported_cpuid_feeds_set_cpuid2(era: str) -> None:
    call = Call("KVM_GET_SUPPORTED_CPUID", SYSTEM, UserBuffer.of(b"\x50" + bytes(7 + 40 * 80)), profile=era)
    assert ioctl(call) == Reply(0)
    assert call.user.data is not None
    vcpu = Vcpu(profile=era)
    assert not vcpu.vmx_allowed
    assert ioctl(Call("KVM_SET_CPUID2", VCPU, UserBuffer(call.user.data), vcpu=vcpu)) == Reply(0)
    assert vcpu.vmx_allowed
    assert vcpu.maxphyaddr == 46
    call.user = UserBuffer.of(bytes(8))
    assert ioctl(call) == Reply(-1, "E2BIG")


def test_set_cpuid2_refusals() -> None:
    for era, limit in (("kvm-2019", 80), ("kvm-latest", 256)):
        vcpu = make_vcpu(era)
        before = vcpu.cpuid
        for raw, errno in (
            (bytes(7), "EFAULT"),
            ((limit + 1).to_bytes(8, "little"), "E2BIG"),
            ((1).to_bytes(8, "little") + bytes(39), "EFAULT"),
        ):
            assert ioctl(Call("KVM_SET_CPUID2", VCPU, UserBuffer.of(raw), vcpu=vcpu)) == Reply(-1, errno)
        assert vcpu.cpuid == before
        assert ioctl(Call("KVM_SET_CPUID2", VCPU, UserBuffer.of(bytes(8)), vcpu=vcpu)) == Reply(0)
        assert vcpu.cpuid == ()
    frozen = make_vcpu("kvm-latest", has_run=True)
    body = pack_entry(CpuidEntry(1))
    call = Call("KVM_SET_CPUID2", VCPU, UserBuffer.of((1).to_bytes(8, "little") + body), vcpu=frozen)
    assert ioctl(call) == Reply(-1, "EINVAL")


@pytest.mark.parametrize("era", ERAS)
def test_state_calls_carry_the_deciding_check(era: str) -> None:
    vcpu = make_vcpu(era)
    reply = ioctl(Call("KVM_SET_NESTED_STATE", VCPU, UserBuffer.of(blob(vmxon=1)), vcpu=vcpu, guest=Ram()))
    assert reply == Reply(-1, "EINVAL", "V3b")
    call = Call("KVM_GET_NESTED_STATE", VCPU, UserBuffer.of(bytes(4) + b"\x80\x20" + bytes(8314)), vcpu=vcpu)
    assert ioctl(call) == Reply(0)
    assert call.user.data is not None
    assert call.user.data[4:8] == (128).to_bytes(4, "little")
    assert vmx_cpuid() == vcpu.cpuid
