"""Symbols of the guest: names for its addresses, in objects to protect and in exit records."""

from __future__ import annotations

from typing import Annotated

from fastapi import Query
from pydantic import ConfigDict, Field
from starlette.requests import Request
from starlette.responses import Response

from engine.errors import NotFound
from engine.machine import VirtualMachine
from engine.symbols import formats
from engine.symbols.formats import SymbolFile
from engine.symbols.stored import Symbols
from engine.symbols.table import Symbol
from engine.trace.readers import Budget
from service.api.common import (
    BINARY,
    VmId,
    changing,
    documented,
    find,
    guard,
    headers,
    json_response,
    replaying_of,
    router,
    tag_of,
    tagged,
    tagged_reply,
)
from service.http.negotiation import OCTETS, content_type
from service.http.wire_types import Document, Hex64, examples
from service.problems import InvalidDocument
from service.runtime.offload import maybe_in_thread

routes = router("symbols", "/v1/vms/{vm}/symbols", reads="read", writes="write")

TEXT = "text/plain"
_WRAP = 1 << 64
# Symbols of one name that a reply lists.
_LISTED = 100

_MATCH = {
    "label": "modprobe_path+0x10",
    "name": "modprobe_path",
    "gva": "0xffffffff82a5c6a0",
    "gpa": "0x2a5c6a0",
    "size": 256,
    "size_assumed": True,
}
_ABOUT = {
    "format": "kallsyms",
    "symbols": 94266,
    "sizes_assumed": 94265,
    "slide": "0x0",
    "phys_base": "0x0",
    "page_offset": "0xffff888000000000",
    "found_by": "assumed: the kernel is where it is linked, so there is no KASLR (nokaslr)",
    "matches": None,
}


_LINES = {**BINARY, "example": "ffffffff81000000 T _text\nffffffff82a5c6a0 D modprobe_path\n"}


class SymbolMatch(Document):
    """A symbol that was asked for."""

    label: str = Field(description="The name of the address: `name+0x10`.")
    name: str = Field(description="Name of the symbol; ` [module]` follows where it is one of a module.")
    gva: Hex64 = Field(description="Its address in the running guest.")
    gpa: Hex64 | None = Field(description="Guest-physical; null where that is not known.")
    size: int | None = Field(description="In bytes; null where nothing says it.")
    size_assumed: bool = Field(description="The size is the distance to the next symbol.")


class SymbolTable(Document):
    """The symbols of a machine, and where its kernel is."""

    model_config = ConfigDict(json_schema_extra=examples({**_ABOUT, "matches": [_MATCH]}))

    format: str = Field(description="Form of the file.")
    symbols: int = Field(description="How many there are.")
    sizes_assumed: int = Field(description="Those whose size is the distance to the next one.")
    slide: Hex64 = Field(description="What was added to the addresses of the file.")
    phys_base: Hex64 | None = Field(description="The kernel's own, modulo 2^64; null: not known.")
    page_offset: Hex64 | None = Field(description="Where its direct map begins; null: not known.")
    found_by: str = Field(description="By what the place of the kernel is known, or why it is not.")
    matches: list[SymbolMatch] | None = Field(description="What `name` or `at` asks for; null without either.")


def _document(symbols: Symbols, name: str | None = None, at: int | None = None) -> SymbolTable:
    place, table = symbols.placement, symbols.table
    matches = None
    if name is not None:
        matches = [_match(symbols, item, item.name) for item in table.find(name)[:_LISTED]]
    elif at is not None:
        address = place.image_address(at)
        position = table.position_at(address)
        label = table.label(address)
        matches = [] if label is None else [_match(symbols, table.symbol(position), label)]
    return SymbolTable(
        format=symbols.format,
        symbols=len(table),
        sizes_assumed=int(table.assumed.sum()),
        slide=place.slide,
        phys_base=None if place.phys_base is None else place.phys_base % _WRAP,
        page_offset=place.page_offset,
        found_by=place.found_by,
        matches=matches,
    )


def _match(symbols: Symbols, item: Symbol, label: str) -> SymbolMatch:
    gpa = symbols.placement.gpa(item.address)
    return SymbolMatch(
        label=label, name=item.name, gva=item.address, gpa=gpa, size=item.size or None, size_assumed=item.assumed
    )


