"""The ioctls of the nested-state programs: bytes, return values and errnos as a C program would see them."""

from __future__ import annotations

import struct
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import pytest

from engine.arch import kvm_nested_state as abi
from engine.arch.hyperv_cpuid import pack_entry, unpack_entries
from engine.arch.kvm_vcpu_structs import EVENTS, REGS, SREGS
from engine.arch.vmx_msrs import EFER_SVME
from engine.ioctls import IOCTLS, capabilities, cpuid, msrs, nested_state, registers
from engine.vcpu.cpuid import ECX1_VMX
from tests.contract.client import ContractClient
from tests.engine.nested.selftest_rows import SVM_FRESH, SVM_WITH_SVME, Row, newest_vmx_rows, rows_of_2019
from tests.engine.nested.support import ERAS, EV, GIF, GM, MIN32, MINUS, blob, vmcs12
from tests.support.guests import MakeVm, make_nested
from tests.support.ioctls import Result, enable_cap, ioctl


class Program:
    """What the upstream programs do with file descriptors, over HTTP."""

    def __init__(self, client: ContractClient, profile: str, vcpu: int, irqchip: bool = True, **host: Any) -> None:
        self.client, self.profile, self.host = client, profile, host
        self.vm = f"/v1/vms/{self._system('KVM_CREATE_VM').json()['vm']}"
        if irqchip:
            assert ioctl(client, self.vm, "KVM_CREATE_IRQCHIP").returns == 0
        assert ioctl(client, self.vm, "KVM_CREATE_VCPU", arg=vcpu).returns > 0
        self.vcpu = f"{self.vm}/vcpus/{vcpu}"

    def _system(self, name: str, **members: Any) -> Any:
        body = {"host": self.host, **members}
        return self.client.post(f"/v1/ioctls/{name}", params={"profile": self.profile}, json=body)

    def system(self, name: str, data: bytes | None = None, arg: int = 0) -> Result:
        members = {"data": data.hex()} if data is not None else {"arg": arg}
        told = self._system(name, **members).json()
        back = bytes.fromhex(told["data"]) if told["data"] is not None else None
        return Result(told["return"], told["errno"], back, [])

    def call(self, name: str, data: bytes | None = None, **members: Any) -> Result:
        return ioctl(self.client, self.vcpu, name, data, **members)

    def supported_cpuid(self) -> bytes:
        listed = self.system("KVM_GET_SUPPORTED_CPUID", struct.pack("<II", 100, 0) + bytes(40 * 100))
        assert listed.returns == 0 and listed.data is not None
        count = int.from_bytes(listed.data[:4], "little")
        return listed.data[: 8 + 40 * count]

    def set_cpuid(self, *, vmx: bool = True) -> None:
        listed = bytearray(self.supported_cpuid())
        for at in range(8, len(listed), 40):
            if listed[at : at + 4] == b"\1\0\0\0" and not vmx:
                ecx = int.from_bytes(listed[at + 20 : at + 24], "little") & ~ECX1_VMX
                listed[at + 20 : at + 24] = ecx.to_bytes(4, "little")
        assert self.call("KVM_SET_CPUID2", bytes(listed)).returns == 0

    def enable_evmcs(self) -> None:
        word = {"addr": "0x7000", "data": "0000"}
        done = self.call("KVM_ENABLE_CAP", enable_cap(163, 0, 0x7000), memory=[word])
        assert (done.returns, done.memory) == (0, [b"\x01\x01"])

    def rows(self, rows: Iterable[Row]) -> None:
        for number, fields, returns, _ in rows:
            data = None if fields is None else blob(**fields)
            assert (number, self.call("KVM_SET_NESTED_STATE", data).short) == (number, returns)

    def get_state(self, room: int = 4224) -> bytes:
        asked = bytearray(4224)
        asked[4:8] = room.to_bytes(4, "little")
        done = self.call("KVM_GET_NESTED_STATE", bytes(asked))
        assert done.returns == 0 and done.data is not None
        return done.data

    def close(self) -> None:
        assert self.client.delete(self.vm).status_code == 204


