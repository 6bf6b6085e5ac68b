"""Every route × every kind of caller × own and foreign machines, generated from the routes of the application."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

import httpx2
import pytest
from fastapi.routing import APIRoute

from service.app import create_app
from service.http.route import GuardedWebSocketRoute, HeadRoute, StrictRoute
from service.security.access import _RANK, _SCOPE
from service.security.tokens import MemoryTokens, TokenStore, mint
from service.settings import Settings
from tests.contract.client import ContractClient, contract
from tests.contract.places import PLACES
from tests.support.server import Running, running

PERMISSIONS = tuple(_SCOPE)
ROUTES = create_app(Settings(warm_up=False)).routes
HTTP = [
    pytest.param(route, method, id=f"{method} {route.path_format}")
    for route in ROUTES
    if isinstance(route, APIRoute)
    for method in sorted(route.methods)
]
IOCTL = "KVM_CHECK_EXTENSION"


@dataclass
class Guarded:
    """A service that needs tokens, and a client for each kind of caller."""

    service: Running
    callers: dict[str, ContractClient]


@pytest.fixture(scope="module")
def guarded() -> Iterator[Guarded]:
    now = datetime.now(UTC)
    store: TokenStore = MemoryTokens()
    tokens: dict[str, str | None] = {"nobody": None, "stranger": "sp_000000000000_" + "0" * 43}
    for scope in ("read", "write", "admin"):
        for tenant in ("red", "blue"):
            record, tokens[f"{tenant} {scope}"] = mint("test", tenant=tenant, scope=scope, now=now)
            store.add(record)
    record, tokens["expired"] = mint(
        "old", tenant="red", scope="admin", now=now - timedelta(2), expires=now - timedelta(1)
    )
    store.add(record)
    record, tokens["revoked"] = mint("gone", tenant="red", scope="admin", now=now)
    store.add(record)
    store.revoke(record.id, now)
    with running(Settings(warm_up=False), store) as service, contextlib.ExitStack() as stack:
        callers = {
            name: stack.enter_context(
                ContractClient(
                    base_url=service.url,
                    headers={"Authorization": f"Bearer {token}"} if token else {},
                    timeout=60.0,
                )
            )
            for name, token in tokens.items()
        }
        yield Guarded(service, callers)


def request_for(route: APIRoute, method: str, vm: str) -> dict[str, Any]:
    """A request that the contract's own examples make acceptable."""

    def place(match: re.Match[str]) -> str:
        name = match[1].partition(":")[0]
        if name == "name" and "/ioctls/" in route.path:
            return IOCTL
        return vm if name == "vm" else PLACES.get(name, "0")

    asked: dict[str, Any] = {"method": method, "url": re.sub(r"{([^}]+)}", place, route.path_format)}
    operation = contract().document["paths"].get(route.path_format, {}).get(method.lower(), {})
    asked["params"] = {
        parameter["name"]: parameter["schema"].get("examples", [parameter["schema"].get("default", "0x0")])[0]
        for parameter in operation.get("parameters", [])
        if parameter["in"] == "query" and parameter["required"]
    }
    content = operation.get("requestBody", {}).get("content", {})
    if "application/json" in content:
        asked["json"] = content["application/json"]["example"]
    elif content:
        asked |= {"content": b"\0" * 16, "headers": {"Content-Type": next(iter(content))}}
    return asked


def is_no_machine(reply: httpx2.Response) -> bool:
    return reply.status_code == 404 and reply.json().get("field") == "vm"


@pytest.mark.parametrize("route", ROUTES, ids=lambda route: getattr(route, "path", "?"))
def test_every_route_declares_its_permission(route: Any) -> None:
    """``router(..., reads=..., writes=...)`` for the module, or ``@permission(...)`` below the route's decorator."""
    if isinstance(route, HeadRoute):
        return  # stands for the others
    assert isinstance(route, (StrictRoute, GuardedWebSocketRoute)), "make it with service.api.common.router"
    assert route.permission in PERMISSIONS, f"{route.path}: say reads= and writes= where its router is made"


@pytest.mark.parametrize(("route", "method"), HTTP)
def test_callers(route: StrictRoute, method: str, guarded: Guarded) -> None:
    vm = guarded.callers["red write"].post("/v1/vms", json={"spp": True}).headers["Location"]
    asked = request_for(route, method, vm.rpartition("/")[2])
    needed = _RANK[_SCOPE[route.permission or "admin"]]
    for caller, client in sorted(guarded.callers.items(), key=lambda item: item[0].startswith("red")):
        reply = client.request(**asked)
        tenant, _, scope = caller.partition(" ")
        if not needed:
            assert reply.status_code not in (401, 403), caller
        elif not scope:
            assert reply.status_code == 401 and reply.headers["WWW-Authenticate"].startswith("Bearer"), caller
        elif _RANK[scope] < needed:
            assert reply.status_code == 403 and "insufficient_scope" in reply.headers["WWW-Authenticate"], caller
        elif "{vm}" in route.path_format and tenant == "blue":
            assert is_no_machine(reply), f"{caller}: {reply.status_code} {reply.text[:200]}"
            # Nothing tells a foreign machine from none.
            nowhere = client.request(**request_for(route, method, "vm_0000000000000000"))
            shown = json.loads(reply.text.replace(vm.rpartition("/")[2], "vm_0000000000000000"))
            assert nowhere.json() == shown
        else:
            assert reply.status_code not in (401, 403, 500), caller
            if reply.status_code == 201 and route.path_format in ("/v1/vms", "/v1/vms/{vm}:clone"):
                client.delete(reply.headers["Location"])
            gone = method == "DELETE" and route.path_format == "/v1/vms/{vm}" and scope == "admin"
            assert is_no_machine(reply) is ("{vm}" in route.path_format and gone), f"{caller}: {reply.text[:200]}"
    guarded.callers["red write"].delete(vm)


