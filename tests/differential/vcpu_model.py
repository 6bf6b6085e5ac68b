"""A vCPU as far as nested state needs it: CPUID, control registers, MSR 0x3A, and system-management mode.

Linux 5.3 and 7.1, `arch/x86/kvm/cpuid.c`, `x86.c`, `vmx/vmx.c`.
"""

from __future__ import annotations

import struct

from tests.differential.calls import World
from tests.differential.user_memory import Failed, User

PE, NE, NW, CD, PG = 1, 1 << 5, 1 << 29, 1 << 30, 1 << 31
PAE, OSFXSR, UMIP, LA57, VMXE, SMXE, PCIDE, OSXSAVE, PKE = (1 << bit for bit in (5, 9, 11, 12, 13, 14, 17, 18, 22))
FSGSBASE, SMEP, SMAP = (1 << bit for bit in (16, 20, 21))
SCE, LME, LMA, NX = 1, 1 << 8, 1 << 10, 1 << 11
CR0_FIXED = PE | NE | PG
CR4_FIXED = VMXE
X2APIC, APIC = 1 << 10, 1 << 11
# CR4 bits by the CPUID bit that they need: leaf, register, bit.
NEEDS = {
    PCIDE: (1, "ecx", 17),
    OSXSAVE: (1, "ecx", 26),
    FSGSBASE: (7, "ebx", 0),
    SMEP: (7, "ebx", 7),
    SMAP: (7, "ebx", 20),
    UMIP: (7, "ecx", 2),
    PKE: (7, "ecx", 3),
    LA57: (7, "ecx", 16),
    VMXE: (1, "ecx", 5),
}
# Bits that 7.1 takes whatever CPUID says: VME, PVI, TSD, DE, PSE, PAE, MCE, PGE, PCE, OSFXSR, OSXMMEXCPT.
ALWAYS_CR4 = 0x7FF
# IA32_VMX_CR4_FIXED1 by leaf 1 EDX: VME and PVI, TSD, DE, PSE, PAE, MCE, PGE, OSFXSR, OSXMMEXCPT; PCE always.
FIXED1_EDX = ((0x3, 1), (0x4, 4), (0x8, 2), (0x10, 3), (0x20, 6), (0x40, 7), (0x80, 13), (0x200, 24), (0x400, 25))
FEATURE_CONTROL = 0x3A
HOST_FEATURE_CONTROL = 0x16_0007
WIDTH_WITHOUT_LEAF = 36
MOST_ENTRIES = {"kvm-2019": 80, "kvm-latest": 256}
REGISTERS = {"ebx": 4, "ecx": 5, "edx": 6, "eax": 3}
SREGS_SIZE = 312
# Of struct kvm_sregs the model has CR0 to APIC_BASE; it says nothing of segments, and of the bitmap that nobody sets.
CONTROL = 224
SEGMENTS = ((0, CONTROL),)


