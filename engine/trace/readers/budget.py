"""What one body may take of memory while it is read.

A body of some kilobytes can claim gigabytes: compressed buffers, pages and dictionaries say how large they become.
Whoever allocates for a body asks first, so that memory follows the budget and not the claim.
"""

from __future__ import annotations

from collections.abc import Callable

from engine.errors import TraceError

# A batch of 16 M records with all columns of 64-bit words that a record has, and some more.
DEFAULT_MEMORY = 512 << 20

# Records that may come of a body: many equal ones cost next to nothing.
MANY_RECORDS = 1 << 28
RECORDS_A_BYTE = 16


class Budget:
    """The memory of one body: ``keep`` is for what stays, ``check`` for what is there only for a while.

    ``take`` is asked for what the body needs more than it ever did, and raises where bodies together have too much;
    whoever gave it takes all of that back when the body is done with.
    """

    def __init__(self, limit: int, take: Callable[[int], None] = lambda size: None) -> None:
        self.limit = limit
        self.kept = 0
        self._take = take
        self._taken = 0

    @classmethod
    def of(cls, memory: int | Budget) -> Budget:
        """So many bytes for a body that is alone, or the budget that there is."""
        return memory if isinstance(memory, Budget) else cls(memory)

    def check(self, size: int, what: str) -> None:
        """Raise TraceError unless ``size`` bytes more may be taken for ``what``, and what ``take`` raises."""
        if self.kept + size > self.limit:
            rule = f"{what} may take up to {self.limit} bytes of memory: send it in smaller parts"
            raise TraceError(rule, value=self.kept + size)
        more = self.kept + size - self._taken
        if more > 0:
            self._take(more)
            self._taken += more

    def has(self, size: int) -> bool:
        """Whether ``size`` bytes more are within what this body may take."""
        return self.kept + size <= self.limit

    def keep(self, size: int, what: str) -> None:
        """Take them; a negative size gives back what was kept."""
        if size > 0:
            self.check(size, what)
        elif self.kept + size < 0:
            raise ValueError("more is given back than was kept")
        self.kept += size
