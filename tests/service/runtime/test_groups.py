"""Changes of one machine that come while another is being committed: they share the next transaction."""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import httpx2
import pytest
import sqlalchemy as sa
from sqlalchemy.exc import OperationalError

from engine.errors import Busy, InvalidValue
from engine.kvm.slots import SlotSpec
from engine.machine import SubpageRange
from engine.state.config import VmConfig
from service.runtime.entry import Entry
from service.runtime.memory_files import MemoryFiles
from service.runtime.registry import Registry
from service.runtime.stored_repository import StoredRepository
from service.settings import Settings
from service.storage import rows
from service.storage.records import Change, JobRecord
from service.storage.urls import StoreUrl
from tests.contract.client import ContractClient
from tests.support.http import map_of, new_vm, set_map
from tests.support.server import Running
from tests.support.stores import BREAK, MEND, kind, picture, run_sql, serving
from tests.support.waiting import until

FULL = 0xFFFF_FFFF


class Stop:
    """Stops the thread that writes to stores before it writes a change, and counts what it is given."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.go_on = threading.Event()
        self.go_on.set()
        self.changes: list[Change] = []
        write = rows.write

        def stopping(connection: sa.Connection, change: Change) -> None:
            self.changes.append(change)
            assert self.go_on.wait(60)
            write(connection, change)

        monkeypatch.setattr(rows, "write", stopping)


@pytest.fixture
def stop(monkeypatch: pytest.MonkeyPatch) -> Stop:
    return Stop(monkeypatch)


@pytest.fixture
def service(store_url: str) -> Iterator[Running]:
    with serving(store_url) as running:
        yield running


def entry_of(service: Running, vm: str) -> Entry:
    return service.app.state.registry.get(vm.rpartition("/")[2])


Call = Callable[[ContractClient, str], httpx2.Response]


def put(gfn: int, word: int, **headers: str) -> Call:
    return lambda client, vm: client.put(
        f"{vm}/subpages", params={"gfn": gfn}, json={"access": [word]}, headers=headers
    )


@contextlib.contextmanager
def together(service: Running, stop: Stop, vm: str, calls: list[Call]) -> Iterator[list[Future[httpx2.Response]]]:
    """While a change of the machine is being committed, ``calls`` come in this order; they go on after the block."""
    lock = entry_of(service, vm).lock

    def run(call: Call) -> httpx2.Response:
        with ContractClient(base_url=service.url, timeout=60.0) as own:
            return call(own, vm)

    stop.go_on.clear()
    stop.changes.clear()
    try:
        with ThreadPoolExecutor(len(calls) + 1) as threads:
            replies = [threads.submit(run, put(0, 0xF))]
            until(lambda: bool(stop.changes))
            for place, call in enumerate(calls, 1):
                replies.append(threads.submit(run, call))
                until(lambda: len(lock._line) == place)  # noqa: B023
            try:
                yield replies
            finally:
                stop.go_on.set()
    finally:
        stop.go_on.set()


def tag(client: ContractClient, vm: str, gfn: int = 1) -> str:
    return client.get(f"{vm}/subpages", params={"gfn": gfn}).headers["ETag"]


def events(client: ContractClient, vm: str) -> list[dict[str, Any]]:
    lines = client.get(f"{vm}/events", params={"follow": "false"}, headers={"Accept": "application/x-ndjson"}).text
    return [json.loads(line) for line in lines.splitlines()]


def test_each_has_its_own_revision_tag_and_events(service: Running, stop: Stop, store_url: str) -> None:
    client, vm = service.client, new_vm(service.client)
    before, told = client.get(vm).json()["revision"], len(events(client, vm))
    words = [0x10 + number for number in range(8)]
    with together(service, stop, vm, [put(1, word) for word in words]) as replies:
        pass
    tags = [reply.result().headers["ETag"] for reply in replies[1:]]
    assert {reply.result().status_code for reply in replies} == {204}
    assert [change.count for change in stop.changes] == [1, 8], "one transaction for all that waited"
    assert client.get(vm).json()["revision"] == before + 9
    assert len(set(tags)) == 8 and tags[-1] == tag(client, vm)
    added = events(client, vm)[told:]
    assert [event["kind"] for event in added] == ["subpages"] * 9
    assert len({event["id"] for event in added}) == 9
    assert map_of(client, vm, 1) == words[-1]


def test_a_refused_one_does_no_harm_and_conditions_are_judged_in_order(service: Running, stop: Stop) -> None:
    client, vm = service.client, new_vm(service.client)
    revision, told, first = client.get(vm).json()["revision"], len(events(client, vm)), tag(client, vm)
    whole = client.get(vm).headers["ETag"]
    patch = {"ranges": [{"gfn": 4, "access": 1}]}
    calls: list[Call] = [
        put(1, 1, **{"If-Match": first}),
        put(1, 2, **{"If-Match": first}),  # not any more
        put(1 << 40, 3),  # no such page
        lambda client, vm: client.patch(f"{vm}/subpages", json=patch, headers={"If-Match": whole}),  # nor that
        put(2, 4),
    ]
    with together(service, stop, vm, calls) as replies:
        pass
    assert [reply.result().status_code for reply in replies] == [204, 204, 412, 422, 412, 204]
    assert [change.count for change in stop.changes] == [1, 2]
    assert [map_of(client, vm, gfn) for gfn in (0, 1, 2, 4)] == [0xF, 1, 4, FULL]
    assert client.get(vm).json()["revision"] == revision + 3 and len(events(client, vm)) == told + 3
    assert client.put(f"{vm}/subpages?gfn=1", json={"access": [5]}, headers={"If-Match": tag(client, vm)}).is_success


def test_readers_see_what_is_durable(service: Running, stop: Stop) -> None:
    client, vm = service.client, new_vm(service.client)
    before, log = picture(client, vm), events(client, vm)
    with together(service, stop, vm, [put(1, 1), put(2, 2)]):
        assert picture(client, vm) == before and events(client, vm) == log
    stop.go_on.clear()
    stop.changes.clear()
    with ThreadPoolExecutor(2) as threads:
        before = picture(client, vm)
        replies = [threads.submit(put(gfn, 7), client, vm) for gfn in (1, 2)]
        until(lambda: bool(stop.changes))
        with ContractClient(base_url=service.url) as reader:
            assert picture(reader, vm) == before
        assert not any(reply.done() and not reply.cancelled() for reply in replies)
        stop.go_on.set()
        assert [reply.result().status_code for reply in replies] == [204, 204]
    assert [map_of(client, vm, gfn) for gfn in (0, 1, 2)] == [0xF, 7, 7]


def test_a_transaction_that_fails_fails_all_of_it(
    service: Running, stop: Stop, store_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also who was refused because of what another one changed: that was never so."""
    client, vm = service.client, new_vm(service.client)
    assert set_map(client, vm, 0, 0xF) == 204
    before, first, log = picture(client, vm), tag(client, vm), events(client, vm)
    calls = [put(1, 1, **{"If-Match": first}), put(1, 2, **{"If-Match": first}), put(2, 3)]
    with together(service, stop, vm, calls) as replies:
        fails = rows._write_blocks

        def failing(connection: sa.Connection, number: int, changed: Any) -> None:
            if stop.changes[-1].count > 1:
                raise OperationalError("INSERT", {}, OSError(28, "No space left on device"))
            fails(connection, number, changed)

        monkeypatch.setattr(rows, "_write_blocks", failing)
    assert [reply.result().status_code for reply in replies] == [204, 503, 503, 503]
    for reply in replies[1:]:
        assert reply.result().json()["code"] == "store-unavailable"
        assert "nothing was changed" in reply.result().json()["detail"]
    now = picture(client, vm)
    assert now[0]["revision"] == before[0]["revision"] + 1 and now[1:] == before[1:]
    assert len(events(client, vm)) == len(log) + 1
    monkeypatch.setattr(rows, "_write_blocks", fails)
    assert set_map(client, vm, 1, 9) == 204 and client.get(vm).json()["revision"] == now[0]["revision"] + 1
    shown = picture(client, vm)
    registry = service.app.state.registry
    entry_of(service, vm).unload()
    assert picture(client, vm) == shown, "what is in memory is what is stored"
    assert registry.get(vm.rpartition("/")[2]).revision == shown[0]["revision"]


