"""Hypercalls and direct flush over HTTP: the upstream selftests as scenarios, and every other route of Hyper-V."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.contract.client import ContractClient
from tests.engine.hyperv import guests
from tests.engine.hyperv import nested_guests as n0
from tests.engine.hyperv.flush_machine import words
from tests.engine.hyperv.selftest_stages import STAGES
from tests.engine.nested.support import GIF, GM, NONE, blob
from tests.engine.nested.svm import svm_blob
from tests.service.api.hyperv.svm_guest import svm_vm
from tests.support.guests import RAW, leaves
from tests.support.http import OCTETS, access, store
from tests.support.ioctls import enable_cap, ioctl

MakeVm = Callable[..., str]
W1, W2 = 1, 2


def put(client: ContractClient, url: str, **body: Any) -> dict[str, Any]:
    reply = client.put(url, json=body)
    assert reply.status_code == 200, reply.text
    found: dict[str, Any] = reply.json()
    return found


def word(value: int) -> bytes:
    return value.to_bytes(8, "little")


def msr(client: ContractClient, vm: str, vcpu: int, index: int, value: int) -> None:
    done = put(client, f"{vm}/vcpus/{vcpu}/msrs", msrs=[{"index": hex(index), "value": hex(value)}])
    assert done["written"] == 1


def call(client: ContractClient, vm: str, vcpu: int = 0, *, data: bytes | None = None, **registers: Any) -> Any:
    xmm = registers.pop("xmm", ())
    if data is not None:
        registers.setdefault("rdx", 0x5000)
    body: dict[str, Any] = {"registers": {name: hex(value) for name, value in registers.items()}}
    body["registers"]["xmm"] = [value.to_bytes(16, "little").hex() for value in xmm]
    if data is not None:
        body["input"] = data.hex()
    reply = client.post(f"{vm}/vcpus/{vcpu}/hypercalls", json=body)
    assert reply.status_code == 200, reply.text
    return reply.json()


def point(client: ContractClient, vm: str, page: int) -> None:
    table = guests.TABLES + 3 * guests.PAGE
    store(client, vm, table + guests._index(table) * 8, word(page | 0x67))


def read(client: ContractClient, vm: str, vcpu: int) -> int:
    found = access(client, vm, gva=hex(guests.TEST_PAGE), size=8, access="read", vcpu=vcpu)
    return bytes.fromhex(found["data"])[0]


def flush_guest(client: ContractClient, make_vm: MakeVm, **config: Any) -> str:
    """The guest of hyperv_tlb_flush: VP indices 0, 2 and 65 on one set of page tables."""
    vcpus = [{"id": vcpu, "vp_index": index, "cpuid": leaves(guests.CPUID)} for vcpu, index in enumerate((0, 2, 65))]
    vm = make_vm(spp=False, vcpus=vcpus, translation_cache="model", **config)
    msr(client, vm, 0, guests.GUEST_OS_ID, guests.OS_ID)
    for level in range(3):
        at = guests.TABLES + level * guests.PAGE
        store(client, vm, at + guests._index(at) * 8, word(at + guests.PAGE | 0x67))
    for vcpu in range(3):
        put(client, f"{vm}/vcpus/{vcpu}/vmcs", cr3=hex(guests.CR3), cr4=hex(guests.CR4))
    store(client, vm, guests.P1, bytes([1]) * 8)
    store(client, vm, guests.P2, bytes([2]) * 8)
    point(client, vm, guests.P1)
    return vm


@pytest.mark.parametrize("policy", ["kvm", "tlfs"])
def test_hyperv_tlb_flush(client: ContractClient, make_vm: MakeVm, policy: str) -> None:
    vm = flush_guest(client, make_vm, flush_policy=policy)
    page, other = guests.P1, guests.P2
    for registers, block, seeing in STAGES:
        old = read(client, vm, W1)
        assert read(client, vm, W2) == old == (1 if page == guests.P1 else 2)
        page, other = other, page
        point(client, vm, page)
        done = call(client, vm, data=block, **registers)
        assert done["result"]["status"] == "0x0" and done["rip_advance"] == 3
        assert {2: W1, 65: W2}.keys() >= set(done["flushed"]) - {0} >= {(0, 2, 65)[worker] for worker in seeing}
        for worker in seeing:
            assert read(client, vm, worker) == 3 - old
        call(client, vm, data=words(0, 3, 0), rcx=2)


def test_what_was_flushed_is_listed(client: ContractClient, make_vm: MakeVm) -> None:
    vm = flush_guest(client, make_vm, flush_policy="tlfs")
    read(client, vm, W1)
    read(client, vm, W2)
    entry = next(e for e in client.get(f"{vm}/vcpus/1/tlb").json()["entries"] if e["kind"] == "combined")
    assert (entry["address_space"], entry["vm_id"], entry["address"]) == (hex(guests.CR3), None, hex(guests.TEST_PAGE))
    done = call(client, vm, data=words(guests.CR3, 0, 4, guests.TEST_PAGE), rcx=0x100000003)
    assert (done["targeted"], done["flushed"], done["result"]["reps_completed"]) == ([2], [2], 1)
    (vp,) = done["vps"]
    assert vp["required"] == vp["dropped"] == [entry] and vp["over_flushed"] == vp["left"] == []
    assert done["control"]["name"] == "HvCallFlushVirtualAddressList"
    # another address space is not asked for, and KVM would not have cared
    assert call(client, vm, data=words(0x2000, 0, 1 << 2), rcx=2)["vps"][0]["dropped"] == []


def test_a_call_by_its_fields(client: ContractClient, make_vm: MakeVm) -> None:
    vm = flush_guest(client, make_vm)
    url = f"{vm}/vcpus/0/hypercalls"
    sparse = {"format": 0, "valid_banks": 2, "banks": [2]}
    space = {"name": "HvCallFlushVirtualAddressSpaceEx", "flags": 2, "vp_set": sparse}
    for fast in (False, True):
        body = {"call": {**space, "fast": fast}, **({} if fast else {"input_gpa": "0x5000"})}
        assert client.post(url, json=body).json()["flushed"] == [65]
    listed = {"code": 0x14, "flags": 2, "vp_set": sparse, "ranges": [hex(guests.TEST_PAGE)]}
    done = client.post(url, json={"call": listed, "input_gpa": "0x5000"}).json()
    assert (done["flushed"], done["result"]["value"], done["control"]["value"]) == ([65], "0x100000000", "0x100020014")
    narrow = client.post(url, json={"call": space, "input_gpa": "0x5000", "long_mode": False}).json()
    assert narrow["registers"] == {"rdx": "0x0", "rax": "0x0"} and narrow["flushed"] == [65]
    done = client.post(url, json={"call": {"code": 0xBEEF, "rep_count": 0}, "input_gpa": "0x5000"}).json()
    assert done["result"]["status_name"] == "INVALID_HYPERCALL_CODE"


def test_a_block_of_bytes(client: ContractClient, make_vm: MakeVm) -> None:
    vm = flush_guest(client, make_vm)
    url = f"{vm}/vcpus/0/hypercalls"
    where = {"rcx": "0x2", "rdx": "0x5000"}
    reply = client.post(url, content=words(0, 2, 4), headers=OCTETS, params=where)
    assert reply.status_code == 200 and reply.json()["flushed"] == [2]
    assert client.get(f"{vm}/memory", params={"gpa": "0x5010", "size": 8}).content == word(4)
    for params, content in (({}, b""), ({"rcx": "2"}, b""), (where, bytes(0x1001))):
        assert client.post(url, content=content, headers=OCTETS, params=params).status_code == 422
    assert client.post(url, json={"registers": {}}, params=where).status_code == 422
    assert client.post(url, content=b"x", headers={"Content-Type": "text/plain"}).status_code == 415


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"registers": {}, "call": {"code": 2}},
        {"registers": {"rcx": 1 << 64}},
        {"registers": {"xmm": ["00"]}},
        {"registers": {"rcx": "0x2", "rdx": "0xdead000"}, "input": "00"},
        {"registers": {"rcx": "0x10002"}, "input": "00"},
        {"registers": {}, "input_gpa": "0x5000"},
        {"registers": {}, "input": "0"},
        {"registers": {}, "cpl": 4},
        {"call": {}},
        {"call": {"code": 2}},
        {"call": {"code": 2, "name": "HvCallFlushVirtualAddressSpace"}, "input_gpa": "0x5000"},
        {"call": {"name": "HvCallNothing"}, "input_gpa": "0x5000"},
        {"call": {"code": 3, "fast": True, "ranges": [0] * 12}},
        {"call": {"code": 2, "rep_count": 0x1000}, "input_gpa": 0},
    ],
)
def test_what_is_no_hypercall(client: ContractClient, make_vm: MakeVm, body: dict[str, Any]) -> None:
    vm = flush_guest(client, make_vm)
    before = client.get(vm).json()["revision"]
    reply = client.post(f"{vm}/vcpus/0/hypercalls", json=body)
    assert reply.status_code == 422, reply.text
    assert client.get(vm).json()["revision"] == before
    assert client.post(f"{vm}/vcpus/7/hypercalls", json={"registers": {}}).status_code == 404


def test_hyperv_features(client: ContractClient, make_vm: MakeVm) -> None:
    """The stages with flush calls; the page that the block is read from is all zero."""
    vm = make_vm(profile="kvm-latest", spp=False, vcpus=[{"id": 0, "cpuid": []}])
    url = f"{vm}/vcpus/0"
    assert put(client, f"{url}/capabilities/hyperv-enforce-cpuid", enabled=True)["enabled"]
    entries = [{"function": "0x40000001", "eax": "0x31237648"}, {"function": "0x40000003", "eax": "0x20"}]
    stages: list[tuple[int, int, int, int | None]] = [
        (0, 0, 0xBEEF, 2),
        (0, 0, 0x2, 6),
        (4, 0, 0x2, 0),
        (4, 0, 0x13, 6),
        (0x804, 0, 0x13, 0),
        (0x804, 0, 0x10002, None),
        (0x804, 0x10, 0x10002, 0),
    ]
    for recommendations, edx, control, status in stages:
        entries[1]["edx"] = hex(edx)
        recommended = {"function": "0x40000004", "eax": hex(recommendations)}
        put(client, f"{url}/cpuid", entries=[*entries, recommended])
        msr(client, vm, 0, guests.GUEST_OS_ID, guests.OS_ID)
        done = call(client, vm, rcx=control, rdx=0x5000)
        if status is None:
            assert (done["outcome"], done["exception"], done["rip_advance"]) == ("exception", "#UD", 0)
        else:
            assert done["result"]["status"] == hex(status)
    assert not put(client, f"{url}/capabilities/199", enabled=False)["enabled"]


def test_2019_does_not_enforce_cpuid(client: ContractClient, make_vm: MakeVm) -> None:
    """KVM_CAP_HYPERV_ENFORCE_CPUID came with 5.14: not there, whichever way it is asked for."""
    url = f"{make_vm(profile='kvm-2019', spp=False)}/vcpus/0"
    for name in ("199", "hyperv-enforce-cpuid"):
        told = client.get(f"{url}/capabilities/{name}").json()
        assert (told["available"], told["enabled"]) == (0, False)
        refused = client.put(f"{url}/capabilities/{name}", json={"enabled": True})
        assert (refused.status_code, refused.json()["code"], refused.json()["errno"]) == (409, "unsupported", "EINVAL")
        assert not put(client, f"{url}/capabilities/{name}", enabled=False)["enabled"]
    assert ioctl(client, url, "KVM_ENABLE_CAP", enable_cap(199, 0, 1)).errno == "EINVAL"
    assert not client.get(f"{url}/capabilities/199").json()["enabled"]


def test_queues_locks_and_activity(client: ContractClient, make_vm: MakeVm) -> None:
    vm = flush_guest(client, make_vm)
    worker = f"{vm}/vcpus/1"
    assert client.get(f"{worker}/activity").json() == {"activity": "running"}
    put(client, f"{worker}/activity", activity="halted")
    ranges = [guests.TEST_PAGE + 0x100000 * i for i in range(7)]
    for _ in range(3):  # Q01
        done = call(client, vm, data=words(0, 2, 4, *ranges), rcx=0x700000003)
        assert (done["targeted"], done["flushed"]) == ([2], [])
    queue = client.get(f"{worker}/flush-queue").json()
    assert len(queue["own"]) == 15 and queue["own"][-1] == "0xffffffffffffffff" and queue["requested"]
    assert client.post(f"{worker}/flush-queue:service", json={}).json()["tlb_flush"] == 15
    call(client, vm, data=words(0, 2, 4, *ranges[:3]), rcx=0x300000003)
    queue = client.post(f"{worker}/flush-queue:service", json={"full": True}).json()  # Q05
    assert (queue["tlb_flush"], queue["own"], queue["nested"]) == (16, [], [])
    assert client.get(f"{vm}/vcpus/0/flush-queue").json()["hypercalls"] == 4
    put(client, f"{worker}/activity", activity="running")
    assert put(client, f"{worker}/tlb-lock", locked=True) == client.get(f"{worker}/tlb-lock").json()
    done = call(client, vm, data=words(0, 2, 4), rcx=2)
    assert (done["outcome"], done["waits_for"], done["rip_advance"], done["result"]) == ("suspended", [1], 0, None)
    put(client, f"{worker}/tlb-lock", locked=False)
    assert call(client, vm, data=words(0, 2, 4), rcx=2)["outcome"] == "completed"
    for path in ("activity", "tlb-lock", "flush-queue"):
        assert client.get(f"{vm}/vcpus/9/{path}").status_code == 404
    assert client.put(f"{worker}/activity", json={"activity": "asleep"}).status_code == 422


# Nested guests


def nested_vm(client: ContractClient, make_vm: MakeVm, profile: str = "kvm-latest") -> str:
    """State N0, made over HTTP."""
    cpuid = [entry for entry in n0.supported_cpuid("intel", True, n0.WIDTH) if entry.function >> 28 != 4]
    vcpus = [{"id": i, "cpuid": leaves((*cpuid, *guests.CPUID))} for i in range(len(n0.IDS))]
    vm = make_vm(profile=profile, spp=False, vcpus=vcpus, translation_cache="model")
    msr(client, vm, 0, guests.GUEST_OS_ID, guests.OS_ID)
    for level in range(3):
        store(client, vm, n0.EPT12 + 0x1000 * level, word(n0.EPT12 + 0x1000 * (level + 1) | 7))
    store(client, vm, n0.EPT12 + 0x3000 + 8 * 5, word(n0.L1_INPUT | 7))
    for vcpu, ids in enumerate(n0.IDS):
        url = f"{vm}/vcpus/{vcpu}"
        put(client, f"{url}/evmcs", enabled=True)
        page = bytearray(n0.EVMCS.size)
        control = {"hv_enlightenments_control": 1, "hv_vm_id": ids[0], "hv_vp_id": ids[1]}
        fields = {"revision_id": 1, **n0.FIELDS, **control, "partition_assist_page": n0.PARTITION}
        for name, value in fields.items():
            if name in n0.EVMCS.by_name:
                n0.EVMCS.put(page, name, value)
        store(client, vm, n0.evmcs(vcpu), bytes(page))
        msr(client, vm, vcpu, guests.ASSIST_MSR, n0.assist(vcpu) | 1)
        seen = put(
            client,
            f"{url}/vp-assist-page",
            nested_features=1,
            enlighten_vmentry=1,
            current_nested_vmcs=hex(n0.evmcs(vcpu)),
        )
        assert (seen["control"], seen["enlighten"], seen["evmcs"]) == ("0x1", "0x1", hex(n0.evmcs(vcpu)))
        data = blob(size=128, vmcs12_pa=NONE)
        assert client.put(f"{url}/nested-state", content=data, headers=OCTETS).status_code == 200
        launch(client, vm, vcpu, "vmlaunch")
    return vm


def launch(client: ContractClient, vm: str, vcpu: int = 0, how: str = "vmresume") -> None:
    reply = client.post(f"{vm}/vcpus/{vcpu}/vmx", json={"instruction": how})
    assert reply.status_code == 200 and reply.json()["result"] == "entered", reply.text


def evmcs_word(client: ContractClient, vm: str, offset: int, size: int) -> int:
    gpa = hex(n0.evmcs(0) + offset)
    return int.from_bytes(client.get(f"{vm}/memory", params={"gpa": gpa, "size": size}).content, "little")


def test_hyperv_evmcs(client: ContractClient, make_vm: MakeVm) -> None:
    vm = nested_vm(client, make_vm)
    partitions = client.get(f"{vm}/partitions").json()
    assert partitions["l0"] == "kvm"
    assert [(p["vm_id"], p["vp_id"]) for p in partitions["vps"]] == [(hex(a), hex(b)) for a, b in n0.IDS]
    assert all(p["nested_flush"] and p["direct_hypercall"] and p["running"] for p in partitions["vps"])
    plain = call(client, vm, rcx=0xFFFF)
    assert (plain["outcome"], plain["exit"]["reason"], plain["rip_advance"]) == ("reflected", "0x12", 0)
    assert evmcs_word(client, vm, 0x2B4, 4) == 18
    store(client, vm, n0.evmcs(0) + 0x330, word(n0.L2_RIP + 3))  # L1 skips the instruction
    launch(client, vm)
    served = call(client, vm, rcx=0x10002, r8=3)
    assert (served["outcome"], served["row"], served["l0"], served["level"]) == ("completed", "D10", "kvm", 2)
    assert (served["flushed"], served["exit"], served["rip"]) == ([0, 1, 2], None, hex(n0.L2_RIP + 6))
    store(client, vm, n0.PARTITION, b"\x01\0\0\0")
    told = call(client, vm, rcx=0x10002, r8=3)
    assert (told["row"], told["exit"]["reason"], told["exit"]["qualification"]) == ("D11", "0x10000031", "0x0")
    assert evmcs_word(client, vm, 0x2B4, 4) == 0x10000031 and evmcs_word(client, vm, 0x330, 8) == n0.L2_RIP + 9
    launch(client, vm)
    assert call(client, vm, rcx=0xFFFF)["exit"]["reason"] == "0x12"
    # L1 points at an enlightened VMCS that is not there
    put(
        client, f"{vm}/vcpus/0/vp-assist-page", nested_features=1, enlighten_vmentry=1, current_nested_vmcs="0xdeadbeef"
    )
    reply = client.post(f"{vm}/vcpus/0/vmx", json={"instruction": "vmlaunch"})
    assert reply.json()["result"] == "#UD"


def test_hyperv_svm(client: ContractClient, make_vm: MakeVm) -> None:
    vm = svm_vm(client, make_vm)
    served = call(client, vm, rcx=0x10002, r8=3)
    assert (served["outcome"], served["row"], served["exit"]) == ("completed", "D10", None)
    store(client, vm, n0.PARTITION, b"\x01\0\0\0")
    told = call(client, vm, rcx=0x10002, r8=3)
    assert [told["exit"][name] for name in ("reason", "qualification", "information")] == ["0xf0000000", "0x1", "0x0"]
    page = client.get(f"{vm}/memory", params={"gpa": "0x7000", "size": 4096}).content
    assert [int.from_bytes(page[at : at + 8], "little") for at in (0x70, 0x78, 0x80)] == [0xF0000000, 1, 0]
    assert int.from_bytes(page[0x578:0x580], "little") == 6  # two hypercalls
    plain = call(client, svm_vm(client, make_vm), rcx=0xFFFF)
    assert (plain["outcome"], plain["row"], plain["exit"]["reason"]) == ("reflected", "D5", "0x81")
    let_through = call(client, svm_vm(client, make_vm, intercept=1), rcx=0xBEEF)
    assert (let_through["outcome"], let_through["result"]["status"]) == ("completed", "0x2")


def test_vp_assist_page(client: ContractClient, make_vm: MakeVm) -> None:
    vm = make_vm(spp=False)
    url = f"{vm}/vcpus/0/vp-assist-page"
    assert client.get(url).status_code == 404
    msr(client, vm, 0, guests.ASSIST_MSR, 0x50001)
    assert client.put(url, content=bytes(24) + word(1), headers=OCTETS).status_code == 200
    assert client.get(url).json()["control"] == "0x0"
    assert client.get(url, params={"written": "before-fix"}).json()["control"] == "0x1"
    page = client.get(url, headers=RAW)
    assert len(page.content) == 624 and page.content[24] == 1
    assert client.get(url, headers={**RAW, "If-None-Match": page.headers["ETag"]}).status_code == 304
    assert client.put(url, json={"unknown": 1}).status_code == 422
    assert client.put(url, content=bytes(625), headers=OCTETS).status_code == 422
    assert client.get(url, params={"of": "kvm"}).status_code == 404


# KVM on Hyper-V


def test_direct_flush_of_2019(client: ContractClient, make_vm: MakeVm) -> None:
    vm = flush_guest(client, make_vm, host={"hyperv": {}})
    capability = f"{vm}/vcpus/1/capabilities/hyperv-direct-tlbflush"
    assert client.get(capability).json()["available"] == 1 and not client.get(capability).json()["enabled"]
    assert call(client, vm, rcx=0x10002, r8=3)["served_by"] == 1
    for vcpu in range(3):
        seen = put(client, f"{vm}/vcpus/{vcpu}/capabilities/175", enabled=True)
        assert seen["enabled"] and seen["result"]["hides_kvm"] == "0x1"
    assert [read(client, vm, w) for w in (0, W1, W2)] == [1, 1, 1]
    point(client, vm, guests.P2)
    done = call(client, vm, rcx=0x10002, r8=3)
    assert (done["l0"], done["served_by"], done["row"], done["exit"]) == ("hyperv", 0, "D10", None)
    assert done["flushed"] == [0, 2, 65]
    assert [read(client, vm, w) for w in (W1, W2)] == [2, 2]
    page = client.get(f"{vm}/vcpus/1/vp-assist-page", params={"of": "kvm"}).json()
    assert (page["control"], page["enlighten"]) == ("0x1", "0x1")
    assert client.get(f"{vm}/partitions").json()["l0"] == "hyperv"


@pytest.mark.parametrize(
    ("hyperv", "errno"),
    [
        (None, "ENOTTY"),
        ({"cpuid": [{"function": "0x4000000a", "eax": "0x80101"}]}, "ENOTTY"),
        ({"cpuid": [{"function": "0x40000004", "eax": "0x804"}]}, "ENOTTY"),
        ({"fail_allocation": True}, "ENOMEM"),
    ],
)
def test_direct_flush_is_refused(
    client: ContractClient, make_vm: MakeVm, hyperv: dict[str, Any] | None, errno: str
) -> None:
    vm = make_vm(spp=False, host={"hyperv": hyperv})
    reply = client.put(f"{vm}/vcpus/0/capabilities/175", json={"enabled": True})
    assert (reply.status_code, reply.json()["errno"]) == (409, errno)
    checked = client.post(f"{vm}/ioctls/KVM_CHECK_EXTENSION", params={"arg": 175}).json()
    assert checked["return"] == (1 if errno == "ENOMEM" else 0)
    assert client.post(f"{vm}/ioctls/KVM_CHECK_EXTENSION", params={"arg": 174}).json()["return"] == 0
    enable = (175).to_bytes(4, "little") + bytes(100)
    told = client.post(f"{vm}/vcpus/0/ioctls/KVM_ENABLE_CAP", json={"data": enable.hex()}).json()
    assert (told["return"], told["errno"]) == (-1, errno)
    flagged = enable[:4] + b"\x01" + enable[5:]
    told = client.post(f"{vm}/vcpus/0/ioctls/KVM_ENABLE_CAP", json={"data": flagged.hex()}).json()
    assert told["errno"] == "EINVAL"


def test_pages_of_a_kvm_on_hyperv(client: ContractClient, make_vm: MakeVm) -> None:
    """The vectors of the 2019 series: what enabling, running, loading and leaving a CPU store (E03 to E11)."""
    vm = flush_guest(client, make_vm, host={"hyperv": {}})
    put(client, f"{vm}/vcpus/0/vmcs", cpl=0)
    pages = [client.get(f"{vm}/vcpus/{n}/kvm-vmcs").json() for n in range(3)]
    assert {page["kind"] for page in pages} == {"evmcs"}
    for _ in range(2):  # E03, E05
        put(client, f"{vm}/vcpus/0/capabilities/175", enabled=True)
        reply = client.get(f"{vm}/vcpus/0/kvm-vmcs", headers=RAW)
        page = reply.content
        assert len(page) == 1024 and page[0x344:0x34C] == b"\x01" + bytes(7)
        vm_id, partition_page = (int.from_bytes(page[at : at + 8], "little") for at in (0x350, 0x358))
        assert vm_id >> 47 == 0x1FFFF and partition_page and partition_page % 0x1000 == 0
    assert (
        client.get(f"{vm}/vcpus/0/kvm-vmcs", headers={**RAW, "If-None-Match": reply.headers["ETag"]}).status_code == 304
    )
    assert client.get(f"{vm}/vcpus/1/kvm-vmcs").json() == pages[1]
    read(client, vm, 2)  # E08: VP index 65
    told = client.get(f"{vm}/vcpus/2/kvm-vmcs").json()["fields"]
    assert (told["hv_clean_fields"], told["hv_vp_id"]) == ("0xffff", "0x41")

    def assist(of: int) -> tuple[str, ...]:
        seen = client.get(f"{vm}/vcpus/{of}/vp-assist-page", params={"of": "kvm"}).json()
        return seen["control"], seen["enlighten"], seen["evmcs"]

    assert assist(0) == ("0x1", "0x1", pages[0]["address"]) and assist(1) == ("0x0", "0x1", pages[1]["address"])  # E09
    url = f"{vm}/vcpus/0/vp-assist-page"
    seen = client.post(f"{url}:load", json={"vcpu": 1}).json()  # E10
    assert (seen["control"], seen["enlighten"], seen["evmcs"]) == ("0x1", "0x1", pages[1]["address"])
    raw = client.get(url, params={"of": "kvm"}, headers=RAW).content
    assert raw[0x20:0x30].hex() == "0100000000000000" + "0100000000000000"
    assert client.post(f"{url}:load", json={}).json()["evmcs"] == pages[0]["address"]
    client.post(f"{url}:unload")  # E11
    assert assist(0) == ("0x0", "0x0", "0x0")
    assert not any(client.get(url, params={"of": "kvm"}, headers=RAW).content)
    assert call(client, vm, rcx=0x10002, r8=3)["row"] == "D10"  # its next run loads it
    assert assist(0) == ("0x1", "0x1", pages[0]["address"])
    assert client.post(f"{url}:load", json={"vcpu": 9}).status_code == 404
    plain = make_vm(spp=False)
    for path in (":load", ":unload"):
        reply = client.post(f"{plain}/vcpus/0/vp-assist-page{path}", **({"json": {}} if path == ":load" else {}))
        assert reply.status_code == 404 and reply.json()["field"] == "of"
    assert client.get(f"{plain}/vcpus/0/kvm-vmcs").status_code == 404


def test_direct_flush_on_amd(client: ContractClient, make_vm: MakeVm) -> None:
    cpuid = leaves(guests.CPUID)
    vms = {}
    for profile in ("kvm-2019", "kvm-latest"):
        host = {"vendor": "amd", "hyperv": {}}
        vms[profile] = vm = make_vm(
            profile=profile, spp=False, host=host, vcpus=[{"id": 0, "vp_index": 5, "cpuid": cpuid}]
        )
        msr(client, vm, 0, guests.GUEST_OS_ID, guests.OS_ID)
        done = call(client, vm, rcx=0x10002, r8=3)  # KVM answers after VMMCALL
        assert (done["served_by"], done["row"], done["exit"]["reason"]) == (1, "D3", "0x81")
    enable = {"enabled": True}
    reply = client.put(f"{vms['kvm-2019']}/vcpus/0/capabilities/175", json=enable)
    assert (reply.status_code, reply.json()["errno"]) == (409, "ENOTTY")
    put(client, f"{vm}/vcpus/0/capabilities/175", **enable)
    done = call(client, vm, rcx=0x10002, r8=2, xmm=(1 << 5, 0, 0, 0, 0, 0))  # the first run: the VP id is there
    assert (done["served_by"], done["row"], done["flushed"]) == (0, "D10", [5])
    told = client.get(f"{vm}/vcpus/0/kvm-vmcs").json()
    assert (told["kind"], told["fields"]["hv_vp_id"], told["fields"]["hv_clean_fields"]) == (
        "vmcb",
        "0x5",
        "0x80000000",
    )
    assert len(client.get(f"{vm}/vcpus/0/kvm-vmcs", headers=RAW).content) == 4096


def reenter(client: ContractClient, vm: str) -> None:
    """Let L2 run again with the VMCB that is in memory, as L1 left it: what VMRUN would do."""
    page = client.get(f"{vm}/memory", params={"gpa": "0x7000", "size": 4096}).content
    data = bytearray(svm_blob(GM | GIF, page))
    data[8:16] = word(0x7000)
    reply = client.put(f"{vm}/vcpus/0/nested-state", content=bytes(data), headers=OCTETS)
    assert reply.status_code == 200, reply.text


def test_hyperv_svm_from_end_to_end(client: ContractClient, make_vm: MakeVm) -> None:
    """One L2 through the whole of hyperv_svm_test."""
    vm = svm_vm(client, make_vm)
    plain = call(client, vm, rcx=0xFFFF)
    assert (plain["outcome"], plain["exit"]["reason"], plain["rip_advance"]) == ("reflected", "0x81", 0)
    store(client, vm, 0x7578, word(3))  # L1 skips the instruction
    reenter(client, vm)
    served = call(client, vm, rcx=0x10002, r8=3)
    assert (served["row"], served["exit"], served["rip"]) == ("D10", None, "0x6")
    assert client.get(f"{vm}/partitions").json()["vps"][0]["running"]
    store(client, vm, n0.PARTITION, b"\x01\0\0\0")
    told = call(client, vm, rcx=0x10002, r8=3)
    assert (told["row"], told["exit"]["reason"], told["exit"]["qualification"]) == ("D11", "0xf0000000", "0x1")
    reenter(client, vm)  # RIP untouched
    again = call(client, vm, rcx=0xFFFF)
    assert (again["exit"]["reason"], again["rip"]) == ("0x81", "0x9")
    # the control bit that counts is the one of VMRUN
    store(client, vm, 0x73E0, bytes(4))
    reenter(client, vm)
    assert call(client, vm, rcx=0x10002, r8=3)["row"] == "D3"


@pytest.mark.parametrize(("vendor", "code"), [("intel", "0f01c1c3"), ("amd", "0f01d9c3")])
def test_the_hypercall_page_has_the_instruction_of_the_processor(
    client: ContractClient, make_vm: MakeVm, vendor: str, code: str
) -> None:
    vm = make_vm(spp=False, host={"vendor": vendor}, vcpus=[{"id": 0, "cpuid": leaves(guests.CPUID)}])
    store(client, vm, 0x9000, b"\xff" * 8)
    msr(client, vm, 0, 0x40000001, 0x9001)  # no identity: it stays off
    assert client.get(f"{vm}/memory", params={"gpa": "0x9000", "size": 8}).content.hex() == "ff" * 8
    msr(client, vm, 0, guests.GUEST_OS_ID, guests.OS_ID)
    msr(client, vm, 0, 0x40000001, 0x9001)
    assert client.get(f"{vm}/memory", params={"gpa": "0x9000", "size": 8}).content.hex() == code + "ff" * 4


def test_msrs_are_kept_from_a_guest_whose_cpuid_has_them_not(client: ContractClient, make_vm: MakeVm) -> None:
    vm = make_vm(profile="kvm-latest", spp=False, vcpus=[{"id": 0, "cpuid": []}])
    url = f"{vm}/vcpus/0"
    writes = {0x40000000: (5, guests.OS_ID), 0x40000001: (5, 0), 0x40000073: (4, 0x9001)}

    def outcome(index: int, value: int) -> str:
        body = {"msrs": [{"index": hex(index), "value": hex(value)}], "by": "guest"}
        found: str = put(client, f"{url}/msrs", **body)["result"]
        return found

    def seen(index: int) -> str | None:
        (found,) = client.get(f"{url}/msrs", params={"index": hex(index)}).json()["vcpu"]
        guest: str | None = found["guest"]
        return guest

    assert [outcome(index, value) for index, (_, value) in writes.items()] == ["ok"] * 3
    put(client, f"{url}/capabilities/hyperv-enforce-cpuid", enabled=True)
    for index, (bit, value) in {**writes, 0x40000002: (6, 0)}.items():
        for eax, works in ((0, False), (0x70 & ~(1 << bit), False), (1 << bit, True)):
            entries = [{"function": "0x40000001", "eax": "0x31237648"}, {"function": "0x40000003", "eax": hex(eax)}]
            put(client, f"{url}/cpuid", entries=entries)
            assert (seen(index) is not None) is works
            assert outcome(index, value) == ("ok" if works and index != 0x40000002 else "#GP")
            msr(client, vm, 0, index, 0)  # the host may all the same


def bounce(client: ContractClient, vm: str, vcpu: int, *stores: tuple[int, bytes]) -> None:
    """L2 of a vCPU exits to L1, which changes its enlightened VMCS and enters it again."""
    assert call(client, vm, vcpu, rcx=8)["outcome"] == "reflected"
    for offset, data in stores:
        store(client, vm, n0.evmcs(vcpu) + offset, data)
    launch(client, vm, vcpu)


XMM_4 = (4, 0, 0, 0, 0, 0)
L2_CALLS: list[tuple[str, dict[str, Any], int, list[int]]] = [
    ("N01", {"rcx": 0x10002, "r8": 3}, 0, [0, 1, 2]),
    ("N02", {"rcx": 0x10002, "r8": 2, "xmm": XMM_4}, 0, [1]),
    ("N04", {"rcx": 0x30013, "r8": 2, "xmm": (2 << 64, 2, 0, 0, 0, 0)}, 0, [2]),
    ("N05", {"rcx": 0x100010003, "r8": 2, "xmm": (6 | 0x7F0000001000 << 64, 0, 0, 0, 0, 0)}, 1 << 32, [0, 1]),
    ("N07", {"rcx": 2, "rdx": 0x6000}, 3, []),
    ("N08", {"rcx": 0x10002, "r8": 2}, 0, [0, 1, 2]),
    ("N16", {"rax": 5, "rcx": 2, "rdx": 0x5000}, 0, [0, 1, 2]),
    ("N16 unmapped", {"rax": 5, "rcx": 2, "rdx": 0x6000}, 3, []),
]


def test_direct_flush_vectors(client: ContractClient, make_vm: MakeVm) -> None:
    """The printed vectors of direct flush, L0 being KVM, one after the other on state N0."""
    vm = nested_vm(client, make_vm, "kvm-2019")  # which lets CPUID change while L2 runs
    for name, registers, result, flushed in L2_CALLS:
        done = call(client, vm, **registers)
        told = done["outcome"], done["registers"], done["flushed"], done["exit"], done["rip_advance"]
        assert told == ("completed", {"rax": hex(result)}, flushed, None, 3), name
    narrow = {"registers": {"rax": "0x10002", "rsi": 3}, "long_mode": False}
    done = client.post(f"{vm}/vcpus/0/hypercalls", json=narrow).json()  # N22
    assert (done["registers"], done["flushed"]) == ({"rdx": "0x0", "rax": "0x0"}, [0, 1, 2])
    put(client, f"{vm}/vcpus/0/vp-assist-page", enlighten_vmentry=1, current_nested_vmcs=hex(n0.evmcs(0)))
    n01, n02 = L2_CALLS[0][1], L2_CALLS[1][1]
    assert call(client, vm, **n01)["row"] == "D10"  # N13: the copy still has the bit
    bounce(client, vm, 0)
    assert call(client, vm, **n01)["row"] == "D4"
    url = f"{vm}/vcpus/0/vp-assist-page"
    put(client, url, nested_features=1, enlighten_vmentry=1, current_nested_vmcs=hex(n0.evmcs(0)))
    launch(client, vm)
    bounce(client, vm, 1, (n0.CLEAN_AT, b"\0\x80\0\0"), (n0.VP_AT, b"\3\0\0\0"))  # N19
    assert call(client, vm, **n02)["flushed"] == [1]
    bounce(client, vm, 1, (n0.CLEAN_AT, bytes(4)), (n0.VP_AT, b"\xff" * 4))  # N20
    done = call(client, vm, rcx=0x10002, r8=2, xmm=((1 << 64) - 1, 0, 0, 0, 0, 0))
    assert (done["flushed"], done["targeted"]) == ([0], [0])
    bounce(client, vm, 0, (n0.CLEAN_AT, bytes(4)), (n0.PAGE_AT, word(0xFFFFFFFFFF000)))  # N17
    done = call(client, vm, **n01)
    assert (done["row"], done["result"]["value"], done["flushed"], done["exit"]) == ("D9", "0x3", [0, 1, 2], None)
    store(client, vm, n0.evmcs(0) + n0.CONTROL_AT, bytes(4))  # N10: the page as it is now
    done = call(client, vm, **n01)
    assert (done["row"], done["exit"]["reason"], done["exit"]["instruction_length"]) == ("D3", "0x12", 3)
    store(client, vm, n0.evmcs(0) + n0.CONTROL_AT, b"\1\0\0\0")
    entries = client.get(f"{vm}/vcpus/0/cpuid").json()["entries"]
    for entry in entries:
        if int(entry["function"], 16) == 0x4000000A:
            entry["eax"] = "0x80101"
    reply = client.put(f"{vm}/vcpus/0/cpuid", json={"entries": entries})
    assert reply.status_code == 200, reply.text
    launch(client, vm)
    assert call(client, vm, **n01)["row"] == "D1"  # N11
