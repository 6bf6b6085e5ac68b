"""Traces in files and objects as people have them: compressed or not, of any format, and what is no trace."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePath
from types import MappingProxyType
from typing import Any, BinaryIO, cast

from engine.errors import EngineError, LimitExceeded
from engine.trace.columns import TraceChunk
from engine.trace.compressed import DECODERS, FAULTS, Decoder, Zstandard, compression_of
from engine.trace.option_names import FORMATS, TOOL_FORMATS
from engine.trace.readers import (
    DEFAULT_MEMORY,
    Budget,
    Source,
    TraceReader,
    open_trace,
    recognised,
    unnamed_table,
    what_else,
)
from engine.trace.readers import FORMATS as TOOLS
from service.platform.failures import Failure
from service.problems import ServiceError, said

AUTO = "auto"
NAMES = (*(name for name in FORMATS), *(name for name in TOOL_FORMATS if name != AUTO))

HEAD_BYTES = 1 << 16  # by which a file is recognised
_WINDOW = 1 << 27  # that unpacking may take: those of zstd --ultra -22 and of xz -9

_PARQUET, _ARROW_STREAM = b"PAR1", b"\xff\xff\xff\xff"


class TraceFileError(Failure):
    """The file is no trace that can be read, or what is wrong in it; the text begins with its name."""


@dataclass(slots=True)
class Progress:
    """How much of a file has been read: ``taken`` of ``size`` bytes, as they are on the disk."""

    size: int
    taken: int = 0

    @property
    def share(self) -> float:
        return min(1.0, self.taken / self.size) if self.size else 1.0


class _Counted(io.RawIOBase):
    """A file that tells how much of it was read."""

    def __init__(self, file: BinaryIO, progress: Progress) -> None:
        self._file, self._progress = file, progress

    def readinto(self, target: Any) -> int:
        count = cast(Any, self._file).readinto(target)
        self._progress.taken += count
        return int(count)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()


@dataclass(slots=True)
class TraceFile:
    """A file being read. ``format`` is what it was taken for; iterating gives its chunks once, and raises
    TraceFileError for what is wrong in it."""

    path: Path | str
    format: str
    compression: str | None
    reader: TraceReader
    progress: Progress

    @property
    def format_name(self) -> str:
        """The format, or the tool's that ``auto`` found."""
        return self.format if self.reader.taken is None else self.reader.taken.format

    def __iter__(self) -> Iterator[TraceChunk]:
        with told_of(self.path):
            yield from self.reader


def fault_in(path: Path | str, error: EngineError | ServiceError) -> TraceFileError:
    """What is wrong in a file, with its name: of text the line, of others the record."""
    rule = str(getattr(error, "rule", ""))
    return TraceFileError(f"{path}: {rule if rule.startswith('line ') else said(error)}")


@contextmanager
def told_of(path: Path | str) -> Iterator[None]:
    """What is wrong in a file, with its name."""
    try:
        yield
    except LimitExceeded:
        raise  # of all files together: it is not this one that is wrong
    except EngineError as error:
        raise fault_in(path, error) from None
    except OSError as error:
        raise TraceFileError(f"{path}: cannot be read: {error.strerror or error}") from None


def trace_in(
    raw: BinaryIO,
    size: int,
    path: Path | str,
    format: str = AUTO,
    record: str = "record16",
    skip_unknown: bool = False,
    columns: str | None = None,
    memory: int | Budget = DEFAULT_MEMORY,
    longest: int = 0,
) -> TraceFile:
    """A trace in a file that is open, or in an object of a store, whose address ``path`` is then; ``memory`` as in
    ``open_trace``. A compressed one unpacks to up to ``longest`` bytes, 0 for any number. Raises Failure."""
    with told_of(path):
        progress = Progress(size)
        counted = io.BufferedReader(_Counted(raw, progress), 1 << 18)
        compression = compression_of(counted.peek(8))
        plain = counted if compression is None else unpacked(path, counted, compression, longest)
        kind = _kind(path, plain, compression, format, columns)
        layout = record if kind == "packed" else None
        tool = TOOLS.get(kind)
        carry = ("value",) if tool is not None and tool.lines and "value" in tool.columns else ()
        reader = open_trace(
            kind, plain, record=layout, carry=carry, skip_unknown=skip_unknown, columns=columns, memory=memory
        )
        return TraceFile(path, kind, compression, reader, progress)


_DECODERS: Mapping[str, Callable[[], Decoder]] = MappingProxyType({**DECODERS, "zstd": lambda: Zstandard(_WINDOW)})


