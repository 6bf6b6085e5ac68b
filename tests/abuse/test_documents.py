"""JSON documents of few bytes and many values: bounded before anything is made of them."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import httpx2
import pytest
import zstandard

from service.http.limits import Held, HeldBodies
from service.runtime.shares import ShareExceeded
from service.settings import MIB
from tests.abuse.conftest import Begin, Tenants
from tests.support.http import new_vm
from tests.support.waiting import until

_CODED = {"Content-Type": "application/json", "Content-Encoding": "zstd"}
_MILLIONS = 11_000_000

# Bodies below max_document_bytes that would be gigabytes of objects.
BOMBS = {
    "protections": ("POST", "/protections", b'{"name":"a","objects":[', b"{},"),
    "ranges": ("PATCH", "/subpages", b'{"ranges":[', b"{},"),
    "bitmaps": ("PUT", "/subpages?gfn=0", b'{"access":[', b"0,"),
    "entries": ("PATCH", "/page-access", b'{"entries":[', b"[],"),
    "msrs": ("PUT", "/vcpus/0/msrs", b'{"msrs":[', b"[],"),
    "nested state": ("PUT", "/vcpus/0/nested-state", b'{"vmx":[', b"[],"),
    "segments": ("POST", "/ioctls/KVM_CHECK_EXTENSION", b'{"memory":[', b"{},"),
}


def bomb(before: bytes, item: bytes, count: int) -> bytes:
    return zstandard.compress(before + item * count + item[:-1] + b"]}")


@pytest.mark.parametrize("name", BOMBS)
def test_lists_of_millions(shared: Tenants, name: str) -> None:
    service, red, _ = shared
    vm = new_vm(red)
    before = service.forget()
    method, path, beginning, item = BOMBS[name]
    reply = red.request(method, vm + path, content=bomb(beginning, item, _MILLIONS), headers=_CODED)
    assert reply.status_code == 413, reply.text
    assert service.peak() - before < 160 * MIB
    assert red.get(vm).status_code == 200


def test_members_by_the_million(shared: Tenants) -> None:
    """Unknown ones, and those of a map; each was listed as a fault."""
    service, red, _ = shared
    before = service.forget()
    unknown = ",".join(f'"k{n}":0' for n in range(1_000_000))
    for body in (f"{{{unknown}}}", f'{{"host":{{"vmx_capabilities":{{{unknown}}}}}}}'):
        reply = red.post("/v1/vms", content=zstandard.compress(body.encode()), headers=_CODED)
        assert reply.status_code == 413, reply.text
    assert service.peak() - before < 160 * MIB


def test_faults_are_not_listed_without_end(shared: Tenants) -> None:
    """As many as the bound on values lets through: told in a short reply, with the first or how many they are."""
    service, red, _ = shared
    vm = new_vm(red)
    before = service.forget()
    ranges = b'{"ranges":[' + b",".join([b"{}"] * 60_000) + b"]}"
    unknown = b"{" + b",".join(b'"k%d":0' % n for n in range(200_000)) + b"}"
    for method, path, body in (("PATCH", "/subpages", ranges), ("PATCH", "/page-access", unknown)):
        reply = red.request(method, vm + path, content=body, headers={"Content-Type": "application/json"})
        assert reply.status_code == 422 and len(reply.content) < 40_000
    assert service.peak() - before < 300 * MIB


def test_held_bodies_are_counted_for_each_tenant() -> None:
    bodies = HeldBodies(16 * MIB)
    first, second, other = Held(bodies, "red"), Held(bodies, "red"), Held(bodies, "blue")
    first.grow(1000)
    first.grow(6 * MIB)
    with pytest.raises(ShareExceeded) as refused:
        second.grow(3 * MIB)
    assert refused.value.members == {"limit": "max_held_body_bytes", "limit_of": "tenant"}
    other.grow(8 * MIB)
    second.grow(2 * MIB)
    with pytest.raises(ShareExceeded) as refused:
        Held(bodies, "green").grow(1 * MIB)
    assert refused.value.members["limit_of"] == "service"
    for held in (first, second, second):
        held.release()
    second.grow(8 * MIB)


@pytest.mark.abuse
def test_bodies_that_are_held_are_bounded(tenants: Begin) -> None:
    """One tenant's may take half of what there is, and those of another still come in."""
    _, red, blue = tenants(max_held_body_bytes=16 * MIB, max_document_bytes=6 * MIB, body_timeout=120)
    vm, other = new_vm(red), new_vm(blue)
    arrived, done, answers = threading.Semaphore(0), threading.Event(), list[httpx2.Response]()

    def held() -> Iterator[bytes]:
        yield b" " * (3 * MIB)
        arrived.release()
        done.wait(120)

    def hold() -> None:
        """Sent is not yet read: one that comes second is refused itself, and tries again."""
        while not done.is_set():
            answers.append(red.patch(f"{vm}/subpages", content=held(), headers={"Content-Type": "application/json"}))

    threads = [threading.Thread(target=hold) for _ in range(2)]
    for thread in threads:
        thread.start()
    assert all(arrived.acquire(timeout=60) for _ in threads)
    document = {
        "ranges": [{"gfn": 0, "access": "0x0"}],
    }
    large = b" " * (3 * MIB) + b'{"ranges": [{"gfn": 0, "access": "0x0"}]}'
    headers = {"Content-Type": "application/json"}
    try:
        until(
            lambda: all(red.patch(f"{vm}/subpages", content=large, headers=headers).status_code == 429 for _ in "abc")
        )
        assert {answer.status_code for answer in answers} <= {429}, answers
        refused = red.patch(f"{vm}/subpages", content=large, headers=headers).json()
        assert {"limit": "max_held_body_bytes", "limit_of": "tenant"}.items() <= refused.items()
        assert red.patch(f"{vm}/subpages", json=document).status_code == 204
        assert blue.patch(f"{other}/subpages", content=large, headers=headers).status_code == 204
    finally:
        done.set()
        for thread in threads:
            thread.join()
    assert red.patch(f"{vm}/subpages", content=large, headers=headers).status_code == 204
