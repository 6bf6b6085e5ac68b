"""Machines and tools over a real socket: what tools do end to end, and what ends it."""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from service.security.tokens import MemoryTokens, TokenScope, mint
from service.settings import Settings
from tests.contract.client import ContractClient
from tests.kvmi import kvmi_messages as kvmi
from tests.kvmi.kvmi_tool import Guest, Listening, listening
from tests.support.http import access, new_vm, store
from tests.support.server import Running, running
from tests.support.tools import Background, tool, trace
from tests.support.waiting import until

READ_ONLY = 5


@pytest.fixture(scope="module")
def sockets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory that is for the service alone, of a short name."""
    place = tmp_path_factory.mktemp("kvmi")
    place.chmod(0o700)
    return place


@pytest.fixture(scope="module")
def service(sockets: Path) -> Iterator[Running]:
    with running(Settings(warm_up=False, kvmi_sockets=(f"unix:{sockets}",))) as started:
        yield started


@pytest.fixture
def listener(sockets: Path) -> Iterator[Listening]:
    with listening(sockets / "tool") as found:
        yield found


@pytest.fixture
def vm(make_vm: Callable[..., str], client: ContractClient) -> Iterator[str]:
    """A machine that looks for no tool any more when the next one does."""
    url = make_vm(vcpus=[{"id": 0}, {"id": 5}])
    yield url
    client.delete(f"{url}/kvmi")


def attach(client: ContractClient, vm: str, listener: Listening, **members: Any) -> dict[str, Any]:
    reply = client.put(f"{vm}/kvmi", json={"connect": f"unix:{listener.path}", "reconnect": 0.1, **members})
    assert reply.status_code in (200, 201), reply.text
    found: dict[str, Any] = reply.json()
    return found


def state(client: ContractClient, vm: str) -> dict[str, Any]:
    found: dict[str, Any] = client.get(f"{vm}/kvmi").json()
    return found


@pytest.fixture
def guest(client: ContractClient, vm: str, listener: Listening) -> Iterator[Guest]:
    """A machine with a tool, ready to be used."""
    attach(client, vm, listener)
    with listener.accept() as found:
        found.done("GET_VERSION")
        yield found


def page(client: ContractClient, vm: str, gfn: int) -> tuple[str, int]:
    [found] = client.get(f"{vm}/page-access", params={"gfn": gfn}).json()["pages"]
    return found["access"], int(found["write_bitmap"], 16)


def write(client: ContractClient, vm: str, gpa: int, **members: Any) -> Background:
    body = {"gpa": hex(gpa), "data": "aa" * 8, "on_violation": "ask", **members}
    return Background(lambda: client.post(f"{vm}/accesses", json=body))


def replaying(client: ContractClient, vm: str, rows: list[int]) -> Background:
    return Background(lambda: client.post(f"{vm}/traces", params={"on_violation": "ask"}, json=trace(rows)))


def stored(client: ContractClient, vm: str, gpa: int) -> bytes:
    return bytes(client.get(f"{vm}/memory", params={"gpa": hex(gpa), "size": 8}).content)


# ---- what tools do


def test_hookguest(client: ContractClient, vm: str, listener: Listening) -> None:
    """Its whole run: pause, 20 pages, events, a violation, the page opened and RETRY, a bitmap, and its end."""
    shown = attach(client, vm, listener, name="guest of mine")
    with listener.accept() as guest:
        assert (guest.size, guest.name, guest.max_gpa) == (104, "guest of mine", 16 << 20)
        assert guest.uuid.hex() == shown["uuid"].replace("-", "")
        assert guest.done("GET_VERSION") == struct.pack("<II5B3x", 1, 0, 1, 0, 0, 0, 1)
        assert guest.done("GET_GUEST_INFO")[:4] == b"\2\0\0\0"
        first, second = guest.pause_all(2)
        assert (first.mode, first.vcpu, second.vcpu) == (8, 0, 1)
        assert guest.done("GET_MAX_GFN") == struct.pack("<Q", 0x1000)
        for gfn in range(1, 21):
            guest.restrict(gfn, READ_ONLY)
        for event in (first, second):
            guest.enable(event.vcpu, kvmi.CR, kvmi.MSR, kvmi.PF)
            guest.done("CONTROL_CR", kvmi.vcpu(event.vcpu) + kvmi.register_switch(4, True))
            guest.done("CONTROL_MSR", kvmi.vcpu(event.vcpu) + kvmi.register_switch(0xC000_0081, True))
            guest.answer(event, kvmi.CONTINUE)
        assert page(client, vm, 20) == ("r-x", 0)
        going = write(client, vm, 0x1008, vcpu=5)
        fault = guest.event(kvmi.PF)
        assert (fault.vcpu, fault.fault) == (1, ((1 << 64) - 1, 0x1008, 2))
        # The faulting address as it is: it need not be that of the page.
        guest.done("SET_PAGE_ACCESS", kvmi.access_list((0x1008, 7)))
        guest.answer(fault, kvmi.RETRY)
        assert going.result().json()["landed"] and stored(client, vm, 0x1008) == b"\xaa" * 8
        guest.done("SET_PAGE_WRITE_BITMAP", kvmi.bitmap_list((0x2000, 0xFFFF_0000)))
        assert page(client, vm, 2) == ("r-x", 0xFFFF_0000)
        assert access(client, vm, gpa="0x2800", on_violation="ask")["allowed"]
        going = write(client, vm, 0x2000)
        fault = guest.event(kvmi.PF)
        assert fault.fault[1:] == (0x2000, 2)
        guest.answer(fault, kvmi.CONTINUE)
        assert going.result().json()["landed"]
        found = state(client, vm)
        assert (found["state"], found["restricted_pages"], found["silent_because"]) == ("connected", 19, None)
        assert found["events"] == 4 and found["connected"] is not None
    until(lambda: page(client, vm, 20) == ("rwx", 0xFFFF_FFFF))
    assert page(client, vm, 2) == ("rwx", 0xFFFF_FFFF)


def test_memory_and_registers(client: ContractClient, vm: str, guest: Guest) -> None:
    """What LibVMI reads at its beginning: the paging mode, then pages."""
    cr3 = client.put(f"{vm}/vcpus/5/vmcs", json={"cr3": "0x1aa000"})
    assert cr3.status_code == 200, cr3.text
    wanted = struct.pack("<H6x3I", 3, 0x174, 0xC000_0080, 0xC000_0082)
    found = guest.done("GET_REGISTERS", kvmi.vcpu(1) + wanted)
    assert len(found) == 472 + 3 * 16 and found[0] == 8
    sregs = found[152 : 152 + 312]
    assert struct.unpack_from("<Q", sregs, 240) == (0x1AA000,)
    efer = struct.unpack_from("<Q", sregs, 264)
    assert struct.unpack_from("<IIQ", found, 472 + 16) == (0xC000_0080, 0, *efer)
    store(client, vm, 0x3000, bytes(range(256)) * 16)
    assert guest.done("READ_PHYSICAL", kvmi.span(0x3000, 4096)) == bytes(range(256)) * 16
    guest.done("WRITE_PHYSICAL", kvmi.span(0x3FF8, 8) + b"subpage!")
    assert stored(client, vm, 0x3FF8) == b"subpage!"
    assert guest.call("READ_PHYSICAL", kvmi.span(16 << 20, 8)).error == kvmi.ENOENT
    assert guest.call("GET_CPUID", kvmi.vcpu(0) + bytes(8)).error == kvmi.ENOENT


def test_crash_ends_the_replay(client: ContractClient, vm: str, guest: Guest) -> None:
    guest.restrict(5, READ_ONLY)
    guest.enable(0, kvmi.PF)
    going = Background(
        lambda: client.post(
            f"{vm}/traces", params={"on_violation": "ask"}, json=trace([0x5000, 0x6000, 0x5008, 0x7000])
        )
    )
    guest.answer(guest.event(kvmi.PF), kvmi.CONTINUE)
    guest.answer(guest.event(kvmi.PF), kvmi.CRASH)
    result = going.result().json()
    assert (result["stopped_at"], result["violations"]) == (2, 2)
    assert client.get(vm).status_code == 200


def test_a_step_is_a_record(client: ContractClient, vm: str, guest: Guest) -> None:
    """LibVMI lifts the restriction, steps, and restricts again: each record asks."""
    guest.restrict(5, READ_ONLY)
    guest.enable(0, kvmi.PF, kvmi.SINGLESTEP)
    going = replaying(client, vm, [0x5000, 0x5008, 0x5010])
    for gpa in (0x5000, 0x5008, 0x5010):
        fault = guest.event(kvmi.PF)
        assert fault.fault[1] == gpa
        guest.restrict(5, 7)
        guest.done("CONTROL_SINGLESTEP", kvmi.vcpu(0) + b"\1" + bytes(7))
        guest.answer(fault, kvmi.CONTINUE)
        step = guest.event(kvmi.SINGLESTEP)
        guest.restrict(5, READ_ONLY)
        guest.done("CONTROL_SINGLESTEP", kvmi.vcpu(0) + bytes(8))
        guest.answer(step, kvmi.CONTINUE)
    assert going.result().json()["violations"] == 3


@pytest.mark.parametrize("dialect", ["v7", "v6"])
def test_loads_of_cr3(client: ContractClient, make_vm: Callable[..., str], listener: Listening, dialect: str) -> None:
    """Each `mov-cr3` of a vCPU where they are asked about; what is answered is loaded. v6 tells of changes only."""
    vm = make_vm(vcpus=[{"id": 0}, {"id": 5}], translation_cache="model")
    assert client.put(f"{vm}/vcpus/5/vmcs", json={"cr3": "0x1000"}).status_code == 200

    def cr3(vcpu: int = 5) -> int:
        return int(client.get(f"{vm}/vcpus/{vcpu}/vmcs").json()["cr3"], 16)

    def row(vcpu: int, value: int) -> dict[str, Any]:
        return {"gpa": 0, "size": 8, "vcpu": vcpu, "op": "mov-cr3", "address_space": value}

    attach(client, vm, listener, dialect=dialect, timeout=2.0)
    with listener.accept() as guest:
        guest.restrict(5, READ_ONLY)
        guest.enable(1, kvmi.CR, kvmi.PF)
        guest.done("CONTROL_CR", kvmi.vcpu(1) + kvmi.register_switch(3, True))
        values = [0x1000, 0x2000, 0x3000, 0x4000]
        rows = [row(0, 0x9000), *(row(5, value) for value in values), {"gpa": 0x5000, "vcpu": 5}, row(5, 0x6000)]
        going = Background(lambda: client.post(f"{vm}/traces", params={"on_violation": "ask"}, json={"accesses": rows}))
        if dialect == "v7":
            event = guest.event(kvmi.CR)
            assert event.load == (3, 0x1000, 0x1000)
            guest.answer(event, kvmi.CONTINUE, 0x1000)
        event = guest.event(kvmi.CR)
        assert (event.vcpu, event.load, event.cr3) == (1, (3, 0x1000, 0x2000), 0x1000)
        guest.answer(event, kvmi.CONTINUE, 0x7000)
        event = guest.event(kvmi.CR)
        assert event.load == (3, 0x7000, 0x3000) and cr3() == 0x7000
        guest.answer(event, kvmi.RETRY, 0x3000)  # no action of it: the load is refused
        event = guest.event(kvmi.CR)
        assert event.load == (3, 0x7000, 0x4000)
        guest.answer(event, kvmi.CONTINUE)
        fault = guest.event(kvmi.PF)
        assert (fault.fault[1], fault.cr3) == (0x5000, 0)
        guest.answer(fault, kvmi.CONTINUE)
        guest.event(kvmi.CR)  # is not answered: what is recorded takes place
        result = going.result().json()
        assert (result["violations"], result["records"], result["operations"]["mov_cr3"]) == (1, 1, 5)
        assert cr3() == 0x6000 and cr3(0) == 0x9000
        guest.done("CONTROL_CR", kvmi.vcpu(1) + kvmi.register_switch(3, False))
        params = {"on_violation": "ask"}
        assert client.post(f"{vm}/traces", params=params, json={"accesses": [row(5, 0x8000)]}).status_code == 201
    client.delete(f"{vm}/kvmi")


def test_always_continue_counts_as_allow(
    client: ContractClient, vm: str, guest: Guest, make_vm: Callable[..., str]
) -> None:
    """Bitmaps of a tool, and of REST on another machine: the same totals."""
    bitmaps = {5: 0xFFFF_0000, 6: 0xFFFF_FFFE, 7: 0}
    rows = [gfn << 12 | at for gfn in (5, 6, 7, 8) for at in range(0, 4096, 480)] * 2
    other = make_vm(vcpus=[{"id": 0}, {"id": 5}])
    entries = [{"gfn": gfn, "write_bitmap": bitmap} for gfn, bitmap in bitmaps.items()]
    assert client.patch(f"{other}/page-access", json={"entries": entries}).status_code == 200
    allowed = client.post(f"{other}/traces", params={"on_violation": "allow"}, json=trace(rows)).json()
    guest.done("SET_PAGE_WRITE_BITMAP", kvmi.bitmap_list(*((gfn << 12, word) for gfn, word in bitmaps.items())))
    guest.enable(0, kvmi.PF)
    going = replaying(client, vm, rows)
    for _ in range(allowed["violations"]):
        guest.answer(guest.event(kvmi.PF), kvmi.CONTINUE)
    asked = going.result().json()
    counted = ("records", "writes", "violations", "page_granular_violations", "exits", "stopped_at")
    assert allowed["violations"] > 20
    assert {name: asked[name] for name in counted} == {name: allowed[name] for name in counted}


def test_what_others_refuse_is_not_the_tools(client: ContractClient, vm: str, guest: Guest) -> None:
    """As in KVM: a tool is asked about its own restrictions, where it has enabled PF."""
    guest.restrict(5, READ_ONLY)
    guest.enable(0, kvmi.PF)
    objects = [{"name": "o", "gpa": "0x6000", "size": 16}]
    assert client.post(f"{vm}/protections", json={"name": "p", "objects": objects}).status_code == 201
    for members in ({"gpa": "0x6000"}, {"gpa": "0x5000", "vcpu": 5}):
        assert not access(client, vm, on_violation="ask", **members)["landed"]
    assert access(client, vm, gpa="0x5000", access="read", on_violation="ask")["allowed"]
    assert guest.kept == []


def test_a_tool_of_the_websocket_beside_it(service: Running, client: ContractClient, vm: str, guest: Guest) -> None:
    """In order of priority; each is told by its own means."""
    guest.restrict(5, READ_ONLY)
    guest.enable(0, kvmi.PF)
    with tool(service, vm, priority=10) as first:
        going = write(client, vm, 0x5000)
        question = first.receive("violation")
        first.answer(question, "pass")
        guest.answer(guest.event(kvmi.PF), kvmi.CONTINUE)
        resolved = first.receive("resolved")
        assert (resolved["action"], resolved["by"]) == ("allow", state(client, vm)["tool"])
        assert going.result().json()["landed"]


def test_a_pause_holds_what_asks(client: ContractClient, vm: str, guest: Guest) -> None:
    first, second = guest.pause_all(2)
    going = write(client, vm, 0x9000)
    time.sleep(0.1)
    assert going.thread.is_alive()
    # Commands are served meanwhile, and so is REST.
    guest.restrict(9, READ_ONLY)
    guest.enable(0, kvmi.PF)
    guest.answer(first, kvmi.CONTINUE)
    guest.answer(second, kvmi.CONTINUE)
    guest.answer(guest.event(kvmi.PF), kvmi.CONTINUE)
    assert going.result().json()["landed"]


def test_a_vcpu_that_is_created(client: ContractClient, listener: Listening) -> None:
    vm = client.post("/v1/ioctls/KVM_CREATE_VM", json={}).headers["Location"]
    attach(client, vm, listener, timeout=0.2)
    with listener.accept() as guest:
        guest.done("CONTROL_VM_EVENTS", kvmi.switch(kvmi.CREATE_VCPU, True))
        for place in range(2):
            made = client.post(f"{vm}/ioctls/KVM_CREATE_VCPU", json={"arg": 4 * place})
            assert made.status_code == 200 and made.json()["errno"] is None, made.text
            event = guest.event(kvmi.CREATE_VCPU)
            assert event.vcpu == place and guest.done("GET_GUEST_INFO")[0] == place + 1
        # It is not answered: what comes behind it does not wait for ever.
        guest.done("PAUSE_VCPU", kvmi.vcpu(1) + bytes(8))
        assert guest.event(kvmi.PAUSE).vcpu == 1
        guest.answer(event, kvmi.CONTINUE)
        assert guest.call("GET_MAX_GFN").error == 0
    client.delete(vm, headers={"If-Match": client.get(vm).headers["ETag"]})


def test_a_linear_address(client: ContractClient, vm: str, guest: Guest) -> None:
    """Through a direct map of 1-GiB pages, and through none where paging is off."""
    store(client, vm, 0x1000, struct.pack("<Q", 0x2003) + bytes(8))
    store(client, vm, 0x2000, struct.pack("<Q", 0x83) + bytes(8))
    registers = {"cr0": "0x80050033", "cr3": "0x1000", "cr4": "0x20", "efer": "0xd01"}
    assert client.put(f"{vm}/vcpus/0/vmcs", json=registers).status_code == 200
    for gva, gpa in ((0x12345, 0x12345), (1 << 30, (1 << 64) - 1), (1 << 63, (1 << 64) - 1)):
        assert guest.done("TRANSLATE_GVA", kvmi.vcpu(0) + struct.pack("<Q", gva)) == struct.pack("<Q", gpa)


def test_pages_without_a_slot_are_left_out(client: ContractClient, vm: str, guest: Guest) -> None:
    """As in the kernel; the others of the batch are set."""
    guest.done("SET_PAGE_WRITE_BITMAP", kvmi.bitmap_list((16 << 20, 0), (0x5000, 0xFF), ((1 << 64) - 4096, 0)))
    guest.done("SET_PAGE_ACCESS", kvmi.access_list((1 << 40, 5), (0x6000, 5)))
    assert page(client, vm, 5) == ("r-x", 0xFF) and page(client, vm, 6) == ("r-x", 0)
    assert state(client, vm)["restricted_pages"] == 2
    outside = kvmi.gpa_list(16 << 20, 0x5000)
    assert guest.done("GET_PAGE_ACCESS", outside) == b"\7\5"
    assert guest.call("WRITE_PHYSICAL", kvmi.span(16 << 20, 8) + bytes(8)).error == kvmi.ENOENT


# ---- what ends a connection


@pytest.mark.parametrize("by", ["tool", "client", "crash of the tool"])
def test_a_guest_is_not_left_paused(client: ContractClient, vm: str, guest: Guest, by: str) -> None:
    """Nor is anything lost that the tool was told is done."""
    guest.pause_all(2)
    guest.done("WRITE_PHYSICAL", kvmi.span(0x9100, 8) + b"subpage!")
    going = write(client, vm, 0x9000)
    if by == "client":
        assert client.delete(f"{vm}/kvmi").status_code == 204
    elif by == "tool":
        guest.socket.close()
    else:
        guest.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        guest.socket.sendall(kvmi.frame(kvmi.IDS["SET_PAGE_ACCESS"], 7, kvmi.access_list((0x7000, 5)))[:-3])
        guest.socket.close()
    assert going.result().json()["landed"]
    assert stored(client, vm, 0x9100) == b"subpage!"
    assert page(client, vm, 7) == ("rwx", 0xFFFF_FFFF)


def test_a_tool_that_leaves_in_mid_event(client: ContractClient, vm: str, guest: Guest) -> None:
    """What it was asked lands, as in the kernel; its restrictions go, and it may come again."""
    guest.restrict(5, READ_ONLY)
    guest.enable(0, kvmi.PF)
    going = replaying(client, vm, [0x5000, 0x5008, 0x5010])
    guest.event(kvmi.PF)
    guest.socket.close()
    assert going.result().status_code == 201
    until(lambda: page(client, vm, 5) == ("rwx", 0xFFFF_FFFF))


def test_a_tool_that_never_answers(client: ContractClient, vm: str, listener: Listening) -> None:
    """The default counts after its time; its late answer is passed over."""
    attach(client, vm, listener, timeout=0.2)
    with listener.accept() as guest:
        guest.restrict(5, READ_ONLY)
        guest.enable(0, kvmi.PF)
        going = write(client, vm, 0x5000)
        late = guest.event(kvmi.PF)
        assert not going.result().json()["landed"]
        guest.answer(late, kvmi.CONTINUE)
        assert guest.call("GET_MAX_GFN").error == 0
        # A pause that is forgotten does not hold the guest for ever, either.
        guest.pause_all(1)
        assert write(client, vm, 0x8000).result().json()["landed"]


def test_it_looks_for_its_tool_until_there_is_one(client: ContractClient, vm: str, sockets: Path) -> None:
    reply = client.put(f"{vm}/kvmi", json={"connect": f"unix:{sockets}/late", "reconnect": 0.1})
    assert reply.status_code == 201 and reply.json()["state"] == "connecting"
    until(lambda: state(client, vm)["attempts"] > 1)
    found = state(client, vm)
    assert "No such file" in found["last_error"] and found["silent_because"] == "no tool is connected"
    with listening(sockets / "late") as late:
        for _ in range(2):
            with late.accept() as guest:
                guest.done("GET_VERSION")
                until(lambda: state(client, vm)["state"] == "connected")
                assert state(client, vm)["last_error"] is None
            until(lambda: state(client, vm)["state"] != "connected")


def test_one_tool_for_one_machine(client: ContractClient, vm: str, guest: Guest, listener: Listening) -> None:
    until(lambda: state(client, vm)["state"] == "connected")
    reply = client.put(f"{vm}/kvmi", json={"connect": f"unix:{listener.path}"})
    assert reply.status_code == 409 and reply.json()["code"] == "conflict"
    assert guest.call("GET_MAX_GFN").error == 0


def test_detached(client: ContractClient, vm: str, guest: Guest) -> None:
    """A tool that wants UNHOOK is told and waited for; commands are served until it goes."""
    guest.restrict(5, READ_ONLY)
    guest.done("CONTROL_VM_EVENTS", kvmi.switch(kvmi.UNHOOK, True))
    going = Background(lambda: client.delete(f"{vm}/kvmi"))
    assert guest.event(kvmi.UNHOOK).payload[8:] == bytes(536)
    assert guest.call("GET_MAX_GFN").error == 0
    guest.socket.close()
    assert going.result().status_code == 204
    assert page(client, vm, 5) == ("rwx", 0xFFFF_FFFF)
    assert client.get(f"{vm}/kvmi").status_code == 404 and client.delete(f"{vm}/kvmi").status_code == 404


def test_a_machine_that_is_deleted(client: ContractClient, vm: str, guest: Guest) -> None:
    guest.restrict(5, READ_ONLY)
    guest.enable(0, kvmi.PF)
    going = write(client, vm, 0x5000)
    guest.event(kvmi.PF)
    tag = client.get(vm).headers["ETag"]
    assert client.delete(vm, headers={"If-Match": tag}).status_code == 204
    assert going.result().status_code == 404
    assert guest.ended()


@pytest.mark.parametrize(
    "sent",
    [struct.pack("<HHI", 2, 8185, 1), kvmi.frame(9, 1, b"\0\0\1\0\0\0\0\0" + bytes(8)), b"\0" * 7 + b"\xff" * 90],
)
def test_what_breaks_the_protocol_ends_it(client: ContractClient, vm: str, guest: Guest, sent: bytes) -> None:
    guest.socket.sendall(sent)
    assert guest.ended()
    until(lambda: state(client, vm)["last_error"] is not None)


def test_the_cookie(client: ContractClient, vm: str, listener: Listening) -> None:
    shown = attach(client, vm, listener, cookie="open sesame")
    assert shown["cookie"] is True and "sesame" not in str(shown)
    with listener.accept() as wrong:
        assert wrong.ended()
    until(lambda: "cookie" in (state(client, vm)["last_error"] or ""))
    with listener.accept(hashlib.sha1(b"open sesame").digest(), 40) as right:
        assert right.call("GET_VERSION").error == 0


def test_a_tool_that_refuses_in_the_handshake(client: ContractClient, vm: str, listener: Listening) -> None:
    attach(client, vm, listener)
    listener.socket.accept()[0].close()
    until(lambda: "handshake" in (state(client, vm)["last_error"] or ""))
    with listener.accept() as guest:
        assert guest.call("GET_VERSION").error == 0


# ---- many, torn, slow


def test_ten_thousand_commands_at_once(client: ContractClient, vm: str, guest: Guest) -> None:
    batch = b"".join(kvmi.frame(kvmi.IDS["GET_MAX_GFN"], seq) for seq in range(10_000))
    sender = threading.Thread(target=guest.socket.sendall, args=(batch,), daemon=True)
    sender.start()
    assert client.get("/livez").status_code == 200
    for seq in range(10_000):
        found = guest._next()
        assert isinstance(found, kvmi.Reply) and found.seq == seq
    sender.join()


def test_thousands_of_changes_at_once(client: ContractClient, vm: str, guest: Guest) -> None:
    """While they are made one after the other the service serves others, and a tool that leaves leaves nothing."""
    batch = b"".join(
        kvmi.frame(kvmi.IDS["SET_PAGE_ACCESS"], seq, kvmi.access_list((seq % 64 << 12, READ_ONLY)))
        for seq in range(2000)
    )
    sender = threading.Thread(target=guest.socket.sendall, args=(batch,), daemon=True)
    sender.start()
    assert client.get("/livez").status_code == 200
    for seq in range(500):
        assert guest._next() == kvmi.Reply(kvmi.IDS["SET_PAGE_ACCESS"], seq, 0, b"")
    guest.socket.shutdown(socket.SHUT_RDWR)
    sender.join()
    until(lambda: state(client, vm)["restricted_pages"] == 0)
    assert page(client, vm, 1) == ("rwx", 0xFFFF_FFFF)


def test_a_torn_message(guest: Guest) -> None:
    whole = kvmi.frame(kvmi.IDS["READ_PHYSICAL"], 9, kvmi.span(0, 8))
    for piece in (whole[:3], whole[3:11], whole[11:]):
        guest.socket.sendall(piece)
        time.sleep(0.02)
    assert guest._next() == kvmi.Reply(17, 9, 0, bytes(8))


# ---- where the operator lets tools listen


def test_places(sockets: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (sockets / "out").symlink_to(outside)
    places = (f"unix:{sockets}", f"red=unix:{outside}", "vsock:3:5000", "blue=vsock:4")
    store_of = MemoryTokens()
    tokens = {}
    for tenant in ("red", "blue"):
        record, tokens[tenant] = mint("t", tenant=tenant, scope="write", now=datetime.now(UTC))
        store_of.add(record)
    with running(Settings(warm_up=False, kvmi_sockets=places), store_of) as service:
        for tenant, connect, status in (
            ("red", f"unix:{outside}/tool", 201),
            ("blue", f"unix:{outside}/tool", 422),
            ("blue", f"unix:{sockets}/out/tool", 422),
            ("blue", f"unix:{sockets}/../tool", 422),
            ("blue", f"unix:{sockets}/tool", 201),
            ("blue", "unix:/etc/passwd", 422),
            ("blue", "vsock:4:1234", 200),
            ("red", "vsock:4:1234", 422),
            ("red", "vsock:3:5001", 422),
            ("red", "vsock:3", 422),
            ("red", "unix:relative", 422),
        ):
            client = service.client
            headers = {"Authorization": f"Bearer {tokens[tenant]}"}
            vms = client.get("/v1/vms", headers=headers).json()["vms"]
            vm = (
                f"/v1/vms/{vms[0]['id']}"
                if vms
                else client.post("/v1/vms", json={}, headers=headers).headers["Location"]
            )
            reply = client.put(f"{vm}/kvmi", json={"connect": connect}, headers=headers)
            assert reply.status_code == status, (tenant, connect, reply.text)
            if status == 422:
                assert reply.json()["field"] == "connect"


def test_who_may_attach(sockets: Path) -> None:
    """Nobody with scope read, and nobody another tenant's."""
    tokens, store_of = {}, MemoryTokens()
    people: tuple[tuple[str, str, TokenScope], ...] = (
        ("own", "red", "write"),
        ("reader", "red", "read"),
        ("stranger", "blue", "admin"),
    )
    for name, tenant, scope in people:
        record, tokens[name] = mint(name, tenant=tenant, scope=scope, now=datetime.now(UTC))
        store_of.add(record)
    with running(Settings(warm_up=False, kvmi_sockets=(f"unix:{sockets}",)), store_of) as service:
        client, body = service.client, {"connect": f"unix:{sockets}/nobody"}
        headers = {name: {"Authorization": f"Bearer {token}"} for name, token in tokens.items()}
        vm = client.post("/v1/vms", json={}, headers=headers["own"]).headers["Location"]
        assert client.put(f"{vm}/kvmi", json=body, headers=headers["reader"]).status_code == 403
        assert client.put(f"{vm}/kvmi", json=body, headers=headers["stranger"]).status_code == 404
        assert client.put(f"{vm}/kvmi", json=body, headers=headers["own"]).status_code == 201
        assert client.get(f"{vm}/kvmi", headers=headers["reader"]).status_code == 200
        assert client.delete(f"{vm}/kvmi", headers=headers["reader"]).status_code == 403
        for method in (client.get, client.delete):
            assert method(f"{vm}/kvmi", headers=headers["stranger"]).status_code == 404