def unpacked(path: Path | str, file: Source, compression: str, longest: int = 0) -> io.BufferedReader[Any]:
    """What is in a compressed file, up to ``longest`` bytes; 0 for any number."""
    return io.BufferedReader(_Unpacked(file, _DECODERS[compression](), path, longest), HEAD_BYTES)


def look_in(raw: Any, path: Path | str, format: str = AUTO, columns: str | None = None) -> str:
    """The format of a file that is open, and is at its beginning again then. Raises Failure."""
    with told_of(path):
        file = io.BufferedReader(_Counted(raw, Progress(0)), HEAD_BYTES)
        compression = compression_of(file.peek(8))
        plain = file if compression is None else unpacked(path, file, compression)
        found = _kind(path, plain, compression, format, columns)
        raw.seek(0)
        return found


def _kind(
    path: Path | str, plain: io.BufferedReader[Any], compression: str | None, format: str, columns: str | None
) -> str:
    """Raises TraceFileError."""
    head = plain.peek(HEAD_BYTES)[:HEAD_BYTES]
    if format == AUTO:
        other = what_else(head)
        if other is not None:
            raise TraceFileError(f"{path}: {other}")
        format = "csv" if columns is not None else _recognised(path, head)
    if format == "parquet" and compression is not None:
        raise TraceFileError(f"{path}: a Parquet file is compressed inside; unpack it from {compression} first")
    return format


class _Unpacked(io.RawIOBase):
    """Unpacked data: each read gives as much as it is asked for, but at the end. Damage raises TraceFileError."""

    def __init__(self, file: Source, decoder: Decoder, path: Path | str, longest: int) -> None:
        self._pieces = self._decoded(file, decoder)
        self._path = path
        self._longest = longest
        self._taken = 0
        self._left = memoryview(b"")

    def _decoded(self, file: Source, decoder: Decoder) -> Iterator[bytes]:
        try:
            while data := file.read(HEAD_BYTES):
                yield from decoder.feed(data)
        except (*FAULTS, EngineError) as error:
            raise TraceFileError(f"{self._path}: the compressed data are damaged: {error}") from None
        if not decoder.complete:
            raise TraceFileError(f"{self._path}: the compressed data end early")

    def readable(self) -> bool:
        return True

    def readinto(self, target: Any) -> int:
        view = memoryview(target)
        done = 0
        while done < len(view):
            if not len(self._left):
                piece = next(self._pieces, None)
                if piece is None:
                    break
                self._left = memoryview(piece)
                self._taken += len(piece)
                if self._taken > self._longest > 0:
                    raise TraceFileError(f"{self._path}: may unpack to {self._longest:,} bytes, and has more")
            count = min(len(view) - done, len(self._left))
            view[done : done + count] = self._left[:count]
            self._left = self._left[count:]
            done += count
        return done


# What a name ends in, where the content does not tell: packed records have no mark, and others may have lost theirs.
_SUFFIXES = {
    ".bin": "packed",
    ".champsim": "champsim",
    ".champsimtrace": "champsim",
    ".csv": "csv",
    ".tsv": "csv",
    ".json": "json",
    ".ndjson": "ndjson",
    ".jsonl": "ndjson",
    ".arrow": "arrow",
    ".arrows": "arrow",
    ".parquet": "parquet",
}
_COMPRESSED = {".gz", ".zst", ".zstd", ".xz"}


def _recognised(path: Path | str, head: bytes) -> str:
    """The format of a file by its beginning, then by its name. Raises TraceFileError."""
    if head.startswith(_PARQUET):
        return "parquet"
    if head.startswith(_ARROW_STREAM):
        return "arrow"
    tool = recognised(head)
    if tool is not None:
        return tool.name
    if head.lstrip()[:1] == b"{" and b"\0" not in head[:8]:
        return _of_json(head)
    names = [suffix for suffix in PurePath(path).suffixes if suffix not in _COMPRESSED]
    if names and names[-1] in _SUFFIXES:
        return _SUFFIXES[names[-1]]
    if not head:
        raise TraceFileError(f"{path}: is empty")
    if (table := unnamed_table(head)) is not None:
        raise TraceFileError(f"{path}: {table} (--columns)")
    raise TraceFileError(f"{path}: is of no format that is recognised; say --format, one of {', '.join(NAMES)}")


def _of_json(head: bytes) -> str:
    """Whether records are one a line or in one document."""
    try:
        first = json.loads(head.lstrip().split(b"\n", 1)[0])
    except ValueError:
        return "json"
    return "json" if isinstance(first, dict) and "accesses" in first else "ndjson"
