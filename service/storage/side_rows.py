"""Statements about what is no machine's: jobs, answers under Idempotency-Keys, and footprints (``footprint_rows``)."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import asdict
from datetime import UTC, datetime

import sqlalchemy as sa

from service.storage import footprint_rows
from service.storage.records import AnswerRecord, JobRecord, Side
from service.storage.schema import answers, jobs, traces
from service.storage.upserts import upsert

# What a job is while nobody can say how it ends; see ``service.runtime.job``.
UNFINISHED = ("queued", "running")
INTERRUPTED = "interrupted"

_JOB = [jobs.c[name] for name in JobRecord.__dataclass_fields__]
_ANSWER = [answers.c[name] for name in AnswerRecord.__dataclass_fields__]


def write(connection: sa.Connection, side: Side) -> None:
    """Everything that ``side`` says."""
    _replace(connection, jobs, [asdict(job) for job in side.jobs])
    if side.forgotten:
        connection.execute(sa.delete(jobs).where(jobs.c.id.in_(side.forgotten)))
    if side.expired:
        connection.execute(sa.delete(answers).where(answers.c.until <= side.expired))
    _replace(connection, answers, [asdict(answer) for answer in side.answers])
    footprint_rows.write(connection, side.footprints, side.dropped)


def _replace(connection: sa.Connection, table: sa.Table, rows: Sequence[dict[str, object]]) -> None:
    if not rows:
        return
    connection.execute(upsert(table, connection.dialect.name), list(rows))


def take_over(connection: sa.Connection, *, goes_on: bool) -> list[JobRecord]:
    """All jobs in the order of their acceptance, for a new owner of the store: what another owner had under way was
    interrupted. With ``goes_on`` there was no other."""
    if not goes_on:
        now = datetime.now(UTC).isoformat()
        left = sa.update(jobs).where(jobs.c.state.in_(UNFINISHED))
        connection.execute(left.values(state=INTERRUPTED, finished=now))
    return [JobRecord(*row) for row in connection.execute(sa.select(*_JOB).order_by(jobs.c.number))]


def job_record(connection: sa.Connection, job: str) -> JobRecord | None:
    row = connection.execute(sa.select(*_JOB).where(jobs.c.id == job)).first()
    return JobRecord(*row) if row is not None else None


def kept_traces(connection: sa.Connection, ids: Collection[str]) -> set[str]:
    """Those among ``ids`` that are ids of results in the store."""
    return set(connection.execute(sa.select(traces.c.id).where(traces.c.id.in_(ids))).scalars())


def answer_record(connection: sa.Connection, owner: str, key: str, now: int) -> AnswerRecord | None:
    """The answer under a key, unless its time ended at ``now`` (ms)."""
    found = sa.select(*_ANSWER).where(answers.c.owner == owner, answers.c.key == key, answers.c.until > now)
    row = connection.execute(found).first()
    if row is None:
        return None
    record = AnswerRecord(*row)
    return AnswerRecord(**{**asdict(record), "fingerprint": bytes(record.fingerprint), "body": bytes(record.body)})


def answers_used(connection: sa.Connection, owner: str, now: int) -> int:
    """Bytes that the answers of ``owner`` take at ``now`` (ms)."""
    total = sa.select(sa.func.coalesce(sa.func.sum(answers.c.size), 0))
    return int(connection.execute(total.where(answers.c.owner == owner, answers.c.until > now)).scalar_one())
