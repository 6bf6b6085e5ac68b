"""What the commands share: settings with errors that name the variable, and what is opened from them."""

from __future__ import annotations

from typing import Any

import typer
from pydantic import ValidationError

from service.security.audit import AuditLog
from service.security.tokens import FileTokens, TokenStore
from service.settings import Settings


def load_settings(**given: Any) -> Settings:
    """The effective settings, ``given`` ones first; what is wrong with them ends the command with status 2."""
    try:
        return Settings(**given)
    except ValidationError as error:
        for fault in error.errors():
            typer.echo(f"SUBPAGE_{'_'.join(map(str, fault['loc'])).upper()}: {fault['msg']}", err=True)
        raise typer.Exit(2) from None


def token_store(settings: Settings) -> TokenStore:
    """Where tokens are kept; without such a place the command ends with status 2."""
    if settings.token_file is None:
        typer.echo("SUBPAGE_TOKEN_FILE must name the file that keeps the tokens", err=True)
        raise typer.Exit(2)
    return FileTokens(settings.token_file)


def audit_of(settings: Settings) -> AuditLog:
    return AuditLog(settings.audit_log)
