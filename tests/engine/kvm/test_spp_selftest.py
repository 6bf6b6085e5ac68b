"""The scenarios of the patch series' selftest, re-told for a machine. Numbers are those of the list."""

from __future__ import annotations

import pytest

from engine.errors import Conflict, InvalidValue, NotEnabled, Unsupported
from engine.kvm.slots import SlotSpec
from engine.machine import SubpageRange, VirtualMachine
from engine.state.config import HostConfig
from engine.trace.single import AccessRequest
from tests.engine.builders import (
    EXECUTE,
    FULL,
    MIB,
    PROFILES,
    READ,
    exits,
    leaf,
    machine,
    maps,
    refused,
    replay,
    resolutions,
    set_map,
)

GPA = 0x1000_0000
GFN = GPA >> 12
SLOT = SlotSpec(1, GPA, 16 << 12)
STRIDE = 128

pytestmark = pytest.mark.parametrize("profile", PROFILES)


@pytest.fixture
def vm(profile: str) -> VirtualMachine:
    return machine(profile, slots=[SLOT])


def stores(vm: VirtualMachine, gpa: int = GPA, count: int = 32, on_violation: str = "skip") -> list[int]:
    """Stores of 0x99 at stride 128, one by one; which of them exited to user space."""
    stopped = []
    for i in range(count):
        request = AccessRequest(gpa + STRIDE * i, 4, data=bytes([0x99, 0, 0, 0]), on_violation=on_violation)
        result = vm.access(request)
        if result.run is not None:
            assert result.run.name == "KVM_EXIT_SPP"
            assert result.run.spp_addr == gpa + STRIDE * i
            stopped.append(i)
    return stopped


def landed(vm: VirtualMachine) -> list[int]:
    """Which of the 32 stores are in memory."""
    memory = vm.read_memory(GPA, 4096)
    assert set(memory) <= {0, 0x99}
    return [i for i in range(32) if memory[STRIDE * i] == 0x99]


def test_1_get_and_set_before_init(profile: str) -> None:
    vm = machine(profile, slots=[SLOT], spp=False)
    assert not vm.spp_active
    rule = "must be on: switch sub-page protection on first, with PUT …/spp"
    with refused(vm, NotEnabled, "spp", False, rule, "ENODEV"):
        vm.subpages(GFN, 1)
    with refused(vm, NotEnabled, "spp", False, rule, "ENODEV"):
        set_map(vm, GFN, 0)


def test_2_init_is_idempotent_and_pages_start_with_full_access(profile: str) -> None:
    vm = machine(profile, slots=[SLOT], spp=False)
    vm.enable_spp()
    assert vm.spp_active
    set_map(vm, GFN, 0xF)
    vm.enable_spp()
    assert maps(vm, GFN, 16) == [0xF] + [FULL] * 15


def test_3_no_access_denies_all_32_stores_and_nothing_else(vm: VirtualMachine) -> None:
    set_map(vm, GFN, 0)
    assert maps(vm, GFN) == [0]
    for kind in (READ, EXECUTE):
        assert vm.access(AccessRequest(GPA, access=kind)).allowed
    assert stores(vm) == list(range(32))
    assert landed(vm) == []


def test_4_full_access_lets_all_32_stores_land(vm: VirtualMachine) -> None:
    set_map(vm, GFN, 0)
    assert len(stores(vm)) == 32
    set_map(vm, GFN, FULL)
    assert stores(vm) == []
    assert landed(vm) == list(range(32))


def test_5_partial_map_and_its_boundary(vm: VirtualMachine) -> None:
    set_map(vm, GFN, 0xF)
    assert stores(vm) == list(range(4, 32))
    assert landed(vm) == [0, 1, 2, 3]
    assert vm.access(AccessRequest(GPA + 511, 1)).allowed
    assert not vm.access(AccessRequest(GPA + 512, 1)).allowed
    assert not vm.access(AccessRequest(GPA + 511, 2)).allowed


def test_6_first_read_of_an_unmapped_page_stays_inside_and_arms_it(vm: VirtualMachine) -> None:
    set_map(vm, GFN, 0)
    result = vm.access(AccessRequest(GPA, access=READ))
    assert (result.allowed, result.run, resolutions(result)) == (True, None, ["armed"])
    set_map(vm, GFN + 1, 0)
    assert stores(vm, GPA + 4096, 1) == [0], "the first store of all is denied"


def test_7_npages(vm: VirtualMachine) -> None:
    for npages in (0, -1, (1 << 20) + 1):
        with refused(vm, InvalidValue, "npages", npages, "npages is 1 to 1048576", "EINVAL"):
            vm.subpages(GFN, npages)
    with refused(vm, InvalidValue, "npages", 0, "npages is at least 1", "EINVAL"):
        set_map(vm, GFN, 0, npages=0)
    set_map(vm, GFN, 0, npages=16)
    assert maps(vm, GFN, 16) == [0] * 16


