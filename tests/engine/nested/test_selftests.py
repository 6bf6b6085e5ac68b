"""The upstream programs row by row: vmx_set_nested_state_test of 2019 and the newest one, on VMX and on SVM."""

from __future__ import annotations

from typing import Any

import pytest

from engine.arch import nested_state as abi
from engine.arch.vmx_msrs import EFER, EFER_SVME
from engine.nested import enable_evmcs, set_cpuid, set_msr
from engine.vcpu.cpuid import ECX8_SVM, supported_cpuid
from engine.vcpu.vcpu import Vcpu, VcpuHost
from tests.engine.nested.support import EV, GIF, GM, NONE, RP, Ram, blob, do_get, do_set, vmcs12, vmx_cpuid

ZERO = {"vmxon": 0, "vmcs12_pa": 0}
MINUS = {"vmxon": NONE, "vmcs12_pa": NONE}
NO_DATA = {"size": 128, "data": b""}


def check(vcpu: Vcpu, number: int, fields: dict[str, Any] | None, returns: Any, decides: str) -> None:
    result = do_set(vcpu, Ram(), None if fields is None else blob(**fields))
    outcome = result.errno if result.errno is not None else result.returns
    assert (number, outcome, result.check) == (number, returns, decides)


@pytest.mark.parametrize("have_evmcs", [False, True])
def test_2019(have_evmcs: bool) -> None:
    vcpu = Vcpu(profile="kvm-2019", host=VcpuHost(evmcs=have_evmcs))
    ev = EV if have_evmcs else 0
    small = {**NO_DATA, **ZERO, "flags": GM + RP}
    default = {"flags": GM + RP + ev}
    for number, fields, returns, decides in (
        (1, None, "EFAULT", "G1"),
        (2, {**small, "size": 0}, "EINVAL", "G2"),
        (3, {**small, "flags": 0xF}, "EINVAL", "G3"),
        (4, {**small, "flags": RP}, "EINVAL", "G4"),
        (5, {**default, "format": 1}, "EINVAL", "V1"),
        (6, default, "EINVAL", "V3a"),
        (7, {**default, "vmxon": NONE}, "EINVAL", "V2b"),
        (8, {**default, **MINUS, "flags": EV}, "EINVAL", "V8"),
        (9, {**default, **MINUS, "flags": 0}, 0, "V10"),
    ):
        check(vcpu, number, fields, returns, decides)
    assert set_cpuid(vcpu, vmx_cpuid()) is None
    check(vcpu, 10, {**default, **MINUS}, "EINVAL", "V2c")
    if have_evmcs:
        check(vcpu, 11, {**MINUS, "flags": ev}, "EINVAL", "V8")
        assert enable_evmcs(vcpu) == 0x0101
    for number, fields, returns, decides in (
        (12, {**MINUS, "flags": ev}, 0, "V10"),
        (13, {**MINUS, "flags": ev, "smm": 1}, "EINVAL", "V2a"),
        (14, {"flags": 0, "vmxon": NONE}, "EINVAL", "V2b"),
        (15, {**default, "vmxon": 1}, "EINVAL", "V3b"),
        (16, {"flags": GM + RP, "smm": 1}, "EINVAL", "V4"),
        (17, {**default, "smm": 0xFFFC}, "EINVAL", "V5"),
        (18, {"flags": 0, "smm": 1}, "EINVAL", "V6"),
        (19, {**default, "size": 128}, 0, "V12"),
        (20, {**default, **ZERO}, "EINVAL", "V13"),
        (21, {**default, "data": vmcs12(revision=0)}, "EINVAL", "V17"),
        (22, {"flags": 0, **MINUS}, 0, "V10"),
    ):
        check(vcpu, number, fields, returns, decides)
    errno, data = do_get(vcpu, Ram(), 4224)
    assert errno is None
    assert abi.COMMON.get(data, "size") == 128
    assert data[8:24] == b"\xff" * 16


