"""Footprints and policies in files: read, written, and told of in a line when they are wrong."""

from __future__ import annotations

import hashlib
import re
import secrets
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO, cast

from engine.errors import EngineError
from engine.footprint import stored
from engine.footprint.build import Builder
from engine.footprint.places import By, Footprint, Origin
from engine.kvm.protections import Protection
from engine.kvm.slots import SlotSpec
from scale import sources
from scale.errors import ScaleError
from scale.groups import Piece, Rows
from scale.sources import Source
from service import __version__
from service.cli.numbers import parse_range as ram_range
from service.cli.policy_files import named_policies, read_policy
from service.cli.progress import Move
from service.cli.trace import addressed
from service.cli.trace_options import Address
from service.cli.trace_parquet import replacing
from service.platform.failures import Failure, opened
from service.problems import said
from service.runtime import footprint_documents as documents
from service.runtime.trace_files import TraceFile, trace_in

_MEMORY = 64 << 30  # that reading a footprint may take: it is the user's own file
_TIMES = {"ns": 1, "us": 10**3, "ms": 10**6, "s": 10**9}
_HOST_PAGES = {"2MiB": 1 << 21, "1GiB": 1 << 30}


@contextmanager
def told(path: Path | str | None = None) -> Iterator[None]:
    """What the engine refuses, in a line with the name of the file. Raises Failure."""
    try:
        yield
    except EngineError as error:
        raise Failure(said(error) if path is None else f"{path}: {said(error)}") from None


@dataclass(frozen=True, slots=True)
class Reading:
    """How traces are read: the options of ``subpage trace``."""

    format: str
    record: str
    columns: str | None
    skip_unknown: bool
    address: Address | None


def by_of(texts: Sequence[str]) -> By:
    """What places are to be apart by, of ``time:10ms``, ``records:N`` and ``pc``. Raises Failure."""
    found = By()
    for text in texts:
        match = re.fullmatch(r"pc|records:(\d+)|time:(\d+)(ns|us|ms|s)?", text)
        if match is None:
            raise Failure(f"--by {text}: must be time:N (nanoseconds, or with us, ms, s), records:N or pc")
        records, time, unit = match.groups()
        if records is not None:
            found = found._replace(records=int(records))
        elif time is not None:
            found = found._replace(time=int(time) * _TIMES[unit or "ns"])
        else:
            found = found._replace(pc=True)
        if "0" in (records, time):
            raise Failure(f"--by {text}: must be at least 1")
    with told():
        found.validate()
    return found


@dataclass(frozen=True, slots=True)
class Reducing:
    """What makes the footprint of one trace; it is sent to workers, if there are some."""

    level: str
    by: By
    reading: Reading

    @property
    def how(self) -> str:
        """Everything that what comes of a trace depends on beside."""
        return f"{__version__} {self.reading}"

    def __call__(self, source: Source, piece: Piece | None = None) -> Footprint:
        """Raises ScaleError."""
        try:
            return self.followed(source, lambda share, **said: None, "", piece)
        except Failure as failure:
            raise ScaleError(str(failure)) from None

    def followed(self, source: Source, move: Move, beside: str = "", piece: Piece | None = None) -> Footprint:
        """The same, with ``beside`` said while it is read. Raises Failure, ScaleError."""
        with sources.opened(source) if sources.is_address(source.name) else opened(Path(source.name)) as file:
            if piece is not None:
                return self._piece(source, piece, file, move)
            digest = hashlib.file_digest(cast(Any, file), "sha256").hexdigest()
            file.seek(0)
            how = self.reading
            trace = trace_in(file, source.size, source.name, how.format, how.record, how.skip_unknown, how.columns)
            return self._built(source, trace, digest, move, beside)

    def _piece(self, source: Source, piece: Piece, file: Any, move: Move) -> Footprint:
        """Of some row groups: without the digest, which is of a whole file."""
        called = f"{source.name}, counted from record {piece.record:,}"
        trace = trace_in(cast(BinaryIO, Rows(file, piece)), source.size, called, "arrow")
        found = self._built(source, trace, "", move, first=piece.record)
        (origin,) = found.origins
        return replace(found, origins=(origin._replace(format="parquet", records=origin.records - piece.record),))

    def _built(
        self, source: Source, trace: TraceFile, digest: str, move: Move, beside: str = "", first: int = 0
    ) -> Footprint:
        # The numbers of the hash are nobody's choice: no trace is slow on purpose.
        builder = Builder(self.level, self.by, mix=(secrets.randbits(63), secrets.randbits(63)))
        builder.records_done = first  # indices, and buckets of them, are those of the file
        for chunk in trace:
            _address(trace, self.reading.address)
            with told(source.name):
                builder.feed(chunk.moved(addressed(chunk, trace, self.reading.address), chunk.gva))
            done = f"{builder.records_done:,} records, {builder.places:,} places{beside}"
            move(trace.progress.share, done=done)
        address = _address(trace, self.reading.address)
        return builder.finish(Origin(digest, 0, trace.format_name, (), address, source.label))


