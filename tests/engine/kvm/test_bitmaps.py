"""The layers of sub-page access, and the tree that keeps a word for each page."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest

from engine.cpu import frames, radix
from engine.errors import InvalidValue, LimitExceeded
from engine.kvm import bitmaps, protections, spp_set, sppt_roots
from engine.kvm import state_frame as reg
from engine.kvm.protections import ProtectedObject, ProtectedPages, Protection
from tests.engine.builders import FULL, bare_draft, machine, maps, new_trail, protect, replay, set_map, unchanged

# ---- the tree

FAR_APART = (0, 1, 511, 512, 1 << 18, 1 << 27, 1 << 36, (1 << 40) - 1)


@pytest.mark.parametrize("root", [reg.ROOT_POLICY, reg.ROOT_GRANTED, reg.ROOT_MEMORY])
def test_tree_keeps_the_word_of_each_page(root: int) -> None:
    m = bare_draft().machine
    for position, gfn in enumerate(FAR_APART):
        radix.write(m, root, np.int64(gfn), np.int64(position + 1))
    assert [int(radix.read(m, root, np.int64(gfn))) for gfn in FAR_APART] == list(range(1, 9))
    assert int(radix.read(m, root, np.int64(2))) == 0


def test_trees_are_apart() -> None:
    m = bare_draft().machine
    radix.write(m, reg.ROOT_POLICY, np.int64(5), np.int64(1))
    assert int(radix.read(m, reg.ROOT_GRANTED, np.int64(5))) == 0


def test_saying_nothing_costs_nothing() -> None:
    m = bare_draft().machine
    before = int(m.top[frames.TOP_FREE])
    radix.write(m, reg.ROOT_POLICY, np.int64(5), np.int64(0))
    assert int(m.top[frames.TOP_FREE]) == before
    assert int(radix.leaf_of(m, reg.ROOT_POLICY, np.int64(5))) == 0
    radix.write(m, reg.ROOT_POLICY, np.int64(5), np.int64(1))
    assert int(m.top[frames.TOP_FREE]) == before - radix.TREE_LEVELS
    radix.write(m, reg.ROOT_POLICY, np.int64(511), np.int64(1))
    assert int(m.top[frames.TOP_FREE]) == before - radix.TREE_LEVELS, "a neighbour shares the node"
    assert int(radix.leaf_of(m, reg.ROOT_POLICY, np.int64(6))) != 0


def test_word_can_be_taken_back() -> None:
    m = bare_draft().machine
    radix.write(m, reg.ROOT_POLICY, np.int64(5), np.int64(-1))
    radix.write(m, reg.ROOT_POLICY, np.int64(5), np.int64(0))
    assert int(radix.read(m, reg.ROOT_POLICY, np.int64(5))) == 0


# ---- effective = SET and (not protected or granted)


def store_layers(m: frames.Machine, gfn: np.int64, denied: int, covered: int, lifted: int) -> None:
    bitmaps.store(m, gfn, bitmaps.of_page(m, gfn), np.int64(denied), np.int64(covered), np.int64(lifted))


def test_effective_for_every_combination() -> None:
    m = bare_draft().machine
    combinations = list(itertools.product((0, 1), repeat=3))
    allowed, covered, lifted = (sum(row[i] << s for s, row in enumerate(combinations)) for i in range(3))
    store_layers(m, np.int64(9), ~allowed & 0xFF, covered, lifted)
    wanted = sum((a and (not p or g)) << s for s, (a, p, g) in enumerate(combinations))
    assert int(bitmaps.effective(m, np.int64(9))) == FULL & ~0xFF | wanted


@pytest.mark.parametrize(
    ("denied", "covered", "lifted", "effective"),
    [
        (0, 0, 0, FULL),
        (FULL, 0, 0, 0),
        (0, FULL, 0, 0),
        (0, FULL, FULL, FULL),
        (FULL, FULL, FULL, 0),
        (0x8000_0000, 0x8000_0000, 0, 0x7FFF_FFFF),
        (0x8000_0000, 1, 1, 0x7FFF_FFFF),
        (0, 0x8000_0001, 1, 0x7FFF_FFFF),
    ],
)
def test_effective_of_whole_words(denied: int, covered: int, lifted: int, effective: int) -> None:
    m = bare_draft().machine
    gfn = np.int64(77)
    store_layers(m, gfn, denied, covered, lifted)
    assert int(bitmaps.effective(m, gfn)) == effective
    assert (int(bitmaps.denied_by_set(m, gfn)), int(bitmaps.protected(m, gfn))) == (denied, covered)
    assert int(bitmaps.granted(m, gfn)) == lifted
    out = np.zeros(1, dtype=np.uint32)
    for layer, word in enumerate((effective, ~denied & FULL, covered, lifted)):
        bitmaps.read_maps(m, 77, layer, out)
        assert int(out[0]) == word, bitmaps.LAYER_NAMES[layer]


def test_new_page_has_full_access_in_every_layer() -> None:
    vm = machine()
    assert [maps(vm, 7, layer=layer) for layer in bitmaps.LAYER_NAMES] == [[FULL], [FULL], [0], [0]]


# ---- lives of the layers, on a machine


def test_set_never_lifts_a_protection_and_a_protection_never_lifts_a_set() -> None:
    vm = machine()
    set_map(vm, 1, 0xFFFF_FFF0)
    protect(vm, "p", (0x1000, 0x100))
    assert maps(vm, 1) == [0xFFFF_FFF0]
    set_map(vm, 1, FULL)
    assert maps(vm, 1) == [0xFFFF_FFFC]
    set_map(vm, 1, 0xFFFF_FFF0)
    vm.unprotect("p")
    assert maps(vm, 1) == [0xFFFF_FFF0]
    assert maps(vm, 1, layer="protected") == [0]


def test_grant_opens_what_was_refused_and_nothing_else() -> None:
    vm = machine()
    protect(vm, "p", (0x1000, 0x200))
    set_map(vm, 1, 0xFFFF_FFF0)
    result = replay(vm, [0x1000 + 0x7C], on_violation="grant")
    assert result.violations == 1
    assert maps(vm, 1, layer="granted") == [3]
    assert maps(vm, 1, layer="set") == [0xFFFF_FFF3], "a grant also lifts what SET denied"
    assert maps(vm, 1) == [0xFFFF_FFF3]
    assert replay(vm, [0x1000, 0x1080]).violations == 0
    assert replay(vm, [0x1100]).violations == 1


def test_grant_ends_with_a_set_of_the_page() -> None:
    vm = machine()
    protect(vm, "p", (0x1000, 0x80))
    replay(vm, [0x1000], on_violation="grant")
    assert maps(vm, 1) == [FULL]
    set_map(vm, 1, FULL)
    assert maps(vm, 1, layer="granted") == [0]
    assert maps(vm, 1) == [0xFFFF_FFFE]


def test_grant_ends_with_the_protection() -> None:
    vm = machine()
    protect(vm, "p", (0x1000, 0x80))
    replay(vm, [0x1000], on_violation="grant")
    vm.unprotect("p")
    protect(vm, "p", (0x1000, 0x80))
    assert maps(vm, 1, layer="granted") == [0]
    assert replay(vm, [0x1000]).violations == 1


def test_grant_stays_while_another_protection_covers_the_sub_page() -> None:
    vm = machine()
    protect(vm, "first", (0x1000, 0x80))
    protect(vm, "second", (0x1000, 0x100))
    replay(vm, [0x1000], on_violation="grant")
    vm.unprotect("first")
    assert maps(vm, 1, layer="granted") == [1]
    vm.unprotect("second")
    assert maps(vm, 1, layer="granted") == [0]


def test_sub_page_stays_covered_until_the_last_protection_goes() -> None:
    vm = machine()
    protect(vm, "a", (0x1000, 0x100))
    protect(vm, "b", (0x1080, 0x100))
    assert maps(vm, 1, layer="protected") == [0b111]
    vm.unprotect("a")
    assert maps(vm, 1, layer="protected") == [0b110]
    vm.unprotect("b")
    assert maps(vm, 1, layer="protected") == [0]


# ---- objects are rounded outward to sub-pages

COVER = [
    ("one byte", [(0x1000, 1)], {1: 1}),
    ("last byte of a sub-page", [(0x107F, 1)], {1: 1}),
    ("two bytes over an end", [(0x107F, 2)], {1: 3}),
    ("whole page", [(0x1000, 0x1000)], {1: FULL}),
    ("over a page end", [(0x1FFF, 2)], {1: 1 << 31, 2: 1}),
    ("three pages", [(0x1F80, 0x1100)], {1: 1 << 31, 2: FULL, 3: 1}),
    ("two objects of one page", [(0x1000, 1), (0x1F80, 1)], {1: 1 << 31 | 1}),
    ("overlapping", [(0x1000, 0x100), (0x1080, 0x100)], {1: 7}),
    ("two pages apart", [(0x9000, 1), (0x1000, 1)], {1: 1, 9: 1}),
]


@pytest.mark.parametrize(("ranges", "wanted"), [row[1:] for row in COVER], ids=[row[0] for row in COVER])
def test_pages_and_masks_of_objects(ranges: list[tuple[int, int]], wanted: dict[int, int]) -> None:
    objects = tuple(ProtectedObject(f"o{i}", gpa, size) for i, (gpa, size) in enumerate(ranges))
    gfns, masks = protections.page_masks(objects)
    assert dict(zip(gfns.tolist(), masks.tolist(), strict=True)) == wanted
    protection = Protection("p", objects)
    assert protection.pages == len(wanted)
    assert protection.subpages == sum(mask.bit_count() for mask in wanted.values())
    asked = np.array([0, *sorted(wanted), 99])
    assert protections.masks_at(asked, objects).tolist() == [0, *(wanted[gfn] for gfn in sorted(wanted)), 0]


def test_no_objects_cover_nothing() -> None:
    gfns, masks = protections.page_masks([])
    assert (len(gfns), len(masks)) == (0, 0)
    assert protections.masks_at(np.array([1, 2]), []).tolist() == [0, 0]
    assert protections.covered_subpages([]) == 0


def test_kernels_stop_where_frames_run_out_and_go_on_from_there() -> None:
    draft = bare_draft()
    gfns = np.arange(4, dtype=np.int64) << 20
    masks = np.full(4, 1, dtype=np.int64)
    m = draft.machine
    m.top[frames.TOP_FREE] = frames.RESERVE + 2
    assert spp_set.cover(m, gfns, masks, 0, new_trail()) == 1, "one page takes five frames"
    draft.ensure()
    assert spp_set.cover(draft.machine, gfns, masks, 1, new_trail()) == 4
    m = draft.machine
    assert all(int(bitmaps.protected(m, gfn)) == 1 for gfn in gfns)
    access = np.zeros(2, dtype=np.uint32)
    m.top[frames.TOP_FREE] = frames.RESERVE - 1
    assert spp_set.set_maps(m, 5 << 20, access, 0, new_trail()) == 0
    draft.ensure()
    assert spp_set.set_maps(draft.machine, 5 << 20, access, 0, new_trail()) == 2


def test_enabling_twice_makes_one_root() -> None:
    m = bare_draft().machine
    assert sppt_roots.enable(m)
    root = int(sppt_roots.root_frame(m, 0))
    assert not sppt_roots.enable(m)
    assert int(sppt_roots.root_frame(m, 0)) == root


def test_objects_of_whole_pages_and_pages_without_a_name() -> None:
    objects = (ProtectedObject("whole", 0x1FF0, 0x20, "page"), ProtectedObject("byte", 0x5000, 1))
    ranges = (ProtectedPages(5, 2, 0xFFFFFFF1), ProtectedPages(9, 1, FULL))
    gfns, masks = protections.page_masks(objects, ranges)
    assert dict(zip(gfns.tolist(), masks.tolist(), strict=True)) == {1: FULL, 2: FULL, 5: 0xF, 6: 0xE}
    protection = Protection("p", objects, ranges)
    assert (protection.pages, protection.subpages, protection.extent) == (4, 71, 6)
    assert protection.end == 10 << 12 and Protection("p", objects).end == 0x5080
    assert protections.masks_at(gfns[:3], objects[1:], ranges).tolist() == [0, 0, 0xF]


@pytest.mark.parametrize(
    ("item", "field"),
    [
        (ProtectedPages(1, 0, 0), "pages[0][1]"),
        (ProtectedPages((1 << 34) - 1, 2, 0), "pages[0][0]"),
        (ProtectedPages(1, 1, 1 << 32), "pages[0][2]"),
        (ProtectedPages(1 << 20, 1, 0), "pages[0][0]"),
        (ProtectedObject("o", 0x1000, 8, "byte"), "objects[0].granularity"),
    ],
)
def test_pages_that_are_refused(item: Any, field: str) -> None:
    vm = machine()
    of_pages = isinstance(item, ProtectedPages)
    with unchanged(vm), pytest.raises(InvalidValue) as caught:
        vm.protect("p", [] if of_pages else [item], [item] if of_pages else [])
    assert caught.value.field == field


def test_a_protection_without_anything_is_refused() -> None:
    vm = machine()
    with unchanged(vm), pytest.raises(InvalidValue, match="an object or a range"):
        vm.protect("p", [])


def test_pages_stay_covered_until_the_last_one_goes() -> None:
    vm = machine()
    vm.protect("pages", [], [ProtectedPages(2, 1, 0xFFFFFFF0)])
    vm.protect("object", [ProtectedObject("o", 0x2000, 0x80)])
    assert maps(vm, 2, 1, "protected") == [0xF] and maps(vm, 2, 1, "set") == [FULL]
    vm.unprotect("pages")
    assert maps(vm, 2, 1, "protected") == [1]
    vm.unprotect("object")
    assert maps(vm, 2, 1, "effective") == [FULL]


def test_too_many_pages_of_a_range_are_refused_before_any_is_looked_at() -> None:
    vm = machine()
    with unchanged(vm), pytest.raises(LimitExceeded) as caught:
        vm.protect("p", [], [ProtectedPages(0, 1 << 30, 0)])
    assert caught.value.field == "pages"
