"""Statements: every read and write of the tables, over a connection that the caller has begun a transaction on."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice

import sqlalchemy as sa

from service.storage import event_rows, side_rows
from service.storage.records import Block, Change, TraceRecord, VmRecord
from service.storage.schema import blocks, owner, trace_parts, traces, vms
from service.storage.upserts import upsert

FREE = "free"
# Blocks of one statement: 1 MiB of data.
_BATCH = 256


class Overtaken(Exception):
    """The row is not what this owner left there: somebody else has written to the store."""


def epoch_of(connection: sa.Connection) -> int:
    """The epoch now; on PostgreSQL no other may begin until this transaction has ended."""
    return int(connection.execute(_EPOCH).scalar_one())


def next_epoch(connection: sa.Connection, holder: str) -> int:
    """Begin a new epoch, and return its number."""
    epoch = int(connection.execute(sa.select(owner.c.epoch).with_for_update()).scalar_one()) + 1
    connection.execute(sa.update(owner).values(epoch=epoch, holder=holder))
    return epoch


def vm_records(connection: sa.Connection, numbers: Sequence[int] | None = None) -> list[VmRecord]:
    """All machines in order of creation, or some of them."""
    wanted = sa.select(*_VM).order_by(vms.c.number)
    if numbers is not None:
        wanted = wanted.where(vms.c.number.in_(numbers))
    return [VmRecord(*row) for row in connection.execute(wanted)]


def block_counts(connection: sa.Connection) -> dict[int, int]:
    """How many blocks each machine has, by its number."""
    counted = sa.select(blocks.c.vm, sa.func.count()).group_by(blocks.c.vm)
    return {int(vm): int(count) for vm, count in connection.execute(counted)}


def vm_record(connection: sa.Connection, number: int) -> VmRecord | None:
    row = connection.execute(sa.select(*_VM).where(vms.c.number == number)).first()
    return VmRecord(*row) if row is not None else None


def vm_blocks(connection: sa.Connection, number: int) -> Iterator[Block]:
    """The blocks of a machine in order."""
    found = connection.execution_options(stream_results=True, max_row_buffer=_BATCH).execute(
        sa.select(blocks.c.kind, blocks.c.block, blocks.c.data).where(blocks.c.vm == number).order_by(blocks.c.block)
    )
    for kind, block, data in found:
        yield kind, block, bytes(data)


def trace_records(connection: sa.Connection, number: int) -> list[TraceRecord]:
    """The results of a machine's replays, oldest first, without their parts."""
    listed = connection.execute(sa.select(*_TRACE).where(traces.c.vm == number).order_by(traces.c.sequence))
    return [TraceRecord(*row[:-1], bytes(row[-1])) for row in listed]


def parts_of(connection: sa.Connection, trace: str) -> list[bytes]:
    """The exit records of one replay."""
    listed = connection.execute(
        sa.select(trace_parts.c.data).where(trace_parts.c.trace == trace).order_by(trace_parts.c.part)
    )
    return [bytes(data) for (data,) in listed]


def trace_part(connection: sa.Connection, number: int, trace: str, part: int) -> tuple[TraceRecord, bytes] | None:
    """A replay's result and one part of its exit records; None when it is not kept."""
    row = connection.execute(
        sa.select(*_TRACE, trace_parts.c.data)
        .join(trace_parts, trace_parts.c.trace == traces.c.id)
        .where(traces.c.vm == number, traces.c.id == trace, trace_parts.c.part == part)
    ).first()
    return None if row is None else (TraceRecord(*row[:5], bytes(row[5])), bytes(row[6]))


def write(connection: sa.Connection, change: Change) -> None:
    """Everything that ``change`` says. Raises Overtaken."""
    for side in change.sides:
        side_rows.write(connection, side)
    if change.after is None:
        if change.before is not None:
            _delete(connection, change)
        return
    record, head = change.after, change.head()
    if change.before is None:
        connection.execute(
            sa.insert(vms).values(
                number=record.number,
                id=record.id,
                created=record.created,
                revision=record.revision,
                head=head,
                tenant=record.tenant,
                next_event=record.next_event,
            )
        )
    else:
        row = {"revision": record.revision, "head": head, "next_event": record.next_event}
        done = connection.execute(_UPDATE, {"vm": change.number, "before": change.before} | row)
        if done.rowcount != 1:
            raise Overtaken
    _write_blocks(connection, change.number, change.blocks())
    for trace in change.traces:
        _write_trace(connection, change.number, trace)
    if change.dropped:
        connection.execute(sa.delete(trace_parts).where(trace_parts.c.trace.in_(change.dropped)))
        connection.execute(sa.delete(traces).where(traces.c.id.in_(change.dropped)))
    event_rows.write(connection, change.number, change.log)


def _delete(connection: sa.Connection, change: Change) -> None:
    mine = sa.select(traces.c.id).where(traces.c.vm == change.number)
    connection.execute(sa.delete(trace_parts).where(trace_parts.c.trace.in_(mine)))
    connection.execute(sa.delete(traces).where(traces.c.vm == change.number))
    connection.execute(sa.delete(blocks).where(blocks.c.vm == change.number))
    event_rows.delete(connection, change.number)
    done = connection.execute(sa.delete(vms).where(vms.c.number == change.number, vms.c.revision == change.before))
    if done.rowcount != 1:
        raise Overtaken


def _write_blocks(connection: sa.Connection, number: int, changed: Iterable[Block]) -> None:
    remaining = iter(changed)
    while batch := list(islice(remaining, _BATCH)):
        kept = [
            {"vm": number, "block": block, "kind": kind, "data": data} for kind, block, data in batch if kind != FREE
        ]
        freed = [block for kind, block, _ in batch if kind == FREE]
        if kept:
            connection.execute(upsert(blocks, connection.dialect.name), kept)
        if freed:
            connection.execute(sa.delete(blocks).where(blocks.c.vm == number, blocks.c.block.in_(freed)))


def _write_trace(connection: sa.Connection, number: int, trace: TraceRecord) -> None:
    row = {
        "vm": number,
        "sequence": trace.sequence,
        "created": trace.created,
        "exit_records": trace.exit_records,
        "head": trace.head,
        "object_index": trace.object_index,
    }
    if trace.goes_on:
        later = (trace_parts.c.trace == trace.id, trace_parts.c.part >= trace.first_part)
        connection.execute(sa.update(traces).where(traces.c.id == trace.id).values(row))
        connection.execute(sa.delete(trace_parts).where(*later))
    else:
        connection.execute(sa.insert(traces).values(row | {"id": trace.id}))
    for part, data in enumerate(trace.parts, trace.first_part):
        connection.execute(sa.insert(trace_parts).values(trace=trace.id, part=part, data=data))


_VM = (vms.c.number, vms.c.id, vms.c.created, vms.c.revision, vms.c.head, vms.c.tenant, vms.c.next_event)
_TRACE = (
    traces.c.id,
    traces.c.sequence,
    traces.c.created,
    traces.c.exit_records,
    traces.c.head,
    traces.c.object_index,
)


# The statements of nearly every commit, built once: that takes longer than to execute them.
_EPOCH = sa.select(owner.c.epoch).with_for_update(read=True)
_UPDATE = (
    sa.update(vms)
    .where(vms.c.number == sa.bindparam("vm"), vms.c.revision == sa.bindparam("before"))
    .values({name: sa.bindparam(name) for name in ("revision", "head", "next_event")})
)
