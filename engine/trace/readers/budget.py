"""What one body may take of memory while it is read.

A body of some kilobytes can claim gigabytes: compressed buffers, pages and dictionaries say how large they become.
Whoever allocates for a body asks first, so that memory follows the budget and not the claim.
"""

from __future__ import annotations

from engine.errors import TraceError

# A batch of 16 M records with all columns of 64-bit words that a record has, and some more.
DEFAULT_MEMORY = 512 << 20


class Budget:
    """The memory of one body: ``keep`` is for what stays, ``check`` for what is there only for a while."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.kept = 0

    def check(self, size: int, what: str) -> None:
        """Raise TraceError unless ``size`` bytes more may be taken for ``what``."""
        if self.kept + size > self.limit:
            rule = f"{what} may take up to {self.limit} bytes of memory: send it in smaller parts"
            raise TraceError(rule, value=self.kept + size)

    def keep(self, size: int, what: str) -> None:
        """Take them; a negative size gives back."""
        if size > 0:
            self.check(size, what)
        self.kept += size
