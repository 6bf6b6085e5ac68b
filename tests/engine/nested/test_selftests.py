"""The upstream programs (``selftests``) on a vCPU, without a service."""

from __future__ import annotations

import pytest

from engine.arch import nested_state as abi
from engine.arch.vmx_msrs import EFER, EFER_SVME
from engine.nested import NestedHost, NestedVcpu, enable_evmcs, set_cpuid, set_msr
from engine.vcpu.cpuid import ECX8_SVM, supported_cpuid
from tests.engine.nested import selftests
from tests.engine.nested.support import GIF, Ram, do_get, do_set, vmx_cpuid


def run(vcpu: NestedVcpu, program: selftests.Program) -> None:
    for item in program:
        if isinstance(item, selftests.Row):
            result = do_set(vcpu, Ram(), item.data)
            outcome = result.errno if result.errno is not None else result.returns
            assert (item.number, outcome, result.check) == (item.number, item.returns, item.check)
        elif item == "set CPUID":
            assert set_cpuid(vcpu, vmx_cpuid()) is None
        elif item == "enable evmcs":
            assert enable_evmcs(vcpu) == 0x0101
        else:
            assert set_msr(vcpu, Ram(), EFER, EFER_SVME)


@pytest.mark.parametrize("have_evmcs", [False, True])
def test_2019(have_evmcs: bool) -> None:
    vcpu = NestedVcpu(profile="kvm-2019", host=NestedHost(evmcs=have_evmcs))
    run(vcpu, selftests.of_2019(have_evmcs))
    errno, data = do_get(vcpu, Ram(), 4224)
    assert errno is None
    assert abi.COMMON.get(data, "size") == 128
    assert data[8:24] == b"\xff" * 16


@pytest.mark.parametrize("have_evmcs", [False, True])
def test_newest_vmx(have_evmcs: bool) -> None:
    vcpu = NestedVcpu(profile="kvm-latest", host=NestedHost(evmcs=have_evmcs), cpuid=vmx_cpuid(vmx=False))
    run(vcpu, selftests.newest_on_intel(have_evmcs))
    errno, data = do_get(vcpu, Ram(), 4224)
    assert errno is None
    assert (abi.COMMON.get(data, "size"), abi.COMMON.get(data, "flags")) == (128, 0)
    assert data[8:24] == b"\xff" * 16


def svm_vcpu() -> NestedVcpu:
    entries = supported_cpuid("amd", True, 46)
    assert any(entry.function == 0x8000_0001 and entry.ecx & ECX8_SVM for entry in entries)
    return NestedVcpu(profile="kvm-latest", host=NestedHost(vendor="amd"), cpuid=entries)


def test_newest_svm() -> None:
    vcpu = svm_vcpu()
    run(vcpu, selftests.newest_on_amd())
    errno, data = do_get(vcpu, Ram(), 4224)
    assert errno is None
    assert (abi.COMMON.get(data, "size"), abi.COMMON.get(data, "flags"), data[8:16]) == (128, GIF, bytes(8))
