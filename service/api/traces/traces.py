"""Replays: post a body of guest accesses, read what would have exited."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from fastapi import Query
from pydantic import ConfigDict, Field
from starlette.requests import Request
from starlette.responses import Response

from engine.errors import InvalidValue
from engine.symbols.stored import Symbols
from engine.trace.option_names import ASK, Address, Include, OnViolation, RecordFormat, ToolFormatName
from service.api.common import (
    BINARY,
    CHANGE,
    EXAMPLE_TRACE,
    EXAMPLE_VM,
    Cursor,
    Limit,
    VmId,
    access_of,
    asker_of,
    documented,
    find,
    footprints_of,
    headers,
    json_response,
    metrics_of,
    principal_of,
    replaying_of,
    router,
    settings_of,
    tagged,
    tagged_reply,
)
from service.api.traces.bodies import (
    COLUMNS_ABOUT,
    FORMAT_ABOUT,
    FORMATS,
    SKIP_ABOUT,
    BodyTotals,
    body_totals,
    format_of,
)
from service.api.traces.exit_names import symbols_of
from service.api.traces.exits import (
    EXAMPLE_EXIT,
    EXIT_FIELDS,
    INLINE_RECORDS,
    ExitRecord,
    TraceId,
    exit_rows,
    exits_url,
)
from service.api.traces.jobs import ACCEPTED, PREFER, done_as_job, wanted_async
from service.api.traces.notes import MMIO_PERCENT, notes_of
from service.api.traces.publication import PublicationTotals, PublishEvery, interval_of, publication_totals
from service.api.traces.translations import (
    EXAMPLE_OPERATION,
    EXAMPLE_STALE,
    MOST_MEMBERS,
    OperationRecord,
    TranslationRecords,
    TranslationTotals,
    translation_records,
    translation_totals,
)
from service.http import cursors
from service.http.idempotency import hooks_of, will_answer
from service.http.negotiation import ARROW, CSV, JSON, NDJSON, OCTETS, PARQUET, TEXT, content_type
from service.http.wire_types import Access, Document, Hex64, Kind, Linear, Source, examples
from service.platform.stamps import stamp
from service.problems import InvalidDocument
from service.runtime.footprint_builds import by_of
from service.runtime.offload import maybe_in_thread
from service.runtime.registry import Entry
from service.runtime.replays import publish_body, replay_body
from service.runtime.traces import Trace, TraceRequest
from service.settings import Settings

routes = router("traces", "/v1/vms/{vm}/traces", reads="read", writes="write")

_SECOND = {"gpa": "0x1000", "gva": "0xffff888000001000"}
_ACCESS = {"gpa": "0x2a5c6a0", "size": 8, "access": 1, "vcpu": 0, "gva": "0xffffffff82a5c6a0"}
_SUMMARY = {
    "id": EXAMPLE_TRACE,
    "vm": EXAMPLE_VM,
    "created": "2026-08-22T09:30:00.000000Z",
    "on_violation": "skip",
    "start": 0,
    "records": 16000000,
    "writes": 16000000,
    "violations": 2550,
    "page_granular_violations": 17607,
    "by_object": {"modprobe_path": {"violations": 12, "collateral": 12, "first_index": 4711, "subpages": 3}},
    "mmio": 3021,
    "unenforced_writes": 0,
    "exits": {"ept_violation": 14884, "ept_misconfiguration": 0, "spp_miss": 17, "spp_misconfiguration": 0},
    "exit_records_dropped": 0,
    "stopped_at": None,
    "untranslated": 0,
    "stale_translations": 1,
    "operations": {"hypercall": 1, "mov_cr3": 0, "invlpg": 0},
    "ignored_columns": ["flags"],
    "format": "arrow",
    "addresses": None,
    "sizes": None,
    "skipped": None,
    "notes": [],
    "footprint": None,
    "state": "finished",
    "resume_at": None,
    "published": None,
    "rate": None,
    "lag": None,
    "seconds": 0.21,
}
_RESULT = {
    **_SUMMARY,
    "stale_records": [EXAMPLE_STALE],
    "stale_records_dropped": 0,
    "operation_records": [EXAMPLE_OPERATION],
    "operation_records_dropped": 0,
    "untranslated_records": [],
    "exit_records": [EXAMPLE_EXIT],
    "next": f"/v1/vms/{EXAMPLE_VM}/traces/{EXAMPLE_TRACE}/exits?cursor=AQAAAAAAAACf2Pv1",
}


def _no_default(schema: dict[str, Any]) -> None:
    """For what means something else when it is given: generated clients send the defaults that they are told."""
    schema.pop("default", None)


class AccessRecord(Document):
    """One access of the guest. Other members are ignored and named in the result, or carried with `?carry=`."""

    model_config = ConfigDict(extra="allow", json_schema_extra={"maxProperties": MOST_MEMBERS, **examples(_ACCESS)})

    gpa: Hex64 = Field(
        0,
        description="Guest-physical address of the first byte; required, but with `address` `gva` or `flat`.",
        json_schema_extra=_no_default,
    )
    size: int = Field(8, ge=1, le=0xFFFF, description="Bytes accessed.")
    access: Access = Field(
        1,
        description="0 read, 1 write, 2 execute; unless given, what the kind does.",
        json_schema_extra=_no_default,
    )
    vcpu: int = Field(0, ge=0, le=0xFFFF, description="KVM vCPU id.")
    gva: Hex64 = Field(
        0,
        description="Guest-linear address of the first byte, if known; in every record or in none.",
        json_schema_extra=_no_default,
    )
    kind: Kind = Field(
        0,
        description=(
            "0 data, 1 read-modify-write, 2 paging read, 3 paging A/D update, 4 shadow stack. Unless `access` is given "
            "it is what the kind does."
        ),
    )
    linear: Linear = Field(
        1,
        description=(
            "The linear address: 1 `valid`, and its page: 2 `user`, 4 `writable`, 8 `execute-disable`; the sum, or "
            "names with commas between them."
        ),
    )
    source: Source = Field(0, description="0 guest, 1 emulated by KVM, 2 host.")
    insn_len: int = Field(0, ge=0, le=15, description="Bytes of the instruction, 0 if not known.")
    pc: Hex64 = Field(0, description="Address of the instruction, as `gva`.", json_schema_extra=_no_default)
    time: Hex64 = Field(0, description="Nanoseconds, as `gva`.", json_schema_extra=_no_default)
    value: int | Annotated[str, Field(max_length=128)] | None = Field(
        None, description="What was read or written; not looked at."
    )
    op: Annotated[int, Field(ge=0, le=0)] | Annotated[str, Field(pattern="^((0x)?0|access)$")] = Field(
        0, description="0: an access."
    )
    arg: str | None = Field(None, max_length=0, description="An access has none.")
    address_space: Hex64 | None = Field(
        None, description="The vCPU's CR3, under which the translation of `gva` is cached. Null: as it was."
    )


class TraceBody(Document):
    """A trace as one JSON document."""

    model_config = ConfigDict(json_schema_extra=examples({"accesses": [_ACCESS, _SECOND]}))

    accesses: list[AccessRecord | OperationRecord] = Field(
        description="The records, in the order in which they happened."
    )


class ObjectHits(Document):
    """What happened to one protected object."""

    violations: int = Field(description="Accesses refused that touch one of its protected sub-pages.")
    collateral: int = Field(description="Those among them that touch none of its own bytes, only its neighbours.")
    first_index: int | None = Field(description="The first such access; null if there was none.")
    subpages: int = Field(description="How many sub-pages it covers.")


class ExitCounts(Document):
    """VM exits by kind, internal ones included."""

    model_config = ConfigDict(extra="allow")

    ept_violation: int = Field(description="Exits with reason 48.")
    ept_misconfiguration: int = Field(description="Exits with reason 49.")
    spp_miss: int = Field(description="Exits with reason 66, bit 11 of the qualification set.")
    spp_misconfiguration: int = Field(description="Exits with reason 66, bit 11 of the qualification clear.")


class TraceSummary(TranslationTotals, BodyTotals, PublicationTotals):
    """The totals of a replay."""

    model_config = ConfigDict(json_schema_extra=examples(_SUMMARY))

    id: str = Field(description="Id of the trace.")
    vm: str = Field(description="Id of the VM.")
    created: str = Field(description="RFC 3339, UTC.", json_schema_extra={"format": "date-time"})
    on_violation: str = Field(description="What became of refused writes.")
    start: int = Field(description="Records before this one were skipped.")
    records: int = Field(description="Accesses replayed, those before `start` not counted.")
    writes: int = Field(description="Writes among them.")
    violations: int = Field(description="Accesses that sub-page protection refused.")
    page_granular_violations: int = Field(
        description="Writes that plain EPT write protection of the same pages would have refused."
    )
    by_object: dict[str, ObjectHits] = Field(description="By the name of the object.")
    mmio: int = Field(description="Accesses outside of every memory slot.")
    unenforced_writes: int = Field(
        description=(
            "Writes that went through though a bitmap refuses them: in `kvm-2019` those to large pages and those that "
            "KVM emulates."
        )
    )
    exits: ExitCounts = Field(description="By kind.")
    exit_records_dropped: int = Field(description="Exit records beyond `max_exit_records`; totals count them.")
    stopped_at: int | None = Field(
        description="With `on_violation=stop`, or the answer `stop`: the access that ended it; resume with `start`."
    )
    untranslated: int = Field(
        description="With `address=gva`: records whose address leads nowhere. They are no accesses, beside `records`."
    )
    ignored_columns: list[str] = Field(description="Columns that say nothing here.")
    notes: list[str] = Field(
        description=f"What looks like a mistake, in words: accesses outside of every slot from {MMIO_PERCENT} % on."
    )
    footprint: str | None = Field(None, description="Id of the footprint that was collected beside it.")
    seconds: float = Field(description="From the start of the replay to the publication of its effects.")


class UntranslatedRecord(Document):
    """A record whose address the guest's page tables do not translate."""

    index: int = Field(description="Position of the record in the trace.")
    gva: Hex64 = Field(description="The first address of it that leads nowhere.")
    level: int = Field(description="Level of the entry that says so; 0 where the address is not canonical.")


