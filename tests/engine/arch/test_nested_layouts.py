"""The tables of nesting: offsets that the ABI fixes, complete cover, conversions and their refusals."""

from __future__ import annotations

import pytest

from engine.arch import kvm_nested_state as abi
from engine.arch.evmcs import (
    CLEAN_BITS,
    EVMCS,
    EVMCS_FIELDS,
    EVMCS_FIELDS_PACKED,
    EVMCS_PACKED,
)
from engine.arch.hyperv_cpuid import ENTRY_LAYOUT, CpuidEntry, pack_entry, unpack_entries
from engine.arch.hyperv_pages import VP_ASSIST
from engine.arch.struct_layout import Field, Layout, parse_integer
from engine.arch.vmcs12 import ENCODINGS, SINCE_2020, VMCS12, field_index, locate
from engine.errors import InvalidValue

OFFSETS = {
    "revision": 0,
    "abort": 4,
    "launch_state": 8,
    "io_bitmap_a": 40,
    "ept_pointer": 120,
    "vmcs_link_pointer": 176,
    "guest_bndcfgs": 248,
    "vm_function_control": 296,
    "pml_address": 312,
    "encls_exiting_bitmap": 320,
    "tsc_multiplier": 328,
    "cr0_guest_host_mask": 344,
    "cr3_target_value3": 400,
    "exit_qualification": 408,
    "guest_cr0": 424,
    "guest_idtr_base": 520,
    "guest_sysenter_eip": 576,
    "host_cr0": 584,
    "host_rip": 672,
    "host_s_cet": 680,
    "guest_ssp_tbl": 720,
    "pin_based_vm_exec_control": 744,
    "vm_exit_controls": 768,
    "vm_entry_controls": 780,
    "secondary_vm_exec_control": 804,
    "vm_exit_reason": 812,
    "guest_tr_ar_bytes": 908,
    "vmx_preemption_timer_value": 928,
    "virtual_processor_id": 960,
    "guest_intr_status": 980,
    "host_tr_selector": 994,
    "guest_pml_index": 996,
}


LAYOUTS = [VMCS12, EVMCS, EVMCS_PACKED, VP_ASSIST, ENTRY_LAYOUT, abi.VMX_HEADER, abi.COMMON]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_byte_has_a_name(layout: Layout) -> None:
    position = 0
    for field in layout.fields:
        assert field.offset == position
        position = field.end
    assert position == layout.size
    pattern = bytes((n * 37 + 11) & 0xFF for n in range(layout.size))
    for length in range(layout.size + 1):
        assert layout.encode(layout.decode(pattern[:length]), length) == pattern[:length]


def test_sizes() -> None:
    assert (VMCS12.size, EVMCS.size, EVMCS_PACKED.size) == (998, 1024, 1020)
    assert (abi.MIN_SIZE_VMCS12, abi.MIN_SIZE_SHADOW, abi.MAX_SIZE_VMX, abi.MAX_SIZE_SVM) == (1126, 5222, 8320, 4224)


def test_vmcs12_offsets() -> None:
    assert {name: VMCS12.by_name[name].offset for name in OFFSETS} == OFFSETS
    assert set(VMCS12.by_name) >= SINCE_2020


def test_encodings() -> None:
    assert ENCODINGS["guest_cr0"] == 0x6800
    assert field_index(0x6800) == 0x1A
    assert locate(0x6800) == VMCS12.by_name["guest_cr0"]
    high = locate(0x201B)
    assert high is not None and (high.offset, high.size) == (124, 4)
    assert locate(0x6801) is None and locate(0x7FFE) is None
    assert len(set(ENCODINGS.values())) == len(ENCODINGS)


def test_widths_follow_the_encodings() -> None:
    width = {0: 2, 1: 8, 2: 4, 3: 8}
    assert all(VMCS12.by_name[name].size == width[encoding >> 13 & 3] for name, encoding in ENCODINGS.items())


def test_evmcs_twins_have_the_same_width() -> None:
    for field in EVMCS_FIELDS:
        assert field.group in ("", "NONE", "ALL", *CLEAN_BITS)
        if field.copies:
            assert VMCS12.by_name[field.name].size == field.size
            assert field.encoding is not None


