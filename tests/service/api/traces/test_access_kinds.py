"""Accesses of every kind and by linear address over HTTP: single ones, and in traces of every format."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyarrow as pa
import pytest

from tests.contract.client import ContractClient
from tests.support import bodies
from tests.support.bodies import FORMATS
from tests.support.http import access, store

PAGE = 0x5000
# Guest tables for linear 0x40005000 and 0x40006000, whose pages are not neighbours.
PML4, PDPT, PD, PT = 0x10000, 0x11000, 0x12000, 0x13000
LINEAR = 0x4000_5000
FIRST, SECOND = 0x20000, 0x30000
SECONDARY_VE = 1 << 18
NAMED = sorted(FORMATS.keys() - {"packed"})


def load(client: ContractClient, vm: str, gpa: int, size: int = 8) -> bytes:
    content: bytes = client.get(f"{vm}/memory?gpa={gpa:#x}&size={size}").content
    return content


def vmcs(client: ContractClient, vm: str, **fields: Any) -> dict[str, int]:
    reply = client.put(f"{vm}/vcpus/0/vmcs", json=fields)
    assert reply.status_code == 200, reply.text
    return {name: int(value, 16) for name, value in reply.json().items()}


def leaf(client: ContractClient, vm: str, change: Callable[[int], int], gpa: int = PAGE) -> None:
    """Change the EPT leaf of a page that has one."""
    url = f"{vm}/ept/1/{gpa:#x}"
    raw = int(client.get(url).json()["raw"], 16)
    assert client.put(url, json={"raw": hex(change(raw))}).status_code == 200


def unmaintained(raw: int) -> int:
    """A leaf without write permission that KVM has no reason to give it back."""
    return raw & ~0x0C00_0000_0000_0000 & ~0xC02 | 1 << 61


@pytest.fixture
def guest(vm: str, client: ContractClient) -> str:
    """A VM whose first vCPU has 4-level paging with two pages."""
    for gpa, word in {
        PML4: PDPT | 3, PDPT + 8: PD | 3, PD: PT | 3, PT + 8 * 5: FIRST | 3, PT + 8 * 6: SECOND | 3
    }.items():  # fmt: skip
        store(client, vm, gpa, word.to_bytes(8, "little"))
    vmcs(client, vm, cr3=PML4)
    return vm


# ---- by guest-physical address


@pytest.mark.parametrize(
    ("members", "qualification"),
    [
        ({}, "0x1aa"),
        ({"kind": "read-modify-write"}, "0x1aa"),
        ({"kind": 3}, "0xab"),
        ({"kind": "paging-read"}, "0xab"),
        ({"kind": "paging-read", "access": "read", "linear": 1}, "0xab"),
        ({"linear": 0}, "0x2a"),
        ({"linear": "valid,user"}, "0x1aa"),
    ],
)
def test_a_violation_of_each_kind(vm: str, client: ContractClient, members: dict[str, Any], qualification: str) -> None:
    access(client, vm, gpa=PAGE)
    client.put(f"{vm}/subpages?gfn={PAGE >> 12}", json={"access": [0]})
    found = access(client, vm, gpa=PAGE, **members)
    assert not found["allowed"] and found["resolution"] == "violation"
    assert found["exits"][-1]["qualification"] == qualification and found["gpa"] == hex(PAGE)
    query = "&".join(f"{name}={value}" for name, value in members.items())
    told = client.get(f"{vm}/walk?gpa={PAGE:#x}&{query}").json()
    assert told["qualification"] == qualification and told["outcome"] == "ept_violation"


def test_a_paging_read_without_linear_address_is_a_read(vm: str, client: ContractClient) -> None:
    access(client, vm, gpa=PAGE)
    client.put(f"{vm}/subpages?gfn={PAGE >> 12}", json={"access": [0]})
    assert access(client, vm, gpa=PAGE, kind="paging-read", linear=0)["allowed"]


def test_a_grant_does_not_help_where_sub_page_permissions_never_apply(vm: str, client: ContractClient) -> None:
    access(client, vm, gpa=PAGE)
    client.put(f"{vm}/subpages?gfn={PAGE >> 12}", json={"access": [0]})
    found = access(client, vm, gpa=PAGE, kind="paging-update", on_violation="grant")
    assert not found["allowed"] and not found["landed"]
    assert [item["resolution"] for item in found["exits"]] == ["violation", "violation"]
    found = access(client, vm, gpa=PAGE, kind="paging-update", on_violation="grant")
    assert not found["allowed"] and [item["resolution"] for item in found["exits"]] == ["violation"]
    assert access(client, vm, gpa=PAGE)["allowed"]


# ---- in traces


@pytest.mark.parametrize("name", NAMED)
def test_kinds_in_a_trace(vm: str, client: ContractClient, name: str) -> None:
    access(client, vm, gpa=PAGE)
    client.put(f"{vm}/subpages?gfn={PAGE >> 12}", json={"access": [0]})
    trace = pa.table(
        {
            "gpa": pa.array([PAGE] * 7, pa.uint64()),
            "access": pa.array([1, 1, 0, 1, 1, 0, 1], pa.uint8()),
            "kind": pa.array([0, 1, 2, 3, 4, 2, 0], pa.uint8()),
            "linear": pa.array([1, 1, 1, 1, 1, 0, 0], pa.uint8()),
        }
    )
    body = FORMATS[name](trace)
    reply = client.post(f"{vm}/traces", content=body.content, headers=body.headers)
    assert reply.status_code == 201, reply.text
    result = reply.json()
    assert result["violations"] == 6 and result["ignored_columns"] == []
    found = [(item["index"], item["qualification"]) for item in result["exit_records"]]
    assert found == [(0, "0x1aa"), (1, "0x1aa"), (2, "0xab"), (3, "0xab"), (4, "0x21aa"), (6, "0x2a")]
    # A write that sub-page permissions refuse touches sub-pages; the others ask nothing of them.
    assert [item["denied"] for item in result["exit_records"]] == ["0x1", "0x1", "0x0", "0x0", "0x1", "0x1"]


@pytest.mark.parametrize("name", NAMED)
@pytest.mark.parametrize(
    ("column", "wrong", "rest"),
    [
        ("kind", 5, {}),
        ("kind", 2, {"access": [1, 1, 1, 1]}),
        ("kind", 1, {"access": [1, 1, 1, 0]}),
        ("kind", 3, {"access": [1, 1, 1, 2]}),
        ("kind", 4, {"access": [1, 1, 1, 2]}),
        ("linear", 16, {}),
        ("linear", 2, {}),
        ("linear", 0, {"kind": [0, 0, 0, 1]}),
    ],
)
def test_what_cannot_be_is_named_with_its_index(
    vm: str, client: ContractClient, name: str, column: str, wrong: int, rest: dict[str, list[int]]
) -> None:
    right = {"kind": 0, "linear": 1}[column]
    trace = bodies.table(gpa=[PAGE] * 4, **{column: [right, right, right, wrong]}, **rest)
    body = FORMATS[name](trace)
    before = client.get(f"{vm}/counters").json()
    reply = client.post(f"{vm}/traces", content=body.content, headers=body.headers)
    assert reply.status_code == 422, reply.text
    problem = reply.json()
    assert (problem["index"], problem["field"]) == (3, column) and problem["rule"]
    assert client.get(f"{vm}/counters").json() == before


@pytest.mark.parametrize("name", ["json", "ndjson"])
def test_rows_may_leave_out_what_has_a_default(vm: str, client: ContractClient, name: str) -> None:
    rows = ['{"gpa": 20480}', '{"gpa": 20480, "kind": 2}', '{"gpa": 20480, "linear": 3, "access": 0}']
    text = "\n".join(rows) if name == "ndjson" else f'{{"accesses": [{", ".join(rows)}]}}'
    media = bodies.NDJSON if name == "ndjson" else bodies.JSON
    result = client.post(f"{vm}/traces", content=text, headers={"Content-Type": media}).json()
    assert (result["records"], result["writes"]) == (3, 1)


# ---- by linear address


def test_an_access_by_linear_address(guest: str, client: ContractClient) -> None:
    found = access(client, guest, gva=LINEAR + 0xFFC, data="0102030405060708")
    assert found["allowed"] and found["landed"] and found["gpa"] == hex(FIRST + 0xFFC) and found["exception"] is None
    assert load(client, guest, FIRST + 0xFFC, 4) + load(client, guest, SECOND, 4) == bytes(range(1, 9))
    assert {item["resolution"] for item in found["exits"]} == {"mapped"}
    assert load(client, guest, PT + 8 * 5) == (FIRST | 0x63).to_bytes(8, "little")
    assert load(client, guest, PML4) == (PDPT | 0x23).to_bytes(8, "little")
    read = access(client, guest, gva=LINEAR + 0xFFC, access="read")
    assert read["data"] == "0102030405060708" and read["exits"] == []


@pytest.mark.parametrize(
    ("fields", "members", "exception", "error_code"),
    [
        ({}, {"gva": 0x7000}, "#PF", 2),
        ({}, {"gva": 0x7000, "access": "read"}, "#PF", 0),
        ({"cpl": 3}, {"gva": LINEAR}, "#PF", 7),
        ({"cpl": 3}, {"gva": LINEAR, "access": "execute"}, "#PF", 0x15),
        ({"cpl": 3}, {"gva": LINEAR, "kind": "read-modify-write"}, "#PF", 7),
        ({}, {"gva": 1 << 63}, "#GP", 0),
    ],
)
def test_faults(
    guest: str, client: ContractClient, fields: dict[str, int], members: dict[str, Any], exception: str, error_code: int
) -> None:
    vmcs(client, guest, **fields)
    found = access(client, guest, **members)
    assert (found["exception"], found["error_code"], found["fault_address"]) == (
        exception,
        error_code,
        hex(members["gva"]),
    )
    assert found["resolution"] == "exception" and not found["allowed"] and not found["landed"]
    assert found["gpa"] is None and found["run"] is None


def test_an_exit_on_a_guest_table(guest: str, client: ContractClient) -> None:
    """The accessed flag of a protected table: no sub-page permission allows that write."""
    client.put(f"{guest}/subpages?gfn={PT >> 12}", json={"access": [0xFFFF_FFFE]})
    found = access(client, guest, gva=LINEAR, on_violation="allow")
    assert found["resolution"] == "violation" and not found["allowed"] and not found["landed"]
    last = found["exits"][-1]
    assert (last["qualification"], last["gpa"], last["gva"]) == ("0xab", hex(PT + 8 * 5), hex(LINEAR))
    assert (last["subpages"], last["denied"], last["size"]) == ("0x1", "0x0", 8)
    assert load(client, guest, PT + 8 * 5) == (FIRST | 3).to_bytes(8, "little")


@pytest.mark.parametrize("on_violation", ["skip", "stop", "allow", "grant"])
def test_violations_by_linear_address(guest: str, client: ContractClient, on_violation: str) -> None:
    client.put(f"{guest}/subpages?gfn={FIRST >> 12}", json={"access": [0xFFFF_FFFE]})
    found = access(client, guest, gva=LINEAR + 8, data="ff" * 8, on_violation=on_violation)
    assert found["landed"] is (on_violation in ("allow", "grant")) and found["allowed"] is (on_violation == "grant")
    assert found["resolution"] == "violation" and found["run"]["name"] == "KVM_EXIT_SPP"
    assert load(client, guest, FIRST + 8) == (b"\xff" * 8 if found["landed"] else bytes(8))
    assert found["exits"][-1 if on_violation != "grant" else -2]["denied"] == "0x1" or on_violation == "grant"


# ---- #VE


@pytest.mark.parametrize("where", ["guest memory", "table frame"])
@pytest.mark.parametrize("by", ["gpa", "gva"])
def test_a_virtualization_exception(guest: str, client: ContractClient, where: str, by: str) -> None:
    """The 512-byte area of table 26-1: reason, busy, qualification, linear and physical address, EPTP index."""
    area = 0x40000 if where == "guest memory" else int(client.post(f"{guest}/table-frames").json()["address"], 16)
    assert access(client, guest, gva=LINEAR)["allowed"]
    leaf(client, guest, lambda raw: raw & ~2, FIRST)
    controls = vmcs(client, guest)["secondary_controls"]
    vmcs(client, guest, secondary_controls=controls | SECONDARY_VE, ve_information_address=area, eptp_index=0x1234)
    address = {"gva": LINEAR + 8} | ({"gpa": FIRST + 8} if by == "gpa" else {})
    found = access(client, guest, **address)
    assert (found["exception"], found["error_code"], found["gpa"]) == ("#VE", None, hex(FIRST + 8))
    assert found["resolution"] == "exception" and not found["allowed"] and found["run"] is None
    assert found["fault_address"] == hex(LINEAR + 8)
    if where == "guest memory":
        words = [load(client, guest, area + 8 * n) for n in range(6)]
        expected = [0xFFFF_FFFF_0000_0030, 0x1AA, LINEAR + 8, FIRST + 8, 0x1234, 0]
        assert [int.from_bytes(word, "little") for word in words] == expected
        assert load(client, guest, area + 48, 464) == bytes(464)
        store(client, guest, area + 4, bytes(4))  # the guest has dealt with it
        assert access(client, guest, **address)["exception"] == "#VE"
    # busy: KVM deals with it
    assert access(client, guest, **address)["allowed"]


def test_the_page_log_may_be_in_guest_memory(vm: str, client: ContractClient) -> None:
    access(client, vm, gpa=PAGE)
    leaf(client, vm, lambda raw: raw & ~0x200)
    controls = vmcs(client, vm)["secondary_controls"]
    vmcs(client, vm, secondary_controls=controls | 1 << 17, pml_address=0x40000, pml_index=7)
    assert access(client, vm, gpa=PAGE + 0x123, size=1)["allowed"]
    assert load(client, vm, 0x40000 + 7 * 8) == PAGE.to_bytes(8, "little")
    assert vmcs(client, vm)["pml_index"] == 6


# ---- hosts without EPT


def test_a_host_without_ept(make_vm: Callable[..., str], client: ContractClient) -> None:
    """Nothing is walked: memory slots alone decide."""
    slots = [
        {"slot": 0, "gpa": 0, "size": 1 << 20},
        {"slot": 1, "gpa": 1 << 20, "size": 1 << 20, "read_only": True},
    ]
    vm = make_vm(spp=False, host={"ept": False}, memory_slots=slots)
    assert vmcs(client, vm)["secondary_controls"] & 0x82 == 0
    assert client.post(f"{vm}/vcpus/0/vm-entry").json()["result"] == "VMsucceed"
    assert client.get(f"{vm}/walk?gpa=0x5000").json()["sentence"] == "allowed: EPT is off"
    assert access(client, vm, gpa=0x5000, data="01" * 8)["allowed"]
    for gpa, kind, resolution in ((1 << 20, "read", "completed"), (1 << 20, "write", "mmio"), (1 << 30, 0, "mmio")):
        found = access(client, vm, gpa=gpa, access=kind)
        assert found["resolution"] == resolution and (found["run"] is None) is found["allowed"]
    assert client.get(f"{vm}/memory?gpa=0x5000&size=8").content == b"\1" * 8
    reply = client.put(f"{vm}/spp", json={"active": True})
    assert reply.status_code in (409, 422)
    controls = vmcs(client, vm)["secondary_controls"]
    vmcs(client, vm, secondary_controls=controls | 2)
    assert client.post(f"{vm}/vcpus/0/vm-entry").json()["vm_instruction_error"] == 7
