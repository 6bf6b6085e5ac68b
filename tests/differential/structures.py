"""The bytes of the structures that the calls take, with values at every bound and faults on the way."""

from __future__ import annotations

import random
import struct

from tests.differential.calls import PAGE, WIDTH, Call
from tests.differential.vmcs12_layout import FIELDS, NONE, REVISION, USED, Vmcs12

VMX, X2APIC, XSAVE, PCID = 1 << 5, 1 << 21, 1 << 26, 1 << 17
NARROW = 39
LINKED = 0x5000

# ---- vmcs12

MIN32 = {
    "revision": REVISION,
    "link": NONE,
    "guest_cr0": 0x8000_0021,
    "guest_cr4": 0x2000,
    "host_cr0": 0x8000_0021,
    "host_cr4": 0x2000,
    "pin": 0x16,
    "proc": 0x0400_6172,
    "exit": 0x3_6DFB,
    "entry": 0x11FB,
    "host_cs": 0x08,
    "host_ss": 0x10,
    "host_tr": 0x18,
}
MIN64 = {**MIN32, "exit": 0x3_6FFB, "entry": 0x13FB, "guest_cr4": 0x2020, "host_cr4": 0x2020}
SHADOWING = {**MIN32, "proc": 0x8400_6172, "sec": 0x4000, "link": LINKED}
NESTED_EPT = {**MIN64, "proc": 0x8400_6172, "sec": 0x2, "eptp": 0x1_001E}
STARTS = ({"revision": REVISION}, MIN32, MIN32, MIN64, MIN64, SHADOWING, NESTED_EPT)
ADDRESSES = (0, 1, 0x1000, 0x3008, 0x3010, 1 << NARROW, (1 << NARROW) - PAGE, 1 << 36, 1 << 63, NONE)
MSR_LIST = (0, 1, 2, 512, 513, 0xFFFF_FFFF)
BASES = (0, 0x1000, 0x7FFF_FFFF_FFFF, 0xFFFF_8000_0000_0000, 1 << 63)
CHANGES: dict[str, tuple[int, ...]] = {
    "revision": (0, REVISION | 1 << 31, REVISION + 1),
    "pin": (0, 0x17, 0x36, 0x3E, 0x56, 0x96, 0xFF),
    "proc": (
        0,
        0x8400_6172,
        0x0600_6172,
        0x1400_6172,
        0x0420_6172,
        0x0440_6172,
        0x8420_6172,
        0x0400_6173,
        0x0402_6172,
        0x0C00_6172,
    ),
    "sec": (0, 0x1, 0x2, 0x10, 0x11, 0x20, 0x22, 0x80, 0x82, 0x4000, 0x2_0000, 0x2_0002, 0x2000, 0x2002, 1 << 31),
    "exit": (0, 0x3_6FFB, 0xB_6DFB, 0x23_6DFB, 0x43_6DFB, 0x103_6DFB, 0x3_EDFB),
    "entry": (0, 0x13FB, 0x51FB, 0x91FB, 0x93FB, 0x111FB, 0x4_11FB),
    "cr3_targets": (1, 4),
    "event": (
        0x8000_0000,
        0x8000_0100,
        0x8000_0202,
        0x8000_0203,
        0x8000_030D,
        0x8000_0B0D,
        0x8000_0B0E,
        0x8000_0306,
        0x8000_0320,
        0x8000_0480,
        0x8000_0603,
        0x8000_0700,
        0x8000_0701,
        0x8000_1000,
        0x80,
    ),
    "event_error": (0, 0x7FFF, 0x8000, 0xFFFF, 0x1_0000),
    "event_length": (0, 1, 15, 16),
    "tpr_threshold": (15, 16, 0x10),
    "activity": (1, 2, 3, 4),
    "vpid": (1, 0xFFFF),
    "posted_nv": (0xFF, 0x100),
    "eptp": (0x1_001E, 0x1_0018, 0x1_005E, 0x1_0026, 0x1_0016, 0x1_009E, 0x1E | 1 << NARROW, 0x1_001F),
    "vmfunc": (0, 1, 2),
    "tsc_multiplier": (0, 1),
    "guest_cr0": (0, 0x21, 0x20, 0x8000_0020, 0x8000_0031, 0x1_8000_0021, 0xE000_0021),
    "guest_cr4": (0, 0x20, 0x2020, 0x2030, 0x2660, 0x2000 | 1 << 14, 0x2000 | 1 << 15, 0x2000 | 1 << 32),
    "guest_cr3": (0x1000, 0xF000, 0x40_0000, 1 << NARROW, (1 << NARROW) - PAGE, 1 << 36),
    "guest_efer": (0, 0x100, 0x400, 0x500, 0x501, 0xD00, 0x1500, 1 << 63),
    "guest_pat": (0x0007_0406_0007_0406, 2, 0x0800_0000_0000_0000),
    "guest_rip": (0xFFF0, 1 << 63),
    "guest_rsp": (0x1000,),
    "guest_rflags": (0, 2, 0x246),
    "host_cr0": (0, 0x8000_0020, 0x8000_0031, 0x1_8000_0021),
    "host_cr4": (0, 0x20, 0x2020, 0x2660, 0x2000 | 1 << 15, 0x2000 | 1 << 32),
    "host_cr3": (0x1000, 0xF000, 1 << NARROW, 1 << 36, 1 << 63),
    "host_efer": (0, 0x500, 0xD01, 0x100, 0x400, 0x1500, 1 << 63),
    "host_pat": (0x0007_0406_0007_0406, 2, 0x0800_0000_0000_0000),
    "host_rip": (0xFFF0, 1 << 32, 1 << 63),
    "link": (NONE, LINKED, LINKED + 8, 0x40_0000, 1 << NARROW, 0),
    **{f"host_{name}": (0, 1, 4, 8, 0x10) for name in ("cs", "ss", "ds", "es", "fs", "gs", "tr")},
    **{f"host_{name}_base": BASES for name in ("fs", "gs", "tr", "gdtr", "idtr")},
    "host_sysenter_esp": BASES,
    "host_sysenter_eip": BASES,
    **dict.fromkeys(("io_bitmap_a", "io_bitmap_b", "msr_bitmap", "virtual_apic", "apic_access"), ADDRESSES),
    **dict.fromkeys(("posted_desc", "vmread_bitmap", "vmwrite_bitmap", "eptp_list", "pml"), ADDRESSES),
    **{f"{name}_addr": ADDRESSES for name in ("exit_load", "exit_store", "entry_load")},
    **{f"{name}_count": MSR_LIST for name in ("exit_load", "exit_store", "entry_load")},
}
assert CHANGES.keys() <= FIELDS.keys()
# What is about several fields at once, or has an outcome of its own.
COMPOUND = (
    "guest_cr3",
    "guest_cr3",
    "guest_cr4",
    "guest_efer",
    "link",
    "sec",
    "proc",
    "exit",
    "entry",
    "event",
    "activity",
)


