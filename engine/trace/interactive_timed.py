"""An interactive replay of a trace that may have operations: it pauses at refused accesses, and before loads of CR3
that somebody watches.

An access by a stale translation is asked about where it takes place. What is answered to a load is ``allow`` (with
another value, if one is given), ``skip`` (the register keeps what it has), ``retry`` (it is asked about again) or
``stop``.
"""

from __future__ import annotations

from collections.abc import Callable

from engine.kvm import vcpu_run
from engine.state.config import choices
from engine.state.frame_store import Draft
from engine.trace import object_hits, record_checks, replay, translated
from engine.trace.addresses import frozen
from engine.trace.columns import TraceChunk
from engine.trace.interactive import InteractiveReplay, Load, Place
from engine.trace.operations import MOV_CR3, Operation, operand_of
from engine.trace.option_names import ANSWERS
from engine.trace.session import ReplayOptions, run_of
from engine.trace.timed import Operating, Performs

Watched = Callable[[int], bool]
"""Whether somebody wants to be asked about the loads of CR3 of the vCPU of an id. Asked at each, in the thread of the
replay."""


def nobody_watches(vcpu: int) -> bool:
    """Loads are not asked about."""
    del vcpu
    return False


class InteractiveTimedReplay(InteractiveReplay, Operating):
    """``load`` is the one that is asked about, None while it is an exit."""

    def __init__(
        self,
        draft: Draft,
        options: ReplayOptions,
        targets: object_hits.Targets,
        before: Callable[[TraceChunk], None],
        performs: Performs,
        watched: Watched = nobody_watches,
    ) -> None:
        super().__init__(draft, options, targets, before)
        self._operate(before, performs)
        self._watched = watched
        self._operation: Operation | None = None

    # The pause

    def _come_to(self, chunk: TraceChunk, operation: Operation, position: int, base: int) -> tuple[int, int]:
        vcpu = int(chunk.records[position, 1]) >> 32 & 0xFFFF
        if operation.op != MOV_CR3 or not self._watched(vcpu):
            return super()._come_to(chunk, operation, position, base)
        self._operation = operation
        self.load = Load(base + position, vcpu, operand_of(operation))
        return replay.STOPPED, position

    def go_on(
        self, draft: Draft, targets: object_hits.Targets, before: Callable[[TraceChunk], None] | None = None
    ) -> None:
        known = self._draft.machine.tlb
        super().go_on(draft, targets, before)
        assert before is not None
        self._enter_guest = before
        self._performs.go_on(draft)
        if self._changed:
            # Of an entry that somebody else has made it is not known which records agree with it.
            self._uses[(known != draft.machine.tlb).any(axis=1)] = translated.NEVER

    # The answer

    def answer(self, action: str, most: int | None = None, value: int | None = None) -> bool:
        operation, place = self._operation, self._place
        if operation is None or place is None:
            return super().answer(action, most)
        choices(action, ANSWERS, "action")
        self._operation = self.load = None
        if action == "stop":
            return super().answer(action)
        if action == "retry":
            return self._run_on(place, 0, most)
        if action != "skip":
            if value is not None and value != operand_of(operation):
                space = operation.address_space if operation.arg is not None else None
                operation = operation._replace(arg=value.to_bytes(8, "little"), address_space=space)
            self._perform(place.chunk, operation, place.record)
        return self._run_on(place, 1, most)

    def _accessed(self, place: Place) -> tuple[int, int]:
        gpa, word = super()._accessed(place)
        if self._beside(place.chunk) is not None:
            gpa = int(self._log[int(self._used[0]) - 1, vcpu_run.EXIT_GPA])
        return gpa, word

    def _run_one(self, place: Place) -> bool:
        chunk, at = place.chunk, place.position
        if self._beside(chunk) is None:
            return super()._run_one(place)
        # The translation that it went by is gone with the violation: it runs where that had led.
        records = chunk.records[: at + 1].copy()
        records[at, 0] = self._accessed(place)[0]
        run = run_of(chunk.moved(records, chunk.gva), 0, at + 1)
        gvas = self._no_gva if chunk.gva is None else frozen(chunk.gva)
        options, counts = self._words, self._count.copy()
        self._words = options.copy()
        self._words[replay.OPTION_ON_VIOLATION] = replay.SKIP
        # That it goes by a stale translation was told when it was asked about.
        self._count[translated.COUNT_NOTED] = 0
        try:
            while True:
                listed = int(self._used[0])
                status, after = self._enter(chunk, run, gvas, at, place.base)
                if status == replay.NEED_FRAMES:
                    self._draft.ensure()
                elif status == replay.LOG_FULL:
                    self._drain(chunk, place.base)
                elif status != record_checks.DONE:
                    self._refuse_in(chunk, status, run, at, place.base)
                elif after > at:
                    return int(self._used[0]) > listed
        finally:
            self._words = options
            self._count[translated.COUNT_STALE] = counts[translated.COUNT_STALE]
            self._count[translated.COUNT_NOTED] = counts[translated.COUNT_NOTED]
