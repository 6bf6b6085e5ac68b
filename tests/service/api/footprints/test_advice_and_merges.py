"""Footprints over HTTP: advice is what the engine gives, and sums are those of files."""

from __future__ import annotations

import io
import itertools
import json
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import httpx2
import pytest

from engine.footprint import stored
from engine.footprint.advice import advise
from engine.footprint.combine import merge
from engine.footprint.places import Footprint
from engine.footprint.question import Question
from engine.kvm.protections import ProtectedObject, Protection
from engine.kvm.slots import SlotSpec
from service.runtime import footprint_merges
from service.runtime.footprint_documents import advice_document
from service.settings import MIB, Settings
from tests.contract.client import ContractClient
from tests.support.bodies import FORMATS, Body, packed, table
from tests.support.http import done, key
from tests.support.job_calls import ASYNC, ended
from tests.support.server import running

PARQUET = "application/vnd.apache.parquet"
OBJECTS = [
    {"name": "hot beside", "gpa": "0x1040", "size": 8},
    {"name": "quiet", "gpa": "0x3000", "size": 128},
    {"name": "whole page", "gpa": "0x5100", "size": 64, "granularity": "page"},
]
POLICY = {"name": "p", "objects": OBJECTS}
SLOTS = [{"gpa": 0, "size": 16 * MIB}]
GPA = [0x1040, 0x1040, 0x1000, 0x1000, 0x1048, 0x3000, 0x5100, 0x5800, 0x5900, 0x9000, 0xFEE00000]
TRACE = packed(table(gpa=GPA, size=[8] * len(GPA)))
ENGINE_POLICY = Protection(
    "p",
    (
        ProtectedObject("hot beside", 0x1040, 8),
        ProtectedObject("quiet", 0x3000, 128),
        ProtectedObject("whole page", 0x5100, 64, "page"),
    ),
)


def made(client: httpx2.Client, body: Body = TRACE, query: str = "level=bytes", **headers: str) -> str:
    url = f"/v1/footprints?{body.query}&{query}"
    return str(done(client.post(url, content=body.content, headers=body.headers | headers))["id"])


def file_of(client: httpx2.Client, footprint: str) -> bytes:
    return client.get(f"/v1/footprints/{footprint}", headers={"Accept": PARQUET}).content


def read(client: httpx2.Client, footprint: str) -> Footprint:
    return stored.read(io.BytesIO(file_of(client, footprint)), 1 << 30)


def ask(client: httpx2.Client, footprint: str, policy: Any = POLICY, **beside: Any) -> httpx2.Response:
    return client.post(f"/v1/footprints/{footprint}/advice", json={"policy": policy, **beside})


def add(client: httpx2.Client, *footprints: str, **headers: str) -> httpx2.Response:
    return client.post("/v1/footprints:merge", json={"footprints": footprints}, headers=headers)


def count(client: httpx2.Client) -> int:
    return len(client.get("/v1/footprints?limit=1000").json()["footprints"])


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


@pytest.mark.parametrize("profile", ["kvm-2019", "kvm-latest"])
@pytest.mark.parametrize(("slots", "per_million"), [(SLOTS, 200_000.0), (None, None)])
def test_advice_is_that_of_the_engine(
    client: ContractClient, profile: str, slots: list[dict[str, int]] | None, per_million: float | None
) -> None:
    found = made(client)
    question = Question(None if slots is None else (SlotSpec(0, 0, 16 * MIB),), profile)
    footprint = read(client, found)
    budget = None if per_million is None else per_million * len(GPA) / 1e6
    wanted = advice_document(footprint, question, advise(footprint, ENGINE_POLICY, question, budget))
    asked = {} if per_million is None else {"per_million": per_million}
    for _ in range(2):  # the second time what was worked out is there
        reply = ask(client, found, memory_slots=slots, profile=profile, **asked)
        assert reply.status_code == 200 and reply.json() == json.loads(json.dumps(wanted))
    assert {edit["action"] for edit in reply.json()["advice"]} == {"move", "narrow"}
    assert reply.json()["cost"]["mmio"] == (slots is not None)
    assert (reply.json()["within_budget"] is None) == (per_million is None)


