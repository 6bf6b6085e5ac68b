"""A service for the session without tokens, a client of it, and a machine as the examples have it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

from subpage import Client, Vm

if TYPE_CHECKING:
    from tests.support.server import Running


@pytest.fixture(scope="session")
def server() -> Iterator[Running]:
    # Imported here: tests of the client alone need no engine, and start at once.
    from engine.warm.steps import warm
    from tests.support.server import running

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