class TraceResult(TraceSummary, TranslationRecords):
    """The totals of a replay and its first exit records."""

    model_config = ConfigDict(json_schema_extra=examples(_RESULT))

    untranslated_records: list[UntranslatedRecord] = Field(description="The first 100 of them.")
    exit_records: list[ExitRecord] = Field(description="The first of them; the rest by `exits`.")
    next: str | None = Field(description="URL of the exit records after these; null if there are none.")


class TracePage(Document):
    """A page of traces, oldest first."""

    model_config = ConfigDict(json_schema_extra=examples({"traces": [_SUMMARY], "next": None}))

    traces: list[TraceSummary] = Field(description="Oldest first.")
    next: str | None = Field(description="URL of the next page; null on the last.")


def _summary(vm_id: str, trace: Trace) -> dict[str, Any]:
    result = trace.result
    hits = {
        name: {
            "violations": hit.violations,
            "collateral": hit.collateral,
            "first_index": hit.first_index,
            "subpages": hit.subpages,
        }
        for name, hit in result.by_object.items()
    }
    return {
        "id": trace.id,
        "vm": vm_id,
        "created": stamp(trace.created),
        "on_violation": trace.request.on_violation,
        "start": trace.request.start,
        "records": result.records,
        "writes": result.writes,
        "violations": result.violations,
        "page_granular_violations": result.page_granular_violations,
        "by_object": hits,
        "mmio": result.mmio,
        "unenforced_writes": result.unenforced_writes,
        "exits": dict(result.exits),
        "exit_records_dropped": result.exit_records_dropped,
        "stopped_at": None if result.stopped_at is None else int(result.stopped_at),
        **translation_totals(result),
        "untranslated": result.untranslated,
        "ignored_columns": list(trace.ignored_columns),
        **body_totals(trace.request.format, result),
        "notes": notes_of(result),
        "footprint": trace.footprint,
        **publication_totals(trace),
        "seconds": round(trace.seconds, 6),
    }


