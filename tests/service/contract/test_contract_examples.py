"""Every request that the contract shows works on the machine that its text says how to make."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.contract.client import ContractClient, contract

JSON = "application/json"

# Operations whose example wants that of others first, in order: the description names their paths.
AFTER: dict[str, tuple[str, ...]] = {
    "acknowledgeDirty": ("putDirty", "harvestDirty"),
    "executeHypercall": ("putCpuid", "putMsrs"),
    "putMsrs": ("putCpuid",),
    "putNestedState": ("putCpuid",),
    "putVpAssistPage": ("putCpuid", "putMsrs"),
}
# What the machine of the contract's example has besides, and what the query has: the descriptions say so.
MACHINES: dict[str, dict[str, Any]] = {
    "getDirtyLog": {"memory_slots": [{"slot": 0, "gpa": "0x0", "size": "0x40000000", "log_dirty": True}]},
    "loadOnCpu": {"host": {"hyperv": {}}},
}
# What the operator has to allow: a socket where a tool listens (tests/service/kvmi), and places where files are read
# (tests/service/api/footprints).
ELSEWHERE = ("putKvmi", "buildFootprint")
# Calls about a page that is protected and was touched: that of the path's own example.
TOUCHED = ("putEptEntry", "putSpptEntry")


def examples() -> Iterator[tuple[str, str, str, Any]]:
    """Operation id, method, path and body of each request example."""
    for path, item in contract().document["paths"].items():
        for method, operation in item.items():
            content = operation.get("requestBody", {}).get("content", {}).get(JSON)
            if content is not None and operation["operationId"] not in ELSEWHERE:
                shown = [content["example"]] if "example" in content else []
                shown += [item["value"] for item in content.get("examples", {}).values()]
                for body in shown:
                    yield operation["operationId"], method, path, body


EXAMPLES = list(examples())


def address(method: str, path: str, given: dict[str, str]) -> str:
    """The path with ``given`` or the examples of its parameters, and of those that the query must have."""
    query = []
    for parameter in contract().document["paths"][path][method].get("parameters", []):
        schema = parameter["schema"]
        shown = parameter.get("example", next(iter(schema.get("examples", [])), None))
        if "examples" in parameter:
            shown = next(iter(parameter["examples"].values()))["value"]
        shown = given.get(parameter["name"], shown)
        if parameter["in"] == "path":
            path = path.replace("{" + parameter["name"] + "}", str(shown))
        elif parameter["in"] == "query" and parameter.get("required"):
            query.append(f"{parameter['name']}={shown}")
    return path + ("?" + "&".join(query) if query else "")


def run(client: ContractClient, vm: str, name: str) -> list[Any]:
    """The replies to the examples of an operation, or to a call without a body, in order, each with 2xx."""
    found = [(method, path, body) for operation, method, path, body in EXAMPLES if operation == name]
    for path, item in contract().document["paths"].items():
        found += [(m, path, None) for m, o in item.items() if o["operationId"] == name and not found]
    replies = []
    for method, path, body in found:
        given = {"vm": vm.rpartition("/")[2]}
        if "{footprint}" in path or name == "mergeFootprints":
            octets = {"Content-Type": "application/octet-stream"}
            query = "record=gpa8&by=records:1&level=bytes"
            kept = client.post(f"/v1/footprints?{query}", content=bytes(8), headers=octets)
            given["footprint"] = kept.json()["id"]
        if name == "mergeFootprints":  # of ids that are there
            body = {"footprints": [given["footprint"]] * len(body["footprints"])}
        url = address(method, path, given)
        reply = client.request(method.upper(), url, json=body)
        assert 200 <= reply.status_code < 300, (name, body, reply.text)
        replies.append(reply)
    return replies


def made(client: ContractClient, name: str) -> str:
    """The machine of the contract's own example, with what the operation's text adds."""
    document = next(body for operation, _, _, body in EXAMPLES if operation == "createVm")
    reply = client.post("/v1/vms", json={**document, **MACHINES.get(name, {})})
    assert reply.status_code == 201, reply.text
    return reply.headers["Location"]


@pytest.mark.parametrize("name", sorted({row[0] for row in EXAMPLES}))
def test_example(client: ContractClient, name: str) -> None:
    vm = made(client, name)
    for earlier in AFTER.get(name, ()):
        run(client, vm, earlier)
    if name in TOUCHED:
        client.post(f"{vm}/protections", json={"name": "page", "objects": [{"name": "x", "gpa": "0x2000", "size": 1}]})
        assert client.post(f"{vm}/accesses", json={"gpa": "0x2000"}).json()["resolution"] == "violation"
    for reply in run(client, vm, name):
        told = reply.json() if reply.headers.get("Content-Type") == JSON else {}
        if name == "createVm":
            client.delete(told["links"]["self"] if "links" in told else reply.headers["Location"])
        elif name == "executeHypercall":
            assert told["outcome"] == "completed" and told["reason"] is None
            assert told["result"]["status_name"] == "SUCCESS" and told["targeted"] == [1]
        elif name == "putMsrs":
            assert told["refused"] is None
    client.delete(vm)


def test_a_call_that_goes_nowhere_says_what_it_wants(client: ContractClient) -> None:
    vm = made(client, "executeHypercall")
    for reply in run(client, vm, "executeHypercall"):
        told = reply.json()
        assert (told["outcome"], told["result"]) == ("native", None)
        assert "0x40000001" in told["reason"] and "0x40000000" in told["reason"]
    client.delete(vm)
