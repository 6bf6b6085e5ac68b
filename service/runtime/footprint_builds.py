"""Bodies reduced to footprints, for themselves or beside a replay."""

from __future__ import annotations

import hashlib
import re
import secrets
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Protocol

from engine.errors import InvalidValue
from engine.footprint.build import Builder
from engine.footprint.places import ROW_GROUP, SPANS, WRITTEN_BYTES, By, Footprint, Origin
from engine.trace.addresses import Addresses
from engine.trace.columns import TraceChunk
from engine.trace.readers import Budget, Source, open_trace
from service.problems import InvalidDocument

_PIECE = 1 << 20
_TOGETHER = By()


@dataclass(frozen=True, slots=True)
class FootprintRequest:
    """What the client asked for; see the query parameters of the call. ``level`` None: spans, or what a footprint that
    is the body has. ``longest`` as in ``open_trace``."""

    format: str
    record: str | None = None
    level: str | None = None
    by: By = _TOGETHER
    address: str = "gpa"
    skip_unknown: bool = False
    columns: str | None = None
    name: str = ""
    longest: int = 0
    start: ClassVar[int] = 0


class Progress(Protocol):
    """What is told of the work before it begins."""

    def __call__(self, building: Collecting, /) -> None: ...


def by_of(text: str | None) -> By:
    """What ``by`` says. Raises InvalidDocument."""
    found = By()
    for part in text.split(",") if text is not None else ():
        match = re.fullmatch(r"pc|(records|time):([1-9][0-9]{0,18})", part)
        if match is None or (match[1] is None and found.pc) or (match[1] is not None and found.buckets):
            rule = "must be time:N or records:N, or pc, or one of each with a comma between them"
            raise InvalidDocument(rule, field="by", value=text)
        if match[1] is None:
            found = found._replace(pc=True)
        elif match[1] == "time":
            found = found._replace(time=int(match[2]))
        else:
            found = found._replace(records=int(match[2]))
    found.validate()
    return found


class Collecting:
    """A footprint that grows with a trace, in memory of ``room``. ``records_done`` may be read from other threads."""

    def __init__(self, level: str, by: By, address: str, room: Budget) -> None:
        # The numbers of the hash are nobody's choice: no trace is slow on purpose.
        self._builder = Builder(level, by, mix=(secrets.randbits(63), secrets.randbits(63)), budget=room)
        self._addresses = Addresses(address, modelled=False)
        self._address = address
        self._room = room
        self.footprint: Footprint | None = None

    @property
    def records_done(self) -> int:
        return self._builder.records_done

    def feed(self, chunk: TraceChunk) -> None:
        """Raises what ``Builder.feed`` does."""
        self._builder.feed(self._addresses.of(chunk, self._builder.records_done))

    def finish(self, digest: str, format: str, name: str = "") -> Footprint:
        """The footprint of what was fed. Raises what a budget does."""
        self._room.check(self._builder.finishing, "the places of a footprint")
        self.footprint = self._builder.finish(Origin(digest, 0, format, (), self._address, name))
        self._room.keep(self.footprint.nbytes, "the places of a footprint")
        self._room.check(min(len(self.footprint), ROW_GROUP) * WRITTEN_BYTES, "the file of a footprint")
        return self.footprint

    def known_as(self, digest: str) -> Footprint:
        """What was collected, of a trace that this tells apart."""
        assert self.footprint is not None
        (origin,) = self.footprint.origins
        return replace(self.footprint, origins=(origin._replace(digest=digest),))


class _Hashed:
    """A body that is hashed while it is read."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._hash = hashlib.sha256()
        into = getattr(source, "readinto", None)
        if into is not None:
            self.readinto = self._hashing(into)

    def read(self, size: int = -1) -> bytes:
        data = self._source.read(size)
        self._hash.update(data)
        return data

    def _hashing(self, into: Callable[[memoryview], int]) -> Callable[[memoryview], int]:
        def readinto(target: memoryview) -> int:
            count = into(target)
            self._hash.update(memoryview(target)[:count])
            return count

        return readinto

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return False

    @property
    def closed(self) -> bool:
        return False

    def digest(self) -> str:
        """Of the whole body, whose rest is read first."""
        while self.read(_PIECE):
            pass
        return self._hash.hexdigest()


def build(
    request: FootprintRequest,
    source: Any,
    check: Callable[[], None],
    memory: Budget,
    room: Budget,
    follow: Progress = lambda building: None,
) -> Footprint:
    """The footprint of a body; blocking, for a thread of its own. A Parquet body, which can be sought in, may be a
    footprint itself.

    ``check`` is called before every chunk, and raises when nobody wants it any more; ``memory`` is what the body may
    take while it is read, ``room`` what the footprint may. Raises what readers do, and ``Builder.feed``.
    """
    if request.format == "parquet":
        from engine.footprint import stored  # noqa: PLC0415 - the Arrow library is 33 MB

        if stored.recognised(source, memory):
            return _taken(request, stored.read(source, room, check), room)
        digest = hashlib.file_digest(_Blocks(source, check), "sha256").hexdigest()
        source.seek(0)
        return _built(request, source, lambda: digest, check, memory, room, follow)
    hashed = _Hashed(source)
    return _built(request, hashed, hashed.digest, check, memory, room, follow)


class _Blocks:
    """What ``hashlib.file_digest`` asks of a file. ``check`` is called for each block."""

    def __init__(self, source: Any, check: Callable[[], None]) -> None:
        self._into = source.readinto
        self._check = check

    def readinto(self, target: bytearray) -> int:
        self._check()
        return int(self._into(target))

    def readable(self) -> bool:
        return True


def _built(
    request: FootprintRequest,
    source: Any,
    digest: Callable[[], str],
    check: Callable[[], None],
    memory: Budget,
    room: Budget,
    follow: Progress,
) -> Footprint:
    reader = open_trace(
        request.format,
        source,
        record=request.record,
        memory=memory,
        skip_unknown=request.skip_unknown,
        columns=request.columns,
        longest=request.longest,
    )
    building = Collecting(request.level or SPANS, request.by, request.address, room)
    follow(building)
    for chunk in reader:
        check()
        building.feed(chunk)
    check()
    form = request.format if reader.taken is None else reader.taken.format
    return building.finish(digest(), form, request.name)


def _taken(request: FootprintRequest, found: Footprint, room: Budget) -> Footprint:
    """A footprint that was the body, at the level that was asked for. Raises InvalidValue for one that is not there to
    be had."""
    from engine.footprint.combine import coarser  # noqa: PLC0415

    for name, given in (
        ("name", request.name),
        ("columns", request.columns),
        ("skip_unknown", request.skip_unknown),
        ("address", request.address != "gpa"),
    ):
        if given:
            rule = "is about a trace: the body is a footprint, whose traces were read already"
            raise InvalidValue(rule, field=name, value=getattr(request, name))
    by = request.by if any(request.by) else None
    made = coarser(found, request.level, by, lambda size: room.check(size, "the places of a footprint"))
    if made is not found:
        room.keep(made.nbytes, "the places of a footprint")
    room.check(min(len(made), ROW_GROUP) * WRITTEN_BYTES, "the file of a footprint")
    return made
