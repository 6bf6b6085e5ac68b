"""Errors: one shape for ours and for the framework's."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import Callable
from typing import Any

import httpx2
import pytest
from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.requests import Request

from engine import errors
from service.http import handlers
from service.problems import (
    ENGINE_PROBLEMS,
    MEDIA_TYPE,
    PROBLEMS,
    FieldError,
    InvalidDocument,
    describe,
    responses,
    showable,
)
from service.settings import Settings
from tests.contract.client import ContractClient
from tests.support.server import Running, running


def is_problem(reply: httpx2.Response, code: str) -> dict[str, Any]:
    assert reply.headers["content-type"] == MEDIA_TYPE
    body: dict[str, Any] = reply.json()
    assert body["code"] == code and body["type"] == f"/problems/{code}" and body["status"] == reply.status_code
    assert body["instance"] == reply.request.url.path and body["title"] and body["detail"]
    return body


def test_unknown_path(client: ContractClient) -> None:
    for path in ("/v1", "/v1/nothing", "/v1/vms/", "/v1/vms/x/y/z", "/v2/vms"):
        assert client.get(path).status_code == 404
        is_problem(client.get(path), "not-found")


def test_unknown_things(vm: str, client: ContractClient) -> None:
    for path, field in (
        ("/v1/vms/vm_0", "vm"),
        (f"{vm}/memory-slots/7", "slot"),
        (f"{vm}/traces/tr_0", "trace"),
        (f"{vm}/traces/tr_0/exits", "trace"),
        (f"{vm}/protections/none", "name"),
        ("/problems/none", "code"),
    ):
        reply = client.get(path)
        assert reply.status_code == 404
        assert is_problem(reply, "not-found")["field"] == field


def test_method(client: ContractClient, vm: str) -> None:
    reply = client.put("/v1/vms")
    assert reply.status_code == 405
    is_problem(reply, "method-not-allowed")
    assert client.delete(f"{vm}/counters").headers["Allow"] == "GET, HEAD"


@pytest.mark.parametrize(
    ("path", "methods"),
    [
        ("", "DELETE, GET, HEAD"),
        ("/spp", "GET, HEAD, PUT"),
        ("/subpages", "GET, HEAD, PATCH, PUT"),
        ("/traces", "GET, HEAD, POST"),
    ],
)
def test_allow_lists_all_methods_of_a_path(client: ContractClient, vm: str, path: str, methods: str) -> None:
    """RFC 9110 section 15.5.6: also those of other routes."""
    reply = client.request("OPTIONS", vm + path)
    assert (reply.status_code, reply.headers["Allow"]) == (405, methods)


@pytest.mark.parametrize(
    "content", [b"{", b"", b"{'name': 1}", b'{"name": "\xff"}', b"\xff\xfe", b"[" * 100_000, b'{"name": "a" "b"}']
)
def test_malformed_json(client: ContractClient, content: bytes) -> None:
    reply = client.post("/v1/vms", content=content, headers={"Content-Type": "application/json"})
    if content:
        assert reply.status_code == 400
        is_problem(reply, "malformed-body")
    else:
        assert is_problem(reply, "invalid-value")["field"] == "body"


def test_a_body_of_another_type(client: ContractClient) -> None:
    for media in ("text/plain", "application/xml", "", "application/octet-stream"):
        reply = client.post("/v1/vms", content=b"{}", headers={"Content-Type": media} if media else {})
        assert reply.status_code == 415 and reply.headers["Accept"] == "application/json"
        is_problem(reply, "unsupported-media-type")
    assert client.post("/v1/vms", content=b"{}", headers={"Content-Type": "application/json; charset=utf-8"}).is_success


def test_values_that_json_cannot_carry(client: ContractClient) -> None:
    for content, status in (
        (b'{"name": "\\ud800"}', 400),
        (b'{"\\udfff": 1}', 400),
        (b'{"maxphyaddr": NaN}', 422),
        (b'{"maxphyaddr": 1e999}', 422),
    ):
        reply = client.post("/v1/vms", content=content, headers={"Content-Type": "application/json"})
        assert reply.status_code == status, reply.text
        json.loads(reply.content)


def test_long_values_are_cut(client: ContractClient) -> None:
    problem = client.post("/v1/vms", json={"name": ["x" * 10_000]}).json()
    assert len(problem["value"]) < 300


def test_coded_bodies(client: ContractClient) -> None:
    for coding in ("br", "deflate", "gzip, gzip", "zstd, gzip", "x"):
        reply = client.post(
            "/v1/vms", content=b"\x1f\x8b", headers={"Content-Type": "application/json", "Content-Encoding": coding}
        )
        assert reply.status_code == 415 and reply.headers["Accept-Encoding"] == "gzip, zstd, identity"
        assert is_problem(reply, "unsupported-media-type")["field"] == "Content-Encoding"


def test_every_engine_error_has_a_problem() -> None:
    def tree(cls: type[errors.EngineError]) -> list[type[errors.EngineError]]:
        return [cls, *(found for child in cls.__subclasses__() for found in tree(child))]

    for cls in tree(errors.EngineError):
        body, _ = describe(cls("must be otherwise", field="thing", value=1), "/x")
        assert body["code"] == cls.code and body["status"] < 500 and body["field"] == "thing"
    assert set(ENGINE_PROBLEMS.values()) <= set(PROBLEMS)


def test_trace_errors_name_the_record() -> None:
    body, headers = describe(errors.TraceError("must be so", index=7, field="gpa", value=1 << 60), "/x")
    assert body["index"] == 7 and body["value"] == "0x1000000000000000" and not headers
    body, headers = describe(errors.Busy("wait"), "/x")
    assert headers == {"Retry-After": "1"} and body["status"] == 409


def test_faults_and_framework_errors() -> None:
    faults = [FieldError(field="a", rule="r"), FieldError(field="b", rule="s")]
    body, _ = describe(InvalidDocument("r", field="a", faults=faults), "/x")
    assert body["errors"] == [{"field": "a", "rule": "r"}, {"field": "b", "rule": "s"}]
    assert describe(HTTPException(404, "gone fishing"), "/x")[0]["rule"] == "gone fishing"
    body, _ = describe(ValueError("secret"), "/x")
    assert body["status"] == 500 and "secret" not in json.dumps(body)
    assert describe(HTTPException(418), "/x")[0]["status"] == 500


@pytest.mark.parametrize(
    ("value", "field", "shown"),
    [
        (1, None, 1),
        (1, "gpa", "0x1"),
        (1, "objects[3].gpa", "0x1"),
        (-1, "gpa", -1),
        (1 << 40, None, "0x10000000000"),
        (True, "gpa", True),
        (None, "gpa", None),
        (float("nan"), None, "nan"),
        (1.5, None, 1.5),
        ([1, {"a": 2}], None, [1, {"a": 2}]),
        ([float("nan")], None, "[NaN]…"),
        (b"x", None, "b'x'"),
    ],
)
def test_showable(value: Any, field: str | None, shown: Any) -> None:
    assert showable(value, field) == shown


def test_responses_are_grouped_by_status() -> None:
    found = responses("conflict", "vm-busy", "not-found")
    assert set(found) == {409, 404}
    assert set(found[409]["content"][MEDIA_TYPE]["examples"]) == {"conflict", "vm-busy"}
    assert "Retry-After" in found[409]["headers"] and "headers" not in found[404]


def test_problem_types_can_be_read(client: ContractClient) -> None:
    listed = client.get("/problems").json()["problems"]
    assert [problem["code"] for problem in listed] == list(PROBLEMS)
    for problem in listed:
        assert client.get(problem["type"]).json() == problem


def test_a_defect_is_a_500_without_details(caplog: pytest.LogCaptureFixture) -> None:
    app = FastAPI()
    handlers.install(app)

    @app.get("/defect")
    async def defect() -> None:
        raise ZeroDivisionError("the secret")

    async def ask() -> httpx2.Response:
        transport = httpx2.ASGITransport(app=app, raise_app_exceptions=False)
        async with httpx2.AsyncClient(transport=transport, base_url="http://test") as client:
            return await client.get("/defect")

    reply = asyncio.run(ask())
    assert reply.status_code == 500 and "secret" not in reply.text
    is_problem(reply, "internal-error")


def test_nobody_left_to_tell() -> None:
    from starlette.requests import ClientDisconnect

    app = FastAPI()
    handlers.install(app)

    @app.post("/gone")
    async def gone(request: Request) -> None:
        raise ClientDisconnect

    async def ask() -> httpx2.Response:
        async with httpx2.AsyncClient(transport=httpx2.ASGITransport(app=app), base_url="http://test") as client:
            return await client.post("/gone")

    assert asyncio.run(ask()).status_code == 499


@pytest.fixture(scope="module")
def small() -> Any:
    settings = Settings(warm_up=False, max_body_bytes=1 << 16, max_document_bytes=1 << 12, spool_memory_bytes=1 << 10)
    with running(settings) as service:
        yield service


def test_a_document_over_the_limit(small: Running) -> None:
    reply = small.client.post("/v1/vms", json={"name": "x" * 5000})
    assert reply.status_code == 413
    assert "4096" in is_problem(reply, "body-too-large")["rule"]


def test_a_document_over_the_limit_without_a_length(small: Running) -> None:
    def pieces() -> Any:
        yield b'{"name": "'
        for _ in range(100):
            yield b"x" * 100
        yield b'"}'

    headers = {"Content-Type": "application/json"}
    reply = small.client.post("/v1/vms", content=pieces(), headers=headers)
    assert reply.status_code == 413
    is_problem(reply, "body-too-large")
    assert small.client.get("/v1/vms").json()["vms"] == []


def test_refused_before_it_is_sent(small: Running) -> None:
    """A client that waits for 100 Continue never sends the body."""
    with socket.create_connection(("127.0.0.1", small.port)) as connection:
        connection.sendall(
            b"POST /v1/vms HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            b"Content-Length: 99999999999\r\nExpect: 100-continue\r\n\r\n"
        )
        assert connection.recv(65536).startswith(b"HTTP/1.1 413 ")


def test_deleted_while_a_change_waits(vm: str, service: Running) -> None:
    """The change finds nobody any more: 404, not a change to a machine that no one can see."""
    entry = service.app.state.registry.get(vm.rpartition("/")[2])

    async def run() -> None:
        async with entry.mutation(hooks=()):
            entry.gone = True
        async with entry.mutation(hooks=()):
            pass

    with pytest.raises(errors.NotFound):
        asyncio.run(run())
    entry.gone = False


def test_busy() -> None:
    """Somebody else holds the lock: a mutation waits its time, a read does not wait."""
    with running(Settings(warm_up=False, busy_timeout=0.05)) as slow:
        home = slow.client.post("/v1/vms", json={"spp": True}).headers["Location"]
        entry = slow.app.state.registry.get(home.rpartition("/")[2])
        entry.lock.held = True
        assert slow.client.get(home).status_code == 200
        reply = slow.client.put(f"{home}/spp", json={"active": True})
        assert reply.status_code == 409 and reply.headers["Retry-After"] == "1"
        is_problem(reply, "vm-busy")
        entry.lock.held = False
        assert slow.client.put(f"{home}/spp", json={"active": True}).status_code == 200


@pytest.mark.parametrize(
    ("method", "path", "content", "status", "said"),
    [
        ("put", "spp", '{\n  "active": tru\n}', 400, "line 2 column 13"),
        (
            "post",
            "protections",
            '{"name": "p", "objects": [{"name": "o", "gpa": 0, "size": 1, "x": 1}]}',
            422,
            "gpa, size",
        ),
        ("put", "spp", '{"active": true, "aktive": 1}', 422, "is not a member of this document, which has: active"),
        ("post", "accesses", '{"gpa": "2a5c6a0"}', 422, "hexadecimal is written with 0x before it: 0x2a5c6a0"),
        ("post", "accesses", '{"gpa": 0, "vcpu": 5}', 422, "must be the id of a vCPU of this machine, which has 0"),
        ("put", "subpages?gfn=0x5c000", '{"access": [0]}', 422, "it looks like an address, whose GFN is 0x5c"),
    ],
)
def test_refusals_say_what_to_do(
    client: ContractClient, vm: str, method: str, path: str, content: str, status: int, said: str
) -> None:
    headers = {"Content-Type": "application/json"}
    reply = client.request(method.upper(), f"{vm}/{path}", content=content, headers=headers)
    assert reply.status_code == status, reply.text
    assert said in reply.json()["detail"]


def test_what_needs_spp_names_the_call_that_gives_it(client: ContractClient, make_vm: Callable[..., str]) -> None:
    vm = make_vm(spp=False)
    reply = client.put(f"{vm}/subpages?gfn=0", json={"access": [0]})
    assert reply.status_code == 409 and reply.json()["detail"].startswith("spp: must be on: ")
    assert "PUT …/spp" in reply.json()["detail"]
    for lacks, field in (
        ({"spp": False}, "host.spp"),
        ({"ept": False}, "host.ept"),
        ({"vendor": "amd"}, "host.vendor"),
    ):
        bare = make_vm(spp=False, host=lacks)
        problem = client.put(f"{bare}/spp", json={"active": True}).json()
        assert problem["code"] == "unsupported" and problem["field"] == field
        assert problem["rule"].startswith("must be ")
