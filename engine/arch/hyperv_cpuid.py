"""Hyper-V CPUID leaves as KVM_GET_SUPPORTED_HV_CPUID lists them, and the 40-byte entry they travel in.

Source: Microsoft TLFS; Linux v5.3 and v7.1.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from engine.arch.struct_layout import Field, Layout

ENTRY_SIZE = 40
HEADER_SIZE = 8
SIGNIFICANT_INDEX = 0x1

# struct kvm_cpuid_entry2
ENTRY_LAYOUT = Layout(
    "cpuid_entry",
    ENTRY_SIZE,
    [
        Field("function", 0, 4),
        Field("index", 4, 4),
        Field("flags", 8, 4),
        Field("eax", 12, 4),
        Field("ebx", 16, 4),
        Field("ecx", 20, 4),
        Field("edx", 24, 4),
    ],
)

LEAF_VENDOR = 0x4000_0000
LEAF_INTERFACE = 0x4000_0001
LEAF_VERSION = 0x4000_0002
LEAF_FEATURES = 0x4000_0003
LEAF_RECOMMENDATIONS = 0x4000_0004
LEAF_LIMITS = 0x4000_0005
LEAF_NESTED = 0x4000_000A
LEAF_DEBUG_VENDOR = 0x4000_0080
LEAF_DEBUG_INTERFACE = 0x4000_0081
LEAF_DEBUG_CAPABILITIES = 0x4000_0082

INTERFACE_SIGNATURE = 0x3123_7648  # "Hv#1"
DEBUG_SIGNATURE = 0x3123_5356  # "VS#1"
VENDOR_SIGNATURE = (0x756E_694C, 0x564B_2078, 0x7648_204D)  # "Linux KVM Hv"

# Leaf 0x40000003: what a partition may do, and which forms of input it may use
FEATURES_EAX_ASSIST_MSR = 1 << 4
FEATURES_EAX_HYPERCALL_MSRS = 1 << 5
FEATURES_EAX_VP_INDEX = 1 << 6
FEATURES_EDX_XMM_INPUT = 1 << 4
FEATURES_EDX_EXTENDED_RANGES = 1 << 14

# Leaf 0x40000004: hypercalls it should use
RECOMMEND_LOCAL_FLUSH = 1 << 1
RECOMMEND_REMOTE_FLUSH = 1 << 2
RECOMMEND_EX_PROCESSOR_MASKS = 1 << 11
RECOMMEND_NESTED = 1 << 12

# Leaf 0x4000000A
NESTED_EAX_DIRECT_FLUSH = 1 << 17
NESTED_EAX_SECOND_LEVEL_FLUSH = 1 << 18
NESTED_EAX_MSR_BITMAP = 1 << 19
NESTED_EAX_NPT_TLB = 1 << 22

# Bits that depend on the virtual machine
FEATURES_EDX_DIRECT_TIMERS = 1 << 19
RECOMMEND_CLUSTER_IPI = 1 << 10
RECOMMEND_EVMCS = 1 << 14
RECOMMEND_NO_CORE_SHARING = 1 << 18
NESTED_EBX_PERF_GLOBAL_CTRL = 1 << 0

# Lowest and highest version that KVM supports, in the low and the high byte.
EVMCS_VERSIONS = 0x0101


@dataclass(frozen=True, slots=True)
class CpuidEntry:
    """One CPUID leaf of a vCPU; ``flags`` bit 0 says that ``index`` matters."""

    function: int
    index: int = 0
    flags: int = 0
    eax: int = 0
    ebx: int = 0
    ecx: int = 0
    edx: int = 0

    def words(self) -> tuple[int, int, int, int, int, int, int]:
        """The seven words in the order of the ABI."""
        return self.function, self.index, self.flags, self.eax, self.ebx, self.ecx, self.edx


def pack_entry(entry: CpuidEntry) -> bytes:
    """The 40 bytes of struct kvm_cpuid_entry2, padding zero."""
    return b"".join(word.to_bytes(4, "little") for word in entry.words()) + bytes(12)


def unpack_entries(data: bytes) -> tuple[CpuidEntry, ...]:
    """The entries in ``data``, whole ones only; padding is dropped."""
    words = [int.from_bytes(data[at : at + 4], "little") for at in range(0, len(data) - len(data) % ENTRY_SIZE, 4)]
    return tuple(CpuidEntry(*words[at : at + 7]) for at in range(0, len(words), 10))


def leaves_2019(evmcs_version: int, *, apic: bool, smt_possible: bool, max_vcpus: int = 1024) -> list[CpuidEntry]:
    """What kernels of 2019 list: six leaves, and leaf 0x4000000A when the vCPU has its enlightened VMCS enabled.

    Leaf 0 names 0x4000000A as the last one even when it is absent. Of the arguments, which are those of
    ``leaves_latest``, the first alone counts.
    """
    leaves = [
        _vendor(LEAF_VENDOR, LEAF_NESTED),
        CpuidEntry(LEAF_INTERFACE, eax=INTERFACE_SIGNATURE),
        CpuidEntry(LEAF_VERSION, eax=0x3839, ebx=0x000A_0000),
        CpuidEntry(LEAF_FEATURES, eax=0x2AFF, ebx=0x30, edx=0x0008_0500),
        CpuidEntry(LEAF_RECOMMENDATIONS, eax=0x0C2C | (RECOMMEND_EVMCS if evmcs_version else 0), ebx=0xFFF),
        CpuidEntry(LEAF_LIMITS, eax=288, ebx=64),
    ]
    if evmcs_version:
        leaves.append(CpuidEntry(LEAF_NESTED, eax=evmcs_version))
    return leaves


def leaves_latest(evmcs_version: int, *, apic: bool, smt_possible: bool, max_vcpus: int = 1024) -> list[CpuidEntry]:
    """What today's kernel lists: always ten leaves.

    ``evmcs_version`` is 0 or 0x0101; ``apic`` says that the local APIC is in the kernel (or that the question came
    through the system device); ``max_vcpus`` is 1024, or 4096 in kernels built for more.
    """
    recommendations = (
        0x0A2C
        | (RECOMMEND_CLUSTER_IPI if apic else 0)
        | (RECOMMEND_EVMCS if evmcs_version else 0)
        | (0 if smt_possible else RECOMMEND_NO_CORE_SHARING)
    )
    features = 0x4D12 | (FEATURES_EDX_DIRECT_TIMERS if apic else 0)
    return [
        _vendor(LEAF_VENDOR, LEAF_DEBUG_CAPABILITIES),
        CpuidEntry(LEAF_INTERFACE, eax=INTERFACE_SIGNATURE),
        CpuidEntry(LEAF_VERSION, eax=0x3839, ebx=0x000A_0000),
        CpuidEntry(LEAF_FEATURES, eax=0xAAFF, ebx=0x0010_0830, edx=features),
        CpuidEntry(LEAF_RECOMMENDATIONS, eax=recommendations, ebx=0xFFF),
        CpuidEntry(LEAF_LIMITS, eax=max_vcpus, ebx=64),
        _vendor(LEAF_DEBUG_VENDOR, 0),
        CpuidEntry(LEAF_DEBUG_INTERFACE, eax=DEBUG_SIGNATURE),
        CpuidEntry(LEAF_DEBUG_CAPABILITIES, eax=0x2),
        CpuidEntry(LEAF_NESTED, eax=evmcs_version | 0xA_0000, ebx=NESTED_EBX_PERF_GLOBAL_CTRL),
    ]


def find_leaf(entries: Iterable[CpuidEntry], function: int, index: int = 0) -> CpuidEntry | None:
    """The first entry for ``function``; ``index`` counts only for entries whose flags say so."""
    for entry in entries:
        if entry.function == function and (not entry.flags & SIGNIFICANT_INDEX or entry.index == index):
            return entry
    return None


def _vendor(function: int, last: int) -> CpuidEntry:
    ebx, ecx, edx = VENDOR_SIGNATURE
    return CpuidEntry(function, eax=last, ebx=ebx, ecx=ecx, edx=edx)
