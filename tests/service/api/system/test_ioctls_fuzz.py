"""Whatever is sent to an ioctl, the answer is an answer: never an internal error, and a refusal changes nothing."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.ioctls import IOCTLS
from service.settings import MIB
from tests.contract.client import ContractClient
from tests.support.ioctls import PROFILES
from tests.support.server import Running

NAMES = sorted(IOCTLS.names - {"KVM_CREATE_VM"})
FAILED = -1

bytes_in = st.one_of(st.none(), st.binary(max_size=40), st.binary(min_size=272, max_size=300))
words = st.one_of(st.integers(0, 8), st.integers(0, (1 << 64) - 1))
structures = st.builds(
    lambda parts: b"".join(part.to_bytes(8, "little") for part in parts), st.lists(words, max_size=6)
)


@pytest.fixture(scope="module")
def machines(service: Running) -> Iterator[dict[str, str]]:
    """A machine of each profile with SPP on and a logged slot."""
    made: dict[str, str] = {}
    for profile in PROFILES:
        slot = {"slot": 0, "gpa": 0, "size": MIB, "log_dirty": True}
        body = {"profile": profile, "spp": True, "memory_slots": [slot]}
        made[profile] = service.client.post("/v1/vms", json=body).headers["Location"]
    yield made
    for url in made.values():
        service.client.delete(url)


def shown(client: ContractClient, url: str) -> tuple[Any, ...]:
    """What calls can change."""
    vm = client.get(url).json()
    window = client.get(f"{url}/subpages", params={"gfn": 0, "npages": 256})
    return vm["memory_slots"], vm["vcpus"], vm["spp"], window.content


@settings(max_examples=150, deadline=None)
@given(
    profile=st.sampled_from(PROFILES),
    level=st.sampled_from(["", "/vcpus/0"]),
    name=st.sampled_from(NAMES),
    data=st.one_of(bytes_in, structures),
    arg=words,
    segment=st.one_of(st.none(), st.tuples(words, st.binary(max_size=64))),
    read_only=st.booleans(),
)
def test_any_call_has_an_answer(
    service: Running,
    machines: dict[str, str],
    profile: str,
    level: str,
    name: str,
    data: bytes | None,
    arg: int,
    segment: tuple[int, bytes] | None,
    read_only: bool,
) -> None:
    url = machines[profile]
    body: dict[str, Any] = {"arg": hex(arg), "read_only": read_only}
    if data is not None:
        body["data"] = data.hex()
    if segment is not None:
        body["memory"] = [{"addr": hex(segment[0]), "data": segment[1].hex()}]
    before = shown(service.client, url)
    reply = service.client.post(f"{url}{level}/ioctls/{name}", json=body)
    if reply.status_code == 422:
        assert segment is not None and segment[0] + len(segment[1]) > 1 << 64
        return
    assert reply.status_code == 200
    told = reply.json()
    assert (told["errno"] is not None) == (told["return"] == FAILED)
    assert len(told["memory"]) == (segment is not None)
    if told["errno"] in ("ENOTTY", "EINVAL", "EEXIST", "ENODEV", "ENOENT"):
        assert shown(service.client, url) == before


@settings(max_examples=60, deadline=None)
@given(profile=st.sampled_from(PROFILES), name=st.sampled_from(NAMES), data=st.binary(max_size=64), arg=words)
def test_any_octets_come_back(
    service: Running, machines: dict[str, str], profile: str, name: str, data: bytes, arg: int
) -> None:
    octets = {"Content-Type": "application/octet-stream"}
    url = f"{machines[profile]}/ioctls/{name}"
    reply = service.client.post(url, content=data, headers=octets, params={"arg": str(arg)})
    assert reply.status_code == 200
    assert len(reply.content) == len(data)
    assert ("X-KVM-Errno" in reply.headers) == (reply.headers["X-KVM-Return"] == "-1")
