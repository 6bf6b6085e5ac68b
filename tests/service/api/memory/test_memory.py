"""Memory slots and guest memory over HTTP."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from service.settings import MIB, Settings
from tests.contract.client import ContractClient
from tests.support.http import OCTETS
from tests.support.server import running


def test_create_move_delete(vm: str, client: ContractClient) -> None:
    url = f"{vm}/memory-slots/3"
    created = client.put(url, json={"gpa": "0x10000000", "size": MIB})
    assert created.status_code == 201 and created.headers["Location"] == url
    assert created.json() == {
        "slot": 3,
        "gpa": "0x10000000",
        "size": "0x100000",
        "read_only": False,
        "host_page_size": 4096,
        "address_space": 0,
        "log_dirty": False,
        "userspace_addr": "0x0",
        "backing": None,
    }
    assert client.get(url).headers["ETag"] == created.headers["ETag"]
    assert client.get(url, headers={"If-None-Match": created.headers["ETag"]}).status_code == 304
    moved = client.put(url, json={"gpa": "0x20000000", "size": MIB})
    assert moved.status_code == 200 and moved.json()["gpa"] == "0x20000000"
    assert [slot["slot"] for slot in client.get(f"{vm}/memory-slots").json()["memory_slots"]] == [0, 3]
    assert client.get(vm).json()["memory_slots"][1] == moved.json()
    assert client.delete(url).status_code == 204
    for method in (client.get, client.delete):
        assert method(url).status_code == 404


def test_unchanged_is_no_error(vm: str, client: ContractClient) -> None:
    document = {"gpa": 0, "size": 16 * MIB}
    assert client.put(f"{vm}/memory-slots/0", json=document).status_code == 200


@pytest.mark.parametrize(
    ("slot", "document", "field"),
    [
        ("1", {"gpa": 0, "size": 4096}, "gpa"),
        ("1", {"gpa": "0x10000800", "size": 4096}, "gpa"),
        ("1", {"gpa": "0x10000000", "size": 4097}, "size"),
        ("1", {"gpa": "0x10000000", "size": 0}, "size"),
        ("1", {"gpa": "0x400000000000", "size": 4096}, "gpa"),
        ("1", {"gpa": "0xffffffffffffffff", "size": 4096}, "gpa"),
        ("1", {"gpa": "0x1ffffffffffffffff", "size": 4096}, "gpa"),
        ("1", {"gpa": -4096, "size": 4096}, "gpa"),
        ("1", {"gpa": 4096.0, "size": 4096}, "gpa"),
        ("1", {"gpa": True, "size": 4096}, "gpa"),
        ("1", {"gpa": "4k", "size": 4096}, "gpa"),
        ("1", {"gpa": "0x10000000", "size": 4096, "host_page_size": 123}, "host_page_size"),
        ("1", {"gpa": "0x10000000", "size": 4096, "flags": 2}, "flags"),
        ("1", {"gpa": "0x10000000"}, "size"),
        ("0", {"gpa": 0, "size": 8 * MIB}, "size"),
        ("509", {"gpa": "0x10000000", "size": 4096}, "slot"),
        ("-1", {"gpa": "0x10000000", "size": 4096}, "slot"),
        ("one", {"gpa": "0x10000000", "size": 4096}, "slot"),
    ],
)
def test_refused_slots(vm: str, client: ContractClient, slot: str, document: dict[str, Any], field: str) -> None:
    before = client.get(vm).json()
    reply = client.put(f"{vm}/memory-slots/{slot}", json=document)
    assert reply.status_code == 422, reply.text
    assert reply.json()["field"] == field and reply.json()["rule"]
    assert client.get(vm).json() == before


def test_slot_tags(vm: str, client: ContractClient) -> None:
    url = f"{vm}/memory-slots/1"
    document = {"gpa": "0x10000000", "size": MIB}
    created = client.put(url, json=document, headers={"If-None-Match": "*"})
    assert created.status_code == 201
    assert client.put(url, json=document, headers={"If-None-Match": "*"}).status_code == 412
    assert client.put(url, json=document, headers={"If-Match": '"other"'}).status_code == 412
    assert client.delete(url, headers={"If-Match": '"other"'}).status_code == 412
    assert client.put(url, json=document, headers={"If-Match": "*"}).status_code == 200
    assert client.delete(url, headers={"If-Match": created.headers["ETag"]}).status_code == 204
    assert client.put(url, json=document, headers={"If-Match": "*"}).status_code == 412


def test_memory_is_zero_until_written(vm: str, client: ContractClient) -> None:
    assert client.get(f"{vm}/memory?gpa=0x1000&size=16").content == bytes(16)
    reply = client.put(f"{vm}/memory?gpa=0xffe", content=b"\1\2\3\4", headers=OCTETS)
    assert reply.status_code == 204
    read = client.get(f"{vm}/memory?gpa=0xffe&size=0x4")
    assert read.content == b"\1\2\3\4" and read.headers["content-type"] == "application/octet-stream"
    assert read.headers["ETag"] == reply.headers["ETag"]
    unchanged = client.get(f"{vm}/memory?gpa=0xffe&size=4", headers={"If-None-Match": read.headers["ETag"]})
    assert unchanged.status_code == 304 and not unchanged.content


def test_a_big_window(vm: str, client: ContractClient) -> None:
    content = bytes(range(256)) * 4096
    assert client.put(f"{vm}/memory?gpa=0x123&size={len(content)}", content=content, headers=OCTETS).status_code == 204
    assert client.get(f"{vm}/memory?gpa=0x123&size={len(content)}").content == content


@pytest.mark.parametrize(
    ("query", "field"),
    [
        ("gpa=0x1000000&size=1", "gpa"),
        ("gpa=0xffffff&size=2", "gpa"),
        ("gpa=0&size=0", "size"),
        ("gpa=0&size=0x10000000", "size"),
        ("gpa=zero&size=1", "gpa"),
        ("gpa=0", "size"),
        ("gpa=0&size=1&sise=2", "sise"),
        ("gpa=0&gpa=1&size=1", "gpa"),
    ],
)
def test_refused_reads(vm: str, client: ContractClient, query: str, field: str) -> None:
    reply = client.get(f"{vm}/memory?{query}")
    assert reply.status_code == 422 and reply.json()["field"] == field


@pytest.mark.parametrize(
    ("query", "content", "field"),
    [
        ("gpa=0x1000000", b"1", "gpa"),
        ("gpa=0xffffff", b"12", "gpa"),
        ("gpa=0", b"", "body"),
        ("gpa=0&size=3", b"12", "size"),
    ],
)
def test_refused_writes(vm: str, client: ContractClient, query: str, content: bytes, field: str) -> None:
    reply = client.put(f"{vm}/memory?{query}", content=content, headers=OCTETS)
    assert reply.status_code == 422 and reply.json()["field"] == field
    assert client.get(f"{vm}/memory?gpa=0xfffff0&size=16").content == bytes(16)


def test_memory_tags(make_vm: Callable[..., str], client: ContractClient) -> None:
    vm = make_vm(require_match=True)
    url = f"{vm}/memory?gpa=0x1000&size=4"
    assert client.put(url, content=b"1234", headers=OCTETS).status_code == 428
    tag = client.get(url).headers["ETag"]
    assert client.put(url, content=b"1234", headers={**OCTETS, "If-Match": '"x"'}).status_code == 412
    assert client.put(url, content=b"1234", headers={**OCTETS, "If-Match": tag}).status_code == 204
    assert client.put(url, content=b"5678", headers={**OCTETS, "If-Match": tag}).status_code == 412


def test_memory_has_a_limit() -> None:
    with running(Settings(warm_up=False, max_memory_window=4096)) as service:
        client = service.client
        vm = client.post("/v1/vms", json={"memory_slots": [{"slot": 0, "gpa": 0, "size": MIB}]}).headers["Location"]
        assert client.put(f"{vm}/memory?gpa=0", content=bytes(4096), headers=OCTETS).status_code == 204
        assert client.put(f"{vm}/memory?gpa=0", content=bytes(4097), headers=OCTETS).status_code == 413
        assert client.get(f"{vm}/memory?gpa=0&size=4097").status_code == 422


def test_memory_goes_with_its_slot(vm: str, client: ContractClient) -> None:
    client.put(f"{vm}/memory?gpa=0", content=b"secret", headers=OCTETS)
    client.delete(f"{vm}/memory-slots/0")
    client.put(f"{vm}/memory-slots/0", json={"gpa": 0, "size": 16 * MIB})
    assert client.get(f"{vm}/memory?gpa=0&size=6").content == bytes(6)
