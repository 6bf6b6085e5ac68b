"""One vCPU's processor over HTTP: VMCS, VM entry, INVEPT, INVVPID, translation cache, MSRs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from engine.arch.vmcs_fields import FIELDS
from tests.contract.client import ContractClient
from tests.support import bodies
from tests.support.http import access

ONES = "0xffffffffffffffff"
ABSENT = 0x1000


def put(client: ContractClient, vm: str, vcpu: int = 0, **fields: Any) -> dict[str, str]:
    reply = client.put(f"{vm}/vcpus/{vcpu}/vmcs", json=fields)
    assert reply.status_code == 200, reply.text
    found: dict[str, str] = reply.json()
    return found


def vmcs(client: ContractClient, vm: str, vcpu: int = 0) -> dict[str, int]:
    reply = client.get(f"{vm}/vcpus/{vcpu}/vmcs")
    assert reply.status_code == 200, reply.text
    return {name: int(value, 16) for name, value in reply.json().items()}


def post(client: ContractClient, vm: str, what: str, **operands: Any) -> dict[str, Any]:
    url = f"{vm}/vcpus/0/{what}"
    reply = client.post(url) if what == "vm-entry" else client.post(url, json=operands)
    assert reply.status_code == 200, reply.text
    found: dict[str, Any] = reply.json()
    return found


def entries(client: ContractClient, vm: str, vcpu: int = 0) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = client.get(f"{vm}/vcpus/{vcpu}/tlb").json()["entries"]
    return found


# ---- VMCS


def test_vmcs(make_vm: Callable[..., str], client: ContractClient) -> None:
    vm = make_vm(vcpus=[{"id": 4}, {"id": 2}])
    first = client.get(f"{vm}/vcpus/2/vmcs")
    assert list(first.json()) == list(FIELDS) and all(word.startswith("0x") for word in first.json().values())
    assert client.get(f"{vm}/vcpus/2/vmcs", headers={"If-None-Match": first.headers["ETag"]}).status_code == 304
    changed = put(client, vm, 2, eptp=ONES, pml_index=511, cr3="4096", cpl=3)
    assert changed == {**first.json(), "eptp": ONES, "pml_index": "0x1ff", "cr3": "0x1000", "cpl": "0x3"}
    assert client.get(f"{vm}/vcpus/2/vmcs").json() == changed
    assert put(client, vm, 2) == changed
    assert vmcs(client, vm, 4)["vpid"] == 1 and vmcs(client, vm, 4)["cpl"] == 0


@pytest.mark.parametrize("name", FIELDS)
def test_every_field_round_trips(vm: str, client: ContractClient, name: str) -> None:
    before = client.get(f"{vm}/vcpus/0/vmcs").json()
    largest = (1 << FIELDS[name].bits) - 1
    assert put(client, vm, **{name: hex(largest)}) == {**before, name: hex(largest)}
    reply = client.put(f"{vm}/vcpus/0/vmcs", json={"vpid": 77, name: hex(largest + 1)})
    assert reply.status_code == 422 and reply.json()["field"] == name
    assert client.get(f"{vm}/vcpus/0/vmcs").json() == {**before, name: hex(largest)}


@pytest.mark.parametrize(
    ("document", "field"),
    [
        ({"eptq": 1}, "eptq"),
        ({"eptp": None}, "eptp"),
        ({"eptp": -1}, "eptp"),
        ({"eptp": "beef"}, "eptp"),
        ({"eptp": True}, "eptp"),
        ({"cpl": 4}, "cpl"),
        ({"cr3": 1, "vpid": 65536}, "vpid"),
    ],
)
def test_refused_fields(vm: str, client: ContractClient, document: dict[str, Any], field: str) -> None:
    before = client.get(f"{vm}/vcpus/0/vmcs").json()
    reply = client.put(f"{vm}/vcpus/0/vmcs", json=document)
    assert reply.status_code == 422 and reply.json()["field"] == field
    assert client.get(f"{vm}/vcpus/0/vmcs").json() == before


def test_tags(make_vm: Callable[..., str], client: ContractClient) -> None:
    vm = make_vm(require_match=True)
    url = f"{vm}/vcpus/0/vmcs"
    assert client.put(url, json={"cr3": 1}).status_code == 428
    tag = client.get(url).headers["ETag"]
    assert client.put(url, json={"cr3": 1}, headers={"If-Match": '"x"'}).status_code == 412
    reply = client.put(url, json={"cr3": 1}, headers={"If-Match": tag})
    assert reply.status_code == 200 and reply.headers["ETag"] == client.get(url).headers["ETag"] != tag
    assert client.put(url, json={"cr3": 2}, headers={"If-Match": tag}).status_code == 412


CALLS: list[tuple[str, str, Any]] = [
    ("GET", "vmcs", None),
    ("PUT", "vmcs", {}),
    ("POST", "vm-entry", None),
    ("POST", "invept", {"type": 2}),
    ("POST", "invvpid", {"type": 2}),
    ("GET", "tlb", None),
    ("GET", "msrs", None),
]


@pytest.mark.parametrize(("method", "path", "document"), CALLS, ids=[f"{c[0]} {c[1]}" for c in CALLS])
def test_unknown_and_unsupported(
    make_vm: Callable[..., str], client: ContractClient, method: str, path: str, document: Any
) -> None:
    def status(url: str) -> tuple[int, str]:
        reply = client.request(method, f"{url}/{path}", **({} if document is None else {"json": document}))
        return reply.status_code, reply.json().get("field", "")

    vm = make_vm()
    assert status(f"{vm}/vcpus/1") == (404, "vcpu")
    assert status("/v1/vms/vm_none/vcpus/0") == (404, "vm")
    assert status(f"{vm}/vcpus/zero")[0] == 422
    assert status(f"{vm}/vcpus/-1")[0] == 422
    amd = make_vm(spp=False, host={"vendor": "amd"})
    assert status(f"{amd}/vcpus/0") == ((200, "") if path == "tlb" else (409, "host.vendor"))


# ---- VM entry; the printed vectors are in test_vectors


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        pytest.param({"sppt_pointer": 1 << 39}, None, id="SPPTP within the width"),
        pytest.param({"secondary_controls": 2 | 1 << 17, "pml_address": 0x1000}, None, id="PML address"),
        pytest.param({"secondary_controls": 2, "sppt_pointer": ONES}, None, id="SPPTP without the control"),
        pytest.param({"secondary_controls": 1 << 23}, 7, id="SPP without EPT"),
        pytest.param({"vpid": 0}, 7, id="VPID 0"),
        pytest.param({"secondary_controls": 2 | 1 << 27}, 7, id="control that is not allowed"),
        pytest.param({"primary_controls": 1 << 17, "tertiary_controls": 4}, 7, id="tertiary controls are missing"),
        pytest.param({"secondary_controls": 2 | 1 << 18, "ve_information_address": 8}, 7, id="#VE area"),
    ],
)
def test_entry(narrow: str, client: ContractClient, fields: dict[str, Any], expected: int | None) -> None:
    succeeded = {"result": "VMsucceed", "vm_instruction_error": None}
    assert post(client, narrow, "vm-entry") == succeeded
    put(client, narrow, **fields)
    refused = {"result": "VMfail", "vm_instruction_error": expected}
    assert post(client, narrow, "vm-entry") == (refused if expected else succeeded)


def test_entry_goes_by_the_capabilities(make_vm: Callable[..., str], client: ContractClient) -> None:
    vm = make_vm(maxphyaddr=40, host={"vmx_capabilities": {"ept_vpid_cap": "0xf0106334141"}})
    put(client, vm, eptp=0x26)
    assert post(client, vm, "vm-entry")["vm_instruction_error"] == 7


# ---- INVEPT and INVVPID; their operands are in test_vectors


@pytest.mark.parametrize(
    ("where", "result", "exception"),
    [
        ({"place": "root", "cpl": 1}, "exception", "#GP(0)"),
        ({"place": "outside"}, "exception", "#UD"),
        ({"place": "wrong-mode", "cpl": 3}, "exception", "#UD"),
        ({"place": "non-root", "cpl": 3}, "vm-exit", None),
    ],
)
@pytest.mark.parametrize(("what", "reason"), [("invept", 50), ("invvpid", 53)])
def test_place_comes_before_operands(
    vm: str, client: ContractClient, what: str, reason: int, where: dict[str, Any], result: str, exception: str | None
) -> None:
    assert post(client, vm, what, type=9, **where) == {
        "result": result,
        "vm_instruction_error": None,
        "exception": exception,
        "exit_reason": reason if result == "vm-exit" else None,
    }


@pytest.mark.parametrize(("what", "bit"), [("invept", 20), ("invvpid", 32)])
def test_instructions_need_their_capability(
    make_vm: Callable[..., str], client: ContractClient, what: str, bit: int
) -> None:
    vm = make_vm(host={"vmx_capabilities": {"ept_vpid_cap": 0x0F01_0633_41C1 & ~(1 << bit)}})
    assert post(client, vm, what, type=2)["exception"] == "#UD"


@pytest.mark.parametrize(
    ("what", "document", "field"),
    [
        ("invept", {}, "type"),
        ("invept", {"type": 1, "vpid": 1}, "vpid"),
        ("invept", {"type": 1, "eptp": -1}, "eptp"),
        ("invept", {"type": 1 << 64}, "type"),
        ("invept", {"type": 1, "place": "ring 0"}, "place"),
        ("invept", {"type": 1, "cpl": 4}, "cpl"),
        ("invvpid", {"vpid": 1}, "type"),
        ("invvpid", {"type": 1, "vpid": 1 << 16}, "vpid"),
        ("invvpid", {"type": 1, "reserved": 1 << 48}, "reserved"),
        ("invvpid", {"type": 1, "linear_address": 1 << 64}, "linear_address"),
    ],
)
def test_refused_operands(vm: str, client: ContractClient, what: str, document: dict[str, Any], field: str) -> None:
    reply = client.post(f"{vm}/vcpus/0/{what}", json=document)
    assert reply.status_code == 422 and reply.json()["field"] == field


# ---- the translation cache


@pytest.fixture
def cached(make_vm: Callable[..., str], client: ContractClient) -> str:
    """A VM with a translation cache, two vCPUs, and sub-page 1 of page 2 protected."""
    vm = make_vm(translation_cache="model", vcpus=2)
    client.put(f"{vm}/subpages?gfn=2", json={"access": ["0xfffffffd"]})
    return vm


def test_entries(cached: str, vm: str, client: ContractClient) -> None:
    assert client.get(cached).json()["translation_cache"] == "model"
    assert entries(client, cached) == []
    assert access(client, cached, gpa="0x2000")["allowed"]
    (found,) = entries(client, cached)
    assert found["kind"] == "physical" and found["address"] == found["gpa"] == "0x2000"
    assert not found["writable"] and found["spp_vector"] == "0x5555555555555551" and found["vpid"] is None
    assert entries(client, cached, 1) == []
    assert post(client, cached, "invept", type=2)["result"] == "VMsucceed"
    assert entries(client, cached) == []
    access(client, vm, gpa="0x2000")
    assert entries(client, vm) == []


def test_a_stale_answer_is_told(cached: str, client: ContractClient) -> None:
    first = access(client, cached, gpa="0x2000")
    assert first["allowed"] and not any(record["stale"] for record in first["exits"])
    assert access(client, cached, gpa="0x2000")["exits"] == []
    before = vmcs(client, cached)["sppt_pointer"]
    put(client, cached, sppt_pointer=ABSENT)
    stale = access(client, cached, gpa="0x2000")
    assert stale["allowed"] and stale["resolution"] == "completed"
    (record,) = stale["exits"]
    assert record["stale"] and record["reason"] == 0 and record["name"] == "no exit"
    assert client.get(f"{cached}/counters").json()["counters"]["stale_accesses"] == 1
    # The flush that was forgotten: the absent table reads as all ones, which is misconfigured.
    post(client, cached, "invept", type=1, eptp=vmcs(client, cached)["eptp"])
    fresh = access(client, cached, gpa="0x2000")
    assert not fresh["allowed"] and fresh["exits"][-1]["reason"] == 66 and not fresh["exits"][-1]["stale"]
    put(client, cached, sppt_pointer=before)
    assert access(client, cached, gpa="0x2000")["allowed"]


def test_a_stale_answer_in_a_trace(cached: str, client: ContractClient) -> None:
    access(client, cached, gpa="0x2000")
    put(client, cached, sppt_pointer=ABSENT)
    words = np.array([0x2000, 0x2000], dtype="<u8").tobytes()
    reply = client.post(f"{cached}/traces?record=gpa8", content=words, headers={"Content-Type": bodies.PACKED})
    assert reply.status_code == 201, reply.text
    assert reply.json()["violations"] == 0
    assert [(r["index"], r["stale"]) for r in reply.json()["exit_records"]] == [(0, True), (1, True)]
    exits = f"{reply.headers['Location']}/exits"
    arrow = client.get(exits, headers={"Accept": "application/vnd.apache.arrow.stream"})
    rows = pa.ipc.open_stream(arrow.content).read_all().to_pylist()
    assert [(row["index"], row["name"], row["stale"]) for row in rows] == [(0, "no exit", True), (1, "no exit", True)]


def test_the_hypervisor_flushes_by_itself(cached: str, client: ContractClient) -> None:
    access(client, cached, gpa="0x2000")
    client.put(f"{cached}/subpages?gfn=2", json={"access": [0]})
    refused = access(client, cached, gpa="0x2000")
    assert not refused["allowed"] and not any(record["stale"] for record in refused["exits"])


def test_vcpus_that_differ_answer_differently(make_vm: Callable[..., str], client: ContractClient) -> None:
    vm = make_vm(vcpus=2)
    put(client, vm, 1, eptp=ABSENT | 0x1E)
    accesses = [{"gpa": "0x2000", "vcpu": vcpu} for vcpu in (0, 0, 1, 0, 1)]
    result = client.post(f"{vm}/traces", json={"accesses": accesses}).json()
    assert [(r["index"], r["vcpu"], r["reason"]) for r in result["exit_records"]] == [(2, 1, 49), (4, 1, 49)]


# ---- MSRs


def test_msrs(make_vm: Callable[..., str], client: ContractClient) -> None:
    vm = make_vm(vcpus=[{"id": 9}])
    found = {msr["index"]: msr for msr in client.get(f"{vm}/vcpus/9/msrs").json()["msrs"]}
    assert found["0x48c"] == {"index": "0x48c", "name": "IA32_VMX_EPT_VPID_CAP", "value": "0xf01063341c1"}
    assert int(found["0x48b"]["value"], 16) >> 55 & 1
    without = make_vm(spp=False, host={"spp": False, "vmx_capabilities": {"ept_vpid_cap": 1}})
    found = {msr["index"]: int(msr["value"], 16) for msr in client.get(f"{without}/vcpus/0/msrs").json()["msrs"]}
    assert found["0x48c"] == 1 and not found["0x48b"] >> 55 & 1
