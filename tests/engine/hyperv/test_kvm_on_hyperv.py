"""Pages that KVM and Hyper-V share: the printed vectors of the 2019 series, right layout and wrong ones."""

from __future__ import annotations

from typing import Any

import pytest

from engine.arch import controls as ctl
from engine.arch.hyperv_pages import VMCB_ENLIGHTENMENTS, VP_ASSIST, read_assist, write_assist
from engine.cpu import frames
from engine.hyperv import kvm_on_hyperv
from engine.hyperv.kvm_on_hyperv import HostPages, HypervHost
from engine.hyperv.l2_hypercalls import NestedGuest
from engine.state.config import HostConfig, VcpuConfig, VmConfig
from tests.engine.builders import bare_draft

E13 = "00" * 24 + "0100000000000000" + "00" * 8 + "0100000000000000" + "0090000000000000"
E14 = "00" * 32 + "0100000000000000" + "00" * 8 + "0100000000000000" + "0090000000000000"
E09 = "01000000" + "00000000" + "01" + "00" * 7 + "0090000000000000"


def host_machine(vcpus: int = 1, **config: Any) -> tuple[frames.Machine, HypervHost]:
    config = {"host": HostConfig(hyperv={}), "vcpus": tuple(VcpuConfig(i) for i in range(vcpus)), **config}
    settings = VmConfig(**config)
    host = HypervHost.under(settings)
    assert host is not None
    return bare_draft(settings).machine, host


def test_an_assist_page_as_kvm_stores_it() -> None:
    page = bytearray(64)
    write_assist(page, {"control": 1, "enlighten": 1, "evmcs": 0x9000})
    assert page[0x20:0x38].hex() == E09
    assert read_assist(bytes(page)) == {"control": 1, "enlighten": 1, "evmcs": 0x9000}
    assert VP_ASSIST.get(page, "nested_features") == 1 and VP_ASSIST.get(page, "current_nested_vmcs") == 0x9000


@pytest.mark.parametrize(
    ("written", "text", "read"),
    [
        ("before-fix", E13, {"control": 0, "enlighten": 1, "evmcs": 0x9000}),
        ("first-fix", E14, {"control": 1, "enlighten": 0, "evmcs": 1}),
    ],
)
def test_what_hyperv_reads_of_a_page_with_a_wrong_layout(written: str, text: str, read: dict[str, int]) -> None:
    page = bytearray(len(text) // 2)
    write_assist(page, {"control": 1, "enlighten": 1, "evmcs": 0x9000}, written)
    assert page.hex() == text
    assert read_assist(bytes(page)) == read
    assert read_assist(bytes(page), written) == {"control": 1, "enlighten": 1, "evmcs": 0x9000}


def test_loading_and_leaving_a_cpu() -> None:
    m, host = host_machine(2)
    first, second = (kvm_on_hyperv.address(m, vcpu, ctl.V_HV_EVMCS) for vcpu in (0, 1))
    assert fields_of(m, 0) == (0, 1, first)
    assert kvm_on_hyperv.enable_direct_flush(m, 0, host) is None
    assert fields_of(m, 0) == (1, 1, first) and fields_of(m, 1) == (0, 1, second)
    # E10: another enlightened VMCS, which does not ask, takes nothing back
    kvm_on_hyperv.load(m, 0, host, 1)
    assert fields_of(m, 0) == (1, 1, second)
    assert not kvm_on_hyperv.nested_guest(m, 0, host).enlightened
    kvm_on_hyperv.load(m, 1, host, 0)
    assert fields_of(m, 1) == (1, 1, first)
    kvm_on_hyperv.unload(m, 0)  # E11
    assert not any(kvm_on_hyperv.assist_page(m, 0))
    kvm_on_hyperv.entering(m, 0, 7, host)
    assert fields_of(m, 0) == (1, 1, first)


def fields_of(m: frames.Machine, cpu: int) -> tuple[int, ...]:
    """DirectHypercall, EnlightenVmEntry and CurrentNestedVmcs on the CPU of a vCPU."""
    return tuple(read_assist(kvm_on_hyperv.assist_page(m, cpu)).values())


def test_without_the_enlightened_vmcs_no_assist_page_is_used() -> None:
    m, host = host_machine(host=HostConfig(hyperv={}, evmcs=False))
    kvm_on_hyperv.entering(m, 0, 7, host)
    kvm_on_hyperv.exited(m, 0, 7, host)
    assert not any(kvm_on_hyperv.assist_page(m, 0)) and not any(kvm_on_hyperv.control_page(m, 0, host))
    assert kvm_on_hyperv.nested_guest(m, 0, host) == NestedGuest(enlightened=False)


@pytest.mark.parametrize(
    ("profile", "bit", "available"),
    [("kvm-2019", True, False), ("kvm-latest", True, True), ("kvm-latest", False, False)],
)
def test_on_amd_kvm_asks_since_it_was_ported(profile: str, bit: bool, available: bool) -> None:
    leaf = {"function": 0x4000000A, "eax": 0xA0101 if bit else 0x80101}
    m, host = host_machine(profile=profile, host=HostConfig(vendor="amd", hyperv={"cpuid": [leaf]}))
    assert host.direct_flush is available and not host.evmcs
    # every CPU from the start, and nothing of an enlightened VMCS
    assert fields_of(m, 0) == (int(available), 0, 0)
    assert kvm_on_hyperv.enable_direct_flush(m, 0, host) == (None if available else "ENOTTY")
    guest = kvm_on_hyperv.nested_guest(m, 0, host)
    assert (guest.svm, guest.asks, guest.direct) == (True, available, available)


def test_a_vmcb_has_its_vp_id_before_it_runs() -> None:
    m, host = host_machine(profile="kvm-latest", host=HostConfig(vendor="amd", hyperv={}))
    kvm_on_hyperv.exited(m, 0, 7, host)
    clean = 1 << 31
    assert host.control.get(kvm_on_hyperv.control_page(m, 0, host), "hv_clean_fields") == clean
    kvm_on_hyperv.enable_direct_flush(m, 0, host)
    page = kvm_on_hyperv.control_page(m, 0, host)
    assert host.control.get(page, "hv_clean_fields") == 0 and page[0x3E0:0x3E8] == bytes([1, 0, 0, 0, 0, 0, 0, 0])
    assert int.from_bytes(page[0x3E8:0x3F0], "little") == kvm_on_hyperv.vm_id(m)
    kvm_on_hyperv.entering(m, 0, 7, host)
    assert kvm_on_hyperv.control_page(m, 0, host)[0x3E4] == 7


def test_hyperv_reads_the_pages_of_kvm_and_no_others() -> None:
    m, host = host_machine()
    kvm_on_hyperv.enable_direct_flush(m, 0, host)
    page = kvm_on_hyperv.nested_guest(m, 0, host).assist_page
    memory = HostPages(m)
    assert memory.read(page, 4) == bytes(4)
    assert memory.read(page + 0xFFC, 8) is None
    assert memory.read(0x5000, 4) is None
    assert memory.read(int(frames.address_of(m, frames.STATE_FRAME)), 4) is None


def test_the_area_of_a_vmcb() -> None:
    area = bytes.fromhex("01000000010000000100000000000000" + "00a00000000000000000000000000000")
    assert {
        name: VMCB_ENLIGHTENMENTS.get(area, name) for name in ("hv_vp_id", "hv_vm_id", "partition_assist_page")
    } == {
        "hv_vp_id": 1,
        "hv_vm_id": 1,
        "partition_assist_page": 0xA000,
    }
