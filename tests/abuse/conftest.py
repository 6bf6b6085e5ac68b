"""Attacks on a real server process over loopback, with tokens of two tenants."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx2
import pytest

from service.security.tokens import FileTokens, TokenScope, mint
from tests.faults.nursery import Nursery, Server, nursery

PATIENCE = 60.0
MIB = 1 << 20


@dataclass
class Service:
    """A server process, and the tokens that it goes by. Tenants are red, the attacker, and blue, who wants to work."""

    server: Server
    tokens: FileTokens

    def token(self, tenant: str, scope: TokenScope = "write", expires: float | None = None) -> tuple[str, str]:
        """Id and text of a new token, which the server knows within its token_refresh."""
        now = datetime.now(UTC)
        end = now + timedelta(seconds=expires) if expires is not None else None
        record, text = mint(tenant, tenant=tenant, scope=scope, now=now, expires=end)
        self.tokens.add(record)
        return record.id, text

    def client(self, token: str | None) -> httpx2.Client:
        headers = {} if token is None else {"Authorization": f"Bearer {token}"}
        return httpx2.Client(base_url=self.server.url, headers=headers, timeout=PATIENCE)

    def resident(self) -> int:
        """Bytes of memory that the process has now."""
        return _status(self.server.pid, "VmRSS")

    def peak(self) -> int:
        """The most that it has had."""
        return _status(self.server.pid, "VmHWM")


def _status(pid: int, name: str) -> int:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    (line,) = [line for line in lines if line.startswith(f"{name}:")]
    return int(line.split()[1]) << 10


@pytest.fixture(scope="session")
def children() -> Iterator[Nursery]:
    with nursery() as started:
        yield started


@pytest.fixture
def serve(children: Nursery, tmp_path: Path) -> Iterator[Callable[..., Service]]:
    """Starts a server on an SQLite store, ready for the tokens ``red`` and ``blue`` of its fixtures."""
    started: list[Service] = []
    tokens = FileTokens(tmp_path / "tokens.db")

    def start(**settings: Any) -> Service:
        members = {
            "store": f"sqlite:///{tmp_path}/machines.db",
            "token_file": str(tmp_path / "tokens.db"),
            "token_refresh": 0.1,
            **settings,
        }
        service = Service(children.start(**members), tokens)
        started.append(service)
        with service.client(None) as client:
            until(lambda: client.get("/readyz").status_code == 200)
        return service

    mint_first(tokens)
    yield start
    for service in started:
        if service.server.alive():
            service.server.kill()


def mint_first(tokens: FileTokens) -> None:
    """One token, so that the service asks everybody for theirs from its first moment."""
    record, _ = mint("first", tenant="green", now=datetime.now(UTC))
    tokens.add(record)


def until(holds: Callable[[], bool], seconds: float = PATIENCE) -> None:
    """Wait until something is so; fails rather than for ever."""
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.fixture
def tenants(serve: Callable[..., Service]) -> Iterator[Callable[..., tuple[Service, httpx2.Client, httpx2.Client]]]:
    """Starts a server; gives it and a writing client of red and of blue."""
    clients: list[httpx2.Client] = []

    def start(**settings: Any) -> tuple[Service, httpx2.Client, httpx2.Client]:
        service = serve(**settings)
        made = [service.client(service.token(tenant)[1]) for tenant in ("red", "blue")]
        clients.extend(made)
        for client in made:
            until(lambda: client.get("/v1/vms").status_code == 200)  # noqa: B023
        return service, made[0], made[1]

    yield start
    for client in clients:
        client.close()


def new_vm(client: httpx2.Client, **members: Any) -> str:
    """URL of a new machine with 16 MiB."""
    document = {"memory_slots": [{"slot": 0, "gpa": 0, "size": 16 * MIB}], "spp": True, **members}
    reply = client.post("/v1/vms", json=document)
    assert reply.status_code == 201, reply.text
    return str(reply.headers["Location"])
