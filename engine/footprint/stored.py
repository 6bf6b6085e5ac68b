"""A footprint as a Parquet file: columns named as those of a trace, and beside them what it is of.

The same footprint is the same file, byte by byte. Files of others are read with a bound on memory and believed in
nothing.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from itertools import chain
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from engine.arch import access as acc
from engine.errors import EngineError, InvalidValue, LimitExceeded
from engine.footprint import kernels
from engine.footprint.places import (
    BYTES,
    INDEX_BITS,
    KEYS,
    LEVELS,
    MAX_ORIGINS,
    ROW_GROUP,
    SPANS,
    UNITS,
    UNKNOWN,
    By,
    Footprint,
    Origin,
    made,
)
from engine.trace.columns import USABLE
from engine.trace.option_names import ADDRESSES, FORMATS, TOOL_FORMATS
from engine.trace.readers.budget import Budget
from engine.trace.readers.parquet_bounds import DIRECTORY, check_pages, directory, leaves_of, read_footer

SCHEMA = 1  # of the file; a file of a later one is refused
HEAD = b"subpage.footprint"
# Of a trace in the head. A name is at most that of a file.
_DIGEST = re.compile(r"[0-9a-f]{0,64}|tr_[0-9a-f]{16}")
_FORMATS = frozenset({"", *FORMATS, *TOOL_FORMATS})
_MAX_COLUMNS = 16
MAX_NAME = 255
MAX_HEAD_BYTES = 12 << 20  # the rest of MAX_FOOTER_BYTES is for the row groups of MAX_PLACES
_HEAD_BYTES = 24  # of Python for one of the head, at most: empty objects
_ORIGINS_BYTES = 6  # of them stays

_PLACE = {SPANS: ("first_subpage", "subpages"), BYTES: ("gpa", "size")}
_TYPES = {
    "begin": pa.uint64(),
    "extent": pa.uint16(),
    "access": pa.uint8(),
    "kind": pa.uint8(),
    "linear": pa.uint8(),
    "source": pa.uint8(),
    "bucket": pa.uint64(),
    "pc": pa.uint64(),
    "count": pa.uint64(),
    "trace": pa.uint32(),
    "first_index": pa.uint64(),
}
_TRACES = "the traces of a footprint"
_NULLABLE = ("trace", "first_index")
# Memory of a place, of one that is apart by time or by the instruction, and of those that are read at one time: half of
# it is Arrow's.
PLACE_BYTES, APART_BYTES, ROW_BYTES = 40, 56, 256
BATCH = 1 << 16
# What the library raises for a damaged file, beside OSError without a number.
_DAMAGE = (pa.ArrowException, ValueError, TypeError, LookupError, ArithmeticError, RecursionError)


def write(footprint: Footprint, sink: Any) -> None:
    """Write the file to ``sink``, which has ``write``. Raises LimitExceeded for more traces than can be read again."""
    # A name that is none of Unicode, as those of files may be, is no reason not to write.
    head = json.dumps(_head(footprint), sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode(
        errors="replace"
    )
    _check_head(len(head))
    names = _names(footprint.level)
    step = min(len(footprint), ROW_GROUP) or 1
    tables = (_table(footprint, slice(at, at + step)) for at in range(0, len(footprint) or 1, step))
    first = next(tables)
    words = [names["begin"], "first_index", *(name for name in ("pc",) if name in first.column_names)]
    with pq.ParquetWriter(
        sink,
        first.schema,
        compression="zstd",
        use_dictionary=[name for name in first.column_names if name not in words],
        column_encoding=dict.fromkeys(words, "DELTA_BINARY_PACKED"),
        store_schema=False,  # it would have the head once more
    ) as writer:
        for table in chain([first], tables):
            writer.write_table(table, row_group_size=ROW_GROUP)
        writer.add_key_value_metadata({HEAD: head})


def _table(footprint: Footprint, rows: slice) -> Any:
    """Some places as a table of Arrow: a row group of the file."""
    columns = {name: column[rows] for name, column in footprint.columns().items()}
    part = made(footprint.level, footprint.by, footprint.origins, columns)
    unknown = part.trace == UNKNOWN
    given: dict[str, NDArray[Any] | None] = {
        "begin": part.begin,
        "extent": part.extent,
        "access": part.access,
        "kind": part.kind,
        "linear": part.translated,
        "source": part.source,
        "bucket": part.bucket,
        "pc": part.pc,
        "count": part.count,
        "trace": part.trace,
        "first_index": part.first,
    }
    names = _names(footprint.level)
    arrays = {}
    for name, values in given.items():
        if values is not None:
            hidden = unknown if name in _NULLABLE else None
            kept = values if hidden is None else np.where(hidden, 0, values)
            arrays[names[name]] = pa.array(kept, type=_TYPES[name], mask=hidden, safe=False)
    return pa.table(arrays)


def _check_head(size: int) -> None:
    if size > MAX_HEAD_BYTES:
        rule = f"what a footprint says of its traces has at most {MAX_HEAD_BYTES} bytes: keep it in parts"
        raise LimitExceeded(rule, field="traces", value=size)


def recognised(source: Any, memory: int | Budget) -> bool:
    """Whether a Parquet file says that it is a footprint, whatever else is wrong with it. ``source`` is read from its
    beginning afterwards."""
    try:
        read_footer(source, Budget.of(memory))
        metadata = pq.read_metadata(pa.BufferReader(directory(source))).metadata
        return HEAD in (metadata or {})
    except (EngineError, OSError, *_DAMAGE):  # its reader reports it
        return False
    finally:
        source.seek(0)


def read(source: Any, memory: int | Budget, check: Callable[[], None] = lambda: None) -> Footprint:
    """The footprint in a file, a ``source`` with ``read``, ``seek`` and ``tell``, in ``memory`` bytes.

    ``check`` is called between steps, and raises when nobody wants it any more. Raises that, InvalidValue for what is
    no footprint, TraceError for a damaged Parquet file, and what the source does.
    """
    budget = Budget.of(memory)
    try:
        footer = read_footer(source, budget)
        budget.keep(footer.memory, DIRECTORY)
        metadata = pq.read_metadata(pa.BufferReader(directory(source)))
        level, by, origins = _said(metadata.metadata or {}, budget)
        names = _names(level)
        wanted = [name for name in _TYPES if (name != "bucket" or by.buckets) and (name != "pc" or by.pc)]
        rows = footer.rows
        budget.keep(rows * (APART_BYTES if any(by) else PLACE_BYTES), "the places of a footprint")
        budget.check(min(rows, BATCH) * ROW_BYTES, "the places of a footprint")
        schema = metadata.schema.to_arrow_schema()
        for name in wanted:
            at = schema.get_field_index(names[name])
            if at < 0 or schema.field(at).type != _TYPES[name]:
                raise InvalidValue(f"must have a column {names[name]} of {_TYPES[name]}", field=names[name])
        check_pages(source, footer, leaves_of(metadata), [names[name] for name in wanted], budget)
        file = pq.ParquetFile(pa.PythonFile(source, mode="r"), metadata=metadata, page_checksum_verification=True)
        columns = _empty(by, rows)
        done = 0
        check()
        wants = [names[name] for name in wanted]
        for batch in file.iter_batches(batch_size=BATCH, columns=wants, use_threads=False):
            check()
            batch.validate(full=True)
            if done + len(batch) > rows:
                raise ValueError("there are more rows than it says")
            given = {name: batch.column(names[name]) for name in wanted}
            for name, column in _checked(level, origins, given, done).items():
                columns[name][done : done + len(batch)] = column
            done += len(batch)
        if done != rows:
            raise ValueError("there are fewer rows than it says")
    except (EngineError, MemoryError):
        raise
    except OSError as error:
        if error.errno is not None:  # of our disk
            raise
        raise _damaged(error) from error
    except _DAMAGE as error:
        raise _damaged(error) from error
    check()
    _check_order(level, columns)
    _check_total(columns["count"], origins)
    return made(level, by, origins, columns)


def _empty(by: By, rows: int) -> dict[str, NDArray[Any]]:
    """Room for the columns of a footprint."""
    kinds = {"begin": np.uint64, "extent": np.int64, "what": np.uint8, "count": np.int64, "trace": np.int32}
    more = {"bucket": by.buckets, "pc": by.pc}
    there = {**kinds, "first": np.int64, **{name: np.uint64 for name, has in more.items() if has}}
    return {name: np.empty(rows, dtype=kind) for name, kind in there.items()}


def _damaged(error: Exception) -> InvalidValue:
    return InvalidValue(f"the Parquet file is not valid: {error}", field="footprint")


def _names(level: str) -> Mapping[str, str]:
    """Names in the file by those of columns here."""
    return {**{name: name for name in _TYPES}, **dict(zip(("begin", "extent"), _PLACE[level], strict=True))}


def _head(footprint: Footprint) -> dict[str, Any]:
    return {
        "schema": SCHEMA,
        "level": footprint.level,
        "by": dict(footprint.by._asdict()),
        "traces": [dict(origin._asdict()) for origin in footprint.origins],
    }


def _said(metadata: Mapping[bytes, bytes], budget: Budget) -> tuple[str, By, tuple[Origin, ...]]:
    """Level, dimensions and traces of a file, from what is beside its columns. Raises InvalidValue."""
    if HEAD not in metadata:
        raise InvalidValue(
            "is no footprint: it does not say what it is of. A trace becomes one by `subpage footprint build`",
            field="footprint",
        )
    _check_head(len(metadata[HEAD]))
    budget.check(len(metadata[HEAD]) * _HEAD_BYTES, _TRACES)
    budget.keep(len(metadata[HEAD]) * _ORIGINS_BYTES, _TRACES)
    try:
        head = json.loads(metadata[HEAD])
        schema = head["schema"]
        if schema != SCHEMA:
            raise InvalidValue(f"must be of schema {SCHEMA}, as this release writes it", field="schema", value=schema)
        by = By(_number(head["by"]["time"]), _number(head["by"]["records"]), bool(head["by"]["pc"]))
        by.validate()
        level = head["level"]
        if level not in LEVELS:
            raise InvalidValue(f"must be one of {', '.join(LEVELS)}", field="level", value=level)
        traces = head["traces"]
        if not 1 <= len(traces) <= MAX_ORIGINS:
            raise InvalidValue(f"must be 1 to {MAX_ORIGINS} traces", field="traces", value=len(traces))
        return level, by, tuple(_origin(trace) for trace in traces)
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise InvalidValue(f"is no footprint: what it says of itself is damaged: {error}", field="footprint") from None


def _origin(trace: Mapping[str, Any]) -> Origin:
    """A trace of the head: it is told in lists, and in answers, so all of it is short. Raises ValueError and others."""
    digest, form, address, name = (trace[text] for text in ("digest", "format", "address", "name"))
    columns = tuple(trace["columns"])
    if not _DIGEST.fullmatch(digest):
        raise ValueError("a digest is that of SHA-256 in hexadecimal, or the id of a trace")
    if form not in _FORMATS or address not in ADDRESSES:
        raise ValueError("a format, or what addresses are, is none that there is")
    if len(columns) > _MAX_COLUMNS or not USABLE.keys() >= set(columns):
        raise ValueError("columns are some of those of a trace")
    if not isinstance(name, str) or len(name) > MAX_NAME:
        raise ValueError(f"a name is a text of up to {MAX_NAME} characters")
    name.encode()  # half of a surrogate pair could not be written again
    records, nanoseconds = (_number(trace[name]) for name in ("records", "nanoseconds"))
    if records > 1 << INDEX_BITS:
        raise ValueError(f"a trace has up to 2^{INDEX_BITS} records")
    return Origin(digest, records, form, columns, address, name, nanoseconds)


def _number(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 1 << 63:
        raise ValueError("a number is none")
    return value


def _checked(
    level: str, origins: tuple[Origin, ...], given: Mapping[str, pa.Array], done: int
) -> dict[str, NDArray[Any]]:
    """The columns of a footprint of some rows of a file, behind ``done`` others. Raises InvalidValue, with the row."""
    unknown = given["trace"].is_null().to_numpy(zero_copy_only=False)
    values: dict[str, NDArray[Any]] = {}
    for name, column in given.items():
        if name in _NULLABLE:
            column = column.fill_null(0)
        elif column.null_count:
            raise InvalidValue("must not be null", field=_names(level)[name])
        values[name] = column.to_numpy(zero_copy_only=False)
    begin, extent = values["begin"], values["extent"].astype(np.int64)
    unit = UNITS[level]
    most = (65535 + (1 << unit) - 2 >> unit) + 1
    kind, source = values["kind"].astype(np.int64), values["source"].astype(np.int64)
    access, linear = values["access"].astype(np.int64), values["linear"].astype(np.int64)
    possible = np.int64(acc.POSSIBLE) >> (4 * kind + access) & 1 == 1
    plain = (kind == acc.DATA) & (access != acc.EXECUTE)
    _all(extent - 1 < np.int64(most), level, done, "extent", f"must be 1 to {most}")
    _all(extent > 0, level, done, "extent", f"must be 1 to {most}")
    _all(begin <= np.uint64(1 << 52 - unit) - extent.astype(np.uint64), level, done, "begin", "must end below 2^52")
    _all((kind < len(acc.KIND_NAMES)) & (access <= acc.EXECUTE) & possible, level, done, "kind", acc.KIND_RULE)
    _all((source == 0) | (source <= acc.HOST) & plain, level, done, "source", acc.SOURCE_RULE)
    _all(
        (linear == 1) | (linear == 0) & (kind == acc.PAGING_READ),
        level,
        done,
        "linear",
        "must be 1, or 0 of a paging read",
    )
    _all((values["count"] > 0) & (values["count"] < 1 << 63), level, done, "count", "must be from 1 to 2^63 - 1")
    _all(values["trace"] < len(origins), level, done, "trace", "must be the position of a trace")
    _all(values["first_index"] < 1 << INDEX_BITS, level, done, "first_index", f"must be below 2^{INDEX_BITS}")
    what = access | kind << kernels.KIND_SHIFT | source << kernels.SOURCE_SHIFT
    what |= np.where(linear == 0, kernels.UNTRANSLATED, 0)
    return {
        "begin": begin,
        "extent": extent,
        "what": what.astype(np.uint8),
        "count": values["count"].astype(np.int64),
        "trace": np.where(unknown, UNKNOWN, values["trace"]).astype(np.int32),
        "first": np.where(unknown, UNKNOWN, values["first_index"].astype(np.int64)),
        **{name: values[name] for name in ("bucket", "pc") if name in values},
    }


def _check_order(level: str, columns: Mapping[str, NDArray[Any]]) -> None:
    """Each place is behind the one before it."""
    for begin in range(0, len(columns["begin"]), BATCH):
        at = max(begin - 1, 0)  # the last one of those before
        some = {name: columns[name][at : begin + BATCH] for name in KEYS if name in columns}
        _all(_ascending(some), level, at, "begin", "must be places in order, each once")


def _ascending(columns: Mapping[str, NDArray[Any]]) -> NDArray[np.bool_]:
    """Whether each row is behind the one before it by KEYS."""
    count = len(columns["begin"])
    behind, same = np.zeros(max(count - 1, 0), dtype=np.bool_), np.ones(max(count - 1, 0), dtype=np.bool_)
    for name in KEYS:
        if name in columns:
            column = columns[name]
            behind |= same & (column[1:] > column[:-1])
            same &= column[1:] == column[:-1]
    return np.append(np.ones(min(count, 1), dtype=np.bool_), behind)


def _check_total(counts: NDArray[np.int64], origins: tuple[Origin, ...]) -> None:
    """What places count is what the traces have."""
    # In halves, whose sums fit. The traces have less than 2^63 together, which every sum of counts is then.
    total = (int((counts >> 32).sum()) << 32) + int((counts & 0xFFFF_FFFF).sum())
    wanted = sum(origin.records for origin in origins)
    if total != wanted:
        raise InvalidValue(f"must be {wanted} in all, the records of the traces", field="count", value=total)


def _all(fine: NDArray[np.bool_], level: str, done: int, name: str, rule: str) -> None:
    if not fine.all():
        raise InvalidValue(rule, field=f"{_names(level)[name]}[{done + int(np.argmin(fine))}]")
