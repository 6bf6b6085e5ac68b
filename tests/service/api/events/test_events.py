"""The event log: what is in it, in which order, in pages and as streams, and what is said of what is not kept."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from service.settings import MIB, Settings
from tests.contract.client import ContractClient
from tests.support.event_reader import NDJSON, SSE, following, log, refuse
from tests.support.http import new_vm, set_map
from tests.support.server import Running, running

KEPT = 12
PAGE = 0x1000


@pytest.fixture(scope="module")
def lively() -> Iterator[Running]:
    """Keeps few events and fewer traces, and is quick to show that a stream lives."""
    settings = Settings(
        warm_up=False, store="memory", kept_events=KEPT, kept_traces=2, event_heartbeat=0.05, max_exit_records=500
    )
    with running(settings) as service:
        yield service


@pytest.fixture
def client(lively: Running) -> ContractClient:
    return lively.client


def kinds(events: list[dict[str, Any]]) -> list[str]:
    return [event["kind"] for event in events]


def test_what_happens_is_told_in_order(client: ContractClient) -> None:
    vm = new_vm(client, name="told", spp=False)
    client.put(f"{vm}/spp", json={"active": True})
    client.put(f"{vm}/memory-slots/3", json={"gpa": 1 << 32, "size": MIB})
    client.put(f"{vm}/memory-slots/3", json={"gpa": 1 << 33, "size": MIB, "log_dirty": True})
    client.delete(f"{vm}/memory-slots/3")
    client.patch(f"{vm}/subpages", json={"ranges": [{"gfn": 1, "npages": 2, "access": 0}]})
    covered = {"name": "p", "objects": [{"name": "o", "gpa": 0x2000, "size": 9}]}
    client.post(f"{vm}/protections", json={**covered, "pages": [[3, 1, 0]]})
    client.post(f"{vm}/accesses", json={"gpa": 0x2000})
    client.delete(f"{vm}/protections/p")
    client.post(f"{vm}/host-memory", json={"event": "unmap", "gfn": 2})
    client.patch(f"{vm}/page-access", json={"entries": [{"gfn": 4, "access": "r--"}]})
    events = log(client, vm)
    assert [event["id"] for event in events] == list(range(1, 12))
    assert all(event["trace"] is None and event["created"].endswith("Z") for event in events)
    assert [event["created"] for event in events] == sorted(event["created"] for event in events)
    told = [(event["kind"], event["detail"]) for event in events]
    assert told[0][1]["change"] == "created" and told[0][1]["name"] == "told" and told[0][1]["spp"] is False
    assert told[1] == ("lifecycle", {"change": "spp-enabled"})
    assert [(kind, detail["change"], detail["gpa"]) for kind, detail in told[2:5]] == [
        ("memory-slot", "created", "0x100000000"),
        ("memory-slot", "changed", "0x200000000"),
        ("memory-slot", "deleted", "0x200000000"),
    ]
    assert told[5] == ("subpages", {"ranges": [{"gfn": "0x1", "npages": 2}], "ranges_total": 1, "pages": 2})
    objects = [{"name": "o", "gpa": "0x2000", "size": 9}]
    ranges = {"page_ranges": [["0x3", 1, "0x0"]], "page_ranges_total": 1}
    detail = {"change": "created", "name": "p", "objects": objects, "objects_total": 1, **ranges}
    assert told[6] == ("protection", detail)
    assert told[7][0] == "violation" and told[7][1]["gpa"] == "0x2000" and told[7][1]["objects"] == ["o"]
    assert told[8] == ("protection", {"change": "deleted", "name": "p"})
    assert told[9][0] == "host-memory" and told[9][1]["event"] == "unmap" and told[9][1]["gfn"] == "0x2"
    assert told[10] == ("page-access", {"gfns": ["0x4"], "pages": 1})


def test_other_doors_are_told_too(client: ContractClient) -> None:
    """The binary ABI changes the same machine; flushes and nested states are of a vCPU."""
    slots = {"slot": 0, "gpa": 0, "size": MIB}
    vm = client.post("/v1/ioctls/KVM_CREATE_VM", json={}).headers["Location"]
    client.post(f"{vm}/ioctls/KVM_CREATE_VCPU", json={"arg": "0x0"})
    client.put(f"{vm}/memory-slots/0", json={name: slots[name] for name in ("gpa", "size")})
    client.post(f"{vm}/ioctls/KVM_INIT_SPP", json={})
    body = (5).to_bytes(8, "little") + (3).to_bytes(8, "little") + bytes(256)
    assert client.post(f"{vm}/ioctls/KVM_SUBPAGES_SET_ACCESS", json={"data": body.hex()}).json()["return"] == 3
    assert client.post(f"{vm}/ioctls/KVM_SUBPAGES_SET_ACCESS", json={"data": "00"}).json()["errno"] == "EFAULT"
    state = client.post(f"{vm}/vcpus/0/ioctls/KVM_SET_NESTED_STATE", json={"data": "00" * 128}).json()
    events = log(client, vm)
    assert kinds(events) == ["lifecycle", "vcpu", "memory-slot", "lifecycle", "subpages", "nested"]
    assert events[1]["detail"] == {"change": "created", "vcpu": 0}
    assert events[4]["detail"]["ranges"] == [{"gfn": "0x5", "npages": 3}] and events[4]["detail"]["pages"] == 3
    assert events[5]["detail"] == {"vcpu": 0, "ioctl": "KVM_SET_NESTED_STATE", "errno": state["errno"]}


def test_flushes_and_nested_states(client: ContractClient) -> None:
    vm = new_vm(client)
    document = {"rcx": "0x2", "rdx": "0x1000"}
    reply = client.post(f"{vm}/vcpus/0/hypercalls", json={"registers": document})
    assert reply.status_code == 200, reply.text
    blob = client.get(f"{vm}/vcpus/0/nested-state", headers={"Accept": "application/octet-stream"}).content
    octets = {"Content-Type": "application/octet-stream"}
    client.put(f"{vm}/vcpus/0/nested-state", content=blob, headers=octets)
    flush, nested = log(client, vm)[1:]
    assert flush["kind"] == "flush" and flush["detail"]["vcpu"] == 0
    assert flush["detail"]["control"] == reply.json()["control"]
    assert flush["detail"]["outcome"] == reply.json()["outcome"]
    assert (nested["kind"], nested["detail"]) == ("nested", {"vcpu": 0, "errno": None})


def test_what_is_refused_is_not_told(client: ContractClient) -> None:
    vm = new_vm(client)
    assert client.post(f"{vm}/host-memory", json={"event": "unmap", "gfn": "0x99999"}).status_code == 422
    assert client.patch(f"{vm}/subpages", json={"ranges": [{"gfn": "0x99999", "npages": 1, "access": 0}]}).is_error
    assert client.post(f"{vm}/traces", json={"accesses": [{"gpa": 0, "vcpu": 9}]}).status_code == 422
    assert client.post(f"{vm}/accesses", json={"gpa": 0}).json()["allowed"]
    assert kinds(log(client, vm)) == ["lifecycle"]


def test_a_replay_is_one_row_that_reads_as_single_events(client: ContractClient) -> None:
    vm = new_vm(client)
    trace = refuse(client, vm, 300)
    events = log(client, vm, kinds="violation", limit=70)
    assert [event["id"] for event in events] == list(range(3, 303)) and {event["trace"] for event in events} == {trace}
    exits = client.get(f"{vm}/traces/{trace}/exits").json()["exit_records"]
    assert [event["detail"] for event in events] == exits
    # Begin anywhere.
    page = client.get(f"{vm}/events", params={"after": 200, "limit": 2}).json()
    assert [event["detail"] for event in page["events"]] == exits[198:200] and page["last"] == 202
    whole = log(client, vm, expand=False, after=200)
    assert [event["detail"] for event in whole] == [{"first": 201, "last": 302, "count": 102}]
    assert (whole[0]["id"], whole[0]["trace"]) == (302, trace)


def test_internal_exits_of_a_trace_are_no_events(client: ContractClient) -> None:
    vm = new_vm(client)
    trace = refuse(client, vm, 40, include="all")
    exits = client.get(f"{vm}/traces/{trace}/exits").json()["exit_records"]
    refused = [record for record in exits if record["resolution"] == "violation"]
    assert len(refused) == 40 < len(exits)
    assert [event["detail"] for event in log(client, vm, kinds="violation", limit=7)] == refused


def test_violations_of_more_than_one_part(client: ContractClient, monkeypatch: pytest.MonkeyPatch) -> None:
    """Exit records are stored and counted in parts; here they have 16."""
    for module in ("service.runtime.traces", "service.runtime.changes", "service.runtime.batches"):
        monkeypatch.setattr(f"{module}.PART", 16)
    vm = new_vm(client)
    for include, first in (("violations", 3), ("all", 104)):
        trace = refuse(client, vm, 100, include=include)
        exits = client.get(f"{vm}/traces/{trace}/exits").json()["exit_records"]
        refused = [record for record in exits if record["resolution"] == "violation"]
        events = log(client, vm, kinds="violation", limit=33, after=first - 1)
        assert [event["detail"] for event in events] == refused
        assert [event["id"] for event in events] == list(range(first, first + 100))


def test_filters(client: ContractClient) -> None:
    vm = new_vm(client)
    objects = [{"name": "low", "gpa": 0x1000, "size": 128}, {"name": "both", "gpa": 0x1000, "size": 0x1080}]
    client.post(f"{vm}/protections", json={"name": "p", "objects": objects})
    accesses = [{"gpa": 0x1000}, {"gpa": 0x1100}, {"gpa": 0x2000}, {"gpa": 0x3000}] * 300
    client.post(f"{vm}/traces", params={"max_exit_records": 500}, json={"accesses": accesses[:600]})
    client.post(f"{vm}/accesses", json={"gpa": 0x1000})
    client.post(f"{vm}/accesses", json={"gpa": 0x2000})
    violations = log(client, vm, kinds="violation", limit=1000)
    assert len(violations) == 452

    def chosen(**params: Any) -> list[dict[str, Any]]:
        return log(client, vm, kinds="violation", limit=1000, **params)

    assert chosen(object="low") == [event for event in violations if "low" in event["detail"]["objects"]]
    assert len(chosen(object="low")) == 151 and len(chosen(object="both")) == 452 and chosen(object="none") == []
    assert chosen(gfn="0x2") == [event for event in violations if event["detail"]["gfn"] == "0x2"]
    assert chosen(gfn=1, npages=2) == violations and chosen(gfn=3) == []
    assert chosen(gfn=1, object="low", after=100) == [event for event in chosen(object="low") if event["id"] > 100]
    # A page that is smaller than what a part of the records has.
    assert chosen(gfn=1) == log(client, vm, kinds="violation", gfn=1, limit=9)
    assert kinds(log(client, vm, kinds="protection, lifecycle")) == ["lifecycle", "protection"]
    page = client.get(f"{vm}/events", params={"kinds": "lifecycle"}).json()
    assert page["last"] == 454 and page["next"] is None, "how far it looked, not how far it found"


def test_records_past_the_limit_are_told_as_missing(client: ContractClient) -> None:
    vm = new_vm(client)
    trace = refuse(client, vm, 30, max_exit_records=10)
    events = log(client, vm, kinds="violation")
    assert len(events) == 11 and {event["trace"] for event in events[:10]} == {trace}
    missing = {"first": 13, "last": 32, "count": 20, "reason": "not-listed"}
    assert (events[10]["id"], events[10]["kind"], events[10]["detail"]) == (32, "dropped", missing)
    again = log(client, vm, after=20)
    assert again[0]["detail"] == {"first": 21, "last": 32, "count": 12, "reason": "not-listed"}


def test_violations_of_a_trace_that_is_gone_keep_their_ids(client: ContractClient) -> None:
    vm = new_vm(client)
    for _ in range(3):
        refuse(client, vm, 5)
    assert len(client.get(f"{vm}/traces").json()["traces"]) == 2
    events = log(client, vm, kinds="violation")
    gone = {"first": 3, "last": 7, "count": 5, "reason": "trace-not-kept"}
    assert (events[0]["kind"], events[0]["detail"]) == ("dropped", gone)
    assert [event["id"] for event in events[1:]] == [*range(9, 14), *range(15, 20)]
    # Who does not ask for violations is not told of them.
    assert kinds(log(client, vm, kinds="subpages")) == ["subpages"] * 3


def test_retention_by_count(client: ContractClient) -> None:
    vm = new_vm(client)
    for gfn in range(40):
        set_map(client, vm, gfn, 0)
    events = log(client, vm)
    assert [event["id"] for event in events[1:]] == list(range(42 - KEPT, 42))
    gap = {"first": 1, "last": 41 - KEPT, "count": 41 - KEPT, "reason": "not-kept"}
    assert (events[0]["id"], events[0]["kind"], events[0]["detail"]) == (41 - KEPT, "dropped", gap)
    # A page that ends with the marker goes on behind it.
    first = client.get(f"{vm}/events", params={"limit": 1}).json()
    assert kinds(first["events"]) == ["dropped"] and client.get(first["next"]).json()["events"][0] == events[1]
    metrics = client.get("/metrics").text
    dropped = next(line for line in metrics.splitlines() if line.startswith("subpage_events_dropped_total"))
    assert float(dropped.split()[1]) >= 41 - KEPT
    assert 'subpage_events_total{kind="subpages"}' in metrics and "subpage_event_streams 0.0" in metrics


def test_ndjson_is_the_log_up_to_now(client: ContractClient) -> None:
    vm = new_vm(client)
    refuse(client, vm, 5)
    reply = client.get(f"{vm}/events", headers=NDJSON)
    assert [json.loads(line) for line in reply.text.splitlines()] == log(client, vm)
    assert client.get(f"{vm}/events", headers=NDJSON, params={"after": 7}).text == ""


@pytest.mark.parametrize("headers", [SSE, NDJSON], ids=["sse", "ndjson"])
def test_a_stream_goes_on(lively: Running, headers: dict[str, str]) -> None:
    client = lively.client
    vm = new_vm(client)
    params = {} if headers is SSE else {"follow": "true"}
    with following(lively.url + vm + "/events", headers, **params) as stream:
        assert [event["id"] for event in stream.take(1)] == [1]
        for gfn in range(3):
            set_map(client, vm, gfn, gfn)
        assert [event["id"] for event in stream.take(3)] == [2, 3, 4]
        refuse(client, vm, 250)
        events = stream.take(251)
        assert [event["id"] for event in events] == list(range(5, 256)) and events[-1] == log(client, vm, after=254)[0]
        assert "subpage_event_streams 1.0" in client.get("/metrics").text
        assert client.delete(vm).status_code == 204
        (end,) = stream
    assert (end["id"], end["kind"], end["detail"]) == (None, "end", {"reason": "deleted"})
    assert client.get(f"{vm}/events").status_code == 404


def test_coming_back(lively: Running) -> None:
    """The header outranks the query, which an EventSource repeats; filters that pass nothing move on all the same."""
    client = lively.client
    vm = new_vm(client)
    url = lively.url + vm + "/events"
    with following(url, after="latest", kinds="protection") as stream:
        for gfn in range(2):
            set_map(client, vm, gfn, 0)
        client.post(f"{vm}/protections", json={"name": "p", "objects": [{"name": "o", "gpa": 0, "size": 9}]})
        assert [event["id"] for event in stream.take(1)] == [4] and stream.last == 4
        set_map(client, vm, 5, 0)
        # A sign of life is no event, but its id counts.
        while stream.last == 4:
            next(stream._lines)
            stream.last = None
    set_map(client, vm, 6, 0)
    with following(url, {**SSE, "Last-Event-ID": "4"}, after="latest") as stream:
        assert [event["id"] for event in stream.take(2)] == [5, 6]
    for gfn in range(30):
        set_map(client, vm, gfn, 1)
    with following(url, {**SSE, "Last-Event-ID": "6"}) as stream:
        gap, first = stream.take(2)
    assert gap["kind"] == "dropped" and gap["detail"] == {"first": 7, "last": 24, "count": 18, "reason": "not-kept"}
    assert first["id"] == 25 and gap["id"] == 24
    # An id that the log has not reached.
    assert log(client, vm, after=10_000) == []


@pytest.mark.parametrize(
    ("params", "headers", "field"),
    [
        ({"kinds": "violations"}, {}, "kinds"),
        ({"kinds": ""}, {}, "kinds"),
        ({"after": "-1"}, {}, "after"),
        ({"after": "9" * 16}, {}, "after"),
        ({"after": "1", "cursor": "AQAAAAAAAACf2Pv1"}, {}, "after"),
        ({"cursor": "AQAAAAAAAACf2Pv1"}, {}, "cursor"),
        ({}, {"Last-Event-ID": "x"}, "Last-Event-ID"),
        ({}, {"Last-Event-ID": "²"}, "Last-Event-ID"),
        ({"npages": 1}, {}, "npages"),
        ({"npages": 0, "gfn": 1}, {}, "npages"),
        ({"expand": False, "gfn": 1}, {}, "expand"),
        ({"follow": True}, {}, "follow"),
        ({"limit": 0}, {}, "limit"),
        ({"limit": 5}, NDJSON, "limit"),
        ({"object": "a", "unknown": 1}, {}, "unknown"),
    ],
)
def test_refusals(client: ContractClient, params: dict[str, Any], headers: dict[str, str], field: str) -> None:
    vm = new_vm(client)
    given = {name: value.encode("latin-1") for name, value in headers.items()}
    reply = client.get(f"{vm}/events", params=params, headers=given)
    assert reply.status_code == 422 and reply.json()["field"] == field, reply.text
    client.delete(vm)


def test_streams_are_counted() -> None:
    settings = Settings(warm_up=False, store="memory", max_event_streams=1, event_heartbeat=0.05)
    with running(settings) as service:
        vm = new_vm(service.client)
        with following(service.url + vm + "/events") as stream:
            stream.take(1)
            refused = service.client.get(f"{vm}/events", headers=SSE)
            assert refused.status_code == 429 and refused.json()["field"] == "max_event_streams"
            assert service.client.get(f"{vm}/events").status_code == 200, "pages are no streams"
