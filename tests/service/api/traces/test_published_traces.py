"""Traces that are committed while they come: ``POST …/traces?publish_every=``."""

from __future__ import annotations

import asyncio
import gzip
import io
import json
import queue
import struct
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx2
import pyarrow as pa
import pytest

from service.http.limits import _alive
from service.problems import BodyTooSlow
from service.runtime import batches, changes, publishing, trace_records, traces
from service.settings import Settings
from tests.contract.client import ContractClient
from tests.support.bodies import ARROW, arrow, packed, table
from tests.support.http import done, new_vm, replayed
from tests.support.processes import free_port, served
from tests.support.stores import serving
from tests.support.tools import tool
from tests.support.waiting import until

OBJECT = {"name": "policy", "objects": [{"name": "secret", "gpa": "0x2000", "size": 128}]}
LIVE = "publish_every=50ms"


SCHEMA = pa.schema([("gpa", pa.uint64()), ("size", pa.uint16())])


class Cut(Exception):
    """The sender vanishes."""


class Sender:
    """A body that comes bit by bit; ``reply`` is there when it has ended."""

    def __init__(self, url: str, vm: str, query: str = LIVE) -> None:
        self._sink = io.BytesIO()
        self._out = pa.ipc.new_stream(self._sink, SCHEMA)
        self._bits: queue.Queue[bytes | Cut | None] = queue.Queue()
        self._replies: list[httpx2.Response | Exception] = []
        self._thread = threading.Thread(target=self._post, args=(f"{url}{vm}/traces?{query}",))
        self._thread.start()

    def _post(self, url: str) -> None:
        try:
            self._replies.append(httpx2.post(url, content=self._body(), headers={"Content-Type": ARROW}, timeout=300.0))
        except (Cut, httpx2.HTTPError) as error:
            self._replies.append(error)

    def _body(self) -> Iterator[bytes]:
        while (bit := self._bits.get()) is not None:
            if isinstance(bit, Cut):
                raise bit
            yield bit

    def send(self, *gpas: int, size: int = 8) -> None:
        """A batch of writes; of none, a sign of life."""
        columns = [pa.array(gpas, pa.uint64()), pa.array([size] * len(gpas), pa.uint16())]
        self._out.write_batch(pa.record_batch(columns, schema=SCHEMA))
        self._flush()

    def _flush(self) -> None:
        self._bits.put(self._sink.getvalue())
        self._sink.seek(0)
        self._sink.truncate()

    def cut(self) -> None:
        """Go away in the middle."""
        self._bits.put(Cut())
        self._thread.join(60)

    def reply(self) -> httpx2.Response:
        """The answer to the whole body."""
        self._out.close()
        self._flush()
        self._bits.put(None)
        self._thread.join(120)
        found = self._replies[0]
        assert isinstance(found, httpx2.Response), found
        return found


def last(client: httpx2.Client, vm: str) -> dict[str, Any]:
    """The newest trace of a machine as it is listed."""
    listed = client.get(f"{vm}/traces").json()["traces"]
    return dict(listed[-1]) if listed else {"records": -1, "state": "none"}


def records_of(client: httpx2.Client, vm: str, count: int) -> dict[str, Any]:
    """The trace, once so many of its records are committed."""
    until(lambda: last(client, vm)["records"] >= count)
    return last(client, vm)


def same(one: dict[str, Any]) -> dict[str, Any]:
    """What two runs of one trace have in common."""
    apart = ("id", "vm", "created", "seconds", "state", "resume_at", "published", "rate", "lag", "next")
    return {name: value for name, value in one.items() if name not in apart}


def test_in_memory_the_end_is_that_of_one_replay(monkeypatch: pytest.MonkeyPatch) -> None:
    published_as_one_replay("memory", monkeypatch)


