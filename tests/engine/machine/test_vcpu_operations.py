"""Operations on one vCPU: VMCS fields, VM entry, INVEPT, INVVPID, its translation cache, its MSRs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest

from engine.arch import controls as ctl
from engine.arch import ept as bits
from engine.arch.vmcs_fields import FIELDS
from engine.cpu import frames, tlb
from engine.errors import EngineError, InvalidValue, NotFound, Unsupported
from engine.machine import VirtualMachine
from engine.machine.vcpu_operations import InstructionResult
from engine.state.config import HostConfig
from engine.state.default_host import EPT_VPID_CAP
from engine.trace.columns import TraceChunk
from engine.trace.session import ReplayOptions
from engine.trace.single import AccessRequest
from tests.engine.builders import (
    PROFILES,
    READ,
    WRITE,
    edit,
    machine,
    protect,
    round_trip,
    set_map,
    store_leaf,
    unchanged,
)

ABSENT = 0x1000
SUCCEEDED = InstructionResult("VMsucceed")


def fast(vm: VirtualMachine) -> bool:
    """Whether changes that begin now may use the fast path."""
    seen: list[bool] = []
    edit(vm, lambda m: seen.append(bool(m.caps[frames.CAP_FAST_PATH])))
    return seen[0]


def modelled(*vcpus: int, **config: Any) -> VirtualMachine:
    return machine(vcpus=vcpus or (0,), translation_cache="model", **config)


@contextmanager
def refused(vm: VirtualMachine, kind: type[EngineError], *, field: str) -> Iterator[None]:
    """The call raises that error, names the field, and changes nothing."""
    with unchanged(vm), pytest.raises(kind) as caught:
        yield
    assert caught.value.field == field


# ---- VMCS


def test_a_new_vcpu_enters() -> None:
    for profile in PROFILES:
        vm = machine(profile, vcpus=(3, 1))
        for vcpu in (3, 1):
            fields = vm.vcpus.vmcs(vcpu)
            assert list(fields) == list(FIELDS)
            assert fields["eptp"] & 7 == 6 and fields["sppt_pointer"] and fields["pml_index"] == 511
            assert fields["secondary_controls"] & ctl.SECONDARY_SPP
            assert vm.vcpus.vm_entry(vcpu) == SUCCEEDED


@pytest.mark.parametrize("name", FIELDS)
def test_fields_keep_whatever_fits(name: str) -> None:
    vm = machine(vcpus=(0, 7))
    before = vm.vcpus.vmcs(7)
    largest = (1 << FIELDS[name].bits) - 1
    other = vm.vcpus.vmcs(0)
    vm.vcpus.set_vmcs(7, {name: largest})
    assert vm.vcpus.vmcs(7) == {**before, name: largest}
    assert vm.vcpus.vmcs(0) == other
    assert round_trip(vm).vcpus.vmcs(7) == {**before, name: largest}
    for value in (largest + 1, -1):
        with refused(vm, InvalidValue, field=name):
            vm.vcpus.set_vmcs(7, {"cr3": 1, name: value})


def test_unknown_fields_and_vcpus() -> None:
    vm = machine()
    with refused(vm, InvalidValue, field="eptq"):
        vm.vcpus.set_vmcs(0, {"cr3": 1, "eptq": 1})
    calls: list[Any] = [
        lambda: vm.vcpus.vmcs(1),
        lambda: vm.vcpus.set_vmcs(1, {}),
        lambda: vm.vcpus.vm_entry(1),
        lambda: vm.vcpus.invept(1, 2, 0),
        lambda: vm.vcpus.invvpid(1, 2, 0, 0),
        lambda: vm.vcpus.tlb(1),
        lambda: vm.vcpus.msrs(1),
    ]
    for call in calls:
        with refused(vm, NotFound, field="vcpu"):
            call()


def test_amd_has_no_vmcs() -> None:
    vm = machine(spp=False, host=HostConfig(vendor="amd"))
    with refused(vm, Unsupported, field="host.vendor"):
        vm.vcpus.vmcs(0)
    with refused(vm, Unsupported, field="host.vendor"):
        vm.vcpus.invept(0, 2, 0)
    assert vm.vcpus.tlb(0) == []


def test_entry_is_refused_and_says_why() -> None:
    vm = machine()
    vm.vcpus.set_vmcs(0, {"sppt_pointer": 0x10})
    assert vm.vcpus.vm_entry(0) == InstructionResult("VMfail", vm_instruction_error=7)
    vm.vcpus.set_vmcs(0, {"sppt_pointer": 0x1000})
    assert vm.vcpus.vm_entry(0) == SUCCEEDED


# ---- vCPUs that differ


@pytest.mark.parametrize("field", ["eptp", "sppt_pointer", "secondary_controls", "ve_information_address"])
def test_the_fast_path_is_off_while_vcpus_differ(field: str) -> None:
    vm = machine(vcpus=(0, 1))
    before = vm.vcpus.vmcs(1)[field]
    assert fast(vm)
    vm.vcpus.set_vmcs(1, {field: before ^ 0x40})
    assert not fast(vm) and not fast(round_trip(vm))
    vm.vcpus.set_vmcs(1, {field: before})
    assert fast(vm) and fast(round_trip(vm))


def test_the_fast_path_stays_where_a_difference_does_not_matter() -> None:
    vm = machine(vcpus=(0, 1))
    vm.vcpus.set_vmcs(1, {"pml_index": 3, "cr3": 0x1000, "vpid": 9, "cpl": 3})
    assert fast(vm)
    alone = machine()
    alone.vcpus.set_vmcs(0, {"eptp": alone.vcpus.vmcs(0)["eptp"] ^ 0x40})
    assert fast(alone)
    assert not fast(modelled())


def test_two_ept_pointers_in_one_trace() -> None:
    vm = machine(vcpus=(0, 1))
    vm.vcpus.set_vmcs(1, {"eptp": ABSENT | 0x1E})
    rows = [[0x2000, 8 | WRITE << 16 | vcpu << 32] for vcpu in (0, 0, 1, 0, 1)]
    with vm.replay(ReplayOptions()) as replay:
        replay.feed(TraceChunk(np.array(rows, dtype=np.uint64), None, {}))
        result = replay.finish()
    # An absent root reads as all ones: vCPU 1 finds its entries misconfigured, whatever vCPU 0 left behind.
    assert result.exit_columns.column("index").tolist() == [2, 4]
    assert result.exit_columns.column("reason").tolist() == [49, 49]
    assert result.exits["ept_violation"] == 1


# ---- INVEPT, INVVPID


@pytest.mark.parametrize(
    ("place", "cpl", "expected"),
    [
        ("root", 0, {"result": "VMfail", "vm_instruction_error": 28}),
        ("root", 3, {"result": "exception", "exception": "#GP(0)"}),
        ("outside", 0, {"result": "exception", "exception": "#UD"}),
        ("wrong-mode", 3, {"result": "exception", "exception": "#UD"}),
        ("non-root", 3, {"result": "vm-exit"}),
    ],
)
def test_where_it_is_executed(place: str, cpl: int, expected: dict[str, Any]) -> None:
    vm = machine()
    for found, reason in (
        (vm.vcpus.invept(0, 9, 0, place=place, cpl=cpl), 50),
        (vm.vcpus.invvpid(0, 9, 0, 0, place=place, cpl=cpl), 53),
    ):
        assert found == InstructionResult(**expected, **({"exit_reason": reason} if place == "non-root" else {}))


def test_operands_that_no_register_holds() -> None:
    vm = machine()
    for arguments, field in (
        ((1 << 64, 0), "type"),
        ((-1, 0), "type"),
        ((1, 1 << 64), "eptp"),
    ):
        with refused(vm, InvalidValue, field=field):
            vm.vcpus.invept(0, *arguments)
    with refused(vm, InvalidValue, field="place"):
        vm.vcpus.invept(0, 1, 0, place="ring 0")
    with refused(vm, InvalidValue, field="cpl"):
        vm.vcpus.invvpid(0, 1, 0, 0, cpl=4)
    with refused(vm, InvalidValue, field="linear_address"):
        vm.vcpus.invvpid(0, 1, 0, 1 << 64)


# ---- the translation cache


def write(vm: VirtualMachine, gpa: int, vcpu: int = 0) -> tuple[bool, list[bool]]:
    """(allowed, stale of each exit record) of one write."""
    result = vm.access(AccessRequest(gpa, vcpu=vcpu))
    return result.allowed, [bool(stale) for stale in result.exits.column("stale")]


def test_no_cache_has_no_entries() -> None:
    vm = machine()
    write(vm, 0x2000)
    assert vm.vcpus.tlb(0) == []


@pytest.mark.parametrize("profile", PROFILES)
def test_entries_of_a_cache(profile: str) -> None:
    vm = modelled(0, 5, profile=profile)
    protect(vm, "p", (0x2080, 128))
    write(vm, 0x3000, vcpu=5)
    write(vm, 0x2000, vcpu=5)
    assert vm.vcpus.tlb(0) == []
    guarded, plain = vm.vcpus.tlb(5)
    assert (guarded.kind, guarded.address, guarded.gpa) == ("physical", 0x2000, 0x2000)
    assert guarded.readable and not guarded.writable and guarded.leaf & bits.SPP and guarded.ept_level == 1
    assert guarded.spp_vector is not None and not guarded.spp_vector & 4 and guarded.spp_vector & 1
    assert plain.writable and plain.spp_vector is None and plain.address == 0x3000
    assert plain.ept_root == vm.vcpus.vmcs(5)["eptp"] & bits.ADDRESS and plain.vpid is None and plain.pcid is None
    assert not plain.is_global and plain.nested == 0 and plain.page_bits == 12


def test_a_forgotten_flush_is_seen() -> None:
    vm = modelled()
    assert write(vm, 0x2000)[0]
    store_leaf(vm, 2, lambda entry: entry & ~bits.WRITE)
    assert write(vm, 0x2000) == (True, [True])
    assert vm.counters()["stale_accesses"] == 1
    assert vm.vcpus.invept(0, 1, vm.vcpus.vmcs(0)["eptp"]) == SUCCEEDED
    assert vm.vcpus.tlb(0) == []
    assert not any(write(vm, 0x2000)[1])
    assert vm.counters()["stale_accesses"] == 1


def test_invept_is_about_one_root_and_one_processor() -> None:
    vm = modelled(0, 1)
    for vcpu in (0, 1):
        write(vm, 0x2000, vcpu=vcpu)
    vm.vcpus.invept(0, 1, ABSENT | 0x1E)
    assert len(vm.vcpus.tlb(0)) == 1
    vm.vcpus.invept(0, 2, 0)
    assert vm.vcpus.tlb(0) == [] and len(vm.vcpus.tlb(1)) == 1
    # INVVPID leaves physical entries alone.
    vm.vcpus.invvpid(1, 2, 0, 0)
    assert len(vm.vcpus.tlb(1)) == 1


LINEAR = 0xFFFF_8880_0000_2000


def plant(vm: VirtualMachine, kind: int, linear: int, *, vpid: int, pcid: int = 0, flags: int = 0) -> None:
    """Leave an entry from a linear address in the cache of vCPU 0."""

    def change(m: frames.Machine) -> None:
        free = next(row for row in range(1, len(m.tlb)) if not tlb.live(m, row))
        m.tlb[free] = 0
        m.tlb[free, tlb.E_GENERATION] = m.tlb[0, tlb.GENERATION]
        m.tlb[free, tlb.E_KIND] = kind
        m.tlb[free, tlb.E_SPACE] = vpid | pcid << tlb.PCID_SHIFT
        m.tlb[free, tlb.E_PAGE] = (linear - (1 << 64) if linear >> 63 else linear) >> 12
        m.tlb[free, tlb.E_FRAME] = 7
        m.tlb[free, tlb.E_FACTS] = 12 << tlb.GUEST_SIZE_AT | flags

    edit(vm, change)


@pytest.mark.parametrize(
    ("kind", "descriptor", "linear", "left"),
    [
        (0, 1, LINEAR, 3),
        (0, 1, LINEAR + 0x1000, 4),
        (0, 2, LINEAR, 3),
        (1, 1, 0, 2),
        (2, 0, 0, 0),
        (3, 1, 0, 3),
        (1, 9, 0, 4),
    ],
)
def test_invvpid_removes(kind: int, descriptor: int, linear: int, left: int) -> None:
    vm = modelled()
    plant(vm, int(tlb.COMBINED), LINEAR, vpid=1, pcid=5)
    plant(vm, int(tlb.LINEAR), 0x40_0000, vpid=1, flags=int(tlb.GUEST_GLOBAL))
    plant(vm, int(tlb.COMBINED), LINEAR, vpid=2)
    plant(vm, int(tlb.COMBINED), 0x50_0000, vpid=2)
    assert [(e.kind, e.address, e.vpid, e.pcid, e.is_global) for e in vm.vcpus.tlb(0)] == [
        ("combined", 0x50_0000, 2, 0, False),
        ("combined", LINEAR, 1, 5, False),
        ("combined", LINEAR, 2, 0, False),
        ("linear", 0x40_0000, 1, 0, True),
    ]
    assert vm.vcpus.tlb(0)[-1].ept_root is None
    assert vm.vcpus.invvpid(0, kind, descriptor, linear) == SUCCEEDED
    assert len(vm.vcpus.tlb(0)) == left


def test_entry_without_vpids_forgets_linear_addresses() -> None:
    vm = modelled()
    plant(vm, int(tlb.COMBINED), LINEAR, vpid=0)
    vm.vcpus.set_vmcs(0, {"sppt_pointer": 1})
    vm.vcpus.vm_entry(0)
    assert len(vm.vcpus.tlb(0)) == 1
    vm.vcpus.set_vmcs(0, {"sppt_pointer": 0})
    vm.vcpus.vm_entry(0)
    assert len(vm.vcpus.tlb(0)) == 1
    controls = vm.vcpus.vmcs(0)["secondary_controls"] & ~ctl.SECONDARY_VPID
    vm.vcpus.set_vmcs(0, {"secondary_controls": controls})
    assert vm.vcpus.vm_entry(0) == SUCCEEDED
    assert vm.vcpus.tlb(0) == []


@pytest.mark.parametrize("profile", PROFILES)
def test_the_hypervisor_flushes_by_itself(profile: str) -> None:
    vm = modelled(0, 1, profile=profile)
    protect(vm, "p", (0x2080, 128), (0x6080, 128))

    def sweep(expected: bool) -> None:
        for vcpu in (0, 1):
            for gpa in (0x2000, 0x4000):
                allowed, stale = write(vm, gpa, vcpu)
                assert allowed is expected and not any(stale)

    sweep(True)
    set_map(vm, 5, 0)  # never touched: in the later profile the whole region misses from now on
    sweep(True)
    write(vm, 0x6000)  # a first touch that arms
    sweep(True)
    set_map(vm, 2, 0)
    set_map(vm, 4, 0)
    sweep(False)
    set_map(vm, 2, 0xFFFF_FFFF)
    set_map(vm, 4, 0xFFFF_FFFF)
    sweep(True)
    vm.unprotect("p")
    sweep(True)
    assert vm.access(AccessRequest(0x2000, access=READ)).allowed
    assert vm.counters()["stale_accesses"] == 0


# ---- MSRs


def test_msrs() -> None:
    vm = machine(host=HostConfig(vmx_capabilities={"procbased_ctls3": 0xE}))
    found = {msr.index: (msr.name, msr.value) for msr in vm.vcpus.msrs(0)}
    assert found[0x48C] == ("IA32_VMX_EPT_VPID_CAP", EPT_VPID_CAP)
    assert found[0x48B][1] >> 55 & 1 and found[0x48B][0] == "IA32_VMX_PROCBASED_CTLS2"
    assert found[0x492] == ("IA32_VMX_PROCBASED_CTLS3", 0xE)
    lacking = machine(spp=False, host=HostConfig(spp=False)).vcpus.msrs(0)
    assert not next(msr.value for msr in lacking if msr.index == 0x48B) >> 55 & 1
