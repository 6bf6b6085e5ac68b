"""Capabilities: KVM_CHECK_EXTENSION, KVM_ENABLE_CAP at both levels, and KVM_GET_SUPPORTED_HV_CPUID.

Linux 5.3 (direct flush as merged for 5.4) and 7.1, and the last number that the sub-page series asked for.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from tests.differential.calls import Call, World
from tests.differential.memory_model import MemoryModel
from tests.differential.user_memory import Failed, User

NESTED_STATE, ENLIGHTENED_VMCS, DIRECT_FLUSH, ENFORCE_CPUID, SPP = 157, 163, 175, 199, 182
# What each kernel says on every host: slots, read-only memory, address spaces, TLB flush, HYPERV_CPUID, its system
# form, ENFORCE_CPUID; 174, 176 and 179 are numbers of Arm, PowerPC and s390.
ALWAYS = {
    10: (509, 32764),
    81: (1, 1),
    118: (2, 2),
    155: (1, 1),
    167: (1, 1),
    191: (0, 1),
    ENFORCE_CPUID: (0, 1),
    SPP: (0, 512),
    174: (0, 0),
    176: (0, 0),
    179: (0, 0),
    0xFFFF: (0, 0),
}
EVMCS_VERSION = 0x0101
VENDOR = (0x756E_694C, 0x564B_2078, 0x7648_204D)
HV1, VS1 = 0x3123_7648, 0x3123_5356


@dataclass
class Enabled:
    """What a vCPU has been given by KVM_ENABLE_CAP, for good."""

    evmcs: bool = False


class CapabilityModel:
    """Answers about capabilities of the machine and of its vCPU."""

    def __init__(self, world: World, memory: MemoryModel) -> None:
        self.world, self.memory, self.vcpu = world, memory, Enabled()

    def check_extension(self, number: int) -> int:
        """KVM_CHECK_EXTENSION, the same at both levels."""
        world = self.world
        if number == NESTED_STATE:
            if world.latest:
                return 8320 if world.intel else 4224
            return 8320 if world.intel and world.nested else 0
        if number == ENLIGHTENED_VMCS:
            return int(world.intel or not world.latest)
        if number == DIRECT_FLUSH:
            return int(self._has_direct_flush)
        return ALWAYS[number][world.latest] if number in ALWAYS else 0

    @property
    def _has_direct_flush(self) -> bool:
        return self.world.hyperv in {"direct", "full"} and (self.world.intel or self.world.latest)

    @staticmethod
    def _enable_cap(user: User) -> tuple[int, int]:
        """Capability and first argument; a flag is EINVAL."""
        number, flags, argument = struct.unpack("<IIQ", user.read(0, 104)[:16])
        if flags:
            raise Failed("EINVAL")
        return number, argument

    def enable_on_vm(self, user: User) -> int:
        """KVM_ENABLE_CAP of a VM."""
        number, _ = self._enable_cap(user)
        if number != SPP:
            raise Failed("EINVAL")
        return self.memory.enable_spp()

    def enable_on_vcpu(self, user: User, call: Call) -> tuple[int, str | None, bytes | None]:
        """KVM_ENABLE_CAP of a vCPU: what it returns, errno, and the caller's segment afterwards."""
        segment = call.segment[1] if call.segment else None
        number, argument = self._enable_cap(user)
        if number == ENLIGHTENED_VMCS:
            return self._enable_evmcs(argument, call)
        if number == DIRECT_FLUSH:
            if not self._has_direct_flush:
                raise Failed("ENOTTY")
            if self.world.hyperv == "full":
                raise Failed("ENOMEM")
            return 0, None, segment
        if number == ENFORCE_CPUID and self.world.latest:
            return 0, None, segment
        raise Failed("EINVAL")

    def _enable_evmcs(self, argument: int, call: Call) -> tuple[int, str | None, bytes | None]:
        world = self.world
        if not world.intel:
            raise Failed("ENOTTY" if world.latest else "ENODEV")
        if not world.nested and not world.latest:
            raise Failed("ENOTTY")
        self.vcpu.evmcs = True
        version = EVMCS_VERSION if world.nested else 0
        if call.segment is None:
            return -1, "EFAULT", None
        start, raw = call.segment
        at = argument - start
        if not 0 <= at <= len(raw) - 2:
            return -1, "EFAULT", raw
        return 0, None, raw[:at] + struct.pack("<H", version) + raw[at + 2 :]

    # ---- Hyper-V's CPUID

    def hv_cpuid(self, user: User, *, system: bool) -> int:
        """KVM_GET_SUPPORTED_HV_CPUID."""
        if system and not self.world.latest:
            raise Failed("EINVAL")
        nent = user.number(0, 8) & 0xFFFF_FFFF
        leaves = self._leaves_of_today(system) if self.world.latest else self._leaves_of_2019()
        if nent < len(leaves):
            raise Failed("E2BIG")
        user.write(8, b"".join(struct.pack("<7I12x", leaf, 0, 0, *values) for leaf, *values in leaves))
        user.write(0, struct.pack("<II", len(leaves), user.number(4, 4)))
        return 0

    def _leaves_of_2019(self) -> list[tuple[int, int, int, int, int]]:
        evmcs = self.vcpu.evmcs
        leaves = [
            (0x4000_0000, 0x4000_000A, *VENDOR),
            (0x4000_0001, HV1, 0, 0, 0),
            (0x4000_0002, 0x3839, 0xA_0000, 0, 0),
            (0x4000_0003, 0x2AFF, 0x30, 0, 0x8_0500),
            (0x4000_0004, 0x0C2C | 0x4000 * evmcs, 0xFFF, 0, 0),
            (0x4000_0005, 288, 64, 0, 0),
        ]
        return [*leaves, (0x4000_000A, EVMCS_VERSION, 0, 0, 0)] if evmcs else leaves

    def _leaves_of_today(self, system: bool) -> list[tuple[int, int, int, int, int]]:
        """The host's threads may share cores."""
        apic = system or self.world.irqchip
        shown = self.world.intel and self.world.nested and (system or self.vcpu.evmcs)
        return [
            (0x4000_0000, 0x4000_0082, *VENDOR),
            (0x4000_0001, HV1, 0, 0, 0),
            (0x4000_0002, 0x3839, 0xA_0000, 0, 0),
            (0x4000_0003, 0xAAFF, 0x10_0830, 0, 0x4D12 | 0x8_0000 * apic),
            (0x4000_0004, 0xA2C | 0x400 * apic | 0x4000 * shown, 0xFFF, 0, 0),
            (0x4000_0005, 1024, 64, 0, 0),
            (0x4000_0080, 0, *VENDOR),
            (0x4000_0081, VS1, 0, 0, 0),
            (0x4000_0082, 2, 0, 0, 0),
            (0x4000_000A, (EVMCS_VERSION if shown else 0) + 0xA_0000, 1, 0, 0),
        ]