@pytest.mark.parametrize("evmcs", [False, True])
def test_vmx_set_nested_state_test_of_2019(client: ContractClient, evmcs: bool) -> None:
    program = Program(client, "kvm-2019", 5, nested_evmcs=evmcs)
    assert program.system("KVM_CHECK_EXTENSION", arg=157).returns == 8320
    assert bool(program.system("KVM_CHECK_EXTENSION", arg=163).returns) == evmcs
    rows = rows_of_2019(evmcs)
    program.rows(rows.fresh)
    program.set_cpuid()
    program.rows(rows.with_vmx)
    if evmcs:
        program.enable_evmcs()
    program.rows(rows.with_evmcs)
    found = program.get_state()
    assert (abi.COMMON.get(found, "size"), found[8:24]) == (128, b"\xff" * 16)
    program.close()


@pytest.mark.parametrize("evmcs", [False, True])
def test_nested_set_state_test_on_intel(client: ContractClient, evmcs: bool) -> None:
    program = Program(client, "kvm-latest", 0, nested_evmcs=evmcs)
    assert bool(program.system("KVM_CHECK_EXTENSION", arg=163).returns) == evmcs
    rows = newest_vmx_rows(evmcs)
    program.set_cpuid(vmx=False)
    program.rows(rows.fresh)
    program.set_cpuid()
    program.rows(rows.with_vmx)
    if evmcs:
        program.enable_evmcs()
    program.rows(rows.with_evmcs)
    found = program.get_state()
    assert (abi.COMMON.get(found, "size"), abi.COMMON.get(found, "flags"), found[8:24]) == (128, 0, b"\xff" * 16)
    program.close()


def test_nested_set_state_test_on_amd(client: ContractClient) -> None:
    program = Program(client, "kvm-latest", 0, vendor="amd", spp=False)
    assert program.system("KVM_CHECK_EXTENSION", arg=157).returns == 4224
    assert program.system("KVM_CHECK_EXTENSION", arg=163).returns == 0
    program.set_cpuid()
    program.rows(SVM_FRESH)
    sregs = bytearray(program.call("KVM_GET_SREGS", bytes(312)).data or b"")
    SREGS.put(sregs, "ia32_efer", SREGS.get(sregs, "ia32_efer") | EFER_SVME)
    assert program.call("KVM_SET_SREGS", bytes(sregs)).returns == 0
    program.rows(SVM_WITH_SVME)
    found = program.get_state()
    assert (abi.COMMON.get(found, "flags"), abi.COMMON.get(found, "size"), found[8:16]) == (GIF, 128, bytes(8))
    program.close()


def listed(data: bytes | None) -> list[Any]:
    assert data is not None
    count = int.from_bytes(data[:4], "little")
    return list(unpack_entries(data[8 : 8 + 40 * count]))


def room(count: int, entries: int = 20) -> bytes:
    return struct.pack("<II", count, 0) + bytes(40 * entries)


def test_hyperv_cpuid_of_2019(client: ContractClient) -> None:
    program = Program(client, "kvm-2019", 5)
    name = "KVM_GET_SUPPORTED_HV_CPUID"
    refused = program.call(name, room(5))
    assert (refused.errno, refused.data) == ("E2BIG", room(5))
    assert len(listed(program.call(name, room(20)).data)) == 6
    assert program.system(name, room(20)).errno == "EINVAL"
    program.enable_evmcs()
    assert program.call(name, room(6)).errno == "E2BIG"
    leaves = listed(program.call(name, room(7)).data)
    assert [leaf.function for leaf in leaves] == [*range(0x4000_0000, 0x4000_0006), 0x4000_000A]
    assert (leaves[6].eax, leaves[4].eax) == (0x101, 0x4C2C)
    assert program.call(name, None).errno == program.call(name, room(7, 6)).errno == "EFAULT"
    program.close()


