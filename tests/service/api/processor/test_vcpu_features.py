"""CPUID, MSRs, SMM and the enlightened VMCS of a vCPU over HTTP."""

from __future__ import annotations

from typing import Any

import pytest

from engine.arch.evmcs import EVMCS
from tests.contract.client import ContractClient
from tests.engine.nested.support import ERAS, EV, GM, MIN32, NONE, blob, vmcs12, vmx_cpuid
from tests.support.guests import MakeVm, leaves, load, make_nested, summary
from tests.support.http import OCTETS

ASSIST = "0x40000073"


def msr(client: ContractClient, vcpu: str, index: int | str) -> dict[str, Any]:
    reply = client.get(f"{vcpu}/msrs", params={"index": index if isinstance(index, str) else hex(index)})
    assert reply.status_code == 200, reply.text
    (found,) = reply.json()["vcpu"]
    told: dict[str, Any] = found
    return told


def write(client: ContractClient, vcpu: str, *writes: tuple[int | str, int], by: str = "host") -> dict[str, Any]:
    body = {"msrs": [{"index": index, "value": value} for index, value in writes], "by": by}
    reply = client.put(f"{vcpu}/msrs", json=body)
    assert reply.status_code == 200, reply.text
    told: dict[str, Any] = reply.json()
    return told


# ---- CPUID


def with_xcr0_of_reset(leaf: dict[str, str]) -> dict[str, str]:
    """A leaf as the guest has it: the XSAVE area of leaf 0xD is that of the components that are on."""
    return {**leaf, "ebx": "0x240"} if leaf["function"] == "0xd" else leaf


def test_cpuid_is_nothing_until_it_is_set(client: ContractClient, make_vm: MakeVm) -> None:
    vm = make_vm(spp=False)
    url = f"{vm}/vcpus/0/cpuid"
    first = client.get(url)
    assert first.json()["entries"] == []
    supported = first.json()["supported"]
    assert next(leaf for leaf in supported if leaf["function"] == "0x1")["ecx"] == "0xf6fa3223"
    changed = client.put(url, json={"entries": supported})
    assert changed.json()["entries"] == [with_xcr0_of_reset(leaf) for leaf in supported]
    assert changed.headers["ETag"] == client.get(url).headers["ETag"] != first.headers["ETag"]
    assert client.get(url, headers={"If-None-Match": changed.headers["ETag"]}).status_code == 304
    assert client.put(url, json={"entries": []}, headers={"If-Match": first.headers["ETag"]}).status_code == 412
    seen = client.get(vm).json()["vcpus"][0]["cpuid"]
    assert seen == [{name: value for name, value in leaf.items() if name != "flags"} for leaf in supported]


def test_cpuid_of_the_creation(client: ContractClient, make_vm: MakeVm) -> None:
    vm = make_vm(spp=False, vcpus=[{"id": 3, "vp_index": 9, "cpuid": leaves(vmx_cpuid())}])
    entries = client.get(f"{vm}/vcpus/3/cpuid").json()["entries"]
    given = [{name: hex(value) for name, value in leaf.items()} for leaf in leaves(vmx_cpuid())]
    assert entries == [with_xcr0_of_reset(leaf) for leaf in given]
    assert msr(client, f"{vm}/vcpus/3", "0x40000002")["host"] == "0x9"
    assert write(client, f"{vm}/vcpus/3", ("0x40000002", 4))["result"] == "ok"
    assert client.get(vm).json()["vcpus"][0]["vp_index"] == 4


@pytest.mark.parametrize("era", ERAS)
def test_cpuid_follows_the_state(client: ContractClient, make_vm: MakeVm, era: str) -> None:
    vcpu = make_nested(client, make_vm, era)

    def shown() -> tuple[int, int, int]:
        entries = client.get(f"{vcpu}/cpuid").json()["entries"]
        words = {leaf["function"]: (int(leaf["ecx"], 16), int(leaf["edx"], 16)) for leaf in entries}
        return words["0x1"][0] & 1 << 27, words["0x1"][1] & 1 << 9, words["0x7"][0] & 1 << 4

    assert shown() == (0, 1 << 9, 0)
    assert client.put(f"{vcpu}/vmcs", json={"cr4": hex(0x2660 | 1 << 18 | 1 << 22)}).status_code == 200
    assert write(client, vcpu, ("0x1b", 0x400))["result"] == "refused"
    assert write(client, vcpu, ("0x1b", 0xFEE0_0100))["result"] == "ok"
    assert shown() == (1 << 27, 0, 1 << 4)