def test_packed_quirk() -> None:
    offsets = {field.name: field.offset for field in EVMCS_FIELDS_PACKED}
    assert offsets["hv_vp_id"] == 840
    assert (offsets["hv_vm_id"], offsets["guest_bndcfgs"], offsets["xss_exit_bitmap"]) == (844, 892, 956)
    assert "tsc_multiplier" not in offsets
    assert (EVMCS.by_name["guest_bndcfgs"].offset, EVMCS.by_name["xss_exit_bitmap"].offset) == (896, 960)


def test_header() -> None:
    blob = abi.encode_blob(
        {"flags": "0x5", "size": 128, "vmx": {"vmxon_pa": "0x1000", "vmcs12_pa": abi.NO_ADDRESS, "smm_flags": 3}}
    )
    assert blob[:8] == bytes((5, 0, 0, 0, 128, 0, 0, 0))
    assert blob[8:26] == (0x1000).to_bytes(8, "little") + b"\xff" * 8 + b"\x03\0"
    assert len(blob) == 128
    assert abi.decode_blob(blob)["vmx"]["vmcs12_pa"] == "0xffffffffffffffff"


def test_blob_lengths() -> None:
    assert len(abi.encode_blob({})) == 128
    assert len(abi.encode_blob({"vmcs12": {}})) == 4224
    assert len(abi.encode_blob({"shadow_vmcs12": {}})) == 8320
    assert len(abi.encode_blob({"tail": "00"})) == 8321
    assert len(abi.encode_blob({"length": 1126, "vmcs12": {}})) == 1126
    assert len(abi.encode_blob({"length": 3})) == 3
    assert len(abi.encode_blob({"format": 1, "svm": {"vmcb_pa": 0x3000}, "vmcb12": {}})) == 4224


def test_other_formats() -> None:
    for format in (1, 2, 0xFFFF):
        data = bytes((0, 0)) + format.to_bytes(2, "little") + bytes(range(4, 200))
        document = abi.decode_blob(data)
        assert ("svm" in document) == (format == 1)
        assert abi.encode_blob(document) == data


@pytest.mark.parametrize(
    "document",
    [
        {"flags": -1},
        {"flags": 0x10000},
        {"flags": "zz"},
        {"flags": True},
        {"flags": None},
        {"unknown": 1},
        {"format": "x"},
        {"length": -1},
        {"length": 1 << 24},
        {"tail": "0"},
        {"tail": 5},
        {"length": 128, "tail": "00"},
        {"length": 2, "size": 1},
        {"vmx": 5},
        {"vmx": {"nope": 1}},
        {"vmx": {"vmxon_pa": 1 << 64}},
        {"length": 128, "vmcs12": {"guest_rip": 1}},
        {"vmcs12": {"reserved_12": "00" * 29}},
        {"vmcs12": {"reserved_12": "xyz"}},
        {"partial": "00"},
        {"length": 130, "vmcs12": {"partial": "000000"}},
        {"length": 130, "vmcs12": {"partial": 1}},
    ],
)
def test_refusals_name_the_field(document: dict[str, object]) -> None:
    with pytest.raises(InvalidValue) as caught:
        abi.encode_blob(document)
    assert caught.value.field


def test_too_much_data_and_bad_tables() -> None:
    with pytest.raises(InvalidValue):
        abi.COMMON.decode(bytes(9))
    with pytest.raises(ValueError, match="overlaps"):
        Layout("bad", 8, [Field("a", 0, 8), Field("b", 4, 4)])
    with pytest.raises(ValueError, match="overlaps"):
        Layout("bad", 8, [Field("a", 4, 8)])
    assert "flags" in abi.COMMON
    assert parse_integer("12", "x", 8) == 12


def test_flag_names() -> None:
    assert abi.flag_names(0x105) == ["GUEST_MODE", "EVMCS", "GIF_SET"]
    assert abi.flag_names(0x10) == ["0x10"]


def test_cpuid_entries() -> None:
    entry = CpuidEntry(0x40000001, eax=0x31237648)
    packed = pack_entry(entry)
    assert len(packed) == 40
    assert ENTRY_LAYOUT.get(packed, "eax") == 0x31237648
    assert unpack_entries(packed * 2 + b"rest") == (entry, entry)
