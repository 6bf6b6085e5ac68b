"""A service for the session without tokens, a client of it, and a machine as the examples have it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from engine.warm.steps import warm
from subpage import Client, Vm
from tests.support.server import Running, running


@pytest.fixture(scope="session")
def server() -> Iterator[Running]:
    warm()
    with running() as started:
        yield started


@pytest.fixture
def client(server: Running) -> Iterator[Client]:
    with Client(server.url) as client:
        yield client


@pytest.fixture
def vm(client: Client) -> Iterator[Vm]:
    """128 MiB of RAM at 0; the first sub-page of page 0x10 is shut."""
    machine = client.create_vm("example", memory="128MiB")
    machine.set_subpages(0x10, 0xFFFFFFFE)
    yield machine
    machine.delete()