@pytest.mark.parametrize("irqchip", [False, True])
@pytest.mark.parametrize("smt", [False, True])
def test_hyperv_cpuid_today(client: ContractClient, irqchip: bool, smt: bool) -> None:
    program = Program(client, "kvm-latest", 0, irqchip=irqchip, smt=smt)
    name = "KVM_GET_SUPPORTED_HV_CPUID"
    assert program.call(name, room(9)).errno == program.system(name, room(0)).errno == "E2BIG"
    leaves = {leaf.function: leaf for leaf in listed(program.call(name, room(10)).data)}
    assert len(leaves) == 10 and leaves[0x4000_0000].eax == 0x4000_0082
    assert bool(leaves[0x4000_0003].edx >> 19 & 1) == bool(leaves[0x4000_0004].eax >> 10 & 1) == irqchip
    assert bool(leaves[0x4000_0004].eax >> 18 & 1) == (not smt)
    assert leaves[0x4000_000A].eax == 0xA_0000
    program.enable_evmcs()
    assert listed(program.call(name, room(10)).data)[9].eax == 0xA_0101
    assert listed(program.system(name, room(10)).data)[9].eax == 0xA_0101
    program.close()


@pytest.mark.parametrize(
    ("profile", "host", "flags", "errno"),
    [
        ("kvm-2019", {}, 1, "EINVAL"),
        ("kvm-latest", {}, 1, "EINVAL"),
        ("kvm-2019", {"vendor": "amd"}, 0, "ENODEV"),
        ("kvm-latest", {"vendor": "amd"}, 0, "ENOTTY"),
        ("kvm-2019", {"nested": False}, 0, "ENOTTY"),
        ("kvm-latest", {"nested_evmcs": False}, 0, "EINVAL"),
    ],
)
def test_enabling_the_enlightened_vmcs_fails(
    client: ContractClient, make_vm: MakeVm, profile: str, host: dict[str, Any], flags: int, errno: str
) -> None:
    vcpu = f"{make_vm(profile=profile, spp=False, host=host)}/vcpus/0"
    word = [{"addr": "0x7000", "data": "0000"}]
    refused = ioctl(client, vcpu, "KVM_ENABLE_CAP", enable_cap(163, flags, 0x7000), memory=word)
    assert (refused.errno, refused.memory) == (errno, [b"\0\0"])
    assert client.get(f"{vcpu}/evmcs").json()["enabled"] is False


@pytest.mark.parametrize("profile", ERAS)
def test_k04_a_version_that_cannot_be_stored_enables_all_the_same(
    client: ContractClient, make_vm: MakeVm, profile: str
) -> None:
    vcpu = make_nested(client, make_vm, profile)
    assert ioctl(client, vcpu, "KVM_ENABLE_CAP", enable_cap(163)).errno == "EFAULT"
    assert ioctl(client, vcpu, "KVM_SET_NESTED_STATE", blob(size=128, data=b"", flags=EV, **MINUS)).returns == 0
    assert ioctl(client, vcpu, "KVM_ENABLE_CAP", enable_cap(0xFFFF)).errno == "EINVAL"
    pins = struct.pack("<IIIIQ", 1, 0, 0x48D, 0, 0)
    read = ioctl(client, vcpu, "KVM_GET_MSRS", pins)
    assert read.returns == 1 and read.data is not None
    assert int.from_bytes(read.data[20:24], "little") == (0x3F if profile == "kvm-2019" else 0x7F)


