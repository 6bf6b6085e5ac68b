"""What a vCPU in system-management mode finds: the slots of address space 1, under tables of its own.

By the kernel: kvm_arch_vcpu_memslots_id, role.smm, and of sub-page protection that its look-ups of slots are
gfn_to_memslot(kvm, …), of address space 0, in every version (kvm-spp 4).
"""

from __future__ import annotations

import json
from typing import Any

import pytest

from engine.arch import access as acc
from engine.arch import controls as ctl
from engine.arch import ept as bits
from engine.cpu import frames
from engine.cpu.memory_slots import SMM, SMM_PAGE
from engine.kvm import state_frame as reg
from engine.kvm.protections import ProtectedObject
from engine.kvm.slots import SlotSpec
from engine.machine import VirtualMachine
from engine.state.config import HostConfig, VcpuConfig, VmConfig
from engine.trace.single import AccessRequest
from tests.engine.builders import (
    FULL,
    MIB,
    PAGE,
    PROFILES,
    READ,
    WRITE,
    access,
    assert_sound,
    edit,
    exits,
    leaf,
    machine,
    maps,
    picture,
    protect,
    replay,
    round_trip,
    set_map,
    store_word,
    totals,
    vector,
)

RAM, SMRAM = 0x7000_0000_0000, 0x7100_0000_0000  # in the memory of whoever runs the machine
RAM_0 = SlotSpec(0, 0, 4 * MIB, userspace_addr=RAM)
LOW_1 = SlotSpec(1, 0, 0xA0000, address_space=1, userspace_addr=RAM)
SMRAM_1 = SlotSpec(0, 0xA0000, 0x20000, address_space=1, userspace_addr=SMRAM)
OPEN, CLOSED = 0x5000, 0xA0000  # in common; the same GPA of different memory


def guest(profile: str = "kvm-2019", **options: Any) -> VirtualMachine:
    """A guest as QEMU makes one: in SMM the low memory is the same, SMRAM is other memory, and the rest is not there.

    Its first vCPU is in SMM, the second is not.
    """
    slots = options.pop("slots", (RAM_0, LOW_1, SMRAM_1))
    vm = machine(profile, slots=slots, vcpus=(0, 1), **options)
    vm.nested.set_smm(0, True)
    return vm


def look(vm: VirtualMachine, gpa: int, vcpu: int = 0, size: int = 4) -> bytes | None:
    return vm.access(AccessRequest(gpa, size, READ, vcpu)).data


def put(vm: VirtualMachine, gpa: int, data: bytes, vcpu: int = 0, **options: Any) -> str:
    return vm.access(AccessRequest(gpa, len(data), WRITE, vcpu, data=data, **options)).resolution


def record(vm: VirtualMachine, word: Any, position: int = 0) -> int:
    m = vm.state.current.snapshot.machine
    return int(m.rows[m.row_of[frames.FIRST_VCPU_FRAME + position], word])


# ---- slots and tables


@pytest.mark.parametrize("profile", PROFILES)
def test_memory_of_both_spaces(profile: str) -> None:
    vm = guest(profile)
    vm.write_memory(CLOSED, b"ram.")
    assert put(vm, CLOSED, b"smm.") == "completed"
    assert (look(vm, CLOSED), look(vm, CLOSED, 1), vm.read_memory(CLOSED, 4)) == (b"smm.", b"ram.", b"ram.")
    assert put(vm, OPEN, b"both") == "completed"
    assert (look(vm, OPEN), look(vm, OPEN, 1), vm.read_memory(OPEN, 4)) == (b"both", b"both", b"both")
    assert_sound(vm)


@pytest.mark.parametrize("profile", PROFILES)
def test_where_space_1_has_no_slot_there_is_mmio(profile: str) -> None:
    vm = guest(profile)
    assert access(vm, 2 * MIB, READ) == ["mmio"]
    assert access(vm, 2 * MIB, READ, vcpu=1) == ["mapped", "completed"]
    result = replay(vm, [(2 * MIB, 8, WRITE, 0), (2 * MIB, 8, WRITE, 1), (CLOSED, 8, READ, 0)], include="all")
    assert (result.mmio, exits(result, "gpa", "vcpu", "resolution")[0][:2]) == (1, (2 * MIB, 0))
    said = vm.walk(2 * MIB).then.sentence
    assert said == "MMIO: no memory slot of address space 1 holds GFN 0x200; the access goes to user space"
    assert vm.walk(2 * MIB, vcpu=1).then.resolution == "completed"