@pytest.mark.parametrize("have_evmcs", [False, True])
def test_newest_vmx(have_evmcs: bool) -> None:
    vcpu = Vcpu(profile="kvm-latest", host=VcpuHost(evmcs=have_evmcs), cpuid=vmx_cpuid(vmx=False))
    ev = EV if have_evmcs else 0
    small = {**NO_DATA, **ZERO, "flags": GM + RP}
    default = {"flags": ev}
    for number, fields, returns, decides in (
        (1, None, "EFAULT", "G1"),
        (2, {**small, "size": 0}, "EINVAL", "G2"),
        (3, {**small, "flags": 0xF}, "EINVAL", "V3a"),
        (4, {**small, "flags": RP}, "EINVAL", "G4"),
        (5, {**default, "format": 1}, "EINVAL", "V1"),
        (6, default, "EINVAL", "V3a"),
        (7, {**default, "vmxon": NONE}, "EINVAL", "V2b"),
        (8, {**MINUS, "flags": EV}, "EINVAL", "V8"),
        (9, {**MINUS, "flags": 0}, 0, "V10"),
    ):
        check(vcpu, number, fields, returns, decides)
    assert set_cpuid(vcpu, vmx_cpuid()) is None
    check(vcpu, 10, {"flags": 0, **MINUS}, 0, "V10")
    if have_evmcs:
        check(vcpu, 11, {"flags": EV, **MINUS}, "EINVAL", "V8")
        assert enable_evmcs(vcpu) == 0x0101
        check(vcpu, 12, {"flags": EV, **MINUS}, 0, "V10")
    for number, fields, returns, decides in (
        (13, {"flags": ev, **MINUS, "smm": 1}, "EINVAL", "V2a"),
        (14, {**default, "hdr_flags": 0xFFFF_FFFF}, "EINVAL", "V5n"),
        (15, {"flags": 0, "vmxon": NONE}, "EINVAL", "V2b"),
        (16, {**default, "vmxon": 1}, "EINVAL", "V3b"),
        (17, {"flags": GM + RP, "smm": 1}, "EINVAL", "V4"),
        (18, {**default, "smm": 0xFFFC}, "EINVAL", "V5"),
        (19, {"flags": 0, "smm": 1}, "EINVAL", "V6"),
        (20, {"flags": 0, "size": 128}, "EINVAL", "V12n"),
        (21, {"flags": 0, "size": 128, "vmcs12_pa": NONE}, 0, "V12n"),
        (22, {"flags": 0}, 0, "V18"),
        (23, {"flags": 0, "size": 128, "vmcs12_pa": NONE, "hdr_flags": 0xFFFF_FFFF}, "EINVAL", "V5n"),
        (24, {**default, **ZERO}, "EINVAL", "V13"),
        (25, {"flags": 0, **MINUS}, 0, "V10"),
    ):
        check(vcpu, number, fields, returns, decides)
    errno, data = do_get(vcpu, Ram(), 4224)
    assert errno is None
    assert (abi.COMMON.get(data, "size"), abi.COMMON.get(data, "flags")) == (128, 0)
    assert data[8:24] == b"\xff" * 16


SVM = {"format": 1, "vmxon": 0x3000, "vmcs12_pa": 0, "data": bytes(4096)}


def svm_vcpu() -> Vcpu:
    entries = supported_cpuid("amd", True, 46)
    assert any(entry.function == 0x8000_0001 and entry.ecx & ECX8_SVM for entry in entries)
    return Vcpu(profile="kvm-latest", host=VcpuHost(vendor="amd"), cpuid=entries)


def test_newest_svm() -> None:
    vcpu, ram = svm_vcpu(), Ram()
    check(vcpu, 1, None, "EFAULT", "G1")
    check(vcpu, 2, {**SVM, "size": 0}, "EINVAL", "G2")
    check(vcpu, 3, {**NO_DATA, **ZERO, "flags": 0xF}, "EINVAL", "S1")
    check(vcpu, 4, {**SVM, "flags": RP}, "EINVAL", "G4")
    check(vcpu, 5, {**SVM, "format": 0}, "EINVAL", "S1")
    check(vcpu, 6, {**SVM, "flags": EV}, "EINVAL", "S2")
    check(vcpu, 7, {**SVM, "flags": GM}, "EINVAL", "S3")
    check(vcpu, 8, {**SVM, "flags": 0}, 0, "S5")
    check(vcpu, 9, {**SVM, "flags": GIF}, 0, "S5")
    assert set_msr(vcpu, ram, EFER, EFER_SVME)
    check(vcpu, 10, {**SVM, "vmxon": NONE, "flags": 0}, 0, "S5")
    check(vcpu, 11, {**SVM, "vmxon": NONE, "flags": GM}, "EINVAL", "S6")
    check(vcpu, 12, {**SVM, "size": 2112, "flags": 0}, 0, "S5")
    check(vcpu, 13, {**SVM, "size": 2112, "flags": GM}, "EINVAL", "S7")
    check(vcpu, 14, {**SVM, "vmxon": NONE, "flags": GIF}, 0, "S5")
    errno, data = do_get(vcpu, ram, 4224)
    assert errno is None
    assert (abi.COMMON.get(data, "size"), abi.COMMON.get(data, "flags"), data[8:16]) == (128, GIF, bytes(8))
