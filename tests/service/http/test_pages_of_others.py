"""Pages of other origins: what a browser sends for them changes nothing, and programs are not touched."""

from __future__ import annotations

from collections.abc import Iterator

import httpx2
import pytest

from service.http.origins import check_page, parsed
from service.problems import Forbidden
from service.settings import Settings
from tests.contract.client import ContractClient, contract
from tests.contract.places import url
from tests.support.server import Running, running

UNSAFE = [
    pytest.param(path, method, operation, id=f"{method.upper()} {path}")
    for path, item in contract().document["paths"].items()
    for method, operation in item.items()
    if method != "get"
]
TOOL = ("https://tool.example",)


@pytest.mark.parametrize(
    ("origin", "site", "host", "allowed", "good"),
    [
        (None, None, b"localhost:8000", (), True),  # a program
        (b"http://localhost:8000", None, b"localhost:8000", (), True),
        (b"https://LOCALHOST:8000", None, b"localhost:8000", (), True),
        (b"http://localhost", None, b"localhost:80", (), True),
        (b"https://subpage.example", None, b"subpage.example:443", (), True),
        (b"https://subpage.example", None, b"subpage.example:80", (), False),
        (b"http://[::1]:8000", None, b"[::1]:8000", (), True),
        (b"http://[::1]:8000", None, b"[::1]:8001", (), False),
        (b"http://localhost:8001", None, b"localhost:8000", (), False),
        (b"http://localhost:8000.evil.example", None, b"localhost:8000", (), False),
        (b"http://evil.example@localhost:8000", None, b"localhost:8000", (), False),
        (b"https://tool.example", None, b"localhost:8000", (), False),
        (b"https://tool.example", None, b"localhost:8000", TOOL, True),
        (b"https://tool.example", b"cross-site", b"localhost:8000", TOOL, True),
        (b"https://tool.example", b"cross-site", b"localhost:8000", ("*",), True),
        (b"https://tool.example,https://tool.example", None, b"localhost:8000", TOOL, False),
        (b"http://[", None, b"localhost:8000", (), False),
        (b"http://localhost:99999", None, b"localhost:99999", (), False),
        (b"null", None, b"localhost:8000", (), False),
        (b"", None, b"localhost:8000", (), False),
        (b"http://localhost:8000", None, None, (), False),
        # Where the browser says how the page is related to the service, that decides.
        (b"https://subpage.example", b"same-origin", b"127.0.0.1:8000", (), True),  # behind a proxy
        (b"null", b"same-origin", b"localhost:8000", (), True),  # the page has no-referrer
        (None, b"none", b"localhost:8000", (), True),
        (None, b"cross-site", b"localhost:8000", (), False),
        (b"http://localhost:3000", b"same-site", b"localhost:8000", (), False),
        (b"http://localhost:8000", b"cross-site", b"localhost:8000", (), False),
        (None, b"whatever", b"localhost:8000", (), False),
    ],
)
def test_whose_page_it_is(
    origin: bytes | None, site: bytes | None, host: bytes | None, allowed: tuple[str, ...], good: bool
) -> None:
    if good:
        check_page(origin, site, host, allowed)
    else:
        with pytest.raises(Forbidden):
            check_page(origin, site, host, allowed)


def test_origins_are_compared_as_browsers_serialise_them() -> None:
    assert parsed("HTTPS://Tool.Example:443") == parsed("https://tool.example")
    assert parsed("https://tool.example/") is None and parsed("tool.example") is None


@pytest.mark.parametrize(("path", "method", "operation"), UNSAFE)
def test_no_unsafe_call_from_elsewhere(
    path: str, method: str, operation: dict[str, object], client: ContractClient, vm: str
) -> None:
    before = client.get(vm).json()["revision"]
    for headers in ({"Origin": "https://evil.example"}, {"Origin": "null"}, {"Sec-Fetch-Site": "cross-site"}):
        reply = client.request(method, url(path, operation, vm), headers=headers)
        assert (reply.status_code, reply.json()["code"]) == (403, "forbidden"), reply.text
        assert reply.json()["field"] in ("Origin", "Sec-Fetch-Site")
    assert client.get(vm).json()["revision"] == before


def test_a_page_makes_no_machine_through_an_ioctl(client: ContractClient) -> None:
    before = len(client.get("/v1/vms").json()["vms"])
    simple = {"Origin": "https://evil.example", "Sec-Fetch-Site": "cross-site", "Content-Type": "text/plain"}
    assert client.post("/v1/ioctls/KVM_CREATE_VM", headers=simple).status_code == 403
    assert len(client.get("/v1/vms").json()["vms"]) == before


@pytest.fixture
def open_to_tool() -> Iterator[Running]:
    with running(Settings(warm_up=False, cors_origins=TOOL)) as service:
        yield service


def test_pages_that_may(open_to_tool: Running, client: ContractClient) -> None:
    def create(service: str, **headers: str) -> int:
        return httpx2.post(f"{service}/v1/vms", json={}, headers=headers, timeout=60).status_code

    assert create(open_to_tool.url, Origin=TOOL[0]) == 201
    assert create(open_to_tool.url, Origin="https://tool.example.evil.example") == 403
    assert create(open_to_tool.url, Origin=open_to_tool.url) == 201
    assert create(open_to_tool.url) == 201


def test_reading_is_for_cors_to_decide(client: ContractClient, vm: str) -> None:
    """A reply that is not shared is kept from the page by the browser, and nothing is changed."""
    reply = client.get(vm, headers={"Origin": "https://evil.example", "Sec-Fetch-Site": "cross-site"})
    assert reply.status_code == 200 and "Access-Control-Allow-Origin" not in reply.headers
