"""Each row of the comparison of version 4 with the last one (kvm-spp 8.2), in both profiles.

Rows that are about the bytes of an ioctl are asserted here as rows of the table, from which that layer takes them.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from engine.arch import access as acc
from engine.arch import controls as ctl
from engine.arch import ept as bits
from engine.arch import exits as arch_exits
from engine.cpu import frames
from engine.errors import Conflict, InvalidValue, Unsupported
from engine.kvm import choice_bits, exit_handling, mapping, vcpu_run
from engine.kvm import resolutions as res
from engine.kvm import state_frame as reg
from engine.kvm.slots import SlotSpec
from engine.machine import SubpageRange
from engine.state.config import HostConfig
from engine.state.profiles import KVM_2019, KVM_LATEST, Row, SubpageRows, kvm_version
from engine.state.profiles import PROFILES as NAMES
from engine.trace.single import AccessRequest
from tests.engine.builders import (
    FULL,
    MIB,
    PROFILES,
    READ,
    access,
    edit,
    leaf,
    machine,
    maps,
    replay,
    set_map,
    vector,
)

V4, LATER = PROFILES


def differs(v4: Any, later: Any) -> pytest.MarkDecorator:
    """One test for both profiles, each with what it does."""
    return pytest.mark.parametrize(("profile", "does"), [(V4, v4), (LATER, later)], ids=PROFILES)


def row(profile: str) -> SubpageRows:
    return kvm_version(profile).subpages


SERIES_4, SERIES_12 = row(KVM_2019), row(KVM_LATEST)


# ---- the table


def test_table_has_a_row_for_each_profile_and_every_choice_is_made() -> None:
    assert tuple(kvm_version(name).name for name in NAMES) == NAMES
    with pytest.raises(InvalidValue, match="profile is one of kvm-2019, kvm-latest"):
        kvm_version("kvm-2020")
    rows = {name for name, value in vars(SubpageRows).items() if isinstance(value, Row)}
    same = {name for name in rows if getattr(SERIES_4, name) == getattr(SERIES_12, name)}
    assert same == {"too_many_errno", "subpage_header"}, "a choice that both make alike is no choice"


def test_kernels_read_the_row() -> None:
    for name in NAMES:
        m = machine(name).state.current.snapshot.machine
        assert m.caps[frames.CAP_KVM] == choice_bits.caps(row(name))
        assert m.caps[frames.CAP_SAVED_SHIFT] == row(name).saved_shift
    assert (choice_bits.caps(SERIES_4), choice_bits.caps(SERIES_12)) == (0b1_1010_0001, 0b0_0101_1110)


# ---- rows of the ABI


@pytest.mark.parametrize(
    ("choice", "v4", "later"),
    [
        ("enable_call", "KVM_INIT_SPP", "KVM_ENABLE_CAP"),
        ("unsupported_errno", "EINVAL", "ENODEV"),
        ("nested_errno", None, "EPERM"),
        ("enable_tests", ("support", "active", "allocation"), ("flags", "nested", "support", "active", "allocation")),
        ("max_pages", 64, 512),
        ("npages_zero_errno", "EINVAL", None),
        ("access_flags_errno", None, "EINVAL"),
        ("get_failure_copies", True, False),
        ("set_with_hole", "applied", "stored"),
        ("hole_after_mapped_returns_zero", True, False),
        ("check_extension", 0, 512),
        ("capability", None, 182),
    ],
)
def test_rows_of_the_abi(choice: str, v4: object, later: object) -> None:
    assert (getattr(SERIES_4, choice), getattr(SERIES_12, choice)) == (v4, later)


@differs((Unsupported, "EINVAL"), (Conflict, "EPERM"))
def test_order_of_enable_tests(profile: str, does: tuple[type[Exception], str]) -> None:
    """A host without SPP that allows nesting: what is said first."""
    vm = machine(profile, spp=False, host=HostConfig(spp=False, nested=True))
    with pytest.raises((Unsupported, Conflict)) as caught:
        vm.enable_spp()
    assert (type(caught.value), caught.value.errno) == does


@differs("EINVAL", "ENODEV")
def test_unsupported_host(profile: str, does: str) -> None:
    vm = machine(profile, spp=False, host=HostConfig(ept=False))
    with pytest.raises(Unsupported) as caught:
        vm.enable_spp()
    assert caught.value.errno == does


@pytest.mark.parametrize("profile", PROFILES)
def test_enabling_is_idempotent(profile: str) -> None:
    vm = machine(profile)
    set_map(vm, 5, 0xF)
    before = vm.counters()
    vm.enable_spp()
    assert (maps(vm, 5), vm.counters()) == ([0xF], before)


@differs(True, False)
def test_control_bit(profile: str, does: bool) -> None:
    """Patch 2: in version 4 every vCPU has the control from the start, later from the enabling call."""
    vm = machine(profile, spp=False, vcpus=(0, 1))

    def on() -> list[bool]:
        return [bool(vm.vcpus.vmcs(n)["secondary_controls"] & ctl.SECONDARY_SPP) for n in (0, 1)]

    assert on() == [does, does]
    vm.enable_spp()
    assert on() == [True, True]
    assert all(vm.vcpus.vmcs(n)["sppt_pointer"] for n in (0, 1))


# ---- bitmaps and slots


@pytest.mark.parametrize("profile", PROFILES)
def test_default_bitmap_is_full_and_a_slot_made_later_has_one(profile: str) -> None:
    vm = machine(profile)
    vm.set_slot(SlotSpec(3, 16 * MIB, MIB))
    assert maps(vm, 0) + maps(vm, 4096, 256) == [FULL] * 257
    set_map(vm, 4096, 0)
    assert access(vm, 16 * MIB)[-1] == "violation"


@pytest.mark.parametrize("profile", PROFILES)
def test_deleted_slot_takes_its_bitmap_and_nothing_else(profile: str) -> None:
    """Version 12 switches SPP off for the whole VM."""
    vm = machine(profile, slots=[SlotSpec(0, 0, MIB), SlotSpec(1, 4 * MIB, MIB)])
    set_map(vm, 5, 0)
    set_map(vm, 1024, 0)
    vm.delete_slot(1)
    assert vm.spp_active and maps(vm, 5) == [0]
    assert access(vm, 0x5000)[-1] == "violation"
    vm.set_slot(SlotSpec(1, 4 * MIB, MIB))
    assert maps(vm, 1024) == [FULL]


@pytest.mark.parametrize("profile", PROFILES)
def test_bitmaps_follow_the_offset_of_a_slot_that_moves(profile: str) -> None:
    vm = machine(profile, slots=[SlotSpec(0, 0, MIB)])
    set_map(vm, 5, 0xF)
    access(vm, 0x5000)
    vm.set_slot(SlotSpec(0, 4 * MIB, MIB))
    assert maps(vm, 1024 + 5) == [0xF]
    assert access(vm, (1024 + 5) << 12)[-1] == "completed"
    assert access(vm, ((1024 + 5) << 12) + 0x200)[-1] == "violation"


@pytest.mark.parametrize("profile", PROFILES)
def test_set_over_a_hole_by_the_api_is_all_or_nothing(profile: str) -> None:
    vm = machine(profile)
    with pytest.raises(InvalidValue) as caught:
        vm.set_subpages([SubpageRange(1020, 8, 0)])
    assert caught.value.errno == "EFAULT"
    assert maps(vm, 1020, 4) == [FULL] * 4


# ---- SPPTs


@differs(2, 1)
def test_trees(profile: str, does: int) -> None:
    vm = machine(profile, vcpus=(0, 1))
    assert len({vm.vcpus.vmcs(n)["sppt_pointer"] for n in (0, 1)}) == does == vm.counters()["frames_sppt"]


@differs([["armed", "completed"], 0x55], [["armed", "sppt-filled", "completed"], 0x55])
def test_sppt_is_built_in_faults_or_by_the_miss_handler(profile: str, does: list[Any]) -> None:
    vm = machine(profile)
    set_map(vm, 5, 0xF)
    assert vector(vm, 5) is None
    assert [access(vm, 0x5000), vector(vm, 5)] == does


@differs(0x55, None)
def test_set_fills_or_invalidates(profile: str, does: int | None) -> None:
    vm = machine(profile)
    set_map(vm, 5, 0)
    access(vm, 0x5000)
    set_map(vm, 5, 0xF)
    assert vector(vm, 5) == does


@differs([0x55, 0], [0x55, 0x55])
def test_scope_of_a_miss(profile: str, does: list[int]) -> None:
    vm = machine(profile)
    set_map(vm, 5, 0xF, npages=2)
    access(vm, 0x5000, READ)
    vm.tables.set_sppt_entry(4, 0, 0)
    assert access(vm, 0x5000) == ["sppt-filled", "completed"]
    assert [vector(vm, 5), vector(vm, 6)] == does


# ---- faults


@differs((2, 0, 1), (1, 1, 0))
def test_huge_page(profile: str, does: tuple[int, int, int]) -> None:
    vm = machine(profile, slots=[SlotSpec(0, 0, 4 * MIB, host_page_size=2 * MIB)])
    set_map(vm, 5, 0)
    result = replay(vm, [0x5000])
    m = vm.state.current.snapshot.machine
    level = int(mapping.find_leaf(m, np.int64(5), np.zeros((10, 4), dtype=np.int64))[1])
    assert (level, result.violations, result.unenforced_writes) == does


@differs((28, True, None), (29, False, 4))
def test_violation(profile: str, does: tuple[int, bool, int | None]) -> None:
    vm = machine(profile)
    set_map(vm, 5, 0)
    run = vm.access(AccessRequest(0x5085, insn_len=4)).run
    assert run is not None
    assert (run.name, run.spp_addr, run.exit_reason) == ("KVM_EXIT_SPP", 0x5085, does[0])
    assert (run.exit_reason, run.rip_advanced, run.insn_len) == does


@pytest.mark.parametrize("profile", PROFILES)
def test_cause_is_bit_61_alone(profile: str) -> None:
    """A write by the guest's page walk to an armed page is reported though the bitmap allows all of that sub-page."""
    vm = machine(profile)
    set_map(vm, 5, 0xFFFF_FFFE)
    access(vm, 0x5080)
    result = vm.access(AccessRequest(0x5080, kind=acc.PAGING_UPDATE))
    assert (result.resolution, result.exits.column("denied").tolist()) == ("violation", [0])


