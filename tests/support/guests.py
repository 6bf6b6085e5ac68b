"""Nested state over HTTP: a vCPU as the tables of the engine's tests describe it, and what its GET says."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import httpx2

from engine.arch import kvm_nested_state as abi
from engine.arch.hyperv_cpuid import CpuidEntry
from engine.vcpu.vcpu import VcpuHost
from tests.contract.client import ContractClient
from tests.engine.nested.support import WIDTH, vmx_cpuid
from tests.support.http import OCTETS, store

RAW = {"Accept": "application/octet-stream"}
MakeVm = Callable[..., str]


def leaves(entries: Iterable[CpuidEntry]) -> list[dict[str, int]]:
    """CPUID entries as a request has them."""
    names = ("function", "index", "flags", "eax", "ebx", "ecx", "edx")
    return [dict(zip(names, entry.words(), strict=True)) for entry in entries]


def make_nested(
    client: ContractClient,
    make_vm: MakeVm,
    profile: str,
    *,
    vmx: bool = True,
    evmcs: bool = False,
    hyperv: bool = False,
    smm: bool = False,
    host: VcpuHost | None = None,
    cpuid: tuple[CpuidEntry, ...] | None = None,
    ram: dict[int, int] | None = None,
) -> str:
    """The URL of a vCPU of the reference host."""
    described = {} if host is None else {"nested": host.nested, "vendor": host.vendor}
    entries = vmx_cpuid(vmx=vmx, hyperv=hyperv) if cpuid is None else cpuid
    vm = make_vm(
        profile=profile, spp=False, maxphyaddr=WIDTH, host=described, vcpus=[{"id": 0, "cpuid": leaves(entries)}]
    )
    vcpu = f"{vm}/vcpus/0"
    for gpa, word in (ram or {}).items():
        store(client, vm, gpa, word.to_bytes(4, "little"))
    if evmcs:
        assert client.put(f"{vcpu}/evmcs", json={"enabled": True}).status_code == 200
    if smm:
        assert client.put(f"{vcpu}/smm", json={"smm": True}).status_code == 200
    return vcpu


def load(client: httpx2.Client, vcpu: str, data: bytes | None) -> httpx2.Response:
    """PUT a blob; None is a NULL pointer, which is no bytes at all."""
    return client.put(f"{vcpu}/nested-state", content=data or b"", headers=OCTETS)


def outcome(reply: httpx2.Response) -> tuple[int | str, str]:
    """(errno or return value, deciding check) of a PUT."""
    told = reply.json()
    if reply.status_code == 200:
        return told["returned"], told["check"] + (f" {told['detail']}" if told["detail"] else "")
    assert reply.status_code == 422 and told["code"] == "nested-state-refused", reply.text
    assert (told["returned"] == -1) == ("errno" in told)
    return told.get("errno", told["returned"]), told["check"]


def state(client: httpx2.Client, vcpu: str) -> bytes:
    """The blob of GET."""
    reply = client.get(f"{vcpu}/nested-state", headers=RAW)
    assert reply.status_code == 200, reply.text
    return reply.content


def summary(client: httpx2.Client, vcpu: str) -> str | tuple[int, ...]:
    """GET as (size, flags, vmxon, vmcs12, smm.flags, hdr.flags), or the errno."""
    reply = client.get(f"{vcpu}/nested-state", headers=RAW)
    if reply.status_code != 200:
        assert reply.status_code == 409
        errno: str = reply.json()["errno"]
        return errno
    data = reply.content
    hdr = data[abi.COMMON.size : abi.HEADER_SIZE]
    assert abi.COMMON.get(data, "size") == len(data)
    return (
        len(data),
        abi.COMMON.get(data, "flags"),
        *(abi.VMX_HEADER.get(hdr, name) for name in ("vmxon_pa", "vmcs12_pa", "smm_flags", "flags")),
    )


def explained(client: httpx2.Client, vcpu: str, data: bytes | None) -> dict[str, Any]:
    """What :explain says of a blob."""
    reply = client.post(f"{vcpu}/nested-state:explain", content=data or b"", headers=OCTETS)
    assert reply.status_code == 200, reply.text
    told: dict[str, Any] = reply.json()
    return told