@pytest.mark.parametrize("era", ERAS)
def test_refused_cpuid(client: ContractClient, make_vm: MakeVm, era: str) -> None:
    vcpu = make_nested(client, make_vm, era)
    assert load(client, vcpu, blob(flags=GM, data=vmcs12(MIN32))).status_code == 200
    before = client.get(f"{vcpu}/cpuid").json()
    narrow = client.put(f"{vcpu}/cpuid", json={"entries": [{"function": "0x80000008", "eax": 40 << 8}]})
    assert (narrow.status_code, narrow.json()["errno"]) == (422, "EINVAL")
    assert client.get(f"{vcpu}/cpuid").json() == before
    assert client.put(f"{vcpu}/cpuid", json={"entries": []}).status_code == (200 if era == "kvm-2019" else 422)


@pytest.mark.parametrize(
    ("document", "field"),
    [
        ({}, "entries"),
        ({"entries": [{"eax": 1}]}, "entries[0].function"),
        ({"entries": [{"function": 1 << 32}]}, "entries[0].function"),
        ({"entries": [{"function": 1, "efx": 1}]}, "entries[0].efx"),
        ({"entries": [{"function": 1}] * 257}, "entries"),
    ],
)
def test_no_cpuid(client: ContractClient, vm: str, document: Any, field: str) -> None:
    reply = client.put(f"{vm}/vcpus/0/cpuid", json=document)
    assert (reply.status_code, reply.json()["field"]) == (422, field)


def test_hyperv_leaves(client: ContractClient, make_vm: MakeVm) -> None:
    for era, count in (("kvm-2019", 6), ("kvm-latest", 10)):
        vcpu = make_nested(client, make_vm, era)
        first = client.get(f"{vcpu}/hyperv-cpuid")
        assert len(first.json()["entries"]) == count
        assert client.put(f"{vcpu}/evmcs", json={"enabled": True}).status_code == 200
        leaf = client.get(f"{vcpu}/hyperv-cpuid").json()["entries"][-1]
        assert (leaf["function"], int(leaf["eax"], 16) & 0xFFFF) == ("0x4000000a", 0x101)
        assert client.get(f"{vcpu}/hyperv-cpuid", headers={"If-None-Match": first.headers["ETag"]}).status_code == 200


# ---- MSRs


@pytest.mark.parametrize("era", ERAS)
def test_writes_by_host_and_guest(client: ContractClient, make_vm: MakeVm, era: str) -> None:
    vcpu = make_nested(client, make_vm, era)
    assert write(client, vcpu, (0x3A, 5), (0x10, 7)) == {"written": 2, "refused": None, "result": "ok"}
    locked = write(client, vcpu, (0x10, 8), (0x3A, 1), (0x10, 9), by="guest")
    assert locked == {"written": 1, "refused": {"index": "0x3a", "value": "0x1"}, "result": "#GP"}
    assert msr(client, vcpu, 0x10)["guest"] == "0x8"
    assert write(client, vcpu, (0x48D, 0), by="guest")["result"] == "#GP"
    lowered = 0x16 | 0x3F << 32
    assert write(client, vcpu, (0x48D, lowered))["result"] == "ok"
    assert msr(client, vcpu, 0x48D)["host"] == hex(lowered)
    again = write(client, vcpu, (0x48D, 0x16 | 0x7F << 32))
    assert again["result"] == ("refused" if era == "kvm-2019" else "ok")


def test_capability_msrs_of_a_guest_without_vmx(client: ContractClient, make_vm: MakeVm) -> None:
    vcpu = make_nested(client, make_vm, "kvm-2019", vmx=False)
    found = msr(client, vcpu, 0x480)
    assert (found["name"], found["host"], found["guest"]) == ("IA32_VMX_BASIC", None, None)
    names = {row["name"] for row in client.get(f"{vcpu}/msrs").json()["vcpu"]}
    assert {"IA32_VMX_BASIC", "IA32_FEATURE_CONTROL", "HV_X64_MSR_VP_ASSIST_PAGE", "IA32_EFER"} <= names


@pytest.mark.parametrize(
    ("document", "field"),
    [
        ({"msrs": []}, "msrs"),
        ({"msrs": [{"index": 1}]}, "msrs[0].value"),
        ({"msrs": [{"index": 1 << 32, "value": 0}]}, "msrs[0].index"),
        ({"msrs": [{"index": 1, "value": -1}]}, "msrs[0].value"),
        ({"msrs": [{"index": 1, "value": 1}], "by": "smm"}, "by"),
    ],
)
def test_no_msrs(client: ContractClient, vm: str, document: Any, field: str) -> None:
    reply = client.put(f"{vm}/vcpus/0/msrs", json=document)
    assert (reply.status_code, reply.json()["field"]) == (422, field)


