"""A tool sets the bitmaps of a real policy, is asked about a real boot, and lets everything happen."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from service.settings import Settings
from tests.kvmi import kvmi_messages as kvmi
from tests.kvmi.kvmi_tool import listening
from tests.support import bodies, recorded
from tests.support.bodies import Body
from tests.support.http import replayed
from tests.support.server import Running, running
from tests.support.tools import Background

pytestmark = pytest.mark.jit

GIB = 1 << 30
POLICY = "kernel_control_data"
COUNTED = ("records", "writes", "violations", "page_granular_violations", "mmio", "exits", "stopped_at")


@pytest.fixture
def sockets(tmp_path: Path) -> Path:
    tmp_path.chmod(0o700)
    return tmp_path


@pytest.fixture
def service(sockets: Path) -> Iterator[Running]:
    with running(Settings(warm_up=False, kvmi_sockets=(f"unix:{sockets}",))) as started:
        yield started


def bitmaps() -> dict[int, int]:
    """What the policy leaves writable, by page."""
    found: dict[int, int] = {}
    for item in json.loads(recorded.policy(POLICY).read_bytes())["objects"]:
        first, size = int(item["gpa"], 16), item["size"]
        for place in range(first >> 7, (first + size - 1 >> 7) + 1):
            found[place >> 5] = found.get(place >> 5, 0xFFFF_FFFF) & ~(1 << (place & 31))
    return found


def test_always_continue_counts_as_allow(service: Running, sockets: Path) -> None:
    client = service.client
    document = {"spp": True, "memory_slots": [{"slot": 0, "gpa": 0, "size": GIB}]}
    boot = Body(recorded.trace("boot").read_bytes(), bodies.PARQUET)
    pages = sorted(bitmaps().items())
    made = [client.post("/v1/vms", json=document).headers["Location"] for _ in range(2)]
    entries = [{"gfn": gfn, "write_bitmap": bitmap} for gfn, bitmap in pages]
    reply = client.patch(f"{made[0]}/page-access", json={"entries": entries})
    assert reply.status_code == 200, reply.text
    allowed = replayed(client, made[0], boot, "on_violation=allow")
    assert client.put(f"{made[1]}/kvmi", json={"connect": f"unix:{sockets}/tool"}).status_code == 201
    with listening(sockets / "tool") as listener, listener.accept() as guest:
        for at in range(0, len(pages), 511):
            some = [(gfn << 12, bitmap) for gfn, bitmap in pages[at : at + 511]]
            guest.done("SET_PAGE_WRITE_BITMAP", kvmi.bitmap_list(*some))
        for vcpu in range(int.from_bytes(guest.done("GET_GUEST_INFO")[:4], "little")):
            guest.enable(vcpu, kvmi.PF)
        going = Background(lambda: replayed(client, made[1], boot, "on_violation=ask"))
        for _ in range(allowed["violations"]):
            fault = guest.event(kvmi.PF)
            assert fault.fault[2] == 2
            guest.answer(fault, kvmi.CONTINUE)
        asked = going.result()
        assert guest.done("GET_MAX_GFN") == struct.pack("<Q", GIB >> 12)
    assert {name: asked[name] for name in COUNTED} == {name: allowed[name] for name in COUNTED}
    assert allowed["violations"] == 2550