def test_a_store_that_takes_no_block(service: Running, stop: Stop, store_url: str) -> None:
    client, vm = service.client, new_vm(service.client)
    before = picture(client, vm)
    run_sql(store_url, *BREAK[kind(store_url)])
    with together(service, stop, vm, [put(gfn, 1) for gfn in range(1, 5)]) as replies:
        pass
    assert [reply.result().status_code for reply in replies] == [503] * 5
    run_sql(store_url, *MEND[kind(store_url)])
    assert picture(client, vm) == before
    assert [set_map(client, vm, gfn, 2) for gfn in range(5)] == [204] * 5


@pytest.mark.parametrize("stored", [True, False])
def test_a_transaction_of_which_nobody_knows_whether_it_was_made(
    service: Running, stop: Stop, stored: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    client, vm = service.client, new_vm(service.client)
    revision = client.get(vm).json()["revision"]
    commit = sa.Connection.commit

    def fails(connection: sa.Connection) -> None:
        if stored or stop.changes[-1].count == 1:
            commit(connection)
        if stop.changes[-1].count > 1:
            monkeypatch.setattr(sa.Connection, "commit", commit)
            raise OperationalError("COMMIT", {}, OSError(5, "Input/output error"))

    with together(service, stop, vm, [put(gfn, gfn) for gfn in (1, 2, 3)]) as replies:
        monkeypatch.setattr(sa.Connection, "commit", fails)
    assert [reply.result().status_code for reply in replies] == [204, 503, 503, 503]
    assert all("not known" in reply.result().json()["detail"] for reply in replies[1:])
    until(lambda: set_map(client, vm, 5, 5) == 204)
    assert [map_of(client, vm, gfn) for gfn in (0, 1, 2, 3, 5)] == [0xF, *((1, 2, 3) if stored else [FULL] * 3), 5]
    assert client.get(vm).json()["revision"] == revision + 2 + 3 * stored


def test_what_does_not_join_has_a_transaction_of_its_own(service: Running, stop: Stop) -> None:
    """A replay runs on what is durable, and nobody waits for it who came before."""
    vm = new_vm(service.client)
    trace = {"accesses": [{"gpa": 0x1000}]}
    calls: list[Call] = [
        put(1, 0),
        put(2, 0),
        lambda client, vm: client.post(f"{vm}/traces", json=trace),
        put(3, 0),
        put(4, 0),
        lambda client, vm: client.delete(vm),
        put(5, 0),
    ]
    with together(service, stop, vm, calls) as replies:
        pass
    assert [reply.result().status_code for reply in replies] == [204, 204, 204, 201, 204, 204, 204, 404]
    assert [change.count for change in stop.changes] == [1, 2, 1, 2, 1]
    assert replies[3].result().json()["violations"] == 1


def test_keys_are_stored_with_their_changes(service: Running, stop: Stop) -> None:
    client, vm = service.client, new_vm(service.client)

    def call(name: str) -> Call:
        return lambda client, vm: client.post(f"{vm}/table-frames", headers={"Idempotency-Key": name})

    with together(service, stop, vm, [call("a"), call("b"), call("c")]) as replies:
        pass
    made = [reply.result() for reply in replies[1:]]
    assert [reply.status_code for reply in made] == [201] * 3
    assert len({reply.json()["address"] for reply in made}) == 3
    group = next(change for change in stop.changes if change.count == 3)
    assert sorted(answer.key for side in group.sides for answer in side.answers) == ["a", "b", "c"]
    again = call("b")(client, vm)
    assert again.headers["Idempotency-Replayed"] and again.content == made[1].content


# Interrupted, at the seam that requests use


class Nothing:
    """No jobs."""

    def arrive(self, jobs: list[JobRecord], *, goes_on: bool) -> None:
        pass

    def leave(self) -> None:
        pass


@contextlib.asynccontextmanager
async def stored_vm(url: str, busy_timeout: float = 60.0) -> AsyncIterator[Entry]:
    repository = StoredRepository(StoreUrl.parse(url), MemoryFiles((), 1))
    registry = Registry(Settings(busy_timeout=busy_timeout), repository)
    ready = asyncio.Event()
    repository.start(registry, Nothing(), lambda: ready.set() if repository.ready else None)
    try:
        await ready.wait()
        yield await registry.create(VmConfig(), [SlotSpec(0, 0, 1 << 24)], spp=True, tenant="red", hooks=())
    finally:
        await repository.stop()


async def change(entry: Entry, gfn: int, before: Callable[[], Awaitable[None]] | None = None) -> None:
    async with entry.mutation((), joins=True) as mutation:
        if before is not None:
            await before()
        mutation.machine.set_subpages([SubpageRange(gfn, 1, gfn)])


def maps(entry: Entry) -> list[int]:
    return [int(word) for word in entry.machine.subpages(0, 8)]


async def stopped(stop: Stop, entry: Entry) -> asyncio.Task[None]:
    """A change that is being committed, until ``stop`` lets it go on."""
    stop.changes.clear()
    stop.go_on.clear()
    first = asyncio.create_task(change(entry, 0))
    await asyncio.to_thread(until, lambda: bool(stop.changes))
    return first


def run(main: Coroutine[Any, Any, None]) -> None:
    asyncio.run(main)


def test_who_is_cancelled_takes_nobody_along(store_url: str, stop: Stop) -> None:
    """Whoever it is: the first of a group, the last, one that waits for its turn, or for its commit."""

    async def main() -> None:
        async with stored_vm(store_url) as entry:
            for victim in range(4):
                first = await stopped(stop, entry)
                revision = entry.revision
                others = [asyncio.create_task(change(entry, gfn)) for gfn in range(1, 5)]
                await asyncio.sleep(0)
                others[victim].cancel()
                stop.go_on.set()
                done = await asyncio.gather(first, *others, return_exceptions=True)
                assert [type(outcome) for outcome in done[1:]] == [
                    asyncio.CancelledError if place == victim else type(None) for place in range(4)
                ]
                assert [item.count for item in stop.changes] == [1, 3] and entry.revision == revision + 4
            # Which is in a group that is being committed: its change is made, as that of a client that has left.
            first = await stopped(stop, entry)
            revision = entry.revision
            first.cancel()
            await asyncio.sleep(0)
            assert not first.done()
            stop.go_on.set()
            with pytest.raises(asyncio.CancelledError):
                await first
            assert entry.revision == revision + 1 and not entry.lock.held and entry.group is None

    run(main())


@pytest.mark.parametrize("begun", [True, False])
def test_the_last_of_a_group_is_cancelled_in_its_turn(store_url: str, stop: Stop, begun: bool) -> None:
    """Those before it have no other to begin their transaction."""

    async def main() -> None:
        async with stored_vm(store_url) as entry:

            async def ends() -> None:
                raise asyncio.CancelledError

            async def ends_the_next() -> None:
                if not begun:  # when it has been called, and before it takes its turn
                    asyncio.get_running_loop().call_soon(last.cancel)

            first = await stopped(stop, entry)
            others = [asyncio.create_task(call) for call in (change(entry, 1), change(entry, 2, ends_the_next))]
            last = asyncio.create_task(change(entry, 3, ends if begun else None))
            await asyncio.sleep(0)
            stop.go_on.set()
            done = await asyncio.gather(first, *others, last, return_exceptions=True)
            assert [type(outcome) for outcome in done] == [type(None)] * 3 + [asyncio.CancelledError]
            assert maps(entry)[:4] == [0, 1, 2, FULL] and not entry.lock.held

    run(main())


def test_who_waits_too_long_and_who_is_handed_the_turn_as_it_leaves(store_url: str, stop: Stop) -> None:
    async def main() -> None:
        async with stored_vm(store_url, busy_timeout=0.02) as entry:
            first = await stopped(stop, entry)
            late = await asyncio.gather(*(change(entry, gfn) for gfn in (1, 2)), return_exceptions=True)
            assert [type(outcome) for outcome in late] == [Busy, Busy]
            stop.go_on.set()
            await first
            await change(entry, 3)
            assert maps(entry)[:4] == [0, FULL, FULL, 3]
            async with entry.lock.hold():
                waiting = [asyncio.create_task(change(entry, gfn)) for gfn in (4, 5)]
                await asyncio.sleep(0)
            waiting[0].cancel()  # the turn is its own, and it does not take it
            done = await asyncio.gather(*waiting, return_exceptions=True)
            assert [type(outcome) for outcome in done] == [asyncio.CancelledError, type(None)]
            assert not entry.lock.held

    run(main())


def test_a_refusal_between_others(store_url: str, stop: Stop) -> None:
    async def main() -> None:
        async with stored_vm(store_url) as entry:
            first = await stopped(stop, entry)

            async def refused() -> None:
                raise InvalidValue("no", field="x", value=1)

            calls = [change(entry, 1), change(entry, 2, refused), change(entry, 3)]
            others = [asyncio.create_task(call) for call in calls]
            await asyncio.sleep(0)
            stop.go_on.set()
            done = await asyncio.gather(first, *others, return_exceptions=True)
            assert [type(outcome) for outcome in done] == [type(None), type(None), InvalidValue, type(None)]
            assert maps(entry)[:4] == [0, 1, FULL, 3]

    run(main())
