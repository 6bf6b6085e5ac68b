"""What deleting and moving a memory slot does to what hangs on its pages (kvm-spp 2.4).

SET maps, grants and contents follow the slot: they die with it and move by offset when it moves. Protections are by
GPA and stay. Mappings and what is known of the host's pages are dropped; the next touch makes new ones.
"""

import numpy as np

from engine.cpu import radix
from engine.cpu.frames import ample
from engine.cpu.guest_memory import ROOT_MEMORY
from engine.errors import InvalidValue
from engine.jit import kernel
from engine.kvm import bitmaps, dirty_marking, host_frames, kvmi_rights, mapping, page_contents, regions
from engine.kvm.slots import SlotSpec
from engine.kvm.state_frame import ROOT_GRANTED, ROOT_HOST, ROOT_POLICY

REGION = 512
NOTHING = np.int64(0)

# Columns of a moved page
PAGE_OFFSET = 0
PAGE_DENIED = 1
PAGE_GRANTED = 2
PAGE_CONTENT = 3
PAGE_WRITTEN = 4
PAGE_LOGGED = 5
PAGE_RIGHTS = 6
PAGE_WORDS = 7


def check_change(known: SlotSpec, spec: SlotSpec) -> None:
    """Refuse what a slot keeps for life. Moving and logging are all that may change."""
    fixed = (
        ("size", known.size, spec.size, "its size"),
        ("read_only", known.read_only, spec.read_only, "its read_only flag"),
        ("userspace_addr", known.userspace_addr, spec.userspace_addr, "its host address"),
        ("host_page_size", known.host_page_size, spec.host_page_size, "its host page size"),
        ("backing", _place(known), _place(spec), "the file behind it"),
    )
    for field, before, now, what in fixed:
        if before != now:
            raise InvalidValue(f"a slot keeps {what}; delete it first", field=field, value=now)


def _place(spec: SlotSpec) -> str | None:
    """Where the bytes of a slot are."""
    return f"{spec.backing.path} at {spec.backing.offset:#x}" if spec.backing is not None else None


@kernel
def region_is_empty(m, gfn, trail):
    """Whether nothing was ever said or mapped in the 2-MByte region of a page."""
    if radix.leaf_of(m, ROOT_POLICY, gfn) or radix.leaf_of(m, ROOT_MEMORY, gfn) or radix.leaf_of(m, ROOT_GRANTED, gfn):
        return False
    if radix.leaf_of(m, ROOT_HOST, gfn) or regions.word(m, gfn, 2):
        return False
    if dirty_marking.anything_noted(m, gfn) or kvmi_rights.restricted(m, gfn, 2):
        return False
    return mapping.nothing_mapped(m, gfn, trail)


@kernel
def drop_pages(m, gfn, pages, start, trail):
    """Drop mappings, SET maps, grants and contents of a range from page ``start``.

    Returns how many pages are done, less than all when frames ran out.
    """
    at = gfn + start
    end = gfn + pages
    while at < end:
        if not ample(m):
            return at - gfn
        stop = min(end, (at | (REGION - 1)) + 1)
        if region_is_empty(m, at, trail):
            at = stop
            continue
        while at < stop:
            mapping.unmap_page(m, at, trail)
            bitmaps.store_set(m, at, dirty_marking.EVERYTHING)
            page_contents.drop_page(m, at)
            dirty_marking.forget_page(m, at)
            kvmi_rights.store(m, at, NOTHING)
            host_frames.forget(m, at)
            at += 1
        mapping.drop_region(m, stop - 1)
    return pages


@kernel
def lift_pages(m, gfn, pages, out, trail):
    """Collect what moves with a slot into ``out`` (int64[n, PAGE_WORDS]); returns how many pages have something.

    Only the first ``len(out)`` are stored. Changes nothing.
    """
    found = 0
    at = gfn
    end = gfn + pages
    while at < end:
        stop = min(end, (at | (REGION - 1)) + 1)
        if region_is_empty(m, at, trail):
            at = stop
            continue
        while at < stop:
            denied, _, lifted = bitmaps.of_page(m, at)
            content = radix.read(m, ROOT_MEMORY, at)
            written = dirty_marking.written(m, at)
            logged = dirty_marking.logged(m, at)
            rights = kvmi_rights.read(m, at)
            if denied or lifted or content or written or logged or rights:
                if found < out.shape[0]:
                    out[found, PAGE_OFFSET] = at - gfn
                    out[found, PAGE_DENIED] = denied
                    out[found, PAGE_GRANTED] = lifted
                    out[found, PAGE_CONTENT] = content
                    out[found, PAGE_WRITTEN] = written
                    out[found, PAGE_LOGGED] = logged
                    out[found, PAGE_RIGHTS] = rights
                found += 1
            at += 1
    return found


@kernel
def store_contents(m, gfn, moved, start):
    """Put the contents of collected pages into the tree, or take them out where a row has none.

    Begins at position ``start``; returns how many are done, less than all when frames ran out.
    """
    for i in range(start, moved.shape[0]):
        if not ample(m):
            return i
        radix.write(m, ROOT_MEMORY, gfn + moved[i, PAGE_OFFSET], moved[i, PAGE_CONTENT])
    return moved.shape[0]


@kernel
def place_pages(m, gfn, moved, start):
    """Put collected pages at a slot's new place from position ``start``; returns how many are done."""
    for i in range(start, moved.shape[0]):
        if not ample(m):
            return i
        at = gfn + moved[i, PAGE_OFFSET]
        before = bitmaps.of_page(m, at)
        bitmaps.store(m, at, before, moved[i, PAGE_DENIED], before[1], moved[i, PAGE_GRANTED] & before[1])
        radix.write(m, ROOT_MEMORY, at, moved[i, PAGE_CONTENT])
        if dirty_marking.mode(m):
            dirty_marking.store_written(m, at, moved[i, PAGE_WRITTEN])
            dirty_marking.store_logged(m, at, moved[i, PAGE_LOGGED])
        kvmi_rights.store(m, at, moved[i, PAGE_RIGHTS])
    return moved.shape[0]
