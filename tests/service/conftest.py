"""One service for the session, one client with contract checks, machines made to measure."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.contract.client import ContractClient
from tests.service.running import Running, running

MIB = 1 << 20


@pytest.fixture(scope="session")
def service() -> Iterator[Running]:
    with running() as started:
        yield started


@pytest.fixture
def client(service: Running) -> ContractClient:
    return service.client


@pytest.fixture
def make_vm(client: ContractClient) -> Iterator[Callable[..., str]]:
    """Creates a VM with 16 MiB of RAM at 0 and SPP enabled, unless told otherwise; returns its URL."""
    made: list[str] = []

    def make(**members: Any) -> str:
        document = {"memory_slots": [{"slot": 0, "gpa": 0, "size": 16 * MIB}], "spp": True, **members}
        reply = client.post("/v1/vms", json=document)
        assert reply.status_code == 201, reply.text
        made.append(reply.headers["Location"])
        return made[-1]

    yield make
    for url in made:
        tag = client.get(url)
        if tag.status_code == 200:
            client.delete(url, headers={"If-Match": tag.headers["ETag"]})


@pytest.fixture
def vm(make_vm: Callable[..., str]) -> str:
    return make_vm()
