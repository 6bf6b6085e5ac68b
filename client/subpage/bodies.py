"""What can be sent as a trace, and as what: files, bytes, iterators, tables of Arrow, arrays."""

from __future__ import annotations

import io
import itertools
import json
import os
import stat
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from subpage.bitmaps import library
from subpage.compacting import taken
from subpage.errors import BadInput
from subpage.progress import Report, counting
from subpage.wire import file_pieces

PARQUET = "application/vnd.apache.parquet"
ARROW = "application/vnd.apache.arrow.stream"
NDJSON = "application/x-ndjson"
JSON = "application/json"
OCTETS = "application/octet-stream"
TEXT = "text/plain"

# Media types by what a name ends in. Anything else is text of a tool, which the service recognises.
BY_SUFFIX: Mapping[str, str] = {
    ".parquet": PARQUET,
    ".arrow": ARROW,
    ".arrows": ARROW,
    ".ndjson": NDJSON,
    ".jsonl": NDJSON,
    ".json": JSON,
    ".bin": OCTETS,
    ".champsim": OCTETS,
    ".champsimtrace": OCTETS,
    ".csv": "text/csv",
}
CODINGS: Mapping[str, str] = {".gz": "gzip", ".zst": "zstd"}
_PACKED = {"record": "record16"}
_FORMATS = {".champsim": {"format": "champsim"}, ".champsimtrace": {"format": "champsim"}, ".bin": _PACKED}
# How bodies of these begin.
_MAGIC = ((b"PAR1", PARQUET), (b"\xff\xff\xff\xff", ARROW), (b'{"accesses"', JSON), (b"{", NDJSON))
_BATCH = 4096  # records that are written together


@dataclass(slots=True)
class Body:
    """Bytes to send. ``once``: they cannot be had a second time. ``query`` is what their kind needs of the call."""

    pieces: Callable[[], Any]
    media: str
    size: int | None = None
    once: bool = False
    coding: str | None = None
    query: dict[str, Any] = field(default_factory=dict)

    def headers(self) -> dict[str, str]:
        """Those of the request."""
        headers = {"Content-Type": self.media}
        if self.size is not None:
            headers["Content-Length"] = str(self.size)
        if self.coding is not None:
            headers["Content-Encoding"] = self.coding
        return headers

    def reporting(self, report: Report | None) -> Callable[[], Any]:
        """The pieces, told to ``report`` as they are taken."""
        if report is None:
            return self.pieces

        def pieces() -> Any:
            made, told = self.pieces(), counting(self.size, report)
            if isinstance(made, AsyncIterator):
                return (told(piece) async for piece in made)
            return map(told, [made] if isinstance(made, bytes) else made)

        return pieces


def body_of(source: Any, media: str | None = None, default: str = TEXT) -> Body:
    """``source`` as a body. Raises BadInput for what is none, NotInstalled where a table needs pyarrow.
    ``media`` is its type where neither a name nor its first bytes tell."""
    if isinstance(source, (str, os.PathLike)):
        return of_file(Path(source), media, default)
    if isinstance(source, (bytes, bytearray, memoryview)):
        data = bytes(source)
        kind = media or _by_magic(data, default)
        return Body(lambda: data, kind, len(data), query=dict(_PACKED) if kind == OCTETS == default else {})
    if hasattr(source, "__arrow_c_stream__"):
        return Body(lambda: _arrow(source), ARROW, once=hasattr(source, "read_next_batch"))
    if isinstance(source, Mapping):
        return body_of(json.dumps(source, separators=(",", ":")).encode(), JSON)
    if hasattr(source, "__array_interface__"):
        return _of_array(source)
    if hasattr(source, "read"):
        return _of_iterator(iter(lambda: source.read(1 << 18), b""), media, default)
    if isinstance(source, AsyncIterator):
        if media is None:
            raise BadInput("say with media= what an asynchronous iterator gives, such as application/x-ndjson")
        return Body(lambda: source, media, once=True)
    if isinstance(source, Iterable):
        return _of_iterator(iter(source), media, default)
    raise BadInput(f"a {type(source).__name__} cannot be sent: give a path, bytes, an iterator or a table of Arrow")


def of_file(path: Path, media: str | None = None, default: str = TEXT) -> Body:
    """A file, or a pipe that has a name. Raises BadInput."""
    try:
        found = path.stat()
        if stat.S_ISDIR(found.st_mode):
            raise BadInput(f"{path}: is a directory, not a file")
        regular = stat.S_ISREG(found.st_mode)
        head = b""
        if regular:
            with path.open("rb") as file:
                head = file.read(64)
    except OSError as error:
        raise BadInput(f"{path}: {error.strerror or error}") from None
    if regular and not found.st_size:
        raise BadInput(f"{path}: is empty")
    names = path.suffixes
    coding = CODINGS.get(names[-1]) if names else None
    suffix = (names[:-1] if coding else names)[-1:]
    kind = media or (suffix and BY_SUFFIX.get(suffix[0])) or _by_magic(b"" if coding else head, default)
    size = found.st_size if regular else None
    query = dict(_FORMATS.get(suffix[0], {})) if suffix else {}
    return Body(lambda: file_pieces(path), kind, size, not regular, coding, query)


def _of_iterator(items: Iterator[Any], media: str | None, default: str) -> Body:
    """Pieces of bytes, or records as dictionaries."""
    first = next(items, None)
    if first is None:
        raise BadInput("there is nothing in what was given")
    rest = itertools.chain([first], items)
    if isinstance(first, Mapping):
        return Body(lambda: _ndjson(rest), NDJSON, once=True)
    if isinstance(first, (bytes, bytearray, memoryview)):
        return Body(lambda: map(bytes, rest), media or _by_magic(bytes(first[:64]), default), once=True)
    if isinstance(first, int):
        return Body(lambda: _ndjson({"gpa": gpa} for gpa in rest), NDJSON, once=True)
    raise BadInput(f"an iterator gives bytes, records as dictionaries, or addresses, not {type(first).__name__}")


def _of_array(array: Any) -> Body:
    """An array of numpy: addresses, or records with names."""
    if getattr(array.dtype, "names", None):
        columns = {name: array[name] for name in array.dtype.names}
        return body_of(library("pyarrow").table(columns))
    data = array.astype("<u8", casting="safe" if array.dtype.kind == "u" else "same_kind").tobytes()
    return Body(lambda: data, OCTETS, len(data), query={"record": "gpa8"})


def _arrow(table: Any) -> Iterator[bytes]:
    """A table as a stream of Arrow, a batch at a time."""
    arrow = library("pyarrow")
    reader = arrow.RecordBatchReader.from_stream(table)
    held = io.BytesIO()
    with arrow.ipc.new_stream(held, reader.schema) as writer:
        for batch in reader:
            writer.write_batch(batch)
            yield taken(held)
    yield taken(held)


def _ndjson(records: Iterable[Mapping[str, Any]]) -> Iterator[bytes]:
    source = iter(records)
    while batch := list(itertools.islice(source, _BATCH)):
        yield "".join(f"{json.dumps(record, separators=(',', ':'))}\n" for record in batch).encode()


def _by_magic(head: bytes, default: str) -> str:
    if head.startswith(b"ARROW1"):
        raise BadInput("this is a file of Arrow (Feather), which is read from its end: send a stream, or its table")
    return next((media for magic, media in _MAGIC if head.lstrip().startswith(magic)), default)
