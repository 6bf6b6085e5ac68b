"""Nested state over HTTP: every printed vector, the upstream programs row by row, any blob, and the JSON form."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engine.arch import kvm_nested_state as abi
from engine.arch.vmx_msrs import EFER, EFER_SVME
from engine.nested import steps_of
from engine.vcpu.cpuid import supported_cpuid
from tests.contract.client import ContractClient
from tests.engine.nested.drawn_blobs import BEFORE_THE_POINT_OF_NO_RETURN, blobs
from tests.engine.nested.selftest_rows import (
    SVM_FRESH,
    SVM_WITH_SVME,
    Row,
    newest_vmx_rows,
    rows_of_2019,
)
from tests.engine.nested.set_vectors import EMPTY, IN_L1, L2, OFF, VECTORS, Vector
from tests.engine.nested.support import (
    ERAS,
    EV,
    GIF,
    GM,
    MIN32,
    MINUS,
    NONE,
    RP,
    SHADOW_WORD,
    SHADOWING,
    blob,
    vmcs12,
    vmx_cpuid,
)
from tests.support.guests import RAW, MakeVm, explained, leaves, load, make_nested, outcome, state, summary
from tests.support.http import OCTETS

ERRNOS = {"EINVAL", "EFAULT"}


@pytest.mark.parametrize("era", ERAS)
@pytest.mark.parametrize("vector", VECTORS, ids=lambda vector: vector.id)
def test_vector(client: ContractClient, make_vm: MakeVm, vector: Vector, era: str) -> None:
    vcpu = make_nested(client, make_vm, era, **vector.vcpu, ram=vector.ram)
    for fields in vector.prior:
        assert load(client, vcpu, blob(**fields)).status_code == 200
    before = summary(client, vcpu)
    data = None if vector.blob is None else blob(**vector.blob)
    expected = (vector.of(era, vector.returns), vector.of(era, vector.check))
    told = explained(client, vcpu, data)
    assert summary(client, vcpu) == before
    after = state(client, vcpu) if isinstance(before, tuple) else None
    assert outcome(load(client, vcpu, data)) == expected
    assert summary(client, vcpu) == vector.of(era, vector.after)
    label = told["check"] + (f" {told['detail']}" if told["detail"] else "")
    assert (told["errno"] or told["returned"], label) == expected
    if told["after"] is not None:
        assert abi.encode_blob(told["after"]) == state(client, vcpu)
    if told["state_kept"] and after is not None:
        assert state(client, vcpu) == after


class Program:
    """Rows of an upstream program, on one vCPU."""

    def __init__(self, client: ContractClient, vcpu: str) -> None:
        self.client = client
        self.vcpu = vcpu

    def rows(self, rows: Iterable[Row]) -> None:
        for number, fields, returns, decides in rows:
            data = None if fields is None else blob(**fields)
            told = outcome(load(self.client, self.vcpu, data))
            assert (number, told[0], told[1].partition(" ")[0]) == (number, returns, decides)

    def cpuid(self, *, vmx: bool) -> None:
        reply = self.client.put(f"{self.vcpu}/cpuid", json={"entries": leaves(vmx_cpuid(vmx=vmx))})
        assert reply.status_code == 200, reply.text

    def enable_evmcs(self) -> None:
        reply = self.client.put(f"{self.vcpu}/capabilities/163", json={"enabled": True})
        assert reply.json()["result"] == {"versions": "0x101"}


@pytest.mark.parametrize("have_evmcs", [False, True])
def test_the_program_of_2019(client: ContractClient, make_vm: MakeVm, have_evmcs: bool) -> None:
    vm = make_vm(profile="kvm-2019", spp=False, vcpus=[{"id": 5}], host={"nested_evmcs": have_evmcs})
    program, rows = Program(client, f"{vm}/vcpus/5"), rows_of_2019(have_evmcs)
    program.rows(rows.fresh)
    program.cpuid(vmx=True)
    program.rows(rows.with_vmx)
    if have_evmcs:
        program.enable_evmcs()
    program.rows(rows.with_evmcs)
    assert summary(client, program.vcpu) == OFF


@pytest.mark.parametrize("have_evmcs", [False, True])
def test_the_newest_program_on_intel(client: ContractClient, make_vm: MakeVm, have_evmcs: bool) -> None:
    vm = make_vm(profile="kvm-latest", spp=False, host={"nested_evmcs": have_evmcs})
    program, rows = Program(client, f"{vm}/vcpus/0"), newest_vmx_rows(have_evmcs)
    program.cpuid(vmx=False)
    program.rows(rows.fresh)
    program.cpuid(vmx=True)
    program.rows(rows.with_vmx)
    if have_evmcs:
        program.enable_evmcs()
    program.rows(rows.with_evmcs)
    assert summary(client, program.vcpu) == OFF


def test_the_newest_program_on_amd(client: ContractClient, make_vm: MakeVm) -> None:
    vm = make_vm(
        profile="kvm-latest",
        spp=False,
        host={"vendor": "amd"},
        vcpus=[{"id": 0, "cpuid": leaves(supported_cpuid("amd", True, 46))}],
    )
    program = Program(client, f"{vm}/vcpus/0")
    assert client.get(f"{program.vcpu}/capabilities/163").json()["available"] == 0
    program.rows(SVM_FRESH)
    reply = client.put(f"{program.vcpu}/msrs", json={"msrs": [{"index": EFER, "value": EFER_SVME}]})
    assert reply.json() == {"written": 1, "refused": None, "result": "ok"}
    program.rows(SVM_WITH_SVME)
    found = client.get(f"{program.vcpu}/nested-state").json()
    assert found == {"length": 128, "flags": hex(GIF), "format": 1, "size": 128, "svm": {"vmcb_pa": "0x0"}}


# ---- sequences


@pytest.mark.parametrize("era", ERAS)
def test_s01_evmcs_survives_get_and_set_only_today(client: ContractClient, make_vm: MakeVm, era: str) -> None:
    vcpu = make_nested(client, make_vm, era, evmcs=True)
    assert load(client, vcpu, blob(flags=GM + EV, vmcs12_pa=NONE, data=vmcs12(MIN32))).status_code == 200
    again = outcome(load(client, vcpu, state(client, vcpu)))
    assert again == (("EINVAL", "V14") if era == "kvm-2019" else (0, "V23"))
    if era == "kvm-latest":
        assert summary(client, vcpu) == (4224, GM + EV, 0x1000, NONE, 0, 0)


@pytest.mark.parametrize("era", ERAS)
def test_s02_s04_s05(client: ContractClient, make_vm: MakeVm, era: str) -> None:
    vcpu = make_nested(client, make_vm, era, evmcs=True)
    assert load(client, vcpu, blob(size=128)).status_code == (200 if era == "kvm-2019" else 422)
    assert summary(client, vcpu) == EMPTY
    assert load(client, vcpu, blob(**L2)).status_code == load(client, vcpu, blob(flags=EV)).status_code == 200
    assert summary(client, vcpu) == IN_L1
    assert client.put(f"{vcpu}/msrs", json={"msrs": [{"index": "0x3a", "value": 0}]}).json()["result"] == "ok"
    assert summary(client, vcpu) == OFF


@pytest.mark.parametrize("era", ERAS)
def test_get_set_get_is_the_identity(client: ContractClient, make_vm: MakeVm, era: str) -> None:
    for fields in (L2, {**L2, "flags": GM | RP}, {}, {"size": 128, "data": b"", "vmcs12_pa": NONE}, MINUS):
        vcpu, twin = (make_nested(client, make_vm, era) for _ in range(2))
        assert load(client, vcpu, blob(**fields)).status_code == 200
        first = state(client, vcpu)
        assert load(client, twin, first).status_code == 200
        assert state(client, twin) == first
        assert client.get(f"{twin}/nested-state").json() == client.get(f"{vcpu}/nested-state").json()


@pytest.mark.parametrize("era", ERAS)
def test_what_vmlaunch_enters_is_what_get_says(client: ContractClient, make_vm: MakeVm, era: str) -> None:
    vcpu = make_nested(client, make_vm, era)
    vm = vcpu.removesuffix("/vcpus/0")

    def vmx(instruction: str, address: int | None = None) -> dict[str, Any]:
        body = {"instruction": instruction, **({} if address is None else {"address": hex(address)})}
        reply = client.post(f"{vcpu}/vmx", json=body)
        assert reply.status_code == 200, reply.text
        told: dict[str, Any] = reply.json()
        return told

    assert vmx("vmlaunch")["result"] == "#UD"
    cr4 = int(client.get(f"{vcpu}/vmcs").json()["cr4"], 16) | 0x2000
    client.put(f"{vcpu}/vmcs", json={"cr4": cr4, "efer": 0})
    client.put(f"{vcpu}/msrs", json={"msrs": [{"index": "0x3a", "value": 5}]})
    for gpa in (0x1000, 0x2000):
        client.put(f"{vm}/memory", params={"gpa": hex(gpa)}, content=vmcs12(MIN32), headers=OCTETS)
    for step in (("vmxon", 0x1000), ("vmclear", 0x2000), ("vmptrld", 0x2000)):
        assert vmx(*step)["result"] == "succeed", step
    assert vmx("vmptrst")["value"] == "0x2000"
    assert vmx("vmresume") == {
        "result": "vmfail-valid",
        "vm_instruction_error": 5,
        "check": "launch state",
        "exit_reason": None,
        "exit_qualification": None,
        "value": None,
    }
    assert vmx("vmlaunch")["result"] == "entered"
    assert summary(client, vcpu) == (4224, GM | RP, 0x1000, 0x2000, 0, 0)
    refused = client.post(f"{vcpu}/vmx", json={"instruction": "vmlaunch"})
    assert refused.status_code == 409 and refused.json()["errno"] == "EBUSY"
    assert client.post(f"{vcpu}/nested-state:prepare-run").json() == {"exit": None, "suberror": None}
    assert summary(client, vcpu) == (4224, GM, 0x1000, 0x2000, 0, 0)


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"instruction": "vmcall"}, "instruction"),
        ({"instruction": "vmxon"}, "address"),
        ({"instruction": "vmxoff", "address": 0}, "address"),
        ({"instruction": "vmptrld", "address": 1 << 64}, "address"),
    ],
)
def test_refused_instructions(client: ContractClient, vm: str, body: dict[str, Any], field: str) -> None:
    reply = client.post(f"{vm}/vcpus/0/vmx", json=body)
    assert (reply.status_code, reply.json()["field"]) == (422, field)


# ---- any blob


@pytest.mark.parametrize("era", ERAS)
def test_sizes_from_0_to_9000(client: ContractClient, make_vm: MakeVm, era: str) -> None:
    vcpu = make_nested(client, make_vm, era, ram={0x5000: SHADOW_WORD})
    full = blob(flags=GM, size=8320, data=vmcs12(SHADOWING), shadow=vmcs12(revision=SHADOW_WORD)) + bytes(9000 - 8320)
    edges = {0, 1, 7, 8, 127, 128, 1125, 1126, 4223, 4224, 5221, 5222, 8319, 8320, 9000}
    # The engine's own test takes every size, in both eras.
    for length in sorted(edges.union(range(ERAS.index(era), 9001, 9))):
        claimed = (full[:4] + length.to_bytes(4, "little") + full[8:length])[:length]
        if length < 128:
            expected: tuple[int | str, str] = ("EFAULT", "G1")
        elif length < 1126:
            expected = (0, "V12") if era == "kvm-2019" else ("EINVAL", "V12n")
        elif length < 5222:
            expected = ("EINVAL", "V20a shadow size")
        else:
            expected = (0, "V23")
        assert outcome(load(client, vcpu, claimed)) == expected, length


quick = settings(
    max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.mark.parametrize("era", ERAS)
@quick
@given(data=blobs())
def test_any_blob_is_answered_as_documented(
    client: ContractClient, vcpus: dict[str, str], era: str, data: bytes
) -> None:
    vcpu = vcpus[era]
    before = state(client, vcpu)
    told = explained(client, vcpu, data)
    assert [row["outcome"] for row in told["trail"]].count("decides") == 1
    assert len(told["trail"]) == len(steps_of(era))
    reply = load(client, vcpu, data)
    errno, check = outcome(reply)
    assert errno in ERRNOS or errno in (0, 1, 2)
    assert check.startswith(told["check"])
    if told["check"] in BEFORE_THE_POINT_OF_NO_RETURN:
        assert state(client, vcpu) == before and reply.json()["state_kept"] is True
    else:
        assert state(client, vcpu) == abi.encode_blob(told["after"])


@pytest.mark.parametrize("era", ERAS)
@quick
@given(data=st.binary(max_size=9000))
def test_random_bytes(client: ContractClient, vcpus: dict[str, str], era: str, data: bytes) -> None:
    reply = load(client, vcpus[era], data)
    assert outcome(reply)[0] in {*ERRNOS, 0}
    if data:
        assert abi.encode_blob(explained(client, vcpus[era], data)["given"]) == data


@pytest.fixture
def vcpus(client: ContractClient, make_vm: MakeVm) -> dict[str, str]:
    """A vCPU of each era with everything on."""
    ram = {0x5000: SHADOW_WORD}
    return {era: make_nested(client, make_vm, era, evmcs=True, hyperv=True, ram=ram) for era in ERAS}


# ---- JSON


@quick
@given(data=blobs())
def test_json_to_bytes_to_json(client: ContractClient, vcpus: dict[str, str], data: bytes) -> None:
    vcpu = vcpus["kvm-latest"]
    if not data:
        return
    document = explained(client, vcpu, data)["given"]
    reply = client.post(f"{vcpu}/nested-state:explain", json=document)
    assert reply.status_code == 200, reply.text
    assert reply.json()["given"] == document
    assert reply.json() == explained(client, vcpu, data)
    assert abi.encode_blob(document) == data


@pytest.mark.parametrize("era", ERAS)
def test_fields_by_name(client: ContractClient, make_vm: MakeVm, era: str) -> None:
    vcpu = make_nested(client, make_vm, era)
    page = {name: value if name == "revision" else hex(value) for name, value in MIN32.items()}
    document = {"flags": 1, "vmx": {"vmxon_pa": "0x1000", "vmcs12_pa": 8192}, "vmcs12": page}
    reply = client.put(f"{vcpu}/nested-state", json=document)
    assert reply.status_code == 200, reply.text
    assert reply.json() == {"returned": 0, "check": "V23", "detail": None, "says": "L2 is entered: done"}
    found = client.get(f"{vcpu}/nested-state")
    assert found.headers["Vary"] == "Accept" and reply.headers["ETag"] == found.headers["ETag"]
    told = found.json()
    assert (told["length"], told["size"], told["flags"], told["format"]) == (4224, 4224, "0x1", 0)
    assert told["vmcs12"]["guest_cr0"] == "0x80000021" and told["vmx"]["vmcs12_pa"] == "0x2000"
    raw = client.get(f"{vcpu}/nested-state", headers=RAW)
    assert abi.encode_blob(told) == raw.content
    assert raw.headers["ETag"] != found.headers["ETag"]
    again = client.get(f"{vcpu}/nested-state", headers={"If-None-Match": found.headers["ETag"]})
    assert again.status_code == 304


BAD_DOCUMENTS: list[tuple[Any, str]] = [
    ({"flgas": 1}, "nested_state.flgas"),
    ({"flags": 1 << 16}, "nested_state.flags"),
    ({"flags": -1}, "nested_state.flags"),
    ({"flags": "one"}, "nested_state.flags"),
    ({"flags": True}, "nested_state.flags"),
    ({"flags": 1.5}, "nested_state.flags"),
    ({"format": 2, "vmx": {}}, "nested_state.vmx"),
    ({"vmx": []}, "vmx"),
    ({"vmx": {"vmxon_pa": "0x1ffffffffffffffff"}}, "vmx.vmxon_pa"),
    ({"vmcs12": {"guest_cr9": 0}}, "vmcs12.guest_cr9"),
    ({"vmcs12": {"reserved_998": "zz"}}, "vmcs12.reserved_998"),
    ({"length": 4, "size": 4}, "nested_state.size"),
    ({"length": "many"}, "length"),
    ({"length": 128, "tail": "00"}, "tail"),
    ({"tail": "0"}, "tail"),
    ([], "body"),
    (7, "body"),
]


@pytest.mark.parametrize(("document", "field"), BAD_DOCUMENTS, ids=[json.dumps(row[0]) for row in BAD_DOCUMENTS])
def test_documents_that_no_blob_can_hold(client: ContractClient, vm: str, document: Any, field: str) -> None:
    url = f"{vm}/vcpus/0/nested-state"
    before = client.get(url).json()
    for reply in (client.put(url, json=document), client.post(f"{url}:explain", json=document)):
        assert (reply.status_code, reply.json()["code"], reply.json()["field"]) == (422, "invalid-value", field)
    assert client.get(url).json() == before


@pytest.mark.parametrize("content", [b"", b"{", b"[" * 10_000, b'{"flags": NaN}', b"\xff"])
def test_bodies_that_are_not_json(client: ContractClient, vm: str, content: bytes) -> None:
    reply = client.put(f"{vm}/vcpus/0/nested-state", content=content, headers={"Content-Type": "application/json"})
    assert (reply.status_code, reply.json()["code"]) == (400, "malformed-body")


def test_media_types(client: ContractClient, vm: str) -> None:
    url = f"{vm}/vcpus/0/nested-state"
    assert client.get(url, headers={"Accept": "text/plain"}).status_code == 406
    assert client.put(url, content=b"x", headers={"Content-Type": "text/plain"}).status_code == 415
    assert client.post(f"{url}:explain", content=b"x", headers={"Content-Type": "text/plain"}).status_code == 415


# ---- the resource


def test_tags_and_revisions(client: ContractClient, make_vm: MakeVm) -> None:
    vm = make_vm(profile="kvm-2019", spp=False, require_match=True, vcpus=[{"id": 0, "cpuid": leaves(vmx_cpuid())}])
    url = f"{vm}/vcpus/0/nested-state"
    off = blob(size=128, data=b"", **MINUS)
    assert client.put(url, content=off, headers=OCTETS).status_code == 428
    tag = client.get(url, headers=RAW).headers["ETag"]
    assert client.put(url, content=off, headers={**OCTETS, "If-Match": '"x"'}).status_code == 412
    revision = client.get(vm).json()["revision"]
    reply = client.put(url, content=blob(), headers={**OCTETS, "If-Match": tag})
    assert reply.status_code == 200 and reply.headers["ETag"] == client.get(url, headers=RAW).headers["ETag"] != tag
    assert client.get(vm).json()["revision"] == revision + 1
    # A refusal that leaves a new state behind is a change.
    refused = client.put(url, content=blob(vmcs12_pa=0x1000), headers={**OCTETS, "If-Match": reply.headers["ETag"]})
    assert refused.status_code == 422 and refused.json()["state_kept"] is False
    assert summary(client, f"{vm}/vcpus/0") == EMPTY
    assert client.get(vm).json()["revision"] == revision + 2


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("GET", "nested-state", None),
        ("PUT", "nested-state", {}),
        ("POST", "nested-state:explain", {}),
        ("POST", "nested-state:prepare-run", None),
        ("GET", "cpuid", None),
        ("PUT", "cpuid", {"entries": []}),
        ("GET", "hyperv-cpuid", None),
        ("GET", "smm", None),
        ("PUT", "smm", {"smm": True}),
        ("GET", "evmcs", None),
        ("PUT", "evmcs", {"enabled": True}),
        ("GET", "capabilities/163", None),
        ("PUT", "capabilities/163", {"enabled": True}),
        ("PUT", "msrs", {"msrs": [{"index": 1, "value": 1}]}),
        ("POST", "vmx", {"instruction": "vmxoff"}),
    ],
)
def test_unknown_machines_and_vcpus(client: ContractClient, vm: str, method: str, path: str, body: Any) -> None:
    for url, field in ((f"{vm}/vcpus/9", "vcpu"), ("/v1/vms/vm_none/vcpus/0", "vm")):
        reply = client.request(method, f"{url}/{path}", **({} if body is None else {"json": body}))
        assert (reply.status_code, reply.json()["field"]) == (404, field)
