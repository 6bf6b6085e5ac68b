"""Registers, events and MSRs in the bytes of the ABI."""

from __future__ import annotations

import struct
from typing import Any

import pytest

from engine.abi import Reply, UserBuffer
from engine.arch.hyperv_cpuid import CpuidEntry
from engine.arch.kvm_vcpu_structs import EVENTS, REGS, SREGS
from engine.arch.vmx_msrs import EFER_SVME
from engine.vcpu.cpuid import supported_cpuid
from engine.vcpu.msrs import read_msr, write_msr
from engine.vcpu.vcpu import Vcpu, VcpuHost
from tests.engine.ioctls.bare_vcpu import Call, ioctl
from tests.engine.nested.support import ERAS, GM, MIN32, blob, do_set, make_vcpu, vmcs12, vmx_cpuid
from tests.engine.ram import Ram

LONG_MODE = {"cr0": 0x8000_0031, "cr4": 0x20, "ia32_efer": 0xD00}


def call(vcpu: Vcpu | None, name: str, data: bytes | None, **members: Any) -> tuple[Reply, bytes]:
    user = UserBuffer.of(data)
    reply = ioctl(Call(name, "vcpu" if vcpu else "system", user, vcpu=vcpu, guest=Ram(), **members))
    return reply, bytes(user.data or b"")


def sregs(vcpu: Vcpu, **changes: int) -> bytes:
    raw = bytearray(call(vcpu, "KVM_GET_SREGS", bytes(312))[1])
    for name, value in changes.items():
        SREGS.put(raw, name, value)
    return bytes(raw)


@pytest.mark.parametrize("era", ERAS)
def test_a_fresh_vcpu_is_after_reset(era: str) -> None:
    raw = sregs(make_vcpu(era, vcpu_id=3))
    told = {name: SREGS.get(raw, name) for name in ("cr0", "cs_base", "cs_type", "cs_present", "tr_type", "apic_base")}
    assert told == {
        "cr0": 0x6000_0010,
        "cs_base": 0xFFFF_0000,
        "cs_type": 0xB,
        "cs_present": 1,
        "tr_type": 0xB,
        "apic_base": 0xFEE0_0800,
    }
    assert SREGS.get(sregs(make_vcpu(era)), "apic_base") == 0xFEE0_0900


@pytest.mark.parametrize("era", ERAS)
def test_sregs_come_back(era: str) -> None:
    vcpu = make_vcpu(era)
    raw = sregs(vcpu, **LONG_MODE, cs_l=1, ss_dpl=3, cr8=5, fs_base=7, idtr_limit=9, apic_base=0xFEE0_0D00)
    assert call(vcpu, "KVM_SET_SREGS", raw)[0] == Reply(0)
    assert sregs(vcpu) == raw
    unusable = sregs(vcpu, es_unusable=1)
    assert call(vcpu, "KVM_SET_SREGS", unusable)[0] == Reply(0)
    told = sregs(vcpu)
    assert (SREGS.get(told, "es_present"), SREGS.get(told, "es_unusable")) == (0, 1)
    assert SREGS.get(told, "es_type") == (0 if era == "kvm-2019" else SREGS.get(raw, "es_type"))