def result_document(vm_id: str, trace: Trace, inlined: int, symbols: Symbols | None = None) -> dict[str, Any]:
    """The totals and the first ``inlined`` exit records of a trace, with the names that ``symbols`` know."""
    exits = trace.result.exit_columns
    follow = exits_url(vm_id, trace.id, inlined, None) if len(exits) > inlined else None
    nowhere = [
        {"index": item.index, "gva": hex(item.gva), "level": item.level} for item in trace.result.untranslated_records
    ]
    listed = {
        **translation_records(trace.result),
        "untranslated_records": nowhere,
        "exit_records": exit_rows(exits[:inlined], symbols),
    }
    return {**_summary(vm_id, trace), **listed, "next": follow}


async def _rendered(entry: Entry, trace: Trace, settings: Settings) -> dict[str, Any]:
    symbols = await symbols_of(entry.machine) if len(trace.result.exit_columns) else None
    small = len(trace.result.exit_columns) <= INLINE_RECORDS and symbols is None
    return await maybe_in_thread(small, result_document, entry.id, trace, settings.exit_page_size, symbols)


async def _created(entry: Entry, trace: Trace, settings: Settings, extra: dict[str, str] | None = None) -> Response:
    location = {"Location": f"/v1/vms/{entry.id}/traces/{trace.id}"}
    return json_response(await _rendered(entry, trace, settings), status=201, extra=location | (extra or {}))


