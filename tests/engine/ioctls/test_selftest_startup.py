"""The calls that upstream's selftest library makes before a guest runs, one by one, and a vCPU carried to a new VM.

From tools/testing/selftests/kvm/lib: kvm_util.c and x86_64/processor.c of Linux 5.3, kvm_util.c and x86/processor.c of
7.1 (vm_create_default, __vm_create_with_vcpus, vm_arch_vcpu_add, vcpu_save_state, vcpu_load_state).
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field

import pytest

from engine.abi import SYSTEM, VCPU, VM, Call, Reply, UserBuffer
from engine.arch.kvm_vcpu_structs import DEBUGREGS, EVENTS, REGS, RUN, SREGS
from engine.ioctls import IOCTLS, NewMachine, Target, as_created
from engine.machine import VirtualMachine
from engine.state.config import HostConfig, VmConfig
from engine.state.profiles import KVM_LATEST
from tests.engine.builders import MIB, PROFILES, assert_sound, round_trip
from tests.engine.nested.support import GM, MIN64, blob, vmcs12

OLD = "kvm-2019"
API_VERSION, MMAP_SIZE, NESTED_SIZE = 12, 12288, 128 + 8192
USER_MEMORY, EXT_CPUID, NR_MEMSLOTS, MP_STATE, MAX_VCPUS, XSAVE2 = 3, 7, 10, 14, 66, 208
NESTED_STATE = 157
AREAS = {"REGS": REGS.size, "SREGS": SREGS.size, "VCPU_EVENTS": EVENTS.size, "DEBUGREGS": DEBUGREGS.size}
AREAS |= {"MP_STATE": 4, "XSAVE": 4096, "XCRS": 392}
SAVED = ("VCPU_EVENTS", "MP_STATE", "REGS", "XSAVE", "XCRS", "SREGS")
# The order of vcpu_load_state; what is not of an area is a call of its own.
LOADED = {
    "kvm-2019": ("XSAVE", "XCRS", "SREGS", "msrs", "VCPU_EVENTS", "MP_STATE", "DEBUGREGS", "REGS"),
    "kvm-latest": ("SREGS", "msrs", "XCRS", "XSAVE", "VCPU_EVENTS", "MP_STATE", "DEBUGREGS", "REGS"),
}


@dataclass
class Program:
    """A program with /dev/kvm open, its VM and its one vCPU. Each call must end as the library asserts it does."""

    profile: str
    host: HostConfig = field(default_factory=lambda: HostConfig(nested=True))
    vm: VirtualMachine | None = None

    def call(self, level: str, name: str, data: bytes | None = None, arg: int = 0) -> tuple[Reply, bytes]:
        user = UserBuffer.of(data)
        target = Target(
            self.profile,
            self.host,
            None if level == SYSTEM else self.vm,
            0 if level == VCPU else None,
        )
        reply = IOCTLS.perform(target, Call(name, level, user, arg))
        return reply, bytes(user.data or b"")

    def ok(self, level: str, name: str, data: bytes | None = None, arg: int = 0) -> bytes:
        reply, left = self.call(level, name, data, arg)
        assert (name, reply.returns, reply.errno) == (name, 0, None)
        return left

    def asked(self, capability: int) -> int:
        return self.call(SYSTEM if self.vm is None else VM, "KVM_CHECK_EXTENSION", arg=capability)[0].returns

    def open_vm(self) -> None:
        """vm_open: KVM_CREATE_VM, type 0."""
        self.vm = None
        assert self.call(SYSTEM, "KVM_CREATE_VM", arg=1)[0].errno == "EINVAL"
        assert isinstance(self.call(SYSTEM, "KVM_CREATE_VM", arg=0)[0], NewMachine)
        config = VmConfig(profile=self.profile, vcpus=(), vcpu_room=self.asked(MAX_VCPUS), host=self.host)
        self.vm = VirtualMachine.create(config)
        as_created(self.vm)

    def add_memory(self, slot: int, gpa: int, size: int) -> None:
        """vm_userspace_mem_region_add."""
        region = struct.pack("<IIQQQ", slot, 0, gpa, size, 0x7F00_0000_0000 + gpa)
        if self.profile == OLD:
            self.ok(VM, "KVM_SET_USER_MEMORY_REGION", region)
        else:
            self.ok(VM, "KVM_SET_USER_MEMORY_REGION2", region.ljust(160, b"\0"))

    def supported_cpuid(self) -> bytes:
        """kvm_get_supported_cpuid: room for 100 entries, cut to those that came."""
        data = self.ok(SYSTEM, "KVM_GET_SUPPORTED_CPUID", struct.pack("<II", 100, 0) + bytes(40 * 100))
        return data[: 8 + 40 * struct.unpack_from("<I", data)[0]]

    def get(self, name: str) -> bytes:
        return self.ok(VCPU, f"KVM_GET_{name}", bytes(AREAS[name]))

    def put(self, name: str, data: bytes) -> None:
        self.ok(VCPU, f"KVM_SET_{name}", data)

    def add_vcpu(self) -> None:
        """vm_vcpu_add and vm_arch_vcpu_add."""
        assert self.call(SYSTEM, "KVM_GET_VCPU_MMAP_SIZE")[0] == Reply(MMAP_SIZE)
        assert self.call(VM, "KVM_CREATE_VCPU", arg=0)[0].returns >= 0
        cpuid = self.supported_cpuid()
        if self.profile != OLD:
            self.ok(VCPU, "KVM_SET_CPUID2", cpuid)
        sregs = bytearray(self.get("SREGS"))
        code = {"base": 0, "limit": 0xFFFF_FFFF, "type": 11, "present": 1, "s": 1, "l": 1, "g": 1, "selector": 8}
        data = {**code, "type": 3, "selector": 16, "l": 0, "db": 1}
        for segment, fields in (("cs", code), *((name, data) for name in ("ds", "es", "ss")), ("ldt", {"unusable": 1})):
            for name, value in fields.items():
                SREGS.put(sregs, f"{segment}r_{name}" if segment == "ldt" else f"{segment}_{name}", value)
        system = {"cr0": 0x8000_0021, "cr3": 0x18_0000, "cr4": 0x220, "ia32_efer": 0xD00}
        for name, value in {**system, "gdtr_base": 0x5000, "gdtr_limit": 0xFFF}.items():
            SREGS.put(sregs, name, SREGS.get(sregs, name) | value if name in ("cr4", "ia32_efer") else value)
        if self.profile != OLD:
            SREGS.put(sregs, "cr4", SREGS.get(sregs, "cr4") | 1 << 18)
        self.put("SREGS", bytes(sregs))
        if self.profile != OLD:
            xcrs = bytearray(self.get("XCRS"))
            xcrs[16:24] = (7).to_bytes(8, "little")
            self.put("XCRS", bytes(xcrs))
        regs = bytearray(self.get("REGS"))
        for name, value in {"rflags": REGS.get(regs, "rflags") | 2, "rsp": 0x7FFF_0000, "rip": 0x40_1000}.items():
            REGS.put(regs, name, value)
        self.put("REGS", bytes(regs))
        self.put("MP_STATE", bytes(4))
        if self.profile == OLD:
            self.ok(VCPU, "KVM_SET_CPUID2", cpuid)
        else:
            self.ok(VCPU, "KVM_GET_CPUID2", struct.pack("<II", 256, 0) + bytes(40 * 256))

    def start(self) -> None:
        """vm_create_default, or vm_create_with_one_vcpu: capabilities, VM, memory, irqchip, vCPU."""
        assert self.call(SYSTEM, "KVM_GET_API_VERSION")[0] == Reply(API_VERSION)
        for capability in (USER_MEMORY, EXT_CPUID, NR_MEMSLOTS, MP_STATE, MAX_VCPUS):
            assert self.asked(capability) > 0, capability
        self.open_vm()
        self.add_memory(0, 0, 4 * MIB)
        if self.profile == KVM_LATEST:
            assert self.call(VM, "KVM_GET_TSC_KHZ")[0].returns > 0
        self.ok(VM, "KVM_CREATE_IRQCHIP")
        self.add_vcpu()

    def msr_list(self) -> list[int]:
        """kvm_get_msr_index_list: the number first, by a call that is E2BIG."""
        reply, told = self.call(SYSTEM, "KVM_GET_MSR_INDEX_LIST", struct.pack("<I", 0))
        assert reply.errno == "E2BIG"
        count = struct.unpack_from("<I", told)[0]
        told = self.ok(SYSTEM, "KVM_GET_MSR_INDEX_LIST", struct.pack("<I", count) + bytes(4 * count))
        return list(struct.unpack_from(f"<{count}I", told, 4))

    def save(self) -> dict[str, bytes]:
        """vcpu_save_state: first a run with immediate_exit, to complete what the last exit left undone."""
        page = bytearray(2352)
        RUN.put(page, "immediate_exit", 1)
        reply, told = self.call(VCPU, "KVM_RUN", bytes(page))
        assert reply == Reply(-1, "EINTR") and RUN.get(told, "exit_reason") == 0
        state = {name: self.get(name) for name in SAVED}
        size = self.asked(NESTED_STATE)
        assert 0 < size <= NESTED_SIZE
        state["nested"] = self.ok(
            VCPU, "KVM_GET_NESTED_STATE", struct.pack("<HHI", 0, 0, NESTED_SIZE).ljust(NESTED_SIZE, b"\0")
        )
        numbers = self.msr_list()
        wanted = struct.pack("<II", len(numbers), 0) + b"".join(struct.pack("<IIQ", number, 0, 0) for number in numbers)
        reply, state["msrs"] = self.call(VCPU, "KVM_GET_MSRS", wanted)
        assert reply == Reply(len(numbers))
        return {**state, "DEBUGREGS": self.get("DEBUGREGS")}

    def load(self, state: dict[str, bytes]) -> None:
        """vcpu_load_state."""
        for name in LOADED[self.profile]:
            if name == "msrs":
                count = struct.unpack_from("<I", state["msrs"])[0]
                assert self.call(VCPU, "KVM_SET_MSRS", state["msrs"])[0] == Reply(count)
            else:
                self.put(name, state[name])
        if struct.unpack_from("<I", state["nested"], 4)[0]:
            self.ok(VCPU, "KVM_SET_NESTED_STATE", state["nested"])

    def restart(self) -> None:
        """kvm_vm_restart, vm_recreate_with_one_vcpu: a new VM with the same memory, and a vCPU with its CPUID only."""
        self.open_vm()
        self.add_memory(0, 0, 4 * MIB)
        self.ok(VM, "KVM_CREATE_IRQCHIP")
        assert self.call(VM, "KVM_CREATE_VCPU", arg=0)[0].returns >= 0
        self.ok(VCPU, "KVM_SET_CPUID2", self.supported_cpuid())


@pytest.fixture(params=PROFILES)
def program(request: pytest.FixtureRequest) -> Program:
    made = Program(request.param)
    made.start()
    return made


def test_start(program: Program) -> None:
    assert program.vm is not None
    assert program.vm.nested.lapic_in_kernel and [item.id for item in program.vm.config.vcpus] == [0]
    assert SREGS.get(program.get("SREGS"), "cr0") == 0x8000_0021
    assert_sound(round_trip(program.vm))


def test_nothing_is_lost_on_the_way_to_a_new_vm(program: Program) -> None:
    page = bytearray(program.get("XSAVE"))
    page[160:416] = bytes(range(256))
    page[512] |= 3
    program.put("XSAVE", bytes(page))
    first = program.save()
    program.restart()
    program.load(first)
    again = program.save()
    assert again == first


def test_l2_goes_along(program: Program) -> None:
    """A nested guest that runs, its vmcs12 with it."""
    assert program.vm is not None
    feature_control = struct.pack("<II", 1, 0) + struct.pack("<IIQ", 0x3A, 0, 5)
    assert program.call(VCPU, "KVM_SET_MSRS", feature_control)[0] == Reply(1)
    sregs = bytearray(program.get("SREGS"))
    SREGS.put(sregs, "cr4", SREGS.get(sregs, "cr4") | 1 << 13)
    program.put("SREGS", bytes(sregs))
    given = blob(flags=GM, vmxon=0x1000, vmcs12_pa=0x2000, data=vmcs12(MIN64))
    program.ok(VCPU, "KVM_SET_NESTED_STATE", given)
    first = program.save()
    assert struct.unpack_from("<H", first["nested"])[0] & GM
    program.restart()
    program.load(first)
    again = program.save()
    assert again["nested"] == first["nested"] and again == first


def test_a_run_says_that_no_guest_code_runs(program: Program) -> None:
    reply, page = program.call(VCPU, "KVM_RUN", bytes(2352))
    assert reply == Reply(0) and RUN.get(page, "exit_reason") == 9
