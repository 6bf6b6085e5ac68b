"""What the host does to the memory behind a guest."""

from __future__ import annotations

from typing import Literal

from pydantic import ConfigDict, Field
from starlette.requests import Request
from starlette.responses import Response

from service.api.common import (
    CHANGE,
    VmId,
    changing,
    documented,
    find,
    json_response,
    router,
)
from service.http.wire_types import Document, Hex64, examples
from service.runtime.offload import maybe_in_thread

routes = router("host memory", "/v1/vms/{vm}/host-memory", reads="read", writes="write")

# Events on so few pages are done before the event loop notices.
_INLINE_PAGES = 64

Event = Literal[
    "unmap",
    "migrate",
    "remap-read-only",
    "remap-writable",
    "write-protect",
    "age",
    "split",
    "collapse",
    "shrink",
    "zap",
]

_ABOUT = (
    "Bitmaps, protections and contents stay; the next access faults and is mapped anew. `unmap` is a swap-out; "
    "`migrate` gives each page another host frame; `remap-read-only` is a KSM merge: a write then gets a copy; "
    "`remap-writable` undoes it; `write-protect` is what a dirty log does; `age` clears accessed flags, or takes the "
    "rights where the processor has none; `split` and `collapse` change the size of host pages; `zap` drops mappings, "
    "`shrink` also the SPPT, and frees the tables. `split`, `collapse` and `shrink` work on the whole 2-MByte regions "
    "that the pages are in; `shrink` and `zap` without `gfn` on everything."
)


class HostMemoryEvent(Document):
    """An event, and the pages it happens to."""

    model_config = ConfigDict(json_schema_extra=examples({"event": "migrate", "gfn": "0x2a5c", "npages": 16}))

    event: Event = Field(description="What happens.")
    gfn: Hex64 | None = Field(None, description="First page; each page of the range has a memory slot.")
    npages: int | None = Field(None, ge=1, description="Pages, 1 unless given; at most 1048576.")


class HostMemoryOutcome(Document):
    """What the event did to KVM's tables."""

    model_config = ConfigDict(
        json_schema_extra=examples(
            {"event": "migrate", "gfn": "0x2a5c", "npages": 16, "leaves_changed": 3, "frames_freed": 0}
        )
    )

    event: Event = Field(description="What happened.")
    gfn: Hex64 | None = Field(description="Null where it was about everything.")
    npages: int | None = Field(description="Pages that it happened to; null for an event of the whole VM.")
    leaves_changed: int | None = Field(description="EPT leaf entries that changed; null where all of them went.")
    frames_freed: int = Field(description="EPT and SPPT tables that returned to the free list.")


@routes.post(
    "",
    operation_id="hostMemoryEvent",
    summary="Let the host change guest memory",
    description=_ABOUT,
    responses=documented(
        {200: {"model": HostMemoryOutcome, "description": "It happened."}},
        *CHANGE,
    ),
)
async def host_memory_event(request: Request, vm: VmId, body: HostMemoryEvent) -> Response:
    entry = find(request, vm)
    small = body.gfn is not None and (body.npages or 1) <= _INLINE_PAGES
    async with changing(request, entry) as machine:
        done = await maybe_in_thread(small, machine.host_memory.event, body.event, body.gfn, body.npages)
        outcome = HostMemoryOutcome(
            event=body.event,
            gfn=done.gfn,
            npages=done.npages,
            leaves_changed=done.leaves,
            frames_freed=done.frames,
        )
        entry.events.note("host-memory", outcome.model_dump(mode="json"))
    return json_response(outcome)