def test_lists_show_the_own_tenant(guarded: Guarded) -> None:
    made = {
        tenant: guarded.callers[f"{tenant} write"].post("/v1/vms", json={"name": tenant}).json()["id"]
        for tenant in ("red", "blue")
    }
    for tenant, vm in made.items():
        client = guarded.callers[f"{tenant} read"]
        found: list[str] = []
        url: str | None = "/v1/vms?limit=1"
        while url:
            page = client.get(url).json()
            found += (item["id"] for item in page["vms"])
            assert {item["name"] for item in page["vms"]} <= {tenant}
            url = page["next"]
        assert found == [vm]
    for tenant, vm in made.items():
        guarded.callers[f"{tenant} write"].delete(f"/v1/vms/{vm}")


def test_who_may_is_told_before_the_body_is_read(guarded: Guarded) -> None:
    """Not 413, 415 or 422: a stranger learns nothing of the limits and cannot make the service read."""
    for content, media in ((b"x" * (33 << 20), "application/json"), (b"{", "text/plain")):
        reply = guarded.callers["nobody"].post("/v1/vms", content=content, headers={"Content-Type": media})
        assert reply.status_code == 401


PATHS = sorted({route.path_format for route in ROUTES if isinstance(route, APIRoute)})
METHODS = ("GET", "HEAD", "OPTIONS", "POST", "PUT", "PATCH", "DELETE", "TRACE", "PROPFIND")


@pytest.fixture(scope="module")
def plain() -> Iterator[httpx2.Client]:
    with httpx2.Client(timeout=60.0) as client:
        yield client


@pytest.mark.parametrize("path", PATHS)
def test_methods_that_a_path_does_not_have(path: str, guarded: Guarded, plain: httpx2.Client) -> None:
    """No way around the gate: OPTIONS and the others are 405 for everybody, and tell nothing of the machine."""
    here = [route for route in ROUTES if isinstance(route, APIRoute) and route.path_format == path]
    known = {method for route in here for method in route.methods}
    known |= {"HEAD"} if "GET" in known else set()
    vm = guarded.callers["red write"].post("/v1/vms", json={}).headers["Location"]
    before = guarded.callers["red read"].get(vm).content
    url = request_for(here[0], "GET", vm.rpartition("/")[2])["url"]
    for method in sorted(set(METHODS) - known):
        shown = set()
        for caller in ("nobody", "stranger", "revoked", "blue admin", "red read", "red admin"):
            # A plain client: the contract has none of these.
            client = guarded.callers[caller]
            reply = plain.request(method, guarded.service.url + url, headers=client.headers)
            assert reply.status_code == 405 and "etag" not in reply.headers, f"{caller} {method}"
            assert set(reply.headers["Allow"].replace(" ", "").split(",")) == known, f"{caller} {method}"
            shown.add(reply.content)
        assert len(shown) == 1, "the same for everybody"
    assert guarded.callers["red read"].get(vm).content == before
    guarded.callers["red write"].delete(vm)


@pytest.mark.parametrize(("route", "method"), [case for case in HTTP if case.values[1] == "GET"])  # type: ignore[attr-defined]
def test_head_is_no_way_around_the_gate(
    route: StrictRoute, method: str, guarded: Guarded, plain: httpx2.Client
) -> None:
    vm = guarded.callers["red write"].post("/v1/vms", json={"spp": True}).headers["Location"]
    asked = request_for(route, method, vm.rpartition("/")[2])
    url, query = guarded.service.url + asked["url"], asked["params"]
    for caller in ("nobody", "stranger", "revoked", "blue admin", "red read", "red admin"):
        headers = guarded.callers[caller].headers
        got = plain.get(url, params=query, headers=headers)
        head = plain.head(url, params=query, headers=headers)
        assert (head.status_code, head.content) == (got.status_code, b""), caller
        assert head.headers.get("etag") == got.headers.get("etag"), caller
    guarded.callers["red write"].delete(vm)


def test_paths_with_a_verb_are_among_them() -> None:
    """``…:harvest`` and the like are routes as others are."""
    verbs = {path.rpartition(":")[2] for path in PATHS if ":" in path.rpartition("/")[2]}
    assert {"harvest", "acknowledge", "explain"} <= verbs
    tried = {parameters.values[0].path_format for parameters in HTTP}
    assert tried == set(PATHS)
