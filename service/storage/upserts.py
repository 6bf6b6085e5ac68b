"""Rows that are inserted, or replace those with the same key."""

from __future__ import annotations

from functools import cache

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite


@cache
def upsert(table: sa.Table, dialect: str) -> sa.Insert:
    """The statement for a table in the dialect of that name; building it takes longer than to execute it."""
    statement = postgresql.insert(table) if dialect == "postgresql" else sqlite.insert(table)
    keys = [column.name for column in table.primary_key]
    changed = {column.name: statement.excluded[column.name] for column in table.c if column.name not in keys}
    return statement.on_conflict_do_update(index_elements=keys, set_=changed)
