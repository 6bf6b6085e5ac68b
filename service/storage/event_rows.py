"""Statements on the event logs, over a connection that the caller has begun a transaction on."""

from __future__ import annotations

from collections.abc import Iterator

import sqlalchemy as sa

from service.storage.records import EventRecord, LogChange, LogPruning
from service.storage.schema import events

# Rows of one statement, and those that one pruning by age may take: more than are added between two.
_BATCH = 500
_OLDEST = 2048


def write(connection: sa.Connection, number: int, log: LogChange) -> None:
    """Add the rows, then prune."""
    if log.events:
        connection.execute(_INSERT, [{"vm": number, **_row(event)} for event in log.events])
    if log.pruning is not None:
        _prune(connection, number, log.pruning)


def _row(event: EventRecord) -> dict[str, object]:
    return {name: getattr(event, name) for name in EventRecord.__dataclass_fields__}


def _prune(connection: sa.Connection, number: int, pruning: LogPruning) -> None:
    mine = events.c.vm == number
    newest = sa.select(events.c.first).where(mine).order_by(events.c.first.desc())
    oldest_kept = newest.limit(1).offset(pruning.kept - 1).scalar_subquery()
    connection.execute(sa.delete(events).where(mine, events.c.first < oldest_kept))
    if pruning.since:
        oldest = sa.select(events.c.first).where(mine).order_by(events.c.first).limit(_OLDEST)
        connection.execute(sa.delete(events).where(mine, events.c.created < pruning.since, events.c.first.in_(oldest)))


def read(connection: sa.Connection, number: int, after: int, below: int, since: str, limit: int) -> list[EventRecord]:
    """Up to ``limit`` rows with an event whose id is above ``after``, of those that begin below the id ``below``.

    Rows created before ``since`` are left out, in whatever place they are.
    """
    found = connection.execute(
        sa.select(*_EVENT)
        .where(
            events.c.vm == number,
            # The row that holds the id `after + 1` may begin before it; the index finds that beginning at once.
            events.c.first >= sa.func.coalesce(_row_of(number, after), after + 1),
            events.c.first + events.c.count > after + 1,
            events.c.first < below,
            events.c.created >= since,
        )
        .order_by(events.c.first)
        .limit(limit)
    )
    return [EventRecord(*row) for row in found]


def _row_of(number: int, after: int) -> sa.ScalarSelect[int]:
    return (
        sa.select(events.c.first)
        .where(events.c.vm == number, events.c.first <= after + 1)
        .order_by(events.c.first.desc())
        .limit(1)
        .scalar_subquery()
    )


def every(connection: sa.Connection, number: int) -> Iterator[list[EventRecord]]:
    """A whole log, some rows at a time."""
    after = 0
    while found := read(connection, number, after, _NO_ID, "", _BATCH):
        yield found
        after = found[-1].first + found[-1].count - 1


def delete(connection: sa.Connection, number: int) -> None:
    """The log of a machine that goes."""
    connection.execute(sa.delete(events).where(events.c.vm == number))


_NO_ID = (1 << 63) - 1
_INSERT = sa.insert(events)
_EVENT = (events.c.first, events.c.count, events.c.created, events.c.kind, events.c.body, events.c.trace)
