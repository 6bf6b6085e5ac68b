"""The smaller parts of the store: addresses, columns as blobs, migrations, results as records, reasons of errors."""

from __future__ import annotations

import asyncio
import sqlite3
from concurrent.futures import Future
from pathlib import Path

import numpy as np
import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy.exc import OperationalError

import service.storage
from service.runtime.offload import finished
from service.runtime.traces import TraceStore
from service.settings import Settings
from service.storage.columns import pack, unpack
from service.storage.database import connect, reason_of
from service.storage.migrate import migrate
from service.storage.schema import REVISION, metadata
from service.storage.urls import StoreUrl, default_store


@pytest.mark.parametrize(
    ("text", "kind", "shown"),
    [
        ("memory", "memory", "memory"),
        ("sqlite:///relative.db", "sqlite", "sqlite:///relative.db"),
        ("sqlite:////var/lib/subpage.db", "sqlite", "sqlite:////var/lib/subpage.db"),
        ("postgresql://u:se:cret@h:5/d", "postgresql", "postgresql://(hidden)"),
        ("postgres://h/d", "postgresql", "postgresql://h/d"),
    ],
)
def test_addresses(text: str, kind: str, shown: str) -> None:
    url = StoreUrl.parse(text)
    assert (url.kind, url.shown) == (kind, shown)


@pytest.mark.parametrize(
    "text", ["", "sqlite://", "sqlite:///", "sqlite://x", "postgresql://host", "mysql://h/d", "disk"]
)
def test_addresses_that_are_none(text: str) -> None:
    with pytest.raises(ValueError, match="must be memory"):
        StoreUrl.parse(text)


def test_the_default_store_is_a_file_in_the_data_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    assert default_store({}, Path("/home/u")) == "sqlite:////home/u/.local/share/subpage/subpage.db"
    assert default_store({"XDG_DATA_HOME": "/data"}, Path("/home/u")) == "sqlite:////data/subpage/subpage.db"
    monkeypatch.delenv("SUBPAGE_STORE")
    monkeypatch.setenv("XDG_DATA_HOME", "/data")
    assert Settings().store == "sqlite:////data/subpage/subpage.db"


@pytest.mark.parametrize(
    "column",
    [
        np.arange(1000, dtype=np.uint64),
        np.zeros(0, dtype=np.uint16),
        np.array([[1, 2], [3, 4]], dtype=np.int64),
        np.array([1, 2], dtype=">u4"),
        np.array([b"ab", b"c"]),
        np.array(["ä", ""]),
        np.array([True, False]),
        np.arange(10, dtype=np.uint32)[::2],
    ],
)
def test_columns_come_back(column: np.ndarray) -> None:
    found = unpack(pack({"first": np.arange(3), "second": column}))
    assert list(found) == ["first", "second"]
    np.testing.assert_array_equal(found["second"], column)
    assert found["second"].shape == column.shape and found["second"].dtype == column.dtype.newbyteorder("<")


def test_objects_are_no_columns() -> None:
    with pytest.raises(TypeError, match="holds objects"):
        pack({"x": np.array([object()])})


def test_the_migrations_make_the_schema(store_url: str) -> None:
    """What the migrations leave is what the code expects, and opening knows without them whether they are needed."""
    engine = connect(StoreUrl.parse(store_url))
    with engine.connect().execution_options(writes=True) as connection:
        for _ in range(2):
            with connection.begin():
                migrate(connection)
        with connection.begin():
            assert compare_metadata(MigrationContext.configure(connection), metadata) == []
            assert connection.execute(sa.text("SELECT version_num FROM alembic_version")).scalar() == REVISION
    engine.dispose()
    config = Config()
    config.set_main_option("script_location", str(Path(service.storage.__file__).parent / "migrations"))
    assert ScriptDirectory.from_config(config).get_heads() == [REVISION]


def test_a_store_in_sqlite_is_written_through_to_the_disk(tmp_path: Path) -> None:
    with connect(StoreUrl.parse(f"sqlite:///{tmp_path}/x.db")).connect() as connection:
        found = [connection.exec_driver_sql(f"PRAGMA {name}").scalar() for name in ("journal_mode", "synchronous")]
    assert found == ["wal", 2]


class Cause(Exception):
    def __init__(self, **members: object) -> None:
        vars(self).update(members)


@pytest.mark.parametrize(
    ("cause", "reason"),
    [
        (Cause(sqlite_errorname="SQLITE_FULL"), "the disk is full"),
        (Cause(sqlite_errorname="SQLITE_READONLY_DBMOVED"), "it is read-only"),
        (Cause(sqlite_errorname="SQLITE_IOERR_WRITE"), "writing to the disk failed"),
        (Cause(sqlite_errorname="SQLITE_MISUSE"), "it reports SQLITE_MISUSE"),
        (Cause(sqlstate="53100"), "the disk is full"),
        (Cause(sqlstate="53300"), "the database server lacks resources"),
        (Cause(sqlstate="25006"), "it is read-only"),
        (Cause(sqlstate="57P01"), "the database server is shutting down or starting"),
        (Cause(sqlstate=None), "it cannot be reached"),
        (OSError(28, "No space left on device"), "no space left on device"),
    ],
)
def test_reasons(cause: Exception, reason: str) -> None:
    assert reason_of(OperationalError("statement with secrets", {}, cause)) == reason


def test_a_real_error_of_sqlite_has_a_reason(tmp_path: Path) -> None:
    (tmp_path / "x.db").write_text("this is not a database, and long enough to tell" * 10)
    with pytest.raises(sa.exc.DatabaseError) as caught, connect(StoreUrl.parse(f"sqlite:///{tmp_path}/x.db")).connect():
        pass
    assert reason_of(caught.value) == "the file is not a database"
    assert isinstance(caught.value.orig, sqlite3.DatabaseError)


def test_whoever_is_cancelled_while_a_commit_is_made_learns_how_it_ended() -> None:
    async def run() -> list[str]:
        future: Future[str] = Future()
        seen: list[str] = []

        async def work() -> None:
            seen.append(await finished(future))
            try:
                await asyncio.sleep(60)
            except asyncio.CancelledError:
                seen.append("cancelled")
                raise

        task = asyncio.create_task(work())
        await asyncio.sleep(0)
        task.cancel()
        await asyncio.sleep(0)
        future.set_result("committed")
        with pytest.raises(asyncio.CancelledError):
            await task
        return seen

    assert asyncio.run(run()) == ["committed", "cancelled"]


def test_traces_that_were_not_committed_are_not_kept() -> None:
    store = TraceStore(kept=1, kept_exit_records=10)
    store._coming.append(None)  # type: ignore[arg-type]
    store.discard()
    assert store.coming() == ([], []) and store.page(0, 10) == ([], None)
