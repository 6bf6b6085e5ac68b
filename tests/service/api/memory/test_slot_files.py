"""Slots with files behind them, over HTTP."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from service.settings import MIB, Settings
from tests.support.http import OCTETS, new_vm
from tests.support.server import Running, running
from tests.support.stores import serving

GIB = 1 << 30
PAGE = 4096


@pytest.fixture
def ram(tmp_path: Path) -> Path:
    path = tmp_path / "ram"
    path.write_bytes(b"".join(bytes([n]) * PAGE for n in range(64)))
    return path


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Running]:
    with running(Settings(warm_up=False, memory_files=(tmp_path,))) as service:
        yield service


def test_a_slot_shows_its_file_and_what_was_written_over_it(service: Running, ram: Path) -> None:
    client = service.client
    vm = new_vm(client, memory_slots=[])
    url = f"{vm}/memory-slots/0"
    slot = {"gpa": "0x100000", "size": 32 * PAGE, "backing": {"file": str(ram), "offset": 16 * PAGE}}
    reply = client.put(url, json=slot)
    assert reply.status_code == 201, reply.text
    backing = reply.json()["backing"]
    assert backing.pop("modified").startswith("20")
    assert backing == {"file": str(ram), "offset": "0x10000", "size": 64 * PAGE, "state": "attached", "reason": None}
    assert client.get(vm).json()["memory_slots"] == [reply.json()]
    assert client.get(f"{vm}/memory?gpa=0x101ffe&size=4").content == b"\x11\x11\x12\x12"
    assert client.put(f"{vm}/memory?gpa=0x101fff&size=1", content=b"!", headers=OCTETS).status_code == 204
    assert client.get(f"{vm}/memory?gpa=0x101ffe&size=4").content == b"\x11!\x12\x12"
    assert ram.read_bytes()[17 * PAGE : 18 * PAGE] == b"\x11" * PAGE
    assert client.put(url, json={**slot, "log_dirty": True}).json()["log_dirty"] is True
    refused = client.put(url, json={**slot, "backing": None})
    assert refused.status_code == 422 and "keeps the file behind it" in refused.json()["rule"]
    ram.write_bytes(b"?" * 64 * PAGE)
    assert client.get(url).json()["backing"]["state"] == "changed"
    again = client.put(url, json=slot)
    assert again.status_code == 200 and again.json()["backing"]["state"] == "attached"
    assert client.get(f"{vm}/memory?gpa=0x101ffe&size=4").content == b"\x11!??"


def test_a_machine_may_begin_with_files(service: Running, ram: Path) -> None:
    slots = [
        {"slot": 0, "gpa": 0, "size": PAGE, "backing": {"file": str(ram)}},
        {"slot": 1, "gpa": PAGE, "size": PAGE, "backing": {"file": str(ram), "offset": 63 * PAGE}},
    ]
    vm = new_vm(service.client, memory_slots=slots)
    assert service.client.get(f"{vm}/memory?gpa=0xfff&size=2").content == b"\0\x3f"


@pytest.mark.parametrize(
    ("backing", "size", "field", "says"),
    [
        ({"file": "/etc/passwd"}, PAGE, "backing.file", "below"),
        ({"file": "{}/none"}, PAGE, "backing.file", "must exist: No such file or directory"),
        ({"file": "{}/ram"}, 65 * PAGE, "backing.file", "must have 0x41000 bytes or more"),
        ({"file": "{}/ram", "offset": 63 * PAGE}, 2 * PAGE, "backing.file", "it has 0x40000"),
        ({"file": "{}/ram", "offset": 512}, PAGE, "backing.offset", "multiple of 4096"),
        ({"file": "{}/ram", "offset": "0xfffffffffffff000"}, PAGE, "backing.offset", "multiple of 4096, at most 2^62"),
        ({"file": "{}/ram", "offset": -4096}, PAGE, "backing.offset", ""),
        ({"file": ""}, PAGE, "backing.file", ""),
        ({"file": "{}/" + "x" * 4096}, PAGE, "backing.file", ""),
        ({"file": 3}, PAGE, "backing.file", ""),
        ({"offset": 0}, PAGE, "backing.file", ""),
        ({"file": "{}/ram", "write": True}, PAGE, "backing.write", ""),
    ],
)
def test_bad_files_are_refused(
    service: Running, ram: Path, backing: dict[str, object], size: int, field: str, says: str
) -> None:
    client = service.client
    vm = new_vm(client, memory_slots=[])
    told = {name: value.format(ram.parent) if isinstance(value, str) else value for name, value in backing.items()}
    reply = client.put(f"{vm}/memory-slots/0", json={"gpa": 0, "size": size, "backing": told})
    assert reply.status_code == 422 and reply.json()["field"] == field, reply.text
    assert says in reply.json().get("rule", "")
    assert client.get(f"{vm}/memory-slots").json()["memory_slots"] == []


def test_by_default_there_are_none(ram: Path) -> None:
    with running() as service:
        vm = new_vm(service.client)
        reply = service.client.put(
            f"{vm}/memory-slots/1", json={"gpa": GIB, "size": PAGE, "backing": {"file": str(ram)}}
        )
        assert reply.status_code == 422 and "memory_files lists no directory" in reply.json()["rule"]


def test_a_file_that_became_shorter_is_told_and_changes_nothing(service: Running, ram: Path) -> None:
    client = service.client
    vm = new_vm(client, memory_slots=[{"slot": 0, "gpa": 0, "size": 64 * PAGE, "backing": {"file": str(ram)}}])
    revision = client.get(vm).json()["revision"]
    os.truncate(ram, 16 * PAGE)
    calls = [
        client.get(f"{vm}/memory?gpa=0x10000&size=1"),
        client.put(f"{vm}/memory?gpa=0x20001&size=1", content=b"x", headers=OCTETS),
    ]
    for reply in calls:
        assert reply.status_code == 409 and reply.json()["code"] == "conflict", reply.text
        assert "PUT the slot again" in reply.json()["rule"]
    assert client.get(vm).json()["revision"] == revision
    assert client.get(f"{vm}/memory?gpa=0xffff&size=1").content == b"\x0f"


def test_attached_again_after_a_restart(store_url: str, ram: Path, tmp_path: Path) -> None:
    slot = {"slot": 0, "gpa": 0, "size": 64 * PAGE, "backing": {"file": str(ram)}}
    with serving(store_url, memory_files=(tmp_path,)) as service:
        vm = new_vm(service.client, memory_slots=[slot])
        service.client.put(f"{vm}/memory?gpa=0x1000&size=4", content=b"ours", headers=OCTETS)
        before = service.client.get(vm).json()
    with serving(store_url, memory_files=(tmp_path,)) as service:
        listed = service.client.get("/v1/vms").json()["vms"][0]["memory_slots"][0]["backing"]
        assert listed["state"] is None, "it has not been looked at"
        assert service.client.get(vm).json() == before
        assert service.client.get(f"{vm}/memory?gpa=0x1002&size=4").content == b"rs\x01\x01"
    ram.rename(tmp_path / "elsewhere")
    with serving(store_url, memory_files=(tmp_path,)) as service:
        client = service.client
        backing = client.get(f"{vm}/memory-slots/0").json()["backing"]
        assert (backing["state"], backing["reason"]) == ("missing", "must exist: No such file or directory")
        assert client.get(f"{vm}/memory?gpa=0x1000&size=4").content == b"ours", "what was written is here"
        assert client.get(f"{vm}/memory?gpa=0x2000&size=4").status_code == 409
        trace = client.post(f"{vm}/traces", json={"accesses": [{"gpa": 0x3000}]})
        assert trace.status_code == 201, "a replay reads no contents"
        (tmp_path / "elsewhere").rename(ram)
        assert (
            client.put(f"{vm}/memory-slots/0", json={k: v for k, v in slot.items() if k != "slot"}).status_code == 200
        )
        assert client.get(f"{vm}/memory?gpa=0x2000&size=1").content == b"\x02"
    with serving(store_url) as service:
        reason = service.client.get(f"{vm}/memory-slots/0").json()["backing"]["reason"]
        assert reason == "no file may be behind a slot: memory_files lists no directory"


def test_64_gib_cost_nothing(service: Running, tmp_path: Path) -> None:
    large = tmp_path / "large"
    with large.open("wb") as stream:
        stream.truncate(64 * GIB)
        stream.seek(50 * GIB)
        stream.write(b"far")
    client = service.client
    vm = new_vm(client, memory_slots=[{"slot": 0, "gpa": 0, "size": 64 * GIB, "backing": {"file": str(large)}}])
    assert client.get(f"{vm}/counters").json()["counters"]["memory_bytes"] < MIB // 16
    assert client.get(f"{vm}/memory?gpa={50 * GIB:#x}&size=4").content == b"far\0"
    assert client.get(f"{vm}/memory?gpa={1 * GIB:#x}&size={8 * MIB}").content == bytes(8 * MIB)