def vmcs12(rng: random.Random) -> bytes:
    """A vmcs12 that is good, or has a field or two at a bound."""
    vmcs = Vmcs12()
    for name, value in rng.choice(STARTS).items():
        vmcs[name] = value
    names = sorted(CHANGES) if rng.random() < 0.7 else COMPOUND
    for name in rng.sample(names, rng.choice((0, 0, 0, 1, 1, 1, 2, 3))):
        vmcs[name] = rng.choice(CHANGES[name])
    if rng.random() < 0.1:
        vmcs.raw[USED:] = rng.randbytes(PAGE - USED)
    return bytes(vmcs.raw)


def shadow_vmcs12(rng: random.Random) -> bytes:
    """What a link pointer leads to."""
    word = rng.choice((REVISION | 1 << 31, REVISION | 1 << 31, REVISION, 0))
    return word.to_bytes(4, "little") + rng.randbytes(60)


def _often(rng: random.Random, usual: int, *others: int) -> int:
    return rng.choice(others) if rng.random() < 0.07 else usual


SIZES = (0, 127, 128, 128, 1125, 1125, 1126, 1126, 4223, 5221, 5222, 0xFFFF_FFFF)


def nested_state(rng: random.Random) -> Call:
    """KVM_SET_NESTED_STATE."""
    flags = rng.choice((0, 0, 1, 1, 1, 1, 3, 3, 4, 5, _often(rng, 0, 2, 7, 8, 9, 0xF, 0x10, 0x100, 0x101, 0x8000)))
    vmxon = _often(rng, 0x1000, NONE, NONE, 0, 1, 0x2000, 1 << NARROW, (1 << NARROW) - PAGE, 1 << 36, 1 << 63)
    current = _often(rng, 0x2000, NONE, NONE, 0, 0x1000, 8, 1 << NARROW, 1 << 36)
    if vmxon == NONE and rng.random() < 0.8:
        current, flags = NONE, rng.choice((0, 0, 4))
    if flags & 4 and rng.random() < 0.5:
        current = NONE
    size = rng.choice(SIZES) if rng.random() < 0.15 else rng.choice((4224, 8320, 8320))
    smm = _often(rng, 0, 1, 2, 3, 4, 0xFFFC)
    kind = _often(rng, 0, 1, 2) if rng.random() < 0.3 else 0
    header = struct.pack("<HHI", flags, kind, size)
    header += struct.pack("<QQHHIQ", vmxon, current, smm, 0, _often(rng, rng.choice((0, 1)), 2, NONE >> 32), 0x1234)
    raw = header.ljust(128, b"\0") + vmcs12(rng)
    if rng.random() < 0.8:
        raw += shadow_vmcs12(rng).ljust(PAGE, b"\0")
    if rng.random() < 0.1:
        raw = raw[: rng.choice((0, 4, 127, 128, 129, 1125, 1126, 4224, 5221, 5222))]
    return Call("KVM_SET_NESTED_STATE", "vcpu", None if rng.random() < 0.02 else raw)


