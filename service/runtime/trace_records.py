"""Results of replays as records of a store, both ways."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, astuple, replace
from datetime import datetime
from typing import Any

from engine.trace.object_hits import ObjectIndex
from engine.trace.results import ExitColumns, ObjectHits, TraceResult, Untranslated, join
from engine.trace.taken import SkippedLine, Taken
from service.runtime import exit_parts
from service.runtime.traces import NO_RECORDS, PART, Publication, Trace, TraceRequest
from service.runtime.translation_records import translations_of
from service.storage.columns import pack, unpack
from service.storage.records import TraceRecord

_TOTALS = (
    "records",
    "writes",
    "violations",
    "page_granular_violations",
    "mmio",
    "unenforced_writes",
    "exit_records_dropped",
)


def record_of(trace: Trace) -> TraceRecord:
    """``trace`` with all its exit records. Takes a second for ten million of them: call it in a thread."""
    exits, first = trace.result.exit_columns, 0 if trace.publication is None else trace.publication.first
    least = 1 if first == 0 else 0  # a trace has a part, be it empty
    return TraceRecord(
        id=trace.id,
        sequence=trace.sequence,
        created=trace.created.isoformat(),
        exit_records=trace.exit_records,
        head=json.dumps(_head(trace)),
        object_index=pack(exits.object_index._asdict()),
        parts=[pack(exit_parts.stored(exits[at : at + PART])) for at in range(0, max(len(exits), least), PART)],
        first_part=first // PART,
        goes_on=trace.publication is not None and trace.publication.goes_on,
    )


def trace_of(record: TraceRecord) -> Trace:
    """The trace without its exit records, of which only the number is known (see ``columns_of``)."""
    head = json.loads(record.head)
    result = head["result"]
    return Trace(
        id=record.id,
        sequence=record.sequence,
        request=TraceRequest(**{**head["request"], "carry": tuple(head["request"]["carry"])}),
        result=TraceResult(
            **{name: result[name] for name in _TOTALS},
            by_object={name: ObjectHits(*hits) for name, hits in result["by_object"]},
            exits=result["exits"],
            stopped_at=result["stopped_at"],
            exit_columns=NO_RECORDS,
            translations=translations_of(result.get("translations")),
            taken=_taken(result.get("taken")),
            untranslated=result.get("untranslated", 0),
            untranslated_records=tuple(Untranslated(*item) for item in result.get("untranslated_records", ())),
        ),
        ignored_columns=tuple(head["ignored_columns"]),
        created=datetime.fromisoformat(record.created),
        seconds=head["seconds"],
        exit_records=record.exit_records,
        publication=_publication(head.get("publication")),
        footprint=head.get("footprint"),
    )


def columns_of(record: TraceRecord, parts: Sequence[bytes]) -> ExitColumns:
    """The exit records of a trace."""
    head = json.loads(record.head)
    found = [exit_parts.read(unpack(part), head["has_gva"]) for part in parts]
    index = ObjectIndex(**unpack(record.object_index))
    return replace(join(found, found[0]), object_index=index, object_names=tuple(head["object_names"]))


def _publication(stored: Mapping[str, Any] | None) -> Publication | None:
    """How far a trace was published. Whoever reads it from a store is not the one that publishes it."""
    if stored is None:
        return None
    at = datetime.fromisoformat(stored["at"])
    return Publication(stored["state"], stored["resume_at"], at, stored["rate"]).without_more


def _taken(stored: Sequence[Any] | None) -> Taken | None:
    """What a body was taken for; traces of other bodies, and older ones, have nothing of it."""
    if stored is None:
        return None
    found = Taken(*stored)
    return found._replace(first=tuple(SkippedLine(*line) for line in found.first))


def _head(trace: Trace) -> dict[str, Any]:
    result, publication = trace.result, trace.publication
    return {
        "publication": None
        if publication is None
        else {
            "state": publication.state,
            "resume_at": int(publication.resume_at),
            "at": publication.at.isoformat(),
            "rate": publication.rate,
        },
        "request": asdict(trace.request),
        "footprint": trace.footprint,
        "result": {
            **{name: int(getattr(result, name)) for name in _TOTALS},
            "by_object": [
                [name, [hit.violations, hit.collateral, hit.first_index, hit.subpages]]
                for name, hit in result.by_object.items()
            ],
            "exits": {name: int(count) for name, count in result.exits.items()},
            "stopped_at": None if result.stopped_at is None else int(result.stopped_at),
            "translations": asdict(result.translations),
            "taken": result.taken,
            "untranslated": int(result.untranslated),
            "untranslated_records": [astuple(item) for item in result.untranslated_records],
        },
        "ignored_columns": list(trace.ignored_columns),
        "seconds": trace.seconds,
        "has_gva": result.exit_columns.has_gva,
        "object_names": list(result.exit_columns.object_names),
    }
