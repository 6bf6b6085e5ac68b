"""Limits of the service that its tenants share, so that none of them can take what another needs to go on working.

Of each limit one half is kept in equal parts for the tenants that have a token, each part for its own tenant alone; the
other half is for whoever comes first. A tenant without others has all of it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from engine.errors import LimitExceeded

Tenants = Callable[[], int]
"""How many tenants there are."""


def one_tenant() -> int:
    return 1


class ShareExceeded(LimitExceeded):
    """A limit of the service, or what a tenant may have of it, would be passed; ``members`` are those of the problem
    that name the setting, and say whether the tenant or the whole service has come to its limit."""

    def __init__(self, rule: str, *, field: str, value: int, whose: str = "service") -> None:
        super().__init__(rule, field=field, value=value)
        self.members = {"limit": field, "limit_of": whose}


class Share:
    """One limit: the setting ``name``, at most ``most`` of ``what`` at one time. Used from the event loop only.

    ``firm``: never more than ``most``. Otherwise a tenant finds its own part free even where others had more than the
    rest before it came; they are then half as many again together at the worst.
    """

    def __init__(self, name: str, most: int, what: str, tenants: Tenants = one_tenant, *, firm: bool = False) -> None:
        self.name = name
        self.most = most
        self._what = what
        self._tenants = tenants
        self._firm = firm
        self.used = 0
        self._by: Counter[str] = Counter()

    def of(self, tenant: str) -> int:
        """What a tenant has."""
        return self._by[tenant]

    def room(self, tenant: str) -> int:
        """How much more a tenant may take now."""
        tenants = max(self._tenants(), len(self._by) + (tenant not in self._by))
        if tenants == 1:
            return self.most - self.used
        part = self.most // (2 * tenants)
        taken = sum(min(part, used) for other, used in self._by.items() if other != tenant)
        free = self.most - self.used - (part * (tenants - 1) - taken)
        return free if self._firm else max(free, part - self._by[tenant])

    def take(self, tenant: str, count: int = 1) -> None:
        """Give ``count`` to a tenant. Raises ShareExceeded."""
        if count > self.room(tenant):
            raise self.exceeded(tenant)
        self.count(tenant, count)

    def count(self, tenant: str, count: int) -> None:
        """A tenant has ``count`` more, or fewer, whatever the limit says."""
        self.used += count
        self._by[tenant] += count
        if not self._by[tenant]:
            del self._by[tenant]

    @contextmanager
    def place(self, tenant: str) -> Iterator[None]:
        """One for the time of the context. Raises ShareExceeded."""
        self.take(tenant)
        try:
            yield
        finally:
            self.count(tenant, -1)

    def exceeded(self, tenant: str) -> ShareExceeded:
        """The refusal of what a tenant may not take."""
        rule, whose = f"at most {self.most} {self._what}", "service"
        if self.used < self.most or self._by[tenant] < self.used:
            rule, whose = f"{rule} over all tenants, of which this one has its part; others have theirs", "tenant"
        return ShareExceeded(rule, field=self.name, value=self.most, whose=whose)
