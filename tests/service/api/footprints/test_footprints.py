"""Footprints over HTTP: made of every kind of body, asked, kept within limits, each tenant's its own."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from typing import Any

import httpx2
import pyarrow.parquet as pq
import pytest

from engine.footprint import stored
from service.http import cursors
from service.security.tokens import MemoryTokens, mint
from service.settings import MIB, Settings
from tests.contract.client import ContractClient
from tests.support.bodies import FORMATS, Body, packed, table
from tests.support.http import done, key, replayed
from tests.support.job_calls import ASYNC, ended
from tests.support.server import running

GUARDED = {"name": "guarded", "gpa": "0x2080", "size": 64}
POLICY = {"name": "p", "objects": [GUARDED]}
SLOTS = [{"gpa": 0, "size": 16 * MIB}]
MIXED = table(
    gpa=[0x1000, 0x2000, 0x2080, 0x20C0, 0x207C, 0x20FF, 0xFEE00000, 0x2080, 0x2FFC],
    size=[8, 8, 8, 4, 8, 2, 4, 8, 8],
    access=[1, 1, 1, 1, 1, 1, 1, 0, 1],
)
WRITES = packed(MIXED)
ONE = packed(table(gpa=[0])).content
PARQUET = "application/vnd.apache.parquet"


def make(client: httpx2.Client, body: Body, query: str = "", **headers: str) -> httpx2.Response:
    joined = "&".join(filter(None, (body.query, query)))
    return client.post(f"/v1/footprints?{joined}", content=body.content, headers=body.headers | headers)


def made(client: httpx2.Client, body: Body = WRITES, query: str = "") -> dict[str, Any]:
    """A footprint that is taken."""
    return done(make(client, body, query))


def ask(client: httpx2.Client, footprint: str, *policies: Any, **beside: Any) -> httpx2.Response:
    return client.post(f"/v1/footprints/{footprint}/costs", json={"policies": policies, **beside})


def file_of(client: httpx2.Client, footprint: str) -> bytes:
    reply = client.get(f"/v1/footprints/{footprint}", headers={"Accept": PARQUET})
    assert reply.status_code == 200 and reply.headers["Content-Type"] == PARQUET
    return reply.content


@pytest.fixture
def small() -> Iterator[Callable[..., ContractClient]]:
    """Services with narrow limits."""
    started = []

    def start(**settings: Any) -> ContractClient:
        context = running(Settings(warm_up=False, store="memory", **settings))
        started.append(context)
        return context.__enter__().client

    yield start
    for context in started:
        context.__exit__(None, None, None)


@pytest.mark.parametrize("name", FORMATS)
def test_every_body_that_a_replay_takes(client: ContractClient, vm: str, name: str) -> None:
    body = FORMATS[name](MIXED)
    client.post(f"{vm}/protections", json=POLICY)
    result = replayed(client, vm, body)
    reply = make(client, body, "level=bytes&name=mixed")
    found = done(reply)
    assert reply.headers["Location"] == f"/v1/footprints/{found['id']}"
    assert (found["level"], found["places"], found["records"], found["writes"]) == ("bytes", 9, 9, 8)
    assert found["traces"][0]["name"] == "mixed" and found["traces"][0]["records"] == 9
    answer = ask(client, found["id"], POLICY, memory_slots=SLOTS).json()
    (cost,) = answer["costs"]
    assert answer["assumed"] is None and answer["profile"] == "kvm-2019" and cost["name"] == "p"
    for total in ("violations", "page_granular_violations", "mmio", "unenforced_writes"):
        assert cost[total] == result[total], total
    hits = {**result["by_object"]["guarded"], "first_trace": "mixed"}
    assert cost["by_object"] == {"guarded": hits} and cost["first_index"] == 2 and cost["first_trace"] == "mixed"


def test_a_footprint_is_read_and_posted_as_a_file(client: ContractClient) -> None:
    one = made(client, query="level=bytes")
    file = file_of(client, one["id"])
    assert len(stored.read(io.BytesIO(file), 1 << 30)) == 9 and len(file) == one["size"]
    other = done(client.post("/v1/footprints", content=file, headers={"Content-Type": PARQUET}))
    assert other["id"] != one["id"] and other["traces"] == one["traces"]
    assert file_of(client, other["id"]) == file
    coarse = done(client.post("/v1/footprints?level=spans", content=file, headers={"Content-Type": PARQUET}))
    assert file_of(client, coarse["id"]) == file_of(client, made(client)["id"]) and coarse["level"] == "spans"
    reply = client.post("/v1/footprints?by=pc", content=file, headers={"Content-Type": PARQUET})
    assert reply.status_code == 422 and reply.json()["field"] == "by.pc"
    assert pq.read_metadata(io.BytesIO(file)).num_rows == 9
    tag = client.get(f"/v1/footprints/{one['id']}", headers={"Accept": PARQUET}).headers["ETag"]
    again = client.get(f"/v1/footprints/{one['id']}", headers={"Accept": PARQUET, "If-None-Match": tag})
    assert again.status_code == 304
    damaged = file[:100] + bytes(200) + file[300:]
    reply = client.post("/v1/footprints", content=damaged, headers={"Content-Type": PARQUET})
    assert reply.status_code == 422


def test_list_and_delete(small: Callable[..., ContractClient]) -> None:
    client = small()
    ids = [made(client)["id"] for _ in range(5)]
    url, seen = "/v1/footprints?limit=2", []
    while url:
        page = client.get(url).json()
        seen += [item["id"] for item in page["footprints"]]
        url = page["next"]
    assert seen == ids
    assert client.get(f"/v1/footprints/{ids[1]}").json()["id"] == ids[1]
    assert client.delete(f"/v1/footprints/{ids[1]}").status_code == 204
    for reply in (
        client.get(f"/v1/footprints/{ids[1]}"),
        client.delete(f"/v1/footprints/{ids[1]}"),
        ask(client, ids[1], POLICY),
        client.get(f"/v1/footprints/{ids[1]}/pages"),
    ):
        assert reply.status_code == 404 and reply.json()["field"] == "footprint"
    assert len(client.get("/v1/footprints").json()["footprints"]) == 4


def test_pages_timeline_and_writers(client: ContractClient) -> None:
    rows = {**MIXED.to_pydict(), "pc": [1, 2, 1, 1, 3, 1, 1, 1, 1], "time": list(range(0, 90, 10))}
    body = FORMATS["arrow"](table(**rows))
    found = made(client, body, "by=time:20,pc")["id"]
    pages = client.get(f"/v1/footprints/{found}/pages").json()
    assert [item["gfn"] for item in pages["pages"]] == ["0x1", "0x2", "0x3", "0xfee00"] and pages["total"] == 4
    assert pages["pages"][1] == {"gfn": "0x2", "accesses": 7, "writes": 6, "subpages": "0x80000007"}
    first = client.get(f"/v1/footprints/{found}/pages?order=writes&limit=3").json()
    assert [item["gfn"] for item in first["pages"]] == ["0x2", "0x1", "0x3"]
    assert [item["gfn"] for item in client.get(first["next"]).json()["pages"]] == ["0xfee00"]
    timeline = client.get(f"/v1/footprints/{found}/timeline").json()
    assert [(item["bucket"], item["accesses"], item["writes"]) for item in timeline["timeline"]] == [
        (0, 2, 2),
        (1, 2, 2),
        (2, 2, 2),
        (3, 2, 1),
        (4, 1, 1),
    ]
    writers = client.get(f"/v1/footprints/{found}/writers?order=writes").json()
    assert [(item["pc"], item["writes"]) for item in writers["writers"]] == [("0x1", 6), ("0x2", 1), ("0x3", 1)]
    plain = made(client)["id"]
    for name in ("timeline", "writers"):
        reply = client.get(f"/v1/footprints/{plain}/{name}")
        assert reply.status_code == 422 and reply.json()["field"] == "by"


@pytest.mark.parametrize("level", ["spans", "bytes"])
def test_beside_a_replay(client: ContractClient, vm: str, level: str) -> None:
    client.post(f"{vm}/protections", json=POLICY)
    body = FORMATS["arrow"](table(**MIXED.to_pydict(), pc=[7] * 9))
    plain = replayed(client, vm, body)
    result = replayed(client, vm, body, f"footprint={level}&footprint_by=records:4,pc")
    assert plain["footprint"] is None and result["violations"] == plain["violations"]
    trace = f"{vm}/traces/{result['id']}"
    assert client.get(trace).json()["footprint"] == result["footprint"]
    found = client.get(f"/v1/footprints/{result['footprint']}").json()
    assert found["vm"] == vm.rpartition("/")[2] and found["traces"][0]["digest"] == result["id"]
    assert (found["level"], found["by"]) == (level, {"time": None, "records": 4, "pc": True})
    assert client.get(f"{trace}/pages").json()["total"] == 4
    assert [item["accesses"] for item in client.get(f"{trace}/timeline").json()["timeline"]] == [4, 4, 1]
    assert client.get(f"{trace}/writers?limit=1").json()["writers"] == [{"pc": "0x7", "accesses": 9, "writes": 8}]
    cost = ask(client, found["id"], POLICY, memory_slots=SLOTS).json()["costs"][0]
    assert cost["violations"] == result["violations"] and cost["first_trace"] == result["id"]
    assert cost["timeline"] is None
    timed = ask(client, found["id"], POLICY, memory_slots=SLOTS, timeline=True).json()["costs"][0]["timeline"]
    for total in ("violations", "page_granular_violations"):
        assert sum(bucket[total] for bucket in timed) == result[total] > 0
    reply = ask(client, found["id"], POLICY, {**POLICY, "name": "q"}, timeline=True)
    assert reply.status_code == 422 and reply.json()["field"] == "timeline"
    for name in ("pages", "timeline", "writers"):
        reply = client.get(f"{vm}/traces/{plain['id']}/{name}")
        assert reply.status_code == 404 and "footprint=spans" in reply.json()["rule"]
    client.delete(f"/v1/footprints/{found['id']}")
    assert client.get(f"{trace}/pages").status_code == 404 and client.get(trace).status_code == 200


@pytest.mark.parametrize(
    ("query", "field", "says"),
    [
        ("footprint=spans&on_violation=stop", "footprint", "on_violation"),
        ("footprint=spans&on_violation=ask", "footprint", "on_violation"),
        ("footprint=spans&start=1", "footprint", "start"),
        ("footprint=spans&address=gva", "address", "page tables"),
        ("footprint=spans&footprint_by=hours", "footprint_by", "time:N"),
        ("footprint_by=pc", "footprint_by", "footprint=spans"),
        ("footprint=spans&footprint_by=pc", "by.pc", "column pc"),
        ("footprint=pages", "footprint", ""),
    ],
)
def test_what_no_footprint_stands_beside(client: ContractClient, vm: str, query: str, field: str, says: str) -> None:
    revision = client.get(vm).json()["revision"]
    body = FORMATS["packed"](MIXED)
    reply = client.post(f"{vm}/traces?{body.query}&{query}", content=body.content, headers=body.headers)
    assert reply.status_code == 422 and reply.json()["field"] == field and says in reply.text, reply.text
    assert client.get(vm).json()["revision"] == revision


@pytest.mark.parametrize(
    ("query", "content", "media", "field"),
    [
        ("by=pc,pc", b"", "application/octet-stream", "by"),
        ("by=time:0", b"", "application/octet-stream", "by"),
        ("by=time:1,records:2", b"", "application/octet-stream", "by"),
        ("by=time:99999999999999999999", b"", "application/octet-stream", "by"),
        ("by=time:9999999999999999999", b"", "application/octet-stream", "by.time"),
        ("record=record16&by=time:5", ONE, "application/octet-stream", "by.time"),
        ("record=record16&address=gva", ONE, "application/octet-stream", "address"),
        ("record=record16", packed(table(gpa=[0], size=[0])).content, "application/octet-stream", "size"),
        ("", b'{"op": 3, "gva": 4096}\n', "application/x-ndjson", "op"),
        ("", b'{"gpa": 0, "address_space": 4096}\n', "application/x-ndjson", "address_space"),
        ("level=pages", b"", "application/octet-stream", "level"),
        ("colour=red", b"", "application/octet-stream", "colour"),
    ],
)
def test_what_is_no_footprint(client: ContractClient, query: str, content: bytes, media: str, field: str) -> None:
    count = len(client.get("/v1/footprints?limit=1000").json()["footprints"])
    reply = client.post(f"/v1/footprints?{query}", content=content, headers={"Content-Type": media})
    assert reply.status_code == 422 and reply.json()["field"] == field, reply.text
    assert len(client.get("/v1/footprints?limit=1000").json()["footprints"]) == count


@pytest.mark.parametrize(
    ("members", "field"),
    [
        ({"policies": []}, "policies"),
        ({"policies": [POLICY, {"name": "q"}]}, "policies[1].objects"),
        (
            {"policies": [POLICY, {"name": "q", "objects": [{"name": "o", "gpa": 0, "size": 0}]}]},
            "policies[1].objects[0].size",
        ),
        ({"policies": [{"name": "q", "objects": [{"name": "o", "gpa": 0, "size": 0}]}]}, "policies[0].objects[0].size"),
        (
            {"policies": [POLICY, {"name": "q", "objects": [{"name": "o", "gva": 0, "size": 8}]}]},
            "policies[1].objects[0].gva",
        ),
        ({"policies": [POLICY], "memory_slots": []}, "policies[0].objects[0].gpa"),
        ({"policies": [POLICY], "memory_slots": [*SLOTS, {"gpa": 4096, "size": 4096}]}, "memory_slots[1].gpa"),
        ({"policies": [POLICY], "memory_slots": [{"gpa": 0, "size": 5}]}, "memory_slots[0].size"),
        ({"policies": [POLICY], "profile": "kvm-2030"}, "profile"),
    ],
)
def test_questions_without_an_answer(client: ContractClient, members: dict[str, Any], field: str) -> None:
    found = made(client)["id"]
    reply = client.post(f"/v1/footprints/{found}/costs", json=members)
    assert reply.status_code == 422 and reply.json()["field"] == field, reply.text


def test_what_is_taken_for_granted_is_said(client: ContractClient) -> None:
    found = made(client)["id"]
    answer = ask(client, found, POLICY, {**POLICY, "name": "q"}, profile="kvm-latest").json()
    assert "writable memory everywhere" in answer["assumed"] and answer["memory_slots"] is None
    assert [cost["name"] for cost in answer["costs"]] == ["p", "q"]
    assert answer["costs"][0]["mmio"] == 0 and answer["costs"][0]["by_object"]["guarded"]["collateral"] is None


def test_a_job(client: ContractClient) -> None:
    reply = make(client, FORMATS["packed"](MIXED), "level=bytes", **ASYNC)
    assert reply.status_code == 202 and reply.json()["vm"] is None
    job = ended(client, reply.headers["Location"])
    assert job["state"] == "succeeded" and job["records_done"] == 9
    assert client.get(job["result"]).json()["places"] == 9
    failed = ended(client, make(client, Body(b"{}", "application/x-ndjson"), **ASYNC).headers["Location"])
    assert failed["state"] == "failed" and failed["error"]["code"] == "invalid-trace" and failed["result"] is None
    waited = make(client, FORMATS["parquet"](MIXED), Prefer="wait=20")
    assert waited.status_code == 201 and waited.headers["Preference-Applied"] == "wait=20"
    client.delete(job["result"])
    assert client.get(reply.headers["Location"]).json()["result"] is None


def test_a_job_beside_a_replay(client: ContractClient, vm: str) -> None:
    body = FORMATS["packed"](MIXED)
    reply = client.post(f"{vm}/traces?{body.query}&footprint=spans", content=body.content, headers=body.headers | ASYNC)
    result = client.get(ended(client, reply.headers["Location"])["result"]).json()
    assert client.get(f"/v1/footprints/{result['footprint']}").json()["records"] == 9


def test_a_key_makes_one(client: ContractClient) -> None:
    body = FORMATS["packed"](MIXED)
    one, two = (make(client, body, **key("one-footprint")) for _ in range(2))
    assert done(one) == done(two) and two.headers["Idempotency-Replayed"] == "true"


def test_the_last_ones_are_kept(small: Callable[..., ContractClient]) -> None:
    client = small(kept_footprints=2)
    ids = [made(client)["id"] for _ in range(4)]
    assert [item["id"] for item in client.get("/v1/footprints").json()["footprints"]] == ids[2:]
    size = client.get(f"/v1/footprints/{ids[3]}").json()["size"]
    client = small(kept_footprint_bytes=2 * size + 1)
    ids = [made(client)["id"] for _ in range(4)]
    assert [item["id"] for item in client.get("/v1/footprints").json()["footprints"]] == ids[2:]
    client = small(kept_footprint_bytes=1, kept_footprint_days=1e-9)
    reply = make(client, FORMATS["packed"](MIXED))
    assert reply.status_code == 201 and client.get(reply.headers["Location"]).status_code == 404


def test_memory_is_that_of_the_places(small: Callable[..., ContractClient]) -> None:
    client = small(footprint_memory_bytes=MIB, max_footprint_memory_bytes=2 * MIB)
    many = packed(table(gpa=[128 * n for n in range(20_000)]))
    few = packed(table(gpa=[128 * (n % 900) for n in range(40_000)]))
    reply = make(client, many)
    assert reply.status_code == 422 and "places" in reply.json()["rule"], reply.text
    found = made(client, few)
    assert found["places"] == 900
    client = small(max_footprint_memory_bytes=MIB)
    reply = make(client, many)
    assert reply.status_code == 429 and reply.json()["limit"] == "max_footprint_memory_bytes"


def test_limits_of_a_question(small: Callable[..., ContractClient]) -> None:
    client = small(max_policies=2, loaded_footprint_bytes=0)
    found = made(client)["id"]
    assert ask(client, found, POLICY, POLICY).status_code == 200
    reply = ask(client, found, POLICY, POLICY, POLICY)
    assert reply.status_code == 429 and reply.json()["field"] == "max_policies"
    whole = {"name": "whole", "pages": [["0x0", 1 << 20, 0]]}
    assert ask(client, found, whole).status_code == 200
    reply = ask(client, found, whole, whole)
    assert reply.status_code == 429 and reply.json()["field"] == "policies"
    torn = {"name": "torn", "pages": [["0x0", 1 << 17, 0x55555555]]}
    reply = ask(client, found, torn)
    assert reply.status_code == 429 and reply.json()["field"] == "policies" and "runs" in reply.json()["rule"]
    assert client.get(
        "/v1/footprints", params={"cursor": cursors.encode("footprints by moment", 2**64 - 1)}
    ).json() == {
        "footprints": [],
        "next": None,
    }
    assert client.get(f"/v1/footprints/{found}/pages?limit=100000").status_code == 422
    assert client.get(f"/v1/footprints/{found}/pages?cursor=x").status_code == 422
    assert make(client, Body(b"1" * 2000, "application/json", "by=" + "pc," * 40)).status_code == 422


def test_a_question_has_its_time_and_its_memory(small: Callable[..., ContractClient]) -> None:
    client = small(footprint_seconds=1e-9)
    found = made(client)["id"]
    for reply in (ask(client, found, POLICY), client.get(f"/v1/footprints/{found}/pages")):
        assert reply.status_code == 429 and reply.json()["field"] == "footprint_seconds", reply.text
    client = small(footprint_memory_bytes=MIB, loaded_footprint_bytes=0)
    wide = packed(table(gpa=[0x10000 + 4096 * n for n in range(2000)], size=[65535] * 2000))
    found = made(client, wide)["id"]
    assert client.get(f"/v1/footprints/{found}/pages?order=writes&limit=2").json()["total"] == 2015
    reply = ask(client, found, POLICY, memory_slots=[{"gpa": 0, "size": 1 << 24}], timeline=True)
    assert reply.status_code == 422 and reply.json()["field"] == "by"
    apart = packed(table(gpa=[0x10000 + 128 * n for n in range(3000)]))
    many = made(client, apart)["id"]
    reply = ask(client, many, POLICY)
    assert reply.status_code == 429 and reply.json()["field"] == "footprint_memory_bytes", reply.text


def test_the_answer_to_a_question_is_not_kept(client: ContractClient) -> None:
    found = made(client)["id"]
    url = f"/v1/footprints/{found}/costs"
    for policy in (POLICY, {**POLICY, "name": "q"}):
        reply = client.post(url, json={"policies": [policy]}, headers=key("asked"))
        assert reply.json()["costs"][0]["name"] == policy["name"] and "Idempotency-Replayed" not in reply.headers


def test_a_footprint_is_its_tenants_own() -> None:
    tokens, headers = MemoryTokens(), []
    for name in ("red", "blue"):
        record, token = mint(name, tenant=name, scope="write", now=datetime.now(UTC))
        tokens.add(record)
        headers.append({"Authorization": f"Bearer {token}"})
    red, blue = headers
    with running(Settings(warm_up=False, store="memory"), tokens=tokens) as service:
        client = service.client
        body = FORMATS["packed"](MIXED)
        made_by_red = done(make(client, body, **red))["id"]
        for reply in (
            client.get(f"/v1/footprints/{made_by_red}", headers=blue),
            client.get(f"/v1/footprints/{made_by_red}", headers={**blue, "Accept": PARQUET}),
            client.get(f"/v1/footprints/{made_by_red}/pages", headers=blue),
            client.delete(f"/v1/footprints/{made_by_red}", headers=blue),
            client.post(f"/v1/footprints/{made_by_red}/costs", json={"policies": [POLICY]}, headers=blue),
            client.post(f"/v1/footprints/{made_by_red}/advice", json={"policy": POLICY}, headers=blue),
        ):
            assert reply.status_code == 404 and reply.json()["field"] == "footprint"
        own = done(make(client, body, **blue))["id"]
        reply = client.post("/v1/footprints:merge", json={"footprints": [own, made_by_red]}, headers=blue)
        assert reply.status_code == 404 and reply.json()["field"] == "footprints[1]"
        assert client.delete(f"/v1/footprints/{own}", headers=blue).status_code == 204
        assert client.get("/v1/footprints", headers=blue).json()["footprints"] == []
        assert len(client.get("/v1/footprints", headers=red).json()["footprints"]) == 1
