"""The fields of a nested-state blob as JSON documents: their models, made from the layouts of the ABI."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import msgspec
from pydantic import BaseModel, ConfigDict, Field, WithJsonSchema, create_model

from engine.arch import kvm_nested_state as abi
from engine.arch.evmcs import EVMCS
from engine.arch.struct_layout import PARTIAL, Layout, parse_integer
from engine.arch.struct_layout import Field as LayoutField
from engine.arch.vmcs12 import ENCODINGS, VMCS12, VMCS12_PAGE
from service.http.json_bodies import weigh
from service.http.wire_types import Word, examples
from service.problems import BodyTooLarge, InvalidDocument, ServiceError

_ABOUT_PARTIAL = "Where the bytes end within a field: those that are there, in hex."

# A document has some hundred members, and bytes behind the last section in one string.
_MOST_BYTES = 1 << 20
_MOST_VALUES = 1 << 14

_HEADER = {"vmxon_pa": "0x1000", "vmcs12_pa": "0xffffffffffffffff", "smm_flags": "0x0"}
EXAMPLE = {"length": 128, "flags": "0x0", "format": 0, "size": 128, "vmx": _HEADER}


class _Fields(BaseModel):
    """Base of the models: members that are absent are zero, or lie beyond the end."""

    model_config = ConfigDict(extra="forbid", frozen=True)


def _short(schema: dict[str, Any]) -> None:
    for name in ("default", "title"):
        schema.pop(name, None)


def _member(schema: dict[str, Any]) -> Any:
    """A member that the engine reads by itself: one schema for both directions, so that there is one model."""
    return Annotated[Any, WithJsonSchema(schema)], Field(None, json_schema_extra=_short)


def _word(size: int) -> dict[str, Any]:
    return Word(8 * size).taken()


_BYTES = {"type": "string", "pattern": "^([0-9a-fA-F]{2})*$"}


def _count(size: int) -> dict[str, Any]:
    return {"type": "integer", "minimum": 0, "maximum": (1 << 8 * size) - 1}


_SHAPES = {"count": _count, "word": _word}


def _about(field: LayoutField, named: bool) -> str:
    """Where a field is, and which one of the VMCS it is: from the tables, which have the names of the manuals."""
    if not named:
        return f"Bytes {field.offset} to {field.end - 1}, without a name."
    encoding = ENCODINGS.get(field.name)
    return f"Byte {field.offset}." if encoding is None else f"Byte {field.offset}; VMCS {encoding:#06x}."


def _model(name: str, layout: Layout, about: str) -> Any:
    members: dict[str, Any] = {}
    for field in layout.fields:
        shape = _BYTES if field.kind == "bytes" else _SHAPES[field.kind](field.size)
        members[field.name] = _member(shape | {"description": _about(field, field in layout.named)})
    members[PARTIAL] = _member({**_BYTES, "description": _ABOUT_PARTIAL})
    return create_model(name, __base__=_Fields, __doc__=about, **members)


_PAGE = Layout("vmcs12", VMCS12_PAGE, VMCS12.named)
Vmcs12: Any = _model(
    "Vmcs12", _PAGE, "struct vmcs12 in its page. Fields by place, and by encoding in the VMCS where they have one."
)
VmxHeader: Any = _model("VmxHeader", abi.VMX_HEADER, "`hdr.vmx` and the rest of the header.")
SvmHeader: Any = _model("SvmHeader", abi.SVM_HEADER, "`hdr.svm` and the rest of the header.")
OtherHeader: Any = _model("OtherHeader", Layout("header", 120, []), "Header of a format that no kernel knows.")
Vmcb12: Any = _model("Vmcb12", Layout("vmcb12", abi.VMCB_PAGE, []), "The VMCB in its page, as bytes.")
EvmcsPage: Any = _model(
    "EvmcsPage",
    EVMCS,
    "An enlightened VMCS by place and encoding in the VMCS; in 2019 some fields lie elsewhere or are missing.",
)


_ABOUT_LENGTH = "Bytes that are there; without it, up to the end of the last section."
_ABOUT_FLAGS = "Bits 0 GUEST_MODE, 1 RUN_PENDING, 2 EVMCS, 3 MTF_PENDING, 8 GIF_SET."
_Length = Annotated[Any, WithJsonSchema({**_count(3), "description": _ABOUT_LENGTH})]
_Flags = Annotated[Any, WithJsonSchema({**_word(2), "description": _ABOUT_FLAGS})]
_Format = Annotated[Any, WithJsonSchema({**_count(2), "description": "0 VMX, 1 SVM."})]
_Size = Annotated[Any, WithJsonSchema({**_count(4), "description": "What the caller claims; without it, the length."})]
_Partial = Annotated[Any, WithJsonSchema({**_BYTES, "description": _ABOUT_PARTIAL})]
_Tail = Annotated[Any, WithJsonSchema({**_BYTES, "description": "What lies behind the sections."})]


class NestedStateFields(_Fields):
    """struct kvm_nested_state by name. Lossless: any bytes have one such document, and it has those bytes.

    Which sections there are follows from `format`: `vmx`, `vmcs12` and `shadow_vmcs12` for 0, `svm` and `vmcb12` for
    1, `header` for others; `tail` is what lies behind them.
    """

    model_config = ConfigDict(json_schema_extra=examples(EXAMPLE))

    length: _Length = Field(None, json_schema_extra=_short)
    flags: _Flags = Field(None, json_schema_extra=_short)
    format: _Format = Field(None, json_schema_extra=_short)
    size: _Size = Field(None, json_schema_extra=_short)
    partial: _Partial = Field(None, json_schema_extra=_short)
    vmx: VmxHeader = Field(None, description="Header of format 0.", json_schema_extra=_short)
    vmcs12: Vmcs12 = Field(None, description="The current VMCS of the guest.", json_schema_extra=_short)
    shadow_vmcs12: Vmcs12 = Field(None, description="The VMCS that it shadows.", json_schema_extra=_short)
    svm: SvmHeader = Field(None, description="Header of format 1.", json_schema_extra=_short)
    vmcb12: Vmcb12 = Field(None, description="The VMCB of the guest.", json_schema_extra=_short)
    header: OtherHeader = Field(None, description="Header of another format.", json_schema_extra=_short)
    tail: _Tail = Field(None, json_schema_extra=_short)


def parse_document(content: bytes) -> Mapping[str, Any]:
    """A JSON object. Raises ServiceError (400) for what is not JSON and InvalidDocument for another value."""
    if len(content) > _MOST_BYTES:
        raise BodyTooLarge(f"must be at most {_MOST_BYTES} bytes", field="body")
    weigh(content, _MOST_VALUES)
    try:
        document = msgspec.json.decode(content)
    except (ValueError, RecursionError) as error:
        raise ServiceError(f"the body must be JSON: {error}", code="malformed-body") from None
    if not isinstance(document, dict):
        raise InvalidDocument("must be an object", field="body")
    return document


def blob_of(content: bytes) -> bytes:
    """The blob that a JSON body describes. Raises InvalidValue, naming the field, for what a blob cannot hold."""
    document = dict(parse_document(content))
    whole_header = "partial" not in document and parse_integer(document.get("length", 8), "length", 24) >= 8
    if "size" in document or not whole_header:
        return abi.encode_blob(document)
    return abi.encode_blob({**document, "size": len(abi.encode_blob(document))})


def fields_of(blob: bytes | None) -> dict[str, Any] | None:
    """The blob by field."""
    return None if blob is None else abi.decode_blob(blob)
