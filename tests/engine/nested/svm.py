"""An AMD vCPU whose guest runs a guest: its VMCB, and the blob that has it."""

from __future__ import annotations

from engine.arch.vmx_msrs import EFER_LMA, EFER_LME, EFER_SVME
from engine.nested.svm import VMCB
from engine.vcpu.cpuid import supported_cpuid
from engine.vcpu.vcpu import Vcpu, VcpuHost
from tests.engine.nested.support import blob

GOOD = {
    "intercept_word4": 1,
    "asid": 1,
    "efer": EFER_SVME | EFER_LME | EFER_LMA,
    "cr0": 0x8000_0011,
    "cr4": 0x20,
    "rflags": 2,
}


def vmcb(**changes: int) -> bytes:
    page = bytearray(4096)
    for name, value in {**GOOD, **changes}.items():
        VMCB.put(page, name, value)
    return bytes(page)


def vcpu_with_svm(**fields: object) -> Vcpu:
    vcpu = Vcpu(
        profile="kvm-latest",
        host=VcpuHost(vendor="amd"),
        cpuid=supported_cpuid("amd", True, 46),
        **fields,  # type: ignore[arg-type]
    )
    vcpu.registers["ia32_efer"] = EFER_SVME
    return vcpu


def svm_blob(flags: int, data: bytes, size: int = 4224) -> bytes:
    return blob(format=1, flags=flags, size=size, vmxon=0x3000, vmcs12_pa=0, data=data)
