"""What nesting asks of a CPUID, and the CPUID that the described host supports."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, fields
from typing import Any

from engine.arch.hyperv_cpuid import INTERFACE_SIGNATURE, LEAF_INTERFACE, LEAF_NESTED, CpuidEntry, find_leaf
from engine.arch.struct_layout import parse_integer
from engine.errors import InvalidValue

ECX1_VMX = 1 << 5
ECX1_X2APIC = 1 << 21
ECX1_XSAVE = 1 << 26
ECX8_SVM = 1 << 2
ECX7_LA57 = 1 << 16
EDX8_NX = 1 << 20
EDX8_LONG_MODE = 1 << 29

# "KVMK", the first word of the signature.
KVM_SIGNATURE_EBX = 0x4B4D_564B

# Width that KVM assumes while 0x80000000 does not lead to a leaf 0x80000008, as before any KVM_SET_CPUID2.
DEFAULT_MAXPHYADDR = 36

_ENTRY_FIELDS = tuple(field.name for field in fields(CpuidEntry))

# CR4 bit: the CPUID bit (leaf, register, bit) that lets a guest in VMX operation set it.
_CR4_FEATURES = (
    (0, 1, "edx", 1),  # VME
    (1, 1, "edx", 1),  # PVI
    (2, 1, "edx", 4),  # TSD
    (3, 1, "edx", 2),  # DE
    (4, 1, "edx", 3),  # PSE
    (5, 1, "edx", 6),  # PAE
    (6, 1, "edx", 7),  # MCE
    (7, 1, "edx", 13),  # PGE
    (9, 1, "edx", 24),  # OSFXSR
    (10, 1, "edx", 25),  # OSXMMEXCPT
    (11, 7, "ecx", 2),  # UMIP
    (12, 7, "ecx", 16),  # LA57
    (13, 1, "ecx", 5),  # VMXE
    (14, 1, "ecx", 6),  # SMXE
    (16, 7, "ebx", 0),  # FSGSBASE
    (17, 1, "ecx", 17),  # PCIDE
    (18, 1, "ecx", 26),  # OSXSAVE
    (20, 7, "ebx", 7),  # SMEP
    (21, 7, "ebx", 20),  # SMAP
    (22, 7, "ecx", 3),  # PKE
)
_CR4_ALWAYS = 1 << 8  # PCE


def features_ecx(entries: Iterable[CpuidEntry]) -> int:
    """CPUID.1:ECX, 0 without that leaf."""
    leaf = find_leaf(entries, 1)
    return 0 if leaf is None else leaf.ecx


def has_vmx(entries: Iterable[CpuidEntry]) -> bool:
    """CPUID.1:ECX bit 5."""
    return bool(features_ecx(entries) & ECX1_VMX)


def has_la57(entries: Iterable[CpuidEntry]) -> bool:
    """CPUID.7:ECX bit 16: linear addresses of 57 bits, once CR4.LA57 is set."""
    leaf = find_leaf(entries, 7)
    return leaf is not None and bool(leaf.ecx & ECX7_LA57)


def has_hyperv(entries: Iterable[CpuidEntry]) -> bool:
    """Leaf 0x40000001 carries the Hyper-V interface signature."""
    leaf = find_leaf(entries, LEAF_INTERFACE)
    return leaf is not None and leaf.eax == INTERFACE_SIGNATURE


def nested_ebx(entries: Iterable[CpuidEntry]) -> int:
    """EBX of leaf 0x4000000A, 0 without that leaf."""
    leaf = find_leaf(entries, LEAF_NESTED)
    return 0 if leaf is None else leaf.ebx


def maxphyaddr(entries: tuple[CpuidEntry, ...]) -> int:
    """Width of a guest physical address in bits: of leaf 0x80000008 where 0x80000000 is there and reaches to it."""
    highest = find_leaf(entries, 0x8000_0000)
    if highest is None or highest.eax < 0x8000_0008:
        return DEFAULT_MAXPHYADDR
    leaf = find_leaf(entries, 0x8000_0008)
    return DEFAULT_MAXPHYADDR if leaf is None else leaf.eax & 0xFF


def cr4_allowed(entries: tuple[CpuidEntry, ...]) -> int:
    """IA32_VMX_CR4_FIXED1: the CR4 bits that this CPUID offers."""
    allowed = _CR4_ALWAYS
    for bit, function, register, feature in _CR4_FEATURES:
        leaf = find_leaf(entries, function)
        if leaf is not None and getattr(leaf, register) >> feature & 1:
            allowed |= 1 << bit
    return allowed


def supported_cpuid(vendor: str, nested: bool, maxphyaddr: int) -> tuple[CpuidEntry, ...]:
    """What KVM_GET_SUPPORTED_CPUID lists on the described host: an Ice Lake server, or a Milan one for ``amd``.

    Only leaves that say something about features and address widths are listed. The VMX or SVM bit is there when
    nesting is on.
    """
    intel = vendor == "intel"
    signature = (0x756E_6547, 0x6C65_746E, 0x4965_6E69) if intel else (0x6874_7541, 0x444D_4163, 0x6974_6E65)
    ebx, ecx, edx = signature
    virtualization = ECX1_VMX if intel and nested else 0
    svm = ECX8_SVM if not intel and nested else 0
    return (
        CpuidEntry(0, eax=0xD, ebx=ebx, ecx=ecx, edx=edx),
        CpuidEntry(
            1,
            eax=0x0006_06A6 if intel else 0x00A0_0F11,
            ebx=0x0000_0800,
            ecx=0xF6FA_3203 | virtualization,
            edx=0x178B_FBFF,
        ),
        CpuidEntry(7, flags=1, ebx=0x219C_07AB if intel else 0x219C_03A9, ecx=0x0000_000C, edx=0x8400_0000),
        CpuidEntry(0xD, flags=1, eax=0x7, ebx=0x340, ecx=0x340),
        CpuidEntry(0x4000_0000, eax=0x4000_0001, ebx=KVM_SIGNATURE_EBX, ecx=0x564B_4D56, edx=0x0000_004D),
        CpuidEntry(0x4000_0001, eax=0x0100_00FB),
        CpuidEntry(0x8000_0000, eax=0x8000_0008 if intel else 0x8000_000A, ebx=ebx, ecx=ecx, edx=edx),
        CpuidEntry(0x8000_0001, ecx=0x0000_0121 | svm, edx=0x2C10_0800),
        CpuidEntry(0x8000_0008, eax=maxphyaddr | 48 << 8),
        *(() if intel else (CpuidEntry(0x8000_000A, eax=1, ebx=8, edx=0x9),)),
    )


def entries_from_json(entries: Iterable[Mapping[str, Any]], field: str = "cpuid") -> tuple[CpuidEntry, ...]:
    """CPUID entries given as objects with function, index, flags, eax, ebx, ecx, edx (absent: 0).

    Raises InvalidValue.
    """
    parsed = []
    for position, entry in enumerate(entries):
        where = f"{field}.{position}"
        if "function" not in entry or not set(entry) <= set(_ENTRY_FIELDS):
            raise InvalidValue(f"must have function and only {', '.join(_ENTRY_FIELDS)}", field=where, value=entry)
        parsed.append(
            CpuidEntry(**{name: parse_integer(value, f"{where}.{name}", 32) for name, value in entry.items()})
        )
    return tuple(parsed)


def entries_to_json(entries: Iterable[CpuidEntry]) -> list[dict[str, Any]]:
    """The inverse: index as a number, every other word as a 0x string."""
    return [
        {name: value if name == "index" else hex(value) for name, value in asdict(entry).items()} for entry in entries
    ]