@pytest.mark.parametrize("profile", ERAS)
def test_get_vectors(client: ContractClient, make_vm: MakeVm, profile: str) -> None:
    vcpu = make_nested(client, make_vm, profile)

    def get(size: int, **members: Any) -> Result:
        asked = b"\xee" * 4 + size.to_bytes(4, "little") + b"\xee" * 8312
        return ioctl(client, vcpu, "KVM_GET_NESTED_STATE", asked, **members)

    small = get(127)
    assert (small.errno, small.data) == ("E2BIG", b"\xee" * 4 + (128).to_bytes(4, "little") + b"\xee" * 8312)
    fresh = get(128)
    assert fresh.returns == 0 and fresh.data is not None
    assert fresh.data[:128] == bytes(4) + (128).to_bytes(4, "little") + b"\xff" * 16 + bytes(104)
    assert get(0, read_only=True).errno == "EFAULT"
    assert ioctl(client, vcpu, "KVM_GET_NESTED_STATE", None).errno == "EFAULT"
    assert ioctl(client, vcpu, "KVM_SET_NESTED_STATE", blob(size=1126)).returns == 0
    for size in (128, 4223):
        short = get(size)
        assert short.errno == "E2BIG" and short.data is not None
        assert short.data[4:8] == (4224).to_bytes(4, "little") and set(short.data[8:]) == {0xEE}
    positive = blob(flags=GM, data=vmcs12(MIN32, guest_cr3=1 << 39))
    assert ioctl(client, vcpu, "KVM_SET_NESTED_STATE", positive).returns == (1 if profile == "kvm-2019" else 2)


@pytest.mark.parametrize("profile", ERAS)
def test_registers_come_back_as_they_were_set(client: ContractClient, profile: str) -> None:
    program = Program(client, profile, 0)
    program.set_cpuid()
    first = program.call("KVM_GET_SREGS", bytes(312)).data
    assert first is not None
    assert [SREGS.get(first, name) for name in ("cr0", "cr4", "ia32_efer")] == [0x6000_0010, 0, 0]
    assert SREGS.get(first, "cs_base") == 0xFFFF_0000 and SREGS.get(first, "apic_base") == 0xFEE0_0900
    wanted = bytearray(first)
    long_mode = {"cr0": 0x8000_0031, "cr3": 0x7000, "cr4": 0x220, "ia32_efer": 0xD00, "cs_l": 1, "cs_type": 0xB}
    for name, value in {**long_mode, "cs_g": 1, "cs_s": 1, "tr_unusable": 0, "gdtr_limit": 0x7F}.items():
        SREGS.put(wanted, name, value)
    assert program.call("KVM_SET_SREGS", bytes(wanted)).returns == 0
    assert program.call("KVM_GET_SREGS", bytes(312)).data == bytes(wanted)
    vmcs = client.get(f"{program.vcpu}/vmcs").json()
    assert (vmcs["cr3"], vmcs["efer"]) == ("0x7000", "0xd00")
    for name, value in (("cr4", 0), ("ia32_efer", 0x100), ("apic_base", 0xFEE0_0802), ("cr4", 1 << 18 | 0x220)):
        broken = bytearray(wanted)
        SREGS.put(broken, name, value)
        expected = 0 if name == "cr4" and value else "EINVAL"
        assert program.call("KVM_SET_SREGS", bytes(broken)).short == expected, name
    regs = bytearray(REGS.size)
    for position, name in enumerate(REGS.by_name):
        REGS.put(regs, name, (position + 1) << 32 | 2)
    assert program.call("KVM_SET_REGS", bytes(regs)).returns == 0
    assert program.call("KVM_GET_REGS", bytes(144)).data == bytes(regs)
    assert program.call("KVM_GET_REGS", bytes(143)).errno == program.call("KVM_SET_SREGS", bytes(311)).errno == "EFAULT"
    program.close()