def test_8_range_with_a_hole_changes_nothing(profile: str) -> None:
    slots = [SLOT, SlotSpec(2, GPA + (17 << 12), 16 << 12)]
    vm = machine(profile, slots=slots)
    stores(vm, count=1)
    rule = f"GFN {GFN + 16:#x} has none"
    with refused(vm, InvalidValue, "gfn", GFN, rule, "EFAULT"):
        vm.subpages(GFN, 17)
    with refused(vm, InvalidValue, "gfn", GFN, rule, "EFAULT"):
        set_map(vm, GFN, 0, npages=17)
    with refused(vm, InvalidValue, "gfn", GFN + 16, rule, "EFAULT"):
        vm.set_subpages([SubpageRange(GFN, 1, 0), SubpageRange(GFN + 16, 1, 0)])
    assert maps(vm, GFN, 16) == [FULL] * 16


def test_8_range_over_two_adjacent_slots_goes_on(profile: str) -> None:
    vm = machine(profile, slots=[SLOT, SlotSpec(0, GPA + (16 << 12), 4096)])
    set_map(vm, GFN, 0xF0, npages=17)
    assert maps(vm, GFN, 17) == [0xF0] * 17


def test_10_skip_or_retry(vm: VirtualMachine, profile: str) -> None:
    set_map(vm, GFN, 0)
    result = vm.access(AccessRequest(GPA, on_violation="stop"))
    assert result.run is not None
    number, past_the_store = {"kvm-2019": (28, True), "kvm-latest": (29, False)}[profile]
    assert (result.run.exit_reason, result.run.rip_advanced) == (number, past_the_store)
    assert stores(vm, count=1) == [0], "the same exit again"
    set_map(vm, GFN, 1)
    assert stores(vm, count=1) == []
    assert landed(vm) == [0]


def test_11_slot_that_is_deleted_and_made_again_has_lost_its_map(vm: VirtualMachine) -> None:
    set_map(vm, GFN, 0)
    assert len(stores(vm)) == 32
    vm.delete_slot(1)
    vm.set_slot(SLOT)
    assert maps(vm, GFN) == [FULL]
    assert stores(vm) == []


def test_12_set_is_effective_on_every_vcpu(profile: str) -> None:
    vm = machine(profile, slots=[SLOT], vcpus=(0, 5))
    for vcpu in (0, 5):
        assert vm.access(AccessRequest(GPA, vcpu=vcpu)).allowed
    set_map(vm, GFN, 0)
    for vcpu in (0, 5):
        assert not vm.access(AccessRequest(GPA, vcpu=vcpu)).allowed
    result = replay(vm, [(GPA, 8, 1, 5), (GPA, 8, 1, 0)])
    assert exits(result, "vcpu") == [(5,), (0,)]


def test_13_misses(profile: str) -> None:
    vm = machine(profile, slots=[SlotSpec(0, 0, 2 * MIB)])
    set_map(vm, 0, 1, npages=512)
    first = replay(vm, [0x5000])
    assert (first.exits["spp_miss"], first.violations) == ({"kvm-2019": 0, "kvm-latest": 1}[profile], 0)
    assert replay(vm, [0x5000, 0x6000, 511 << 12]).exits["spp_miss"] == 0
    assert leaf(vm, 6) is not None


ENABLING = [
    ("no SPP", {"spp": False}, Unsupported, "host.spp", False, {"kvm-2019": "EINVAL", "kvm-latest": "ENODEV"}),
    ("no EPT", {"ept": False}, Unsupported, "host.ept", False, {"kvm-2019": "EINVAL", "kvm-latest": "ENODEV"}),
    ("AMD", {"vendor": "amd"}, Unsupported, "host.vendor", "amd", {"kvm-2019": "EINVAL", "kvm-latest": "ENODEV"}),
    ("nested", {"nested": True}, Conflict, "host.nested", True, {"kvm-2019": None, "kvm-latest": "EPERM"}),
    ("not nested", {"nested": False}, None, "", None, {"kvm-2019": None, "kvm-latest": None}),
]


@pytest.mark.parametrize(
    ("host", "kind", "field", "value", "errnos"), [row[1:] for row in ENABLING], ids=[row[0] for row in ENABLING]
)
def test_14_hosts_on_which_it_cannot_be_enabled(
    profile: str,
    host: dict[str, object],
    kind: type[Conflict] | None,
    field: str,
    value: object,
    errnos: dict[str, str | None],
) -> None:
    vm = machine(profile, slots=[SLOT], spp=False, host=HostConfig(**host))
    errno = errnos[profile]
    if errno is None:
        vm.enable_spp()
        assert vm.spp_active
        return
    assert kind is not None
    with refused(vm, kind, field, value, "sub-page protection", errno):
        vm.enable_spp()
    assert not vm.spp_active
