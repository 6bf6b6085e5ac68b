"""Names in place of numbers in the records of a trace, wherever the contract has them, in JSON and NDJSON."""

from __future__ import annotations

import json
from itertools import permutations
from typing import Any

import pytest

from engine.trace.readers.rows import NAMED
from service.api.traces.traces import AccessRecord
from service.api.traces.translations import OperationRecord
from service.http import wire_types
from tests.contract.client import ContractClient

RECORDS: list[dict[str, Any]] = (
    [{"gpa": 0x1000, "access": name} for name in wire_types.ACCESS_NAMES]
    + [{"gpa": 0x1000, "kind": name} for name in wire_types.KIND_NAMES]
    + [
        {"gpa": 0x1000, "source": "emulated", "access": "write"},
        {"gpa": 0x1000, "source": "host", "access": "read"},
        {"gpa": 0x1000, "source": "guest"},
        {"gpa": 0x1000, "linear": "valid,user,writable"},
        {"gpa": 0x1000, "linear": "writable,valid"},
        {"gpa": 0x1000, "access": "1", "kind": "0", "linear": "3", "source": "0"},
    ]
)


def numbered(record: dict[str, Any]) -> dict[str, Any]:
    """The same record in numbers."""
    return {
        name: NAMED.get(name, {}).get(value, value) if isinstance(value, str) else value
        for name, value in record.items()
    }


def posted(client: ContractClient, vm: str, records: list[dict[str, Any]], media: str) -> dict[str, Any]:
    if media == "application/json":
        content = json.dumps({"accesses": records})
    else:
        content = "".join(json.dumps(record) + "\n" for record in records)
    reply = client.post(f"{vm}/traces", content=content.encode(), headers={"Content-Type": media})
    assert reply.status_code == 201, reply.text
    found: dict[str, Any] = reply.json()
    return {name: found[name] for name in ("records", "writes", "violations", "exits", "exit_records")}


@pytest.mark.parametrize("media", ["application/json", "application/x-ndjson"])
@pytest.mark.parametrize(
    "records", [RECORDS, RECORDS[:1], [RECORDS[0], {"gpa": 1, "access": 1}]], ids=["all", "one", "mixed"]
)
def test_names_are_numbers(media: str, records: list[dict[str, Any]], client: ContractClient, make_vm: Any) -> None:
    named, plain = make_vm(), make_vm()
    for vm in (named, plain):
        client.put(f"{vm}/subpages", params={"gfn": 1}, json={"access": [0]})
    assert posted(client, named, records, media) == posted(client, plain, [numbered(item) for item in records], media)


def test_operations_by_name(client: ContractClient, make_vm: Any) -> None:
    vm = make_vm(translation_cache="model")
    records = [
        {"gpa": 0, "gva": 0, "op": "access"},
        {"op": "invlpg", "gva": "0x1000"},
        {"op": "mov-cr3", "address_space": 4096},
    ]
    reply = client.post(f"{vm}/traces", json={"accesses": records})
    assert reply.status_code == 201, reply.text
    assert reply.json()["operations"] == {"hypercall": 0, "mov_cr3": 1, "invlpg": 1}


def test_what_is_no_name(client: ContractClient, vm: str) -> None:
    for record, names in (({"access": "Write"}, "read, write, execute"), ({"linear": "user,user"}, "valid, user")):
        reply = client.post(f"{vm}/traces", json={"accesses": [{"gpa": 0}, {"gpa": 0, **record}]})
        assert reply.status_code == 422 and reply.json()["index"] == 1 and names in reply.json()["rule"]


def test_the_reader_has_every_name_of_the_contract() -> None:
    """Whatever the models let through by name, the reader takes, as the same number."""
    for name, values in (
        ("access", wire_types.ACCESS_NAMES),
        ("kind", wire_types.KIND_NAMES),
        ("source", wire_types.SOURCE_NAMES),
        (
            "linear",
            [",".join(chosen) for count in (1, 2, 3, 4) for chosen in permutations(wire_types.LINEAR_NAMES, count)],
        ),
    ):
        assert {value: getattr(AccessRecord(gpa=0, **{name: value}), name) for value in values} == NAMED[name]
    for value, number in NAMED["op"].items():
        model = OperationRecord if number else AccessRecord
        members = {} if number else {"gpa": 0}
        assert model(op=value, **members).op == value