def test_a_read_only_slot_of_space_1() -> None:
    vm = guest(slots=(RAM_0, SlotSpec(3, 0, PAGE, read_only=True, address_space=1, userspace_addr=RAM)))
    assert access(vm, 0, WRITE) == ["mmio"]
    assert access(vm, 0, READ)[-1] == "completed"
    assert access(vm, 0, WRITE, vcpu=1)[-1] == "completed"
    assert vm.walk(0, WRITE).then.sentence.startswith("MMIO: memory slot 3 of address space 1 is read-only")


@pytest.mark.parametrize("profile", PROFILES)
def test_a_machine_without_slots_of_space_1_has_one_space(profile: str) -> None:
    vm = guest(profile, slots=(RAM_0,))
    before = record(vm, ctl.V_EPTP)
    assert put(vm, CLOSED, b"ram.") == "completed"
    assert vm.read_memory(CLOSED, 4) == b"ram."
    vm.set_slot(SMRAM_1)
    assert (look(vm, CLOSED), access(vm, OPEN, READ)) == (b"\0\0\0\0", ["mmio"])
    vm.memory_slots.delete(0, 1)
    assert (look(vm, CLOSED), record(vm, ctl.V_SPACE), record(vm, ctl.V_EPTP)) == (b"ram.", 0, before)


@pytest.mark.parametrize("profile", PROFILES)
def test_each_space_has_a_root(profile: str) -> None:
    vm = guest(profile)
    inside, outside = record(vm, ctl.V_EPTP), record(vm, ctl.V_EPTP, 1)
    assert (inside ^ outside) & ~bits.ADDRESS == 0
    assert inside != outside
    access(vm, CLOSED)
    assert leaf(vm, CLOSED >> 12) is None
    own = leaf(vm, SMM_PAGE | CLOSED >> 12)
    assert own is not None
    assert own & bits.ADDRESS not in (CLOSED, CLOSED | SMM)
    assert own & bits.WRITE
    access(vm, OPEN)
    assert (leaf(vm, SMM_PAGE | OPEN >> 12) or 0) & bits.ADDRESS == OPEN, "one memory has one host frame"
    vm.nested.set_smm(0, False)
    assert record(vm, ctl.V_EPTP) == outside
    assert access(vm, CLOSED, vcpu=0) == ["mapped", "completed"]
    vm.nested.set_smm(0, True)
    assert record(vm, ctl.V_EPTP) == inside
    assert access(vm, CLOSED) == ["completed"], "its tables are what they were"


def test_five_levels_of_ept() -> None:
    capabilities = HostConfig().capability("ept_vpid_cap") | bits.CAP_WALK_5
    vm = guest(maxphyaddr=52, host=HostConfig(vmx_capabilities={"ept_vpid_cap": capabilities}))
    assert vm.config.ept_levels == 5
    assert put(vm, CLOSED, b"smm.") == "completed"
    assert (look(vm, CLOSED), look(vm, CLOSED, 1)) == (b"smm.", b"\0\0\0\0")


def test_a_host_without_ept_goes_by_the_slots_of_the_space() -> None:
    vm = guest(host=HostConfig(ept=False, spp=False), spp=False)
    assert put(vm, CLOSED, b"smm.") == "completed"
    assert (look(vm, CLOSED), look(vm, CLOSED, 1)) == (b"smm.", b"\0\0\0\0")
    assert replay(vm, [(2 * MIB, 8, WRITE, 0), (2 * MIB, 8, WRITE, 1)]).mmio == 1


def test_a_trace_of_several_vcpus() -> None:
    """The fast path does not know vCPUs apart, nor address spaces: it is off while somebody is in SMM."""
    rows = [(0x1000 * n % 0x300000, 8, n % 3 & 1, n & 1) for n in range(400)]
    vm = guest()
    result = replay(vm, rows)
    assert result.mmio == sum(gpa >= 0xC0000 and vcpu == 0 for gpa, _, _, vcpu in rows)
    with vm.state.change() as change:
        assert not change.machine.caps[frames.CAP_FAST_PATH]
    vm.nested.set_smm(0, False)
    with vm.state.change() as change:
        assert change.machine.caps[frames.CAP_FAST_PATH]
    assert replay(vm, rows).mmio == 0


