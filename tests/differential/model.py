"""The second model: every call of the three series, answered from the sources alone."""

from __future__ import annotations

import struct

from tests.differential.calls import Answer, Call, World
from tests.differential.capability_model import CapabilityModel
from tests.differential.entry_model import HostCaps
from tests.differential.memory_model import MemoryModel
from tests.differential.nested_model import NestedModel, Unsaid
from tests.differential.user_memory import Failed, User
from tests.differential.vcpu_model import FEATURE_CONTROL, SEGMENTS, VcpuModel

LEVEL_ERRORS = {"system": "EINVAL", "vm": "ENOTTY", "vcpu": "EINVAL"}
TRUE_PIN, PIN = 0x48D, 0x481
MOST_MSRS = 256


class Model:
    """One machine with one vCPU."""

    def __init__(self, world: World, caps: HostCaps) -> None:
        self.world = world
        self.memory = MemoryModel(world)
        self.capabilities = CapabilityModel(world, self.memory)
        self.vcpu = VcpuModel(world)
        self.nested = NestedModel(self.vcpu, self.memory, self.capabilities.vcpu, caps)

    def answer(self, call: Call) -> Answer:
        """What the kernel answers."""
        if call.name in {"TOUCH", "POKE"}:
            if call.name == "TOUCH":
                self.memory.touch(call.arg)
            else:
                self.memory.store(call.arg, call.data or b"")
            return Answer(0, data=call.data)
        user = User(call)
        segment = call.segment[1] if call.segment else None
        unsaid: Unsaid = ()
        errno = None
        try:
            if (call.name, call.level) == ("KVM_ENABLE_CAP", "vcpu"):
                returns, errno, segment = self.capabilities.enable_on_vcpu(user, call)
            elif (call.name, call.level) == ("KVM_GET_NESTED_STATE", "vcpu"):
                returns, unsaid = self.nested.get(user)
            else:
                returns = self._perform(call, user)
            if call.name == "KVM_GET_SREGS":
                unsaid = SEGMENTS
        except Failed as failure:
            return user.answer(-1, failure.errno, segment, self._of_a_failed_get(call))
        return user.answer(returns, errno, segment, unsaid)

    def _of_a_failed_get(self, call: Call) -> Unsaid:
        """A GET that faults on the way has the same unsaid bytes as one that does not."""
        if call.name == "KVM_GET_SREGS":
            return SEGMENTS
        if call.name != "KVM_GET_NESTED_STATE" or call.read_only or not call.data:
            return ()
        try:
            return self.nested.get(User(Call(call.name, call.level, call.data.ljust(0x4000, b"\0"))))[1]
        except Failed:
            return ()

    def _perform(self, call: Call, user: User) -> int:
        match call.name, call.level:
            case "KVM_SET_USER_MEMORY_REGION", "vm":
                return self.memory.set_region(user)
            case "KVM_INIT_SPP", "vm":
                return self.memory.init_spp()
            case "KVM_SUBPAGES_GET_ACCESS", "vm":
                return self.memory.get_access(user)
            case "KVM_SUBPAGES_SET_ACCESS", "vm":
                return self.memory.set_access(user)
            case "KVM_ENABLE_CAP", "vm":
                return self.capabilities.enable_on_vm(user)
            case "KVM_CHECK_EXTENSION", "system" | "vm":
                return self.capabilities.check_extension(call.arg)
            case "KVM_GET_SUPPORTED_HV_CPUID", "system" | "vcpu":
                return self.capabilities.hv_cpuid(user, system=call.level == "system")
        if call.level != "vcpu":
            raise Failed(LEVEL_ERRORS[call.level])
        return self._perform_on_vcpu(call, user)

    def _perform_on_vcpu(self, call: Call, user: User) -> int:
        match call.name:
            case "KVM_SET_NESTED_STATE":
                return self.nested.set(user)
            case "KVM_SET_CPUID2":
                return self.vcpu.set_cpuid(user, self.nested.in_guest)
            case "KVM_GET_CPUID2":
                return self.vcpu.get_cpuid(user)
            case "KVM_SET_SREGS":
                return self.vcpu.set_sregs(user, self.nested.vmxon, self.nested.guest_cr0_fixed)
            case "KVM_GET_SREGS":
                return self.vcpu.get_sregs(user)
            case "KVM_GET_VCPU_EVENTS":
                return self.vcpu.get_events(user)
            case "KVM_SET_VCPU_EVENTS":
                return self._set_events(user)
            case "KVM_SET_MSRS":
                return self._set_msrs(user)
            case "KVM_GET_MSRS":
                return self._get_msrs(user)
        raise Failed(LEVEL_ERRORS["vcpu"])

    def _set_events(self, user: User) -> int:
        """Nothing but system-management mode is ever asked for."""
        raw = user.read(0, 64)
        flags = int.from_bytes(raw[20:24], "little")
        if flags & ~0xF:
            raise Failed("EINVAL")
        if flags & 8:
            self.nested.set_smm(bool(raw[24]))
        return 0

    @staticmethod
    def _entries(user: User) -> list[list[int]]:
        count = user.number(0, 4)
        user.read(0, 8)
        if count >= MOST_MSRS:
            raise Failed("E2BIG")
        return [list(row) for row in struct.iter_unpack("<IIQ", user.read(8, 16 * count))]

    def _set_msrs(self, user: User) -> int:
        entries = self._entries(user)
        for position, (number, _, value) in enumerate(entries):
            if not self.vcpu.set_msr(number, value):
                return position
            if number == FEATURE_CONTROL and value == 0:
                self.nested.leave()
        return len(entries)

    def _get_msrs(self, user: User) -> int:
        entries = self._entries(user)
        done = len(entries)
        for position, entry in enumerate(entries):
            value = self._msr(entry[0])
            if value is None:
                done = position
                break
            entry[2] = value
        user.write(8, b"".join(struct.pack("<IIQ", *entry) for entry in entries))
        return done

    def _msr(self, number: int) -> int | None:
        if number == FEATURE_CONTROL:
            return self.vcpu.feature_control
        if number in {TRUE_PIN, PIN} and self.vcpu.vmx:
            may = 0x3F if self.capabilities.vcpu.evmcs and not self.world.latest else 0x7F
            return may << 32 | 0x16
        return None
