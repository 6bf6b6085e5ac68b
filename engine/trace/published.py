"""A replay that is published while its trace still comes: between two of its chunks the machine is anybody's.

Each stretch is a change of its own, on the state that the machine has by then; totals, and the numbers of records, span
all stretches. What was published need not be held any longer: exit records are handed over as they come.
"""

from __future__ import annotations

from engine.trace.columns import TraceChunk
from engine.trace.interactive import InteractiveReplay
from engine.trace.results import TraceResult
from engine.trace.session import Replay


class PublishedReplay(InteractiveReplay):
    """An interactive replay that asks nobody: it does what ``on_violation`` says, and pauses where it is told to."""

    # Exit records before this position are not held any more.
    _handed = 0

    def _stop(self, chunk: TraceChunk, base: int, position: int) -> None:
        Replay._stop(self, chunk, base, position)

    @property
    def resume_at(self) -> int:
        """Index of the first record that has not been run."""
        return max(self._next, self._options.start) if self.stopped_at is None else self.stopped_at

    def result_from(self, first: int) -> TraceResult:
        """Totals so far, and the exit records from position ``first`` on; those before it are forgotten."""
        found = self.result()
        left = found.exit_columns[first - self._handed :]
        self._parts = [left] if len(left) else []
        self._handed = first
        return found.with_exits(left)
