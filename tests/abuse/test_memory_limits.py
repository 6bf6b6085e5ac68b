"""What machines may hold is bounded below what the process may have, and the refusal says whose limit it was."""

from __future__ import annotations

import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx2
import pytest
import zstandard

from service.runtime.container_memory import allowed_bytes, container_bytes, warn_of_memory
from service.settings import MIB, Settings
from tests.abuse.conftest import Begin
from tests.support.http import OCTETS, new_vm

_PIECE = MIB
_MOST = 6 * MIB


def fill(client: httpx2.Client, vm: str, pieces: int) -> list[httpx2.Response]:
    """Write one byte value over so many pieces of guest memory, up to the first refusal."""
    replies = []
    for piece in range(pieces):
        where = f"{vm}/memory?gpa={piece * _PIECE:#x}"
        replies.append(client.put(where, content=b"\x41" * _PIECE, headers=OCTETS))
        if replies[-1].status_code != 204:
            break
    return replies


def large_vm(client: httpx2.Client) -> str:
    return new_vm(client, memory_slots=[{"slot": 0, "gpa": 0, "size": 1 << 30}])


def refusal(replies: list[httpx2.Response]) -> dict[str, object]:
    assert replies[-1].status_code == 429, replies[-1].text
    problem: dict[str, object] = replies[-1].json()
    assert problem["code"] == "limit-exceeded"
    return problem


def test_a_machine_is_bounded(tenants: Begin) -> None:
    _service, red, _ = tenants(max_table_frames=_MOST >> 12, max_memory_bytes=1 << 30)
    vm = large_vm(red)
    replies = fill(red, vm, 40)
    problem = refusal(replies)
    assert problem["limit"] == "max_table_frames" and problem["limit_of"] == "machine"
    assert 4 <= len(replies) - 1 < _MOST // _PIECE
    assert red.get(f"{vm}/counters").json()["counters"]["memory_bytes"] <= _MOST
    # The refused call has changed nothing, and smaller ones go on.
    refused_at = (len(replies) - 1) * _PIECE
    assert red.get(f"{vm}/memory?gpa={refused_at:#x}&size=16").content == bytes(16)
    assert red.put(f"{vm}/memory?gpa=0", content=b"\x42" * 4096, headers=OCTETS).status_code == 204


def test_filling_with_one_byte_value_stays_within_the_memory_of_a_container(tenants: Begin) -> None:
    """The attack as it was seen, in the memory of the process alone: 64 MiB at a time, 64 KiB each on the wire."""
    service, red, _ = tenants(store="memory")
    vm = new_vm(red, memory_slots=[{"slot": 0, "gpa": 0, "size": 4 << 30}])
    body = zlib.compress(b"\x41" * (64 * MIB), wbits=31)
    coded = {**OCTETS, "Content-Encoding": "gzip"}
    statuses = [
        red.put(f"{vm}/memory?gpa={piece * 64 * MIB:#x}", content=body, headers=coded).status_code for piece in range(8)
    ]
    assert set(statuses[4:]) == {429} and statuses[0] == 204
    assert service.peak() < 1 << 30


def test_images_of_zeros_cost_no_memory_and_others_go_on(tenants: Begin) -> None:
    """Some kilobytes that decode to 2 GiB, twice at a time, and an image of what is not zero beyond every limit."""
    service, red, blue = tenants(max_image_bytes=2 << 30, max_image_memory_bytes=256 * MIB)
    zeros = zstandard.compress(bytes(1 << 30)) * 2
    slot = {"slot": 0, "gpa": 0, "size": 1 << 40}
    places = [f"{new_vm(red, memory_slots=[slot])}/memory?format=raw" for _ in range(2)]
    coded = {**OCTETS, "Content-Encoding": "zstd"}
    mine = new_vm(blue, memory_slots=[{"slot": 0, "gpa": 0, "size": 1 << 20}])
    with ThreadPoolExecutor(2) as pool:
        loads = [pool.submit(red.put, place, content=zeros, headers=coded, timeout=300) for place in places]
        answered = 0
        while not any(load.done() for load in loads):
            assert blue.put(f"{mine}/memory?gpa=0", content=b"x", headers=OCTETS).status_code == 204
            answered += 1
    assert [load.result().status_code for load in loads] == [200, 200]
    assert answered > 2
    assert red.put(places[0], content=zeros + zstandard.compress(b"a"), headers=coded, timeout=300).status_code == 413
    endless = (b"\x41" * MIB for _ in range(1 << 20))
    problem = red.put(places[0], content=endless, headers=OCTETS, timeout=300).json()
    assert problem["limit"] == "max_image_memory_bytes"
    assert service.peak() < 1 << 30
    assert red.get(f"{places[0].partition('?')[0]}?gpa=0&size=16").content == bytes(16)


