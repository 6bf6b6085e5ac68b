"""The thread that owns a store: it takes the lease, and writes what machines hand in, several to a transaction.

States: *waiting* (never owned, or another process took over: nothing is served), *owned*, and *interrupted* (the
connection broke; what is in memory is still read, changes are refused until the same ownership goes on).
"""

from __future__ import annotations

import logging
import os
import socket
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace

import sqlalchemy as sa
from sqlalchemy.exc import SQLAlchemyError

from service.problems import StoreUnavailable
from service.storage import rows, side_rows
from service.storage.database import connect, reason_of
from service.storage.lease import LeaseLost, lease_of
from service.storage.meter import Meter, Observer, nobody
from service.storage.migrate import NewerSchema, migrate
from service.storage.records import Change, JobRecord, VmRecord
from service.storage.urls import StoreUrl

logger = logging.getLogger("subpage.store")

# How often the lease is looked at while nothing is written, and asked for while another process holds it.
_IDLE_SECONDS = 1.0
_WAIT_SECONDS = 0.2
_RETRY_SECONDS = (0.1, 0.2, 0.5, 1.0)
# Changes of one transaction; more would make the first wait long for the last.
_GROUP = 32

_NOT_OWNED = "the store is not owned by this process at present; nothing was changed"
_NOT_STORED = "the change could not be stored: {}; nothing was changed"
_UNKNOWN = "whether the change was stored is not known, since {}; read before trying again"


class _Interrupted(Exception):
    """The connection is of no use any more."""


@dataclass(slots=True)
class _Job:
    change: Change
    epoch: int
    done: Future[None] = field(default_factory=Future)


Owned = Callable[[int, Sequence[VmRecord], Sequence[JobRecord], bool], None]


