"""The decision at each route: who is asking, may they, and how often.

The way in costs a dictionary lookup and one hash. Records are read from their store once at the start and again every
few seconds, so that a token that another process made or revoked counts without a restart.
"""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Literal
from urllib.parse import urlsplit

from starlette.types import Scope

from service.problems import Forbidden, NotReady, RateLimited, Unauthenticated
from service.security.tokens import (
    DEFAULT_TENANT,
    Clock,
    Token,
    TokenStore,
    TokensUnavailable,
    digest_of,
    split,
    utc_now,
)
from service.settings import Settings

Permission = Literal["public", "read", "write", "admin", "metrics"]

# How soon a store that could not be read at first is read again.
_FIRST_READ_SECONDS = 0.5

# A scope includes those before it. Metrics are of all tenants and so for admins, unless they are made public.
_SCOPE: dict[Permission, str] = {
    "public": "public",
    "read": "read",
    "write": "write",
    "admin": "admin",
    "metrics": "admin",
}
_RANK = {"public": 0, "read": 1, "write": 2, "admin": 3}

logger = logging.getLogger("subpage")


@dataclass(slots=True)
class Bucket:
    """Requests that a token may still make now; refilled at ``rate`` a second up to ``burst``."""

    left: float
    filled: float

    def take(self, rate: float, burst: float, now: float) -> float:
        """0 when the request is within the limit, else the seconds until it would be."""
        self.left = min(burst, self.left + (now - self.filled) * rate)
        self.filled = now
        if self.left >= 1:
            self.left -= 1
            return 0.0
        return (1 - self.left) / rate


@dataclass(frozen=True, slots=True)
class Principal:
    """Who is asking. ``token`` is the id of the token, empty when none is needed."""

    token: str
    name: str
    tenant: str
    scope: str
    bucket: Bucket | None = field(default=None, compare=False)


# Whoever asks where no credentials are needed: a loopback service without tokens.
LOCAL_ADMIN = Principal("", "anybody", DEFAULT_TENANT, "admin")
# Nobody yet: the caller of a public route, or one that was refused.
NOBODY = Principal("", "", DEFAULT_TENANT, "public")


