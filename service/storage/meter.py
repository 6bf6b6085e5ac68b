"""What a transaction took: told to whoever keeps metrics of the store."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from service.storage.records import Block, Change


@dataclass(frozen=True, slots=True)
class Transaction:
    """One transaction of the owner.

    ``octets`` are heads, blocks, exit records, events, answers and footprints, before the database's own overhead;
    ``seconds`` run from its first statement to the end of its commit. ``stored`` tells whether it was committed.
    """

    changes: int
    octets: int
    seconds: float
    stored: bool


Observer = Callable[[Transaction], None]
"""Called in the thread that writes."""


def nobody(transaction: Transaction) -> None:
    """Takes no note."""


class Meter:
    """Measures one transaction from its creation on."""

    def __init__(self, changes: int) -> None:
        self._changes = changes
        self._octets = 0
        self._began = time.perf_counter()

    def metered(self, change: Change) -> Change:
        """``change``, counted as it is written."""
        parts = (part for trace in change.traces for part in (trace.object_index, *trace.parts))
        self._octets += sum(map(len, parts)) + sum(len(trace.head) for trace in change.traces)
        self._octets += sum(len(event.body) for event in change.log.events)
        self._octets += sum(answer.size for side in change.sides for answer in side.answers)
        self._octets += sum(record.size + len(record.head) for side in change.sides for record in side.footprints)

        def head() -> str:
            text = change.head()
            self._octets += len(text)
            return text

        def blocks() -> Iterator[Block]:
            for block in change.blocks():
                self._octets += len(block[2])
                yield block

        return replace(change, head=head, blocks=blocks)

    def ended(self, *, stored: bool) -> Transaction:
        """What it came to."""
        return Transaction(self._changes, self._octets, time.perf_counter() - self._began, stored)
