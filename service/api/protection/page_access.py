"""Page access as KVMI pairs it with the write bitmap: read, write and execute of a page, in batches."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from fastapi import Query
from pydantic import ConfigDict, Field
from starlette.requests import Request
from starlette.responses import Response

from engine.errors import EngineError
from engine.machine.page_access import MAX_ENTRIES, AccessChange, EntryResult, PageRights, text_of
from service.api.common import (
    GUARDED_CHANGE,
    VmId,
    changing,
    documented,
    find,
    guard,
    held_tag,
    json_response,
    router,
)
from service.http.wire_types import Document, Hex32, Hex64, PageNumber, Rights, examples
from service.problems import InvalidDocument, showable
from service.runtime.changes import pages_set
from service.runtime.offload import maybe_in_thread

routes = router("page access", "/v1/vms/{vm}/page-access", reads="read", writes="write")

_INLINE_ENTRIES = 64
_ABOUT = (
    "Write access and the write bitmap are one thing: a bitmap of all ones gives write access, any zero takes it away "
    "and leaves the sub-pages whose bit is 1 exempt. Access alone: with `w` the bitmap becomes all ones; without, it "
    "stays, or becomes 0 where it was all ones. Both together must say the same. The bitmap is that of "
    "`subpages?layer=set`; protections and grants stand beside it. Without SPP a bitmap is all ones or 0. "
)

_ENTRY = {"gfn": "0x2a5c", "access": "r-x", "write_bitmap": "0xfffffffe"}
_FAULT = {"field": "gfn", "value": "0x900000", "rule": "a page lies in a memory slot", "errno": "EFAULT"}


class PageAccessEntry(Document):
    """What a page is to have; one of the two members may be left out."""

    model_config = ConfigDict(json_schema_extra=examples(_ENTRY))

    gfn: PageNumber
    access: Rights | None = Field(None, description="Rights: letters out of `rwx`, or the sum of 1, 2 and 4.")
    write_bitmap: Hex32 | None = Field(None, description="Bit s: bytes 128 s to 128 s + 127 may be written.")


class PageAccessPatch(Document):
    """A batch, in order."""

    model_config = ConfigDict(json_schema_extra=examples({"mode": "atomic", "entries": [_ENTRY]}))

    mode: Literal["atomic", "apply-all", "stop-at-first"] = Field(
        "atomic", description="What happens to the others when an entry is refused: none, all, or those before it."
    )
    entries: list[PageAccessEntry] = Field(
        min_length=1, max_length=MAX_ENTRIES, description="What pages are to have, in order."
    )


class EntryFault(Document):
    """Why an entry was refused."""

    field: str = Field(description="Dotted name of the offending member.")
    value: Any = Field(description="The offending value.")
    rule: str = Field(description="What would have been accepted.")
    errno: str = Field(description="Name of the error that KVM gives.")


class PageAccessResult(Document):
    """What became of an entry."""

    gfn: PageNumber
    result: Literal["applied", "refused", "not-tried"] = Field(description="What became of it.")
    error: EntryFault | None = Field(description="Why it was refused.")

    @classmethod
    def of(cls, found: EntryResult) -> PageAccessResult:
        return cls(gfn=found.gfn, result=found.outcome, error=_fault(found.error))  # type: ignore[arg-type]


class PageAccessResults(Document):
    """One result for each entry, in order."""

    model_config = ConfigDict(
        json_schema_extra=examples(
            {
                "results": [
                    {"gfn": "0x2a5c", "result": "applied", "error": None},
                    {"gfn": "0x900000", "result": "refused", "error": _FAULT},
                ]
            }
        )
    )

    results: list[PageAccessResult] = Field(description="In the order of the entries.")


class PageAccess(Document):
    """What a page has."""

    model_config = ConfigDict(json_schema_extra=examples(_ENTRY))

    gfn: PageNumber
    access: str = Field(pattern="^[r-][w-][x-]$", description="Rights of the page: letters, `-` for what is lacking.")
    write_bitmap: Hex32 = Field(description="Write permission of its sub-pages: bit 0 is the first.")

    @classmethod
    def of(cls, found: PageRights) -> PageAccess:
        return cls(gfn=found.gfn, access=text_of(found.rights), write_bitmap=found.bitmap)


class PageAccessWindow(Document):
    """Consecutive pages."""

    model_config = ConfigDict(json_schema_extra=examples({"pages": [_ENTRY]}))

    pages: list[PageAccess] = Field(description="By GFN.")


def _fault(error: EngineError | None) -> EntryFault | None:
    if error is None:
        return None
    field = error.field or ""
    return EntryFault(field=field, value=showable(error.value, field), rule=error.rule, errno=error.errno)


@routes.get(
    "",
    operation_id="getPageAccess",
    summary="Read page access",
    responses=documented(
        {200: {"model": PageAccessWindow, "description": "One item for each page."}},
        "not-found",
        "invalid-value",
    ),
)
async def get_page_access(
    request: Request,
    vm: VmId,
    gfn: Annotated[Hex64, Query(description="First page.")],
    npages: Annotated[Hex64, Query(description=f"Number of pages, up to {MAX_ENTRIES}.")] = 1,
) -> Response:
    machine = find(request, vm).machine
    if not 1 <= npages <= MAX_ENTRIES:
        raise InvalidDocument(f"must be between 1 and {MAX_ENTRIES}", field="npages", value=npages)
    small = npages <= _INLINE_ENTRIES
    found = await maybe_in_thread(small, machine.page_access.read, range(gfn, gfn + npages))
    return json_response(PageAccessWindow(pages=[PageAccess.of(item) for item in found]))


@routes.patch(
    "",
    operation_id="patchPageAccess",
    summary="Set page access and write bitmaps",
    description=_ABOUT
    + f"Up to {MAX_ENTRIES} entries. `atomic`: an entry that is refused refuses the batch, as a problem that names it. "
    "If-Match is compared with the tag of the VM.",
    responses=documented(
        {200: {"model": PageAccessResults, "description": "One result for each entry."}},
        "spp-not-enabled",
        *GUARDED_CHANGE,
    ),
)
async def patch_page_access(request: Request, vm: VmId, body: PageAccessPatch) -> Response:
    entry = find(request, vm)
    entries = [AccessChange(item.gfn, item.access, item.write_bitmap) for item in body.entries]
    small = len(entries) <= _INLINE_ENTRIES
    async with changing(request, entry, joins=small) as machine:
        guard(request, entry, lambda: [held_tag(entry)])
        results = await maybe_in_thread(small, machine.page_access.set, entries, body.mode)
        applied = [item.gfn for item in results if item.outcome == "applied"]
        if applied:
            entry.events.note("page-access", pages_set(applied))
    return json_response(PageAccessResults(results=[PageAccessResult.of(item) for item in results]))
