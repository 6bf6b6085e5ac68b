"""Statements about footprints, which belong to a tenant and to no machine."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

import sqlalchemy as sa

from service.storage.records import FootprintRecord
from service.storage.schema import footprint_parts, footprints

_AT_ONCE = 1000  # ids in one statement, which takes some ten thousand parameters at most
_HEAD = tuple(footprints.c[name] for name in ("id", "tenant", "vm", "created", "size", "head"))


def write(connection: sa.Connection, added: Sequence[FootprintRecord], dropped: Collection[str]) -> None:
    """Drop some, then add others."""
    for some in _batches(dropped):
        connection.execute(sa.delete(footprint_parts).where(footprint_parts.c.footprint.in_(some)))
        connection.execute(sa.delete(footprints).where(footprints.c.id.in_(some)))
    for record in added:
        row = {column.name: getattr(record, column.name) for column in _HEAD}
        connection.execute(sa.insert(footprints).values(row))
        for part, data in enumerate(record.parts):
            connection.execute(sa.insert(footprint_parts).values(footprint=record.id, part=part, data=data))


def listed(
    connection: sa.Connection, tenant: str | None, after: str = "", limit: int | None = None
) -> list[FootprintRecord]:
    """Those of a tenant, or of all, that were created ``after`` a time, oldest first, without their files."""
    wanted = sa.select(*_HEAD).where(footprints.c.created > after).order_by(footprints.c.created, footprints.c.id)
    if tenant is not None:
        wanted = wanted.where(footprints.c.tenant == tenant)
    return [FootprintRecord(*row) for row in connection.execute(wanted.limit(limit))]


def found(connection: sa.Connection, ids: Collection[str]) -> list[FootprintRecord]:
    """Those of these that there are, without their files."""
    wanted = [sa.select(*_HEAD).where(footprints.c.id.in_(some)) for some in _batches(ids)]
    return [FootprintRecord(*row) for statement in wanted for row in connection.execute(statement)]


def parts_of(connection: sa.Connection, footprint: str) -> list[bytes]:
    """The file of a footprint; nothing when it is not kept."""
    part = footprint_parts.c
    read = sa.select(part.data).where(part.footprint == footprint).order_by(part.part)
    return [bytes(data) for (data,) in connection.execute(read)]


def part_of(connection: sa.Connection, footprint: str, number: int) -> bytes | None:
    """One part of the file of a footprint; None when it is not kept or has no such part."""
    part = footprint_parts.c
    read = sa.select(part.data).where(part.footprint == footprint, part.part == number)
    found = connection.execute(read).scalar()
    return None if found is None else bytes(found)


def older(connection: sa.Connection, created: str) -> list[str]:
    """Ids of those of all tenants that were created before a time, oldest first, as many as one statement drops."""
    wanted = sa.select(footprints.c.id).where(footprints.c.created < created).order_by(footprints.c.created)
    return [name for (name,) in connection.execute(wanted.limit(_AT_ONCE))]


def _batches(ids: Collection[str]) -> Iterator[list[str]]:
    rest = list(ids)
    return (rest[at : at + _AT_ONCE] for at in range(0, len(rest), _AT_ONCE))
