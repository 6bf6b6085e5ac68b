"""How an explained access ends: what ``walk`` foretells is what ``access`` then does, and it changes nothing."""

from __future__ import annotations

from typing import Any

import pytest

from engine.arch import access as acc
from engine.arch import controls as ctl
from engine.errors import LimitExceeded
from engine.kvm.protections import ProtectedObject
from engine.kvm.slots import SlotSpec
from engine.machine import SubpageRange, VirtualMachine
from engine.machine.page_access import AccessChange
from engine.machine.walks import Walk
from engine.state.config import HostConfig, VmConfig
from engine.trace.session import ReplayOptions
from engine.trace.single import AccessRequest
from tests.engine.builders import MIB, PROFILES, chunk, unchanged

READ, WRITE, EXECUTE = acc.READ, acc.WRITE, acc.EXECUTE
GIB = 1 << 30
OBJECT = 0x5C6A0
READ_ONLY, BESIDE = 2 * MIB, 64 * MIB


def guest(profile: str = "kvm-2019", *, spp: bool = True, **options: Any) -> VirtualMachine:
    """Two slots, the second read-only; sub-pages 13 to 15 of page 0x5c are protected where SPP is on."""
    slots = [SlotSpec(0, 0, READ_ONLY), SlotSpec(7, READ_ONLY, MIB, read_only=True)]
    vm = VirtualMachine.create(VmConfig(profile=profile, **options), slots, spp=spp)
    if spp:
        vm.protect("paths", [ProtectedObject("modprobe_path", OBJECT, 256)])
    return vm


def foretold(vm: VirtualMachine, gpa: int, access: int = WRITE, **options: Any) -> Walk:
    """What walk says, which is what the access that follows comes to, exit by exit."""
    with unchanged(vm):
        walk = vm.walk(gpa, access, **options)
    result = vm.access(AccessRequest(gpa, options.pop("size", 8), access, **options))
    assert walk.then.resolution == result.resolution
    assert walk.then.exits is not None and walk.then.exits.resolution_names() == result.exits.resolution_names()
    for name in ("reason", "qualification", "gpa", "denied"):
        assert walk.then.exits.column(name).tolist() == result.exits.column(name).tolist()
    return walk


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("access", [READ, WRITE, EXECUTE])
@pytest.mark.parametrize("gpa", [OBJECT, OBJECT & ~4095, 0x5FFC, READ_ONLY + 8, READ_ONLY - 4, BESIDE, 1 << 40])
def test_what_walk_foretells_comes_true(profile: str, access: int, gpa: int) -> None:
    vm = guest(profile)
    first = foretold(vm, gpa, access)
    again = foretold(vm, gpa, access)
    assert again.then.sentence == first.then.sentence, "the ending does not depend on what was mapped before"


@pytest.mark.parametrize("profile", PROFILES)
def test_untouched_page_is_not_called_denied(profile: str) -> None:
    walk = foretold(guest(profile), OBJECT)
    assert walk.outcome == "ept_violation" and walk.denied == 0
    assert walk.sentence.startswith("not mapped: PML4E at 0x")
    assert walk.sentence.endswith("; KVM maps the page and arms it for its sub-pages, and the guest tries again")
    assert walk.then.resolution == "violation"
    assert walk.then.sentence.startswith("denied: sub-page 13 of SPPL1E at 0x")
    after = walk.then.after
    assert after is not None and after.denied == 0x2000 and after.sppt[-1].level == 1


def test_without_spp_a_first_touch_is_allowed() -> None:
    walk = foretold(guest(spp=False), OBJECT)
    assert walk.sentence.endswith("; KVM maps the page, and the guest tries again")
    assert walk.then.sentence == "allowed: every EPT entry used permits write"


def test_mmio_says_why() -> None:
    vm = guest()
    nowhere = foretold(vm, BESIDE)
    assert "tries again" not in nowhere.sentence
    assert nowhere.then.sentence == "MMIO: no memory slot holds GFN 0x4000; the access goes to user space"
    read_only = foretold(vm, READ_ONLY)
    assert read_only.then.sentence == "MMIO: memory slot 7 is read-only; the write goes to user space"
    assert foretold(vm, READ_ONLY, READ).then.resolution == "completed"


def test_page_access_is_blamed_where_it_refuses() -> None:
    vm = guest("kvm-latest")
    vm.page_access.set([AccessChange(5, rights=acc.READ | 1)])
    assert foretold(vm, 0x5000, EXECUTE).then.sentence == "denied: the page access of GFN 0x5 is r--"
    vm.page_access.set([AccessChange(6, rights=0)])
    for access in (READ, WRITE, EXECUTE):
        assert foretold(vm, 0x6000, access).then.sentence == "denied: the page access of GFN 0x6 is ---"


def test_execute_only_page() -> None:
    vm = guest("kvm-latest", host=HostConfig(vmx_capabilities={"ept_vpid_cap": 0x0F01_0633_41C1}))
    vm.page_access.set([AccessChange(5, rights=4)])
    assert foretold(vm, 0x5000, EXECUTE).then.resolution == "completed"
    assert foretold(vm, 0x5000, READ).then.sentence == "denied: the page access of GFN 0x5 is --x"


