"""Nested state on AMD hosts, beyond what the upstream program tries."""

from __future__ import annotations

import pytest

from engine.abi import UserBuffer
from engine.arch.vmx_msrs import EFER_SVME
from engine.nested import get_nested_state
from engine.vcpu.vcpu import Vcpu, VcpuHost
from tests.engine.nested.support import GIF, GM, RP, do_get, do_set
from tests.engine.nested.svm import svm_blob, vcpu_with_svm, vmcb
from tests.engine.ram import Ram


def test_entering_l2_and_reading_it_back() -> None:
    vcpu, ram = vcpu_with_svm(), Ram()
    original = svm_blob(GM | RP | GIF, vmcb())
    result = do_set(vcpu, ram, original)
    assert (result.returns, result.check) == (0, "S13")
    errno, data = do_get(vcpu, ram)
    assert errno is None
    assert bytes(data[:4224]) == original
    assert do_set(vcpu, ram, svm_blob(0, b"")).returns == 0
    assert (vcpu.svm.guest_mode, vcpu.svm.gif) == (False, False)


def test_j15_a_small_buffer_is_filled_and_refused() -> None:
    vcpu, ram = vcpu_with_svm(), Ram()
    assert do_set(vcpu, ram, svm_blob(GM, vmcb())).returns == 0
    user = UserBuffer(bytearray(b"\xee" * 8320))
    user.copy_to(4, (128).to_bytes(4, "little"))
    assert get_nested_state(vcpu, ram, user).errno == "E2BIG"
    assert user.data is not None
    assert int.from_bytes(user.data[4:8], "little") == 4224
    assert user.data[128:4224] == vmcb()
    user = UserBuffer(bytearray(b"\xee" * 8320))
    user.copy_to(4, (127).to_bytes(4, "little"))
    assert get_nested_state(vcpu, ram, user).errno == "E2BIG"
    assert user.data is not None
    assert int.from_bytes(user.data[4:8], "little") == 128


@pytest.mark.parametrize(
    ("changes", "check"),
    [
        ({"intercept_word4": 0}, "S9"),
        ({"asid": 0}, "S9"),
        ({"nested_ctl": 1, "nested_cr3": 1 << 46}, "S9"),
        ({"msrpm_base_pa": (1 << 46) - 0x1000}, "S9"),
        ({"iopm_base_pa": (1 << 46) - 0x2000}, "S9"),
        ({"int_ctl": 1 << 26}, "S9"),
        ({"event_inj": 1 << 31 | 1 << 8}, "S9"),
        ({"event_inj": 1 << 31 | 3 << 8 | 2}, "S9"),
        ({"event_inj": 1 << 31 | 3 << 8 | 14}, "S13"),
        ({"cr0": 0x8000_0010}, "S11"),
        ({"rflags": 1 << 17}, "S11"),
        ({"efer": 0}, "S11"),
        ({"efer": EFER_SVME | 1 << 40}, "S11"),
        ({"cr0": 0x8000_0011 | 1 << 29}, "S11"),
        ({"dr7": 1 << 32}, "S11"),
        ({"cr4": 0}, "S11"),
        ({"cs_attrib": 3 << 9}, "S11"),
        ({"cr3": 1 << 46}, "S11"),
        ({"cr4": 0x20 | 1 << 40}, "S11"),
    ],
)
def test_vmcb_checks(changes: dict[str, int], check: str) -> None:
    vcpu = vcpu_with_svm()
    before = vcpu.to_head()
    result = do_set(vcpu, Ram(), svm_blob(GM, vmcb(**changes)))
    assert result.check == check
    if check != "S13":
        assert result.errno == "EINVAL"
        assert vcpu.to_head() == before


def test_other_refusals() -> None:
    vcpu = vcpu_with_svm(smm=True)
    assert do_set(vcpu, Ram(), svm_blob(GM, vmcb())).check == "S4"
    vcpu = vcpu_with_svm()
    result = do_set(vcpu, Ram(), svm_blob(GM, b""))
    assert (result.check, result.errno) == ("S8", "EFAULT")
    vcpu.registers["cr0"] |= 1 << 29
    vcpu.registers["cr0"] &= ~(1 << 30)
    assert do_set(vcpu, Ram(), svm_blob(GM, vmcb())).check == "S10"
    vcpu = vcpu_with_svm()
    vcpu.registers["cr3"] = 1 << 50
    assert do_set(vcpu, Ram(), svm_blob(GM, vmcb())).check == "S12"


def test_2019_has_no_nested_state_on_amd() -> None:
    vcpu = Vcpu(profile="kvm-2019", host=VcpuHost(vendor="amd"))
    assert do_set(vcpu, Ram(), svm_blob(0, b"")).label == "G0"