def get_nested_state(rng: random.Random) -> Call:
    """KVM_GET_NESTED_STATE, mostly with room for all."""
    room = _often(rng, 8320, 0, 127, 128, 129, 4223, 4224, 8319, 0x4000)
    length = _often(rng, 8448, 0, 4, 7, 8, 64, 128, 1000, 4224, 5000, 8320)
    raw = b"\xee" * 4 + room.to_bytes(4, "little") + b"\xee" * 8440
    return Call("KVM_GET_NESTED_STATE", "vcpu", raw[:length], read_only=rng.random() < 0.03)


# ---- CPUID, control registers, events, MSRs


def cpuid_table(rng: random.Random) -> list[tuple[int, ...]]:
    """Entries as a user space gives them: mostly a whole table with VMX."""
    if rng.random() < 0.06:
        return []
    ecx = VMX * (rng.random() < 0.85) | X2APIC * (rng.random() < 0.5) | XSAVE * (rng.random() < 0.6)
    ecx |= PCID * (rng.random() < 0.5) | (1 << 27) * (rng.random() < 0.1)
    rows: list[tuple[int, ...]] = [
        (0, 0, 0, 0x16, 0x756E_6547, 0x6C65_746E, 0x4965_6E69),
        (1, 0, 0, 0x5_0654, 0x800, ecx, 0x0FA8_FBFF),
        (7, 0, 1, 0, 0x0010_0081 * (rng.random() < 0.5), 0xC * (rng.random() < 0.6), 0),
    ]
    if rng.random() < 0.92:
        rows.append((0x8000_0000, 0, 0, 0x8000_0008, 0, 0, 0))
    rows.append((0x8000_0001, 0, 0, 0, 0, 0x121, 0x2C10_0800))
    if rng.random() < 0.92:
        linear = 48 if rng.random() < 0.95 else 40
        rows.append((0x8000_0008, 0, 0, linear << 8 | rng.choice((NARROW, NARROW, 36, WIDTH)), 0, 0, 0))
    if rng.random() < 0.25:
        rows += [(0x4000_0000, 0, 0, 0x4000_000A, 0x7263_694D, 0x666F_736F, 0x7648_2074)]
        rows += [(0x4000_0001, 0, 0, 0x3123_7648, 0, 0, 0)]
    return rows


def set_cpuid(rng: random.Random) -> Call:
    """KVM_SET_CPUID2."""
    rows = cpuid_table(rng)
    raw = b"".join(struct.pack("<7I12x", *row) for row in rows)
    count = _often(rng, len(rows), len(rows) + 1, 81, 257, 0xFFFF_FFFF) if rng.random() < 0.3 else len(rows)
    whole = struct.pack("<II", count, 0) + raw
    return Call("KVM_SET_CPUID2", "vcpu", whole[: _often(rng, len(whole), 0, 7, 8)])


