"""What is read outside of the owner's thread: machines when they are first asked for, results of old replays."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import sqlalchemy as sa
from sqlalchemy.exc import SQLAlchemyError

from service.problems import StoreUnavailable, trace_not_kept
from service.storage import event_rows, footprint_rows, rows, side_rows
from service.storage.database import reason_of
from service.storage.records import AnswerRecord, EventRecord, FootprintRecord, JobRecord, TraceRecord, VmRecord


@dataclass(frozen=True, slots=True)
class StoredMachine:
    """All of one machine. ``blocks`` maps (kind, number) to 4096 bytes."""

    record: VmRecord
    blocks: dict[tuple[str, int], bytes]
    traces: list[TraceRecord]


class Reader:
    """Blocking reads, for threads. Raises StoreUnavailable."""

    def __init__(self, engine: sa.Engine) -> None:
        self._engine = engine

    @contextmanager
    def _transaction(self) -> Iterator[sa.Connection]:
        try:
            with self._engine.connect() as connection, connection.begin():
                yield connection
        except SQLAlchemyError as error:
            raise StoreUnavailable(f"the store could not be read: {reason_of(error)}") from error

    def revision(self, number: int) -> int | None:
        """The stored revision of a machine, None if there is no such machine."""
        with self._transaction() as connection:
            record = rows.vm_record(connection, number)
            return record.revision if record is not None else None

    def heads(self, numbers: Sequence[int]) -> list[VmRecord]:
        """Those of these machines that exist, without their blocks."""
        with self._transaction() as connection:
            return rows.vm_records(connection, numbers)

    def machine(self, number: int) -> StoredMachine | None:
        """A machine as one transaction sees it."""
        with self._transaction() as connection:
            record = rows.vm_record(connection, number)
            if record is None:
                return None
            found = {(kind, block): data for kind, block, data in rows.vm_blocks(connection, number)}
            return StoredMachine(record, found, rows.trace_records(connection, number))

    def trace(self, number: int, trace: str) -> tuple[TraceRecord, list[bytes]]:
        """A replay's result and its exit records. Raises NotFound when it has been dropped meanwhile."""
        with self._transaction() as connection:
            for record in rows.trace_records(connection, number):
                if record.id == trace:
                    return record, rows.parts_of(connection, trace)
        raise trace_not_kept(trace)

    def trace_part(self, number: int, trace: str, part: int) -> tuple[TraceRecord, bytes] | None:
        """One part of a replay's exit records, None when they are not kept."""
        with self._transaction() as connection:
            return rows.trace_part(connection, number, trace, part)

    def events(self, number: int, after: int, below: int, since: str, limit: int) -> list[EventRecord]:
        """Rows of an event log; see ``event_rows.read``."""
        with self._transaction() as connection:
            return event_rows.read(connection, number, after, below, since, limit)

    def kept_traces(self, ids: Collection[str]) -> set[str]:
        """Those among ``ids`` whose results are kept."""
        with self._transaction() as connection:
            return side_rows.kept_traces(connection, ids)

    def job(self, job: str) -> JobRecord | None:
        """A job as it is stored."""
        with self._transaction() as connection:
            return side_rows.job_record(connection, job)

    def answer(self, owner: str, key: str, now: int) -> AnswerRecord | None:
        """The answer under a key of ``owner``, unless its time ended at ``now`` (ms)."""
        with self._transaction() as connection:
            return side_rows.answer_record(connection, owner, key, now)

    def answers_used(self, owner: str, now: int) -> int:
        """Bytes that the answers of ``owner`` take at ``now`` (ms)."""
        with self._transaction() as connection:
            return side_rows.answers_used(connection, owner, now)

    def footprints(self, tenant: str, after: str, limit: int | None) -> list[FootprintRecord]:
        """See ``footprint_rows.listed``."""
        with self._transaction() as connection:
            return footprint_rows.listed(connection, tenant, after, limit)

    def footprints_called(self, ids: Collection[str]) -> list[FootprintRecord]:
        """Those of these that are kept, without their files."""
        with self._transaction() as connection:
            return footprint_rows.found(connection, ids)

    def footprints_before(self, created: str) -> list[str]:
        """See ``footprint_rows.older``."""
        with self._transaction() as connection:
            return footprint_rows.older(connection, created)

    def footprint_part(self, footprint: str, part: int) -> bytes | None:
        """See ``footprint_rows.part_of``."""
        with self._transaction() as connection:
            return footprint_rows.part_of(connection, footprint, part)