def check_beside(wanted: TraceRequest, *, published: bool) -> None:
    """Refuse a footprint beside a replay that has none: of what depends on what was before. Raises InvalidDocument."""
    if wanted.footprint is None:
        if wanted.footprint_by is not None:
            rule = "goes with footprint=spans or footprint=bytes"
            raise InvalidDocument(rule, field="footprint_by", value=wanted.footprint_by)
        return
    rule = "must be left out: a footprint is of a whole trace, and this replay "
    if wanted.on_violation in (ASK, "stop"):
        raise InvalidDocument(f"{rule}may end before it does (on_violation)", field="footprint", value=wanted.footprint)
    if wanted.start:
        raise InvalidDocument(f"{rule}begins behind its beginning (start)", field="footprint", value=wanted.footprint)
    if published:
        raise InvalidDocument(f"{rule}is many commits (publish_every)", field="footprint", value=wanted.footprint)
    static(wanted.address)
    try:
        by_of(wanted.footprint_by)
    except (InvalidDocument, InvalidValue) as error:
        error.field = "footprint_by"
        raise


def static(address: str) -> None:
    """Refuse addresses that a guest's page tables translate. Raises InvalidDocument."""
    if address == "gva":
        rule = (
            "must be gpa or flat for a footprint: addresses of a guest go through its page tables, which change while "
            "it runs. Replay the trace without a footprint"
        )
        raise InvalidDocument(rule, field="address", value=address)


def carried_columns(carry: str | None) -> tuple[str, ...]:
    """The names in ``carry``. Raises InvalidDocument."""
    names = tuple(name.strip() for name in carry.split(",")) if carry else ()
    for name in names:
        if not name:
            raise InvalidDocument("must be column names with commas between them", field="carry", value=carry)
        if name in EXIT_FIELDS:
            raise InvalidDocument("must not name a member that exit records have anyway", field="carry", value=name)
    return names


