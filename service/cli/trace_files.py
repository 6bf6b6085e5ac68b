"""Trace files as people have them: compressed or not, of any format, and what to do with files that are no traces."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, BinaryIO, cast

from engine.errors import EngineError
from engine.trace.columns import TraceChunk
from engine.trace.compressed import DECODERS, FAULTS, Decoder, Zstandard, compression_of
from engine.trace.option_names import FORMATS, TOOL_FORMATS
from engine.trace.readers import FORMATS as TOOLS
from engine.trace.readers import TraceReader, open_trace, recognised, what_else
from service.cli.policy_files import said
from service.platform.failures import Failure, opened

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

    path: Path
    format: str
    compression: str | None
    reader: TraceReader
    progress: Progress

    @property
    def format_name(self) -> str:
        """The format, or the tool's that ``auto`` found."""
        return self.format if self.reader.taken is None else self.reader.taken.format

    def __iter__(self) -> Iterator[TraceChunk]:
        with _told(self.path):
            yield from self.reader


@contextmanager
def _told(path: Path) -> Iterator[None]:
    """What is wrong in a file, with its name."""
    try:
        yield
    except EngineError as error:
        found = said(error)
        rule = str(getattr(error, "rule", ""))
        raise TraceFileError(f"{path}: {rule if rule.startswith('line ') else found}") from None
    except OSError as error:
        raise TraceFileError(f"{path}: cannot be read: {error.strerror or error}") from None


@contextmanager
def opened_trace(
    path: Path,
    format: str = AUTO,
    *,
    record: str = "record16",
    skip_unknown: bool = False,
    columns: str | None = None,
) -> Iterator[TraceFile]:
    """Open a file of a format, or of the one that it is recognised as. Raises Failure."""
    with opened(path) as raw, _told(path):
        progress = Progress(path.stat().st_size)
        counted = io.BufferedReader(_Counted(raw, progress), 1 << 18)
        compression, plain = _unpacked(path, counted)
        head = plain.peek(HEAD_BYTES)[:HEAD_BYTES]
        other = what_else(head) if format == AUTO else None
        if other is not None:
            raise TraceFileError(f"{path}: {other}")
        if format == AUTO and columns is not None:
            format = "csv"
        kind = _recognised(path, head) if format == AUTO else format
        if kind == "parquet" and compression is not None:
            raise TraceFileError(f"{path}: a Parquet file is compressed inside; unpack it from {compression} first")
        layout = record if kind == "packed" else None
        tool = TOOLS.get(kind)
        carry = ("value",) if tool is not None and tool.lines and "value" in tool.columns else ()
        reader = open_trace(kind, plain, record=layout, carry=carry, skip_unknown=skip_unknown, columns=columns)
        yield TraceFile(path, kind, compression, reader, progress)


_DECODERS: Mapping[str, Callable[[], Decoder]] = MappingProxyType({**DECODERS, "zstd": lambda: Zstandard(_WINDOW)})


def _unpacked(path: Path, file: io.BufferedReader[Any]) -> tuple[str | None, io.BufferedReader[Any]]:
    """How a file is compressed, by its first bytes, and what is in it."""
    name = compression_of(file.peek(8))
    if name is None:
        return None, file
    return name, io.BufferedReader(_Unpacked(file, _DECODERS[name](), path), HEAD_BYTES)


class _Unpacked(io.RawIOBase):
    """Unpacked data: each read gives as much as it is asked for, but at the end. Damage raises TraceFileError."""

    def __init__(self, file: io.BufferedReader[Any], decoder: Decoder, path: Path) -> None:
        self._pieces = self._decoded(file, decoder)
        self._path = path
        self._left = memoryview(b"")

    def _decoded(self, file: io.BufferedReader[Any], decoder: Decoder) -> Iterator[bytes]:
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
            count = min(len(view) - done, len(self._left))
            view[done : done + count] = self._left[:count]
            self._left = self._left[count:]
            done += count
        return done


# What a name ends in, where the content does not tell: packed records have no mark.
_SUFFIXES = {".bin": "packed", ".champsim": "champsim", ".champsimtrace": "champsim", ".csv": "csv", ".tsv": "csv"}
_COMPRESSED = {".gz", ".zst", ".zstd", ".xz"}


def _recognised(path: Path, head: bytes) -> str:
    """The format of a file by its beginning, then by its name. Raises TraceFileError."""
    if head.startswith(_PARQUET):
        return "parquet"
    if head.startswith(_ARROW_STREAM):
        return "arrow"
    tool = recognised(head)
    if tool is not None:
        return tool.name
    if head.lstrip()[:1] == b"{":
        return _of_json(head)
    names = [suffix for suffix in path.suffixes if suffix not in _COMPRESSED]
    by_name = _SUFFIXES.get(names[-1] if names else "")
    if by_name in NAMES:
        return str(by_name)
    if not head:
        raise TraceFileError(f"{path}: is empty")
    raise TraceFileError(f"{path}: is of no format that is recognised; say --format, one of {', '.join(NAMES)}")


def _of_json(head: bytes) -> str:
    """Whether records are one a line or in one document."""
    try:
        first = json.loads(head.lstrip().split(b"\n", 1)[0])
    except ValueError:
        return "json"
    return "json" if isinstance(first, dict) and "accesses" in first else "ndjson"