class VcpuModel:
    """``vmxon`` and ``in_guest`` say what the nested state adds to the rules of control registers."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.cpuid: list[tuple[int, ...]] = []
        self.cr0, self.cr2, self.cr3, self.cr4, self.cr8 = 0x6000_0010, 0, 0, 0, 0
        self.efer, self.apic_base = 0, 0xFEE0_0900
        self.shown_cr4 = 0
        self.feature_control = 0
        self.smm = self.segments_set = False

    # ---- CPUID

    def leaf(self, function: int) -> tuple[int, ...] | None:
        """The first entry of a leaf, of sub-leaf 0."""
        return next((entry for entry in self.cpuid if entry[0] == function and entry[1] == 0), None)

    def has(self, function: int, register: str, bit: int) -> bool:
        entry = self.leaf(function)
        return entry is not None and bool(entry[REGISTERS[register]] >> bit & 1)

    @property
    def vmx(self) -> bool:
        """Whether the guest may use VMX."""
        return self.world.intel and self.world.nested and self.has(1, "ecx", 5)

    @property
    def hyperv(self) -> bool:
        entry = self.leaf(0x4000_0001)
        return entry is not None and entry[3] == 0x3123_7648

    @property
    def width(self) -> int:
        """MAXPHYADDR."""
        most, entry = self.leaf(0x8000_0000), self.leaf(0x8000_0008)
        if most is None or most[3] < 0x8000_0008 or entry is None:
            return WIDTH_WITHOUT_LEAF
        return entry[3] & 0xFF

    def is_page(self, address: int) -> bool:
        return address % 4096 == 0 and address >> self.width == 0

    @property
    def cr4_fixed1(self) -> int:
        """IA32_VMX_CR4_FIXED1: by CPUID."""
        found = 0x100 | sum(bits for bits, edx in FIXED1_EDX if self.has(1, "edx", edx))
        return found | sum(bit for bit, need in NEEDS.items() if self.has(*need)) | SMXE * self.has(1, "ecx", 6)

    def set_cpuid(self, user: User, in_guest: bool) -> int:
        """KVM_SET_CPUID2."""
        nent = user.number(0, 8) & 0xFFFF_FFFF
        if nent > MOST_ENTRIES[self.world.profile]:
            raise Failed("E2BIG")
        raw = user.read(8, 40 * nent)
        entries = [tuple(row) for row in struct.iter_unpack("<7I12x", raw)]
        linear = next((entry[3] >> 8 & 0xFF for entry in entries if entry[0] == 0x8000_0008), 0)
        if self.world.latest and in_guest and self._runtime(entries) != self._runtime(self.cpuid):
            raise Failed("EINVAL")
        refused = linear not in {0, 48, 57}
        if refused and self.world.latest:
            raise Failed("EINVAL")
        self.cpuid, self.shown_cr4 = entries, self.cr4
        if refused:
            raise Failed("EINVAL")
        return 0

    def _runtime(self, entries: list[tuple[int, ...]]) -> list[tuple[int, ...]]:
        """Entries with the bits that follow registers; in 5.3 a change of CR4 by VM entry and exit is not followed."""
        told: list[tuple[int, ...]] = []
        cr4 = self.cr4 if self.world.latest else self.shown_cr4
        for function, index, flags, eax, ebx, ecx, edx in entries:
            if function == 1:
                ecx = ecx & ~(1 << 27) | bool(cr4 & OSXSAVE) << 27
                edx = edx & ~(1 << 9) | bool(self.apic_base & APIC) << 9
            if function == 7 and index == 0:
                ecx = ecx & ~(1 << 4) | bool(cr4 & PKE) << 4
            told.append((function, index, flags, eax, ebx, ecx, edx))
        return told

    def get_cpuid(self, user: User) -> int:
        """KVM_GET_CPUID2; the count goes out in 7.1 alone."""
        nent = user.number(0, 8) & 0xFFFF_FFFF
        if nent < len(self.cpuid):
            raise Failed("E2BIG")
        user.write(8, b"".join(struct.pack("<7I12x", *entry) for entry in self._runtime(self.cpuid)))
        count = len(self.cpuid) if self.world.latest else nent
        user.write(0, struct.pack("<II", count, user.number(4, 4)))
        return 0

    # ---- control registers

    def get_sregs(self, user: User) -> int:
        """KVM_GET_SREGS."""
        control = (self.cr0, self.cr2, self.cr3, self.cr4, self.cr8, self.efer, self.apic_base)
        user.write(0, bytes(CONTROL) + struct.pack("<7Q", *control) + bytes(32))
        return 0

    def set_sregs(self, user: User, vmxon: bool, guest_cr0_fixed: int | None) -> int:
        """KVM_SET_SREGS. ``guest_cr0_fixed`` are the bits that CR0 of an L2 needs, where one runs."""
        raw = user.read(0, SREGS_SIZE)
        cr0, cr2, cr3, cr4, cr8, efer, apic_base = struct.unpack_from("<7Q", raw, CONTROL)
        long_code = raw[19]
        if not self.world.latest and cr4 & OSXSAVE and not self.has(1, "ecx", 26):
            raise Failed("EINVAL")
        if efer & LME and cr0 & PG:
            legal = cr4 & PAE and efer & LMA
            if not legal or (self.world.latest and cr3 >> self.width):
                raise Failed("EINVAL")
        elif efer & LMA or long_code:
            raise Failed("EINVAL")
        if self.world.latest and not (
            self._cr4_of_today(cr4, vmxon) and self._cr0_of_today(cr0, vmxon, guest_cr0_fixed)
        ):
            raise Failed("EINVAL")
        reserved = 0x2FF | (0 if self.has(1, "ecx", 21) else X2APIC)
        if apic_base >> self.width or apic_base & reserved or apic_base & (APIC | X2APIC) == X2APIC:
            raise Failed("EINVAL")
        if (self.apic_base ^ apic_base) & APIC:
            self.shown_cr4 = self.cr4
        self.cr0, self.cr2, self.cr3, self.efer, self.apic_base = cr0, cr2, cr3, efer, apic_base
        if cr8 <= 15:
            self.cr8 = cr8
        asked = self.cr4 ^ cr4
        self.load_cr4(cr4, vmxon)
        self.segments_set = True
        if asked & (OSXSAVE | PKE):
            self.shown_cr4 = self.cr4
        return 0

    def cr4_fits_vmx(self, cr4: int) -> bool:
        return cr4 & CR4_FIXED == CR4_FIXED and not cr4 & ~self.cr4_fixed1

    def legal_cr4(self, cr4: int) -> bool:
        """The bits that 7.1 lets a guest of this CPUID have."""
        return not cr4 & ~(ALWAYS_CR4 | sum(bit for bit, need in NEEDS.items() if self.has(*need)))

    def _cr4_of_today(self, cr4: int, vmxon: bool) -> bool:
        if not self.legal_cr4(cr4) or (cr4 & VMXE and (self.smm or not self.vmx)):
            return False
        return not vmxon or self.cr4_fits_vmx(cr4)

    @staticmethod
    def _cr0_of_today(cr0: int, vmxon: bool, guest_cr0_fixed: int | None) -> bool:
        if cr0 >> 32 or (cr0 & NW and not cr0 & CD) or (cr0 & PG and not cr0 & PE):
            return False
        needed = guest_cr0_fixed if guest_cr0_fixed is not None else CR0_FIXED if vmxon else 0
        return cr0 & needed == needed

    def load_cr4(self, cr4: int, vmxon: bool) -> None:
        """vmx_set_cr4: 5.3's leaves the register as it is where VMX forbids the value, and nobody hears of it."""
        if not self.world.latest and self.world.intel:
            if cr4 & VMXE and (not self.vmx or self.smm):
                return
            if vmxon and not self.cr4_fits_vmx(cr4):
                return
        self.cr4 = cr4

    def load_cr0(self, cr0: int) -> None:
        """vmx_set_cr0: EFER.LMA follows CR0.PG where EFER.LME is set."""
        if self.efer & LME and (self.cr0 ^ cr0) & PG:
            self.efer = self.efer | LMA if cr0 & PG else self.efer & ~LMA
        self.cr0 = cr0

    # ---- MSRs and events

    def set_msr(self, number: int, value: int) -> bool:
        """A write by the host: whether it is taken."""
        if number != FEATURE_CONTROL:
            return False
        allowed = HOST_FEATURE_CONTROL if self.world.latest else 7 if self.vmx else 1
        if value & ~allowed:
            return False
        self.feature_control = value
        return True

    def get_events(self, user: User) -> int:
        """KVM_GET_VCPU_EVENTS of a vCPU to which nothing happens."""
        raw = bytearray(64)
        raw[20], raw[24] = 0xD, self.smm
        user.write(0, bytes(raw))
        return 0
