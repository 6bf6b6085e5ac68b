"""Tokens as a table of the store. Written by ``subpage token`` beside the service that owns the rest of the store."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any

import sqlalchemy as sa
from sqlalchemy.exc import SQLAlchemyError

from service.security.tokens import Token, TokensUnavailable
from service.storage.database import connect, reason_of
from service.storage.lease import lease_of
from service.storage.migrate import migrate, stored_revision
from service.storage.schema import REVISION, tokens
from service.storage.urls import StoreUrl


class StoredTokens:
    """A ``TokenStore`` in a store; each call has a connection of its own, because calls are seconds apart."""

    def __init__(self, url: StoreUrl) -> None:
        self._url = url

    @contextmanager
    def _transaction(self, *, writes: bool) -> Iterator[sa.Connection]:
        engine = connect(self._url)
        try:
            with engine.connect().execution_options(writes=writes) as connection:
                if writes:
                    self._migrate(connection)
                with connection.begin():
                    yield connection
        except SQLAlchemyError as error:
            raise TokensUnavailable(f"the store {self._url.shown}: {reason_of(error)}") from error
        finally:
            engine.dispose()

    def _migrate(self, connection: sa.Connection) -> None:
        """Make the table when nobody owns the store; its owner has made it otherwise."""
        with connection.begin():
            if stored_revision(connection) == REVISION:
                return
        lease = lease_of(self._url)
        try:
            with connection.begin():
                if lease.take(connection):
                    migrate(connection)
        finally:
            lease.release()

    def all(self) -> Sequence[Token]:
        if self._url.path is not None and not self._url.path.exists():
            return []
        with self._transaction(writes=False) as connection:
            if not sa.inspect(connection).has_table(tokens.name):
                return []
            listed = connection.execute(sa.select(tokens).order_by(tokens.c.created, tokens.c.id))
            return [_token(row._mapping) for row in listed]

    def add(self, token: Token) -> None:
        with self._transaction(writes=True) as connection:
            connection.execute(
                sa.insert(tokens).values({name: _stored(value) for name, value in asdict(token).items()})
            )

    def revoke(self, token_id: str, now: datetime) -> bool:
        with self._transaction(writes=True) as connection:
            first = sa.func.coalesce(tokens.c.revoked, _stored(now))
            changed = connection.execute(sa.update(tokens).where(tokens.c.id == token_id).values(revoked=first))
            return changed.rowcount > 0


def _stored(value: Any) -> Any:
    return value.astimezone(UTC).isoformat() if isinstance(value, datetime) else value


def _token(row: Any) -> Token:
    times = {name: row[name] and datetime.fromisoformat(row[name]) for name in ("created", "expires", "revoked")}
    return Token(**{**row, **times, "digest": bytes(row["digest"])})
