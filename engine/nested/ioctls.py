"""The nesting ioctls as the binary ABI has them: bytes in, bytes and errno out.

A call that is known but made at another level gets what the kernel's dispatch gives there: see ``abi.call``.

struct kvm_cpuid2 is u32 nent, u32 padding, then 40-byte entries. struct kvm_enable_cap is 104 bytes: cap u32 at 0,
flags u32 at 4, args u64[4] at 8.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from engine import abi
from engine.abi import SYSTEM, VCPU, VM, Reply, UserMemory, wrong_level
from engine.abi import failed as _error
from engine.arch.hyperv_cpuid import ENTRY_SIZE, HEADER_SIZE, CpuidEntry, pack_entry, unpack_entries
from engine.nested.cpuid import supported_cpuid
from engine.nested.enlightened import enable_evmcs
from engine.nested.eras import Era, era_of
from engine.nested.get_state import get_nested_state, max_state_size
from engine.nested.hv_cpuid import supported_hv_cpuid, system_hv_cpuid
from engine.nested.memory import GuestMemory, NoMemory
from engine.nested.operations import set_cpuid
from engine.nested.set_state import set_nested_state
from engine.nested.vcpu import NestedHost, NestedVcpu

CAP_NESTED_STATE = 157
CAP_HYPERV_ENLIGHTENED_VMCS = 163
CAP_HYPERV_CPUID = 167
CAP_SYS_HYPERV_CPUID = 191

ENABLE_CAP_SIZE = 104

# ioctl number by name
NUMBERS = {
    "KVM_CHECK_EXTENSION": 0xAE03,
    "KVM_GET_SUPPORTED_CPUID": 0xC008AE05,
    "KVM_SET_CPUID2": 0x4008AE90,
    "KVM_ENABLE_CAP": 0x4068AEA3,
    "KVM_GET_NESTED_STATE": 0xC080AEBE,
    "KVM_SET_NESTED_STATE": 0x4080AEBF,
    "KVM_GET_SUPPORTED_HV_CPUID": 0xC008AEC1,
}


@dataclass
class Call(abi.Call):
    """One ioctl of nesting.

    At the system and VM levels ``vcpu`` is None and ``host`` and ``profile`` say what is being asked.
    """

    vcpu: NestedVcpu | None = None
    host: NestedHost = field(default_factory=NestedHost)
    profile: str = "kvm-2019"
    guest: GuestMemory = field(default_factory=NoMemory)

    def __post_init__(self) -> None:
        if self.vcpu is not None:
            self.host, self.profile = self.vcpu.host, self.vcpu.profile

    @property
    def era(self) -> Era:
        """The kernel's choices."""
        return era_of(self.profile)


def knows(name: str) -> bool:
    """This module answers the ioctl called ``name``. KVM_ENABLE_CAP and KVM_CHECK_EXTENSION only in part."""
    return name in NUMBERS


def ioctl(call: Call) -> Reply:
    """Make the call. ``call.user``, ``call.memory`` and ``call.vcpu`` are left as the kernel would leave them.

    Raises KeyError for a name that ``knows`` denies.
    """
    handler = _HANDLERS.get((call.name, call.level))
    if handler is None:
        if call.name not in NUMBERS:
            raise KeyError(call.name)
        return wrong_level(call.level)
    return handler(call)


def check_extension(host: NestedHost, profile: str, capability: int) -> int | None:
    """KVM_CHECK_EXTENSION for a capability that nesting owns; None for any other."""
    era = era_of(profile)
    if capability == CAP_NESTED_STATE:
        return max_state_size(NestedVcpu(profile=profile, host=host))
    if capability == CAP_HYPERV_ENLIGHTENED_VMCS:
        # In 2019 the answer is 1 even on AMD; a kernel described without it says 0.
        return int(host.evmcs and (host.intel or not era.hooks_always))
    if capability == CAP_HYPERV_CPUID:
        return 1
    if capability == CAP_SYS_HYPERV_CPUID:
        return int(era.hooks_always)
    return None


def enable_cap(vcpu: NestedVcpu, raw: bytes, memory: UserMemory) -> Reply | None:
    """KVM_ENABLE_CAP on a vCPU; None for a capability that nesting does not own.

    The enlightened VMCS is enabled before its version is copied out: EFAULT does not take that back.
    """
    capability, flags, pointer = (int.from_bytes(raw[at:end], "little") for at, end in ((0, 4), (4, 8), (8, 16)))
    if flags:
        return _error("EINVAL")
    if capability != CAP_HYPERV_ENLIGHTENED_VMCS:
        return None
    errno = evmcs_hook(vcpu)
    if errno is not None:
        return _error(errno)
    version = enable_evmcs(vcpu)
    return Reply(0) if memory.write(pointer, version.to_bytes(2, "little")) else _error("EFAULT")


