"""Rules of the hypervisor that no other test notices when they are broken."""

from __future__ import annotations

import numpy as np
import pytest

from engine.arch import controls as ctl
from engine.arch import ept as bits
from engine.cpu import frames
from engine.errors import TraceError
from engine.kvm import sppt_tables
from engine.trace.single import AccessRequest
from tests.engine.builders import READ, WRITE, edit, leaf, machine, replay, resolutions, set_map, store_leaf, vector


def test_full_log_is_emptied_and_the_access_goes_on() -> None:
    vm = machine()
    vm.access(AccessRequest(0x5000))
    store_leaf(vm, 5, lambda entry: entry & ~bits.DIRTY)

    def log(m: frames.Machine) -> None:
        table = frames.address_of(m, frames.new_frame(m, frames.CLIENT))
        secondary = frames.read_word(m, frames.FIRST_VCPU_FRAME, ctl.V_SECONDARY) | ctl.SECONDARY_PML
        for word, value in ((ctl.V_PML_ADDRESS, table), (ctl.V_SECONDARY, secondary), (ctl.V_PML_INDEX, 0xFFFF)):
            frames.write_word(m, frames.FIRST_VCPU_FRAME, word, np.int64(value))

    edit(vm, log)
    assert resolutions(vm.access(AccessRequest(0x5000))) == ["log-emptied"]
    m = vm.state.current.snapshot.machine
    assert frames.read_word(m, frames.FIRST_VCPU_FRAME, ctl.V_PML_INDEX) == 510
    table = frames.read_word(m, frames.FIRST_VCPU_FRAME, ctl.V_PML_ADDRESS)
    assert frames.read_entry(m, table, 511) == 0x5000


def test_write_after_a_read_sets_the_dirty_flag() -> None:
    vm = machine()
    vm.access(AccessRequest(0x5000))
    store_leaf(vm, 5, lambda entry: entry & ~bits.DIRTY)
    replay(vm, [(0x5000, 8, READ), (0x5000, 8, WRITE)])
    entry = leaf(vm, 5)
    assert entry is not None and entry & bits.DIRTY


def test_second_page_counts_for_page_granularity() -> None:
    vm = machine()
    set_map(vm, 6, 0xFFFF_FFDF)
    result = replay(vm, [0x5FFC])
    assert (result.violations, result.page_granular_violations) == (0, 1)


def test_vcpu_id_between_two_others_is_refused() -> None:
    vm = machine(vcpus=(0, 2))
    with pytest.raises(TraceError) as caught:
        replay(vm, [(0x5000, 8, WRITE, 1)])
    assert caught.value.field == "vcpu"


def test_two_pages_of_one_region_have_vectors_of_their_own() -> None:
    vm = machine()
    for gfn, mask in ((5, 0xF), (5 + 256, 0x30)):
        set_map(vm, gfn, mask)
        vm.access(AccessRequest(gfn << 12))
    assert (vector(vm, 5), vector(vm, 5 + 256)) == (0x55, 0x500)


def test_set_makes_its_own_region_miss_and_no_other() -> None:
    vm = machine("kvm-latest")
    near, far = 5, 5 + 512
    for gfn in (near, far):
        set_map(vm, gfn, 0xF)
        assert resolutions(vm.access(AccessRequest(gfn << 12))) == ["armed", "sppt-filled"]
    set_map(vm, near, 0x7)
    assert resolutions(vm.access(AccessRequest(far << 12))) == []
    assert resolutions(vm.access(AccessRequest(near << 12))) == ["armed", "sppt-filled"]


def test_miss_fills_the_pages_below_too() -> None:
    vm = machine("kvm-latest")
    for gfn in (5, 9):
        set_map(vm, gfn, 0xF)
        vm.access(AccessRequest(gfn << 12, access=READ))
    assert resolutions(vm.access(AccessRequest(9 << 12))) == ["sppt-filled"]
    assert resolutions(vm.access(AccessRequest(5 << 12))) == []


def test_vector_decides_where_the_map_allows_more() -> None:
    vm = machine()
    set_map(vm, 5, 0xF)
    vm.access(AccessRequest(0x5000))
    edit(vm, lambda m: sppt_tables.fill_vectors(m, np.int64(5), np.int64(1)))
    assert replay(vm, [0x5000, 0x5080, 0x5000]).violations == 1
