"""Footprints of files that the operator lets clients name: each file's, added up."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Protocol, cast

from engine.errors import InvalidValue, LimitExceeded, TraceError
from engine.footprint.combine import merge
from engine.footprint.places import ROW_GROUP, WRITTEN_BYTES, By, Footprint
from engine.trace.readers import Budget
from scale.errors import ScaleError
from scale.groups import Piece
from scale.sources import Source
from scale.tree import Tree
from service.platform.failures import Failure
from service.platform.source_places import places_of
from service.runtime.footprint_builds import Collecting
from service.runtime.source_files import Bounds, Check, Files, asked_for
from service.runtime.trace_files import trace_in
from service.runtime.work_progress import Told
from service.settings import Settings

_LONGEST_NAME = 255  # that a footprint has of a trace
_WHAT = "footprints that are added up"


@dataclass(frozen=True, slots=True)
class SourcesRequest:
    """What the client asked for: names of files or patterns, and how they are read. ``by`` as ``By`` has it."""

    sources: tuple[str, ...]
    level: str
    by: By
    trace_format: str = "auto"
    layout: str = "record16"
    skip_unknown: bool = False
    columns: str | None = None
    address: str = "gpa"
    format: ClassVar[str] = ""
    record: ClassVar[str | None] = None
    start: ClassVar[int] = 0


@dataclass(frozen=True, slots=True)
class Allowed:
    """What the operator allows a tenant, without the secrets of the settings: it may be sent to other machines."""

    sources: tuple[str, ...]
    tenant: str
    max_source_files: int
    max_source_bytes: int
    body_memory_bytes: int
    footprint_memory_bytes: int

    @classmethod
    def of(cls, settings: Settings, tenant: str) -> Allowed:
        return cls(
            settings.footprint_sources,
            tenant,
            settings.max_source_files,
            settings.max_source_bytes,
            settings.body_memory_bytes,
            settings.footprint_memory_bytes,
        )

    def files(self, check: Check = lambda: None) -> Files:
        """Raises NotAllowed where there is no place for the tenant."""
        bounds = Bounds(self.max_source_files, self.max_source_bytes)
        return Files(places_of(self.sources, self.tenant), bounds, check)

    def found(self, wanted: SourcesRequest, check: Check = lambda: None) -> list[Source]:
        """The files that are meant. Raises InvalidValue, LimitExceeded, and what ``check`` does."""
        asked = asked_for(wanted.sources, self.sources, self.tenant)
        return self.files(check).found(asked)


class SourceFault(ScaleError):
    """What is wrong with a file, as it comes from another process: the members of a problem."""

    def __init__(self, code: str, rule: str, field: str | None = None, index: int | None = None) -> None:
        super().__init__(code, rule, field, index)
        self.code, self.rule, self.field, self.index = code, rule, field, index

    def __str__(self) -> str:
        return self.rule

    @classmethod
    def of(cls, error: InvalidValue | LimitExceeded) -> SourceFault:
        """What another process is told of an error."""
        shown = error.value is not None and not isinstance(error, TraceError)
        rule = f"{error.rule} (got {error.value})" if shown else error.rule
        return cls(error.code, rule, error.field, getattr(error, "index", None))

    def raised(self) -> InvalidValue | LimitExceeded:
        """The same as this process would have raised it."""
        if self.code == TraceError.code:
            return TraceError(self.rule, index=self.index, field=self.field)
        kind = LimitExceeded if self.code == LimitExceeded.code else InvalidValue
        return kind(self.rule, field=self.field)


@contextmanager
def _about(source: Source) -> Iterator[None]:
    """What is wrong in a file, with its name. Raises InvalidValue."""
    try:
        yield
    except TraceError as error:
        rule = error.rule if error.field is None else f"{error.field}: {error.rule}"
        raise TraceError(f"{source.name}: {rule}", index=error.index, value=error.value) from None
    except Failure as failure:
        raise TraceError(str(failure)) from None


def reduced(
    wanted: SourcesRequest,
    source: Source,
    files: Files,
    memory: Budget,
    room: Budget,
    follow: Callable[[int, float], object] = lambda records, share: None,
) -> Footprint:
    """The footprint of one file. ``follow`` is told its records and its share so far. Raises InvalidValue, what a
    budget does, and what the check of ``files`` does."""
    with files.opened(source) as raw, _about(source):
        digest = hashlib.file_digest(cast(Any, raw), "sha256").hexdigest()
        raw.seek(0)
        how = (wanted.trace_format, wanted.layout, wanted.skip_unknown, wanted.columns)
        trace = trace_in(raw, source.size, source.name, *how, memory, files.longest)
        building = Collecting(wanted.level, wanted.by, wanted.address, room)
        for chunk in trace:
            building.feed(chunk)
            follow(building.records_done, trace.progress.share)
        return building.finish(digest, trace.format_name, source.label[:_LONGEST_NAME])


class _Following:
    """Tells how far the work on files is that have ``size`` bytes together."""

    def __init__(self, told: Told, size: int) -> None:
        self._told, self._total = told, size or 1
        self._source: Source | None = None
        self._size = self._records = 0  # of those that were done before

    def begin(self, source: Source) -> None:
        """The one before is done, and this is the next."""
        if self._source is not None:
            self._size += self._source.size
        self._source, self._records = source, self._told.records_done

    def __call__(self, records: int, share: float) -> None:
        """So much of the file is done."""
        assert self._source is not None
        self._told.records_done = self._records + records
        self._told.share = (self._size + share * self._source.size) / self._total


class Builds(Protocol):
    """What builds a footprint of files. Blocking, for a thread of its own."""

    def footprint(self, told: Told) -> Footprint:
        """``told`` tells how far it is."""
        ...


class Building:
    """A footprint of many files in this process. Blocking, for a thread of its own."""

    def __init__(
        self,
        wanted: SourcesRequest,
        allowed: Allowed,
        check: Check,
        bodies: Callable[[], AbstractContextManager[Budget]],
        room: Budget,
    ) -> None:
        """``bodies`` gives what reading one file may take, ``room`` is the memory of all footprints."""
        self._wanted, self._allowed, self._check = wanted, allowed, check
        self._bodies, self._room = bodies, room

    def footprint(self, told: Told) -> Footprint:
        """Raises InvalidValue, LimitExceeded, ShareExceeded, and what ``check`` does."""
        sources = self._allowed.found(self._wanted, self._check)
        files = self._allowed.files(self._check)
        following = _Following(told, sum(source.size for source in sources))
        tree: Tree[Footprint] = Tree(self._added)
        for source in sources:
            following.begin(source)
            with self._bodies() as memory:
                tree.add(reduced(self._wanted, source, files, memory, self._room, following))
        found = tree.close()
        assert found is not None
        self._room.check(min(len(found), ROW_GROUP) * WRITTEN_BYTES, "the file of a footprint")
        return found

    def _added(self, parts: Sequence[Footprint]) -> Footprint:
        def more(size: int) -> None:
            self._check()
            self._room.check(size, _WHAT)

        found = merge(parts, more)
        self._room.keep(found.nbytes - sum(part.nbytes for part in parts), _WHAT)
        return found


@dataclass(frozen=True, slots=True)
class Reducing:
    """The same of one file by a worker of a cluster, with its own memory."""

    wanted: SourcesRequest
    allowed: Allowed

    def __call__(self, source: Source, piece: Piece | None = None) -> Footprint:
        """Raises SourceFault."""
        memory, room = Budget(self.allowed.body_memory_bytes), Budget(self.allowed.footprint_memory_bytes)
        try:
            return reduced(self.wanted, source, self.allowed.files(), memory, room)
        except (InvalidValue, LimitExceeded) as error:
            raise SourceFault.of(error) from None


def timed(check: Check, seconds: float) -> Check:
    """``check`` that raises LimitExceeded after ``seconds``, 0 for any time."""
    until = time.monotonic() + seconds if seconds else math.inf

    def checked() -> None:
        check()
        if time.monotonic() > until:
            rule = f"takes longer than {seconds:g} seconds: name fewer files at a time"
            raise LimitExceeded(rule, field="source_seconds", value=seconds)

    return checked


def document_of(wanted: SourcesRequest, allowed: Allowed) -> dict[str, Any]:
    """What another process needs to know, as JSON."""
    return {
        "wanted": {field.name: getattr(wanted, field.name) for field in fields(wanted)},
        "allowed": {field.name: getattr(allowed, field.name) for field in fields(allowed)},
    }


def of_document(document: Mapping[str, Any]) -> tuple[SourcesRequest, Allowed]:
    """The inverse."""
    wanted, allowed = document["wanted"], document["allowed"]
    wanted = {**wanted, "sources": tuple(wanted["sources"]), "by": By(*wanted["by"])}
    return SourcesRequest(**wanted), Allowed(**{**allowed, "sources": tuple(allowed["sources"])})
