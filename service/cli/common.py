"""What the commands share: settings with errors that name the setting, and what is opened from them."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer
from pydantic import SecretStr, ValidationError

from service.security.audit import AuditLog
from service.security.token_stores import tokens_of
from service.security.tokens import TokenStore
from service.settings import CONFIG_VARIABLE, BadFile, Settings, file_settings
from service.storage import urls
from service.storage.urls import HIDDEN


def parse_flags(texts: list[str]) -> dict[str, Any]:
    """``NAME=VALUE`` texts as settings; lists are JSON. What is neither ends the command with status 2."""
    given: dict[str, Any] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or name not in Settings.model_fields:
            # The value may be a secret, and without a name so may be all of it.
            told = name if equals and name.isidentifier() else "…"
            rule = "must be NAME=VALUE with the name of a setting, see `subpage config`"
            typer.echo(f"--set {told}: {rule}", err=True)
            raise typer.Exit(2)
        try:
            given[name] = json.loads(value) if value.startswith("[") else value
        except ValueError:
            typer.echo(f"--set {name}: a list is JSON", err=True)
            raise typer.Exit(2) from None
    return given


def common_flags(context: typer.Context) -> dict[str, Any]:
    """Settings given before and after the command."""
    return dict(context.find_root().obj or {})


def flag_texts(given: dict[str, Any]) -> list[str]:
    """Settings as the NAME=VALUE texts that they were given as."""
    return [f"{name}={value if isinstance(value, str) else json.dumps(value)}" for name, value in given.items()]


def load_settings(**given: Any) -> Settings:
    """The effective settings, ``given`` ones first; what is wrong with them ends the command with status 2."""
    try:
        return Settings(**given)
    except BadFile as error:
        typer.echo(str(error), err=True)
    except ValidationError as error:
        for fault in error.errors():
            typer.echo(f"SUBPAGE_{'_'.join(map(str, fault['loc'])).upper()}: {fault['msg']}", err=True)
    raise typer.Exit(2)


def effective(settings: Settings, given: dict[str, Any]) -> Iterator[tuple[str, str, str]]:
    """Name, value and origin of each setting; the value as TOML, secrets hidden, ``none`` for what is not set."""
    file = file_settings()
    environment = {name.upper() for name in os.environ}
    for name in type(settings).model_fields:
        origin = "default"
        if name in given:
            origin = "flag"
        elif f"SUBPAGE_{name.upper()}" in environment:
            origin = "environment"
        elif name in file:
            origin = os.environ[CONFIG_VARIABLE]
        yield name, shown(getattr(settings, name)), origin


def shown(value: Any) -> str:
    """A setting as TOML, without passwords."""
    if value is None:
        return "none"
    if isinstance(value, SecretStr):
        return json.dumps(HIDDEN)
    if isinstance(value, (str, Path)):
        return json.dumps(urls.shown(str(value)) if "://" in str(value) else str(value), ensure_ascii=False)
    return json.dumps(value)


def token_store(settings: Settings) -> TokenStore:
    """Where tokens are kept; without such a place the command ends with status 2."""
    store = tokens_of(settings)
    if store is None:
        typer.echo("with SUBPAGE_STORE=memory, SUBPAGE_TOKEN_FILE must name the file that keeps the tokens", err=True)
        raise typer.Exit(2)
    return store


def audit_of(settings: Settings) -> AuditLog:
    return AuditLog(settings.audit_log)