def _address(trace: TraceFile, wanted: Address | None) -> str:
    """Which addresses are counted. Raises Failure for those that the guest's page tables must translate."""
    taken = trace.reader.taken
    virtual = taken is not None and taken.address == "guest-virtual" and wanted is not Address.FLAT
    if virtual or wanted is Address.GVA:
        raise Failure(
            f"{trace.path}: virtual addresses of a guest go through its page tables, which change while it runs: "
            "replay the trace with address=gva, or take them as they are with --address flat"
        )
    process = taken is not None and taken.address == "process-virtual"
    return "flat" if process or wanted is Address.FLAT else "gpa"


def loaded(path: Path) -> Footprint:
    """The footprint in a file. Raises Failure."""
    with opened(path) as file, told(path):
        return stored.read(file, _MEMORY)


def is_one(path: Path) -> bool:
    """Whether a file says that it is a footprint. Raises Failure."""
    with opened(path) as file:
        return stored.recognised(file, _MEMORY)


def saved(footprint: Footprint, path: Path) -> None:
    """Write the file, whole or not at all. Raises Failure."""
    with told(path), replacing(path) as beside, beside.open("wb") as file:
        stored.write(footprint, file)


def check_output(path: Path, others: Sequence[Path]) -> None:
    """Refuse to write what is read. Raises Failure."""
    if path.is_dir():
        raise Failure(f"-o {path}: is a folder, not a file")
    if any(path.exists() and other.exists() and path.samefile(other) for other in others):
        raise Failure(f"-o {path}: is a file that is read")


def one_policy(path: Path) -> Protection:
    """The policy in a file. Raises Failure."""
    return read_policy(path).protection()


def policies_of(paths: Sequence[Path], move: Callable[[float], object]) -> dict[str, Protection]:
    """Policies by name, those of folders in order of their files. Raises Failure."""
    return {name: policy.protection() for name, policy in named_policies(paths, read_policy, move).items()}


def slots_of(texts: Sequence[str]) -> Iterator[SlotSpec]:
    """Memory slots of ``GPA:SIZE[:ro][:2MiB]``. Raises BadParameter, Failure."""
    for number, text in enumerate(texts):
        gpa, _, rest = text.partition(":")
        size, *flags = rest.split(":")
        begin, end = ram_range(f"{gpa}:{size}")
        wrong = [flag for flag in flags if flag != "ro" and flag not in _HOST_PAGES]
        if wrong:
            raise Failure(f"--memory-slots {text}: {wrong[0]} must be ro, {' or '.join(_HOST_PAGES)}")
        pages = next((_HOST_PAGES[flag] for flag in flags if flag in _HOST_PAGES), 4096)
        yield SlotSpec(number, begin, end - begin, "ro" in flags, pages)


def budget_of(footprint: Footprint, per_second: float | None, per_million: float | None) -> float | None:
    """How many exits a policy may cost on a footprint. Raises Failure."""
    try:
        return documents.budget_of(footprint, per_second, per_million)
    except EngineError as error:
        raise Failure(f"--{str(error.field).replace('_', '-')}: {error.rule.replace('per_', '--per-')}") from None
