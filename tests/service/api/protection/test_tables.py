"""Raw table entries over HTTP. The printed vectors, which are built with them, are in ``test_vectors``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.contract.client import ContractClient

PAGE = 0x801000
FAR = 0x80_0080_1000  # reached by the second PML4E
SPP = 1 << 61
ALL = 0x5555_5555_5555_5555
ONES = "0xffffffffffffffff"


def put(client: ContractClient, vm: str, structure: str, level: int, gpa: int, raw: int) -> dict[str, Any]:
    reply = client.put(f"{vm}/{structure}/{level}/{gpa:#x}", json={"raw": hex(raw)})
    assert reply.status_code == 200, reply.text
    found: dict[str, Any] = reply.json()
    assert found["raw"] == hex(raw)
    return found


def get(client: ContractClient, vm: str, structure: str, level: int, gpa: int) -> dict[str, Any]:
    reply = client.get(f"{vm}/{structure}/{level}/{gpa:#x}")
    assert reply.status_code == 200, reply.text
    found: dict[str, Any] = reply.json()
    return found


def frame(client: ContractClient, vm: str) -> int:
    reply = client.post(f"{vm}/table-frames")
    assert reply.status_code == 201, reply.text
    return int(reply.json()["address"], 16)


def build(client: ContractClient, vm: str, gpa: int) -> None:
    """Tables of our own for ``gpa``: a page that may be written, and an SPPT path to an empty vector."""
    for level in (4, 3, 2):
        put(client, vm, "ept", level, gpa, frame(client, vm) | 7)
        put(client, vm, "sppt", level, gpa, frame(client, vm) | 1)
    put(client, vm, "ept", 1, gpa, gpa | 0x37)


@pytest.mark.parametrize("structure", ["ept", "sppt"])
@pytest.mark.parametrize("level", [1, 2, 3, 4])
def test_what_is_stored_is_read_back(narrow: str, client: ContractClient, structure: str, level: int) -> None:
    build(client, narrow, PAGE)
    for raw in (0, (1 << 64) - 1, 0xAAAA_AAAA_AAAA_AAAA, 1 << 63 | 0x37):
        stored = put(client, narrow, structure, level, PAGE, raw)
        found = get(client, narrow, structure, level, PAGE)
        assert found == stored and found["raw"] == hex(raw) and found["level"] == level and not found["absent"]
    as_number = client.put(f"{narrow}/{structure}/{level}/{PAGE}", json={"raw": 7})
    assert as_number.json()["raw"] == "0x7"


def test_an_entry_of_kvms_own_tables(narrow: str, client: ContractClient) -> None:
    assert client.post(f"{narrow}/accesses", json={"gpa": hex(PAGE)}).json()["allowed"]
    leaf = get(client, narrow, "ept", 1, PAGE)
    assert leaf["structure"] == "PTE" and leaf["fields"]["write"] == "0x1" and leaf["fields"]["address"] == hex(PAGE)
    assert leaf == client.get(f"{narrow}/walk?gpa={PAGE:#x}").json()["ept"][-1]
    put(client, narrow, "ept", 1, PAGE, PAGE | 0x37 | 1 << 40)
    assert client.get(f"{narrow}/walk?gpa={PAGE:#x}").json()["outcome"] == "ept_misconfiguration"
    run = client.post(f"{narrow}/accesses", json={"gpa": hex(PAGE)}).json()
    assert not run["allowed"] and run["exits"][-1]["reason"] == 49 and run["resolution"] == "run-failed"
    assert run["run"]["errno"] == "EINVAL"


def test_a_table_outside_table_memory(narrow: str, client: ContractClient) -> None:
    build(client, narrow, PAGE)
    put(client, narrow, "ept", 2, PAGE, 0x7000_0007)
    put(client, narrow, "sppt", 2, PAGE, 0x7000_0001)
    for structure in ("ept", "sppt"):
        found = get(client, narrow, structure, 1, PAGE)
        assert found["absent"] and found["raw"] == ONES and found["table"] == "0x70000000"
        reply = client.put(f"{narrow}/{structure}/1/{PAGE:#x}", json={"raw": 0})
        assert reply.status_code == 422 and reply.json()["field"] == "level"
        assert get(client, narrow, structure, 1, PAGE) == found
    assert client.get(f"{narrow}/walk?gpa={PAGE:#x}").json()["outcome"] == "ept_misconfiguration"


@pytest.mark.parametrize(
    ("place", "name"),
    [
        ("ept/0/0x801000", "level"),
        ("ept/5/0x801000", "level"),
        ("ept/6/0x801000", "level"),
        ("ept/one/0x801000", "level"),
        ("sppt/5/0x801000", "level"),
        ("sppt/0/0x801000", "level"),
        ("ept/1/0x10000000000", "gpa"),
        ("sppt/1/0xffffffffffffffff", "gpa"),
        ("ept/1/0x10000000000000000", "gpa"),
        ("ept/1/-1", "gpa"),
        ("sppt/1/here", "gpa"),
        ("ept/3/0x8000000000", "level"),
        ("sppt/3/0x8000000000", "level"),
    ],
)
def test_refused(narrow: str, client: ContractClient, place: str, name: str) -> None:
    before = client.get(f"{narrow}/counters").json()
    for reply in (client.get(f"{narrow}/{place}"), client.put(f"{narrow}/{place}", json={"raw": "0x7"})):
        assert reply.status_code == 422, reply.text
        problem = reply.json()
        assert problem["field"] == name and problem["code"] == "invalid-value"
    assert client.get(f"{narrow}/counters").json() == before


@pytest.mark.parametrize(
    "document",
    [{}, {"raw": -1}, {"raw": "0x10000000000000000"}, {"raw": None}, {"raw": True}, {"raw": 1.5}, {"raw": "seven"}],
)
def test_bodies_refused(narrow: str, client: ContractClient, document: dict[str, Any]) -> None:
    for structure in ("ept", "sppt"):
        before = get(client, narrow, structure, 4, PAGE)
        reply = client.put(f"{narrow}/{structure}/4/{PAGE:#x}", json=document)
        assert reply.status_code == 422 and reply.json()["field"] == "raw"
        assert get(client, narrow, structure, 4, PAGE) == before


def test_unknown_members_and_machines(narrow: str, client: ContractClient) -> None:
    reply = client.put(f"{narrow}/ept/4/0", json={"raw": 0, "flush": True})
    assert reply.status_code == 422 and reply.json()["field"] == "flush"
    assert (
        client.put(f"{narrow}/ept/4/0", content=b"{", headers={"Content-Type": "application/json"}).status_code == 400
    )
    assert client.get("/v1/vms/vm_none/ept/4/0").status_code == 404
    assert client.put("/v1/vms/vm_none/sppt/4/0", json={"raw": 0}).status_code == 404
    assert client.post("/v1/vms/vm_none/table-frames").status_code == 404


@pytest.mark.parametrize("structure", ["ept", "sppt"])
def test_conditional(make_vm: Callable[..., str], client: ContractClient, structure: str) -> None:
    vm = make_vm(require_match=True)
    url = f"{vm}/{structure}/4/0"
    seen = client.get(url)
    assert client.get(url, headers={"If-None-Match": seen.headers["ETag"]}).status_code == 304
    assert client.put(url, json={"raw": 7}).status_code == 428
    assert client.put(url, json={"raw": 7}, headers={"If-Match": '"other"'}).status_code == 412
    assert client.get(url).json() == seen.json()
    stored = client.put(url, json={"raw": 7}, headers={"If-Match": seen.headers["ETag"]})
    assert stored.status_code == 200 and stored.headers["ETag"] == client.get(url).headers["ETag"]
    assert client.put(url, json={"raw": 1}, headers={"If-Match": seen.headers["ETag"]}).status_code == 412


def test_table_frames(narrow: str, client: ContractClient) -> None:
    made = [frame(client, narrow) for _ in range(3)]
    assert len(set(made)) == 3 and all(address % 4096 == 0 for address in made)
    assert client.get(f"{narrow}/counters").json()["counters"]["frames_client"] == 3


def test_before_spp_is_enabled(make_vm: Callable[..., str], client: ContractClient) -> None:
    vm = make_vm(spp=False)
    assert get(client, vm, "sppt", 4, 0)["absent"]
    assert client.put(f"{vm}/sppt/4/0", json={"raw": 1}).status_code == 422


def test_five_levels(make_vm: Callable[..., str], client: ContractClient) -> None:
    vm = make_vm(maxphyaddr=52)
    wide = 3 << 48 | PAGE
    for level in (5, 4, 3, 2):
        put(client, vm, "ept", level, wide, frame(client, vm) | 7)
    put(client, vm, "ept", 1, wide, wide | 0x37)
    told = client.get(f"{vm}/walk?gpa={wide:#x}").json()
    assert told["outcome"] == "allowed" and [entry["level"] for entry in told["ept"]] == [5, 4, 3, 2, 1]
    assert told["ept"][0]["index"] == 3
    put(client, vm, "ept", 5, wide, int(told["ept"][0]["raw"], 16) | 0x80)
    told = client.get(f"{vm}/walk?gpa={wide:#x}").json()
    assert told["outcome"] == "ept_misconfiguration" and told["ept"][-1]["fields"]["reserved"] == "0x80"


@pytest.mark.parametrize(
    ("query", "leaf", "qualification"),
    [
        ("", 0x35, "0x1aa"),
        ("&kind=data&linear=valid", 0x35, "0x1aa"),
        ("&kind=0&linear=1", 0x35, "0x1aa"),
        ("&linear=0", 0x35, "0x2a"),
        ("&kind=read-modify-write", 0x35, "0x1aa"),
        ("&kind=paging-update", 0x35, "0xab"),
        ("&kind=paging-read&linear=0", 0x34, "0x21"),
        ("&kind=shadow-stack", 0x35, "0x21aa"),
        ("&kind=3", 0x37, None),
    ],
)
def test_kinds(narrow: str, client: ContractClient, query: str, leaf: int, qualification: str | None) -> None:
    build(client, narrow, PAGE)
    put(client, narrow, "ept", 1, PAGE, PAGE | leaf)
    told = client.get(f"{narrow}/walk?gpa={PAGE:#x}{query}").json()
    assert told["qualification"] == qualification and told["sentence"]


def test_the_linear_page_is_told_where_the_host_can(make_vm: Callable[..., str], client: ContractClient) -> None:
    """Advanced VM-exit information: user, writable, execute-disable in bits 9 to 11 (vectors N01, N03, N04)."""
    capability = client.get(make_vm()).json()["host"]["vmx_capabilities"].get("ept_vpid_cap", "0x0")
    vm = make_vm(maxphyaddr=40, host={"vmx_capabilities": {"ept_vpid_cap": int(capability, 16) | 0x00734141 | 1 << 22}})
    build(client, vm, PAGE)
    for linear, leaf, access, qualification in (
        ("valid,user,writable", PAGE | 0x35, "write", "0x7aa"),
        ("valid,writable,execute-disable", PAGE | 0x35, "write", "0xdaa"),
        ("valid,user,execute-disable", 0, "read", "0xb81"),
    ):
        put(client, vm, "ept", 1, PAGE, leaf)
        told = client.get(f"{vm}/walk?gpa={PAGE:#x}&access={access}&linear={linear}").json()
        assert told["qualification"] == qualification


@pytest.mark.parametrize(
    ("query", "name"),
    [
        ("kind=fetch", "kind"),
        ("kind=5", "kind"),
        ("kind=shadow-stack&access=execute", "kind"),
        ("linear=16", "linear"),
        ("linear=kernel", "linear"),
        ("linear=user,user", "linear"),
        ("linear=", "linear"),
    ],
)
def test_kinds_refused(narrow: str, client: ContractClient, query: str, name: str) -> None:
    reply = client.get(f"{narrow}/walk?gpa=0&{query}")
    assert reply.status_code == 422 and reply.json()["field"] == name