def test_one_vcpu_in_smm_has_no_fast_path() -> None:
    vm = machine(slots=(RAM_0, SMRAM_1))
    vm.nested.set_smm(0, True)
    with vm.state.change() as change:
        assert not change.machine.caps[frames.CAP_FAST_PATH]


def test_translations_of_both_spaces_are_kept_apart() -> None:
    vm = guest(translation_cache="model")
    access(vm, CLOSED)
    assert [item.ept_root for item in vm.vcpus.tlb(0)] == [record(vm, ctl.V_EPTP) & bits.ADDRESS]
    vm.nested.set_smm(0, False)
    assert access(vm, CLOSED) == ["mapped", "completed"]
    vm.nested.set_smm(0, True)
    assert [item.ept_root for item in vm.vcpus.tlb(0)] == [record(vm, ctl.V_EPTP, 1) & bits.ADDRESS], (
        "KVM flushes what is remembered of a root that it loads"
    )


def test_page_tables_of_the_guest_are_in_its_space() -> None:
    """Four levels in SMRAM: the same GPAs outside hold zeros, so nothing is mapped there."""
    vm = guest()
    for level in range(4):
        entry = (CLOSED + (level + 1) * PAGE if level < 3 else CLOSED + 0x8000) | 7
        assert put(vm, CLOSED + level * PAGE, entry.to_bytes(8, "little")) == "completed"
    for vcpu in (0, 1):
        vm.vcpus.set_vmcs(vcpu, {"cr3": CLOSED})
    wrote = vm.access(AccessRequest(None, 4, WRITE, 0, gva=0, data=b"code"))
    assert (wrote.resolution, wrote.gpa, look(vm, CLOSED + 0x8000)) == ("completed", CLOSED + 0x8000, b"code")
    assert vm.access(AccessRequest(None, 4, READ, 0, gva=0)).data == b"code"
    assert vm.access(AccessRequest(None, 4, READ, 1, gva=0)).exception == "#PF"
    flags = int.from_bytes(look(vm, CLOSED + 3 * PAGE, size=8) or b"", "little")
    assert flags & 0x60 == 0x60, "accessed and dirty"
    assert vm.read_memory(CLOSED, PAGE) == bytes(PAGE)


def test_nested_state_is_read_where_the_vcpu_is() -> None:
    vm = guest()
    put(vm, CLOSED, b"smm.")
    assert vm.nested.read(0)[1].read(CLOSED, 4) == b"smm."
    assert vm.nested.read(0)[1].read(2 * MIB, 4) is None
    assert vm.nested.read(1)[1].read(CLOSED, 4) == bytes(4)
    with vm.nested.change(0) as (_, ram):
        assert ram.write(CLOSED, b"more")
        assert not ram.write(2 * MIB, b"more")
    assert (look(vm, CLOSED), vm.read_memory(CLOSED, 4)) == (b"more", bytes(4))


# ---- sub-page protection


@pytest.mark.parametrize("profile", PROFILES)
def test_sub_page_protection_is_about_space_0(profile: str) -> None:
    """A write of SMM to protected memory lands and is counted; to other memory at a protected GPA it is nobody's."""
    vm = guest(profile)
    for page in (OPEN, CLOSED):
        set_map(vm, page >> 12, 0)
    assert access(vm, OPEN, vcpu=1)[-1] == "violation"
    result = vm.access(AccessRequest(OPEN, 8, WRITE, 0))
    assert (result.resolution, result.unenforced) == ("completed", True)
    assert not vm.access(AccessRequest(CLOSED, 8, WRITE, 0)).unenforced
    assert not vm.access(AccessRequest(OPEN, 8, READ, 0)).unenforced
    counted = replay(vm, [(OPEN, 8, WRITE, 0), (CLOSED, 8, WRITE, 0), (OPEN, 8, WRITE, 1)])
    assert (counted.violations, counted.unenforced_writes, counted.page_granular_violations) == (1, 1, 2)
    entry = leaf(vm, SMM_PAGE | OPEN >> 12) or 0
    assert entry & (bits.WRITE | bits.SPP) == bits.WRITE


