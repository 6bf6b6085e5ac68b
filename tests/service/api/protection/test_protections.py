"""Protections over HTTP."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from tests.contract.client import ContractClient
from tests.support import recorded
from tests.support.guest_pages import MODES, GuestPages, K, M

OBJECT = {"name": "table", "gpa": "0x2080", "size": 256}
NOTES = {"granularity": "subpage", "gva": None, "about": None, "vcpu": None, "cr3": None, "pieces": None}
SHOWN = {**OBJECT, **NOTES}


def access(client: ContractClient, vm: str, gfn: int) -> str:
    found: str = client.get(f"{vm}/subpages?gfn={gfn}").json()["access"][0]
    return found


def test_create_read_delete(vm: str, client: ContractClient) -> None:
    created = client.post(f"{vm}/protections", json={"name": "kernel", "objects": [OBJECT]})
    assert created.status_code == 201 and created.headers["Location"] == f"{vm}/protections/kernel"
    counts = {"pages": 1, "subpages": 2, "page_ranges": []}
    assert created.json() == {"name": "kernel", "about": None, "objects": [SHOWN], **counts}
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
        ({"name": "p", "objects": [{**OBJECT, "gva": "x"}]}, "objects[0].gva"),
        ({"name": "p", "objects": [{**OBJECT, "pva": 0}]}, "objects[0].pva"),
        ({"name": "p", "objects": [{"name": "o", "size": 1}]}, "objects[0].gpa"),
        ({"name": "p", "objects": [{"name": "o", "gva": "", "size": 1}]}, "objects[0].gpa"),
        ({"name": "p", "objects": [{**OBJECT, "granularity": "byte"}]}, "objects[0].granularity"),
        ({"name": "p", "objects": [OBJECT], "subpage_bytes": 64}, "subpage_bytes"),
        ({"name": "p", "objects": [OBJECT], "about": 5}, "about"),
        ({"name": "p", "pages": []}, "objects"),
        ({"name": "p", "pages": [[2, 1]]}, "pages[0][2]"),
        ({"name": "p", "pages": [[2, 1, 0], [2, 1, 1 << 32]]}, "pages[1][2]"),
        ({"name": "p", "pages": [[2, 0, 0]]}, "pages[0][1]"),
        ({"name": "p", "pages": [["0x900000", 1, 0]]}, "pages[0][0]"),
        ({"name": "p", "pages": [[2, 1, 0]] * 65537}, "pages"),
        ({"name": "p", "objects": [OBJECT, {**OBJECT, "name": "b", "gpa": "0x1000000"}]}, "objects[1].gpa"),
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


def test_all_that_a_policy_says_comes_back(vm: str, client: ContractClient) -> None:
    noted = {**OBJECT, "gva": "0xffffffff82000080", "about": "why"}
    whole = {"name": "whole", "gpa": "0x4ff0", "size": 32, "granularity": "page"}
    empty = {"name": "empty", "gpa": "0x6000", "size": 1, "gva": ""}
    policy = {"name": "p", "about": "a note", "subpage_bytes": 128, "objects": [noted, whole, empty]}
    created = client.post(f"{vm}/protections", json={**policy, "pages": [[8, "0x2", "0xfffffff0"], ["0x2", 1, 1]]})
    assert created.status_code == 201, created.text
    found = created.json()
    assert found["about"] == "a note" and found["page_ranges"] == [["0x8", 2, "0xfffffff0"], ["0x2", 1, "0x1"]]
    assert found["objects"] == [
        {**SHOWN, **noted},
        {**SHOWN, **whole},
        {**SHOWN, **empty, "gva": None},
    ]
    assert (found["pages"], found["subpages"]) == (6, 31 + 64 + 1 + 8)
    assert [access(client, vm, gfn) for gfn in (2, 4, 5, 6, 8, 9)] == [
        "0x1", "0x0", "0x0", "0xfffffffe", "0xfffffff0", "0xfffffff0"
    ]  # fmt: skip
    assert client.get(f"{vm}/subpages?gfn=8&layer=set").json()["access"] == ["0xffffffff"], "nothing is SET"
    assert client.get(created.headers["Location"]).json() == found
    client.delete(created.headers["Location"])
    assert access(client, vm, 8) == access(client, vm, 4) == "0xffffffff"


def test_what_comes_back_is_a_policy_again(vm: str, client: ContractClient) -> None:
    policy = {"name": "p", "objects": [{**OBJECT, "gva": 1 << 63}], "pages": [[8, 2, 0]]}
    shown = client.post(f"{vm}/protections", json=policy).json()
    again = {"name": "q", "about": shown["about"], "objects": shown["objects"], "pages": shown["page_ranges"]}
    assert {**client.post(f"{vm}/protections", json=again).json(), "name": "p"} == shown


def test_a_symbol_is_refused_where_there_are_none(vm: str, client: ContractClient) -> None:
    item = {"symbol": "modprobe_path"}
    reply = client.post(f"{vm}/protections", json={"name": "p", "objects": [OBJECT, item]})
    problem = reply.json()
    assert reply.status_code == 422 and problem["field"] == "objects[1].symbol"
    assert "POST them to `…/symbols`" in problem["detail"]


def test_one_name_twice_is_refused_with_both_places(vm: str, client: ContractClient) -> None:
    objects = [OBJECT, {**OBJECT, "name": "b"}, {**OBJECT, "name": "c"}, {**OBJECT, "gpa": "0x3000"}]
    reply = client.post(f"{vm}/protections", json={"name": "p", "objects": objects})
    assert reply.status_code == 422 and reply.json()["field"] == "objects[3].name"
    assert "objects[0] and objects[3]" in reply.json()["detail"] and reply.json()["value"] == "table"
    assert client.get(f"{vm}/protections").json()["protections"] == []


@pytest.mark.parametrize("profile", ["kvm-2019", "kvm-latest"])
@pytest.mark.parametrize("host", [{}, {"spp": False}, {"vendor": "amd"}, {"ept": False}])
def test_whole_pages_without_spp(
    make_vm: Callable[..., str], client: ContractClient, profile: str, host: dict[str, Any]
) -> None:
    vm = make_vm(spp=False, profile=profile, host=host)
    whole = {"name": "table", "gpa": "0x2010", "size": 64, "granularity": "page"}
    made = client.post(f"{vm}/protections", json={"name": "p", "objects": [whole], "pages": [["0x9", 2, 0]]})
    assert made.status_code == 201 and (made.json()["pages"], made.json()["subpages"]) == (3, 96)
    rows = [{"gpa": gpa, "size": 8} for gpa in (0x2010, 0x2FF8, 0xA000, 0x8000)]
    result = client.post(f"{vm}/traces", json={"accesses": rows}).json()
    assert result["violations"] == result["page_granular_violations"] == 3
    hits = result["by_object"]["table"]
    assert (hits["violations"], hits["collateral"], hits["subpages"]) == (2, 1, 32)
    client.delete(f"{vm}/protections/p")
    assert client.post(f"{vm}/traces", json={"accesses": rows}).json()["violations"] == 0


def test_pages_in_part_need_spp(make_vm: Callable[..., str], client: ContractClient) -> None:
    vm = make_vm(spp=False)
    whole = {**OBJECT, "granularity": "page"}
    for body, place in (
        ({"objects": [whole, {**OBJECT, "name": "part"}]}, "objects[1]"),
        ({"pages": [["0x9", 2, 0], ["0x9", 1, "0xfffffffe"]]}, "pages[1]"),
    ):
        problem = client.post(f"{vm}/protections", json={"name": "p", **body}).json()
        assert (problem["status"], problem["code"]) == (409, "spp-not-enabled")
        assert place in problem["detail"] and "PUT …/spp" in problem["detail"]
        assert client.get(f"{vm}/protections").json()["protections"] == []


@pytest.mark.parametrize("name", ["kernel_control_data", "kernel_text_and_data", "hot_pages_stress"])
def test_the_recorded_policies_are_taken_as_they_are(
    make_vm: Callable[..., str], client: ContractClient, name: str
) -> None:
    vm = make_vm(memory_slots=[{"slot": 0, "gpa": 0, "size": 1 << 30}])
    content = recorded.policy(name).read_bytes()
    policy = json.loads(content)
    headers = {"Content-Type": "application/json"}
    found = client.post(f"{vm}/protections", content=content, headers=headers).json()
    assert found["name"] == name and found["about"] == policy["about"]
    assert [[int(gfn, 16), count, int(access, 16)] for gfn, count, access in found["page_ranges"]] == policy["pages"]
    assert [item["gva"] for item in found["objects"]] == [item["gva"] or None for item in policy["objects"]]
    objects = [{key: item[key] for key in ("name", "gpa", "size")} for item in policy["objects"]]
    alone = client.post(f"{vm}/protections", json={"name": "alone", "objects": objects}).json()
    assert (alone["pages"], alone["subpages"]) == (found["pages"], found["subpages"]), "both lists say the same"


# ---- by linear address. A new vCPU has four-level paging and CR3 0.

AT = 0xFFFF_FFFF_8100_0000
VIRTUAL = {"name": "table", "gva": hex(AT + 0xF80), "size": 256}


def tables(client: ContractClient, vm: str, *pages: int) -> GuestPages:
    """Page tables that map pages from AT on."""
    made = GuestPages(MODES["4-level"], 0)
    for position, gpa in enumerate(pages):
        made.map(AT + position * 4 * K, gpa)

    def write(gpa: int, data: bytes) -> None:
        reply = client.put(f"{vm}/memory?gpa={gpa}", content=data, headers={"Content-Type": "application/octet-stream"})
        assert reply.status_code == 204, reply.text

    made.store(write)
    return made


def test_an_object_by_gva_keeps_both_addresses(vm: str, client: ContractClient) -> None:
    tables(client, vm, 2 * M, 1 * M)
    created = client.post(f"{vm}/protections", json={"name": "p", "objects": [VIRTUAL]})
    assert created.status_code == 201, created.text
    pieces = [
        {"gpa": hex(2 * M + 0xF80), "gva": hex(AT + 0xF80), "size": 128},
        {"gpa": hex(1 * M), "gva": hex(AT + 0x1000), "size": 128},
    ]
    shown = {**VIRTUAL, "gpa": hex(2 * M + 0xF80), "vcpu": 0, "pieces": pieces}
    assert created.json()["objects"] == [{**NOTES, **shown}]
    assert client.get(f"{vm}/protections/p").json() == created.json()
    assert [access(client, vm, gfn) for gfn in (512, 256)] == ["0x7fffffff", "0xfffffffe"]
    again = {"name": "q", "objects": created.json()["objects"]}
    assert client.post(f"{vm}/protections", json=again).json()["objects"] == created.json()["objects"]


def test_retranslate_says_what_moved(vm: str, client: ContractClient) -> None:
    tables(client, vm, 2 * M, 1 * M)
    client.post(f"{vm}/protections", json={"name": "p", "objects": [VIRTUAL]})
    tables(client, vm, 2 * M, 3 * M)
    reply = client.post(f"{vm}/protections/p:retranslate")
    assert reply.status_code == 200, reply.text
    run = {"object": "table", "gva": hex(AT + 0x1000), "old_gpa": hex(M), "new_gpa": hex(3 * M), "size": 128}
    assert (reply.json()["moved"], reply.json()["moved_total"]) == ([run], 1)
    now = client.get(f"{vm}/protections/p")
    assert reply.json()["protection"] == now.json() and reply.headers["ETag"] == now.headers["ETag"]
    assert [access(client, vm, gfn) for gfn in (512, 256, 768)] == ["0x7fffffff", "0xffffffff", "0xfffffffe"]
    assert client.post(f"{vm}/protections/x:retranslate").status_code == 404
    stale = client.post(f"{vm}/protections/p:retranslate", headers={"If-Match": '"x"'})
    assert stale.status_code == 412


@pytest.mark.parametrize(
    ("item", "field", "words"),
    [
        ({**VIRTUAL, "size": 0x2000}, "gva", "level 1"),
        ({**VIRTUAL, "vcpu": 9}, "vcpu", "vCPU"),
        ({**VIRTUAL, "cr3": 1 << 63}, "cr3", "CR3"),
        ({**OBJECT, "cr3": 0}, "cr3", "by gpa"),
    ],
)
def test_an_object_that_does_not_translate_is_refused(
    vm: str, client: ContractClient, item: Any, field: str, words: str
) -> None:
    tables(client, vm, 2 * M, 1 * M)
    reply = client.post(f"{vm}/protections", json={"name": "p", "objects": [item]})
    assert (reply.status_code, reply.json()["field"]) == (422, f"objects[0].{field}"), reply.text
    assert words in reply.json()["detail"]
    assert client.get(f"{vm}/protections").json()["protections"] == []


def test_walk_by_gva_begins_with_the_guests_tables(vm: str, client: ContractClient) -> None:
    made = tables(client, vm, 2 * M, 2 * M + 4 * K, 1 * M)
    client.post(f"{vm}/protections", json={"name": "p", "objects": [VIRTUAL]})
    walk = client.get(f"{vm}/walk?gva={AT + 0xF80:#x}&size=8").json()
    assert (walk["gva"], walk["gpa"]) == (hex(AT + 0xF80), hex(2 * M + 0xF80))
    assert [entry["structure"] for entry in walk["guest"]] == ["PML4E", "PDPTE", "PDE", "PTE"]
    leaf = walk["guest"][-1]
    slot = made.slot(AT, 1)
    assert (leaf["table"], leaf["index"], leaf["raw"]) == (hex(slot - slot % 4096), slot % 4096 // 8, hex(2 * M | 3))
    assert leaf["fields"]["address"] == hex(2 * M) and leaf["fields"]["user"] == "0x0"
    assert walk["then"]["resolution"] == "violation"
    last = walk["then"]["exits"][-1]
    assert (last["gpa"], last["gva"], last["objects"]) == (walk["gpa"], walk["gva"], ["table"])
    plain = client.get(f"{vm}/walk?gpa={2 * M}").json()
    assert (plain["gva"], plain["guest"]) == (None, [])
    assert client.get(f"{vm}/walk?gva={AT + 0xFFC:#x}").status_code == 200, "neighbours"


@pytest.mark.parametrize(
    ("query", "field", "words"),
    [
        (f"gva={AT + 0x3000:#x}", "gva", "level 1"),
        (f"gva={AT + 0x2FFC:#x}", "gva", hex(AT + 0x3000)),
        (f"gva={AT + 0x1FFC:#x}", "size", "neighbours"),
        (f"gva={1 << 60:#x}", "gva", "canonical"),
        (f"gva={(1 << 64) - 4:#x}", "gva", "64 bits"),
        (f"gva={AT:#x}&gpa=0", "gpa", "not both"),
        ("", "gpa", "given"),
        ("gpa=0&cr3=0", "cr3", "by gva"),
        (f"gva={AT:#x}&vcpu=7", "vcpu", "vCPU"),
    ],
)
def test_walk_by_gva_says_where_it_ends(vm: str, client: ContractClient, query: str, field: str, words: str) -> None:
    tables(client, vm, 2 * M, 2 * M + 4 * K, 1 * M)
    reply = client.get(f"{vm}/walk?{query}")
    assert (reply.status_code, reply.json()["field"]) == (422, field), reply.text
    assert words in reply.text