def test_advice_applied_costs_what_it_promised(client: ContractClient) -> None:
    """A narrower object by the costs of the same footprint, a moved one by a trace that was changed so."""
    found = made(client)
    advice = ask(client, found, memory_slots=SLOTS).json()
    narrow = next(edit for edit in advice["advice"] if edit["action"] == "narrow")
    objects = [{**item, "granularity": "subpage"} for item in OBJECTS]
    costs = client.post(
        f"/v1/footprints/{found}/costs",
        json={"policies": [{"name": "p", "objects": objects}], "memory_slots": SLOTS},
    ).json()["costs"]
    assert narrow["cost"].items() <= costs[0].items()
    move = next(edit for edit in advice["advice"] if edit["object"] == "hot beside")
    places = [int(move["to"], 16) if gpa == 0x1040 else gpa for gpa in GPA]
    changed = made(client, packed(table(gpa=places, size=[8] * len(GPA))))
    objects = [{**OBJECTS[0], "gpa": move["to"]}, *OBJECTS[1:]]
    costs = client.post(
        f"/v1/footprints/{changed}/costs",
        json={"policies": [{"name": "p", "objects": objects}], "memory_slots": SLOTS},
    ).json()["costs"]
    assert costs[0]["violations"] == move["cost"]["violations"] == advice["cost"]["violations"] - move["saves"]


def test_a_budget_by_the_second(client: ContractClient) -> None:
    times = [10**9 * n for n in range(len(GPA))]
    timed = made(client, FORMATS["arrow"](table(gpa=GPA, size=[8] * len(GPA), time=times)), "level=bytes&by=time:1000")
    within = ask(client, timed, per_second=0.25).json()["within_budget"]
    assert within["exits"] == 0.25 * client.get(f"/v1/footprints/{timed}").json()["seconds"]
    assert within["cost"]["violations"] <= within["exits"] and within["dropped"]


@pytest.mark.parametrize(
    ("members", "field"),
    [
        ({"per_second": 1}, "per_second"),
        ({"per_second": 1, "per_million": 1}, "per_second"),
        ({"per_million": -1}, "per_million"),
        ({"per_million": 1e300}, "per_million"),
        ({"policy": {"name": "p"}}, "policy.objects"),
        ({"policy": {"name": "p", "objects": [{"name": "o", "gpa": 0, "size": 0}]}}, "policy.objects[0].size"),
        ({"policy": {"name": "p", "objects": [{"name": "o", "gva": 0, "size": 8}]}}, "policy.objects[0].gva"),
        ({"policy": {"name": "p", "pages": [[0, 1 << 40, 0]]}}, "policy.pages"),
        ({"memory_slots": []}, "policy.objects[0].gpa"),
        ({"memory_slots": [{"gpa": 0, "size": 5}]}, "memory_slots[0].size"),
        ({"profile": "kvm-2030"}, "profile"),
    ],
)
def test_questions_without_advice(client: ContractClient, members: dict[str, Any], field: str) -> None:
    reply = ask(client, made(client), **{"policy": POLICY, **members})
    assert reply.status_code in (422, 429) and reply.json()["field"] == field, reply.text


def test_advice_has_bounds(client: ContractClient, small: Callable[..., ContractClient]) -> None:
    found = made(client)
    reply = ask(client, made(client, query="level=spans"))
    assert reply.status_code == 422 and reply.json()["field"] == "level" and "bytes" in reply.json()["rule"]
    many = [{"name": f"o{n}", "gpa": 256 * n, "size": 8} for n in range(257)]
    reply = ask(client, found, {"name": "p", "objects": many})
    assert reply.status_code == 429 and reply.json()["field"] == "policy.objects" and "256" in reply.json()["rule"]
    assert ask(client, found, {"name": "p", "objects": many[1:]}).status_code == 200
    torn = {"name": "torn", "pages": [["0x0", 1 << 17, 0x55555555]]}
    reply = ask(client, found, torn)
    assert reply.status_code == 429 and reply.json()["field"] == "policy.pages" and "1048576" in reply.json()["rule"]
    assert ask(client, "fp_0").status_code == 404
    narrow = small(footprint_seconds=1e-9)
    reply = ask(narrow, made(narrow))
    assert reply.status_code == 429 and reply.json()["field"] == "footprint_seconds"
    narrow = small(footprint_memory_bytes=MIB)
    reply = ask(narrow, made(narrow), {"name": "p", "pages": [["0x0", 1 << 14, 0]]})
    assert reply.status_code == 429 and reply.json()["field"] == "footprint_memory_bytes"


def bodies() -> list[Body]:
    return [packed(table(gpa=[128 * n * step for n in range(40)], size=[8] * 40)) for step in (1, 3, 5)]


def test_three_in_any_order_are_one_file(client: ContractClient) -> None:
    ids = [made(client, body, f"level=bytes&name={number}") for number, body in enumerate(bodies())]
    parts = [read(client, name) for name in ids]
    wanted = io.BytesIO()
    stored.write(merge(parts), wanted)
    for order in itertools.permutations(ids):
        reply = add(client, *order)
        found = done(reply)
        assert reply.headers["Location"] == f"/v1/footprints/{found['id']}"
        assert (found["records"], found["traces_total"], found["vm"]) == (120, 3, None)
        assert file_of(client, found["id"]) == wanted.getvalue()
    twice = done(add(client, ids[0], ids[0]))
    assert (twice["records"], twice["places"], twice["traces_total"]) == (80, 40, 2)
    again = done(add(client, done(add(client, *ids[:2]))["id"], ids[2]))
    assert file_of(client, again["id"]) == wanted.getvalue()


