"""Traces that are published while they come: what is asked for, and what is told of them."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from fastapi import Query
from pydantic import Field

from service.http.wire_types import Document
from service.platform.stamps import stamp
from service.problems import InvalidDocument
from service.runtime.traces import Trace, TraceRequest

_SHORTEST, _LONGEST = 0.05, 60.0
PUBLISHABLE = ("arrow", "ndjson", "packed")

PublishEvery = Annotated[
    str | None,
    Query(
        pattern="^[1-9][0-9]{0,5}(ms|s)$",
        description=(
            "Commit what has come so often, as `200ms` or `1s`, from 50ms to 60s: an Arrow stream, NDJSON or packed "
            "records of any length, each piece of which comes within the time that other bodies have as a whole."
        ),
    ),
]


class PublicationTotals(Document):
    """How far a trace is that is published while it comes."""

    state: Literal["running", "finished", "interrupted"] = Field(
        "finished", description="`interrupted`: its body did not come to its end."
    )
    resume_at: int | None = Field(
        None, description="With `publish_every`: the first record that was not replayed; go on there with `start`."
    )
    published: str | None = Field(
        None, description="The last commit, RFC 3339, UTC; null as above.", json_schema_extra={"format": "date-time"}
    )
    rate: float | None = Field(None, description="Records a second between the last two commits, while it is running.")
    lag: int | None = Field(
        None, description="Records that had come and waited at the last commit, while it is running."
    )


def publication_totals(trace: Trace) -> dict[str, Any]:
    """The members of ``PublicationTotals``."""
    publication = trace.publication
    if publication is None:
        return {"state": "finished", "resume_at": None, "published": None, "rate": None, "lag": None}
    return {
        "state": publication.state,
        "resume_at": int(publication.resume_at),
        "published": stamp(publication.at),
        "rate": None if publication.rate is None else round(publication.rate, 1),
        "lag": publication.lag,
    }


def interval_of(text: str, wanted: TraceRequest, keyed: bool) -> float:
    """``publish_every`` in seconds. Raises InvalidDocument where a trace cannot be published."""
    seconds = int(text[:-2]) / 1000 if text.endswith("ms") else float(text[:-1])
    if not _SHORTEST <= seconds <= _LONGEST:
        raise InvalidDocument("must be from 50ms to 60s", field="publish_every", value=text)
    if wanted.format not in PUBLISHABLE:
        rule = f"goes with bodies that are replayed while they come: {', '.join(PUBLISHABLE)}"
        raise InvalidDocument(rule, field="publish_every", value=text)
    if keyed:
        rule = "does not go with publish_every: what was committed stays, and is not done again by sending it again"
        raise InvalidDocument(rule, field="Idempotency-Key", value="")
    return seconds
