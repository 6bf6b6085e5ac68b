"""Bearer tokens: what one is, how it is made and checked, and where tokens are kept.

A token reads ``sp_<id>_<secret>``. The id finds the record, the secret proves the right to it. Only the SHA-256 of the
secret is kept: the secret has 256 random bits, so a slow hash would protect nothing that guessing could reach.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import re
import secrets
import sqlite3
import threading
from collections.abc import Callable, Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal, Protocol, get_args
from urllib.parse import quote

from service.platform.files import make_private

TokenScope = Literal["read", "write", "admin"]
SCOPES: tuple[str, ...] = get_args(TokenScope)
DEFAULT_TENANT = "default"

_TOKEN = re.compile(r"sp_([0-9a-f]{12})_([A-Za-z0-9_-]{43})")
# Also where it was cut, or has a letter too many: nearly all of a secret is still one.
_TOKEN_WITHIN = re.compile(r"sp_([0-9a-f]{12})_[A-Za-z0-9_-]{8,}")
TENANT = r"[a-z0-9][a-z0-9._-]{0,62}"
_TENANT = re.compile(TENANT)


@dataclass(frozen=True, slots=True)
class Token:
    """The record of one token; times are UTC. ``digest`` is the SHA-256 of its secret."""

    id: str
    name: str
    tenant: str
    scope: TokenScope
    digest: bytes
    created: datetime
    expires: datetime | None = None
    revoked: datetime | None = None

    def usable(self, now: datetime) -> bool:
        """Neither revoked nor expired."""
        return self.revoked is None and (self.expires is None or now < self.expires)

    def proves(self, secret: str) -> bool:
        """Whether ``secret`` is this token's, in a time that does not depend on where the two differ."""
        return hmac.compare_digest(digest_of(secret), self.digest)


class TokensUnavailable(Exception):
    """Where tokens are kept cannot be read or written; the text says why."""


class TokenStore(Protocol):
    """Where tokens are kept. Blocking, and called from threads; every call may raise TokensUnavailable.

    Records are added and revoked, never removed. That of a revoked token stays, so that revoking the last one does not
    open the service, and ids in the audit log keep their meaning.
    """

    def all(self) -> Sequence[Token]:
        """Every record, oldest first."""

    def add(self, token: Token) -> None:
        """Keep a new record; durable when it returns."""

    def revoke(self, token_id: str, now: datetime) -> bool:
        """Mark the record; durable when it returns. False if there is none. Revoking twice keeps the first time."""


def digest_of(secret: str) -> bytes:
    return hashlib.sha256(secret.encode()).digest()


def split(text: str) -> tuple[str, str] | None:
    """Id and secret of what reads like a token."""
    match = _TOKEN.fullmatch(text)
    return (match[1], match[2]) if match else None


def without_tokens(text: str, secret: str | None = None) -> str:
    """``text`` with the secrets of all that reads like a token hidden, and ``secret`` (see setting ``token``)."""
    if "sp_" in text:
        text = _TOKEN_WITHIN.sub(r"sp_\1_(hidden)", text)
    if secret:
        for spelling in {secret, quote(secret), quote(secret, safe=""), json.dumps(secret)[1:-1]}:
            text = text.replace(spelling, "(hidden)")
    return text


def mint(
    name: str,
    *,
    tenant: str = DEFAULT_TENANT,
    scope: TokenScope = "read",
    now: datetime,
    expires: datetime | None = None,
) -> tuple[Token, str]:
    """A new record, and the token itself, which is nowhere else. Raises ValueError, naming the rule."""
    if not _TENANT.fullmatch(tenant):
        raise ValueError("a tenant is 1 to 63 of a-z, 0-9, dot, dash and underscore, and starts with a letter or digit")
    if scope not in SCOPES:
        raise ValueError(f"a scope is one of {', '.join(SCOPES)}")
    if expires is not None and expires <= now:
        raise ValueError("a token must expire in the future")
    if len(name) > 200:
        raise ValueError("a name has at most 200 characters")
    if not name.isprintable():
        raise ValueError("a name has no control characters")
    token_id, secret = secrets.token_hex(6), secrets.token_urlsafe(32)
    return Token(token_id, name, tenant, scope, digest_of(secret), now, expires), f"sp_{token_id}_{secret}"


class MemoryTokens:
    """Tokens for as long as the process lives."""

    def __init__(self, tokens: Iterable[Token] = ()) -> None:
        self._tokens = {token.id: token for token in tokens}

    def all(self) -> Sequence[Token]:
        return list(self._tokens.values())

    def add(self, token: Token) -> None:
        self._tokens[token.id] = token

    def revoke(self, token_id: str, now: datetime) -> bool:
        token = self._tokens.get(token_id)
        if token is not None and token.revoked is None:
            self._tokens[token_id] = replace(token, revoked=now)
        return token is not None


_SCHEMA = """
CREATE TABLE IF NOT EXISTS tokens (
    id TEXT PRIMARY KEY,
    name TEXT NOT NULL,
    tenant TEXT NOT NULL,
    scope TEXT NOT NULL,
    digest BLOB NOT NULL,
    created TEXT NOT NULL,
    expires TEXT,
    revoked TEXT
) STRICT
"""


class FileTokens:
    """Tokens in a small SQLite file of their own, which the service reads and ``subpage token`` writes."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()

    def _run(self, statement: str, values: Sequence[object] = ()) -> tuple[list[tuple[str, ...]], int]:
        try:
            return self._execute(statement, values)
        except sqlite3.IntegrityError:
            raise  # a token of that id: a defect, not the file's fault
        except (OSError, sqlite3.Error) as error:
            reason = getattr(error, "strerror", None) or error
            raise TokensUnavailable(f"{self._path}: {reason}") from error

    def _execute(self, statement: str, values: Sequence[object]) -> tuple[list[tuple[str, ...]], int]:
        with self._lock:
            make_private(self._path)
            with closing(sqlite3.connect(self._path, timeout=5, isolation_level=None)) as connection:
                connection.execute("PRAGMA synchronous=FULL")
                connection.execute(_SCHEMA)
                cursor = connection.execute(statement, values)
                return cursor.fetchall(), cursor.rowcount

    def all(self) -> Sequence[Token]:
        rows, _ = self._run(
            "SELECT id, name, tenant, scope, digest, created, expires, revoked FROM tokens ORDER BY created, id"
        )
        return [_token(row) for row in rows]

    def add(self, token: Token) -> None:
        values = (token.id, token.name, token.tenant, token.scope, token.digest)
        times = tuple(_text(time) for time in (token.created, token.expires, token.revoked))
        self._run("INSERT INTO tokens VALUES (?, ?, ?, ?, ?, ?, ?, ?)", values + times)

    def revoke(self, token_id: str, now: datetime) -> bool:
        _, changed = self._run("UPDATE tokens SET revoked = coalesce(revoked, ?) WHERE id = ?", (_text(now), token_id))
        return changed > 0


def _text(time: datetime | None) -> str | None:
    return time.astimezone(UTC).isoformat() if time is not None else None


def _time(text: str | None) -> datetime | None:
    return datetime.fromisoformat(text) if text is not None else None


def _token(row: Sequence[object]) -> Token:
    token_id, name, tenant, scope, digest, *times = row
    created, expires, revoked = (_time(time) for time in times)  # type: ignore[arg-type]
    return Token(token_id, name, tenant, scope, digest, created, expires, revoked)  # type: ignore[arg-type]


Clock = Callable[[], datetime]


def utc_now() -> datetime:
    return datetime.now(UTC)