@differs(("completed", True), ("violation", False))
def test_emulated_write(profile: str, does: tuple[str, bool]) -> None:
    vm = machine(profile)
    set_map(vm, 5, 0)
    result = vm.access(AccessRequest(0x5085, source=acc.EMULATED))
    assert (result.resolution, result.unenforced) == does
    if result.run is not None:
        assert result.run.spp_addr == 0x5085, "an address, not a page number"


@differs(["completed"], ["write-restored", "completed"])
def test_dirty_tracking_of_an_armed_page(profile: str, does: list[str]) -> None:
    """A fault is what a dirty log takes note by: version 4 misses writes that the bitmap allows."""
    vm = machine(profile)
    set_map(vm, 5, 0xF)
    access(vm, 0x5000)
    vm.host_memory.event("write-protect", 5)
    assert access(vm, 0x5000) == does


@differs("violation", "completed")
def test_access_tracking_of_an_armed_page(profile: str, does: str) -> None:
    host = HostConfig(vmx_capabilities={"ept_vpid_cap": 0x0F01_0633_41C1 & ~bits.CAP_ACCESSED_DIRTY})
    vm = machine(profile, host=host)
    set_map(vm, 5, 0xF)
    access(vm, 0x5000)
    vm.host_memory.event("age", 5)
    assert access(vm, 0x5000)[-1] == does


