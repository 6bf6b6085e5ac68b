"""Replays that go on without their client."""

from __future__ import annotations

import time
from contextlib import suppress
from typing import ClassVar, Generic, TypeVar

from subpage.errors import Error, Interrupted, problem_of
from subpage.handles import Handle, Member
from subpage.html import Document
from subpage.modes import Awaiting, Blocking, operation
from subpage.progress import Progress, reporting
from subpage.traces import AsyncTrace, Trace, TraceOperations

R = TypeVar("R", bound=TraceOperations)

UNFINISHED = frozenset({"queued", "running"})
_LONGEST_PAUSE = 5.0


class JobOperations(Handle, Generic[R]):
    """One job."""

    _names: ClassVar = {"job": "id"}
    _trace: type[R]
    state = Member(str, "``queued``, ``running``, ``succeeded``, ``failed``, ``cancelled`` or ``interrupted``.")

    @operation("getJob")
    async def refresh(self) -> Document:
        """Read it again: ``vm.submit([{"gpa": 0x10040}]).refresh()["vm"] == vm.id`` is ``True``."""
        self.document = await self._document("getJob")
        return self.document

    @operation("cancelJob")
    async def cancel(self) -> str:
        """Ask it to end; its state then, which may still be ``running`` for a moment, or ``succeeded``:
        ``vm.submit([0x10040]).cancel() in ("cancelled", "running", "succeeded")`` is ``True``."""
        self.document = await self._document("cancelJob")
        return self.state

    @operation("getJob", "getTrace")
    async def wait(self, *, progress: Progress = False, timeout: float | None = None) -> R:  # noqa: ASYNC109
        """Its result, once there is one; the job is cancelled when the wait is interrupted. Raises the Problem that it
        failed with, Interrupted, TimeoutError after ``timeout`` seconds: the job goes on.
        ``vm.submit([0x10040]).wait().violations`` is ``1``."""
        deadline = None if timeout is None else time.monotonic() + timeout
        pause = 0.02
        with reporting(progress, "replayed") as report:
            try:
                while self.state in UNFINISHED:
                    if deadline is not None and time.monotonic() + pause > deadline:
                        raise TimeoutError(f"{self.id} has not ended within {timeout} seconds, and goes on")
                    await self._core.transport.sleep(pause)
                    pause = min(_LONGEST_PAUSE, pause * 1.5)
                    await JobOperations.refresh(self)
                    if report is not None:
                        report(self["records_done"], None)
            except (TimeoutError, Error):
                raise
            except BaseException:  # Ctrl-C, or the cancellation of a task
                with suppress(Error):  # there is nobody left to tell
                    await JobOperations.cancel(self)
                raise
        if self.state == "failed":
            raise problem_of(self["error"], int(self["error"]["status"]))
        if self.state != "succeeded":
            raise Interrupted(f"{self.id} was {self.state}; the machine is as it was", self.state)
        if self["result"] is None:
            raise Interrupted(f"{self.id} has succeeded, and its result is not kept any more", self.state)
        vm, _, trace = str(self["result"]).removeprefix("/v1/vms/").partition("/traces/")
        return self._trace(self._core, await self._core.document("getTrace", path={"vm": vm, "trace": trace}))

    def __repr__(self) -> str:
        return f"<job {self.id}: {self.state}>"


class Job(JobOperations[Trace], Blocking):
    """A replay that goes on by itself."""

    _trace = Trace


class AsyncJob(JobOperations[AsyncTrace], Awaiting):
    """A replay that goes on by itself, with methods to be awaited."""

    _trace = AsyncTrace
