"""Replays of traces that have operations between their accesses, or say under which page tables each access is.

Accesses run in stretches up to the next operation, through ``trace.translated``. What an operation does, and which one
should have removed a translation that proved stale, is for the room above to say: see ``Performs``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from engine.errors import TraceError
from engine.state.frame_store import Draft
from engine.trace import object_hits, record_checks, translated
from engine.trace.columns import TraceChunk
from engine.trace.operations import NO_SPACE, Operation, Operations
from engine.trace.results import TraceResult
from engine.trace.serving import Run
from engine.trace.session import Replay, ReplayOptions
from engine.trace.translations import MOST_LISTED, Translations

# Rows of the buffer that the kernel notes stale translations in, and that is emptied when full.
FOUND_ROWS = 256

_RULES = {
    translated.BAD_OFFSET: ("gva", "must be in the same place of its page as gpa: bits 11:0 are equal"),
    translated.BAD_SPACE: ("address_space", "must be a value that CR3 can have"),
}
_OFF = "operations and address spaces are about the translation cache: the VM has translation_cache model"


class Performs(Protocol):
    """What a replay asks of whoever knows operations."""

    def go_on(self, draft: Draft) -> None:
        """What comes is done to the machine as it is now."""

    def perform(self, index: int, vcpu: int, operation: Operation, tally: NDArray[np.int64]) -> None:
        """Execute the operation of record ``index``. Raises TraceError for one that cannot be."""

    def explain(self, row: NDArray[np.int64]) -> None:
        """List a stale translation, a row of ``trace.translated``'s ``found``."""

    def translations(self, stale: int) -> Translations:
        """Everything so far; ``stale`` accesses went by stale translations."""


class Operating(Replay):
    """What replays have in common whose chunks may have operations. Chunks without go the way of every replay."""

    def _operate(self, before: Callable[[TraceChunk], None], performs: Performs) -> None:
        """To be called when one is made."""
        self._enter_guest = before
        self._performs = performs
        rows = len(self._draft.machine.tlb)
        self._uses = np.full((rows, translated.USE_WORDS), translated.NEVER, dtype=np.int64)
        self._found = np.zeros((FOUND_ROWS, translated.FOUND_WORDS), dtype=np.int64)
        self._count = np.array([0, 0, 1], dtype=np.int64)
        self._no_spaces: NDArray[np.uint64] = np.zeros(0, dtype=np.uint64)
        self._listed = 0

    def _beside(self, chunk: TraceChunk) -> Operations | None:
        """The operations of a chunk that goes by translations; None where it is replayed as any other."""
        beside = chunk.operations
        if beside is None or (beside.plain and not len(self._uses)) or self._tables is not None:
            return None
        return beside

    def _enter(self, chunk: TraceChunk, run: Run, gvas: NDArray[np.int64], position: int, base: int) -> tuple[int, int]:
        beside = self._beside(chunk)
        if beside is None:
            return super()._enter(chunk, run, gvas, position, base)
        self._check_modelled(chunk, position, base)
        following = int(np.searchsorted(beside.at, position))
        end = run.length
        stop = min(int(beside.at[following]), end) if following < len(beside.at) else end
        if stop == position:
            return self._come_to(chunk, beside.items[following], position, base)
        part = chunk.records[position:stop]
        self._enter_guest(TraceChunk(part, None, {}, operations=beside))
        status, position = translated.replay(
            self._draft.machine,
            run.words,  # columns have no operations
            gvas,
            beside.spaces.view(np.int64),
            position,
            stop,
            base,
            self._words,
            self._trail,
            self._log,
            self._used,
            self.tally,
            self._uses,
            self._found,
            self._count,
        )
        self._explain()
        return record_checks.DONE if status == translated.FOUND_FULL else int(status), int(position)

    def _check_modelled(self, chunk: TraceChunk, position: int, base: int) -> None:
        if len(self._uses) or chunk.operations is None:
            return
        field = "op" if len(chunk.operations.at) or not len(chunk.operations.spaces) else "address_space"
        raise TraceError(_OFF, index=base + position, field=field, value="off")

    def _come_to(self, chunk: TraceChunk, operation: Operation, position: int, base: int) -> tuple[int, int]:
        """Do what is at a position of the chunk; returns as ``_enter``."""
        self._perform(chunk, operation, base + position)
        return record_checks.DONE, position + 1

    def _perform(self, chunk: TraceChunk, operation: Operation, index: int) -> None:
        vcpu = int(chunk.records[operation.position, 1]) >> 32 & 0xFFFF
        known = self._draft.machine.vcpu_of_id
        if vcpu >= len(known) or known[vcpu] < 0:
            raise TraceError("must be the id of a vCPU of this machine", index=index, field="vcpu", value=vcpu)
        self._performs.perform(index, vcpu, operation, self.tally)

    def _explain(self) -> None:
        used = int(self._count[translated.COUNT_USED])
        for row in self._found[:used]:
            self._performs.explain(row)
        self._count[translated.COUNT_USED] = 0
        self._listed += used
        self._count[translated.COUNT_NOTED] = self._listed < MOST_LISTED

    def _refuse_in(self, chunk: TraceChunk, status: int, run: Run, position: int, base: int) -> None:
        if status not in _RULES:
            super()._refuse_in(chunk, status, run, position, base)
        name, rule = _RULES[status]
        assert chunk.operations is not None
        column = chunk.gva if status == translated.BAD_OFFSET else chunk.operations.spaces
        assert column is not None
        raise TraceError(rule, index=base + position, field=name, value=int(column[position]))

    def result(self) -> TraceResult:
        """Totals, exit records, and what was found out about translations."""
        found = self._performs.translations(int(self._count[translated.COUNT_STALE]))
        return super().result().with_translations(found)


class TimedReplay(Operating):
    """A replay of a trace that may have operations."""

    def __init__(
        self,
        draft: Draft,
        options: ReplayOptions,
        targets: object_hits.Targets,
        before: Callable[[TraceChunk], None],
        performs: Performs,
    ) -> None:
        super().__init__(draft, options, targets, before)
        self._operate(before, performs)


assert translated.NO_SPACE == NO_SPACE - (1 << 64), "one sentinel, signed and unsigned"