def evmcs_hook(vcpu: NestedVcpu) -> str | None:
    """Why this kernel cannot enable the enlightened VMCS on the vCPU, as errno; None if it can."""
    if vcpu.era.hooks_always:
        if not vcpu.host.evmcs:
            return "EINVAL"
        return None if vcpu.host.intel else "ENOTTY"
    if not vcpu.host.intel:
        return "ENODEV"
    return None if vcpu.host.nested and vcpu.host.evmcs else "ENOTTY"


def _vcpu(call: Call) -> NestedVcpu:
    if call.vcpu is None:
        raise KeyError("a call at the vCPU level needs a vCPU")
    return call.vcpu


def _check_extension(call: Call) -> Reply:
    return Reply(check_extension(call.host, call.profile, call.arg) or 0)


def _enable_cap(call: Call) -> Reply:
    raw = call.user.copy_from(0, ENABLE_CAP_SIZE)
    if raw is None:
        return _error("EFAULT")
    return enable_cap(_vcpu(call), raw, call.memory) or _error("EINVAL")


def _set_nested_state(call: Call) -> Reply:
    result = set_nested_state(_vcpu(call), call.guest, call.user)
    return Reply(result.returns, result.errno, result.label)


def _get_nested_state(call: Call) -> Reply:
    result = get_nested_state(_vcpu(call), call.guest, call.user)
    return Reply(result.returns, result.errno)


def _list_cpuid(call: Call, entries: list[CpuidEntry]) -> Reply:
    """Header in, too small a table is E2BIG and leaves everything as it was, entries out, header out."""
    raw = call.user.copy_from(0, HEADER_SIZE)
    if raw is None:
        return _error("EFAULT")
    if int.from_bytes(raw[:4], "little") < len(entries):
        return _error("E2BIG")
    body = b"".join(pack_entry(entry) for entry in entries)
    stored = call.user.copy_to(HEADER_SIZE, body)
    stored = stored and call.user.copy_to(0, len(entries).to_bytes(4, "little") + raw[4:])
    return Reply(0) if stored else _error("EFAULT")


def _system_hv_cpuid(call: Call) -> Reply:
    entries = system_hv_cpuid(call.profile, call.host)
    return _error("EINVAL") if entries is None else _list_cpuid(call, entries)


def _vcpu_hv_cpuid(call: Call) -> Reply:
    return _list_cpuid(call, supported_hv_cpuid(_vcpu(call)))


def _supported_cpuid(call: Call) -> Reply:
    host = call.host
    return _list_cpuid(call, list(supported_cpuid(host.vendor, host.nested, host.maxphyaddr)))


def _set_cpuid2(call: Call) -> Reply:
    raw = call.user.copy_from(0, HEADER_SIZE)
    if raw is None:
        return _error("EFAULT")
    count = int.from_bytes(raw[:4], "little")
    if count > call.era.max_cpuid_entries:
        return _error("E2BIG")
    body = call.user.copy_from(HEADER_SIZE, count * ENTRY_SIZE)
    if body is None:
        return _error("EFAULT")
    errno = set_cpuid(_vcpu(call), unpack_entries(body))
    return Reply(0) if errno is None else _error(errno)


_HANDLERS: dict[tuple[str, str], Callable[[Call], Reply]] = {
    ("KVM_CHECK_EXTENSION", SYSTEM): _check_extension,
    ("KVM_CHECK_EXTENSION", VM): _check_extension,
    ("KVM_GET_SUPPORTED_CPUID", SYSTEM): _supported_cpuid,
    ("KVM_GET_SUPPORTED_HV_CPUID", SYSTEM): _system_hv_cpuid,
    ("KVM_GET_SUPPORTED_HV_CPUID", VCPU): _vcpu_hv_cpuid,
    ("KVM_SET_CPUID2", VCPU): _set_cpuid2,
    ("KVM_ENABLE_CAP", VCPU): _enable_cap,
    ("KVM_GET_NESTED_STATE", VCPU): _get_nested_state,
    ("KVM_SET_NESTED_STATE", VCPU): _set_nested_state,
}