def test_none_by_default(tmp_path: Path) -> None:
    with running() as service:
        vm = new_vm(service.client)
        reply = service.client.put(f"{vm}/kvmi", json={"connect": f"unix:{tmp_path}/tool"})
    assert reply.status_code == 422 and "SUBPAGE_KVMI_SOCKETS" in reply.json()["detail"]


def test_a_link_in_place_of_a_socket(client: ContractClient, vm: str, sockets: Path, tmp_path: Path) -> None:
    (sockets / "link").symlink_to(tmp_path / "tool")
    with listening(tmp_path / "tool"):
        assert client.put(f"{vm}/kvmi", json={"connect": f"unix:{sockets}/link"}).status_code == 201
        until(lambda: "symbolic link" in (state(client, vm)["last_error"] or ""))


@pytest.mark.parametrize("text", ["/run", "unix:run", "tcp:1.2.3.4:5", "vsock:", "vsock:1:2:3", "vsock:99999999999"])
def test_a_place_that_is_none(text: str) -> None:
    with pytest.raises(ValueError, match="must be unix:"):
        Settings(kvmi_sockets=(text,))


def test_whose_socket_in_a_directory_of_all(client: ContractClient, vm: str, sockets: Path) -> None:
    """One of the service's own user is taken."""
    shared = sockets / "shared"
    shared.mkdir()
    shared.chmod(0o777)
    with listening(shared / "tool") as listener:
        attach(client, vm, listener)
        with listener.accept() as guest:
            assert guest.call("GET_VERSION").error == 0
    assert os.geteuid() in (0, shared.stat().st_uid)


_SETRESUID = 117


@pytest.mark.skipif(os.geteuid() != 0 or platform.machine() != "x86_64", reason="takes another user's place")
def test_anothers_socket_in_a_directory_of_all(client: ContractClient, vm: str, sockets: Path) -> None:
    """A process of another user than the service's, the directory's owner and root is nobody's tool."""
    shared = sockets / "open"
    shared.mkdir()
    shared.chmod(0o777)
    with listening(shared / "tool") as listener:

        def listen_as_nobody() -> None:
            """The system call is of this thread, and who listens is who the peer will be."""
            ctypes.CDLL(None).syscall(_SETRESUID, -1, 65534, -1)
            listener.socket.listen(0)

        thread = threading.Thread(target=listen_as_nobody)
        thread.start()
        thread.join()
        attach(client, vm, listener)
        until(lambda: "runs as user 65534" in (state(client, vm)["last_error"] or ""))


def test_unhook_has_an_end(client: ContractClient, vm: str, guest: Guest) -> None:
    """A tool that wants to be told and does not go is left."""
    guest.done("CONTROL_VM_EVENTS", kvmi.switch(kvmi.UNHOOK, True))
    assert client.delete(f"{vm}/kvmi").status_code == 204
    assert guest.ended()