@pytest.mark.parametrize(
    ("changes", "both", "latest"),
    [
        ({**LONG_MODE, "cr4": 0}, True, True),
        ({**LONG_MODE, "ia32_efer": 0x100}, True, True),
        ({"ia32_efer": 0x400}, True, True),
        ({"cs_l": 1}, True, True),
        ({"apic_base": 0xFEE0_0801}, True, True),
        ({"apic_base": 1 << 39}, True, True),
        ({"apic_base": 0x400}, True, True),
        ({"apic_base": 0xFEE0_0500}, True, True),
        ({"apic_base": 0}, False, False),
        ({"apic_base": 0xFEE0_0D00}, False, False),
        ({"cr0": 1 << 32}, False, True),
        ({"cr0": 0x2000_0000}, False, True),
        ({"cr0": 0x8000_0000}, False, True),
        ({"cr4": 1 << 15}, False, True),
        ({"cr4": 1 << 12}, True, True),
        ({**LONG_MODE, "cr3": 1 << 39}, False, True),
        (LONG_MODE, False, False),
    ],
)
def test_sregs_that_cannot_be_together(changes: dict[str, int], both: bool, latest: bool) -> None:
    for era in ERAS:
        vcpu = make_vcpu(era)
        before = vcpu.to_head()
        reply, _ = call(vcpu, "KVM_SET_SREGS", sregs(vcpu, **changes))
        refused = both if era == "kvm-2019" else latest
        assert reply.errno == ("EINVAL" if refused else None), era
        assert not refused or vcpu.to_head() == before


@pytest.mark.parametrize("era", ERAS)
def test_la57_needs_its_feature(era: str) -> None:
    vcpu = make_vcpu(era, cpuid=(CpuidEntry(7, flags=1, ecx=1 << 16),))
    raw = sregs(vcpu, cr4=1 << 12)
    assert call(vcpu, "KVM_SET_SREGS", raw)[0] == Reply(0)
    assert sregs(vcpu) == raw


def test_osxsave_needs_xsave_and_x2apic_its_feature() -> None:
    for era in ERAS:
        bare = make_vcpu(era, cpuid=())
        assert call(bare, "KVM_SET_SREGS", sregs(bare, cr4=1 << 18))[0].errno == "EINVAL"
        assert call(bare, "KVM_SET_SREGS", sregs(bare, apic_base=0xFEE0_0C00))[0].errno == "EINVAL"


def test_an_apic_base_that_stays_is_not_looked_at_today() -> None:
    for era in ERAS:
        vcpu = make_vcpu(era)
        assert call(vcpu, "KVM_SET_SREGS", sregs(vcpu, apic_base=0xFEE0_0D00))[0] == Reply(0)
        vcpu.cpuid = ()
        again = call(vcpu, "KVM_SET_SREGS", sregs(vcpu))[0]
        assert again == (Reply(-1, "EINVAL") if era == "kvm-2019" else Reply(0))


@pytest.mark.parametrize(
    "why",
    [
        {"cpuid": ()},
        {"cpuid": vmx_cpuid(vmx=False)},
        {"host": VcpuHost(nested=False, maxphyaddr=39)},
        {"host": VcpuHost(vendor="amd", maxphyaddr=39)},
        {"smm": True},
    ],
)
def test_a_cr4_that_vmx_does_not_allow(why: dict[str, Any]) -> None:
    """5.3 drops all of CR4 and takes the rest; 7.1 takes nothing."""
    for era in ERAS:
        vcpu = make_vcpu(era, **why)
        vcpu.registers["cr4"] = 0x620
        before = vcpu.to_head()
        changes = {"cr0": 0x31, "cr2": 7, "cr4": 0x2660, "fs_base": 9, "apic_base": 0xFEE0_0800}
        reply = call(vcpu, "KVM_SET_SREGS", sregs(vcpu, **changes))[0]
        told = sregs(vcpu)
        seen = {name: SREGS.get(told, name) for name in changes}
        if era == "kvm-2019":
            assert (reply, seen) == (Reply(0), {**changes, "cr4": 0x620})
        else:
            assert (reply, vcpu.to_head()) == (Reply(-1, "EINVAL"), before)


@pytest.mark.parametrize("era", ERAS)
@pytest.mark.parametrize("cr8", [0, 15, 16, 0x105, 1 << 63])
def test_a_cr8_above_15_leaves_the_old_one(era: str, cr8: int) -> None:
    vcpu = make_vcpu(era)
    assert call(vcpu, "KVM_SET_SREGS", sregs(vcpu, cr8=5))[0] == Reply(0)
    assert call(vcpu, "KVM_SET_SREGS", sregs(vcpu, cr8=cr8, cr2=7))[0] == Reply(0)
    told = sregs(vcpu)
    assert (SREGS.get(told, "cr8"), SREGS.get(told, "cr2")) == (cr8 if cr8 <= 15 else 5, 7)


