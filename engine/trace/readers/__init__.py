"""Readers: one per body format, all giving the same chunks.

A reader checks what is lost by converting to columns: values that do not fit, wrong types, nulls, missing and reserved
columns, bodies that end too early. Whether an access makes sense (its size, its vCPU) is for the replay to say.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from engine.errors import InvalidValue
from engine.trace.columns import check_carry
from engine.trace.option_names import FORMATS as BODIES
from engine.trace.option_names import TOOL_FORMATS
from engine.trace.readers.arrow import ArrowReader
from engine.trace.readers.base import Source, TraceReader
from engine.trace.readers.budget import DEFAULT_MEMORY, Budget
from engine.trace.readers.formats import FORMATS, recognised
from engine.trace.readers.hints import HintingReader
from engine.trace.readers.json_bodies import JsonReader, NdjsonReader
from engine.trace.readers.no_traces import unnamed_table, what_else
from engine.trace.readers.packed import RECORD_BYTES, PackedReader
from engine.trace.readers.tools import ToolReader

__all__ = [
    "DEFAULT_MEMORY",
    "FORMATS",
    "RECORD_BYTES",
    "Budget",
    "Source",
    "TraceReader",
    "open_trace",
    "recognised",
    "row_count",
    "unnamed_table",
    "what_else",
]


def _parquet(source: Source, carry: Sequence[str], budget: Budget, late: bool, ahead: bool) -> TraceReader:
    from engine.trace.readers.parquet import ParquetReader  # noqa: PLC0415 - the Arrow library is 33 MB

    del ahead  # all of it is there
    return ParquetReader(source, carry, budget, late=late)


def _arrow(source: Source, carry: Sequence[str], budget: Budget, late: bool, ahead: bool) -> TraceReader:
    del late  # a batch is there whole
    return ArrowReader(source, carry, budget, ahead=ahead)


def row_count(source: Any, memory: int | Budget) -> int:
    """How many records a Parquet file says it has; see ``parquet.row_count``."""
    from engine.trace.readers import parquet  # noqa: PLC0415 - the same

    return parquet.row_count(source, memory)


_ROWS: Mapping[str, Callable[[Source, Sequence[str]], TraceReader]] = {"json": JsonReader, "ndjson": NdjsonReader}
_COLUMNS: Mapping[str, Callable[[Source, Sequence[str], Budget, bool, bool], TraceReader]] = {
    "arrow": _arrow,
    "parquet": _parquet,
}


def open_trace(
    format: str,
    source: Source,
    *,
    record: str | None = None,
    carry: Sequence[str] = (),
    memory: int | Budget = DEFAULT_MEMORY,
    skip_unknown: bool = False,
    columns: str | None = None,
    longest: int = 0,
    late: bool = False,
    ahead: bool = False,
) -> TraceReader:
    """A reader of ``source``, which is read while the reader is iterated.

    ``format`` is one of ``option_names.FORMATS`` or ``TOOL_FORMATS``; ``record`` (``gpa8`` or ``record16``) goes with
    ``packed`` and with nothing else. ``source`` needs ``read(n)``, which may return less than asked for and returns
    nothing only at the end; its ``readinto`` is used if it has one; parquet also needs ``seek`` and ``tell``. ``carry``
    names other columns to hand through. ``memory`` bounds what a columnar body may take while it is read, in bytes or
    as a budget; others take a few megabytes. With ``late`` a chunk may have its linear addresses undecoded
    (``TraceChunk.late``); with ``ahead`` more of a body may be read than the chunk needs that is given.

    Of bodies of tools: ``skip_unknown`` passes over lines that are of no form that the format has; ``columns``, as
    ``gpa=addr,size=len``, says which columns of a table are meant; ``longest`` bounds what is in one that is a
    compressed file, in bytes, and 0 leaves its ratio as the only bound.

    Raises ``InvalidValue`` for an unknown format or record format and ``TraceError`` for a name that
    cannot be carried; iteration raises ``TraceError`` with the absolute record index.
    """
    if format not in (*BODIES, *TOOL_FORMATS):
        raise InvalidValue(f"must be one of {', '.join((*BODIES, *TOOL_FORMATS))}", field="format", value=format)
    names = check_carry(carry)
    if format == "packed":
        return PackedReader(source, record, names)
    if record is not None:
        raise InvalidValue("must be left out: only packed bodies have a record format", field="record", value=record)
    if format in TOOL_FORMATS:
        return ToolReader(format, source, names, skip_unknown=skip_unknown, columns=columns, longest=longest)
    if columns is not None:
        raise InvalidValue("must be left out: only csv has columns to name", field="columns", value=columns)
    if format in _ROWS:
        return HintingReader(source, lambda seen: _ROWS[format](seen, names))
    return HintingReader(source, lambda seen: _COLUMNS[format](seen, names, Budget.of(memory), late, ahead))