def get_table(rng: random.Random, name: str, level: str, usual: int) -> Call:
    """A GET of a struct kvm_cpuid2."""
    count = rng.choice((usual, usual, 20, 0, 1, 6, 7, 9, 10))
    room = count if rng.random() < 0.9 else max(0, count - 1)
    raw = struct.pack("<II", count, 0x5EED) + b"\xee" * 40 * room
    return Call(name, level, raw[: _often(rng, len(raw), 0, 7)], read_only=rng.random() < 0.04)


FLAT = struct.pack("<QIH8B2x", 0, 0xFFFF_FFFF, 8, 0xB, 1, 0, 1, 1, 0, 1, 0)[:24]


def set_sregs(rng: random.Random, latest: bool) -> Call:
    """KVM_SET_SREGS; CR4.LA57 for 7.1 alone, because 5.3 takes it from the host without looking at CPUID."""
    cr0 = rng.choice((0x6000_0010, 0x8000_0021, 0x8000_0031, 0x21, 0x8000_0020, 0x2000_0021, 0x1_0000_0021, 0))
    cr4 = rng.choice((0, 0x20, 0x2000, 0x2020, 0x2660, 0x2660, 1 << 18, 1 << 22, 0x2000 | 5 << 18, 1 << 17, 1 << 14))
    cr4 |= rng.choice((0, 0, 0, 1 << 15, 1 << 32, 1 << 12 if latest else 1 << 11, 1 << 20))
    efer = rng.choice((0, 0, 0, 0x500, 0xD01, 0x100, 0x400))
    apic = (
        0xFEE0_0900
        if rng.random() < 0.7
        else rng.choice(
            (
                0xFEE0_0000,
                0xFEE0_0C00,
                0xFEE0_0400,
                0xFEE0_0801,
                0xFEE0_0A00,
                1 << NARROW | 0x800,
                1 << WIDTH | 0x800,
                0,
            )
        )
    )
    if efer & 0x400 and rng.random() < 0.8:
        cr0, cr4 = 0x8000_0031, cr4 | 0x20
    cr3 = rng.choice((0, 0x1000, 1 << NARROW, 1 << 60))
    control = (cr0, rng.choice((0, 7)), cr3, cr4, rng.choice((0, 5, 15, 16)), efer, apic)
    segments = bytearray(FLAT * 8 + bytes(32))
    segments[19] = rng.random() < 0.05
    raw = bytes(segments) + struct.pack("<7Q", *control) + bytes(32)
    return Call("KVM_SET_SREGS", "vcpu", raw[: _often(rng, 312, 0, 311)] if rng.random() < 0.2 else raw)


def events(rng: random.Random) -> Call:
    """KVM_SET_VCPU_EVENTS: into system-management mode or out of it."""
    raw = bytearray(64)
    raw[20:24] = _often(rng, 8, 0, 0x40, 1 << 31).to_bytes(4, "little")
    raw[24] = rng.random() < 0.5
    return Call("KVM_SET_VCPU_EVENTS", "vcpu", bytes(raw[: _often(rng, 64, 63)]))


FEATURE_CONTROLS = (0, 0, 1, 5, 7, 0x16_0007, 8, 1 << 20, 1 << 63)


def msrs(rng: random.Random, name: str) -> Call:
    """KVM_GET_MSRS or KVM_SET_MSRS of IA32_FEATURE_CONTROL, pin-based controls, and a number that nobody knows."""
    known = (0x3A,) if name == "KVM_SET_MSRS" else (0x3A, 0x3A, 0x48D, 0x481)
    rows = [(rng.choice((*known, *known, 0xDEAD)), 0, rng.choice(FEATURE_CONTROLS)) for _ in range(rng.randint(0, 3))]
    count = _often(rng, len(rows), len(rows) + 1, 256, 0xFFFF_FFFF) if rng.random() < 0.3 else len(rows)
    raw = struct.pack("<II", count, 0) + b"".join(struct.pack("<IIQ", *row) for row in rows)
    return Call(name, "vcpu", raw[: _often(rng, len(raw), 0, 7)], read_only=rng.random() < 0.03)


# ---- capabilities


CAPABILITIES = (10, 81, 118, 155, 157, 163, 163, 167, 174, 175, 175, 176, 179, 182, 182, 191, 199, 0xFFFF)