@pytest.mark.parametrize("profile", PROFILES)
def test_protections_are_about_space_0(profile: str) -> None:
    vm = guest(profile)
    protect(vm, "table", (OPEN, 8), (CLOSED, 8))
    counted = replay(vm, [(OPEN, 8, WRITE, 0), (CLOSED, 8, WRITE, 0), (OPEN, 8, WRITE, 1)])
    assert (counted.violations, counted.by_object["table"].violations, counted.unenforced_writes) == (1, 1, 1)


@pytest.mark.parametrize("profile", PROFILES)
def test_vectors_stay_when_pages_of_space_1_go(profile: str) -> None:
    vm = guest(profile)
    set_map(vm, OPEN >> 12, 0xF)
    assert access(vm, OPEN, vcpu=1)[-1] == "completed"
    before = vector(vm, OPEN >> 12, 1 if profile == "kvm-2019" else 0)
    access(vm, OPEN)
    vm.memory_slots.delete(1, 1)
    assert before is not None
    assert vector(vm, OPEN >> 12, 1 if profile == "kvm-2019" else 0) == before
    assert access(vm, OPEN, vcpu=1) == ["completed"]


@pytest.mark.parametrize(("profile", "ending"), [("kvm-2019", "completed"), ("kvm-latest", "violation")])
def test_an_emulated_write_in_smm(profile: str, ending: str) -> None:
    """The slot is that of space 1; the check of later series looks in space 0 (is_emulator_spp_protected)."""
    vm = guest(profile, slots=(RAM_0, LOW_1, SMRAM_1, SlotSpec(2, 1 << 32, PAGE, address_space=1)))
    set_map(vm, OPEN >> 12, FULL ^ 0xF)
    emulated = {"source": acc.EMULATED}
    assert put(vm, OPEN, b"some", **emulated) == ending
    assert put(vm, OPEN + 512, b"some", **emulated) == "completed"
    assert put(vm, 2 * MIB, b"some", **emulated) == "mmio"
    assert put(vm, 1 << 32, b"some", **emulated) == "completed"
    assert put(vm, CLOSED, b"some", **emulated) == "completed"
    assert (look(vm, CLOSED), vm.read_memory(CLOSED, 4)) == (b"some", bytes(4))
    assert put(vm, CLOSED, b"host", source=acc.HOST) == "completed"
    assert (look(vm, CLOSED), vm.read_memory(CLOSED, 4)) == (b"some", b"host")


# ---- logs