def test_in_a_store_the_end_is_that_of_one_replay(store_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    published_as_one_replay(store_url, monkeypatch)


def published_as_one_replay(stored: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts of four records: some grow from one commit to the next, in memory and in a store."""
    for module in (batches, changes, publishing, trace_records, traces):
        monkeypatch.setattr(module, "PART", 4)
    gpas = [0x2000 + 8 * (n % 32) for n in range(31)]
    with serving(stored) as service:
        client = service.client
        vm, other = new_vm(client), new_vm(client)
        for machine in (vm, other):
            assert client.post(f"{machine}/protections", json=OBJECT).status_code == 201
        sender = Sender(service.url, vm)
        for count in (3, 9, 20, 31):
            before = max(0, last(client, vm)["records"])
            sender.send(*gpas[before:count])
            found = records_of(client, vm, count)
            assert (found["state"], found["resume_at"], found["records"]) == ("running", count, count)
            whole = client.get(f"{vm}/traces/{found['id']}").json()
            assert [item["index"] for item in whole["exit_records"]] == [n for n in range(count) if n % 32 < 16]
        result = done(sender.reply())
        assert (result["state"], result["resume_at"], result["rate"]) == ("finished", 31, None)
        assert same(result) == same(replayed(client, other, arrow(table(gpa=gpas, size=[8] * 31))))
        told = [json.loads(line) for line in events(client, vm) if '"violation"' in line]
        assert [item["detail"]["index"] for item in told] == list(range(16))


def events(client: httpx2.Client, vm: str) -> list[str]:
    return client.get(f"{vm}/events", headers={"Accept": "application/x-ndjson"}).text.splitlines()


def test_the_machine_is_not_held_and_changes_count_from_then_on(client: ContractClient, service: Any, vm: str) -> None:
    sender = Sender(service.url, vm)
    sender.send(0x2000)
    records_of(client, vm, 1)
    protection = client.post(f"{vm}/protections", json=OBJECT)
    assert protection.status_code == 201
    sender.send(0x2000, 0x2008)
    assert records_of(client, vm, 3)["by_object"]["secret"]["violations"] == 2
    tag = client.get(protection.headers["Location"]).headers["ETag"]
    assert client.delete(protection.headers["Location"], headers={"If-Match": tag}).status_code == 204
    sender.send(0x2010)
    result = done(sender.reply())
    assert (result["records"], result["violations"]) == (4, 2)
    assert [item["objects"] for item in result["exit_records"]] == [["secret"], ["secret"]]
    assert result["by_object"]["secret"] == {"violations": 2, "collateral": 0, "first_index": 1, "subpages": 1}


def test_empty_batches_are_signs_of_life(client: ContractClient, service: Any, vm: str) -> None:
    """They commit nothing."""
    sender = Sender(service.url, vm)
    sender.send(0x1000, 0x2000)
    found = records_of(client, vm, 2)
    for _ in range(3):
        sender.send()
    assert last(client, vm)["published"] == found["published"]
    assert done(sender.reply())["records"] == 2


@pytest.mark.parametrize(
    ("query", "media", "written"),
    [
        ("record=record16", "application/octet-stream", lambda gpa: struct.pack("<QHBBHH", gpa, 8, 1, 0, 0, 0)),
        ("record=gpa8", "application/octet-stream", lambda gpa: struct.pack("<Q", gpa)),
        ("", "application/x-ndjson", lambda gpa: b'{"gpa": %d}\n' % gpa),
    ],
)
def test_rows_and_packed_records_are_published_as_they_come(
    client: ContractClient, service: Any, vm: str, query: str, media: str, written: Callable[[int], bytes]
) -> None:
    """A record that is not whole waits for its end."""
    bits: queue.Queue[bytes | None] = queue.Queue()
    url = f"{service.url}{vm}/traces?{LIVE}&{query}"
    with ThreadPoolExecutor(1) as pool:
        reply = pool.submit(
            httpx2.post, url, content=iter(bits.get, None), headers={"Content-Type": media}, timeout=300.0
        )
        try:
            for count in (1, 3):
                bits.put(written(0x2000) + written(0x2008)[:5])
                assert records_of(client, vm, count)["records"] == count
                bits.put(written(0x2008)[5:])
                assert records_of(client, vm, count + 1)["records"] == count + 1
        finally:
            bits.put(None)
        result = done(reply.result(120))
    assert (result["state"], result["records"], result["resume_at"]) == ("finished", 4, 4)


def test_a_sender_that_vanishes_leaves_what_is_committed(client: ContractClient, service: Any, vm: str) -> None:
    gpas = [0x2000 + 128 * n for n in range(8)]
    assert client.post(f"{vm}/protections", json=OBJECT).status_code == 201
    sender = Sender(service.url, vm)
    sender.send(*gpas[:3])
    records_of(client, vm, 3)
    sender.cut()
    until(lambda: last(client, vm)["state"] == "interrupted")
    found = last(client, vm)
    assert (found["records"], found["resume_at"], found["rate"]) == (3, 3, None)
    rest = replayed(client, vm, packed(table(gpa=gpas)), f"start={found['resume_at']}")
    assert (rest["records"], rest["state"], rest["resume_at"]) == (5, "finished", None)
    assert client.get(f"{vm}/counters").json()["counters"]["records"] == 8


def test_a_bad_record_ends_it_where_it_is(client: ContractClient, service: Any, vm: str) -> None:
    sender = Sender(service.url, vm)
    sender.send(0x1000, 0x2000)
    records_of(client, vm, 2)
    sender.send(0x3000, size=0)
    reply = sender.reply()
    assert reply.status_code == 422
    assert (reply.json()["index"], reply.json()["resume_at"]) == (2, 2)
    assert last(client, vm)["state"] == "interrupted"


def test_stop_ends_it_at_the_refusal(client: ContractClient, service: Any, vm: str) -> None:
    assert client.post(f"{vm}/protections", json=OBJECT).status_code == 201
    sender = Sender(service.url, vm, f"{LIVE}&on_violation=stop")
    sender.send(0x1000, 0x2000, 0x3000)
    result = done(sender.reply())
    assert (result["stopped_at"], result["resume_at"], result["state"]) == (1, 1, "finished")


def test_a_guest_that_runs_is_held_at_a_question(client: ContractClient, service: Any, vm: str) -> None:
    """Until a record is behind ``resume_at`` its verdict is not there, however much comes after it."""
    assert client.post(f"{vm}/protections", json=OBJECT).status_code == 201
    with tool(service, vm, timeout=60, default_action="allow") as asked:
        sender = Sender(service.url, vm, f"{LIVE}&on_violation=ask")
        sender.send(0x1000, 0x2000, 0x2008, 0x3000)
        question = asked.receive("violation")
        assert (question["exit"]["index"], question["exit"]["objects"]) == (1, ["secret"])
        sender.send(0x4000)
        found = last(client, vm)
        assert found["id"] == question["trace"]
        assert (found["state"], found["records"], found["resume_at"], found["violations"]) == ("running", 1, 1, 1)
        assert found["lag"] in (0, 1)  # whether 0x4000 had come by then
        exits = client.get(f"{vm}/traces/{found['id']}").json()["exit_records"]
        assert [item["index"] for item in exits] == [1]
        asked.answer(question, "skip")
        assert asked.receive("error")["problem"]["field"] == "action"
        asked.answer(question, "allow")
        assert asked.receive("resolved")["action"] == "allow"
        question = asked.receive("violation")
        found = last(client, vm)
        assert (found["records"], found["resume_at"], found["violations"]) == (2, 2, 2)
        asked.answer(question, "grant")
        assert records_of(client, vm, 5)["resume_at"] == 5
        with tool(service, vm, attach=False) as other:
            other.send(type="attach", default_action="skip")
            refused = other.receive("error")["problem"]
            assert (refused["field"], refused["value"]) == ("default_action", "skip")
            assert other.attach(default_action="stop")["tools"] == 2
        sender.send(0x2010)
        result = done(sender.reply())
    assert (result["records"], result["violations"], result["state"]) == (6, 2, "finished")
    told = [json.loads(line)["detail"]["index"] for line in events(client, vm) if '"kind":"violation"' in line]
    assert told == [1, 2]


def test_a_guest_that_runs_can_be_stopped_and_its_stores_land_by_default(
    client: ContractClient, service: Any, vm: str
) -> None:
    assert client.post(f"{vm}/protections", json=OBJECT).status_code == 201
    query = f"{LIVE}&on_violation=ask"
    sender = Sender(service.url, vm, query)  # nobody is attached, and the setting says skip
    sender.send(0x2000, 0x1000)
    result = done(sender.reply())
    assert (result["records"], result["violations"]) == (2, 1)
    with tool(service, vm, timeout=60, default_action="skip"):
        body = arrow(table(gpa=[0x2000]))
        reply = client.post(f"{vm}/traces?{query}", content=body.content, headers=body.headers)
        assert reply.status_code == 409 and "default_action" in reply.json()["detail"]
    with tool(service, vm, timeout=60) as asked:
        sender = Sender(service.url, vm, query)
        sender.send(0x1000, 0x2000, 0x3000)
        asked.answer(asked.receive("violation"), "stop")
        result = done(sender.reply())
    assert (result["stopped_at"], result["resume_at"], result["records"]) == (1, 1, 1)


@pytest.mark.parametrize(
    ("query", "headers", "field"),
    [
        ("publish_every=10ms", {}, "publish_every"),
        ("publish_every=61s", {}, "publish_every"),
        ("publish_every=1h", {}, "publish_every"),
        ("publish_every=1s", {"Content-Type": "text/csv"}, "publish_every"),
        ("publish_every=1s", {"Idempotency-Key": "once"}, "Idempotency-Key"),
    ],
)
def test_what_cannot_be_published_is_refused(
    client: ContractClient, vm: str, query: str, headers: dict[str, str], field: str
) -> None:
    body = arrow(table(gpa=[8]))
    reply = client.post(f"{vm}/traces?{query}", content=body.content, headers=body.headers | headers)
    assert reply.status_code == 422 and reply.json()["field"] == field, reply.text
    assert client.get(f"{vm}/traces").json()["traces"] == []


def test_a_compressed_body_is_refused(client: ContractClient, vm: str) -> None:
    headers = {"Content-Type": ARROW, "Content-Encoding": "gzip"}
    content = gzip.compress(arrow(table(gpa=[8])).content)
    reply = client.post(f"{vm}/traces?{LIVE}", content=content, headers=headers)
    assert reply.status_code == 415 and reply.json()["field"] == "Content-Encoding"


def test_each_piece_has_its_time() -> None:
    """Other bodies have it as a whole."""

    async def never() -> Any:
        await asyncio.sleep(60)

    async def waited() -> None:
        await _alive(never, {}, Settings(body_timeout=0.01))()

    with pytest.raises(BodyTooSlow, match="an empty batch is a sign of life"):
        asyncio.run(waited())


def test_kill_leaves_every_bit_that_was_seen(store_url: str) -> None:
    """kill -9 while records come: what a reader was shown is there, the trace is interrupted, and nothing is half."""
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    with httpx2.Client(base_url=url, timeout=120.0) as client:
        with served(port, store_url) as process:
            vm = new_vm(client)
            assert client.post(f"{vm}/protections", json=OBJECT).status_code == 201
            sender = Sender(url, vm)
            seen = 0
            for count in range(1, 6):
                sender.send(*[0x2000] * count)
                seen = records_of(client, vm, seen + count)["records"]
            sender.send(*[0x2000] * 100)
            process.kill()
            process.wait()
        with served(port, store_url):
            found = last(client, vm)
            assert found["state"] == "interrupted" and found["records"] >= seen
            assert found["records"] == found["violations"] == found["resume_at"]
            assert client.get(f"{vm}/counters").json()["counters"]["records"] == found["records"]
            exits = client.get(f"{vm}/traces/{found['id']}/exits", headers={"Accept": "application/x-ndjson"}).text
            assert [json.loads(line)["index"] for line in exits.splitlines()] == list(range(found["records"]))
            assert len([line for line in events(client, vm) if '"violation"' in line]) == found["records"]
