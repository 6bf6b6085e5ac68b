"""A server that is given hostile bodies refuses each, gives nothing back that was not sent, and stays small."""

from __future__ import annotations

from collections.abc import Iterator

import httpx2
import pytest

from service.settings import MIB
from tests.abuse.bodies import ATTACKS, JSON, NDJSON, packed
from tests.abuse.process import Service, serving, settled

BUDGET = 32 * MIB
# What a body may take of the process: its budget once more for what it decodes to, queues, and a chunk of records.
LARGEST_GROWTH = 112 * MIB


@pytest.fixture(scope="module")
def server() -> Iterator[Service]:
    with serving(body_memory_bytes=BUDGET, spool_memory_bytes=MIB) as service:
        yield service


@pytest.fixture(scope="module")
def client(server: Service) -> Iterator[httpx2.Client]:
    with server.client() as client:
        yield client


@pytest.fixture(scope="module")
def vm(client: httpx2.Client) -> str:
    slot = {"slot": 0, "gpa": 0, "size": 16 * MIB}
    reply = client.post("/v1/vms", json={"memory_slots": [slot], "spp": True, "translation_cache": "model"})
    assert reply.status_code == 201, reply.text
    # The first replay makes room that stays.
    reply = client.post(f"{reply.headers['Location']}/traces", content=b'{"gpa": 0}', headers={"Content-Type": NDJSON})
    assert reply.status_code == 201
    return str(reply.headers["Location"].rpartition("/traces/")[0])


@pytest.mark.parametrize("preference", [None, "respond-async"], ids=["call", "job"])
@pytest.mark.parametrize("name", list(ATTACKS))
def test_a_hostile_body(server: Service, client: httpx2.Client, vm: str, name: str, preference: str | None) -> None:
    media, make, rule = ATTACKS[name]
    body = make()
    coded = media in (JSON, NDJSON)
    headers = {"Content-Type": media, **({"Prefer": preference} if preference else {})}
    headers |= {"Content-Encoding": "zstd"} if coded else {}
    content = packed(body) if coded else body
    before = server.forget()
    problem = settled(client, client.post(f"{vm}/traces", content=content, headers=headers))
    grown = server.peak() - before
    assert client.get("/livez").status_code == 200
    assert bool(problem) == bool(rule) and rule in problem.get("rule", ""), problem
    assert problem.get("status", 422) in (400, 422), problem
    assert grown < LARGEST_GROWTH, f"{grown / MIB:.0f} MiB"


@pytest.mark.parametrize("preference", [None, "respond-async"], ids=["call", "job"])
@pytest.mark.parametrize("media", [JSON, NDJSON])
def test_little_that_unpacks_to_much(
    server: Service, client: httpx2.Client, vm: str, media: str, preference: str | None
) -> None:
    """A text of 400 MiB is refused when 64 MiB of it are there."""
    content = packed(b'"' + b"a" * (100 * MIB)) * 4
    assert len(content) < 64 << 10
    headers = {"Content-Type": media, "Content-Encoding": "zstd", **({"Prefer": preference} if preference else {})}
    before = server.forget()
    reply = client.post(f"{vm}/traces", content=content, headers=headers)
    problem = settled(client, reply)
    assert server.peak() - before < LARGEST_GROWTH
    assert client.get("/livez").status_code == 200
    # Whoever looks first says so: the reader that wants a record, or the decoder that counts.
    assert problem["code"] in ("body-too-large", "invalid-trace"), problem
    assert preference is None or problem["code"] == "body-too-large"
