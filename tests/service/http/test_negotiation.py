"""Media types and limits on every route that the contract has, not only on those somebody thought of."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from service.settings import Settings
from tests.contract.client import ContractClient, contract
from tests.contract.places import url
from tests.support.server import Running, running

OPERATIONS = [
    pytest.param(path, method, operation, id=f"{method.upper()} {path}")
    for path, item in contract().document["paths"].items()
    for method, operation in item.items()
]


def produced(operation: dict[str, Any]) -> set[str]:
    return {
        media
        for status, reply in operation["responses"].items()
        if status.startswith("2")
        for media in reply.get("content", {})
    }


@pytest.mark.parametrize(
    ("path", "method", "operation"),
    [case for case in OPERATIONS if produced(case.values[2]) and "204" not in case.values[2]["responses"]],  # type: ignore[arg-type,index]
)
def test_not_acceptable(path: str, method: str, operation: dict[str, Any], client: ContractClient, vm: str) -> None:
    before = client.get(vm).json()["revision"]
    body = operation.get("requestBody", {}).get("content", {}).get("application/json")
    options = {"json": body["example"]} if body else {}
    if path.endswith("/exits"):
        return  # needs a trace; tests/service/api/traces/test_exits.py
    for accept in ("text/html", "application/json;q=0, application/octet-stream;q=0, text/plain;q=0"):
        reply = client.request(method, url(path, operation, vm), headers={"Accept": accept}, **options)
        assert reply.status_code == 406, f"{accept}: {reply.text[:200]}"
        assert reply.json()["field"] == "Accept" and min(produced(operation)) in reply.json()["rule"]
    assert client.get(vm).json()["revision"] == before


@pytest.mark.parametrize(
    ("path", "method", "operation"),
    [case for case in OPERATIONS if "requestBody" in case.values[2]],  # type: ignore[operator]
)
def test_unsupported_media(path: str, method: str, operation: dict[str, Any], client: ContractClient, vm: str) -> None:
    taken = operation["requestBody"]["content"]
    for media in {"text/plain", "application/xml"} - set(taken):
        headers = {"Content-Type": media}
        reply = client.request(method, url(path, operation, vm), content=b"x", headers=headers)
        assert reply.status_code == 415 and reply.json()["field"] == "Content-Type"
        assert set(reply.headers["Accept"].split(", ")) == set(operation["requestBody"]["content"])
    headers = {"Content-Type": next(iter(operation["requestBody"]["content"])), "Content-Encoding": "br"}
    reply = client.request(method, url(path, operation, vm), content=b"x", headers=headers)
    assert reply.status_code == 415 and reply.json()["field"] == "Content-Encoding"


@pytest.mark.parametrize(("path", "method", "operation"), OPERATIONS)
def test_replies_that_vary_say_so(path: str, method: str, operation: dict[str, Any]) -> None:
    """The contract client then demands the header of each such reply."""
    for status, reply in operation["responses"].items():
        if status.startswith("2"):
            assert ("Vary" in reply.get("headers", {})) == (len(reply.get("content", {})) > 1)


@pytest.fixture(scope="module")
def small() -> Iterator[Running]:
    with running(Settings(warm_up=False, max_vms=1, max_memory_slots=2, max_table_frames=16)) as service:
        yield service


def test_limits_are_named(small: Running) -> None:
    def refused(call: Callable[..., Any], *arguments: Any, **options: Any) -> str:
        reply = call(*arguments, **options)
        assert reply.status_code == 429 and reply.json()["code"] == "limit-exceeded" and reply.headers["Retry-After"]
        field: str = reply.json()["field"]
        assert re.search(rf"\b{limits[field]}\b", reply.json()["rule"])
        return field

    limits = {"max_vms": 1, "max_memory_slots": 2, "max_table_frames": 16}
    slots = [{"slot": number, "gpa": number << 40, "size": 1 << 36} for number in range(3)]
    post, put = small.client.post, small.client.put
    assert refused(post, "/v1/vms", json={"memory_slots": slots}) == "max_memory_slots"
    home = post("/v1/vms", json={"memory_slots": slots[:2], "spp": True}).headers["Location"]
    assert refused(post, "/v1/vms", json={}) == "max_vms"
    assert refused(put, f"{home}/memory-slots/2", json={"gpa": 2 << 40, "size": 4096}) == "max_memory_slots"
    assert put(f"{home}/memory-slots/1", json={"gpa": 3 << 40, "size": 1 << 36}).status_code == 200
    far_apart = [{"gfn": number << 12, "npages": 1, "access": 0} for number in range(2000)]
    assert refused(small.client.patch, f"{home}/subpages", json={"ranges": far_apart}) == "max_table_frames"
    assert small.client.get(f"{home}/subpages?gfn=0").json()["access"] == ["0xffffffff"]
