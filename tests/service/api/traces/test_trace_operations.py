"""Traces with flushes over HTTP: every body, what is refused, what is kept."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from service.runtime.translation_records import translations_of
from tests.contract.client import ContractClient
from tests.engine.hyperv import guests
from tests.engine.hyperv.flush_traces import GVA, NEW, OLD, Row, access, flush, invlpg, mov_cr3
from tests.support import bodies
from tests.support.bodies import Body
from tests.support.guests import leaves
from tests.support.http import new_vm, replay, replayed
from tests.support.stores import serving

MakeVm = Callable[..., str]
VP = 5
KINDS = {
    "gpa": pa.uint64(),
    "gva": pa.uint64(),
    "vcpu": pa.uint16(),
    "op": pa.uint8(),
    "arg": pa.binary(),
    "address_space": pa.uint64(),
}
LOST = [access(1, OLD), access(0, OLD), flush(0), access(0, NEW), access(1, NEW), invlpg(1, GVA), access(1, NEW)]


def guest(client: ContractClient, make_vm: MakeVm, **members: Any) -> str:
    vcpus = [{"id": i, "vp_index": index, "cpuid": leaves(guests.CPUID)} for i, index in enumerate((0, VP))]
    vm = make_vm(**{"spp": False, "vcpus": vcpus, "translation_cache": "model", **members})
    os_id = {"index": hex(guests.GUEST_OS_ID), "value": hex(guests.OS_ID)}
    assert client.put(f"{vm}/vcpus/0/msrs", json={"msrs": [os_id]}).status_code == 200
    for vcpu in range(2):
        client.put(f"{vm}/vcpus/{vcpu}/vmcs", json={"cr3": hex(guests.CR3), "cr4": hex(guests.CR4)})
    return vm


def table(rows: list[Row]) -> pa.Table:
    def column(name: str) -> list[Any]:
        values = [row.get(name, 0 if name in ("op", "vcpu") else None) for row in rows]
        return [value and bytes.fromhex(value) for value in values] if name == "arg" else values

    return pa.table({name: pa.array(column(name), kind) for name, kind in KINDS.items()})


def as_parquet(rows: list[Row]) -> Body:
    sink = io.BytesIO()
    pq.write_table(table(rows), sink)
    return Body(sink.getvalue(), bodies.PARQUET)


def as_json(rows: list[Row]) -> Body:
    return Body(json.dumps({"accesses": rows}).encode(), bodies.JSON)


def hexadecimal(row: Row) -> Row:
    return {name: hex(value) if name in ("gpa", "gva", "address_space") else value for name, value in row.items()}


ENCODED: dict[str, Callable[[list[Row]], Body]] = {
    "json": as_json,
    "json with hex": lambda rows: as_json(list(map(hexadecimal, rows))),
    "json with nulls": lambda rows: as_json([{**dict.fromkeys(("arg", "address_space")), **row} for row in rows]),
    "ndjson": lambda rows: Body("".join(json.dumps(row) + "\n" for row in rows).encode(), bodies.NDJSON),
    "arrow": lambda rows: bodies.arrow(table(rows)),
    "arrow, a record a batch": lambda rows: bodies.arrow(table(rows), 1),
    "parquet": as_parquet,
}


@pytest.mark.parametrize("name", ENCODED)
@pytest.mark.parametrize("policy", ["kvm", "tlfs"])
def test_a_lost_flush_is_found(client: ContractClient, make_vm: MakeVm, name: str, policy: str) -> None:
    vm = guest(client, make_vm, flush_policy=policy)
    reply = replay(client, vm, ENCODED[name](LOST))
    assert reply.status_code == 201, reply.text
    result = reply.json()
    assert result["records"] == 5 and result["stale_translations"] == 1
    assert result["operations"] == {"hypercall": 1, "mov_cr3": 0, "invlpg": 1}
    (stale,) = result["stale_records"]
    explanation = stale["explanation"]
    assert stale == {
        "explanation": explanation,
        "index": 4,
        "vcpu": 1,
        "vp_index": VP,
        "gva": hex(GVA),
        "address_space": hex(guests.CR3),
        "size": 8,
        "access": 1,
        "gpa": hex(NEW),
        "cached_gpa": hex(OLD),
        "cached_at": 0,
        "changed_after": 1,
        "missed_by": {"index": 2, "op": "hypercall", "why": "not-targeted", "flushed": [0], "status": "0x0"},
    }
    assert explanation.endswith("at record 2 flushed VPs {0}; VP 5 was not in its processor set")
    hypercall, local = result["operation_records"]
    assert hypercall == {
        "index": 2,
        "vcpu": 0,
        "op": "hypercall",
        "operand": "0x100000003",
        "call": "HvCallFlushVirtualAddressList",
        "outcome": "completed",
        "status": "0x0",
        "status_name": "SUCCESS",
        "targeted": [0],
        "flushed": [0],
        "dropped": 1,
        "left": 0,
    }
    assert (local["op"], local["operand"], local["dropped"], local["status"]) == ("invlpg", hex(GVA), 1, None)
    assert result["stale_records_dropped"] == result["operation_records_dropped"] == 0
    kept = client.get(reply.headers["Location"]).json()
    assert kept == result
    listed = client.get(f"{vm}/traces").json()["traces"][0]
    assert listed["stale_translations"] == 1 and "stale_records" not in listed


def test_nothing_is_said_of_a_trace_without_operations(client: ContractClient, make_vm: MakeVm) -> None:
    result = replayed(client, guest(client, make_vm), as_json([access(1, OLD), access(1, NEW)]))
    assert result["stale_translations"] == 0 and result["operations"] == {"hypercall": 0, "mov_cr3": 0, "invlpg": 0}
    assert result["stale_records"] == result["operation_records"] == []


def test_the_trace_leaves_what_hypercalls_leave(client: ContractClient, make_vm: MakeVm) -> None:
    """CR3, caches, queues and statistics are those of the machine."""
    vm = guest(client, make_vm)
    assert client.put(f"{vm}/vcpus/1/activity", json={"activity": "halted"}).status_code == 200
    result = replayed(client, vm, as_json([access(1, OLD), flush(VP), mov_cr3(0, 0x300000)]))
    assert result["operation_records"][0]["flushed"] == [] and result["operation_records"][0]["left"] == 1
    assert client.get(f"{vm}/vcpus/1/flush-queue").json()["own"] == [hex(GVA)]
    assert client.get(f"{vm}/vcpus/0/vmcs").json()["cr3"] == "0x300000"
    entries = client.get(f"{vm}/vcpus/1/tlb").json()["entries"]
    assert {(entry["kind"], entry["address_space"]) for entry in entries} == {
        ("combined", hex(guests.CR3)),
        ("physical", None),
    }
    result = replayed(client, vm, as_json([access(1, NEW, address_space=guests.CR3)]))
    assert result["stale_translations"] == 0, "what was queued is done before the vCPU runs"
    assert client.get(f"{vm}/counters").json()["counters"]["stale_accesses"] == 0


@pytest.mark.parametrize(
    ("row", "field"),
    [
        ({"op": 1, "arg": "00"}, "arg"),
        ({"op": 2, "vcpu": 1}, "arg"),
        ({"op": 3, "arg": "xy"}, "arg"),
        ({"op": 5}, "op"),
        ({"op": 3, "gva": 1, "vcpu": 9}, "vcpu"),
        (access(1, NEW, address_space=hex(1 << 60)), "address_space"),
        (access(1, NEW + 1), "gva"),
        (access(1, NEW, arg="00"), "arg"),
        ({"op": 0}, "gpa"),
    ],
)
def test_nothing_of_a_refused_trace_is_applied(client: ContractClient, make_vm: MakeVm, row: Row, field: str) -> None:
    vm = guest(client, make_vm)

    def state() -> list[Any]:
        return [client.get(f"{vm}{what}").json() for what in ("/counters", "/vcpus/1/tlb", "/vcpus/1/vmcs", "")]

    before = state()
    reply = replay(client, vm, ENCODED["ndjson"]([*LOST, mov_cr3(1, 0x300000), row]))
    assert reply.status_code == 422, reply.text
    problem = reply.json()
    assert (problem["code"], problem["index"], problem["field"]) == ("invalid-trace", len(LOST) + 1, field)
    assert problem["rule"] and state() == before


def test_start_and_stop(client: ContractClient, make_vm: MakeVm) -> None:
    vm = guest(client, make_vm, spp=True)
    assert client.put(f"{vm}/subpages?gfn={OLD >> 12:#x}", json={"access": ["0xfffffffe"]}).status_code < 300
    rows = [access(1, OLD + 0x80, GVA + 0x80), flush(0), access(1, NEW), access(1, NEW)]
    result = replayed(client, vm, as_json(rows), "on_violation=stop")
    assert result["stopped_at"] == 2 and result["stale_records"][0]["index"] == 2
    assert result["exit_records"][0]["gpa"] == hex(OLD)
    result = replayed(client, vm, as_json(rows), "on_violation=stop&start=3")
    assert result["stopped_at"] is None and result["records"] == 1 and result["operations"]["hypercall"] == 0


def test_results_outlive_the_service(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'vms.db'}"
    with serving(url) as service:
        client = service.client
        vm = guest(client, lambda **members: new_vm(client, **members))
        where = replay(client, vm, as_json(LOST)).headers["Location"]
        before = client.get(where).json()
    with serving(url) as service:
        assert service.client.get(where).json() == before and before["stale_translations"] == 1


def test_records_of_an_older_store_say_nothing() -> None:
    assert translations_of(None).stale == 0
