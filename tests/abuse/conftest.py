"""Servers with tokens of tenants: of a test's own, or the one of the session."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx2
import pytest

from service.security.tokens import FileTokens, mint
from tests.abuse.process import TOKEN, Service, start
from tests.support.waiting import until

# A server, and clients with write of red, who attacks, and blue, who wants to work.
Tenants = tuple[Service, httpx2.Client, httpx2.Client]
Begin = Callable[..., Tenants]


def started(folder: Path, **settings: Any) -> Service:
    """A server on an SQLite store. Green has a token, so that everybody is asked for theirs from the start."""
    tokens = FileTokens(folder / "tokens.db")
    record, _ = mint("first", tenant="green", now=datetime.now(UTC))
    tokens.add(record)
    members = {
        "store": f"sqlite:///{folder}/machines.db",
        "token_file": str(folder / "tokens.db"),
        "token_refresh": 0.1,
        **settings,
    }
    service = start(folder, tokens, **members)
    with service.client(None) as client:
        until(lambda: client.get("/readyz").status_code == 200)
    return service


def clients(service: Service, opened: ExitStack) -> Tenants:
    made = [opened.enter_context(service.client(service.token(tenant)[1])) for tenant in ("red", "blue")]
    for client in made:
        until(lambda: client.get("/v1/vms").status_code == 200)  # noqa: B023
    return service, made[0], made[1]


@pytest.fixture
def tenants(tmp_path: Path) -> Iterator[Begin]:
    """Starts a server with settings of the test's own; started twice, the second has the store of the first."""
    with ExitStack() as opened:

        def begin(**settings: Any) -> Tenants:
            service = started(tmp_path, **settings)
            opened.callback(service.kill)
            return clients(service, opened)

        yield begin


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tenants]:
    """The server of the session, with default settings. It knows TOKEN, too."""
    with ExitStack() as opened:
        service = started(tmp_path_factory.mktemp("shared"), token=TOKEN)
        opened.callback(service.kill)
        yield clients(service, opened)


@pytest.fixture(scope="session")
def victim(shared: Tenants) -> Service:
    """The same, for those who need no tenants."""
    return shared[0]