def log_of(vm: VirtualMachine, slot: int, space: int = 0) -> list[int]:
    taken = vm.dirty.take_log(slot, space)
    return [n for n in range(8 * len(taken)) if taken[n // 8] >> n % 8 & 1]


@pytest.mark.parametrize("method", ["write-protect", "pml"])
@pytest.mark.parametrize("profile", PROFILES)
def test_each_slot_has_its_log(profile: str, method: str) -> None:
    logged = [
        SlotSpec(s.slot, s.gpa, s.size, address_space=s.address_space, userspace_addr=s.userspace_addr, log_dirty=True)
        for s in (RAM_0, LOW_1, SMRAM_1)
    ]
    vm = guest(profile, slots=logged)
    vm.dirty.track("off", method)
    for turn in range(2):
        access(vm, OPEN + turn * PAGE)
        access(vm, CLOSED + turn * PAGE)
        access(vm, CLOSED + 0x3000, vcpu=1)
        access(vm, OPEN, READ)
        assert log_of(vm, 1, 1) == [5 + turn]
        assert log_of(vm, 0, 1) == [turn]
        assert log_of(vm, 0) == [0xA3]
    assert [log_of(vm, 0), log_of(vm, 0, 1), log_of(vm, 1, 1)] == [[], [], []]


def test_what_a_processor_logged_in_smm_is_of_that_space() -> None:
    """The log is emptied when the vCPU leaves: afterwards its GPAs would be taken for those of space 0."""
    logged = (
        SlotSpec(0, 0, 4 * MIB, log_dirty=True),
        SlotSpec(0, CLOSED, 0x20000, address_space=1, log_dirty=True),
    )
    vm = guest(slots=logged)
    vm.dirty.track("off", "pml")
    access(vm, CLOSED)
    vm.nested.set_smm(0, False)
    access(vm, CLOSED + PAGE)
    assert (log_of(vm, 0, 1), log_of(vm, 0)) == ([0], [0xA1])
    access(vm, CLOSED + 2 * PAGE)
    vm.nested.set_smm(0, True)
    access(vm, CLOSED + 3 * PAGE)
    assert (log_of(vm, 0, 1), log_of(vm, 0)) == ([3], [0xA2])


@pytest.mark.parametrize("level", ["page", "subpage"])
@pytest.mark.parametrize("profile", PROFILES)
def test_the_written_map_has_what_smm_writes_to_memory_of_space_0(profile: str, level: str) -> None:
    vm = guest(profile)
    vm.dirty.track(level)
    for gpa in (OPEN + 128, CLOSED):
        assert access(vm, gpa, WRITE)[-1] == "completed"
    found = vm.dirty.harvest()
    assert (found.gfns.tolist(), found.maps.tolist()) == ([5], [2 if level == "subpage" else 0xFFFF_FFFF])
    vm.dirty.acknowledge(found.harvest)
    assert access(vm, OPEN + 256, WRITE) == ["completed"]
    assert vm.dirty.harvest().maps.tolist() == [4 if level == "subpage" else 0xFFFF_FFFF]


# ---- memory in common


@pytest.mark.parametrize("profile", PROFILES)
def test_memory_lives_as_long_as_a_slot_shows_it(profile: str) -> None:
    vm = guest(profile)
    put(vm, OPEN, b"both")
    vm.write_memory(2 * MIB, b"gone")
    vm.delete_slot(0)
    assert (look(vm, OPEN), access(vm, OPEN, READ, vcpu=1)) == (b"both", ["mmio"])
    put(vm, OPEN, b"more")
    vm.set_slot(SlotSpec(7, MIB, 4 * MIB, userspace_addr=RAM))
    assert (vm.read_memory(MIB + OPEN, 4), look(vm, OPEN), vm.read_memory(3 * MIB, 4)) == (b"more", b"more", bytes(4))
    put(vm, MIB + OPEN, b"here", 1)
    assert look(vm, OPEN) == b"here"
    vm.set_slot(SlotSpec(7, 8 * MIB, 4 * MIB, userspace_addr=RAM))
    assert (look(vm, OPEN), vm.read_memory(8 * MIB + OPEN, 4)) == (b"here", b"here")
    assert (leaf(vm, SMM_PAGE | OPEN >> 12) or 0) & bits.ADDRESS == 8 * MIB + OPEN
    vm.memory_slots.delete(1, 1)
    assert vm.read_memory(8 * MIB + OPEN, 4) == b"here"
    assert_sound(vm)


def test_a_slot_of_space_1_takes_its_own_memory_along() -> None:
    vm = guest()
    put(vm, CLOSED, b"smm.")
    vm.set_slot(SlotSpec(0, MIB, 0x20000, address_space=1, userspace_addr=SMRAM))
    assert (look(vm, MIB), access(vm, CLOSED, READ)) == (b"smm.", ["mmio"])
    vm.memory_slots.delete(0, 1)
    vm.set_slot(SMRAM_1)
    assert look(vm, CLOSED) == bytes(4)


def test_slots_of_nobodys_address_are_memory_of_their_own() -> None:
    vm = guest(slots=(SlotSpec(0, 0, 4 * MIB), SlotSpec(0, 0, MIB, address_space=1)))
    put(vm, OPEN, b"smm.")
    assert (look(vm, OPEN), look(vm, OPEN, 1)) == (b"smm.", bytes(4))


@pytest.mark.parametrize("profile", PROFILES)
def test_host_memory_events_reach_both_spaces(profile: str) -> None:
    def address(page: int) -> int | None:
        entry = leaf(vm, page)
        return None if entry is None else entry & bits.ADDRESS

    vm = guest(profile)
    page, twin = OPEN >> 12, SMM_PAGE | OPEN >> 12
    for vcpu in (0, 1):
        put(vm, OPEN, b"both", vcpu)
    vm.host_memory.event("migrate", page)
    assert (address(page), address(twin)) == (None, None)
    for vcpu in (0, 1):
        look(vm, OPEN, vcpu)
    assert address(page) == address(twin) != OPEN
    vm.host_memory.event("remap-read-only", page)
    assert address(page) == address(twin)
    assert not (leaf(vm, twin) or 0) & bits.WRITE
    assert put(vm, OPEN, b"copy") == "completed"
    assert (address(page), look(vm, OPEN, 1)) == (None, b"copy"), "the copy is for all who have the page"
    assert address(page) == address(twin)
    vm.host_memory.event("unmap", page)
    assert (address(page), address(twin)) == (None, None)
    look(vm, OPEN)
    vm.host_memory.event("age", page)
    assert not (leaf(vm, twin) or 0) & bits.ACCESSED
    vm.host_memory.event("write-protect", page)
    vm.host_memory.event("zap", page)
    assert address(twin) is None
    look(vm, CLOSED)
    vm.host_memory.event("zap")
    assert address(SMM_PAGE | CLOSED >> 12) is None
    assert look(vm, OPEN) == b"copy"


# ---- the durable form


@pytest.mark.parametrize("profile", PROFILES)
def test_all_of_it_is_durable(profile: str) -> None:
    vm = guest(profile)
    put(vm, CLOSED, b"smm.")
    put(vm, OPEN, b"both")
    look(vm, CLOSED, 1)
    back = round_trip(vm)
    rows = [(OPEN, 8, READ, 0), (2 * MIB, 8, READ, 0), (CLOSED, 8, WRITE, 0), (CLOSED, 8, WRITE, 1)]
    assert (look(back, CLOSED), look(back, CLOSED, 1), look(back, OPEN)) == (b"smm.", bytes(4), b"both")
    assert totals(replay(back, rows)) == totals(replay(vm, rows))


def test_a_machine_of_an_earlier_release_is_in_one_space_until_it_changes() -> None:
    """It has neither the second root nor the word of the record; what is restored is what was stored."""
    vm = guest()
    root = record(vm, ctl.V_EPTP, 1)

    def forget(m: frames.Machine) -> None:
        frames.write_word(m, frames.FIRST_VCPU_FRAME, ctl.V_SPACE, 0)
        frames.write_word(m, frames.FIRST_VCPU_FRAME, ctl.V_EPTP, root)
        frames.free_frame(m, frames.read_word(m, frames.STATE_FRAME, reg.ROOT_EPT_SMM))
        frames.write_word(m, frames.STATE_FRAME, reg.ROOT_EPT_SMM, 0)

    edit(vm, forget)
    head, blocks = picture(vm)
    old = VirtualMachine.restore(json.loads(head), {(kind, block): data for block, (kind, data) in blocks.items()})
    assert picture(old)[1] == blocks
    assert put(old, CLOSED, b"smm.") == "completed"
    assert (look(old, CLOSED), old.read_memory(CLOSED, 4), record(old, ctl.V_SPACE)) == (b"smm.", bytes(4), SMM)
    assert_sound(old)


def test_a_vcpu_that_comes_later_is_outside() -> None:
    vm = VirtualMachine.create(VmConfig(vcpu_room=2, vcpus=(VcpuConfig(0),)), (RAM_0, LOW_1, SMRAM_1), spp=True)
    vm.nested.set_smm(0, True)
    vm.create_vcpu(1)
    assert (access(vm, 2 * MIB, READ), access(vm, 2 * MIB, READ, vcpu=1)[-1]) == (["mmio"], "completed")
    store_word(vm, 0, 1)
    assert maps(vm, 0) == [0xFFFF_FFFF]


@pytest.mark.parametrize("host", [HostConfig(spp=False), HostConfig(ept=False)], ids=["ept", "no-ept"])
@pytest.mark.parametrize("profile", PROFILES)
def test_pages_are_tracked_in_one_space_and_passed_in_the_other(profile: str, host: HostConfig) -> None:
    """KVM tracks pages of a slot (kvm_write_track_add_gfn); the same memory in space 1 is another slot's."""
    vm = guest(profile, host=host, spp=False)
    vm.protect("o", [ProtectedObject("o", OPEN, 8, "page")])
    found = [replay(vm, [(OPEN, 8, WRITE, vcpu)]) for vcpu in (0, 1)]
    assert [(one.violations, one.unenforced_writes, one.page_granular_violations, one.writes) for one in found] == [
        (0, 1, 1, 1),
        (1, 0, 1, 1),
    ]
