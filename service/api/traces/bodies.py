"""Bodies of traces: media types and formats, and what is told of those that tools wrote."""

from __future__ import annotations

from typing import Any

from pydantic import ConfigDict, Field

from engine.trace.option_names import Format, ToolFormatName
from engine.trace.results import TraceResult
from service.http.negotiation import ARROW, CSV, JSON, NDJSON, OCTETS, PARQUET, TEXT
from service.http.wire_types import Document, examples
from service.problems import InvalidDocument

# What a body is unless ``format`` says it.
FORMATS: dict[str, Format | ToolFormatName] = {
    JSON: "json",
    NDJSON: "ndjson",
    ARROW: "arrow",
    PARQUET: "parquet",
    TEXT: "auto",
    CSV: "auto",
    OCTETS: "packed",
}
# Bodies of these may be of a format that a tool writes.
_OF_TOOLS = (TEXT, CSV, OCTETS)

EXAMPLE_SKIPPED = {
    "lines": 1,
    "reasons": {"message of Valgrind": 1},
    "first": [{"line": 1, "reason": "message of Valgrind", "text": "==4242== Lackey, an example Valgrind tool"}],
}


class SkippedLine(Document):
    """A line that gave no record."""

    line: int = Field(description="Its number, from 1.")
    reason: str = Field(description="Why.")
    text: str = Field(description="Its first 200 characters.")


class SkippedLines(Document):
    """Lines that gave no record and are no fault."""

    model_config = ConfigDict(json_schema_extra=examples(EXAMPLE_SKIPPED))

    lines: int = Field(description="How many.")
    reasons: dict[str, int] = Field(description="How many for each reason.")
    first: list[SkippedLine] = Field(description="The first ten.")


class BodyTotals(Document):
    """What a trace was read from."""

    format: str = Field(description="What the body was taken for.")
    addresses: str | None = Field(
        None,
        description=(
            "Whose addresses a tool has recorded: `guest-physical`, `guest-virtual` or `process-virtual`; null for "
            "bodies of no tool."
        ),
    )
    sizes: str | None = Field(None, description="Of accesses: `as recorded`, or what was assumed; null as above.")
    skipped: SkippedLines | None = Field(None, description="Lines that are no records; null as above.")


def format_of(media: str, format: str | None) -> str:
    """The format of a body of this media type. Raises InvalidDocument."""
    if format is None:
        return FORMATS[media]
    if media not in _OF_TOOLS:
        rule = f"goes with {', '.join(_OF_TOOLS)}: {media} says what the body is"
        raise InvalidDocument(rule, field="format", value=format)
    return format


def body_totals(request_format: str, result: TraceResult) -> dict[str, Any]:
    """The members of ``BodyTotals``."""
    taken = result.taken
    if taken is None:
        return {"format": request_format, "addresses": None, "sizes": None, "skipped": None}
    skipped = {
        "lines": sum(taken.skipped.values()),
        "reasons": dict(taken.skipped),
        "first": [line._asdict() for line in taken.first],
    }
    return {"format": taken.format, "addresses": taken.address, "sizes": taken.sizes, "skipped": skipped}


FORMAT_ABOUT = (
    "What the body is, where a tool wrote it; with `text/plain`, `text/csv` and `application/octet-stream`. `auto`, "
    "the default of text, goes by the content (docs/traces.md)."
)
COLUMNS_ABOUT = (
    "With `csv`: which columns of the table are meant, as `gpa=addr,size=len`; others are known by their own names."
)
SKIP_ABOUT = (
    "Skip and count lines that are none of the format's, as when a program's own output is among them; otherwise the "
    "first is an error."
)