def test_vmx_operation_fixes_cr4() -> None:
    for era in ERAS:
        vcpu = make_vcpu(era)
        assert call(vcpu, "KVM_SET_SREGS", sregs(vcpu, cr4=0x2020))[0] == Reply(0)
        assert do_set(vcpu, Ram(), blob()).returns == 0
        reply = call(vcpu, "KVM_SET_SREGS", sregs(vcpu, cr4=0x20, cr2=5))[0]
        assert reply == (Reply(0) if era == "kvm-2019" else Reply(-1, "EINVAL"))
        assert (vcpu.registers["cr4"], vcpu.registers["cr2"]) == (0x2020, 5 if era == "kvm-2019" else 0)
        assert call(vcpu, "KVM_SET_SREGS", sregs(vcpu, cr0=0x8000_0021, cr4=0x2000))[0] == Reply(0)


@pytest.mark.parametrize("cr0", [0x8000_0021, 0x8000_0001, 0x8000_0020, 0x21, 0x20, 0x10])
@pytest.mark.parametrize("where", ["L1", "SMM", "VMXON", "L2", "unrestricted L2", "unrestricted, not active"])
def test_vmx_operation_fixes_cr0_today(where: str, cr0: int) -> None:
    """PE, NE and PG; an unrestricted L2 needs NE alone. 5.3 takes any CR0."""
    needed = {"L1": 0, "SMM": 0, "unrestricted L2": 0x20}.get(where, 0x8000_0021)
    controls = {"secondary_vm_exec_control": 0x82 if where.startswith("unrestricted") else 0, "ept_pointer": 0x101E}
    active = {"cpu_based_vm_exec_control": 0x8400_6172} if where == "unrestricted L2" else {}
    for era in ERAS:
        vcpu = make_vcpu(era, smm=where == "SMM")
        vcpu.registers["cr4"] = 0x2000
        if where != "L1":
            l2 = {"flags": GM, "data": vmcs12(MIN32, **controls, **active)} if where not in ("SMM", "VMXON") else {}
            asked = blob(smm=2) if where == "SMM" else blob(**l2)
            assert do_set(vcpu, Ram(), asked).returns == 0
            assert vcpu.vmx.guest_mode == bool(l2)
        before = vcpu.to_head()
        cr4 = 0 if where == "SMM" else 0x2000
        reply = call(vcpu, "KVM_SET_SREGS", sregs(vcpu, cr0=cr0, cr2=5, cr4=cr4))[0]
        legal = not (cr0 & 1 << 31 and not cr0 & 1)
        if era == "kvm-2019" or (legal and cr0 & needed == needed):
            assert (reply, vcpu.registers["cr0"], vcpu.registers["cr2"]) == (Reply(0), cr0, 5), era
        else:
            assert (reply, vcpu.to_head()) == (Reply(-1, "EINVAL"), before)


def test_svm_ends_with_svme() -> None:
    vcpu = Vcpu(
        profile="kvm-latest",
        host=VcpuHost(vendor="amd"),
        cpuid=supported_cpuid("amd", True, 46),
        lapic_in_kernel=True,
    )
    assert call(vcpu, "KVM_SET_SREGS", sregs(vcpu, ia32_efer=EFER_SVME))[0] == Reply(0)
    vcpu.svm.guest_mode, vcpu.svm.gif = True, False
    assert call(vcpu, "KVM_SET_SREGS", sregs(vcpu, ia32_efer=0))[0] == Reply(0)
    assert (vcpu.svm.guest_mode, vcpu.svm.gif) == (False, True)