def is_loopback(host: str) -> bool:
    """Whether ``host``, a name or an address, is this machine only."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


@lru_cache(maxsize=256)
def _local_authority(host: bytes) -> bool:
    try:
        return is_loopback(urlsplit(f"//{host.decode('latin-1')}").hostname or "")
    except ValueError:
        return False


def _invalid(rule: str) -> Unauthenticated:
    challenge = 'Bearer realm="subpage", error="invalid_token"'
    return Unauthenticated(rule, field="Authorization", headers={"WWW-Authenticate": challenge})


class AccessControl:
    """Tokens as the service knows them now, used from the event loop only."""

    def __init__(
        self,
        settings: Settings,
        store: TokenStore | None,
        *,
        clock: Clock = utc_now,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._store = store
        self._refresh = settings.token_refresh
        self._rate, self._burst = settings.rate_limit, float(settings.rate_burst)
        self._metrics_public = settings.metrics_public
        self._clock, self._monotonic = clock, monotonic
        self._tokens: dict[str, tuple[Token, Principal]] = {}
        # Until the store was read once, nobody knows whether callers need tokens.
        self._known = store is None
        self._tenants = 1
        # Those whose connections are open, and how each is told that its token is not valid any more.
        self._watched: dict[Principal, list[Callable[[], None]]] = {}
        self._fixed: tuple[bytes, Principal] | None = None
        if settings.token is not None:
            principal = Principal("fixed", "SUBPAGE_TOKEN", DEFAULT_TENANT, "admin", self._bucket())
            self._fixed = (digest_of(settings.token.get_secret_value()), principal)

    def _bucket(self) -> Bucket:
        return Bucket(self._burst, self._monotonic())

    @property
    def guarded(self) -> bool:
        """Whether callers need a token: there is one, or there was."""
        return self._fixed is not None or bool(self._tokens)

    @property
    def usable(self) -> bool:
        """Whether anybody could get in with a token now."""
        now = self._clock()
        return self._fixed is not None or any(token.usable(now) for token, _ in self._tokens.values())

    @property
    def tenants(self) -> int:
        """How many tenants have tokens, revoked ones left out; one where nobody needs any."""
        return self._tenants

    def load(self) -> None:
        """Read the store. Blocking; raises what the store raises."""
        if self._store is not None:
            self._take(list(self._store.all()))

    async def open(self) -> None:
        """Read the store for the first time; while that fails, nobody but the fixed token is let in."""
        if self._store is not None:
            try:
                self._take(list(await asyncio.to_thread(self._store.all)))
            except TokensUnavailable as error:
                logger.error("the tokens cannot be read; trying again: %s", error)
            except Exception:
                logger.exception("the tokens cannot be read; trying again")

    def _take(self, tokens: list[Token]) -> None:
        self._known = True
        known = self._tokens
        self._tokens = {
            token.id: (token, known[token.id][1] if token.id in known else self._principal(token)) for token in tokens
        }
        now = self._clock()
        tenants = {token.tenant for token in tokens if token.usable(now)}
        self._tenants = max(1, len(tenants | {DEFAULT_TENANT} if self._fixed is not None else tenants))

    def _principal(self, token: Token) -> Principal:
        return Principal(token.id, token.name, token.tenant, token.scope, self._bucket())

    @property
    def known(self) -> bool:
        """Whether the store was read, so that it is decided who may come in."""
        return self._known or self._fixed is not None

    async def keep_fresh(self, told: Callable[[], None]) -> None:
        """Read the store again and again, and tell of it. When it cannot be read, what is known goes on to count."""
        if self._store is None:
            return
        while True:
            await asyncio.sleep(self._refresh if self._known else min(self._refresh, _FIRST_READ_SECONDS))
            try:
                self._take(list(await asyncio.to_thread(self._store.all)))
            except TokensUnavailable as error:
                # Without its causes: a driver quotes what it takes for the host's name, which may be of a password.
                logger.error("the tokens cannot be read again; those that are known go on to count: %s", error)
            except Exception:
                logger.exception("the tokens cannot be read again; those that are known go on to count")
            else:
                told()
            self._tell_leaving()

    def _tell_leaving(self) -> None:
        for principal in [known for known in self._watched if not self.holds(known)]:
            for leave in self._watched.pop(principal):
                leave()

    @contextmanager
    def watching(self, principal: Principal, leave: Callable[[], None]) -> Iterator[None]:
        """Call ``leave``, once, as soon as it is noticed that the caller would not be let in any more."""
        self._watched.setdefault(principal, []).append(leave)
        try:
            yield
        finally:
            watchers = self._watched.get(principal, [])
            if leave in watchers:
                watchers.remove(leave)
                if not watchers:
                    del self._watched[principal]

    def check(self, principal: Principal) -> None:
        """Raise Unauthenticated (401) for a caller that was let in and would not be any more."""
        if not self.holds(principal):
            raise _invalid("is not valid any more; nothing was changed")

    def holds(self, principal: Principal) -> bool:
        """Whether a caller that was let in would be let in still: connections outlive the tokens they came with."""
        if not principal.token:
            return not self.guarded
        if self._fixed is not None and principal is self._fixed[1]:
            return True
        known = self._tokens.get(principal.token)
        return known is not None and known[0].usable(self._clock())

    def authorize(
        self, scope: Scope, permission: Permission, authorization: bytes | None, host: bytes | None
    ) -> Principal:
        """The caller of a route that demands ``permission``; also left in ``scope["principal"]``, refused or not.

        Raises Unauthenticated (401), Forbidden (403) or RateLimited (429).
        """
        scope["principal"] = NOBODY
        if permission == "public" or (permission == "metrics" and self._metrics_public):
            return NOBODY
        if not self.guarded:
            if not self._known:
                raise NotReady("the tokens have not been read yet; try again")
            # A web page can make its own name resolve to 127.0.0.1; its requests then carry that name.
            if host is not None and not _local_authority(host):
                rule = "must be a loopback name or address: without tokens the service is for this machine only"
                raise Forbidden(rule, field="Host", value=host.decode("latin-1"))
            scope["principal"] = LOCAL_ADMIN
            return LOCAL_ADMIN
        principal = scope["principal"] = self._identify(authorization)
        needed = _SCOPE[permission]
        if _RANK[principal.scope] < _RANK[needed]:
            challenge = f'Bearer realm="subpage", error="insufficient_scope", scope="{needed}"'
            rule = f"must be a token with scope {needed}; this one has {principal.scope}"
            raise Forbidden(rule, field="Authorization", headers={"WWW-Authenticate": challenge})
        if self._rate:
            self._count(principal)
        return principal

    def _identify(self, authorization: bytes | None) -> Principal:
        if authorization is None:
            rule, challenge = "must be given: Bearer and a token", 'Bearer realm="subpage"'
            raise Unauthenticated(rule, field="Authorization", headers={"WWW-Authenticate": challenge})
        scheme, _, text = authorization.decode("latin-1").partition(" ")
        if scheme.lower() == "bearer":
            text = text.strip()
            parts = split(text)
            known = self._tokens.get(parts[0]) if parts else None
            if parts and known and known[0].proves(parts[1]) and known[0].usable(self._clock()):
                return known[1]
            if self._fixed is not None and hmac.compare_digest(digest_of(text), self._fixed[0]):
                return self._fixed[1]
        if not self._known:
            raise NotReady("the tokens have not been read yet; try again")
        # Unknown, expired and revoked read the same: what is not said cannot be learned.
        raise _invalid("must be Bearer and a token that is valid now")

    def _count(self, principal: Principal) -> None:
        assert principal.bucket is not None
        wait = principal.bucket.take(self._rate, self._burst, self._monotonic())
        if wait:
            rule = f"at most {self._rate:g} requests a second for one token, {self._burst:g} at once"
            raise RateLimited(rule, field="rate_limit", headers={"Retry-After": str(int(wait) + 1)})
