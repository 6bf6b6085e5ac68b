"""The event loop stays flat: what takes long is done in threads, and nobody waits for it but who asked.

Structure, not time: work is held where it is, and whatever else is asked for must come to its end meanwhile.
"""

from __future__ import annotations

import asyncio
import functools
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import httpx2
import pytest

from engine.machine import VirtualMachine
from service.settings import MIB
from tests.contract.client import ContractClient
from tests.support.http import OCTETS, map_of, new_vm, set_map
from tests.support.server import Running
from tests.support.stores import serving

PAGE = b"\x11" * 4096


def on_a_loop() -> bool:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True


def replay(client: ContractClient, vm: str, count: int = 1000) -> httpx2.Response:
    body = (0x1000).to_bytes(8, "little") * count
    return client.post(f"{vm}/traces?record=gpa8&on_violation=skip", content=body, headers=OCTETS)


@pytest.fixture
def service(store_url: str) -> Iterator[Running]:
    with serving(store_url) as running:
        yield running


LONG: list[tuple[str, Callable[[ContractClient, str], httpx2.Response]]] = [
    ("replay", replay),
    ("blocks_since", lambda client, vm: client.put(f"{vm}/subpages?gfn=1", json={"access": [0]})),
    ("head_json", lambda client, vm: client.put(f"{vm}/subpages?gfn=1", json={"access": [0]})),
    ("set_subpages", lambda client, vm: client.put(f"{vm}/subpages?gfn=0&npages=5000", json={"access": [0] * 5000})),
    ("subpages", lambda client, vm: client.get(f"{vm}/subpages?gfn=0&npages=5000")),
    (
        "write_memory",
        lambda client, vm: client.put(f"{vm}/memory?gpa=0&size={MIB}", content=bytes(MIB), headers=OCTETS),
    ),
    ("counters", lambda client, vm: client.get("/metrics")),
    ("read_memory", lambda client, vm: client.get(f"{vm}/memory?gpa=0&size={8 * MIB}")),
]


@pytest.mark.parametrize(("operation", "ask"), LONG, ids=[f"{name}-{place}" for place, (name, _) in enumerate(LONG)])
def test_long_work_is_done_in_threads(
    service: Running,
    operation: str,
    ask: Callable[[ContractClient, str], httpx2.Response],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    vm = new_vm(service.client, memory_slots=[{"slot": 0, "gpa": 0, "size": 64 * MIB}])
    seen: list[bool] = []
    works = getattr(VirtualMachine, operation)

    @functools.wraps(works)
    def watched(*args: Any, **options: Any) -> Any:
        seen.append(on_a_loop())
        return works(*args, **options)

    monkeypatch.setattr(VirtualMachine, operation, watched)
    assert ask(service.client, vm).is_success
    assert seen and not any(seen)


def test_a_machine_is_read_from_the_store_in_a_thread(store_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(store_url) as service:
        vm = new_vm(service.client)
    seen: list[bool] = []
    restore = VirtualMachine.restore

    def watched(*args: Any) -> VirtualMachine:
        seen.append(on_a_loop())
        return restore(*args)

    monkeypatch.setattr(VirtualMachine, "restore", watched)
    with serving(store_url) as service:
        assert service.client.get(vm).status_code == 200
    assert seen == [False]


class Held:
    """A replay that has begun in the engine and goes on when it is told to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.begun, self.go_on = threading.Event(), threading.Event()
        begin = VirtualMachine.replay

        def holding(*args: Any, **options: Any) -> Any:
            made = begin(*args, **options)
            self.begun.set()
            assert self.go_on.wait(60)
            return made

        monkeypatch.setattr(VirtualMachine, "replay", holding)


def test_nobody_else_waits_for_a_replay(service: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reads of the same machine, changes of others, probes and lists come to their end while a replay is held."""
    client = service.client
    busy, other = new_vm(client, name="busy"), new_vm(client, name="other")
    before = client.get(busy).json()
    held = Held(monkeypatch)
    with ThreadPoolExecutor(1) as thread:
        pending: Future[httpx2.Response] = thread.submit(replay, client, busy)
        try:
            assert held.begun.wait(60)
            assert client.get(busy).json() == before and map_of(client, busy, 1) == 0xFFFFFFFF
            assert client.get(f"{busy}/walk?gpa=0x1000&access=write").status_code == 200
            assert client.get(f"{busy}/counters").json()["counters"]["records"] == 0
            assert client.get(f"{busy}/traces").json()["traces"] == []
            assert client.get(f"{busy}/memory?gpa=0&size=4096").content == bytes(4096)
            assert set_map(client, other, 1, 5) == 204 and map_of(client, other, 1) == 5
            assert client.put(f"{other}/memory?gpa=0&size=4096", content=PAGE, headers=OCTETS).status_code == 204
            assert {vm["name"] for vm in client.get("/v1/vms").json()["vms"]} == {"busy", "other"}
            assert client.delete(new_vm(client)).status_code == 204
            for probe in ("/livez", "/readyz", "/version", "/metrics"):
                assert client.get(probe).status_code == 200
            assert not pending.done()
        finally:
            held.go_on.set()
        assert pending.result().status_code == 201
    assert client.get(f"{busy}/counters").json()["counters"]["records"] == 1000


def test_replays_of_several_machines_are_under_way_together(service: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    """None of them ends before all have begun: a service that ran them one by one would never come to an end."""
    together = threading.Barrier(4)
    begin = VirtualMachine.replay

    def meeting(*args: Any, **options: Any) -> Any:
        together.wait(60)
        return begin(*args, **options)

    vms = [new_vm(service.client) for _ in range(4)]
    monkeypatch.setattr(VirtualMachine, "replay", meeting)
    with ThreadPoolExecutor(4) as threads:
        replies = list(threads.map(lambda vm: replay(service.client, vm), vms))
    assert [reply.status_code for reply in replies] == [201] * 4
