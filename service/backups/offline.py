"""What the command line does to a store: take a backup, also of a running service, and put one back."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import sqlalchemy as sa
from sqlalchemy.exc import SQLAlchemyError

from service.backups.files import BadBackup, LeftOut, read_backup, restore_footprint, restore_machine, write_backup
from service.platform.failures import Failure, opened
from service.storage import footprint_rows, rows
from service.storage.database import connect, reason_of
from service.storage.lease import lease_of
from service.storage.migrate import NewerSchema, migrate, stored_revision
from service.storage.records import FootprintRecord
from service.storage.schema import REVISION
from service.storage.urls import MEMORY, SQLITE, StoreUrl

# What a backup leaves, and a restore does not bring (ADR 9).
LEFT = (
    "not in a backup: jobs, and the answers kept for Idempotency-Key; both are about requests to the store they came to"
)


class OfflineError(Failure):
    """The store or the file cannot be used."""


@contextlib.contextmanager
def _transaction(url: StoreUrl, *, writes: bool) -> Iterator[sa.Connection]:
    """One transaction on the store; one that writes has the lease. Raises OfflineError."""
    if url.kind == MEMORY:
        raise OfflineError("machines of the store 'memory' live in their process: there is nothing to read or write")
    if url.kind == SQLITE and not writes:
        assert url.path is not None
        if not url.path.exists():
            raise OfflineError(f"there is no store at {url.path}")
    engine = connect(url)
    lease = lease_of(url)
    try:
        with engine.connect().execution_options(writes=writes) as connection:
            if writes:
                with connection.begin():
                    if not lease.take(connection):
                        raise OfflineError("a service owns the store: stop it first")
            try:
                with connection.begin():
                    if writes:
                        migrate(connection)
                        rows.next_epoch(connection, "subpage restore")
                    elif stored_revision(connection) != REVISION:
                        raise OfflineError("the store has another schema than this release; start the service once")
                    yield connection
            finally:
                connection.invalidate()
    except NewerSchema as error:
        raise OfflineError(str(error)) from error
    except SQLAlchemyError as error:
        raise OfflineError(f"the store {url.shown} cannot be used: {reason_of(error)}") from error
    finally:
        lease.release()
        engine.dispose()


def backup(url: StoreUrl, path: Path, vm: str | None) -> int:
    """Write all machines of a store, or the one called ``vm``, to a new file; how many. Raises OfflineError.

    All footprints go with them, or those that were collected beside replays of the one.

    A running service goes on: what is written is one state of the store.
    """
    with _transaction(url, writes=False) as connection:
        machines = [record for record in rows.vm_records(connection) if vm in (None, record.id)]
        if vm is not None and not machines:
            raise OfflineError(f"the store has no VM {vm}")
        footprints = [record for record in footprint_rows.listed(connection, None) if vm in (None, record.vm)]
        if path.exists():
            raise OfflineError(f"{path} exists")
        try:
            # A name that nobody can have put a link at, and a file of its owner alone.
            number, name = tempfile.mkstemp(suffix=".part", prefix=f"{path.name}.", dir=path.parent)
            unfinished = Path(name)
            try:
                with os.fdopen(number, "wb") as file:
                    write_backup(file, connection, machines, footprints)
                    file.flush()
                    os.fsync(file.fileno())
                unfinished.rename(path)
            finally:
                unfinished.unlink(missing_ok=True)
        except OSError as error:
            raise OfflineError(f"{path} cannot be written: {error.strerror}") from error
    return len(machines)


def restore(
    url: StoreUrl, path: Path, vm: str | None, *, replace: bool, told: Callable[[str], None] = lambda text: None
) -> list[str]:
    """Put the machines of a backup, or the one called ``vm``, into a store: all of them or none. Their ids.

    Footprints come with them, as in ``backup``; ``told`` hears of those that are left out. The store is made when
    there is none. Raises OfflineError, also while a service owns the store.
    """
    restored: list[str] = []
    try:
        with opened(path) as file, _transaction(url, writes=True) as connection:
            number = max((record.number for record in rows.vm_records(connection)), default=0)
            for saved in read_backup(file):
                if isinstance(saved, LeftOut):
                    if vm in (None, saved.vm):
                        told(f"footprint {saved.id} is left out, its file cannot be read: {saved.why}")
                elif isinstance(saved, FootprintRecord):
                    if vm in (None, saved.vm):
                        restore_footprint(connection, saved)
                elif vm in (None, saved.record.id):
                    number += 1
                    restored.append(restore_machine(connection, number, saved, replace_known=replace).id)
            if vm is not None and not restored:
                raise OfflineError(f"the backup has no VM {vm}")
    except BadBackup as error:
        raise OfflineError(f"{path}: {error}") from error
    except FileExistsError as error:
        raise OfflineError(f"the store has VM {error} already; --replace overwrites it") from error
    except OSError as error:
        raise OfflineError(f"{path}: {error.strerror}") from error
    return restored
