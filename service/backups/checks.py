"""What a backup says, looked at before anything of it is written: it may come from anywhere, with checksums that are
right. Each check raises BadBackup with a sentence that names the member."""

from __future__ import annotations

import io
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Annotated, Any, Literal, TypeVar

import numpy as np
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from engine.arch.access import ACCESS_NAMES
from engine.arch.sppt import SUBPAGE_SHIFT
from engine.errors import EngineError
from engine.kvm.resolutions import RESOLUTION_NAMES
from engine.machine import VirtualMachine
from engine.machine.durable import head_today
from engine.machine.summary import summary_from_head
from engine.trace.object_hits import index_of
from engine.trace.results import EXIT_COLUMNS, ExitColumns
from service.runtime.events import KINDS
from service.runtime.footprint_documents import about
from service.runtime.trace_records import columns_of, trace_of
from service.runtime.traces import PART
from service.security.tokens import TENANT
from service.storage.columns import sizes
from service.storage.records import Block, EventRecord, FootprintRecord, TraceRecord, VmRecord

BLOCK_BYTES = 4096
# Of the columns of one section before compression: sixteen times what a full one of exit records has.
MAX_COLUMN_BYTES = 256 << 20
# Of the file of a footprint, and memory while it is looked at.
MAX_FOOTPRINT_BYTES = 4 << 30
# Sub-pages of 52 address bits.
_TOP = 1 << 52

T = TypeVar("T", bound=BaseModel)


class BadBackup(Exception):
    """The file is no backup, is damaged, or was written by a later release."""


def _moment(text: str) -> str:
    if datetime.fromisoformat(text).tzinfo is None:
        raise ValueError("a time has an offset from UTC")
    return text


def _object(text: str) -> str:
    try:
        document = json.loads(text)
    except RecursionError:
        raise ValueError("is nested too deeply") from None
    if not isinstance(document, dict):
        raise ValueError("must be a JSON object")
    return text


_STAMP = r"\A\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z\z"
_Count = Annotated[int, Field(ge=0, lt=1 << 62)]
_Moment = Annotated[str, Field(max_length=40), AfterValidator(_moment)]
_Json = Annotated[str, AfterValidator(_object)]
_TraceId = Annotated[str, Field(pattern=r"\Atr_[0-9a-f]{16}\z")]