@differs(["completed"], ["mapped", "completed"])
def test_set_full(profile: str, does: list[str]) -> None:
    """Version 4 gives write permission at once, later ones leave it to the next fault."""
    vm = machine(profile)
    set_map(vm, 5, 0)
    access(vm, 0x5000)
    set_map(vm, 5, FULL)
    assert access(vm, 0x5000) == does


@pytest.mark.parametrize("profile", PROFILES)
def test_root_is_not_lost_when_the_guest_toggles_paging(profile: str) -> None:
    vm = machine(profile)
    set_map(vm, 5, 0xF)
    access(vm, 0x5000)
    before = vm.vcpus.vmcs(0)
    vm.vcpus.set_vmcs(0, {"cr0": before["cr0"] & ~(1 << 31)})
    vm.vcpus.set_vmcs(0, {"cr0": before["cr0"]})
    assert vm.vcpus.vmcs(0)["sppt_pointer"] == before["sppt_pointer"]
    assert (access(vm, 0x5000), access(vm, 0x5200)) == (["completed"], ["violation"])
    assert vm.spp_active


@pytest.mark.parametrize("profile", PROFILES)
def test_resume_from_a_stop_continues_exactly_there(profile: str) -> None:
    """The record that stopped has not run: from it on, with the sub-page open, or from the next on without it."""
    rows = [0x5000, 0x5200, 0x5000, 0x5280]
    vm = machine(profile)
    set_map(vm, 5, 0xF)
    assert replay(vm, rows, on_violation="stop").stopped_at == 1
    assert replay(vm, rows, on_violation="stop", start=1).stopped_at == 1, "the same exit again"
    set_map(vm, 5, 0x1F)
    resumed = replay(vm, rows, on_violation="stop", start=1)
    assert (resumed.stopped_at, resumed.records, resumed.violations) == (3, 2, 1)
    assert replay(vm, rows, on_violation="stop", start=4).stopped_at is None


