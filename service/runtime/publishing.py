"""Replays that are published while their bodies still come: one trace, many commits, each a point to resume from.

One thread reads the body, another one replays what has come, in a mutation each time; between two of them the machine
is anybody's, and changes of it take effect on what comes after. The machine is never held for a sender that is slow.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Executor
from datetime import UTC, datetime

from engine.machine import VirtualMachine
from engine.trace.columns import TraceChunk
from engine.trace.published import PublishedReplay
from engine.trace.readers import Budget, TraceReader
from engine.trace.results import ExitColumns, TraceResult
from service.problems import RESUME_AT, NotReady
from service.runtime.asking import Asker
from service.runtime.bodies import BodyPipe, Upload
from service.runtime.commit_hooks import CommitHooks
from service.runtime.entry import Entry
from service.runtime.offload import finished
from service.runtime.traces import PART, Publication, Trace, TraceRequest
from service.runtime.turns import Turn

# Records that wait to be replayed, and so those of one commit at most: 40 MB with all their addresses.
MOST_WAITING = 1 << 20


class _Inbox:
    """Chunks between the thread that reads and the event loop, which hands them on: bounded in records."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._chunks: deque[TraceChunk] = deque()
        self._records = 0
        self._closed = False
        self._room = threading.Condition()
        self.arrived = asyncio.Event()
        self.full = asyncio.Event()

    def put(self, chunk: TraceChunk, check: Callable[[], None]) -> bool:
        """Keep a copy of ``chunk``, in the thread; waits for room. False: nobody takes it. ``check`` may raise."""
        kept = chunk.copy()  # readers fill the same memory again
        with self._room:
            while self._records >= MOST_WAITING and not self._closed:
                self._room.wait(0.1)
                check()
            if self._closed:
                return False
            self._chunks.append(kept)
            self._records += len(kept)
            full = self._records >= MOST_WAITING
        self._loop.call_soon_threadsafe((self.full if full else self.arrived).set)
        return True

    def take(self) -> list[TraceChunk]:
        """All of them, on the event loop."""
        with self._room:
            taken = list(self._chunks)
            self._chunks.clear()
            self._records = 0
            self._room.notify()
        self.arrived.clear()
        self.full.clear()
        return taken

    @property
    def waiting(self) -> int:
        """How many records."""
        return self._records

    def close(self) -> None:
        with self._room:
            self._closed = True
            self._room.notify()