def test_a_merge_as_a_job(client: ContractClient) -> None:
    ids = [made(client, body) for body in bodies()]
    wanted = file_of(client, done(add(client, *ids))["id"])
    reply = add(client, *ids, **ASYNC)
    assert reply.status_code == 202 and reply.json()["vm"] is None
    job = ended(client, reply.headers["Location"])
    assert job["state"] == "succeeded" and job["records_done"] == 120
    assert file_of(client, job["result"].rpartition("/")[2]) == wanted
    waited = add(client, *ids, Prefer="wait=20")
    assert waited.status_code == 201 and waited.headers["Preference-Applied"] == "wait=20"
    assert file_of(client, done(waited)["id"]) == wanted
    kept, jobs = count(client), len(client.get("/v1/jobs?limit=1000").json()["jobs"])
    reply = add(client, ids[0], "fp_0", **ASYNC)
    assert reply.status_code == 404 and reply.json()["field"] == "footprints[1]"
    assert (count(client), len(client.get("/v1/jobs?limit=1000").json()["jobs"])) == (kept, jobs)


def test_a_key_merges_once(client: ContractClient) -> None:
    ids = [made(client, body) for body in bodies()]
    one, two = (add(client, *ids, **key("one-merge")) for _ in range(2))
    assert done(one) == done(two) and two.headers["Idempotency-Replayed"] == "true"


def test_what_is_not_added_up_changes_nothing(client: ContractClient, small: Callable[..., ContractClient]) -> None:
    fine, spans, apart = made(client), made(client, query="level=spans"), made(client, query="level=bytes&by=records:5")
    kept = count(client)
    for ids, status, field in (
        ((fine, "fp_0123456789abcdef"), 404, "footprints[1]"),
        ((fine, fine, spans), 422, "footprints[2].level"),
        ((fine, apart), 422, "footprints[1].by"),
        ((fine,), 422, "footprints"),
        ((fine,) * 101, 422, "footprints"),
    ):
        reply = add(client, *ids)
        assert reply.status_code == status and reply.json()["field"] == field, reply.text
    assert "fp_0123456789abcdef" in add(client, fine, "fp_0123456789abcdef").text
    assert count(client) == kept

    narrow = small(footprint_memory_bytes=MIB)
    many = packed(table(gpa=[128 * n for n in range(3_000)]))
    ids = [made(narrow, many, "level=spans") for _ in range(3)]
    reply = add(narrow, *ids)
    assert reply.status_code == 429 and reply.json()["field"] == "footprint_memory_bytes", reply.text
    job = ended(narrow, add(narrow, *ids, **ASYNC).headers["Location"])
    assert job["state"] == "failed" and job["error"]["field"] == "footprint_memory_bytes"
    assert count(narrow) == 3
    narrow = small(footprint_seconds=1e-9)
    reply = add(narrow, made(narrow), made(narrow))
    assert reply.status_code == 429 and reply.json()["field"] == "footprint_seconds" and count(narrow) == 2


def test_the_sum_is_one_of_those_that_are_kept(small: Callable[..., ContractClient]) -> None:
    client = small(kept_footprints=2)
    ids = [made(client, body) for body in bodies()[:2]]
    found = done(add(client, *ids))["id"]
    assert [item["id"] for item in client.get("/v1/footprints").json()["footprints"]] == [ids[1], found]


def test_a_job_that_adds_up_tells_how_far_it_is(client: ContractClient, monkeypatch: pytest.MonkeyPatch) -> None:
    one, two = made(client), made(client)
    gate, begun = threading.Event(), threading.Event()

    def held(footprints: Sequence[Footprint], check: Callable[[int], None]) -> Footprint:
        check(1)
        begun.set()
        assert gate.wait(60)
        return merge(footprints, check)

    monkeypatch.setattr(footprint_merges, "merge", held)
    url = add(client, one, two, **ASYNC).headers["Location"]
    assert begun.wait(60)
    job = client.get(url).json()
    assert (job["records_done"], job["progress"]) == (2 * len(GPA), 0.5) and job["eta"] > 0
    gate.set()
    job = ended(client, url)
    assert (job["state"], job["records_done"], job["progress"]) == ("succeeded", 2 * len(GPA), 1.0)