class StoreWriter:
    """Owns one store from ``start`` to ``stop``.

    ``owned(epoch, machines, jobs, goes_on)`` is called, in the thread, whenever the store has become ours; ``goes_on``
    tells that nobody else owned it since we last did. ``lost(taken)`` is called when it no longer is. ``observe`` is
    told of each transaction, also in the thread.
    """

    def __init__(self, url: StoreUrl, owned: Owned, lost: Callable[[bool], None], observe: Observer = nobody) -> None:
        self._url = url
        self._observe = observe
        self._owned = owned
        self._lost = lost
        self.engine = connect(url)
        self._lease = lease_of(url)
        self._epoch: int | None = None
        self._serving = False
        self._stopping = False
        self._jobs: deque[_Job] = deque()
        self._failed: list[tuple[_Job, StoreUnavailable]] = []
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="store", daemon=True)
        self.trouble = "the store is being opened"

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Write what was handed in, give the store back, and end. Blocking."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        self._thread.join()
        self._lease.release()
        self.engine.dispose()

    def submit(self, change: Change, epoch: int) -> Future[None]:
        """Hand in a change that was made under ``epoch``; the result comes after its commit.

        It fails with StoreUnavailable, whose ``certain`` tells whether the change is known not to be stored.
        """
        job = _Job(change, epoch)
        with self._changed:
            if not self._serving or epoch != self._epoch:
                raise StoreUnavailable(_NOT_OWNED)
            self._jobs.append(job)
            self._changed.notify()
        return job.done

    # The thread

    def _run(self) -> None:
        attempt = 0
        while not self._stopping:
            try:
                with self._owning() as connection:
                    attempt = 0
                    self._serve(connection)
            except (LeaseLost, rows.Overtaken):
                self._lease.release()
                self._leave("another process has taken the store over", taken=True)
            except NewerSchema as error:
                self._leave(str(error), taken=True)
                attempt = len(_RETRY_SECONDS) - 1
            except _Interrupted as error:
                self._let_go()
                self._leave(str(error), taken=False)
            except (SQLAlchemyError, OSError) as error:
                self._let_go()
                self._leave(reason_of(error), taken=False)
            if not self._stopping:
                self._pause(_RETRY_SECONDS[min(attempt, len(_RETRY_SECONDS) - 1)])
                attempt += 1
        self._leave("the service is stopping", taken=False)

    @contextmanager
    def _owning(self) -> Iterator[sa.Connection]:
        """A connection that may write, once the lease is ours; the connection is closed for good at the end."""
        with self.engine.connect().execution_options(writes=True) as connection:
            try:
                while not self._taken(connection):
                    self._leave("another process owns the store; this one waits", taken=True)
                    self._pause(_WAIT_SECONDS)
                    if self._stopping:
                        break
                yield connection
            finally:
                with suppress(SQLAlchemyError):
                    connection.invalidate()

    def _taken(self, connection: sa.Connection) -> bool:
        with connection.begin():
            return self._lease.take(connection)

    def _serve(self, connection: sa.Connection) -> None:
        if self._stopping:
            return
        with connection.begin():
            migrate(connection)
        with connection.begin():
            goes_on = self._epoch is not None and rows.epoch_of(connection) == self._epoch
            epoch = rows.next_epoch(connection, f"{socket.gethostname()} process {os.getpid()}")
            counts = rows.block_counts(connection)
            found = rows.vm_records(connection)
            machines = [replace(record, frames=counts.get(record.number, 0)) for record in found]
            jobs = side_rows.take_over(connection, goes_on=goes_on)
        with self._changed:
            # What was made under the earlier epoch still fits the store when nobody wrote in between.
            self._epoch = epoch
            self._serving = True
        self._owned(epoch, machines, jobs, goes_on)
        self.trouble = ""
        while True:
            group = self._next_group()
            if not group and self._stopping:
                return
            if group:
                self._commit(connection, group)
            else:
                with connection.begin():
                    self._lease.check(connection)

    def _next_group(self) -> list[_Job]:
        with self._changed:
            if not self._jobs and not self._stopping:
                self._changed.wait(_IDLE_SECONDS)
            return [self._jobs.popleft() for _ in range(min(_GROUP, len(self._jobs)))]

    def _commit(self, connection: sa.Connection, group: Sequence[_Job]) -> None:
        """Store the changes of a group together, or one by one when they cannot be."""
        changes = sum(job.change.count for job in group)
        meter = Meter(changes)
        try:
            replays = sum(len(job.change.traces) for job in group)
            logger.debug("writing %d changes with %d replays", changes, replays)
            connection.begin()
            self._lease.check(connection)
            if rows.epoch_of(connection) != self._epoch:
                raise LeaseLost
            for job in group:
                rows.write(connection, meter.metered(job.change))
        except Exception as error:  # noqa: BLE001 - a defect, too, is told to the one whose change it met
            self._observe(meter.ended(stored=False))
            self._undo(connection, group, error)
            if len(group) == 1:
                self._refuse(group[0], error)
                return
            for position, job in enumerate(group):
                try:
                    self._commit(connection, [job])
                except BaseException:
                    self._fail(group[position + 1 :], StoreUnavailable(_NOT_OWNED))
                    raise
            return
        try:
            connection.commit()
        except SQLAlchemyError as error:
            self._observe(meter.ended(stored=False))
            reason = reason_of(error)
            logger.error("a commit failed: %s", reason)
            self._fail(group, StoreUnavailable(_UNKNOWN.format(reason), certain=False))
            raise _Interrupted(reason) from error
        logger.debug("written")
        self._observe(meter.ended(stored=True))
        for job in group:
            job.done.set_result(None)

    def _undo(self, connection: sa.Connection, group: Sequence[_Job], error: Exception) -> None:
        """Roll back. Raises what ends the ownership or the connection, after the group has been refused."""
        broken = bool(getattr(error, "connection_invalidated", False))
        try:
            connection.rollback()
        except SQLAlchemyError:
            broken = True
        if isinstance(error, (LeaseLost, rows.Overtaken)):
            self._fail(group, StoreUnavailable(_NOT_OWNED))
            raise error
        if broken or connection.invalidated:
            reason = reason_of(error)
            self._fail(group, StoreUnavailable(_NOT_STORED.format(reason)))
            raise _Interrupted(reason) from error

    def _refuse(self, job: _Job, error: Exception) -> None:
        if isinstance(error, SQLAlchemyError):
            reason = reason_of(error)
            logger.error("a change could not be stored: %s", reason)
            error = StoreUnavailable(_NOT_STORED.format(reason))
        job.done.set_exception(error)

    def _fail(self, group: Sequence[_Job], error: StoreUnavailable) -> None:
        """Refuse changes because the ownership ends; they learn it when everybody else has (``_leave``)."""
        self._failed += [(job, error) for job in group]

    def _leave(self, trouble: str, *, taken: bool) -> None:
        """Refuse everything from here on, and say so when that is news."""
        with self._changed:
            was_serving, self._serving = self._serving, False
            left = list(self._jobs)
            self._jobs.clear()
        was_known = was_serving or (taken and self._epoch is not None)
        if taken:
            self._epoch = None
        self._fail(left, StoreUnavailable(_NOT_OWNED))
        if trouble != self.trouble and not self._stopping:
            logger.warning("the store %s is not to be used: %s", self._url.shown, trouble)
        self.trouble = trouble
        if was_known:
            self._lost(taken)
        failed, self._failed = self._failed, []
        for job, error in failed:
            job.done.set_exception(error)

    def _let_go(self) -> None:
        """Close everything that is open there: a file system is repaired and mounted anew when nobody uses it."""
        self._lease.release()
        self.engine.dispose()

    def _pause(self, seconds: float) -> None:
        with self._changed:
            if not self._stopping:
                self._changed.wait(seconds)
