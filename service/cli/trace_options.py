"""Options that the commands about traces share, with the words of ``engine.trace.option_names``.

The engine is not imported for a help text; a test compares the words.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer


class Format(StrEnum):
    """Of a file."""

    AUTO = "auto"
    PARQUET = "parquet"
    ARROW = "arrow"
    NDJSON = "ndjson"
    JSON = "json"
    PACKED = "packed"
    LACKEY = "lackey"
    DRMEMTRACE = "drmemtrace"
    EXECLOG = "execlog"
    BOCHS = "bochs"
    GEM5 = "gem5"
    CHAMPSIM = "champsim"
    FTRACE = "ftrace"
    PERF_SCRIPT = "perf-script"
    PERF_MEM = "perf-mem"
    HYPERDBG = "hyperdbg"
    CSV = "csv"


class Record(StrEnum):
    """Layout of a packed file."""

    RECORD16 = "record16"
    GPA8 = "gpa8"


class Compression(StrEnum):
    """Of the buffers of a compact Arrow stream."""

    LZ4 = "lz4"
    ZSTD = "zstd"


class Note(StrEnum):
    """Columns that nothing of a replay depends on."""

    GVA = "gva"
    PC = "pc"
    TIME = "time"
    VALUE = "value"


class Address(StrEnum):
    """Which address of a trace is meant, and whose it is."""

    GPA = "gpa"
    GVA = "gva"
    FLAT = "flat"


FILE_HELP = "The trace: text of a tool, Parquet, Arrow, NDJSON, JSON or packed; also .gz, .zst, .xz."

FormatOption = Annotated[Format, typer.Option(help="Of the file; auto recognises it by its content.")]
RecordOption = Annotated[Record, typer.Option(help="Layout of packed records.")]
Columns = Annotated[
    str | None,
    typer.Option(help="Of a table: which of its columns are meant, as gpa=ADDR,size=LEN. It is csv then."),
]
SkipUnknown = Annotated[
    bool, typer.Option("--skip-unknown", help="Pass over lines that the format does not have; they are counted.")
]
Ray = Annotated[
    str | None,
    typer.Option(
        "--ray",
        metavar="ADDRESS",
        help="Have it done by a cluster of Ray: local, auto, HOST:PORT or ray://HOST:PORT. Needs the extra `scale`.",
    ),
]