@pytest.mark.parametrize("profile", ERAS)
def test_sregs_before_and_after_cpuid(client: ContractClient, profile: str) -> None:
    """CR4.VMXE waits for VMX in CPUID; OSXSAVE and PKE show in CPUID once they are set."""
    program = Program(client, profile, 0)
    sregs = bytearray(program.call("KVM_GET_SREGS", bytes(312)).data or b"")
    SREGS.put(sregs, "cr4", 0x2660)
    SREGS.put(sregs, "cr2", 0x1234)
    assert program.call("KVM_SET_SREGS", bytes(sregs)).short == (0 if profile == "kvm-2019" else "EINVAL")
    told = program.call("KVM_GET_SREGS", bytes(312)).data or b""
    assert (SREGS.get(told, "cr4"), SREGS.get(told, "cr2")) == (0, 0x1234 if profile == "kvm-2019" else 0)
    program.set_cpuid()
    SREGS.put(sregs, "cr4", 0x2660 | 1 << 18 | 1 << 22)
    assert program.call("KVM_SET_SREGS", bytes(sregs)).returns == 0
    leaves = program.call("KVM_GET_CPUID2", struct.pack("<II", 80, 0) + bytes(40 * 80)).data or b""
    ecx = {leaf.function: leaf.ecx for leaf in unpack_entries(leaves[8:]) if leaf.function in (1, 7)}
    assert ecx[1] & 1 << 27 and ecx[7] & 1 << 4
    SREGS.put(sregs, "apic_base", 0x400)
    assert program.call("KVM_SET_SREGS", bytes(sregs)).errno == "EINVAL"
    program.close()


@pytest.mark.parametrize("profile", ERAS)
def test_events_toggle_smm(client: ContractClient, make_vm: MakeVm, profile: str) -> None:
    vcpu = make_nested(client, make_vm, profile)
    assert ioctl(client, vcpu, "KVM_SET_NESTED_STATE", blob()).returns == 0
    events = bytearray(64)
    for name, value in (("flags", 8), ("smi_smm", 1), ("interrupt_nr", 0x30), ("nmi_masked", 1)):
        EVENTS.put(events, name, value)
    assert ioctl(client, vcpu, "KVM_SET_VCPU_EVENTS", bytes(events)).returns == 0
    told = ioctl(client, vcpu, "KVM_GET_VCPU_EVENTS", bytes(64)).data
    EVENTS.put(events, "flags", 0xD)
    assert told == bytes(events)
    assert client.get(f"{vcpu}/smm").json() == {"smm": True}
    size = client.get(f"{vcpu}/nested-state").json()["size"]
    assert size == (4224 if profile == "kvm-2019" else 128)
    assert ioctl(client, vcpu, "KVM_SET_NESTED_STATE", blob(smm=3)).returns == 0
    for name, value in (("flags", 0x10), ("flags", 0x40), ("exception_nr", 32), ("exception_nr", 2)):
        broken = bytearray(events)
        EVENTS.put(broken, "flags", 0)
        EVENTS.put(broken, "exception_injected", 1)
        EVENTS.put(broken, name, value)
        assert ioctl(client, vcpu, "KVM_SET_VCPU_EVENTS", bytes(broken)).errno == "EINVAL"
    halted = struct.pack("<I", 3)
    assert ioctl(client, vcpu, "KVM_SET_MP_STATE", halted).returns == 0
    assert ioctl(client, vcpu, "KVM_GET_MP_STATE", bytes(4)).data == halted
    assert ioctl(client, vcpu, "KVM_SET_MP_STATE", struct.pack("<I", 10)).errno == (
        None if profile == "kvm-2019" else "EINVAL"
    )


