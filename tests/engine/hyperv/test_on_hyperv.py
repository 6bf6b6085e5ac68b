"""Pages that KVM and Hyper-V share: the printed vectors of the 2019 series, right layout and wrong ones."""

from __future__ import annotations

import pytest

from engine import birth
from engine.arch import controls as ctl
from engine.arch.hyperv_pages import VMCB_ENLIGHTENMENTS, VP_ASSIST, read_assist, write_assist
from engine.config import HostConfig, VmConfig
from engine.cpu import frames
from engine.hyperv import on_hyperv
from engine.hyperv.on_hyperv import HostPages, HypervHost
from engine.kvm.slots import slot_table

E13 = "00" * 24 + "0100000000000000" + "00" * 8 + "0100000000000000" + "0090000000000000"
E14 = "00" * 32 + "0100000000000000" + "00" * 8 + "0100000000000000" + "0090000000000000"
E09 = "01000000" + "00000000" + "01" + "00" * 7 + "0090000000000000"


def host_machine() -> frames.Machine:
    config = VmConfig(host=HostConfig(hyperv={}))
    draft = birth.new_store(config).begin(slot_table(()))
    birth.build(draft, config)
    return draft.machine


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
    m = host_machine()
    address = on_hyperv.address(m, 0, ctl.V_HV_EVMCS)
    assert (
        on_hyperv.page_of(m, 0, VP_ASSIST)[0x20:0x38].hex()
        == "00" * 8 + "01" + "00" * 7 + address.to_bytes(8, "little").hex()
    )
    assert on_hyperv.enable_direct_flush(m, 0, HypervHost.of({})) is None
    assert on_hyperv.page_of(m, 0, VP_ASSIST)[0x20] == 1
    on_hyperv.unload(m, 0)
    assert not any(on_hyperv.page_of(m, 0, VP_ASSIST))


def test_hyperv_reads_the_pages_of_kvm_and_no_others() -> None:
    m = host_machine()
    on_hyperv.enable_direct_flush(m, 0, HypervHost.of({}))
    page = on_hyperv.nested_guest(m, 0, HypervHost.of({})).assist_page
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