def test_msrs_of_a_strict_machine(client: ContractClient, make_vm: MakeVm) -> None:
    strict = make_vm(require_match=True)
    body = {"msrs": [{"index": "0x3a", "value": "0x5"}]}
    assert client.put(f"{strict}/vcpus/0/msrs", json=body).status_code == 428
    assert client.put(f"{strict}/vcpus/0/msrs", json=body, headers={"If-Match": '"old"'}).status_code == 412
    tag = client.get(strict).headers["ETag"]
    assert client.put(f"{strict}/vcpus/0/msrs", json=body, headers={"If-Match": tag}).status_code == 200


# ---- SMM


@pytest.mark.parametrize("era", ERAS)
def test_smm(client: ContractClient, make_vm: MakeVm, era: str) -> None:
    vcpu = make_nested(client, make_vm, era)
    assert load(client, vcpu, blob()).status_code == 200
    first = client.get(f"{vcpu}/smm")
    assert first.json() == {"smm": False}
    assert client.put(f"{vcpu}/smm", json={"smm": "yes"}).status_code == 422
    assert client.put(f"{vcpu}/smm", json={"smm": True}, headers={"If-Match": '"x"'}).status_code == 412
    assert client.put(f"{vcpu}/smm", json={"smm": True}, headers={"If-Match": first.headers["ETag"]}).json()["smm"]
    found = summary(client, vcpu)
    assert found[0] == (4224 if era == "kvm-2019" else 128)


# ---- the enlightened VMCS


@pytest.mark.parametrize("era", ERAS)
def test_from_enabling_to_attached(client: ContractClient, make_vm: MakeVm, era: str) -> None:
    vcpu = make_nested(client, make_vm, era, hyperv=True)
    vm = vcpu.removesuffix("/vcpus/0")
    first = client.get(f"{vcpu}/evmcs")
    assert first.json()["enabled"] is first.json()["visible"] is False
    assert first.json()["versions"] == {"lowest": 0, "highest": 0, "word": "0x0"}
    assert client.put(f"{vcpu}/evmcs", json={"enabled": False}).json() == first.json()
    enabled = client.put(f"{vcpu}/evmcs", json={"enabled": True}).json()
    assert enabled["versions"] == {"lowest": 1, "highest": 1, "word": "0x101"} and enabled["visible"] is True
    assert int(enabled["lost_controls"]["pin"], 16) == 0x40
    assert client.put(f"{vcpu}/evmcs", json={"enabled": True}).json() == enabled
    refused = client.put(f"{vcpu}/evmcs", json={"enabled": False})
    assert (refused.status_code, refused.json()["field"]) == (409, "enabled")
    page = bytearray(EVMCS.size)
    for name, value in (("revision_id", 1), ("guest_rip", 0x1234), ("hv_vp_id", 9)):
        EVMCS.put(page, name, value)
    assist = bytearray(64)
    assist[40], assist[48:56] = 1, (0x9000).to_bytes(8, "little")
    for gpa, data in ((0x8000, assist), (0x9000, page)):
        client.put(f"{vm}/memory", params={"gpa": hex(gpa)}, content=bytes(data), headers=OCTETS)
    assert write(client, vcpu, (ASSIST, 0x8001))["result"] == "ok"
    assert client.get(f"{vcpu}/evmcs").json()["wanted"] == "0x9000"
    assert load(client, vcpu, blob(flags=EV, vmcs12_pa=NONE)).status_code == 200
    assert client.get(f"{vcpu}/evmcs").json()["pending"] == (era == "kvm-latest")
    assert client.post(f"{vcpu}/nested-state:prepare-run").json()["exit"] is None
    found = client.get(f"{vcpu}/evmcs").json()
    assert (found["attached"], found["pending"], found["fields"]["hv_vp_id"]) == ("0x9000", False, "0x9")
    assert summary(client, vcpu)[:2] == (4224, EV)
    cleared = client.put(f"{vm}/memory", params={"gpa": "0x9000"}, content=b"\xff" * 4, headers=OCTETS)
    assert cleared.status_code == 204
    assert client.get(f"{vcpu}/evmcs").json()["fields"]["revision_id"] == "0xffffffff"


