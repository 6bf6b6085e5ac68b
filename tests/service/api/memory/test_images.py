"""Memory images over HTTP: of any length, whole or not at all, and counted by what is not zero."""

from __future__ import annotations

import gzip
from collections.abc import Callable, Iterator

import pytest
import zstandard

from service.settings import MIB, Settings
from tests.contract.client import ContractClient
from tests.support.http import OCTETS
from tests.support.images import elf_core, lime, qemu_note
from tests.support.server import running

PAGE = 4096
LONG = {"cr0": 0x80050033, "cr3": 0x1234000, "cr4": 0x6F0, "rip": 0xFFFFFFFF81000000}


def pieces(data: bytes, size: int = 100_000) -> Iterator[bytes]:
    """For a chunked body."""
    for at in range(0, len(data), size):
        yield data[at : at + size]


def frames(client: ContractClient, vm: str) -> int:
    return int(client.get(f"{vm}/counters").json()["counters"]["frames_memory"])


def test_a_core_is_loaded_and_says_its_registers(vm: str, client: ContractClient) -> None:
    client.put(f"{vm}/memory?gpa=0x1000", content=b"old", headers=OCTETS)
    image = elf_core([(0, b"a" * PAGE + bytes(PAGE)), (0x100000, b"b" * 100)], qemu_note(LONG))
    reply = client.put(f"{vm}/memory?format=auto", content=image, headers=OCTETS)
    assert reply.status_code == 200, reply.text
    found = reply.json()
    (vcpu,) = found.pop("vcpus")
    assert found == {
        "format": "elf",
        "bytes": 2 * PAGE + 100,
        "pages_kept": 2,
        "ranges": [{"gpa": "0x0", "size": "0x2000"}, {"gpa": "0x100000", "size": "0x64"}],
    }
    assert (vcpu["vcpu"], vcpu["cr3"], vcpu["efer"], vcpu["rip"]) == (0, "0x1234000", "0xd00", "0xffffffff81000000")
    assert client.get(f"{vm}/memory?gpa=0xfff&size=0x1001").content == b"a" + bytes(PAGE)
    assert client.get(f"{vm}/memory?gpa=0x100063&size=2").content == b"b\0"


@pytest.mark.parametrize("coding", ["identity", "gzip", "zstd"])
def test_bodies_may_be_chunked_and_coded(vm: str, client: ContractClient, coding: str) -> None:
    image = lime((0x3000, b"x" * 9000), (0x800000, bytes(MIB) + b"y"))
    body = {"identity": bytes, "gzip": gzip.compress, "zstd": zstandard.compress}[coding](image)
    headers = {**OCTETS, "Content-Encoding": coding}
    reply = client.put(f"{vm}/memory?format=lime", content=pieces(body, 5000), headers=headers)
    assert reply.status_code == 200 and reply.json()["pages_kept"] == 4
    assert client.get(f"{vm}/memory?gpa=0x900000&size=1").content == b"y"


def test_an_image_may_be_larger_than_a_window_and_mostly_zeros() -> None:
    """A body that decodes to 30,000 times what is sent: it costs what is not zero."""
    settings = Settings(warm_up=False, max_memory_window=MIB, max_document_bytes=MIB, max_table_frames=200)
    with running(settings) as service:
        client = service.client
        slot = {"slot": 0, "gpa": 0, "size": 128 * MIB}
        vm = client.post("/v1/vms", json={"memory_slots": [slot]}).headers["Location"]
        image = zstandard.compress(bytes(100 * MIB) + b"end")
        assert len(image) < 20_000
        headers = {**OCTETS, "Content-Encoding": "zstd"}
        reply = client.put(f"{vm}/memory?format=raw&gpa=0x1000", content=image, headers=headers)
        assert reply.status_code == 200 and reply.json()["pages_kept"] == 1
        assert client.get(f"{vm}/memory?gpa={100 * MIB + 0x1000:#x}&size=3").content == b"end"
        # Frames beyond max_table_frames are an image's own; those of others stay as many as they were.
        reply = client.put(f"{vm}/memory?format=raw", content=b"a" * 4 * MIB, headers=OCTETS)
        assert reply.status_code == 200 and reply.json()["pages_kept"] == 1024
        assert client.put(f"{vm}/memory?gpa=0x2000000", content=b"b" * 100 * PAGE, headers=OCTETS).status_code == 204
        refused = client.put(f"{vm}/memory?gpa=0x3000000", content=b"b" * 120 * PAGE, headers=OCTETS)
        assert refused.status_code == 429 and refused.json()["limit"] == "max_table_frames"