def check_extension(rng: random.Random) -> Call:
    """KVM_CHECK_EXTENSION."""
    return Call("KVM_CHECK_EXTENSION", rng.choice(("system", "vm")), arg=rng.choice(CAPABILITIES))


def enable_cap(rng: random.Random, level: str, number: int) -> Call:
    """KVM_ENABLE_CAP, with a pointer as its first argument."""
    pointer = rng.choice((0x7000, 0x7000, 0x7000, 0x7002, 0x7003, 0))
    raw = struct.pack("<IIQ", number, _often(rng, 0, 1, 1 << 31), pointer).ljust(104, b"\0")
    segment = (0x7000, b"\xee" * 4) if rng.random() < 0.95 else None
    return Call(
        "KVM_ENABLE_CAP", level, raw[: _often(rng, 104, 103, 0)] if rng.random() < 0.2 else raw, segment=segment
    )


# ---- memory


GFNS = (0, 1, 7, 8, 15, 16, 0x10, 0x1F, 0x20, 0x1FF, 0x200, (1 << WIDTH - 12) - 1, 1 << 52, NONE)
MAPS = (0, 1, 0xF, 0x8000_0000, 0xFFFF_FFFF, 0x5555_5555)


def region(rng: random.Random, latest: bool) -> Call:
    """KVM_SET_USER_MEMORY_REGION: slots near each other."""
    slot = _often(rng, rng.choice((0, 1, 2, 0x1_0000)), 508, 509, 32763, 32764, 0xFFFF, 0x2_0000, 0x1_0000 | 508)
    flags = _often(rng, rng.choice((0, 0, 0, 1, 2)), 3, 4, 8, 1 << 31)
    gpa = PAGE * _often(
        rng, rng.choice((0, 8, 0x10, 0x18, 0x20)), (1 << WIDTH - 12) - 8, 1 << WIDTH - 12, (1 << 52) - 8
    )
    size = PAGE * _often(rng, rng.choice((0, 8, 8, 0x10)), 1, 0x200, 1 << 31, (1 << 52) - 1)
    if rng.random() < 0.05:
        gpa, size = gpa + rng.choice((0, 1, 0x800)), size + rng.choice((0, 1, 0xFFF))
    address = _often(rng, 0x7F00_0000_0000, 0x7F10_0000_0000, 0x7F00_0000_0001, 0xFFFF_8000_0000_0000, 0)
    raw = struct.pack("<IIQQQ", slot, flags, gpa & NONE, size & NONE, address)
    return Call("KVM_SET_USER_MEMORY_REGION", "vm", raw[: _often(rng, 32, 31, 0)] if rng.random() < 0.1 else raw)


def subpages(rng: random.Random, latest: bool) -> Call:
    """KVM_SUBPAGES_GET_ACCESS or KVM_SUBPAGES_SET_ACCESS."""
    name = rng.choice(("KVM_SUBPAGES_GET_ACCESS", "KVM_SUBPAGES_SET_ACCESS"))
    gfn = _often(rng, rng.choice((0, 1, 3, 7, 8, 11, 12, 14, 15, 0x1F)), *GFNS)
    npages = _often(rng, rng.choice((1, 1, 2, 3, 4, 5, 8, 9)), 0, 16, 63, 64, 65, 511, 512, 513, 0xFFFF_FFFF)
    maps = [rng.choice(MAPS) for _ in range(min(npages, 513))]
    if latest:
        raw = struct.pack("<QII", gfn, npages, _often(rng, 0, 1, 1 << 31)) + struct.pack(f"<{len(maps)}I", *maps)
    else:
        wide = npages if rng.random() < 0.97 else npages | 1 << 32
        raw = struct.pack("<QQ", gfn, wide) + struct.pack("<64I", *(maps + [0xAAAA] * 64)[:64])
    if rng.random() < 0.06:
        raw = raw[: rng.choice((0, 8, 15, 16, 17, max(0, len(raw) - 1)))]
    return Call(name, "vm", None if rng.random() < 0.01 else raw, read_only=rng.random() < 0.03)


def touch(rng: random.Random) -> Call:
    """The guest reads from a page."""
    return Call("TOUCH", "", arg=PAGE * rng.choice((0, 1, 7, 8, 12, 13, 14, 15, 15, 0x10, 0x17, 0x1F, 0x20)))
