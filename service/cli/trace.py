"""``subpage trace``: files of traces, of whatever tool: convert them to Parquet, say what is in them, show some."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from service.cli import show
from service.cli.commands import AsJson, Group, command
from service.cli.progress import ProgressOption, bar
from service.cli.trace_options import (
    FILE_HELP,
    Address,
    Columns,
    Compression,
    Format,
    FormatOption,
    Note,
    Record,
    RecordOption,
    SkipUnknown,
)
from service.platform.failures import Failure

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from engine.trace.columns import TraceChunk
    from service.cli.trace_parquet import TableOut
    from service.cli.trace_summary import Summary
    from service.runtime.trace_files import TraceFile

trace = typer.Typer(cls=Group, help="Convert trace files of other tools, and look into them.", no_args_is_help=True)


File = Annotated[Path, typer.Argument(help=FILE_HELP)]
AddressOption = Annotated[
    Address | None,
    typer.Option(
        help="gpa: the physical address, and the trace must have it. gva: the virtual address of a guest, to replay "
        "with address=gva. flat: the virtual address, taken as a physical one. By default what the trace has."
    ),
]

_TOP = 10
_SHOWN_RANGES = 12


@command(trace, "subpage trace convert boot.log -o boot.parquet")
def convert(
    file: File,
    output: Annotated[
        Path, typer.Option("-o", "--output", help="The file to write: ….parquet, or ….arrow for a compact stream.")
    ],
    format: FormatOption = Format.AUTO,
    address: AddressOption = None,
    record: RecordOption = Record.RECORD16,
    columns: Columns = None,
    skip_unknown: SkipUnknown = False,
    compression: Annotated[
        Compression | None, typer.Option(help="Of ….arrow: lz4 (the default) is read fastest, zstd is smaller.")
    ] = None,
    without: Annotated[
        list[Note] | None,
        typer.Option(help="A column to leave out: a note that exit records give back. May be repeated."),
    ] = None,
    as_json: AsJson = False,
    progress: ProgressOption = None,
) -> None:
    """Convert a trace to Parquet or to compact Arrow, say what was read and what was skipped, and what to do next."""
    from service.cli.trace_files import opened_trace
    from service.cli.trace_parquet import replacing
    from service.cli.trace_summary import Summary

    if output.suffix not in (".parquet", ".arrow"):
        raise Failure(f"-o {output}: the name must end in .parquet or .arrow, which is what is written")
    if compression is not None and output.suffix != ".arrow":
        raise Failure(f"--compression {compression.value}: goes with -o ….arrow; Parquet is compressed by zstd")
    if output.exists() and file.exists() and output.samefile(file):
        raise Failure(f"-o {output}: is the file that is read")
    summary = Summary()
    with (
        opened_trace(file, format, record=record, skip_unknown=skip_unknown, columns=columns) as opened,
        replacing(output) as beside,
        bar("converting", progress) as move,
    ):
        out = _out(beside, output.suffix, compression, [note.value for note in without or ()])
        for chunk in opened:
            records = addressed(chunk, opened, address)
            summary.add(chunk, records)
            out.add(chunk, records, opened.reader.valued)
            move(opened.progress.share, done=f"{out.records:,} records")
        out.close()
    if as_json:
        show.document(
            {"output": str(output), "records": out.records, **_taken(opened), **_flat_slots(opened, summary, address)}
        )
        return
    _said(opened)
    typer.echo(f"{out.records:,} records written to {output}")
    for line in _next(opened, summary, address, output):
        typer.echo(line)


def _out(path: Path, suffix: str, compression: Compression | None, without: list[str]) -> TableOut:
    """What writes such a file."""
    if suffix == ".arrow":
        from service.cli.trace_arrow import ArrowOut

        return ArrowOut(path, (compression or Compression.LZ4).value, without)
    from service.cli.trace_parquet import ParquetOut

    return ParquetOut(path, without)


@command(trace, "subpage trace info boot.parquet")
def info(
    file: File,
    format: FormatOption = Format.AUTO,
    address: AddressOption = None,
    record: RecordOption = Record.RECORD16,
    columns: Columns = None,
    skip_unknown: SkipUnknown = False,
    as_json: AsJson = False,
    progress: ProgressOption = None,
) -> None:
    """Say what is in a trace: reads and writes, the pages and sub-pages that they touch, where those are."""
    from service.cli.trace_files import opened_trace
    from service.cli.trace_summary import Summary

    summary = Summary()
    with (
        opened_trace(file, format, record=record, skip_unknown=skip_unknown, columns=columns) as opened,
        bar("reading", progress) as move,
    ):
        for chunk in opened:
            summary.add(chunk, addressed(chunk, opened, address))
            move(opened.progress.share, done=f"{summary.records:,} records")
    found = summary.document(_TOP)
    whose = opened.reader.taken.address if opened.reader.taken else None
    if as_json:
        show.document({**_taken(opened), **found, **_flat_slots(opened, summary, address)})
        return
    _said(opened)
    _print(found)
    if found["virtual"] and whose in (None, "guest-physical"):
        typer.echo(f"addresses look virtual: {found['virtual']}: replay with address=gva, or with address=flat")
    if _is_flat(opened, address):
        for line in _slots(summary):
            typer.echo(line)


@command(trace, "subpage trace head boot.parquet -n 3")
def head(
    file: File,
    count: Annotated[int, typer.Option("-n", min=0, help="How many records.")] = 10,
    format: FormatOption = Format.AUTO,
    address: AddressOption = None,
    record: RecordOption = Record.RECORD16,
    columns: Columns = None,
    skip_unknown: SkipUnknown = False,
    as_json: AsJson = False,
) -> None:
    """Show the first records of a trace; with --json one object a line, which is NDJSON that can be posted."""
    from service.cli.trace_files import opened_trace

    with opened_trace(file, format, record=record, skip_unknown=skip_unknown, columns=columns) as opened:
        rows: list[dict[str, Any]] = []
        for chunk in opened:
            rows += _rows(chunk, opened, address, count - len(rows))
            if len(rows) >= count:
                break
    if as_json:
        for row in rows:
            typer.echo(json.dumps({name: value for name, value in row.items() if value is not None}))
        return
    names = [name for name in dict.fromkeys(name for row in rows for name in row) if not _is_plain(name, rows)]
    show.table(names, ([_cell(row.get(name)) for name in names] for row in rows), right=names, literal=True)


def addressed(chunk: TraceChunk, file: TraceFile, address: Address | None) -> NDArray[np.uint64]:
    """The records of a chunk with the addresses that are asked for. Raises Failure where the trace has none of them."""
    taken = file.reader.taken
    virtual = taken is not None and taken.address != "guest-physical"
    if address is None or (virtual and address is not Address.GPA):
        return chunk.records
    if address is Address.GPA:
        if virtual:
            assert taken is not None
            from service.cli.trace_files import WHOSE

            raise Failure(
                f"{file.path}: {taken.format} has {WHOSE[taken.address]}, no physical ones: leave --address out"
            )
        return chunk.records
    if chunk.gva is None:
        raise Failure(f"{file.path}: has physical addresses only, no column gva: leave --address out")
    records = chunk.records.copy()
    records[:, 0] = chunk.gva
    return records


def _is_flat(file: TraceFile, address: Address | None) -> bool:
    taken = file.reader.taken
    of_process = taken is not None and taken.address == "process-virtual"
    return address is Address.FLAT or (address is None and of_process)


def _taken(file: TraceFile) -> dict[str, Any]:
    """What a file was taken for, for programs."""
    taken = file.reader.taken
    said = {} if taken is None else {"address": taken.address, "sizes": taken.sizes, "skipped": dict(taken.skipped)}
    return {"format": file.format_name, **said, "ignored_columns": list(file.reader.ignored_columns)}


def _flat_slots(file: TraceFile, summary: Summary, address: Address | None) -> dict[str, Any]:
    return {"memory_slots": summary.slots()} if _is_flat(file, address) else {}


def _next(file: TraceFile, summary: Summary, address: Address | None, output: Path) -> Iterator[str]:
    """What to do with a converted trace."""
    taken = file.reader.taken
    if not summary.records:
        yield "no records: there is nothing to replay"
    elif _is_flat(file, address):
        yield from _slots(summary)
    elif address is Address.GVA or (taken is not None and taken.address == "guest-virtual"):
        yield "its addresses are virtual ones of a guest: replay it with address=gva, on a machine with its memory"
        yield f"subpage replay {output} --vm VM --address gva"
    else:
        yield f"subpage replay {output} --policy POLICY"
        if summary.virtual is not None:
            yield f"addresses look virtual: {summary.virtual}: replay with address=gva, or with address=flat"


def _slots(summary: Summary) -> Iterator[str]:
    """The memory that a flat trace needs."""
    slots = summary.slots()
    if slots is None:
        yield f"no guest has memory at these addresses: {summary.virtual}; leave such accesses out, or use address=gva"
        return
    top = max((int(slot["gpa"], 16) + int(slot["size"], 16) for slot in slots), default=0)
    width = "" if top <= 1 << 46 else f', "maxphyaddr": {(top - 1).bit_length()}'
    yield "its addresses are virtual ones of a process: replay it with address=flat, on a machine with these slots"
    yield f'"memory_slots": {json.dumps(slots)}{width}'


def _said(file: TraceFile) -> None:
    from service.cli.trace_files import lines_about

    reader = file.reader
    for line in lines_about(file.path, file.format, file.compression, reader.taken, reader.ignored_columns):
        typer.echo(line)


def _print(found: dict[str, Any]) -> None:
    """The numbers of a summary as lines."""
    lines = {
        "records": f"{found['records']:,}",
        "reads": f"{found['reads']:,}",
        "writes": f"{found['writes']:,}, {found['bytes_written']:,} bytes",
        "executes": f"{found['executes']:,}",
        "pages": f"{found['pages']:,}, {found['written_pages']:,} of them written",
        "sub-pages": f"{found['subpages']:,}",
        "vCPUs": ", ".join(map(str, found["vcpus"])) or "none",
    }
    if found["seconds"] is not None:
        lines["time"] = f"{found['seconds']:.6f} s"
    for name, text in lines.items():
        typer.echo(f"{name:<10} {text}")
    for number, each in enumerate(found["ranges"][:_SHOWN_RANGES]):
        typer.echo(f"{'' if number else 'ranges':<10} {each['first']} to {each['last']}, {each['pages']:,} pages")
    if len(found["ranges"]) > _SHOWN_RANGES:
        typer.echo(f"{'':<10} and {len(found['ranges']) - _SHOWN_RANGES:,} more")
    for number, each in enumerate(found["top_pages"]):
        counts = f"{each['accesses']:,} accesses, {each['writes']:,} writes, sub-pages {each['subpages']}"
        typer.echo(f"{'' if number else 'top pages':<10} {each['page']} {counts}")


def _rows(chunk: TraceChunk, file: TraceFile, address: Address | None, count: int) -> list[dict[str, Any]]:
    """Some records of a chunk as people read them."""
    from engine.arch.access import ACCESS_NAMES, KIND_NAMES, SOURCE_NAMES
    from engine.trace.operations import NO_SPACE, OP_NAMES
    from service.cli.trace_parquet import columns_of

    names = {"access": ACCESS_NAMES, "kind": KIND_NAMES, "source": SOURCE_NAMES, "op": OP_NAMES}
    records = addressed(chunk, file, address)
    found = columns_of(chunk, records, file.reader.valued)
    columns = {name: values[: max(count, 0)] for name, values in found.items()}
    if "value" in columns:
        columns["value"] = columns["value"].to_pylist()
    rows: list[dict[str, Any]] = []
    for at in range(min(count, len(records))):
        row: dict[str, Any] = {}
        for name, values in columns.items():
            value = values[at]
            if name in ("arg", "value"):
                row[name] = None if value is None else value.hex()
            elif name in ("gpa", "gva", "pc", "address_space"):
                row[name] = None if name == "address_space" and value == NO_SPACE else f"{int(value):#x}"
            elif name in names and int(value) < len(names[name]):
                row[name] = names[name][int(value)]
            else:
                row[name] = int(value)
        rows.append(row)
    return rows


# What a column says that is left out of a table: of each record what it is without the column.
_PLAIN = {"kind": "data", "linear": 1, "source": "guest", "insn_len": 0, "op": "access", "arg": None, "time": 0}


def _is_plain(name: str, rows: list[dict[str, Any]]) -> bool:
    return name in _PLAIN and all(row.get(name) == _PLAIN[name] for row in rows)


def _cell(value: Any) -> str:
    return "-" if value is None else str(value)
