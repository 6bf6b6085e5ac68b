"""The blob of KVM_GET_NESTED_STATE and KVM_SET_NESTED_STATE: header, flags, sizes, JSON form.

A blob is a 128-byte header and, for VMX, up to two 4096-byte pages: vmcs12 and shadow vmcs12; for SVM one VMCB. Its
``size`` member says what the kernel believes, the number of bytes present is another matter: both are kept.
Source: Linux uapi headers, v5.3 and v7.1.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from engine.arch.struct_layout import Field, Layout, parse_bytes, parse_integer
from engine.arch.vmcs12 import VMCS12, VMCS12_PAGE
from engine.errors import InvalidValue

NO_ADDRESS = 0xFFFF_FFFF_FFFF_FFFF

# kvm_nested_state.flags
GUEST_MODE = 0x0001
RUN_PENDING = 0x0002
EVMCS = 0x0004
MTF_PENDING = 0x0008
GIF_SET = 0x0100
FLAG_NAMES = {
    GUEST_MODE: "GUEST_MODE",
    RUN_PENDING: "RUN_PENDING",
    EVMCS: "EVMCS",
    MTF_PENDING: "MTF_PENDING",
    GIF_SET: "GIF_SET",
}

# hdr.vmx.smm.flags and hdr.vmx.flags
SMM_GUEST_MODE = 0x0001
SMM_VMXON = 0x0002
TIMER_DEADLINE = 0x0001

FORMAT_VMX = 0
FORMAT_SVM = 1

HEADER_SIZE = 128
VMCB_PAGE = 0x1000
DATA_OFFSET = HEADER_SIZE
SHADOW_OFFSET = HEADER_SIZE + VMCS12_PAGE
MAX_SIZE_VMX = HEADER_SIZE + 2 * VMCS12_PAGE
MAX_SIZE_SVM = HEADER_SIZE + VMCB_PAGE

# SET reads only the packed structure of 998 bytes from each page, so that much is what must be there.
MIN_SIZE_VMCS12 = DATA_OFFSET + VMCS12.size
MIN_SIZE_SHADOW = SHADOW_OFFSET + VMCS12.size

COMMON = Layout("nested_state", 8, [Field("flags", 0, 2), Field("format", 2, 2, "count"), Field("size", 4, 4, "count")])

# Offsets count from the start of the blob. In 2019 the bytes from 26 on were padding, ignored on SET and 0 on GET.
VMX_HEADER = Layout(
    "vmx",
    HEADER_SIZE - COMMON.size,
    [
        Field("vmxon_pa", 0, 8),
        Field("vmcs12_pa", 8, 8),
        Field("smm_flags", 16, 2),
        Field("pad", 18, 2),
        Field("flags", 20, 4),
        Field("preemption_timer_deadline", 24, 8),
    ],
)
# Kernels after 7.1 gain a gpat value whose offset is not settled; those bytes stay in the reserved range.
SVM_HEADER = Layout("svm", HEADER_SIZE - COMMON.size, [Field("vmcb_pa", 0, 8)])

_SECTIONS = {
    FORMAT_VMX: (
        ("vmx", VMX_HEADER),
        ("vmcs12", Layout("vmcs12", VMCS12_PAGE, VMCS12.named)),
        ("shadow_vmcs12", Layout("shadow_vmcs12", VMCS12_PAGE, VMCS12.named)),
    ),
    FORMAT_SVM: (("svm", SVM_HEADER), ("vmcb12", Layout("vmcb12", VMCB_PAGE, []))),
}
_UNKNOWN_FORMAT = (("header", Layout("header", HEADER_SIZE - COMMON.size, [])),)


def decode_blob(blob: bytes) -> dict[str, Any]:
    """``blob``, of any length, as JSON fields: ``length``, flags, format, size and one object for each section.

    Sections are ``vmx``, ``vmcs12``, ``shadow_vmcs12`` for format 0, ``svm``, ``vmcb12`` for format 1 and ``header``
    for any other; bytes past the last one are ``tail``, in hex.
    """
    document: dict[str, Any] = {"length": len(blob)}
    document.update(COMMON.decode(blob[: COMMON.size]))
    position = COMMON.size
    for name, layout in _sections(COMMON.get(blob, "format")):
        if position >= len(blob):
            break
        document[name] = layout.decode(blob[position : position + layout.size])
        position += layout.size
    if position < len(blob):
        document["tail"] = blob[position:].hex()
    return document


def encode_blob(document: Mapping[str, Any]) -> bytes:
    """The blob that ``document`` describes; absent fields are zero.

    Without ``length`` the blob ends with the last section that is named. Raises InvalidValue for anything that the
    blob cannot hold.
    """
    fields = dict(document)
    declared = fields.pop("length", None)
    tail = parse_bytes(fields.pop("tail", ""), "tail")
    sections = _sections(parse_integer(fields.get("format", 0), "format", 16))
    bodies = {name: fields.pop(name) for name, _ in sections if name in fields}
    length = _natural_length(sections, bodies, tail) if declared is None else parse_integer(declared, "length", 24)
    blob = bytearray(COMMON.encode(fields, min(length, COMMON.size)))
    for name, layout in sections:
        present = max(0, min(layout.size, length - len(blob)))
        body = bodies.get(name, {})
        if not isinstance(body, Mapping):
            raise InvalidValue("must be an object of fields", field=name, value=body)
        blob += layout.encode(body, present)
    room = length - len(blob)
    if len(tail) > room:
        raise InvalidValue(f"must fit into the declared length, {length} bytes", field="tail", value=len(tail))
    return bytes(blob) + tail + bytes(room - len(tail))


def flag_names(flags: int) -> list[str]:
    """Names of the bits set in ``flags``, unknown bits as hexadecimal masks."""
    names = [name for bit, name in FLAG_NAMES.items() if flags & bit]
    unknown = flags & ~sum(FLAG_NAMES)
    return [*names, hex(unknown)] if unknown else names


def _sections(number: int) -> tuple[tuple[str, Layout], ...]:
    return _SECTIONS.get(number, _UNKNOWN_FORMAT)


def _natural_length(sections: tuple[tuple[str, Layout], ...], bodies: Mapping[str, Any], tail: bytes) -> int:
    wanted = [index for index, (name, _) in enumerate(sections) if name in bodies]
    last = len(sections) - 1 if tail else max(wanted, default=0)
    return COMMON.size + sum(layout.size for _, layout in sections[: last + 1]) + len(tail)
