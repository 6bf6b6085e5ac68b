"""The one form of a policy: what to protect, in a body of the API and in a file of the command line alike."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, GetJsonSchemaHandler
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema

from engine.kvm.protections import MAX_OBJECTS, MAX_RANGES, ProtectedObject, ProtectedPages, VirtualObject
from engine.kvm.protections import Protection as EngineProtection
from service.http.wire_types import Document, Hex32, Hex64, Word, examples
from service.problems import InvalidDocument, ServiceError

_NAME = r"^[A-Za-z0-9_][A-Za-z0-9_.~-]*$"
_ABOUT = 2000

Granularity = Literal["subpage", "page"]
ABOUT = "A note for people; kept, and given back."
GVA = "Where the guest sees it: a note beside `gpa`. Without `gpa` the guest's page tables say where that is now."
VCPU = "By whose page tables `gva` is translated: the id of a vCPU, with its paging mode and CR3."
CR3 = "The address space in place of the vCPU's CR3."


class _OptionalWord(Word):
    """A number that may be missing: policies say so by an empty text, too."""

    def parse(self, value: Any) -> Any:
        return None if value is None or value == "" else super().parse(value)

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        found = super().__get_pydantic_json_schema__(schema, handler)
        return {**found, "anyOf": [*found["anyOf"], {"const": ""}, {"type": "null"}]}


_Gva = Annotated[int | None, _OptionalWord(64)]
# Tools that read no prefixItems want to be told of items, too; there are none beyond those.
RANGE_ITEMS: dict[str, Any] = {"items": {}}
_Range = Annotated[tuple[Hex64, Hex64, Hex32], Field(strict=False, json_schema_extra=RANGE_ITEMS)]

EXAMPLE = {
    "name": "kernel",
    "about": "what a rootkit overwrites",
    "objects": [
        {"name": "sys_call_table", "gva": "0xffffffff82000360", "gpa": "0x2000360", "size": 3616},
        {"name": "modprobe_path", "gpa": "0x2a5c6a0", "size": 256},
        {"name": "idt_table", "gpa": "0x3313000", "size": 4096, "granularity": "page"},
    ],
    "pages": [["0x2bfb", 1, "0xfffffff0"]],
}


class ObjectPiece(Document):
    """A run of an object in frames that are neighbours."""

    gpa: Hex64 = Field(description="Guest-physical address of its first byte.")
    gva: Hex64 = Field(description="Where the guest sees it.")
    size: int = Field(description="In bytes.")


class ObjectRequest(Document):
    """A byte range to protect; rounded outward to 128 bytes, or to whole pages."""

    name: str | None = Field(
        None, min_length=1, max_length=256, description="Unique in the protection. Required unless `symbol` is given."
    )
    gpa: Hex64 | None = Field(
        None, description="Guest-physical address of its first byte. Required without `gva` and `symbol`."
    )
    size: Hex64 | None = Field(None, description="In bytes. Required unless `symbol` is given, whose size it is then.")
    granularity: Granularity = Field("subpage", description="Outward to what it is rounded: 128 bytes, or 4 KiB.")
    gva: _Gva = Field(None, description=GVA)
    vcpu: int | None = Field(
        None,
        ge=0,
        le=0xFFFF,
        description=VCPU + " 0 unless given; with it, a `gpa` is what was found before.",
    )
    cr3: Hex64 | None = Field(None, description=CR3 + " For an object by `gva`.")
    pieces: list[ObjectPiece] | None = Field(
        None, max_length=MAX_OBJECTS, description="As a reply has them; an object by `gva` is looked up anew."
    )
    symbol: str | None = Field(
        None,
        max_length=256,
        description="Symbol of the machine (`…/symbols`) whose place it has: by the guest's page tables with `vcpu` or "
        "`cr3`, and in a module.",
    )
    offset: Hex32 = Field(0, description="Bytes from the symbol to the object; only with `symbol`.")
    about: str | None = Field(None, max_length=_ABOUT, description=ABOUT)


class ProtectionRequest(Document):
    """Objects and pages to protect together. Either list may be empty, not both."""

    model_config = ConfigDict(json_schema_extra=examples(EXAMPLE))

    name: str = Field(min_length=1, max_length=128, pattern=_NAME, description="Unique in the VM; part of the URL.")
    about: str | None = Field(None, max_length=_ABOUT, description=ABOUT)
    subpage_bytes: int = Field(128, ge=128, le=128, description="The size of what a bit in `pages` stands for.")
    objects: list[ObjectRequest] = Field(
        default_factory=list, max_length=MAX_OBJECTS, description="Byte ranges to protect."
    )
    pages: list[_Range] = Field(
        default_factory=list,
        max_length=MAX_RANGES,
        description=(
            "Ranges without a name: first page, number of pages, and a bitmap for each of them, whose bit i is 1 when "
            "sub-page i stays writable. They are protected together with the objects; nothing is SET."
        ),
    )

    def protection(self) -> EngineProtection:
        """What is protected where no guest has page tables. Raises ServiceError, for objects by ``gva`` alone, too."""
        objects = tuple(_by_gpa(item, f"objects[{position}]") for position, item in enumerate(self.given_objects()))
        return EngineProtection(self.name, objects, self.given_pages(), self.about)

    def given_pages(self) -> tuple[ProtectedPages, ...]:
        """The ranges as the engine takes them."""
        return tuple(ProtectedPages(*row) for row in self.pages)

    def given_objects(self) -> list[ProtectedObject | VirtualObject]:
        """The objects as the engine takes them. Raises ServiceError for what the form allows and nobody takes."""
        known: dict[str | None, int] = {}
        for position, item in enumerate(self.objects):
            first = known.setdefault(item.name, position)
            if first != position and item.name is not None:
                rule = f"objects[{first}] and objects[{position}] have one name: each object needs a name of its own"
                raise InvalidDocument(rule, field=f"objects[{position}].name", value=item.name)
        return [_object(item, f"objects[{position}]") for position, item in enumerate(self.objects)]


def _by_gpa(item: ProtectedObject | VirtualObject, where: str) -> ProtectedObject:
    if isinstance(item, VirtualObject):
        rule = "is looked up in the page tables of a guest, and here is none: give gpa, the guest-physical address"
        raise ServiceError(rule, field=f"{where}.gva", value=hex(item.gva), code="not-yet-supported")
    return item


def _object(item: ObjectRequest, where: str) -> ProtectedObject | VirtualObject:
    if item.symbol is not None:
        raise no_symbols(where, item.symbol)
    if item.offset:
        raise InvalidDocument("must be left out where there is no `symbol`", field=f"{where}.offset", value=item.offset)
    if item.name is None:
        raise InvalidDocument("is required", field=f"{where}.name")
    if item.size is None:
        raise InvalidDocument("is required", field=f"{where}.size")
    if item.gva is not None and (item.gpa is None or item.vcpu is not None):
        vcpu = item.vcpu or 0
        return VirtualObject(item.name, item.gva, item.size, item.granularity, item.about, vcpu, item.cr3)
    if item.gpa is None:
        raise InvalidDocument("is required", field=f"{where}.gpa")
    for name in ("vcpu", "cr3"):
        if getattr(item, name) is not None:
            rule = "must be left out: it is for an object by gva, and this one is by gpa"
            raise InvalidDocument(rule, field=f"{where}.{name}", value=getattr(item, name))
    return ProtectedObject(item.name, item.gpa, item.size, item.granularity, item.gva, item.about)


def no_symbols(where: str, symbol: str) -> ServiceError:
    """An object has a symbol where there are none."""
    rule = (
        "names a symbol, and there are none here: POST them to `…/symbols` of the machine, or let `subpage policy "
        "from-symbols` write the addresses"
    )
    return InvalidDocument(rule, field=f"{where}.symbol", value=symbol)
