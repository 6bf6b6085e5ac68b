"""Protections over HTTP."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.contract.client import ContractClient

OBJECT = {"name": "table", "gpa": "0x2080", "size": 256}


def access(client: ContractClient, vm: str, gfn: int) -> str:
    found: str = client.get(f"{vm}/subpages?gfn={gfn}").json()["access"][0]
    return found


def test_create_read_delete(vm: str, client: ContractClient) -> None:
    created = client.post(f"{vm}/protections", json={"name": "kernel", "objects": [OBJECT]})
    assert created.status_code == 201 and created.headers["Location"] == f"{vm}/protections/kernel"
    assert created.json() == {"name": "kernel", "objects": [OBJECT], "pages": 1, "subpages": 2}
    assert access(client, vm, 2) == "0xfffffff9"
    read = client.get(created.headers["Location"])
    assert read.json() == created.json() and read.headers["ETag"] == created.headers["ETag"]
    assert client.get(read.url.path, headers={"If-None-Match": read.headers["ETag"]}).status_code == 304
    assert client.delete(read.url.path, headers={"If-Match": '"x"'}).status_code == 412
    assert client.delete(read.url.path, headers={"If-Match": read.headers["ETag"]}).status_code == 204
    assert access(client, vm, 2) == "0xffffffff"
    assert client.get(read.url.path).status_code == client.delete(read.url.path).status_code == 404


def test_rounded_outward_and_counted(vm: str, client: ContractClient) -> None:
    one = {"name": "a", "objects": [{"name": "byte", "gpa": 0x20FF, "size": 2}]}
    two = {"name": "b", "objects": [{"name": "byte", "gpa": 0x2100, "size": 1}]}
    assert client.post(f"{vm}/protections", json=one).json()["subpages"] == 2
    client.post(f"{vm}/protections", json=two)
    assert access(client, vm, 2) == "0xfffffff9"
    client.delete(f"{vm}/protections/a")
    assert access(client, vm, 2) == "0xfffffffb"
    client.put(f"{vm}/subpages?gfn=2", json={"access": ["0xffffffff"]})
    assert access(client, vm, 2) == "0xfffffffb"


def test_a_name_is_unique(vm: str, client: ContractClient) -> None:
    for status in (201, 409):
        reply = client.post(f"{vm}/protections", json={"name": "p", "objects": [OBJECT]})
        assert reply.status_code == status
    assert reply.json()["field"] == "name" and reply.json()["value"] == "p"


def test_list_in_pages(vm: str, client: ContractClient) -> None:
    for n in range(5):
        client.post(f"{vm}/protections", json={"name": f"p{n}", "objects": [OBJECT]})
    names: list[str] = []
    url = f"{vm}/protections?limit=2"
    while url:
        page = client.get(url).json()
        names += [item["name"] for item in page["protections"]]
        url = page["next"]
    assert names == [f"p{n}" for n in range(5)]


def test_many_objects(vm: str, client: ContractClient) -> None:
    objects = [{"name": f"o{n}", "gpa": n << 12, "size": 64} for n in range(500)]
    created = client.post(f"{vm}/protections", json={"name": "many", "objects": objects})
    assert created.json()["pages"] == 500 and created.json()["subpages"] == 500
    assert client.delete(created.headers["Location"]).status_code == 204
    assert access(client, vm, 499) == "0xffffffff"


@pytest.mark.parametrize(
    ("document", "field"),
    [
        ({"name": "", "objects": [OBJECT]}, "name"),
        ({"name": "a/b", "objects": [OBJECT]}, "name"),
        ({"name": "x" * 129, "objects": [OBJECT]}, "name"),
        ({"objects": [OBJECT]}, "name"),
        ({"name": "p", "objects": []}, "objects"),
        ({"name": "p"}, "objects"),
        ({"name": "p", "objects": [{**OBJECT, "size": 0}]}, "objects[0].size"),
        ({"name": "p", "objects": [OBJECT, {**OBJECT, "size": -1}]}, "objects[1].size"),
        ({"name": "p", "objects": [{**OBJECT, "name": ""}]}, "objects[0].name"),
        ({"name": "p", "objects": [{**OBJECT, "gva": 0}]}, "objects[0].gva"),
        ({"name": "p", "objects": [OBJECT, {**OBJECT, "gpa": "0x1000000"}]}, "objects[1].gpa"),
        ({"name": "p", "objects": [{**OBJECT, "gpa": "0xffffffffffffffff"}]}, "objects[0].gpa"),
        ({"name": "p", "objects": [{**OBJECT, "gpa": "0xffff80", "size": 129}]}, "objects[0].gpa"),
    ],
)
def test_refused(vm: str, client: ContractClient, document: dict[str, Any], field: str) -> None:
    reply = client.post(f"{vm}/protections", json=document)
    assert reply.status_code == 422, reply.text
    assert reply.json()["field"] == field
    assert client.get(f"{vm}/protections").json()["protections"] == []
    assert access(client, vm, 2) == "0xffffffff"


def test_match_is_demanded(make_vm: Callable[..., str], client: ContractClient) -> None:
    vm = make_vm(require_match=True)
    created = client.post(f"{vm}/protections", json={"name": "p", "objects": [OBJECT]})
    assert created.status_code == 201
    assert client.delete(created.headers["Location"]).status_code == 428
    assert client.delete(created.headers["Location"], headers={"If-Match": "*"}).status_code == 204