@pytest.mark.parametrize("kind", [acc.READ_MODIFY_WRITE, acc.PAGING_READ, acc.PAGING_UPDATE, acc.SHADOW_STACK])
def test_kinds(kind: int) -> None:
    vm = guest()
    foretold(vm, OBJECT, acc.default_access(kind), kind=kind, linear=1)


def test_miss_of_an_armed_page_is_filled() -> None:
    vm = guest("kvm-latest")
    vm.access(AccessRequest(OBJECT, access=READ))
    walk = foretold(vm, OBJECT)
    assert walk.outcome == "spp_miss"
    assert walk.sentence.endswith("; KVM fills the SPPT from the page's bitmap, and the guest tries again")
    assert walk.then.resolution == "violation"


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize(
    ("entry", "circumstances", "sentences"),
    [
        (2, 0, ("KVM_RUN fails with EINVAL, for KVM has made no such entry: EPT misconfiguration: ",) * 2),
        (
            6 | 1 << 62,
            0,
            (f"MMIO: the entry of GFN {OBJECT >> 12:#x} is one with which KVM marks MMIO; the access ",) * 2,
        ),
        (
            2,
            acc.DELIVERY,
            (
                "KVM cannot handle the exit (EPT misconfiguration) and gives up with KVM_EXIT_INTERNAL_ERROR: EPT mis",
                "KVM_RUN fails with EINVAL, for KVM has made no such entry: EPT misconfiguration: ",
            ),
        ),
    ],
)
def test_misconfiguration(profile: str, entry: int, circumstances: int, sentences: tuple[str, str]) -> None:
    vm = guest(profile)
    vm.access(AccessRequest(OBJECT))
    vm.tables.set_ept_entry(1, OBJECT, entry)
    walk = foretold(vm, OBJECT, circumstances=circumstances)
    assert walk.outcome == "ept_misconfiguration" and "tries again" not in walk.sentence
    assert walk.then.sentence.startswith(sentences[PROFILES.index(profile)])


@pytest.mark.parametrize("profile", PROFILES)
def test_sppt_misconfiguration_ends_in_an_internal_error(profile: str) -> None:
    vm = guest(profile)
    vm.access(AccessRequest(OBJECT))
    vm.tables.set_sppt_entry(1, OBJECT, 2)
    assert foretold(vm, OBJECT).then.sentence.startswith(
        "KVM cannot handle the exit (SPP-related event) and gives up with KVM_EXIT_UNKNOWN: "
    )


def test_virtualization_exception() -> None:
    vm = guest()
    vm.access(AccessRequest(OBJECT))
    secondary = vm.vcpus.vmcs(0)["secondary_controls"] | int(ctl.SECONDARY_VE)
    vm.vcpus.set_vmcs(0, {"secondary_controls": secondary, "ve_information_address": 0x9000})
    walk = foretold(vm, OBJECT)
    assert walk.then.sentence.startswith("the guest takes a #VE instead of the exit: denied: sub-page 13 of ")


def test_larger_page_that_ignores_the_bitmap() -> None:
    """The first series maps 2 MBytes over protected pages."""
    vm = VirtualMachine.create(VmConfig(), [SlotSpec(0, 0, 1 << 22, host_page_size=1 << 21)], spp=True)
    vm.set_subpages([SubpageRange(5, 1, 0)])
    walk = foretold(vm, 0x5000)
    assert walk.then.resolution == "completed"
    assert walk.then.sentence == "allowed: a larger page maps it writable, though the page's bitmap refuses it"


def test_closed_for_the_dirty_log() -> None:
    vm = guest("kvm-latest")
    vm.dirty.track("subpage")
    vm.access(AccessRequest(0x7000, access=READ))
    walk = foretold(vm, 0x7000)
    assert "KVM notes the write in the dirty log" in walk.sentence or walk.outcome == "spp_miss"
    assert walk.then.resolution == "completed"


def test_limit_is_told_and_not_raised() -> None:
    vm = VirtualMachine.create(VmConfig(max_table_frames=600), [SlotSpec(0, 0, 1 << 44)])
    with vm.replay(ReplayOptions()) as run:
        run.feed(chunk([i << 30 for i in range(290)]))
        run.finish()
    untouched = (gpa << 30 for gpa in range(290, 400))
    refused = next(gpa for gpa in untouched if vm.walk(gpa).then.resolution == "limit-exceeded" or touch(vm, gpa))
    with pytest.raises(LimitExceeded):
        vm.access(AccessRequest(refused))
    then = vm.walk(refused).then
    assert then.sentence == "not executed: a machine has 600 table frames at most"
    assert then.exits is None and then.after is None


def touch(vm: VirtualMachine, gpa: int) -> bool:
    """Touch a page; never true."""
    return not vm.access(AccessRequest(gpa)).allowed


def test_walk_goes_on_while_another_changes_the_machine() -> None:
    """A replay is under way: walk neither waits for it nor sees what it has not published, nor gets in its way."""
    vm = guest()
    with vm.replay(ReplayOptions()) as run:
        run.feed(chunk([OBJECT]))
        before = vm.walk(OBJECT)
        assert before.sentence.startswith("not mapped") and before.then.resolution == "violation"
        run.feed(chunk([OBJECT + 8]))
        result = run.finish()
    assert result.violations == 2
    assert vm.walk(OBJECT).sentence == before.then.sentence