class Publisher:
    """One trace that is published while it comes. ``check`` is called before each commit, and raises when the caller
    may not change the machine any more; ``draining`` says that the service is about to stop."""

    def __init__(
        self,
        entry: Entry,
        wanted: TraceRequest,
        every: float,
        executor: Executor,
        turn: Turn,
        hooks: CommitHooks,
        check: Callable[[], None],
        draining: Callable[[], bool],
        asker: Asker | None = None,
    ) -> None:
        self._entry, self._wanted, self._every = entry, wanted, every
        self._executor, self._turn = executor, turn
        self._hooks, self._check, self._draining = hooks, check, draining
        self._asker = asker
        self._id, self._sequence = (asker and asker.trace) or entry.traces.next_id()[0], 0
        self._inbox: _Inbox
        self._left: deque[TraceChunk] = deque()  # what comes after the record that is asked about
        self._replay: PublishedReplay | None = None
        self._began = time.perf_counter()
        self._created = datetime.now(UTC)
        self._last: Trace | None = None
        self._at = self._began

    async def run(self, upload: Upload, memory: Budget) -> Trace:
        """Replay the body, and return the trace as its last commit has it.

        Raises what the reader, the replay and ``Entry.mutation`` raise, with the record to resume at; the trace is
        interrupted then.
        """
        inbox = self._inbox = _Inbox(asyncio.get_running_loop())
        readers: list[TraceReader] = []

        def read(pipe: BodyPipe) -> None:
            pipe.prompt = self._wanted.format != "arrow"  # whose batches say themselves what belongs together
            readers.append(self._wanted.reader(pipe, memory))
            for chunk in readers[0]:
                if len(chunk) and not inbox.put(chunk, pipe.check):
                    return

        reading = asyncio.ensure_future(upload.run(read))
        try:
            going = True
            while going:
                done = await self._gather(inbox, reading)
                if self._draining():
                    raise NotReady("the service is stopping; what came before is committed")
                chunks = inbox.take()
                if chunks:
                    going = await self._publish(chunks, ())
                    while self._question is not None:
                        action = await self._answer(upload)
                        going = await self._publish([], (), action=action)
                elif done:
                    break
            if going:
                await reading
            ignored = readers[0].ignored_columns if readers else ()
            await self._publish([], ignored, ended=True)
            assert self._last is not None
            return self._last
        except BaseException as error:
            self._entry.traces.interrupt(self._id)
            if self._last is not None and isinstance(error, Exception):
                setattr(error, RESUME_AT, self._resume_at(self._last))
            raise
        finally:
            inbox.close()
            reading.cancel()
            await asyncio.wait((reading,))
            if not reading.cancelled():
                reading.exception()  # told above, or of no interest any more

    @staticmethod
    def _resume_at(trace: Trace) -> int:
        assert trace.publication is not None
        return trace.publication.resume_at

    async def _gather(self, inbox: _Inbox, reading: asyncio.Future[None]) -> bool:
        """Wait until something is there and it is time to publish it. Whether nothing more will come."""
        for event, left in ((inbox.arrived, None), (inbox.full, self._at + self._every - time.perf_counter())):
            if inbox.full.is_set() or (left is not None and left <= 0):
                break
            waiting = asyncio.ensure_future(event.wait())
            other = asyncio.ensure_future(inbox.full.wait())
            try:
                await asyncio.wait((waiting, other, reading), timeout=left, return_when=asyncio.FIRST_COMPLETED)
            finally:
                waiting.cancel()
                other.cancel()
        return reading.done()

    @property
    def _question(self) -> ExitColumns | None:
        return self._replay.question if self._replay is not None else None

    async def _answer(self, upload: Upload) -> str:
        """What is to become of the access at which the replay has paused."""
        assert self._asker is not None and self._question is not None
        if self._asker.held:
            await upload.until(self._asker.released())
        return await upload.until(self._asker.ask(self._question))

    async def _publish(
        self, chunks: list[TraceChunk], ignored: tuple[str, ...], ended: bool = False, action: str | None = None
    ) -> bool:
        """Replay, and commit what came out; what was answered first. False: the replay has ended at a record
        (``on_violation=stop``)."""
        async with self._entry.mutation(self._hooks, patient=True) as change:
            await self._turn.take()
            try:
                machine = change.machine
                result, kept = await finished(self._executor.submit(self._stretch, machine, chunks, action))
            finally:
                self._turn.give()
            self._check()
            if self._last is None:  # among the traces of the machine it comes when it is first seen
                self._sequence = self._entry.traces.next_id()[1]
            trace = self._trace(result, kept, ignored, ended)
            self._entry.traces.add(trace)
        self._last = trace
        return result.stopped_at is None

    def _stretch(
        self, machine: VirtualMachine, chunks: list[TraceChunk], action: str | None
    ) -> tuple[TraceResult, int]:
        """In a thread: the totals with the exit records that are not stored in whole parts yet, and how many are."""
        with machine.replay(self._wanted.options(published=True), self._replay) as run:
            assert isinstance(run.replay, PublishedReplay)
            self._replay = run.replay
            self._left.extend(chunks)
            going = action is None or self._replay.answer(action)
            while going and self._left:
                going = run.feed(self._left.popleft())
            told = self._last.exit_records if self._last is not None else 0
            first = told // PART * PART
            result = run.replay.result_from(first)
            run.pause()
            return result, first

    def _trace(self, result: TraceResult, first: int, ignored: tuple[str, ...], ended: bool) -> Trace:
        assert self._replay is not None
        now = time.perf_counter()
        before = self._last
        records = result.records - (before.result.records if before is not None else 0)
        rate = records / (now - self._at) if not ended and now > self._at else None
        self._at = now
        publication = Publication(
            state="finished" if ended else "running",
            resume_at=self._replay.resume_at,
            at=datetime.now(UTC),
            rate=rate,
            lag=None if ended else self._inbox.waiting + sum(len(chunk) for chunk in self._left),
            first=first,
            told=before.exit_records if before is not None else 0,
            violations_told=before.result.violations if before is not None else 0,
            goes_on=before is not None,
        )
        kept = first + len(result.exit_columns)
        seconds = now - self._began
        return Trace(self._id, self._sequence, self._wanted, result, ignored, self._created, seconds, kept, publication)