@pytest.mark.parametrize(
    ("query", "content", "status", "field", "says"),
    [
        ("format=elf", b"", 422, "body", "ends at byte 0"),
        ("format=auto", b"", 422, "body", "must not be empty"),
        ("format=raw&gpa=0xfff000", b"a" * 5000, 422, "body", "byte 4096 of it is for GPA 0x1000000"),
        ("format=lime", lime((0, b"a" * PAGE))[:-1], 422, "body", "ends at byte 4127"),
        ("format=auto", lime((0, b"a"), (0, b"b")), 422, "body", "must not overlap"),
        ("format=elf&gpa=0", elf_core([(0, b"a")]), 422, "gpa", "goes with raw images"),
        ("format=elf", elf_core([(0, b"a")], machine=40), 422, "body", "x86"),
        ("format=raw&size=1", b"a", 422, "size", "not with an image"),
        ("format=vmss", b"a", 422, "format", ""),
        ("format=raw&gpa=0x10000000000000", b"a", 422, "gpa", "below 2^52"),
        ("size=1", b"a", 422, "gpa", "is required"),
    ],
)
def test_refused_images_change_nothing(
    vm: str, client: ContractClient, query: str, content: bytes, status: int, field: str, says: str
) -> None:
    before, revision = frames(client, vm), client.get(vm).json()["revision"]
    reply = client.put(f"{vm}/memory?{query}", content=content, headers=OCTETS)
    assert reply.status_code == status and reply.json()["field"] == field, reply.text
    assert says in reply.json()["rule"]
    assert (frames(client, vm), client.get(vm).json()["revision"]) == (before, revision)


def test_cut_and_wrong_codings_are_told(vm: str, client: ContractClient) -> None:
    whole = zstandard.compress(b"a" * PAGE)
    headers = {**OCTETS, "Content-Encoding": "zstd"}
    assert client.put(f"{vm}/memory?format=raw", content=whole[:-3], headers=headers).status_code == 400
    reply = client.put(f"{vm}/memory?format=auto", content=whole, headers=OCTETS)
    assert reply.status_code == 422 and "Content-Encoding: zstd" in reply.json()["rule"]
    reply = client.put(f"{vm}/memory?format=raw", content=b"a", headers={"Content-Type": "text/plain"})
    assert reply.status_code == 415
    assert frames(client, vm) == 0


def test_entity_tags_are_those_of_the_machine(make_vm: Callable[..., str], client: ContractClient) -> None:
    vm = make_vm(require_match=True)
    url = f"{vm}/memory?format=raw"
    assert client.put(url, content=b"1234", headers=OCTETS).status_code == 428
    assert client.put(url, content=b"1234", headers={**OCTETS, "If-Match": '"x"'}).status_code == 412
    tag = client.get(vm).headers["ETag"]
    assert client.put(url, content=b"1234", headers={**OCTETS, "If-Match": tag}).status_code == 200
    assert client.put(url, content=b"1234", headers={**OCTETS, "If-Match": tag}).status_code == 412


def test_limits_of_images() -> None:
    settings = Settings(
        warm_up=False, max_image_bytes=MIB, max_table_frames=100, max_image_memory_bytes=MIB // 2, max_memory_bytes=MIB
    )
    with running(settings) as service:
        client = service.client
        vm = client.post("/v1/vms", json={"memory_slots": [{"slot": 0, "gpa": 0, "size": 8 * MIB}]}).headers["Location"]
        url = f"{vm}/memory?format=raw"
        for content in (bytes(MIB + 1), pieces(bytes(MIB + 1))):
            assert client.put(url, content=content, headers=OCTETS).status_code == 413
        coded = {**OCTETS, "Content-Encoding": "zstd"}
        bomb = zstandard.compress(bytes(MIB + 1))
        assert client.put(url, content=bomb, headers=coded).status_code == 413
        assert client.put(url, content=bytes(MIB), headers=OCTETS).json()["pages_kept"] == 0
        reply = client.put(url, content=b"a" * (MIB - PAGE), headers=OCTETS)
        assert reply.status_code == 429
        assert (reply.json()["limit"], reply.json()["limit_of"]) == ("max_image_memory_bytes", "machine")
        assert frames(client, vm) == 0
        assert client.put(url, content=b"a" * (MIB // 2), headers=OCTETS).status_code == 200
        # What it takes is counted among what all machines may take.
        other = client.post("/v1/vms", json={"memory_slots": [{"slot": 0, "gpa": 0, "size": MIB}]}).headers["Location"]
        reply = client.put(f"{other}/memory?format=raw", content=b"a" * (MIB // 2), headers=OCTETS)
        assert reply.status_code == 429 and reply.json()["limit"] == "max_memory_bytes"
        assert frames(client, other) == 0


def test_whoever_leaves_has_changed_nothing(make_vm: Callable[..., str], client: ContractClient) -> None:
    """And the machine and its memory are free again."""
    vm = make_vm(memory_slots=[{"slot": 0, "gpa": 0, "size": 64 * MIB}])

    def cut() -> Iterator[bytes]:
        yield from pieces(b"a" * 20 * MIB, MIB)
        raise InterruptedError

    with pytest.raises(InterruptedError):
        client.put(f"{vm}/memory?format=raw", content=cut(), headers=OCTETS)
    reply = client.put(f"{vm}/memory?format=raw&gpa=0x1000", content=b"b" * PAGE, headers=OCTETS)
    assert reply.status_code == 200, "it waited until the first one had been given up"
    assert frames(client, vm) == 1 and client.get(f"{vm}/memory?gpa=0&size=1").content == b"\0"


def test_only_an_image_is_answered_with_a_document(vm: str, client: ContractClient) -> None:
    octets = {**OCTETS, "Accept": "application/octet-stream"}
    assert client.put(f"{vm}/memory?gpa=0", content=b"a", headers=octets).status_code == 204
    assert client.put(f"{vm}/memory?format=raw", content=b"b", headers=octets).status_code == 406
    assert client.get(f"{vm}/memory?gpa=0&size=1").content == b"a"