@pytest.mark.parametrize("era", ERAS)
def test_regs(era: str) -> None:
    vcpu = make_vcpu(era)
    raw = b"".join(struct.pack("<Q", 0x1111 << 20 | number << 3) for number in range(18))
    assert call(vcpu, "KVM_SET_REGS", raw)[0] == Reply(0)
    told = call(vcpu, "KVM_GET_REGS", bytes(144))[1]
    assert told[:136] == raw[:136] and REGS.get(told, "rflags") == REGS.get(raw, "rflags") | 2
    assert call(vcpu, "KVM_GET_REGS", bytes(100))[0].errno == "EFAULT"
    assert call(vcpu, "KVM_SET_REGS", raw[:-1])[0].errno == "EFAULT"


@pytest.mark.parametrize("era", ERAS)
def test_events(era: str) -> None:
    vcpu = make_vcpu(era)
    assert do_set(vcpu, Ram(), blob()).returns == 0
    given = {"flags": 0xD, "smi_smm": 1, "smi_pending": 1, "interrupt_shadow": 3, "nmi_pending": 1, "nmi_masked": 1}
    raw = bytearray(64)
    for name, value in {**given, "exception_injected": 1, "exception_nr": 14, "exception_error_code": 6}.items():
        EVENTS.put(raw, name, value)
    assert call(vcpu, "KVM_SET_VCPU_EVENTS", bytes(raw))[0] == Reply(0)
    assert call(vcpu, "KVM_GET_VCPU_EVENTS", bytes(64))[1] == bytes(raw)
    assert vcpu.smm and vcpu.mov_ss_blocking and vcpu.vmx.vmxon == (era == "kvm-2019")
    # Without their flags SMM, shadow and pending NMI stay.
    EVENTS.put(raw, "flags", 0)
    EVENTS.put(raw, "smi_smm", 0)
    EVENTS.put(raw, "exception_nr", 3)
    assert call(vcpu, "KVM_SET_VCPU_EVENTS", bytes(raw))[0] == Reply(0)
    told = call(vcpu, "KVM_GET_VCPU_EVENTS", bytes(64))[1]
    assert vcpu.smm and EVENTS.get(told, "nmi_pending") == 1
    assert EVENTS.get(told, "exception_injected") == 0


@pytest.mark.parametrize("era", ERAS)
def test_msrs_stop_at_the_first_that_is_not_known(era: str) -> None:
    vcpu = make_vcpu(era)
    raw = struct.pack("<II", 3, 0) + b"".join(struct.pack("<IIQ", n, 0, 5) for n in (0x3A, 0xDEAD, 0x10))
    assert call(vcpu, "KVM_SET_MSRS", raw)[0] == Reply(1)
    assert call(vcpu, "KVM_GET_MSRS", raw) == (Reply(1), raw)
    assert 0x10 not in vcpu.msrs
    assert do_set(vcpu, Ram(), blob(flags=GM)).returns == -1
    assert call(vcpu, "KVM_SET_MSRS", struct.pack("<IIIIQ", 1, 0, 0x3A, 0, 0))[0] == Reply(1)
    assert not vcpu.vmx.vmxon


def set_msr(vcpu: Vcpu, number: int, value: int) -> int:
    return call(vcpu, "KVM_SET_MSRS", struct.pack("<IIIIQ", 1, 0, number, 0, value))[0].returns


def get_msr(vcpu: Vcpu, number: int) -> int:
    reply, told = call(vcpu, "KVM_GET_MSRS", struct.pack("<IIIIQ", 1, 0, number, 0, 0))
    assert reply == Reply(1)
    return int.from_bytes(told[16:], "little")


@pytest.mark.parametrize("value", [1, 5, 7, 0x16_0007, 0x2_0000, 8, 1 << 19, 1 << 32])
def test_feature_control_without_vmx(value: int) -> None:
    """5.3 goes by the guest's CPUID, 7.1 takes from the host what KVM knows; a guest must have VMX in both."""
    for era in ERAS:
        vcpu = make_vcpu(era, vmx=False)
        taken = value == 1 if era == "kvm-2019" else not value & ~0x16_0007
        assert set_msr(vcpu, 0x3A, value) == taken
        assert get_msr(vcpu, 0x3A) == (value if taken else 0)
        guest = make_vcpu(era, vmx=False)
        assert write_msr(guest, Ram(), 0x3A, value, host=False) == (value == 1)


