"""``subpage token``: the tokens that the service lets in."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Annotated, Any

import typer

from service.cli import show
from service.cli.commands import AsJson, Given, Group, command
from service.platform.failures import Failure

if TYPE_CHECKING:
    from service.security.tokens import Token

tokens = typer.Typer(
    cls=Group,
    help="Make, list and revoke the tokens that callers of a guarded service need.",
    no_args_is_help=True,
)


@contextlib.contextmanager
def _kept() -> Iterator[None]:
    """Where tokens are kept is used here: that it cannot be is told."""
    from service.security.tokens import TokensUnavailable

    try:
        yield
    except TokensUnavailable as error:
        raise Failure(str(error)) from None


_SPAN = re.compile(r"(\d{1,9})([smhdw])")
_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 604800}


def _expiry(text: str | None, now: datetime) -> datetime | None:
    """The end of a span such as ``90d``, or a moment in ISO 8601, which is UTC unless it says otherwise."""
    if text is None:
        return None
    try:
        if span := _SPAN.fullmatch(text):
            return now + timedelta(seconds=int(span[1]) * _UNITS[span[2]])
        moment = datetime.fromisoformat(text)
    except (ValueError, OverflowError):
        raise typer.BadParameter("must be a span such as 12h or 90d, or a moment such as 2027-01-31T12:00") from None
    return moment if moment.tzinfo is not None else moment.replace(tzinfo=UTC)


def _shown(moment: datetime | None) -> str:
    return moment.strftime("%Y-%m-%d %H:%M:%SZ") if moment is not None else "-"


def _scopes() -> list[str]:
    from service.security.tokens import SCOPES

    return list(SCOPES)


@command(tokens, "subpage token create scanner --scope write --expires 90d")
def create(
    context: typer.Context,
    name: Annotated[str, typer.Argument(help="What it is for; shown in lists and in the audit log.")],
    scope: Annotated[
        str, typer.Option(help="read, write or admin; each includes those before it.", autocompletion=_scopes)
    ] = "read",
    tenant: Annotated[str, typer.Option(help="Whose VMs it sees and creates.")] = "default",
    expires: Annotated[
        str | None, typer.Option(help="A span such as 12h or 90d, or a moment; never by default.")
    ] = None,
    as_json: AsJson = False,
    given: Given = None,
) -> None:
    """Make a token and print it. It is shown once: only a hash is kept."""
    from service.cli.common import audit_of, common_flags, load_settings, token_store
    from service.security.tokens import mint, utc_now

    settings = load_settings(**common_flags(context))
    now = utc_now()
    try:
        record, token = mint(name, tenant=tenant, scope=scope, now=now, expires=_expiry(expires, now))  # type: ignore[arg-type]
    except ValueError as error:
        raise typer.BadParameter(str(error), ctx=context) from None
    with _kept():
        token_store(settings).add(record)
    audit_of(settings).write(
        "token-created", None, token=record.id, name=name, tenant=tenant, scope=scope, expires=record.expires
    )
    if as_json:
        show.document({"token": token, **_document(record, now)})
    else:
        typer.echo(token)


@command(tokens, "subpage token list", name="list")
def list_(context: typer.Context, as_json: AsJson = False, given: Given = None) -> None:
    """List the tokens: id, state, scope, tenant, times and name, never the token itself."""
    from service.cli.common import common_flags, load_settings, token_store
    from service.security.tokens import utc_now

    now = utc_now()
    with _kept():
        listed = token_store(load_settings(**common_flags(context))).all()
    documents = [_document(token, now) for token in listed]
    if as_json:
        show.document(documents)
        return
    names = ("id", "state", "scope", "tenant", "created", "expires", "name")
    times = ({"created": _shown(token.created), "expires": _shown(token.expires)} for token in listed)
    rows = ({**found, **shown} for found, shown in zip(documents, times, strict=True))
    show.table(names, ([row[name] for name in names] for row in rows))


def _document(token: Token, now: datetime) -> dict[str, Any]:
    """What may be told of a token."""
    state = "valid" if token.usable(now) else "revoked" if token.revoked else "expired"
    expires = None if token.expires is None else token.expires.isoformat()
    return {
        "id": token.id,
        "state": state,
        "scope": token.scope,
        "tenant": token.tenant,
        "created": token.created.isoformat(),
        "expires": expires,
        "name": token.name,
    }


@command(tokens, "subpage token revoke 3f9c2a1be07d")
def revoke(
    context: typer.Context,
    token: Annotated[str, typer.Argument(help="Its id, from `subpage token list`.")],
    as_json: AsJson = False,
    given: Given = None,
) -> None:
    """Refuse a token from now on; running services notice within SUBPAGE_TOKEN_REFRESH seconds."""
    from service.cli.common import audit_of, common_flags, load_settings, token_store
    from service.security.tokens import utc_now

    settings = load_settings(**common_flags(context))
    with _kept():
        known = token_store(settings).revoke(token, utc_now())
    if not known:
        raise Failure(f"there is no token with id {token}")
    audit_of(settings).write("token-revoked", None, token=token)
    if as_json:
        show.document({"revoked": token})
    else:
        typer.echo(f"revoked {token}")
