"""Exit records over HTTP: pages, streams, media types."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from tests.contract.client import ContractClient
from tests.support import bodies
from tests.support.bodies import gpa8, table

ARROW = {"Accept": bodies.ARROW}
NDJSON = {"Accept": bodies.NDJSON}


def records_of_arrow(content: bytes) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = pa.ipc.open_stream(content).read_all().to_pylist()
    return rows


def as_json(row: dict[str, Any]) -> dict[str, Any]:
    words = ("qualification", "gpa", "gva", "gfn", "subpages", "denied")
    return {name: hex(value) if name in words and value is not None else value for name, value in row.items()}


@pytest.fixture
def exits(make_vm: Callable[..., str], client: ContractClient) -> str:
    """The exits of a trace with 2,500 violations over three objects, two of which overlap."""
    vm = make_vm()
    objects = [
        {"name": "one", "gpa": "0x2000", "size": 128},
        {"name": "two", "gpa": "0x2040", "size": 256},
        {"name": "three", "gpa": "0x5f80", "size": 256},
    ]
    client.post(f"{vm}/protections", json={"name": "p", "objects": objects})
    gpas = [0x2000, 0x2100, 0x1000, 0x5FFC, 0x2078] * 625
    reply = client.post(f"{vm}/traces?record=gpa8", content=gpa8(gpas).content, headers={"Content-Type": bodies.PACKED})
    assert reply.json()["violations"] == 2500
    return f"{reply.headers['Location']}/exits"


def test_pages(exits: str, client: ContractClient) -> None:
    trace = client.get(exits.removesuffix("/exits")).json()
    first = client.get(exits)
    assert first.headers["Vary"] == "Accept, Accept-Encoding" and first.headers["content-type"] == "application/json"
    assert first.json()["exit_records"] == trace["exit_records"]
    assert len(trace["exit_records"]) == 1000 and trace["next"] == first.json()["next"]
    assert first.headers["Link"] == f'<{trace["next"]}>; rel="next"'
    seen = list(trace["exit_records"])
    url = trace["next"]
    while url:
        page = client.get(url).json()
        seen += page["exit_records"]
        url = page["next"]
    assert len(seen) == 2500 and [record["index"] for record in seen] == [n for n in range(3125) if n % 5 != 2]
    assert [record["objects"] for record in seen[:4]] == [["one", "two"], ["two"], ["three"], ["one", "two"]]


def test_streams_hold_the_same(exits: str, client: ContractClient) -> None:
    lines = client.get(exits, headers=NDJSON)
    assert lines.headers["content-type"] == bodies.NDJSON and lines.headers["Vary"] == "Accept"
    rows = [json.loads(line) for line in lines.content.splitlines()]
    assert len(rows) == 2500 and rows[:1000] == client.get(exits).json()["exit_records"]
    stream = client.get(exits, headers=ARROW)
    assert [as_json(row) for row in records_of_arrow(stream.content)] == rows
    assert "Link" not in lines.headers


def test_streams_from_a_cursor_with_a_limit(exits: str, client: ContractClient) -> None:
    everything = [json.loads(line) for line in client.get(exits, headers=NDJSON).content.splitlines()]
    for headers in (NDJSON, ARROW):
        seen: list[Any] = []
        url: str | None = f"{exits}?limit=999"
        while url:
            reply = client.get(url, headers=headers)
            seen += (
                [json.loads(line) for line in reply.content.splitlines()]
                if headers is NDJSON
                else map(as_json, records_of_arrow(reply.content))
            )
            link = reply.headers.get("Link")
            url = link[1 : link.index(">")] if link else None
        assert seen == everything
    rest = client.get(client.get(f"{exits}?limit=10").json()["next"].partition("&")[0], headers=NDJSON)
    assert len(rest.content.splitlines()) == 2490


def test_arrow_has_the_columns_of_the_engine(exits: str, client: ContractClient) -> None:
    schema = pa.ipc.open_stream(client.get(exits, headers=ARROW).content).schema
    assert {name: str(schema.field(name).type) for name in schema.names} == {
        "index": "uint64",
        "vcpu": "uint16",
        "reason": "uint16",
        "name": "string",
        "qualification": "uint64",
        "gpa": "uint64",
        "gva": "uint64",
        "size": "uint16",
        "access": "uint8",
        "gfn": "uint64",
        "subpages": "uint32",
        "denied": "uint32",
        "objects": "list<item: string>",
        "resolution": "string",
        "stale": "bool",
        "source": "uint8",
        "insn_len": "uint8",
    }


def test_no_records(vm: str, client: ContractClient) -> None:
    reply = client.post(f"{vm}/traces?record=gpa8", content=b"", headers={"Content-Type": bodies.PACKED})
    exits = f"{reply.headers['Location']}/exits"
    assert client.get(exits).json() == {"exit_records": [], "next": None}
    assert client.get(exits, headers=NDJSON).content == b""
    assert records_of_arrow(client.get(exits, headers=ARROW).content) == []


def test_carried_columns(vm: str, client: ContractClient) -> None:
    client.put(f"{vm}/subpages?gfn=2", json={"access": [0]})
    trace = table(gpa=[0x2000, 0x2080])
    trace = trace.append_column("word", pa.array([1, (1 << 64) - 1], pa.uint64()))
    trace = trace.append_column("small", pa.array([-3, 4], pa.int16()))
    body = bodies.arrow(trace)
    reply = client.post(f"{vm}/traces?carry=word,small", content=body.content, headers=body.headers)
    exits = f"{reply.headers['Location']}/exits"
    rows = client.get(exits).json()["exit_records"]
    assert [(row["word"], row["small"]) for row in rows] == [(1, -3), ("0xffffffffffffffff", 4)]
    stream = pa.ipc.open_stream(client.get(exits, headers=ARROW).content).read_all()
    assert stream["word"].to_pylist() == [1, (1 << 64) - 1] and str(stream.schema.field("small").type) == "int16"


@pytest.mark.parametrize(
    ("query", "field"),
    [
        ("limit=0", "limit"),
        ("limit=1001", "limit"),
        ("cursor=xyz", "cursor"),
        ("cursor=é", "cursor"),
        ("from=3", "from"),
    ],
)
def test_refused(exits: str, client: ContractClient, query: str, field: str) -> None:
    reply = client.get(f"{exits}?{query}")
    assert reply.status_code == 422 and reply.json()["field"] == field


def test_a_cursor_of_another_trace(vm: str, exits: str, client: ContractClient) -> None:
    client.put(f"{vm}/subpages?gfn=2", json={"access": [0]})
    body = gpa8(np.full(2000, 0x2000).tolist())
    other = client.post(f"{vm}/traces?record=gpa8", content=body.content, headers=body.headers).json()["next"]
    cursor = other.partition("cursor=")[2]
    assert client.get(f"{exits}?cursor={cursor}").json()["field"] == "cursor"


def test_not_acceptable(exits: str, client: ContractClient) -> None:
    for accept in ("text/csv", "application/json;q=0", "text/*"):
        reply = client.get(exits, headers={"Accept": accept})
        assert reply.status_code == 406 and bodies.ARROW in reply.json()["rule"]
