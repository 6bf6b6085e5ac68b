"""Connections to the two databases, and what their errors mean to a client."""

from __future__ import annotations

import sqlite3
from typing import Any

import sqlalchemy as sa
from sqlalchemy import event
from sqlalchemy.pool import ConnectionPoolEntry

from service.platform.files import make_private
from service.storage.urls import SQLITE, StoreUrl

# A lost peer must be noticed in seconds, not in the hours of TCP's defaults.
_POSTGRESQL = {
    "connect_timeout": 5,
    "keepalives_idle": 5,
    "keepalives_interval": 2,
    "keepalives_count": 3,
    "tcp_user_timeout": 15_000,
    "application_name": "subpage",
}


def connect(url: StoreUrl) -> sa.Engine:
    """An engine whose transactions see one state of the store from their beginning to their end."""
    if url.kind == SQLITE:
        assert url.path is not None
        path = url.path
        engine = sa.create_engine(
            sa.URL.create("sqlite", database=str(url.path)), connect_args={"timeout": 10.0, "isolation_level": None}
        )
        event.listen(engine, "do_connect", lambda *_: make_private(path))
        event.listen(engine, "connect", _prepare_sqlite)
        event.listen(engine, "begin", _begin_sqlite)
        return engine
    address = sa.make_url(url.text).set(drivername="postgresql+psycopg")
    return sa.create_engine(
        address, pool_pre_ping=True, isolation_level="REPEATABLE READ", connect_args=dict(_POSTGRESQL)
    )


def _prepare_sqlite(connection: sqlite3.Connection, _: ConnectionPoolEntry) -> None:
    cursor = connection.cursor()
    cursor.execute("PRAGMA journal_mode = WAL")
    cursor.execute("PRAGMA synchronous = FULL")
    cursor.execute("PRAGMA foreign_keys = ON")
    cursor.close()


def _begin_sqlite(connection: sa.Connection) -> None:
    # The driver's own way begins late and commits before DDL; with isolation_level None it leaves both to us.
    statement = "BEGIN IMMEDIATE" if connection.get_execution_options().get("writes", False) else "BEGIN"
    driver = connection.connection.dbapi_connection
    assert isinstance(driver, sqlite3.Connection)
    try:
        # By the driver itself: on the way of other statements this takes as long as writing all that a change writes.
        driver.execute(statement)
    except sqlite3.Error as error:
        raise sa.exc.DBAPIError.instance(statement, None, error, sqlite3.Error, dialect=connection.dialect) from error


def reason_of(error: BaseException) -> str:
    """What is wrong with the store, for people; nothing of statements or values."""
    cause: Any = getattr(error, "orig", None) or error
    name = getattr(cause, "sqlite_errorname", "")
    state = getattr(cause, "sqlstate", None) or ""
    for table, key in ((_SQLITE_REASONS, name), (_POSTGRESQL_REASONS, state)):
        for prefix, reason in table.items():
            if key.startswith(prefix):
                return reason
    if isinstance(cause, OSError):
        return (cause.strerror or "it cannot be reached").lower()
    return "it cannot be reached" if not name else f"it reports {name}"


_SQLITE_REASONS = {
    "SQLITE_FULL": "the disk is full",
    "SQLITE_READONLY": "it is read-only",
    "SQLITE_BUSY": "another process holds its lock",
    "SQLITE_CORRUPT": "the file is damaged",
    "SQLITE_NOTADB": "the file is not a database",
    "SQLITE_CANTOPEN": "the file cannot be opened, or its file system is read-only",
    "SQLITE_IOERR": "writing to the disk failed",
}
_POSTGRESQL_REASONS = {
    "53100": "the disk is full",
    "53": "the database server lacks resources",
    "25006": "it is read-only",
    "57P": "the database server is shutting down or starting",
    "58": "writing to the disk failed",
    "42501": "the database user lacks a right",
    "28": "the database server refuses the user",
    "3D000": "the database does not exist",
}
