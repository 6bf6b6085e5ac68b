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
from engine.arch.kvm_vcpu_structs import VCPU_MMAP_SIZE
from engine.kvm.trial_memory import GuestMemory, NoMemory
from engine.nested.enlightened import enable_evmcs
from engine.nested.get_state import get_nested_state, max_state_size
from engine.nested.msr_ioctls import (
    SAVED_MSRS,
    feature_msrs,
    get_msrs,
    list_numbers,
    read_feature,
    read_known,
    set_msrs,
)
from engine.nested.operations import set_cpuid
from engine.nested.register_ioctls import STRUCTURES
from engine.nested.set_state import set_nested_state
from engine.vcpu.cpuid import supported_cpuid
from engine.vcpu.eras import Era, era_of
from engine.vcpu.hv_cpuid import supported_hv_cpuid, system_hv_cpuid
from engine.vcpu.vcpu import NestedHost, NestedVcpu

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
    "KVM_GET_CPUID2": 0xC008AE91,
    "KVM_GET_MSR_INDEX_LIST": 0xC004AE02,
    "KVM_GET_MSR_FEATURE_INDEX_LIST": 0xC004AE0A,
    "KVM_GET_VCPU_MMAP_SIZE": 0xAE04,
    "KVM_GET_REGS": 0x8090AE81,
    "KVM_SET_REGS": 0x4090AE82,
    "KVM_GET_SREGS": 0x8138AE83,
    "KVM_SET_SREGS": 0x4138AE84,
    "KVM_GET_MSRS": 0xC008AE88,
    "KVM_SET_MSRS": 0x4008AE89,
    "KVM_GET_MP_STATE": 0x8004AE98,
    "KVM_SET_MP_STATE": 0x4004AE99,
    "KVM_GET_VCPU_EVENTS": 0x8040AE9F,
    "KVM_SET_VCPU_EVENTS": 0x4040AEA0,
}
# Those that leave the vCPU as it is. KVM_GET_NESTED_STATE is not among them: it refreshes the cached vmcs12.
READING = frozenset(name for name in NUMBERS if name.startswith("KVM_GET_")) - {"KVM_GET_NESTED_STATE"}


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
    handler = HANDLERS.get((call.name, call.level))
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


def _get_cpuid2(call: Call) -> Reply:
    """Header in, too small a table is E2BIG, entries out; today's kernel then stores the count."""
    raw = call.user.copy_from(0, HEADER_SIZE)
    if raw is None:
        return _error("EFAULT")
    entries = _vcpu(call).cpuid
    if int.from_bytes(raw[:4], "little") < len(entries):
        return _error("E2BIG")
    stored = call.user.copy_to(HEADER_SIZE, b"".join(pack_entry(entry) for entry in entries))
    header = len(entries).to_bytes(4, "little") + raw[4:] if call.era.reports_cpuid_count else raw
    return Reply(0) if stored and call.user.copy_to(0, header) else _error("EFAULT")


def _getter(read: Callable[[NestedVcpu], bytes]) -> Callable[[Call], Reply]:
    return lambda call: Reply(0) if call.user.copy_to(0, read(_vcpu(call))) else _error("EFAULT")


def _setter(size: int, write: Callable[[NestedVcpu, GuestMemory, bytes], str | None]) -> Callable[[Call], Reply]:
    def handle(call: Call) -> Reply:
        raw = call.user.copy_from(0, size)
        errno = "EFAULT" if raw is None else write(_vcpu(call), call.guest, raw)
        return Reply(0) if errno is None else _error(errno)

    return handle


def _counted(outcome: tuple[int, str | None]) -> Reply:
    return Reply(*outcome)


def _listed(errno: str | None) -> Reply:
    return Reply(0) if errno is None else _error(errno)


def _mmap_size(call: Call) -> Reply:
    return _error("EINVAL") if call.arg else Reply(VCPU_MMAP_SIZE)


HANDLERS: dict[tuple[str, str], Callable[[Call], Reply]] = {
    ("KVM_CHECK_EXTENSION", SYSTEM): _check_extension,
    ("KVM_CHECK_EXTENSION", VM): _check_extension,
    ("KVM_GET_SUPPORTED_CPUID", SYSTEM): _supported_cpuid,
    ("KVM_GET_SUPPORTED_HV_CPUID", SYSTEM): _system_hv_cpuid,
    ("KVM_GET_SUPPORTED_HV_CPUID", VCPU): _vcpu_hv_cpuid,
    ("KVM_SET_CPUID2", VCPU): _set_cpuid2,
    ("KVM_ENABLE_CAP", VCPU): _enable_cap,
    ("KVM_GET_NESTED_STATE", VCPU): _get_nested_state,
    ("KVM_SET_NESTED_STATE", VCPU): _set_nested_state,
    ("KVM_GET_CPUID2", VCPU): _get_cpuid2,
    ("KVM_GET_VCPU_MMAP_SIZE", SYSTEM): _mmap_size,
    ("KVM_GET_MSR_INDEX_LIST", SYSTEM): lambda call: _listed(list_numbers(call.user, SAVED_MSRS)),
    ("KVM_GET_MSR_FEATURE_INDEX_LIST", SYSTEM): lambda call: _listed(list_numbers(call.user, feature_msrs(call.host))),
    ("KVM_GET_MSRS", SYSTEM): lambda call: _counted(
        get_msrs(call.user, lambda number: read_feature(call.host, call.profile, number))
    ),
    ("KVM_GET_MSRS", VCPU): lambda call: _counted(get_msrs(call.user, lambda number: read_known(_vcpu(call), number))),
    ("KVM_SET_MSRS", VCPU): lambda call: _counted(set_msrs(_vcpu(call), call.guest, call.user)),
    **{(f"KVM_GET_{name}", VCPU): _getter(read) for name, (_, read, _) in STRUCTURES.items()},
    **{(f"KVM_SET_{name}", VCPU): _setter(size, write) for name, (size, _, write) in STRUCTURES.items()},
}
