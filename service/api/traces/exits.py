"""Exit records of a trace: pages of JSON, or everything as NDJSON or as an Arrow stream.

Records are columns from the replay to the socket; only the JSON forms make an object of each, a batch at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import repeat
from typing import Annotated, Any

import msgspec
from fastapi import Path
from pydantic import ConfigDict, Field
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from engine.arch.exits import NAMES
from engine.symbols.stored import Symbols
from engine.trace.results import ExitColumns
from service.api.common import (
    BINARY,
    EXAMPLE_TRACE,
    Cursor,
    Limit,
    VmId,
    documented,
    encode,
    find,
    headers,
    headless,
    router,
    settings_of,
)
from service.api.traces.exit_names import NAMED, names_of, symbols_of
from service.http import cursors
from service.http.negotiation import ARROW, JSON, NDJSON, preferred
from service.http.wire_types import Document, Hex32, Hex64, PageNumber, examples
from service.runtime.offload import maybe_in_thread

routes = router("traces", "/v1/vms/{vm}/traces/{trace}/exits", reads="read")

TraceId = Annotated[str, Path(alias="trace", description="Id of the trace.", examples=[EXAMPLE_TRACE])]

_OFFERS = (JSON, NDJSON, ARROW)
_NDJSON_BATCH = 1 << 12
# Rendering more records than this takes longer than the event loop should be kept from others.
INLINE_RECORDS = 200
_SAFE_IN_JSON = (1 << 53) - 1

_lines = msgspec.json.Encoder()

EXAMPLE_EXIT = {
    "index": 4711,
    "vcpu": 0,
    "reason": 48,
    "name": NAMES[48],
    "qualification": "0x1aa",
    "gpa": "0x2a5c6a0",
    "gva": "0xffffffff82a5c6a0",
    "size": 8,
    "access": 1,
    "gfn": "0x2a5c",
    "subpages": "0x2000",
    "denied": "0x2000",
    "objects": ["modprobe_path"],
    "resolution": "violation",
    "stale": False,
    "source": 0,
    "insn_len": 4,
}


def _shown(schema: dict[str, Any]) -> None:
    """An example, and that names are there only where symbols are."""
    schema |= examples(EXAMPLE_EXIT)
    if "required" in schema:
        schema["required"] = [name for name in schema["required"] if name not in NAMED]


class ExitRecord(Document):
    """One VM exit. Carried columns, and `pc` and `time` of the trace, appear under their own names; integers above
    2^53 - 1 are `0x…` strings.
    """

    model_config = ConfigDict(extra="allow", json_schema_extra=_shown)

    index: int = Field(description="Position of the access in the trace.")
    vcpu: int = Field(description="KVM vCPU id.")
    reason: int = Field(
        description=(
            "Basic exit reason: 48, 49, 62, 66; 0 for an access without one of these, listed because it is `stale`, or "
            "MMIO of a host without EPT."
        )
    )
    name: str = Field(description="Name of the reason.")
    qualification: Hex64 = Field(description="Exit qualification.")
    gpa: Hex64 = Field(description="Guest-physical address that the exit reports.")
    gva: Hex64 | None = Field(description="Guest-linear address of the access; null where the trace has none.")
    size: int = Field(description="Bytes of the whole access.")
    access: int = Field(description="0 read, 1 write, 2 execute.")
    gfn: PageNumber
    subpages: Hex32 = Field(description="Sub-pages of the page that the access touches.")
    denied: Hex32 = Field(description="Those among them that refuse it.")
    objects: list[str] = Field(description="Protected objects one of whose sub-pages the access touches.")
    resolution: str = Field(description="`violation`, or what the hypervisor did about the exit.")
    stale: bool = Field(
        description="A cached translation decided against what the tables say; only with `translation_cache: model`."
    )
    source: int = Field(description="0 guest, 1 emulated by KVM, 2 host.")
    insn_len: int = Field(description="Bytes of the instruction; 0 where the trace does not say.")
    symbol: str | None = Field(
        None, description="Name of the address, `name+0x10`; only on machines that have symbols (`…/symbols`)."
    )
    writer: str | None = Field(None, description="Name of the instruction, where there are symbols and a column `pc`.")


class ExitPage(Document):
    """A page of exit records, in the order of the trace."""

    model_config = ConfigDict(json_schema_extra=examples({"exit_records": [EXAMPLE_EXIT], "next": None}))

    exit_records: list[ExitRecord] = Field(description="In the order of the trace.")
    next: str | None = Field(description="URL of the next page; null on the last.")


EXIT_FIELDS = frozenset(ExitRecord.model_fields)
# Those of every machine; the others come with symbols.
MEMBERS = tuple(name for name in ExitRecord.model_fields if name not in NAMED)


def exit_rows(exits: ExitColumns, symbols: Symbols | None = None) -> list[dict[str, Any]]:
    """Each record as a JSON object, with the names that ``symbols`` know."""
    column = exits.columns

    def words(name: str) -> Iterator[str]:
        return map(hex, column[name].tolist())

    rows: list[dict[str, Any]] = [
        dict(zip(MEMBERS, values, strict=True))
        for values in zip(
            column["index"].tolist(),
            column["vcpu"].tolist(),
            column["reason"].tolist(),
            exits.reason_names(),
            words("qualification"),
            words("gpa"),
            words("gva") if exits.has_gva else repeat(None, len(exits)),
            column["size"].tolist(),
            column["access"].tolist(),
            words("gfn"),
            words("subpages"),
            words("denied"),
            exits.objects(),
            exits.resolution_names(),
            map(bool, column["stale"].tolist()),
            column["source"].tolist(),
            column["insn_len"].tolist(),
            strict=True,
        )
    ]
    for name, (where, texts) in names_of(exits, symbols).items():
        for row, position in zip(rows, where.tolist(), strict=True):
            row[name] = texts[position] or None
    for name, values in exits.carry.items():
        for row, value in zip(rows, values.tolist(), strict=True):
            row[name] = hex(value) if isinstance(value, int) and abs(value) > _SAFE_IN_JSON else value
    return rows


def ndjson_stream(exits: ExitColumns, symbols: Symbols | None = None) -> Iterator[bytes]:
    """One JSON object per line."""
    for start in range(0, len(exits), _NDJSON_BATCH):
        yield _lines.encode_lines(exit_rows(exits[start : start + _NDJSON_BATCH], symbols))


def arrow_stream(exits: ExitColumns, symbols: Symbols | None = None) -> Iterator[bytes]:
    """An Arrow IPC stream; without records, its schema alone."""
    from service.api.traces.exits_arrow import stream  # noqa: PLC0415 - 25 MB that a service has no use for until now

    yield from stream(exits, MEMBERS, symbols)


def exits_path(vm_id: str, trace_id: str) -> str:
    return f"/v1/vms/{vm_id}/traces/{trace_id}/exits"


def exits_url(vm_id: str, trace_id: str, position: int, limit: int | None) -> str:
    """URL of the exit records from ``position`` on."""
    return cursors.next_url(exits_path(vm_id, trace_id), f"exits:{trace_id}", position, limit)


@routes.get(
    "",
    operation_id="getExits",
    summary="Read exit records",
    description=(
        "By default violations only; internal exits too if the trace was posted with `include=all`. JSON comes in "
        "pages; NDJSON and Arrow hold everything from the cursor on unless `limit` is given, and then name the rest in "
        "`Link`."
    ),
    responses=documented(
        {
            200: {
                "model": ExitPage,
                "description": "Exit records.",
                "content": {
                    NDJSON: {
                        **BINARY,
                        "example": msgspec.json.encode(EXAMPLE_EXIT).decode() + "\n",
                    },
                    ARROW: BINARY,
                },
                "headers": {
                    **headers("Vary"),
                    "Link": {"description": "The next page, `rel=next`.", "schema": {"type": "string"}},
                },
            }
        },
        "not-found",
        "not-acceptable",
        "invalid-value",
    ),
)
async def get_exits(request: Request, vm: VmId, trace: TraceId, limit: Limit = None, cursor: Cursor = None) -> Response:
    entry = find(request, vm)
    found = await entry.traces.get(trace)
    media = preferred(request, _OFFERS)
    exits = found.result.exit_columns
    start = cursors.decode(f"exits:{trace}", cursor) if cursor is not None else 0
    size = len(exits) - start if limit is None else limit
    if media == JSON:
        largest = settings_of(request).exit_page_size
        size = cursors.page_limit(limit, largest, largest)
    end = min(start + size, len(exits))
    follow = exits_url(vm, trace, end, limit) if end < len(exits) else None
    extra = {"Vary": "Accept"} | ({"Link": f'<{follow}>; rel="next"'} if follow else {})
    window = exits[start:end]
    symbols = await symbols_of(entry.machine)
    if media == JSON:
        small = len(window) <= INLINE_RECORDS and symbols is None
        content = await maybe_in_thread(
            small, lambda: encode({"exit_records": exit_rows(window, symbols), "next": follow})
        )
        return Response(content, media_type=JSON, headers=extra)
    if request.method == "HEAD":
        return headless(media, extra)
    stream = (ndjson_stream if media == NDJSON else arrow_stream)(window, symbols)
    return StreamingResponse(stream, media_type=media, headers=extra)
