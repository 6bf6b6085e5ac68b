"""Which vectors a miss fills and a SET takes back, and that the vectors decide."""

from __future__ import annotations

import numpy as np

from engine.kvm import sppt_tables
from engine.trace.single import AccessRequest
from tests.engine.builders import READ, edit, machine, replay, resolutions, set_map, vector


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
