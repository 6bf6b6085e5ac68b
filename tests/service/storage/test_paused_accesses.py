"""A service that ends while an access waits for its answer: what was committed at the pause is there afterwards."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, cast

import httpx2
import pytest

from tests.contract.client import ContractClient
from tests.faults.kill import wait_until_ready
from tests.faults.nursery import Nursery, Server, nursery
from tests.support.http import map_of, new_vm, set_map
from tests.support.server import Running
from tests.support.tools import Background, answering, tool, trace

ROWS = [0x9000, 0x5200, 0x9000, 0x5F80, 0x9000]


@pytest.fixture(scope="module")
def home() -> Iterator[Nursery]:
    with nursery() as started:
        yield started


def serve(home: Nursery, url: str) -> tuple[Server, ContractClient, Running]:
    server = home.start(store=url)
    wait_until_ready(server)
    where = SimpleNamespace(url=server.url, port=int(server.url.rpartition(":")[2]))
    return server, ContractClient(base_url=server.url, timeout=60.0), cast(Running, where)


def replay(client: ContractClient, vm: str, **query: Any) -> httpx2.Response:
    return client.post(f"{vm}/traces", params={"on_violation": "ask", **query}, json=trace(ROWS))


@pytest.mark.parametrize("ending", ["killed", "told to stop"])
def test_the_service_ends_in_a_pause(ending: str, home: Nursery, store_url: str) -> None:
    server, client, where = serve(home, store_url)
    vm = new_vm(client)
    assert set_map(client, vm, 5, 0xF) == 204
    with tool(where, vm) as watcher:
        going = Background(lambda: replay(client, vm))
        watcher.answer(watcher.receive("violation"), "grant")
        watcher.receive("resolved")
        assert watcher.receive("violation")["exit"]["index"] == 3
        if ending == "killed":
            server.kill()
            with pytest.raises(httpx2.TransportError):
                going.result()
        else:
            os.kill(server.pid, signal.SIGTERM)
            assert watcher.closed()[0] == 1012
            reply = going.result()
            assert (reply.status_code, reply.json()["code"]) == (503, "not-ready")
            assert reply.json()["resume_at"] == 3
            assert reply.headers["Retry-After"]
            while server.alive():
                pass
    client.close()
    server, client, where = serve(home, store_url)
    with client:
        counters = client.get(f"{vm}/counters").json()["counters"]
        assert (counters["records"], counters["grants"], counters["violations"]) == (3, 1, 2)
        assert map_of(client, vm, 5) == 0x1F  # sub-page 4 was granted
        assert client.get(f"{vm}/traces").json()["traces"] == []
        with answering(where, vm, "allow") as run:
            result = replay(client, vm, start=3).json()
        assert (result["records"], result["violations"], len(run.questions)) == (2, 1, 1)
    server.kill()