# ---- exit 66


@pytest.mark.parametrize("profile", PROFILES)
def test_misconfiguration_reaches_user_space(profile: str) -> None:
    vm = machine(profile)
    set_map(vm, 5, 0xF)
    access(vm, 0x5000)
    vm.tables.set_sppt_entry(1, 0x5000, 2)
    result = vm.access(AccessRequest(0x5000))
    assert result.run is not None
    assert (result.run.exit_reason, result.run.name, result.run.hw_exit_reason) == (0, "KVM_EXIT_UNKNOWN", 66)
    assert result.run.spp_addr is None


@pytest.mark.parametrize(("circumstances", "blocked"), [(0, True), (acc.DELIVERY, False)])
def test_nmis_that_iret_had_unblocked_are_blocked_again(circumstances: int, blocked: bool) -> None:
    """Not where the exit came while an event was delivered."""
    vm = machine(vcpus=(0, 1))

    def handle(m: frames.Machine) -> None:
        exit_handling.block_nmis(m, np.int64(1), np.int64(circumstances), np.int64(arch_exits.Q_NMI_UNBLOCKING | 0x182))

    edit(vm, handle)
    assert vm.vcpus.vmcs(1)["interruptibility"] == (8 if blocked else 0)
    assert vm.vcpus.vmcs(0)["interruptibility"] == 0
    edit(vm, lambda m: exit_handling.block_nmis(m, np.int64(0), np.int64(0), np.int64(0x182)))
    assert vm.vcpus.vmcs(0)["interruptibility"] == 0


@pytest.mark.parametrize("profile", PROFILES)
def test_miss_that_iret_causes_blocks_nmis(profile: str) -> None:
    vm = machine(profile)
    set_map(vm, 5, 0xF)

    def iret(m: frames.Machine) -> None:
        trail = np.zeros((10, 4), dtype=np.int64)
        log = np.zeros((64, vcpu_run.EXIT_WORDS), dtype=np.int64)
        tally = np.zeros(len(reg.COUNTERS), dtype=np.int64)
        how = acc.describe(acc.WRITE, circumstances=acc.NMI_UNBLOCKING)
        used = np.zeros(1, dtype=np.int64)
        ending = vcpu_run.execute(m, 0, 0x5000, 8 | 1 << 16, 0, 0, how, trail, log, used, tally, 1)
        assert int(ending[0]) == res.COMPLETED

    edit(vm, iret)
    assert vm.vcpus.vmcs(0)["interruptibility"] == ctl.BLOCKING_BY_NMI
    assert leaf(vm, 5) is not None
