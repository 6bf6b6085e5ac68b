"""What a program chooses once for all vCPUs of a VM, capabilities of what there is, and KVM_GET_TSC_KHZ.

Source: Linux 5.3 and 7.1, arch/x86/kvm/x86.c: kvm_vm_ioctl_check_extension, kvm_vm_ioctl_enable_cap, kvm_arch_vm_ioctl.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

from engine.abi import VM, Call, Reply, failed
from engine.arch.kvm_vcpu_structs import SYNC_ALL, XSAVE_SIZE
from engine.ioctls.memory_capabilities import CAP_MAX_VCPU_ID
from engine.ioctls.registry import EnableCap, Ioctl, Target, offered
from engine.ioctls.vcpu_rows import reading
from engine.kvm.memory_views import GuestMemory
from engine.state.profiles import KVM_2019, ONLY_LATEST, kvm_version
from engine.vcpu.vcpu import Vcpu

CAP_SET_BOOT_CPU_ID = 34
CAP_XCRS = 56
CAP_GET_TSC_KHZ = 61
CAP_SYNC_REGS = 74
CAP_IMMEDIATE_EXIT = 136
CAP_MSR_PLATFORM_INFO = 159
CAP_EXCEPTION_PAYLOAD = 164
CAP_XSAVE2 = 208
CAP_USER_MEMORY2 = 231

# The processor's time-stamp counter, and so that of every vCPU: none is scaled.
TSC_KHZ = 2_000_000


def get_vcpu_tsc_khz(_: Vcpu, __: GuestMemory, ___: Call) -> Reply:
    """KVM_GET_TSC_KHZ of a vCPU."""
    return Reply(TSC_KHZ)


def get_vm_tsc_khz(_: Target, __: Call) -> Reply:
    """KVM_GET_TSC_KHZ of a VM: what its vCPUs will have. Linux 5.18 and later."""
    return Reply(TSC_KHZ)


def set_boot_cpu_id(target: Target, call: Call) -> Reply:
    """KVM_SET_BOOT_CPU_ID: EBUSY after a vCPU; later kernels look at the id."""
    rows = kvm_version(target.profile).limits
    if target.vm.config.vcpus:
        return failed("EBUSY")
    if rows.checks_boot_vcpu and call.arg > (target.vm.nested.settings.vcpu_ids or rows.vcpu_ids):
        return failed("EINVAL")
    target.vm.nested.choose(boot_vcpu=call.arg & 0xFFFF_FFFF)
    return Reply(0)


def vcpu_ids(target: Target) -> int:
    """Below which number the ids of vCPUs must be; 0 while it may still be chosen. The first vCPU settles it."""
    rows = kvm_version(target.profile).limits
    return target.vm.nested.settings.vcpu_ids or (rows.vcpu_ids if target.vm.config.vcpus else 0)


def _choose_vcpu_ids(target: Target, wanted: EnableCap) -> Reply:
    """Once, at most the kernel's own limit, and not below the boot processor."""
    rows, limit = kvm_version(target.profile).limits, wanted.args[0]
    if not rows.vcpu_ids_chosen or limit > rows.vcpu_ids or target.vm.nested.settings.boot_vcpu > limit:
        return failed("EINVAL")
    if limit == vcpu_ids(target):
        return Reply(0)
    if vcpu_ids(target):
        return failed("EINVAL")
    target.vm.nested.choose(vcpu_ids=limit)
    return Reply(0)


def _choose_payload(target: Target, wanted: EnableCap) -> Reply:
    """Whether KVM_GET and KVM_SET_VCPU_EVENTS tell pending exceptions, and their payload, from injected ones."""
    target.vm.nested.choose(exception_payload=bool(wanted.args[0]))
    return Reply(0)


def _later(value: int) -> Callable[[Target], int]:
    """A capability that came after 2019."""
    return lambda target: 0 if target.profile == KVM_2019 else value


CHECKED: Mapping[int, Callable[[Target], int]] = MappingProxyType(
    {
        CAP_SET_BOOT_CPU_ID: offered,
        CAP_XCRS: offered,
        CAP_GET_TSC_KHZ: offered,
        CAP_SYNC_REGS: lambda _: SYNC_ALL,
        CAP_IMMEDIATE_EXIT: offered,
        CAP_MSR_PLATFORM_INFO: offered,
        CAP_EXCEPTION_PAYLOAD: offered,
        CAP_XSAVE2: _later(XSAVE_SIZE),
        CAP_USER_MEMORY2: _later(1),
    }
)
ENABLED: Mapping[tuple[str, int], Callable[[Target, EnableCap], Reply]] = MappingProxyType(
    {(VM, CAP_MAX_VCPU_ID): _choose_vcpu_ids, (VM, CAP_EXCEPTION_PAYLOAD): _choose_payload}
)

ROWS = (
    reading("KVM_GET_TSC_KHZ", get_vcpu_tsc_khz),
    Ioctl("KVM_GET_TSC_KHZ", VM, get_vm_tsc_khz, changes=False, profiles=ONLY_LATEST),
    Ioctl("KVM_SET_BOOT_CPU_ID", VM, set_boot_cpu_id),
)