@pytest.mark.parametrize("era", ERAS)
def test_microcode_revision(era: str) -> None:
    amd = VcpuHost(vendor="amd")
    assert get_msr(make_vcpu(era, host=amd), 0x8B) == 0x0100_0065
    vcpu = make_vcpu(era)
    assert get_msr(vcpu, 0x8B) == 1 << 32
    assert write_msr(vcpu, Ram(), 0x8B, 0, host=False)
    assert get_msr(vcpu, 0x8B) == 1 << 32
    assert set_msr(vcpu, 0x8B, 3 << 32) == 1
    assert get_msr(vcpu, 0x8B) == read_msr(vcpu, 0x8B, host=False) == 3 << 32


@pytest.mark.parametrize(
    ("value", "of_2019", "latest"),
    [
        (0, 1 << 18, 0),
        (0x148, 1 << 18, 0),
        (1 << 18 | 0x8, 1 << 18, 1 << 18),
        (1 << 24, None, 1 << 24),
        (1 << 18 | 1 << 24, None, 1 << 18 | 1 << 24),
        (0x10, None, None),
        (1 << 35, None, None),
    ],
)
def test_hwcr(value: int, of_2019: int | None, latest: int | None) -> None:
    for era, kept in zip(ERAS, (of_2019, latest), strict=True):
        vcpu = make_vcpu(era)
        assert get_msr(vcpu, 0xC001_0015) == 0
        assert set_msr(vcpu, 0xC001_0015, 1 << 18) == 1
        assert set_msr(vcpu, 0xC001_0015, value) == (kept is not None)
        assert get_msr(vcpu, 0xC001_0015) == (1 << 18 if kept is None else kept)


def test_apic_base_as_an_msr() -> None:
    for era in ERAS:
        vcpu = make_vcpu(era)
        for value in (0x400, 0xFEE0_0802, 1 << 39):
            assert set_msr(vcpu, 0x1B, value) == 0
        on, off, x2apic = 0xFEE0_0900, 0xFEE0_0100, 0xFEE0_0D00

        def guest(value: int, vcpu: Vcpu = vcpu) -> bool:
            return write_msr(vcpu, Ram(), 0x1B, value, host=False)

        assert guest(x2apic) and not guest(on) and guest(off) and not guest(x2apic) and guest(on) and guest(x2apic)
        assert set_msr(vcpu, 0x1B, on) == set_msr(vcpu, 0x1B, off) == set_msr(vcpu, 0x1B, x2apic) == 1
        assert get_msr(vcpu, 0x1B) == x2apic


def test_feature_msrs_follow_the_host() -> None:
    names = {"KVM_GET_MSR_FEATURE_INDEX_LIST": (20, 2), "KVM_GET_MSR_INDEX_LIST": (35, 35)}
    for name, counts in names.items():
        for host, count in zip((VcpuHost(), VcpuHost(nested=False)), counts, strict=True):
            reply, told = call(None, name, bytes(4 + 4 * 60)[:4] + bytes(240), host=host)
            assert reply.errno == "E2BIG" and int.from_bytes(told[:4], "little") == count, name
    raw = struct.pack("<II", 2, 0) + struct.pack("<IIQ", 0x489, 0, 0) + struct.pack("<IIQ", 0x3A, 0, 0)
    reply, told = call(None, "KVM_GET_MSRS", raw)
    assert reply == Reply(1) and int.from_bytes(told[16:24], "little") == 0x77_7FFF
    assert call(None, "KVM_GET_MSRS", raw, host=VcpuHost(vendor="amd"))[0] == Reply(0)
