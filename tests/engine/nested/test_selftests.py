"""The upstream programs: vmx_set_nested_state_test of 2019 and the newest one, on VMX and on SVM."""

from __future__ import annotations

from collections.abc import Iterable

import pytest

from engine.arch import kvm_nested_state as abi
from engine.arch.vmx_msrs import EFER, EFER_SVME
from engine.nested import enable_evmcs, set_cpuid, set_msr
from engine.vcpu.cpuid import ECX8_SVM, supported_cpuid
from engine.vcpu.vcpu import Vcpu, VcpuHost
from tests.engine.nested.selftest_rows import SVM_FRESH, SVM_WITH_SVME, Row, VmxRows, newest_vmx_rows, rows_of_2019
from tests.engine.nested.support import GIF, blob, do_get, do_set, vmx_cpuid
from tests.engine.ram import Ram


def check(vcpu: Vcpu, rows: Iterable[Row]) -> None:
    for number, fields, returns, decides in rows:
        result = do_set(vcpu, Ram(), None if fields is None else blob(**fields))
        outcome = result.errno if result.errno is not None else result.returns
        assert (number, outcome, result.check) == (number, returns, decides)


def check_vmx(vcpu: Vcpu, rows: VmxRows, have_evmcs: bool) -> None:
    check(vcpu, rows.fresh)
    assert set_cpuid(vcpu, vmx_cpuid()) is None
    check(vcpu, rows.with_vmx)
    if have_evmcs:
        assert enable_evmcs(vcpu) == 0x0101
    check(vcpu, rows.with_evmcs)
    errno, data = do_get(vcpu, Ram(), 4224)
    assert errno is None
    assert (abi.COMMON.get(data, "size"), abi.COMMON.get(data, "flags")) == (128, 0)
    assert data[8:24] == b"\xff" * 16


@pytest.mark.parametrize("have_evmcs", [False, True])
def test_2019(have_evmcs: bool) -> None:
    vcpu = Vcpu(profile="kvm-2019", host=VcpuHost(evmcs=have_evmcs))
    check_vmx(vcpu, rows_of_2019(have_evmcs), have_evmcs)


@pytest.mark.parametrize("have_evmcs", [False, True])
def test_newest_vmx(have_evmcs: bool) -> None:
    vcpu = Vcpu(profile="kvm-latest", host=VcpuHost(evmcs=have_evmcs), cpuid=vmx_cpuid(vmx=False))
    check_vmx(vcpu, newest_vmx_rows(have_evmcs), have_evmcs)


def test_newest_svm() -> None:
    entries = supported_cpuid("amd", True, 46)
    assert any(entry.function == 0x8000_0001 and entry.ecx & ECX8_SVM for entry in entries)
    vcpu, ram = Vcpu(profile="kvm-latest", host=VcpuHost(vendor="amd"), cpuid=entries), Ram()
    check(vcpu, SVM_FRESH)
    assert set_msr(vcpu, ram, EFER, EFER_SVME)
    check(vcpu, SVM_WITH_SVME)
    errno, data = do_get(vcpu, ram, 4224)
    assert errno is None
    assert (abi.COMMON.get(data, "size"), abi.COMMON.get(data, "flags"), data[8:16]) == (128, GIF, bytes(8))
