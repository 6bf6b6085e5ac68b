"""HEAD of everything that can be read: the headers of GET, and no body."""

from __future__ import annotations

from typing import Any

import httpx2
import pytest

from tests.contract.client import ContractClient, contract
from tests.contract.places import url
from tests.support.server import Running

READABLE = [
    pytest.param(path, operation, id=path)
    for path, item in contract().document["paths"].items()
    for method, operation in item.items()
    if method == "get"
]
# Each of these differs from reply to reply.
OF_THE_REPLY = {"date", "x-request-id"}


def told(reply: httpx2.Response) -> dict[str, str]:
    return {name: value for name, value in reply.headers.items() if name not in OF_THE_REPLY}


@pytest.mark.parametrize(("path", "operation"), READABLE)
def test_head_is_get_without_the_body(path: str, operation: dict[str, Any], client: ContractClient, vm: str) -> None:
    if path == "/metrics":
        pytest.skip("what it counts changes with every call")
    asked = url(path, operation, vm)
    got, head = client.get(asked), client.head(asked)
    assert head.status_code == got.status_code and head.content == b""
    assert told(head) == told(got)


@pytest.mark.parametrize("path", ["/openapi.json", "/docs", "/static/swagger-ui/swagger-ui.css", "/nowhere"])
def test_head_of_pages(path: str, service: Running) -> None:
    got, head = httpx2.get(service.url + path, timeout=60), httpx2.head(service.url + path, timeout=60)
    assert (head.status_code, head.content, told(head)) == (got.status_code, b"", told(got))


def test_head_takes_conditions(client: ContractClient, vm: str) -> None:
    tag = client.head(vm).headers["ETag"]
    assert client.head(vm, headers={"If-None-Match": tag}).status_code == 304


@pytest.mark.parametrize("media", ["application/x-ndjson", "text/event-stream"])
def test_head_begins_no_stream(media: str, client: ContractClient, service: Running, vm: str) -> None:
    """An endless stream would be read to an end that never comes; that there is a reply at all says it was not."""
    head = client.head(f"{vm}/events", params={"follow": True}, headers={"Accept": media})
    assert head.status_code == 200 and head.headers["Content-Type"].startswith(media)
    assert "Content-Length" not in head.headers and head.headers["Vary"] == "Accept"
    assert service.app.state.registry.logs.streams == 0


@pytest.mark.parametrize("media", ["application/x-ndjson", "application/vnd.apache.arrow.stream"])
def test_head_renders_no_records(media: str, client: ContractClient, vm: str, monkeypatch: pytest.MonkeyPatch) -> None:
    client.post(f"{vm}/traces", json={"accesses": [{"gpa": 0}]})
    [trace] = client.get(f"{vm}/traces").json()["traces"]
    for stream in ("ndjson_stream", "arrow_stream"):
        monkeypatch.delattr(f"service.api.traces.exits.{stream}")
    head = client.head(f"{vm}/traces/{trace['id']}/exits", headers={"Accept": media})
    assert head.status_code == 200 and head.headers["Content-Type"].startswith(media)
    assert "Content-Length" not in head.headers


def test_what_may_be_done_says_head(client: ContractClient, vm: str) -> None:
    assert client.post(f"{vm}").headers["Allow"] == "DELETE, GET, HEAD"
    assert client.head(f"{vm}/traces:nothing").status_code == 404
    assert client.head(f"{vm}/spp").status_code in (200, 405)
    refused = client.head(f"{vm}/table-frames")
    assert refused.status_code == 405 and refused.headers["Allow"] == "POST" and refused.content == b""