def test_a_tenant_is_bounded_over_all_its_machines(tenants: Begin) -> None:
    """Red fills one machine after the other; what is left is blue's, and what red deletes it may fill again."""
    _service, red, blue = tenants(max_memory_bytes=2 * _MOST)
    machines = []
    for _ in range(8):
        machines.append(large_vm(red))
        replies = fill(red, machines[-1], 3)
        if replies[-1].status_code != 204:
            break
    problem = refusal(replies)
    assert problem["limit"] == "max_memory_bytes" and problem["limit_of"] == "tenant"
    assert "this one has its part" in str(problem["detail"])
    held = sum(red.get(f"{vm}/counters").json()["counters"]["memory_bytes"] for vm in machines)
    assert held <= 2 * _MOST
    assert [reply.status_code for reply in fill(blue, large_vm(blue), 1)] == [204]
    for vm in machines:
        assert red.delete(vm).status_code == 204
    assert [reply.status_code for reply in fill(red, large_vm(red), 3)] == [204, 204, 204]


def test_what_is_in_the_store_counts_after_a_restart(tenants: Begin) -> None:
    service, red, _ = tenants(max_memory_bytes=2 * _MOST)
    machines = [large_vm(red), large_vm(red)]
    assert [reply.status_code for vm in machines for reply in fill(red, vm, 3)] == [204] * 6
    token = red.headers["Authorization"]
    service.kill()
    again, _, _ = tenants(max_memory_bytes=2 * _MOST)
    with again.client(token.removeprefix("Bearer ")) as same:
        assert refusal(fill(same, large_vm(same), 6))["limit"] == "max_memory_bytes"


def test_machines_that_nobody_uses_leave_the_memory(tenants: Begin) -> None:
    service, red, _ = tenants(max_loaded_bytes=_MOST, max_memory_bytes=1 << 30)
    machines = [large_vm(red) for _ in range(5)]
    for vm in machines:
        assert [reply.status_code for reply in fill(red, vm, 3)] == [204] * 3
    with service.client(service.token("green", "admin")[1]) as admin:
        while (reply := admin.get("/metrics")).status_code != 200:
            pass
    lines = [line for line in reply.text.splitlines() if line.startswith("subpage_frames{")]
    assert sum(float(line.rpartition(" ")[2]) for line in lines) * 4096 < 2 * _MOST
    for vm in machines:
        assert red.get(f"{vm}/memory?gpa=0&size=2").content == b"AA"


def test_the_defaults_fit_the_manifest() -> None:
    """What all limits together allow is below what deploy/kubernetes.yaml gives."""
    manifest = (Path(__file__).parents[2] / "deploy" / "kubernetes.yaml").read_text()
    assert "limits: {memory: 4Gi}" in manifest
    allowed = allowed_bytes(Settings())
    assert sum(allowed.values()) < 4 << 30
    assert {"max_body_memory_bytes", "max_held_body_bytes"} <= allowed.keys()


def test_limits_that_do_not_fit_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    limit = tmp_path / "memory.max"
    missing = tmp_path / "none"
    assert container_bytes((missing,)) is None
    for text, expected in (("max\n", None), ("9223372036854771712\n", None), (f"{2 << 30}\n", 2 << 30)):
        limit.write_text(text)
        assert container_bytes((missing, limit)) == expected
    with caplog.at_level("WARNING", "subpage"):
        warn_of_memory(Settings(), None)
        warn_of_memory(Settings(), 4 << 30)
        assert not caplog.messages
        warn_of_memory(Settings(max_memory_bytes=8 << 30), 4 << 30)
    (message,) = caplog.messages
    assert "the container has 4096 MiB" in message and "max_memory_bytes: 8192 MiB" in message
