"""What the bodies of all replays may take of memory together while they are read."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from engine.trace.readers import Budget
from service.runtime.shares import Share, Tenants, one_tenant


class BodyMemory:
    """At most ``most`` bytes, of which each tenant has its share, and ``one`` for one body. From any thread.

    The setting ``name`` bounds ``what``, which need not be bodies.
    """

    def __init__(
        self,
        one: int,
        most: int,
        tenants: Tenants = one_tenant,
        name: str = "max_body_memory_bytes",
        what: str = "the Arrow and Parquet bodies that are read at one time",
    ) -> None:
        self._one = one
        self._share = Share(name, most, f"bytes of memory may be taken by {what}", tenants, firm=True)
        self._lock = threading.Lock()

    @property
    def used(self) -> int:
        """Bytes that they take."""
        return self._share.used

    @contextmanager
    def budget(self, tenant: str) -> Iterator[Budget]:
        """The budget of one body of a tenant, whose reading ends with the context; it may raise ShareExceeded."""
        taken = 0

        def take(size: int) -> None:
            nonlocal taken
            with self._lock:
                self._share.take(tenant, size)
                taken += size

        try:
            yield Budget(self._one, take)
        finally:
            with self._lock:
                self._share.count(tenant, -taken)