@pytest.mark.parametrize("profile", ERAS)
def test_msrs(client: ContractClient, make_vm: MakeVm, profile: str) -> None:
    vcpu = make_nested(client, make_vm, profile)

    def msrs(*entries: tuple[int, int]) -> bytes:
        return struct.pack("<II", len(entries), 0) + b"".join(struct.pack("<IIQ", n, 0, v) for n, v in entries)

    assert ioctl(client, vcpu, "KVM_SET_MSRS", msrs((0x3A, 5), (0x277, 6), (0xDEAD, 1), (0x10, 9))).returns == 2
    read = ioctl(client, vcpu, "KVM_GET_MSRS", msrs((0x3A, 0), (0x277, 0), (0xDEAD, 7), (0x3A, 8)))
    assert (read.returns, read.data) == (2, msrs((0x3A, 5), (0x277, 6), (0xDEAD, 7), (0x3A, 8)))
    assert ioctl(client, vcpu, "KVM_GET_MSRS", struct.pack("<II", 256, 0)).errno == "E2BIG"
    assert ioctl(client, vcpu, "KVM_GET_MSRS", struct.pack("<II", 1, 0)).errno == "EFAULT"
    assert ioctl(client, vcpu, "KVM_SET_MSRS", None).errno == "EFAULT"
    query = {"profile": profile}
    for name in ("KVM_GET_MSR_INDEX_LIST", "KVM_GET_MSR_FEATURE_INDEX_LIST"):
        told = client.post(f"/v1/ioctls/{name}", params=query, json={"data": "00000000"}).json()
        assert told["errno"] == "E2BIG"
        count = int.from_bytes(bytes.fromhex(told["data"]), "little")
        body = {"data": (count.to_bytes(4, "little") + bytes(4 * count)).hex()}
        told = client.post(f"/v1/ioctls/{name}", params=query, json=body).json()
        numbers = struct.unpack(f"<{count + 1}I", bytes.fromhex(told["data"]))[1:]
        assert told["return"] == 0 and len(set(numbers)) == count > 10
    basic = {"data": msrs((0x480, 0), (0x3A, 0)).hex()}
    told = client.post("/v1/ioctls/KVM_GET_MSRS", params=query, json=basic).json()
    value = struct.unpack_from("<Q", bytes.fromhex(told["data"]), 16)[0]
    assert (told["return"], value) == (1, 0x00D8_1000_11E5_7ED0)


@pytest.mark.parametrize("profile", ERAS)
def test_cpuid_both_ways(client: ContractClient, profile: str) -> None:
    program = Program(client, profile, 0)
    whole = program.supported_cpuid()
    assert program.call("KVM_SET_CPUID2", whole).returns == 0
    count = int.from_bytes(whole[:4], "little")
    assert program.call("KVM_GET_CPUID2", struct.pack("<II", count - 1, 0) + whole[8:]).errno == "E2BIG"
    told = program.call("KVM_GET_CPUID2", struct.pack("<II", 80, 0) + bytes(40 * 80)).data
    # Leaf 0xD has the size of the XSAVE area that XCR0 of a new vCPU makes; all else is what was set.
    shown = [replace(leaf, ebx=0x240) if leaf.function == 0xD else leaf for leaf in unpack_entries(whole[8:])]
    assert told is not None and unpack_entries(told[8 : len(whole)]) == tuple(shown)
    assert int.from_bytes(told[:4], "little") == (80 if profile == "kvm-2019" else count)
    assert b"".join(pack_entry(entry) for entry in unpack_entries(whole[8:])) == whole[8:]
    assert program.system("KVM_GET_VCPU_MMAP_SIZE").returns == 12288
    assert program.system("KVM_GET_VCPU_MMAP_SIZE", arg=1).errno == "EINVAL"
    assert program.system("KVM_GET_SUPPORTED_CPUID", room(1)).errno == "E2BIG"
    too_many = struct.pack("<II", 257, 0) + bytes(40 * 257)
    assert program.call("KVM_SET_CPUID2", too_many).errno == "E2BIG"
    assert ioctl(client, program.vm, "KVM_CREATE_IRQCHIP").errno == "EEXIST"
    program.close()


OF_VCPUS = {row.name for package in (capabilities, registers, cpuid, msrs, nested_state) for row in package.ROWS} | {
    "KVM_GET_VCPU_MMAP_SIZE"
}


@pytest.mark.parametrize("name", sorted(OF_VCPUS))
def test_levels(client: ContractClient, vm: str, name: str) -> None:
    levels = {level for level, known in IOCTLS.table if known == name}
    places = {"system": "/v1", "vm": vm, "vcpu": f"{vm}/vcpus/0"}
    for level, errno in (("system", "EINVAL"), ("vm", "ENOTTY"), ("vcpu", "EINVAL")):
        if level not in levels:
            assert ioctl(client, places[level], name, bytes(8)).errno == errno, level
