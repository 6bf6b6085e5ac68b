"""A guest hypervisor on an AMD host whose L2 runs with enlightenments in its VMCB."""

from __future__ import annotations

from collections.abc import Callable

from engine.arch.vmx_msrs import EFER, EFER_LMA, EFER_LME, EFER_SVME
from engine.vcpu.cpuid import supported_cpuid
from tests.contract.client import ContractClient
from tests.engine.hyperv import guests
from tests.engine.hyperv.nested_guests import PARTITION
from tests.engine.nested.support import GIF, GM
from tests.engine.nested.svm import svm_blob, vmcb
from tests.support.guests import leaves
from tests.support.http import OCTETS

ENLIGHTENMENTS = bytes.fromhex("0100000001000000" + "0100000000000000") + PARTITION.to_bytes(8, "little") + bytes(8)
VMMCALL_AND_VMRUN = 3
ASSIST = 0x50000


def svm_vm(client: ContractClient, make_vm: Callable[..., str], intercept: int = VMMCALL_AND_VMRUN) -> str:
    """State N23: L2 of the first vCPU runs, its VMCB at GPA 0x7000."""
    cpuid = [entry for entry in supported_cpuid("amd", True, 46) if entry.function >> 28 != 4]
    vm = make_vm(
        profile="kvm-latest",
        spp=False,
        host={"vendor": "amd"},
        vcpus=[{"id": 0, "cpuid": leaves((*cpuid, *guests.CPUID))}],
    )
    writes = [
        (guests.GUEST_OS_ID, guests.OS_ID),
        (guests.ASSIST_MSR, ASSIST | 1),
        (EFER, EFER_SVME | EFER_LME | EFER_LMA),
    ]
    body = {"msrs": [{"index": hex(index), "value": hex(value)} for index, value in writes]}
    assert client.put(f"{vm}/vcpus/0/msrs", json=body).json()["written"] == len(writes)
    url = f"{vm}/vcpus/0"
    assert client.put(f"{url}/vp-assist-page", json={"nested_features": 1}).status_code == 200
    page = bytearray(vmcb(intercept_word4=intercept))
    page[0x3E0:0x400] = ENLIGHTENMENTS
    data = bytearray(svm_blob(GM | GIF, bytes(page)))
    data[8:16] = (0x7000).to_bytes(8, "little")
    reply = client.put(f"{url}/nested-state", content=bytes(data), headers=OCTETS)
    assert reply.status_code == 200, reply.text
    return vm
