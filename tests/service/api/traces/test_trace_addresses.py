"""Traces by linear addresses over HTTP: `address=gva` through the guest's page tables, `flat` without a guest."""

from __future__ import annotations

import json
import struct
from typing import Any

import pytest

from tests.contract.client import ContractClient
from tests.support.guest_pages import MODES, GuestPages, K, M
from tests.support.http import done

AT = 0xFFFF_FFFF_8100_0000
OCTETS = {"Content-Type": "application/octet-stream"}
NDJSON = {"Content-Type": "application/x-ndjson"}


@pytest.fixture
def guest(vm: str, client: ContractClient) -> str:
    """Two pages whose frames are no neighbours, under a new vCPU's CR3 of 0; an object over both."""
    pages = GuestPages(MODES["4-level"], 0)
    for position, gpa in enumerate((2 * M, 1 * M)):
        pages.map(AT + position * 4 * K, gpa)
    pages.store(lambda gpa, data: check(client.put(f"{vm}/memory?gpa={gpa}", content=data, headers=OCTETS), 204))
    table = {"name": "table", "gva": hex(AT + 0xF80), "size": 256}
    check(client.post(f"{vm}/protections", json={"name": "p", "objects": [table]}), 201)
    return vm


def check(reply: Any, status: int) -> None:
    assert reply.status_code == status, reply.text


def lines(*rows: dict[str, Any]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def test_a_record_over_two_frames_is_told_whole(guest: str, client: ContractClient) -> None:
    body = lines({"gva": hex(AT)}, {"gva": hex(AT + 0xFFC)}, {"gva": "0x1000"}, {"gva": hex(AT + 0x1FFC)})
    result = done(client.post(f"{guest}/traces?address=gva", content=body, headers=NDJSON))
    assert (result["records"], result["violations"], result["untranslated"]) == (2, 1, 2)
    assert result["untranslated_records"] == [
        {"index": 2, "gva": "0x1000", "level": 4},
        {"index": 3, "gva": hex(AT + 0x2000), "level": 1},
    ]
    (record,) = result["exit_records"]
    assert (record["index"], record["gpa"], record["gva"]) == (1, hex(2 * M + 0xFFC), hex(AT + 0xFFC))
    assert (record["objects"], record["subpages"], record["denied"]) == (["table"], "0x80000000", "0x80000000")
    assert result["by_object"]["table"] == {"violations": 1, "collateral": 0, "first_index": 1, "subpages": 2}
    assert client.get(f"{guest}/traces/{result['id']}").json() == result
    assert client.get(f"{guest}/traces").json()["traces"][0]["untranslated"] == 2


def test_packed_records_have_the_address_in_the_place_of_the_gpa(guest: str, client: ContractClient) -> None:
    body = struct.pack("<3Q", AT + 0xF80, AT + 0x1000, AT)
    result = done(client.post(f"{guest}/traces?address=gva&record=gpa8", content=body, headers=OCTETS))
    assert [(r["gpa"], r["gva"]) for r in result["exit_records"]] == [
        (hex(2 * M + 0xF80), hex(AT + 0xF80)),
        (hex(1 * M), hex(AT + 0x1000)),
    ]


def test_flat_and_gpa(guest: str, client: ContractClient) -> None:
    body = lines({"gva": hex(M)})
    flat = done(client.post(f"{guest}/traces?address=flat", content=body, headers=NDJSON))
    assert flat["exit_records"][0]["gpa"] == flat["exit_records"][0]["gva"] == hex(M)
    reply = client.post(f"{guest}/traces", content=body, headers=NDJSON)
    assert (reply.status_code, reply.json()["field"]) == (422, "gpa") and "address=gva" in reply.json()["detail"]


def test_an_address_space_needs_no_translation_cache(guest: str, client: ContractClient) -> None:
    other = GuestPages(MODES["4-level"], 16 * K * 4)
    other.map(AT, 1 * M)
    other.store(lambda gpa, data: check(client.put(f"{guest}/memory?gpa={gpa}", content=data, headers=OCTETS), 204))
    body = lines({"gva": hex(AT), "address_space": hex(64 * K)}, {"gva": hex(AT), "address_space": None})
    result = done(client.post(f"{guest}/traces?address=gva", content=body, headers=NDJSON))
    assert (result["records"], [r["gpa"] for r in result["exit_records"]]) == (2, [hex(M)])
    refused = lines({"gva": hex(AT), "address_space": hex(1 << 62)})
    reply = client.post(f"{guest}/traces?address=gva", content=refused, headers=NDJSON)
    assert (reply.status_code, reply.json()["field"]) == (422, "address_space")


def test_a_job_may_translate_too(guest: str, client: ContractClient) -> None:
    headers = {**NDJSON, "Prefer": "respond-async"}
    reply = client.post(f"{guest}/traces?address=gva", content=lines({"gva": hex(AT + 0xFFC)}), headers=headers)
    assert reply.status_code == 202, reply.text
