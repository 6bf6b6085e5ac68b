"""Replays and accesses that ask: each stretch is a mutation, and between two of them the machine is anybody's.

What ends one after its first pause (the machine is deleted, the client leaves, the service stops, a record is bad, the
store fails) leaves what was committed at the last pause; the exception says up to which record that is.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Protocol

from engine.machine import VirtualMachine
from engine.trace.columns import TraceChunk
from engine.trace.interactive import InteractiveReplay, Load
from engine.trace.interactive_access import InteractiveAccess
from engine.trace.interactive_timed import Watched
from engine.trace.readers import Budget, Source, TraceReader
from engine.trace.results import ExitColumns, TraceResult
from engine.trace.single import AccessRequest, AccessResult
from service.problems import RESUME_AT, NotReady
from service.runtime.bodies import Upload
from service.runtime.broker import UNDONE, Question
from service.runtime.commit_hooks import CommitHooks
from service.runtime.entry import Entry
from service.runtime.traces import NO_RECORDS, TraceRequest
from service.settings import Settings


class Tallied(Protocol):
    """Where questions are counted."""

    def asked(self) -> None: ...

    def answered(self, action: str | None, reason: str, timeouts: int) -> None: ...


class Asker:
    """Asks about one replay or access; ``trace`` is the id that its result will have. ``landed``: of a guest that runs,
    whose accesses have happened."""

    def __init__(
        self,
        entry: Entry,
        settings: Settings,
        metrics: Tallied,
        draining: Callable[[], bool],
        trace: str | None = None,
        landed: bool = False,
    ) -> None:
        self._entry = entry
        self._settings = settings
        self._metrics = metrics
        self._draining = draining
        self.trace = trace
        self._landed = landed
        self._last: tuple[int, int] = (-1, 0)

    async def ask(self, asked: ExitColumns) -> str:
        """What is to become of the access that this exit is about."""
        record, attempt = int(asked.column("index")[0]), 1
        if record == self._last[0]:
            attempt = self._last[1] + 1
        self._last = (record, attempt)
        if self._entry.gone:
            raise self._entry.absence()
        self._metrics.asked()
        default = self._settings.ask_default_action
        resolution = await self._entry.broker.ask(
            Question(asked, self.trace, attempt, self._landed),
            "allow" if self._landed and default == UNDONE else default,
            self._settings.max_questions,
            self._give_up,
        )
        self._metrics.answered(resolution.action, resolution.reason, resolution.timeouts)
        assert resolution.action is not None
        return resolution.action

    async def ask_about(self, load: Load) -> tuple[str, int | None]:
        """What is to become of a load of CR3, and what is loaded in place of what is recorded. One that nobody answers
        takes place."""
        self._last = (-1, 0)
        if self._entry.gone:
            raise self._entry.absence()
        self._metrics.asked()
        question = Question(NO_RECORDS, self.trace, 1, load=load)
        resolution = await self._entry.broker.ask(question, "allow", self._settings.max_questions, self._give_up)
        self._metrics.answered(resolution.action, resolution.reason, resolution.timeouts)
        assert resolution.action is not None
        return resolution.action, question.value if resolution.reason == "answer" else None

    async def released(self) -> None:
        """Wait while a tool holds the guest. Raises why it does not go on: the machine is gone, the service stops."""
        await self._entry.broker.released()
        if self._entry.gone:
            raise self._entry.absence()
        if (reason := self._give_up()) is not None:
            raise reason

    @property
    def held(self) -> bool:
        """Whether a tool holds the guest."""
        return self._entry.broker.held

    def _give_up(self) -> Exception | None:
        if self._draining():
            return NotReady("the service is stopping, and the tool that was asked has been sent away")
        return None


# Refusals come in swarms: so many records are replayed on the loop after an answer, as a thread takes longer to wake.
_BRIEF = 64
# So often in a row: then it is the others' turn to compute, too. Between any two of them the loop is theirs anyway.
_BRIEFLY = 256
# A machine with more frames is not changed on the loop: a copy of its rows, when they grow, takes longer.
_FRAMES = 4096


class _Stretches:
    """One replay that asks, from its first stretch to its last. ``run`` is for a thread, ``briefly`` for the loop."""

    def __init__(self, request: TraceRequest, source: Source, memory: Budget, watched: Watched) -> None:
        self._watched = watched
        self._request = request
        self._source = source
        self._memory = memory
        self._reader: TraceReader | None = None
        self._chunks: Iterator[TraceChunk] = iter(())
        self._replay: InteractiveReplay | None = None
        self._stopped = False
        self._in_a_row = 0
        self._options = request.options()
        self.asked: ExitColumns | Load | None = None

    @property
    def paused_at(self) -> int | None:
        return self._replay.paused_at if self._replay is not None else None

    def _note_asked(self, replay: InteractiveReplay) -> None:
        if replay.paused_at is not None:
            self.asked = replay.load or replay.asked

    def briefly(self, machine: VirtualMachine, action: str) -> bool:
        """Do what was answered and go on for a few records; whether there is a question again. ``run`` goes on."""
        assert self._replay is not None
        with machine.replay(self._options, self._replay) as run:
            going = self._replay.answer(action, _BRIEF)
            self._stopped = not going and self._replay.paused_at is None
            self._note_asked(self._replay)
            run.pause()
        return self._replay.paused_at is not None

    def is_brief(self, machine: VirtualMachine, action: str) -> bool:
        """Whether what follows an answer is little work, for a while."""
        self._in_a_row += 1
        # Translations, and what lies between accesses, are of a whole chunk; ``retry`` ends what a chunk has come to.
        whole = self._request.address == "gva" or machine.config.host.hyperv is not None or action == "retry"
        assert self._replay is not None
        if whole or self._replay.timed or self._in_a_row > _BRIEFLY or machine.frames_in_use > _FRAMES:
            self._in_a_row = 0
            return False
        return True

    def run(
        self, machine: VirtualMachine, check: Callable[[], None], action: str | None = None, value: int | None = None
    ) -> tuple[TraceResult, tuple[str, ...]] | None:
        """Do what was answered, if it is not done, and go on to the next question (None) or to the end."""
        if self._reader is None:
            self._reader = self._request.reader(self._source, self._memory)
            self._chunks = iter(self._reader)
        with machine.replay(self._options, self._replay, self._watched) as run:
            assert isinstance(run.replay, InteractiveReplay)
            self._replay = run.replay
            check()
            if action is not None:
                going = self._replay.answer(action, None, value)
            else:
                going = not self._stopped and self._replay.finish_chunk()
            while going and (chunk := next(self._chunks, None)) is not None:
                check()
                going = run.feed(chunk)
            check()
            if self._replay.paused_at is not None:
                self._note_asked(self._replay)
                run.pause()
                return None
            return replace(run.finish(), taken=self._reader.taken), self._reader.ignored_columns


@asynccontextmanager
async def last_stretch(
    entry: Entry,
    upload: Upload,
    request: TraceRequest,
    source: Source,
    asker: Asker,
    hooks: CommitHooks,
    check_caller: Callable[[], None],
    memory: Budget,
) -> AsyncIterator[tuple[TraceResult, tuple[str, ...]]]:
    """Replay with ``ask``; the block runs in the mutation of the last stretch, with the result of all.

    ``check_caller`` is called before each commit, and raises when the caller may not change the machine any more.
    ``hooks`` as in ``Entry.mutation``, for each of them; ``memory`` is what the body may take while it is read.
    """
    stretches = _Stretches(request, source, memory, entry.broker.watches)
    action: str | None = None
    value: int | None = None
    committed: int | None = None
    try:
        while True:
            if asker.held:
                await upload.until(asker.released())
            async with entry.mutation(hooks) as change:
                machine, found = change.machine, None
                if action is not None and stretches.is_brief(machine, action):
                    left, asked = None, stretches.briefly(machine, action)
                else:
                    left, asked = action, False
                if not asked:
                    found = await upload.run(lambda pipe: stretches.run(machine, pipe.check, left, value))  # noqa: B023
                check_caller()
                if found is not None:
                    yield found
                    return
            committed = stretches.paused_at
            asked_about = stretches.asked
            assert asked_about is not None
            if isinstance(asked_about, Load):
                action, value = await upload.until(asker.ask_about(asked_about))
            else:
                action, value = await upload.until(asker.ask(asked_about)), None
    except Exception as error:
        if committed is not None:
            setattr(error, RESUME_AT, committed)
        raise


async def access(
    entry: Entry,
    request: AccessRequest,
    asker: Asker,
    hooks: CommitHooks,
    note: Callable[[Entry, AccessResult], None],
) -> AccessResult:
    """One access that asks. ``note`` is called with its outcome, in the mutation that ends it; ``hooks`` as above."""
    run = InteractiveAccess()
    committed = False
    try:
        while True:
            if asker.held:
                await asker.released()
            async with entry.mutation(hooks) as change:
                outcome = change.machine.access(request, run)
                if run.asked is None:
                    note(entry, outcome)
            if run.asked is None:
                return outcome
            committed = True
            run.answer(await asker.ask(run.asked))
    except Exception as error:
        if committed:
            setattr(error, RESUME_AT, 0)
        raise
