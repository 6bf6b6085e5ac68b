"""SPP and the permissions of sub-pages over HTTP."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from tests.contract.client import ContractClient
from tests.support.http import OCTETS

FULL = "0xffffffff"


def window(client: ContractClient, vm: str, query: str) -> list[str]:
    found: list[str] = client.get(f"{vm}/subpages?{query}").json()["access"]
    return found


def test_enable(make_vm: Callable[..., str], client: ContractClient) -> None:
    vm = make_vm(spp=False)
    assert client.get(f"{vm}/spp").json() == {"active": False}
    assert client.put(f"{vm}/spp", json={"active": False}).json() == {"active": False}
    for _ in range(2):
        assert client.put(f"{vm}/spp", json={"active": True}).json() == {"active": True}
    assert client.get(vm).json()["spp"] is True
    refused = client.put(f"{vm}/spp", json={"active": False})
    assert refused.status_code == 409 and refused.json()["field"] == "active"
    tag = client.get(f"{vm}/spp").headers["ETag"]
    assert client.get(f"{vm}/spp", headers={"If-None-Match": tag}).status_code == 304
    assert client.put(f"{vm}/spp", json={"active": True}, headers={"If-Match": '"x"'}).status_code == 412


@pytest.mark.parametrize("body", [{}, {"active": 1}, {"active": "true"}, {"active": True, "x": 1}, [], 3, None])
def test_enable_refused(vm: str, client: ContractClient, body: Any) -> None:
    assert client.put(f"{vm}/spp", json=body).status_code == 422


def test_nothing_before_spp_is_enabled(make_vm: Callable[..., str], client: ContractClient) -> None:
    vm = make_vm(spp=False)
    replies = (
        client.get(f"{vm}/subpages?gfn=0"),
        client.put(f"{vm}/subpages?gfn=0", json={"access": [0]}),
        client.patch(f"{vm}/subpages", json={"ranges": [{"gfn": 0, "access": 0}]}),
        client.post(f"{vm}/protections", json={"name": "p", "objects": [{"name": "o", "gpa": 0, "size": 1}]}),
    )
    for reply in replies:
        assert reply.status_code == 409 and reply.json()["code"] == "spp-not-enabled"


def test_json_and_raw_are_the_same(vm: str, client: ContractClient) -> None:
    assert window(client, vm, "gfn=0x10&npages=3") == [FULL] * 3
    reply = client.put(f"{vm}/subpages?gfn=16&npages=3", json={"access": ["0xFFFF0000", 1, "7"]})
    assert reply.status_code == 204 and not reply.content
    read = client.get(f"{vm}/subpages?gfn=0x10&npages=3")
    assert read.json() == {"gfn": "0x10", "npages": 3, "access": ["0xffff0000", "0x1", "0x7"]}
    assert read.headers["Vary"] == "Accept" and read.headers["ETag"] == reply.headers["ETag"]
    raw = client.get(f"{vm}/subpages?gfn=0x10&npages=3", headers={"Accept": "application/octet-stream"})
    assert np.frombuffer(raw.content, "<u4").tolist() == [0xFFFF0000, 1, 7]
    assert raw.headers["ETag"] != read.headers["ETag"]
    content = np.array([5, 6], dtype="<u4").tobytes()
    reply = client.put(f"{vm}/subpages?gfn=0x10&npages=2", content=content, headers=OCTETS)
    assert reply.status_code == 204
    assert window(client, vm, "gfn=0x10&npages=3") == ["0x5", "0x6", "0x7"]
    again = client.get(f"{vm}/subpages?gfn=0x10&npages=2", headers={"Accept": "application/octet-stream"})
    assert again.headers["ETag"] == reply.headers["ETag"] and again.content == content


def test_big_windows(vm: str, client: ContractClient) -> None:
    maps = (np.arange(4096, dtype=np.uint64) * 1048583 & 0xFFFFFFFF).astype("<u4")
    maps = np.concatenate([maps[:4096]])
    for media, body in (("application/json", None), ("application/octet-stream", maps.tobytes())):
        options: dict[str, Any] = {"content": body, "headers": {"Content-Type": media}}
        if body is None:
            options = {"json": {"access": maps.tolist()}}
        assert client.put(f"{vm}/subpages?gfn=0&npages=4096", **options).status_code == 204
        raw = client.get(f"{vm}/subpages?gfn=0&npages=4096", headers={"Accept": "application/octet-stream"})
        assert raw.content == maps.tobytes()


def test_more_than_is_done_on_the_loop(make_vm: Callable[..., str], client: ContractClient) -> None:
    vm = make_vm(memory_slots=[{"slot": 0, "gpa": 0, "size": 1 << 26}])
    pages = 1 << 14
    assert client.put(f"{vm}/subpages?gfn=0&npages={pages}", json={"access": ["0x3"] * pages}).status_code == 204
    assert client.get(f"{vm}/subpages?gfn=0&npages={pages}").json()["access"] == ["0x3"] * pages
    ranges = [{"gfn": gfn, "npages": 1, "access": gfn} for gfn in range(pages)]
    assert client.patch(f"{vm}/subpages", json={"ranges": ranges}).status_code == 204
    raw = client.get(f"{vm}/subpages?gfn=0&npages={pages}", headers={"Accept": "application/octet-stream"})
    assert np.array_equal(np.frombuffer(raw.content, "<u4"), np.arange(pages))


def test_layers(vm: str, client: ContractClient) -> None:
    client.put(f"{vm}/subpages?gfn=2", json={"access": ["0xf"]})
    client.post(f"{vm}/protections", json={"name": "p", "objects": [{"name": "o", "gpa": "0x2080", "size": 1}]})
    assert window(client, vm, "gfn=2") == ["0xd"]
    assert window(client, vm, "gfn=2&layer=effective") == ["0xd"]
    assert window(client, vm, "gfn=2&layer=set") == ["0xf"]
    protected = window(client, vm, "gfn=2&layer=protected")
    assert protected == ["0x2"]
    assert window(client, vm, "gfn=2&layer=granted") == ["0x0"]
    assert client.get(f"{vm}/subpages?gfn=2&layer=other").json()["field"] == "layer"


def test_many_ranges_or_none(vm: str, client: ContractClient) -> None:
    ranges = [
        {"gfn": "0x1", "npages": 2, "access": 0},
        {"gfn": 8, "npages": "0x2", "access": ["0x1", 2]},
        {"gfn": 2, "access": "0xff"},
    ]
    assert client.patch(f"{vm}/subpages", json={"ranges": ranges}).status_code == 204
    assert window(client, vm, "gfn=0&npages=10") == [FULL, "0x0", "0xff", *[FULL] * 5, "0x1", "0x2"]
    bad = [{"gfn": 0, "access": 5}, {"gfn": "0x1000", "access": 5}]
    reply = client.patch(f"{vm}/subpages", json={"ranges": bad})
    assert reply.status_code == 422 and reply.json()["field"].endswith("gfn")
    assert window(client, vm, "gfn=0") == [FULL]


@pytest.mark.parametrize(
    ("ranges", "field"),
    [
        ([], "ranges"),
        ([{"gfn": 0, "access": "0x100000000"}], "ranges[0].access"),
        ([{"gfn": 0, "access": -1}], "ranges[0].access"),
        ([{"gfn": 0, "access": True}], "ranges[0].access"),
        ([{"gfn": 0, "access": 1.5}], "ranges[0].access"),
        ([{"gfn": 0, "access": None}], "ranges[0].access"),
        ([{"gfn": 0, "access": {}}], "ranges[0].access"),
        ([{"gfn": 0, "npages": 2, "access": [1]}], "ranges[0].access"),
        ([{"gfn": 0, "npages": 2, "access": [1, "0x"]}], "ranges[0].access[1]"),
        ([{"gfn": 0, "npages": 0, "access": 1}], "ranges[0].npages"),
        ([{"gfn": 0, "npages": 1 << 21, "access": 1}], "ranges[0].npages"),
        ([{"gfn": 0, "npages": 1 << 20, "access": 1}, {"gfn": 0, "access": 1}], "ranges"),
        ([{"gfn": "0xfffffffffffff", "npages": 2, "access": 1}], "ranges[0].gfn"),
        ([{"gfn": 0}], "ranges[0].access"),
        ([{"gfn": 0, "access": 1, "mask": 1}], "ranges[0].mask"),
    ],
)
def test_refused_ranges(vm: str, client: ContractClient, ranges: list[Any], field: str) -> None:
    reply = client.patch(f"{vm}/subpages", json={"ranges": ranges})
    assert reply.status_code == 422, reply.text
    assert reply.json()["field"] == field
    assert window(client, vm, "gfn=0") == [FULL]


@pytest.mark.parametrize(
    ("query", "field"),
    [
        ("gfn=0&npages=0", "npages"),
        ("gfn=0&npages=-1", "npages"),
        ("gfn=0&npages=0x100001", "npages"),
        ("gfn=0&npages=0xffffffffffffffff", "npages"),
        ("gfn=0x1000", "gfn"),
        ("gfn=0xfff&npages=2", "gfn"),
        ("gfn=0xffffffffffffffff", "gfn"),
        ("gfn=0x10000000000000000", "gfn"),
        ("gfn=-1", "gfn"),
        ("gfn=1.0", "gfn"),
        ("gfn=0x", "gfn"),
        ("gfn=1_0", "gfn"),
        ("", "gfn"),
        ("gfn=0&page=1", "page"),
        ("gfn=0&gfn=1", "gfn"),
    ],
)
def test_refused_windows(vm: str, client: ContractClient, query: str, field: str) -> None:
    for reply in (
        client.get(f"{vm}/subpages?{query}"),
        client.put(f"{vm}/subpages?{query}", json={"access": [0, 0] if "npages=2" in query else [0]}),
    ):
        assert reply.status_code == 422 and reply.json()["field"] == field, reply.text


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ({"access": ["0x1ffffffff", 0]}, 422),
        ({"access": [0]}, 422),
        ({"access": [0, 0, 0]}, 422),
        ({"access": 0}, 422),
        ({"access": [[], 0]}, 422),
        ({"access": [0, 0], "gfn": 0}, 422),
        ({}, 422),
        ([], 422),
        (b'{"access": [0,', 400),
        (b"", 400),
        (b"\xff", 400),
    ],
)
def test_refused_bodies(vm: str, client: ContractClient, body: Any, status: int) -> None:
    url = f"{vm}/subpages?gfn=0&npages=2"
    if isinstance(body, bytes):
        reply = client.put(url, content=body, headers={"Content-Type": "application/json; charset=utf-8"})
    else:
        reply = client.put(url, json=body)
    assert reply.status_code == status, reply.text
    assert window(client, vm, "gfn=0&npages=2") == [FULL] * 2


def test_raw_length(vm: str, client: ContractClient) -> None:
    for content in (bytes(7), bytes(4), bytes(12), b""):
        reply = client.put(f"{vm}/subpages?gfn=0&npages=2", content=content, headers=OCTETS)
        assert reply.status_code == 422 and reply.json()["field"] == "body" and reply.json()["value"] == len(content)


def test_media_types(vm: str, client: ContractClient) -> None:
    url = f"{vm}/subpages?gfn=0"
    reply = client.put(url, content=b"0", headers={"Content-Type": "text/plain"})
    assert reply.status_code == 415 and "application/octet-stream" in reply.json()["rule"]
    assert client.patch(f"{vm}/subpages", content=b"0", headers=OCTETS).status_code == 415
    assert client.get(url, headers={"Accept": "text/html"}).status_code == 406
    for accept, media in (
        ("*/*", "application/json"),
        ("application/*", "application/json"),
        ("application/octet-stream, application/json;q=0.5", "application/octet-stream"),
        ("application/octet-stream;q=0.5, application/json", "application/json"),
        ("application/octet-stream, */*;q=0.1", "application/octet-stream"),
        ("application/json;q=0, */*", "application/octet-stream"),
    ):
        assert client.get(url, headers={"Accept": accept}).headers["content-type"] == media


def test_tags_of_a_window(vm: str, client: ContractClient) -> None:
    url = f"{vm}/subpages?gfn=4&npages=2"
    raw = {"Accept": "application/octet-stream"}
    first = client.get(url)
    assert client.get(url, headers={"If-None-Match": first.headers["ETag"]}).status_code == 304
    assert client.get(url, headers={"If-None-Match": first.headers["ETag"], **raw}).status_code == 200
    assert client.get(f"{vm}/subpages?gfn=5&npages=2").headers["ETag"] != first.headers["ETag"]
    document = {"access": [1, 2]}
    assert client.put(url, json=document, headers={"If-Match": '"x"'}).status_code == 412
    assert (
        client.put(url, json=document, headers={"If-Match": client.get(url, headers=raw).headers["ETag"]}).status_code
        == 204
    )
    assert client.put(url, json=document, headers={"If-Match": first.headers["ETag"]}).status_code == 412
    as_set = client.get(f"{url}&layer=set").headers["ETag"]
    assert client.put(url, json={"access": [FULL, FULL]}, headers={"If-Match": as_set}).status_code == 204
    # Equal content has an equal tag at any time.
    assert client.get(url).headers["ETag"] == first.headers["ETag"]


def test_match_is_demanded(make_vm: Callable[..., str], client: ContractClient) -> None:
    vm = make_vm(require_match=True)
    url = f"{vm}/subpages?gfn=4"
    assert client.put(url, json={"access": [1]}).status_code == 428
    assert (
        client.put(url, json={"access": [1]}, headers={"If-Match": client.get(url).headers["ETag"]}).status_code == 204
    )
    ranges = {"ranges": [{"gfn": 4, "access": 3}]}
    assert client.patch(f"{vm}/subpages", json=ranges).status_code == 428
    tag = client.get(vm).headers["ETag"]
    assert client.patch(f"{vm}/subpages", json=ranges, headers={"If-Match": tag}).status_code == 204
    assert client.patch(f"{vm}/subpages", json=ranges, headers={"If-Match": tag}).status_code == 412
    assert client.put(f"{vm}/spp", json={"active": True}).status_code == 428
    assert client.put(f"{vm}/memory-slots/1", json={"gpa": "0x10000000", "size": 4096}).status_code == 428
    assert client.delete(f"{vm}/memory-slots/0").status_code == 428
    assert client.delete(vm).status_code == 428


def test_unknown_vm(client: ContractClient) -> None:
    for reply in (
        client.get("/v1/vms/vm_0/subpages?gfn=0"),
        client.put("/v1/vms/vm_0/subpages?gfn=0", json={"access": [0]}),
        client.patch("/v1/vms/vm_0/subpages", json={"ranges": [{"gfn": 0, "access": 0}]}),
        client.get("/v1/vms/vm_0/spp"),
        client.get("/v1/vms/vm_0/memory?gpa=0&size=1"),
        client.get("/v1/vms/vm_0/memory-slots"),
    ):
        assert reply.status_code == 404 and reply.json()["field"] == "vm" and reply.json()["value"] == "vm_0"