@routes.post(
    "",
    operation_id="createTrace",
    summary="Replay a trace",
    description=(
        "One transaction: its effects are published together when it ends, and whatever goes wrong leaves the VM as it "
        "was. With `on_violation=ask` it pauses at every refusal, commits what came before, and asks the attached "
        "introspection tools; problems then say with `resume_at` what is committed. "
        "Arrow streams, NDJSON and packed records are replayed while they arrive. Columns: `gpa` u64 (required), "
        "`size` u16 (8), `access` u8 (1), `vcpu` u16 (0), `gva` u64, `kind` u8 (0), `linear` u8 (1: valid), `source` "
        "u8 (0: guest), `insn_len` u8 (0: not known); packed records have only the first four. On VMs with "
        "`translation_cache: model` also `op` u8 (0: access; 1 hypercall, 2 mov-cr3, 3 invlpg), `arg` binary (of an "
        "operation) and `address_space` u64 (the vCPU's CR3; with `address=gva` on every VM): operations happen "
        "between the accesses, and each access by a translation that should have been flushed is counted and explained "
        "(docs/tlb-flush.md).\n\n"
        "With `Prefer: respond-async` the body is received whole and the replay becomes a job (202), which waits for "
        "its turn and for its VM however long that takes. With `Prefer: wait=N` it becomes one unless it has ended "
        "after N seconds; until then a failure is answered as without it. "
        "A replay that asks is answered when it has ended, whatever is preferred.\n\n"
        "With `publish_every` it is many transactions instead: what has come is committed so often, and the trace is "
        "listed from the first time on, with `state` and `resume_at` (docs/traces.md)."
    ),
    status_code=201,
    openapi_extra={
        "parameters": [PREFER],
        "requestBody": {
            "required": True,
            "content": {
                JSON: {"schema": {"$ref": "#/components/schemas/TraceBody"}},
                NDJSON: {**BINARY, "example": '{"gpa": "0x2a5c6a0", "size": 8}\n{"gpa": 4096}\n'},
                ARROW: BINARY,
                PARQUET: BINARY,
                TEXT: {**BINARY, "example": " S 004a9000,8\n"},
                CSV: BINARY,
                OCTETS: BINARY,
            },
        },
    },
    responses=documented(
        {
            201: {
                "model": TraceResult,
                "description": "Replayed.",
                "headers": headers("Location", "Preference-Applied"),
            },
            **ACCEPTED,
        },
        *CHANGE,
        "invalid-trace",
        "not-yet-supported",
    ),
)
async def create_trace(
    request: Request,
    vm: VmId,
    on_violation: Annotated[
        OnViolation,
        Query(description="What becomes of a write that is refused; `ask`: what an introspection tool says."),
    ] = "skip",
    start: Annotated[
        int, Query(ge=0, lt=1 << 63, description="Skip the records before this one; indices stay absolute.")
    ] = 0,
    include: Annotated[
        Include, Query(description="Which exits become exit records; `all` adds internal ones.")
    ] = "violations",
    record: Annotated[
        RecordFormat | None,
        Query(description="Layout of packed records; with `application/octet-stream` only."),
    ] = None,
    format: Annotated[ToolFormatName | None, Query(description=FORMAT_ABOUT)] = None,
    publish_every: PublishEvery = None,
    skip_unknown: Annotated[bool, Query(description=SKIP_ABOUT)] = False,
    columns: Annotated[str | None, Query(max_length=2000, description=COLUMNS_ABOUT)] = None,
    carry: Annotated[
        str | None, Query(description="Columns to copy into exit records, with commas between them.")
    ] = None,
    max_exit_records: Annotated[int | None, Query(ge=0, description="Exit records to keep; totals stay exact.")] = None,
    address: Annotated[
        Address,
        Query(
            description=(
                "What the addresses are. `gva`: of the guest; each record goes through its page tables in guest "
                "memory, under the vCPU's CR3 or the record's `address_space`. `flat`: of a process, taken as `gpa`. "
                "Both are in the column `gva`, or in `gpa` where there is no `gva`."
            )
        ),
    ] = "gpa",
    footprint: Annotated[
        Literal["spans", "bytes"] | None,
        Query(description="Collect a footprint beside the replay: of runs of sub-pages, or of bytes."),
    ] = None,
    footprint_by: Annotated[
        str | None, Query(max_length=100, description="As `by` of `createFootprint`; with `footprint`.")
    ] = None,
) -> Response:
    entry = find(request, vm)
    settings = settings_of(request)
    media = content_type(request, tuple(FORMATS))
    kept = settings.max_exit_records if max_exit_records is None else max_exit_records
    if kept > settings.max_exit_records:
        raise InvalidDocument(f"must be at most {settings.max_exit_records}", field="max_exit_records", value=kept)
    goes_on = "start" in request.query_params
    carried, kind = carried_columns(carry), format_of(media, format)
    wanted = TraceRequest(
        *(kind, record, carried, on_violation, include, start, kept, goes_on),
        address=address,
        skip_unknown=skip_unknown,
        columns=columns,
        longest=settings.max_body_bytes,
        footprint=footprint,
        footprint_by=footprint_by,
    )
    check_beside(wanted, published=publish_every is not None)
    access, caller = access_of(request), principal_of(request)
    if publish_every is not None:
        state = request.app.state
        trace = await publish_body(
            entry,
            wanted,
            interval_of(publish_every, wanted, "idempotency-key" in request.headers),
            request,
            replaying_of(request),
            settings,
            metrics_of(request),
            hooks_of(request),
            lambda: access.check(caller),
            lambda: bool(state.draining),
            asker_of(request, entry, traced=True, landed=True) if on_violation == ASK else None,
        )
        return await _created(entry, await entry.traces.get(trace.id), settings)
    asker = asker_of(request, entry, traced=True) if on_violation == ASK else None
    wishes = wanted_async(request) if asker is None else None
    if wishes is not None:
        outcome = await done_as_job(request, entry.id, wanted, wishes)
        if isinstance(outcome, Response):
            return outcome
        return await _created(entry, await entry.traces.get(outcome[0]), settings, outcome[1])

    async def tell(trace: Trace) -> None:
        will_answer(request, await _created(entry, trace, settings))

    keyed = tell if "idempotency-key" in request.headers else None
    trace = await replay_body(
        entry,
        wanted,
        request,
        replaying_of(request),
        settings,
        metrics_of(request),
        hooks_of(request),
        lambda: access.check(caller),
        footprints_of(request),
        keyed,
        asker,
    )
    return await _created(entry, trace, settings)


@routes.get(
    "",
    operation_id="listTraces",
    summary="List traces",
    description="Those whose results are still kept, oldest first.",
    responses=documented({200: {"model": TracePage, "description": "One page."}}, "not-found", "invalid-value"),
)
async def list_traces(request: Request, vm: VmId, limit: Limit = None, cursor: Cursor = None) -> Response:
    entry = find(request, vm)
    settings = settings_of(request)
    size = cursors.page_limit(limit, settings.page_size, settings.max_page_size)
    after = cursors.decode("traces", cursor) if cursor is not None else 0
    traces, following = entry.traces.page(after, size)
    path = f"/v1/vms/{entry.id}/traces"
    follow = cursors.next_url(path, "traces", following, limit) if following is not None else None
    return json_response({"traces": [_summary(entry.id, trace) for trace in traces], "next": follow})


@routes.get(
    "/{trace}",
    operation_id="getTrace",
    summary="Read a trace result",
    responses=documented(
        tagged_reply(TraceResult, "As the replay returned it."),
        "not-found",
    ),
)
async def get_trace(request: Request, vm: VmId, trace: TraceId) -> Response:
    entry = find(request, vm)
    return tagged(request, await _rendered(entry, await entry.traces.get(trace), settings_of(request)))
