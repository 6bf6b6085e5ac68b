"""A replay that is published while its trace still comes: between two of its chunks the machine is anybody's.

Each stretch is a change of its own, on the state that the machine has by then; totals, and the numbers of records, span
all stretches. What was published need not be held any longer: exit records are handed over as they come.
"""

from __future__ import annotations

from engine.trace.columns import TraceChunk
from engine.trace.gathered import Gathered
from engine.trace.interactive import InteractiveReplay
from engine.trace.option_names import ASK
from engine.trace.results import ExitColumns, TraceResult
from engine.trace.session import Replay


class PublishedReplay(InteractiveReplay):
    """An interactive replay that pauses where it is told to, and asks only with ``on_violation`` ask: ``question`` is
    the exit that is asked about then. Otherwise it does what ``on_violation`` says."""

    # Exit records before this position are not held any more.
    _handed = 0
    question: ExitColumns | None = None

    def _stop(self, chunk: TraceChunk, base: int, position: int) -> None:
        if self._options.on_violation == ASK:
            super()._stop(chunk, base, position)
            self.question = self.asked
        else:
            Replay._stop(self, chunk, base, position)

    def answer(self, action: str, most: int | None = None, value: int | None = None) -> bool:
        self.question = None
        return super().answer(action, most, value)

    @property
    def resume_at(self) -> int:
        """Index of the first record that has not been run."""
        if self.stopped_at is not None:
            return self.stopped_at
        paused = self.paused_at
        return max(self._next, self._options.start) if paused is None else paused

    def result_from(self, first: int) -> TraceResult:
        """Totals so far, and the exit records from position ``first`` on; those before it are forgotten."""
        if self._place is not None:  # what the exit carries is in its chunk
            self._drain(self._place.chunk, self._place.base)
        found = self.result()
        left = found.exit_columns[first - self._handed :]
        self._exits = Gathered()
        if len(left):
            self._exits.add(left)
        self._handed = first
        return found.with_exits(left)