def test_a_restored_enlightened_vmcs_without_memory_ends_the_run(client: ContractClient, make_vm: MakeVm) -> None:
    vcpu = make_nested(client, make_vm, "kvm-latest", hyperv=True, evmcs=True)
    vm = vcpu.removesuffix("/vcpus/0")
    assist = bytearray(64)
    assist[40], assist[48:56] = 1, (1 << 38).to_bytes(8, "little")
    client.put(f"{vm}/memory", params={"gpa": "0x8000"}, content=bytes(assist), headers=OCTETS)
    write(client, vcpu, (ASSIST, 0x8001))
    assert load(client, vcpu, blob(flags=EV, vmcs12_pa=NONE)).status_code == 200
    assert client.post(f"{vcpu}/nested-state:prepare-run").json() == {"exit": "internal-error", "suberror": 1}


@pytest.mark.parametrize(
    ("profile", "host", "available", "errno"),
    [
        ("kvm-2019", {"nested": False}, 1, "ENOTTY"),
        ("kvm-2019", {"vendor": "amd"}, 1, "ENODEV"),
        ("kvm-latest", {"vendor": "amd"}, 0, "ENOTTY"),
        ("kvm-latest", {"nested_evmcs": False}, 0, "EINVAL"),
    ],
)
def test_hosts_without_one(
    client: ContractClient, make_vm: MakeVm, profile: str, host: dict[str, Any], available: int, errno: str
) -> None:
    vcpu = f"{make_vm(profile=profile, spp=False, host=host)}/vcpus/0"
    for path in (
        "evmcs",
        "capabilities/163",
        "capabilities/hyperv-enlightened-vmcs",
        "capabilities/KVM_CAP_HYPERV_ENLIGHTENED_VMCS",
    ):
        refused = client.put(f"{vcpu}/{path}", json={"enabled": True})
        assert (refused.status_code, refused.json()["code"], refused.json()["errno"]) == (409, "unsupported", errno)
    told = client.get(f"{vcpu}/capabilities/163").json()
    assert (told["available"], told["enabled"], told["result"]) == (available, False, {})
    assert client.get(f"{vcpu}/capabilities/9999").status_code == 404


def test_today_nested_off_has_version_0(client: ContractClient, make_vm: MakeVm) -> None:
    vcpu = f"{make_vm(profile='kvm-latest', spp=False, host={'nested': False})}/vcpus/0"
    told = client.put(f"{vcpu}/capabilities/163", json={"enabled": True}).json()
    assert (told["available"], told["enabled"], told["result"]) == (1, True, {"versions": "0x0"})
    assert client.get(f"{vcpu}/nested-state").json()["size"] == 128


# ---- sub-page protection


def test_writes_of_l2_are_counted_in_2019(client: ContractClient, make_vm: MakeVm) -> None:
    vm = make_vm(profile="kvm-2019", vcpus=[{"id": 0, "cpuid": leaves(vmx_cpuid())}], maxphyaddr=39)
    client.post(f"{vm}/protections", json={"name": "p", "objects": [{"name": "o", "gpa": "0x6000", "size": 128}]})
    assert load(client, f"{vm}/vcpus/0", blob(flags=GM, data=vmcs12(MIN32))).status_code == 200
    result = client.post(f"{vm}/traces", json={"accesses": [{"gpa": "0x6000"}, {"gpa": "0x6080"}]}).json()
    assert (result["unenforced_writes"], result["violations"], result["page_granular_violations"]) == (1, 0, 2)
    one = client.post(f"{vm}/accesses", json={"gpa": "0x6000", "access": "write", "size": 2, "data": "abcd"})
    assert one.json()["resolution"] == "completed", one.text
    assert client.get(f"{vm}/memory", params={"gpa": "0x6000", "size": "2"}).content == b"\xab\xcd"
    assert client.get(f"{vm}/counters").json()["counters"]["unenforced_writes"] == 2


def test_today_they_exclude_each_other(client: ContractClient, make_vm: MakeVm) -> None:
    vm = make_vm(profile="kvm-latest", spp=False, host={"nested": True})
    refused = client.put(f"{vm}/spp", json={"active": True})
    assert (refused.status_code, refused.json()["errno"]) == (409, "EPERM")
    vm = make_vm(profile="kvm-latest", spp=True, vcpus=[{"id": 0, "cpuid": leaves(vmx_cpuid())}])
    told = load(client, f"{vm}/vcpus/0", blob()).json()
    assert (told["check"], told["errno"], told["state_kept"]) == ("V3a", "EINVAL", True)