class _Section(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")


class MachineSection(_Section):
    """``V``."""

    number: Annotated[int, Field(ge=1, lt=1 << 62)]
    id: Annotated[str, Field(pattern=r"\Avm_[0-9a-f]{16}\z")]
    created: _Moment
    revision: _Count
    head: _Json
    tenant: Annotated[str, Field(pattern=rf"\A{TENANT}\z")] = "default"
    next_event: Annotated[int, Field(ge=1, lt=1 << 62)] = 1


class TraceSection(_Section):
    """``T``."""

    id: _TraceId
    sequence: _Count
    created: _Moment
    exit_records: _Count
    head: _Json


class EventRow(_Section):
    """One of ``L``."""

    first: Annotated[int, Field(ge=1, lt=1 << 62)]
    count: Annotated[int, Field(ge=1, lt=1 << 40)]
    created: Annotated[str, Field(pattern=_STAMP), AfterValidator(_moment)]
    kind: Literal[tuple(KINDS)]  # type: ignore[valid-type]
    body: _Json
    trace: _TraceId | None = None


class FootprintSection(_Section):
    """``F``."""

    id: Annotated[str, Field(pattern=r"\Afp_[0-9a-f]{16}\z")]
    tenant: Annotated[str, Field(pattern=rf"\A{TENANT}\z")]
    vm: Annotated[str, Field(pattern=r"\A(vm_[0-9a-f]{16})?\z")]
    created: Annotated[str, Field(pattern=_STAMP), AfterValidator(_moment)]
    size: Annotated[int, Field(ge=0, le=MAX_FOOTPRINT_BYTES)]
    head: _Json


class EndSection(_Section):
    """``E``."""

    machines: _Count
    footprints: _Count = 0


_events: TypeAdapter[list[EventRow]] = TypeAdapter(list[EventRow])


def section_of(model: type[T], kind: str, data: bytes) -> T:
    """A section that is one JSON object."""
    try:
        return model.model_validate_json(data)
    except ValidationError as error:
        raise _bad(kind, error) from None


def event_rows(data: bytes) -> list[EventRecord]:
    """A section of rows of an event log."""
    try:
        return [EventRecord(**row.model_dump()) for row in _events.validate_json(data)]
    except ValidationError as error:
        raise _bad("L", error) from None


def _bad(kind: str, error: ValidationError) -> BadBackup:
    fault = error.errors(include_url=False)[0]
    place = ".".join(map(str, fault["loc"])) or "the section"
    return BadBackup(f"the backup is damaged: in a section {kind}, {place}: {fault['msg']}")


def columns_are_bounded(kind: str, data: bytes) -> None:
    """Look at what a section of columns claims before it is unpacked."""
    try:
        claimed = sizes(data)
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise BadBackup(f"the backup is damaged: the columns of a section {kind}: {error}") from None
    if sum(claimed) > MAX_COLUMN_BYTES:
        raise BadBackup(f"the backup is damaged: a section {kind} claims {sum(claimed)} bytes of columns")


def machine_of(record: VmRecord, blocks: Sequence[Block]) -> VirtualMachine:
    """The machine, which reads back as what it was made of, in the form of today."""
    numbers = {block for _, block, _ in blocks}
    if len(numbers) != len(blocks):
        raise BadBackup(f"machine {record.id} of the backup has a block twice")
    for kind, block, data in blocks:
        if kind == "free" or len(data) != BLOCK_BYTES:
            raise BadBackup(f"machine {record.id} of the backup: block {block} is none that a machine has")
    head = json.loads(record.head)
    frames = head.get("frames")
    # Blocks that are free are not among them; a machine keeps at most that many.
    if type(frames) is not int or not len(blocks) <= frames <= 2 * len(blocks) + (1 << 20):
        raise BadBackup(f"machine {record.id} of the backup: frames: {frames!r} do not fit {len(blocks)} blocks")
    if any(not 0 <= block < frames for block in numbers):
        raise BadBackup(f"machine {record.id} of the backup has a block beyond its frames")
    try:
        machine = VirtualMachine.restore(head, {(kind, block): data for kind, block, data in blocks})
        summary_from_head(head)
        given, made = head_today(head), json.loads(json.dumps(machine.head()))
    except Exception as error:  # whatever a hostile head makes of the engine, the file is at fault
        raise BadBackup(f"machine {record.id} of the backup cannot be read: {error!s:.300}") from error
    if (place := _differs(given, made, "head")) is not None:
        raise BadBackup(f"machine {record.id} of the backup cannot be read: {place} is not what a machine has")
    return machine


def _differs(given: Any, made: Any, place: str) -> str | None:
    """Where what was given is not what was made of it; members that an earlier release did not write may be missing."""
    if isinstance(given, dict) and isinstance(made, dict):
        for name, value in given.items():
            if name not in made:
                return f"{place}.{name:.40}"
            if (found := _differs(value, made[name], f"{place}.{name:.40}")) is not None:
                return found
        return None
    if isinstance(given, list) and isinstance(made, list) and len(given) == len(made):
        pairs = enumerate(zip(given, made, strict=True))
        return next((found for at, pair in pairs if (found := _differs(*pair, f"{place}[{at}]")) is not None), None)
    return None if type(given) is type(made) and given == made else place


def check_events(record: VmRecord, events: Sequence[EventRecord]) -> None:
    """Ids follow one another and end before the next one that the machine gives."""
    free = 1
    for event in events:
        if event.first < free:
            raise BadBackup(f"machine {record.id} of the backup: event {event.first} comes after event {free - 1}")
        free = event.first + event.count
    if free > max(record.next_event, 1):
        raise BadBackup(f"machine {record.id} of the backup: event {free - 1} is beyond next_event {record.next_event}")


def check_trace(trace: TraceRecord) -> None:
    """The result of a replay can be read as the service reads it, all of its exit records too."""
    try:
        trace_of(trace)
        count = 0
        for at, part in enumerate(trace.parts):
            exits = columns_of(trace, [part])
            if at == 0:
                _check_index(exits)
            _check_columns(exits, last=at == len(trace.parts) - 1)
            count += len(exits)
        if count != trace.exit_records or not trace.parts:
            raise ValueError(f"exit_records says {trace.exit_records}, there are {count}")
    except Exception as error:  # as above
        raise BadBackup(f"result {trace.id} of the backup cannot be read: {error!s:.300}") from error


@dataclass(frozen=True, slots=True)
class LeftOut:
    """A footprint whose file this release cannot read, and why. ``vm`` as in the record."""

    id: str
    vm: str
    why: str


def check_footprint(record: FootprintRecord) -> FootprintRecord | LeftOut:
    """The footprint with the head of today, if its file is one and is what the record says.

    A tenant chooses what its footprints are; one that cannot be read is no reason to lose the machines of others.
    """
    from engine.footprint import stored  # noqa: PLC0415 - the Arrow library is 33 MB

    if sum(map(len, record.parts)) != record.size:
        raise BadBackup(f"footprint {record.id} of the backup is damaged: its file has not {record.size} bytes")
    try:
        found = about(stored.read(io.BytesIO(b"".join(record.parts)), MAX_FOOTPRINT_BYTES))
    except EngineError as error:
        return LeftOut(record.id, record.vm, f"{error!s:.300}")
    head = json.dumps(found)
    if (place := heads_differ(record.head, head)) is not None:
        raise BadBackup(f"footprint {record.id} of the backup is damaged: its {place} is not that of its file")
    return replace(record, head=head)


def heads_differ(given: str, made: str) -> str | None:
    """Where what a footprint says of itself is not what another one does, which may say more."""
    return _differs(json.loads(given), json.loads(made), "head")


def _check_columns(exits: ExitColumns, *, last: bool) -> None:
    wanted: Mapping[str, str] = {name: dtype for name, dtype, _ in EXIT_COLUMNS}
    if set(exits.columns) != set(wanted) or exits.record_gpa.dtype != np.uint64:
        raise ValueError("the columns are not those of exit records")
    for name, column in {**exits.columns, **exits.carry}.items():
        if len(column) != len(exits) or column.ndim != 1 or column.dtype != wanted.get(name, column.dtype):
            raise ValueError(f"column {name} is not one of {len(exits)} exit records")
    if len(exits) > PART or (not last and len(exits) < PART):
        raise ValueError(f"a part of {len(exits)} exit records")
    _check_names("access", exits, ACCESS_NAMES)
    _check_names("resolution", exits, RESOLUTION_NAMES)


def _check_names(column: str, exits: ExitColumns, names: Collection[str]) -> None:
    if len(exits) and int(exits.columns[column].max()) >= len(names):
        raise ValueError(f"column {column} has a number without a name")


def _check_index(exits: ExitColumns) -> None:
    """The tables that name objects are those of their ranges: kernels follow them without looking."""
    ranges = exits.object_index.ranges
    if ranges.dtype != np.int64 or ranges.ndim != 2 or ranges.shape[1] not in (3, 5):
        raise ValueError("ranges of objects are five numbers each, or three of a release before this one")
    if ranges.shape[1] == 3:  # every object was rounded to sub-pages
        ranges = np.column_stack([ranges, ranges[:, 0] >> SUBPAGE_SHIFT, (ranges[:, 1] - 1) >> SUBPAGE_SHIFT])
    first, end, name, low, high = ranges.T
    inside = (first >= 0) & (first < end) & (end <= _TOP) & (name >= 0) & (name < len(exits.object_names))
    around = (low >= 0) & (low <= first >> SUBPAGE_SHIFT) & (high >= (end - 1) >> SUBPAGE_SHIFT) & (high < _TOP)
    if not (inside & around).all():
        raise ValueError("ranges of objects lie outside of the machine")
    for member, found in zip(("cuts", "offsets", "members"), index_of(ranges)[:3], strict=True):
        if not np.array_equal(getattr(exits.object_index, member), found):
            raise ValueError(f"{member} of the objects are not those of their ranges")
