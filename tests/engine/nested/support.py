"""Builders shared by the tests of nesting: guest memory, vCPUs of the reference host, blobs."""

from __future__ import annotations

from typing import Any

from engine.abi import UserBuffer
from engine.arch import kvm_nested_state as abi
from engine.arch.hyperv_cpuid import INTERFACE_SIGNATURE, LEAF_INTERFACE, CpuidEntry
from engine.arch.vmcs12 import VMCS12, VMCS12_REVISION
from engine.nested import enable_evmcs, get_nested_state, set_nested_state
from engine.nested.verdict import SetResult
from engine.vcpu.cpuid import ECX1_VMX, supported_cpuid
from engine.vcpu.vcpu import Vcpu, VcpuHost

ERAS = ("kvm-2019", "kvm-latest")
WIDTH = 39
NONE = abi.NO_ADDRESS
# The header of a blob without VMX.
MINUS = {"vmxon": NONE, "vmcs12_pa": NONE}
GM, RP, EV, MTF, GIF = abi.GUEST_MODE, abi.RUN_PENDING, abi.EVMCS, abi.MTF_PENDING, abi.GIF_SET

MIN32 = {
    "revision": VMCS12_REVISION,
    "vmcs_link_pointer": NONE,
    "guest_cr0": 0x8000_0021,
    "guest_cr4": 0x2000,
    "host_cr0": 0x8000_0021,
    "host_cr4": 0x2000,
    "pin_based_vm_exec_control": 0x16,
    "cpu_based_vm_exec_control": 0x0400_6172,
    "vm_exit_controls": 0x36DFB,
    "vm_entry_controls": 0x11FB,
    "host_cs_selector": 0x08,
    "host_ss_selector": 0x10,
    "host_tr_selector": 0x18,
}
MIN64 = {**MIN32, "vm_exit_controls": 0x36FFB, "vm_entry_controls": 0x13FB, "guest_cr4": 0x2020, "host_cr4": 0x2020}
SHADOWING = {
    **MIN32,
    "cpu_based_vm_exec_control": 0x8400_6172,
    "secondary_vm_exec_control": 0x4000,
    "vmcs_link_pointer": 0x5000,
}
SHADOW_WORD = VMCS12_REVISION | 0x8000_0000


def vmx_cpuid(*, vmx: bool = True, hyperv: bool = False, width: int = WIDTH) -> tuple[CpuidEntry, ...]:
    entries = supported_cpuid("intel", vmx, width)
    if hyperv:
        entries = (*entries, CpuidEntry(LEAF_INTERFACE, eax=INTERFACE_SIGNATURE))
        entries = tuple(e for e in entries if e.function != LEAF_INTERFACE or e.eax == INTERFACE_SIGNATURE)
    return entries


def make_vcpu(profile: str, *, vmx: bool = True, evmcs: bool = False, hyperv: bool = False, **fields: Any) -> Vcpu:
    host = fields.pop("host", VcpuHost(maxphyaddr=WIDTH))
    cpuid = fields.pop("cpuid", vmx_cpuid(vmx=vmx, hyperv=hyperv))
    vcpu = Vcpu(profile=profile, host=host, cpuid=cpuid, **fields)
    if evmcs:
        enable_evmcs(vcpu)
    return vcpu


def narrow_vmx_cpuid() -> tuple[CpuidEntry, ...]:
    """VMX without leaf 0x80000008: the width is 36 bits."""
    return (CpuidEntry(1, ecx=ECX1_VMX),)


def vmcs12(fields: dict[str, int] | None = None, **changes: int) -> bytes:
    page = bytearray(0x1000)
    for name, value in {"revision": VMCS12_REVISION, **(fields or {}), **changes}.items():
        VMCS12.put(page, name, value)
    return bytes(page)


def blob(
    *,
    flags: int = 0,
    format: int = 0,
    size: int = 4224,
    vmxon: int = 0x1000,
    vmcs12_pa: int = 0x2000,
    smm: int = 0,
    hdr_flags: int = 0,
    deadline: int = 0,
    data: bytes | None = None,
    shadow: bytes | None = None,
) -> bytes:
    """By default 4224 bytes, vmxon 0x1000, vmcs12 0x2000, a revision and zeros."""
    whole = bytearray(abi.HEADER_SIZE)
    for name, value in (("flags", flags), ("format", format), ("size", size)):
        abi.COMMON.put(whole, name, value)
    body = bytearray(abi.VMX_HEADER.size)
    header = {"vmxon_pa": vmxon, "vmcs12_pa": vmcs12_pa, "smm_flags": smm, "flags": hdr_flags}
    for name, value in {**header, "preemption_timer_deadline": deadline}.items():
        abi.VMX_HEADER.put(body, name, value)
    whole[8:] = body
    return bytes(whole) + (vmcs12() if data is None else data) + (shadow or b"")


def do_set(vcpu: Vcpu, memory: Any, data: bytes | None) -> SetResult:
    return set_nested_state(vcpu, memory, UserBuffer.of(data))


def do_get(vcpu: Vcpu, memory: Any, room: int = 0x4000) -> tuple[str | None, bytearray]:
    user = UserBuffer(bytearray(b"\xee" * 0x4000))
    user.copy_to(4, room.to_bytes(4, "little"))
    result = get_nested_state(vcpu, memory, user)
    assert user.data is not None
    return result.errno, user.data


def summary(vcpu: Vcpu, memory: Any) -> str | tuple[int, int, int, int, int, int]:
    """GET as (size, flags, vmxon, vmcs12, smm.flags, hdr.flags), or the errno."""
    errno, data = do_get(vcpu, memory)
    if errno is not None:
        return errno
    header = bytes(data[: abi.HEADER_SIZE])
    hdr = header[8:]
    return (
        abi.COMMON.get(header, "size"),
        abi.COMMON.get(header, "flags"),
        abi.VMX_HEADER.get(hdr, "vmxon_pa"),
        abi.VMX_HEADER.get(hdr, "vmcs12_pa"),
        abi.VMX_HEADER.get(hdr, "smm_flags"),
        abi.VMX_HEADER.get(hdr, "flags"),
    )