def _read(data: bytes, format: str | None, budget: Budget) -> SymbolFile:
    def take(size: int) -> None:
        if budget.kept + size > budget.limit:
            rule = f"must need at most {budget.limit} bytes of memory while it is read (body_memory_bytes)"
            raise InvalidDocument(rule, field="body", value=budget.kept + size)
        budget.keep(size, "symbols")

    return formats.read(data, format, min(budget.limit, formats.MOST), take)


@routes.post(
    "",
    operation_id="loadSymbols",
    summary="Load symbols",
    description=(
        "The body is the file. It takes the place of what was loaded before, is kept with the machine, and counts as "
        "its memory. Unless `slide` or `phys_base` is given, the kernel is looked for in the machine's memory "
        "(`linux_banner`, `phys_base`); `found_by` says what came of it, and what to pass."
    ),
    status_code=201,
    openapi_extra={"requestBody": {"required": True, "content": {OCTETS: BINARY, TEXT: _LINES}}},
    responses=documented(
        {201: {"model": SymbolTable, "description": "Loaded.", "headers": headers("Location")}},
        "malformed-body",
        "not-found",
        "vm-busy",
        "body-too-large",
        "unsupported-media-type",
        "invalid-value",
        "limit-exceeded",
    ),
)
async def load_symbols(
    request: Request,
    vm: VmId,
    format: Annotated[
        str | None,
        Query(max_length=32, description="kallsyms, system-map, isf or elf; by the content otherwise."),
    ] = None,
    slide: Annotated[Hex64 | None, Query(description="What KASLR added to the addresses of the file.")] = None,
    phys_base: Annotated[
        Hex64 | None, Query(description="The guest kernel's phys_base, modulo 2^64; 0 without KASLR.")
    ] = None,
) -> Response:
    entry = find(request, vm)
    content_type(request, (OCTETS, TEXT))
    content = await request.body()
    signed = phys_base - _WRAP if phys_base is not None and phys_base >= _WRAP // 2 else phys_base
    with replaying_of(request).memory.budget(entry.tenant) as budget:
        file = await maybe_in_thread(False, _read, content, format, budget)
        async with changing(request, entry) as machine:
            symbols = await maybe_in_thread(False, machine.symbols.load, file, slide, signed)
    location = {"Location": f"/v1/vms/{entry.id}/symbols"}
    return json_response(_document(symbols), status=201, extra=location)


@routes.get(
    "",
    operation_id="getSymbols",
    summary="Look symbols up",
    description="By `name` or by `at`, or neither: then what is loaded. Up to 100 symbols of one name are listed.",
    responses=documented(tagged_reply(SymbolTable, "What was found."), "not-found", "invalid-value"),
)
async def get_symbols(
    request: Request,
    vm: VmId,
    name: Annotated[str | None, Query(max_length=4096, description="Name of a symbol.")] = None,
    at: Annotated[
        Hex64 | None, Query(description="An address: guest-physical below 2^52, of the kernel's own above.")
    ] = None,
) -> Response:
    entry = find(request, vm)
    if name is not None and at is not None:
        raise InvalidDocument("must be left out where `name` is given", field="at", value=hex(at))
    return tagged(request, await maybe_in_thread(False, _looked_up, entry.machine, name, at))


def _looked_up(machine: VirtualMachine, name: str | None = None, at: int | None = None) -> SymbolTable:
    symbols = machine.symbols.all()
    if symbols is None:
        raise NotFound("this machine has no symbols: POST them first", field="symbols")
    return _document(symbols, name, at)


@routes.delete(
    "",
    operation_id="deleteSymbols",
    summary="Forget the symbols",
    description="Objects that were protected by their names stay protected.",
    status_code=204,
    response_description="Forgotten.",
    responses=documented({}, "not-found", "vm-busy", "precondition-failed", "precondition-required", "limit-exceeded"),
)
async def delete_symbols(request: Request, vm: VmId) -> Response:
    entry = find(request, vm)
    async with changing(request, entry) as machine:
        shown = await maybe_in_thread(False, _looked_up, machine)
        guard(request, entry, lambda: [tag_of(shown)])
        await maybe_in_thread(False, machine.symbols.drop)
    return Response(status_code=204)
