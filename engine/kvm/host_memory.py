"""Host memory events: what the host does to the memory behind a guest, and what KVM makes of it (kvm-spp 5).

Maps stay whatever happens, and vectors do but for those that ``shrink`` frees: the next access faults, and what it
needs is made anew. A host page of 2 MBytes or 1 GByte that is to be moved or shared in part is split first.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

import numpy as np

from engine.config import VmConfig, choices
from engine.cpu import fastpath
from engine.cpu.ept import TRAIL_ROWS
from engine.cpu.frames import EPT, SPPT, Machine, ample
from engine.cpu.physical import find_slot
from engine.errors import InvalidValue
from engine.jit import kernel
from engine.kvm import ept_tables, host_state, mapping, regions, sppt_tables
from engine.kvm.slots import check_pages
from engine.store import Draft

# In the order of their numbers. The first three do nothing where nothing is mapped.
EVENTS = (
    "unmap",
    "write-protect",
    "age",
    "zap",
    "shrink",
    "split",
    "collapse",
    "migrate",
    "remap-read-only",
    "remap-writable",
)
(UNMAP, WRITE_PROTECT, AGE, ZAP, SHRINK, SPLIT, COLLAPSE, MIGRATE, READ_ONLY, WRITABLE) = range(len(EVENTS))

# Those that may be about all of guest memory.
WHOLE = ("zap", "shrink")

MAX_PAGES = 1 << 20
REGION = 512
NOTHING = np.int64(0)


@kernel
def change_page(m, event, gfn, trail):
    """One page's part in an event; returns whether a leaf changed."""
    if event == WRITE_PROTECT:
        return mapping.write_protect(m, gfn, trail)
    if event == AGE:
        return mapping.age(m, gfn, trail)
    if event < MIGRATE:
        return mapping.unmap_page(m, gfn, trail)
    changed = make_small(m, gfn, trail)
    if event == READ_ONLY:
        host_state.renew(m, gfn, host_state.READ_ONLY)
        return mapping.make_read_only(m, gfn, trail) or changed
    host_state.renew(m, gfn, NOTHING)
    return mapping.unmap_page(m, gfn, trail) or changed


@kernel
def make_small(m, gfn, trail):
    """Split the host page of a page if it is a larger one; returns whether a leaf went."""
    slot = find_slot(m, gfn)
    level = host_state.level_of(m, gfn, slot)
    if level == 1:
        return False
    regions.mark(m, gfn, 2, regions.SPLIT)
    if level == 3:
        regions.mark(m, gfn, 3, regions.SPLIT)
    return mapping.unmap_page(m, gfn, trail)


@kernel
def make_large(m, gfn, trail):
    """Put a 2-MByte region that is in one slot in one host page; returns whether leaves went."""
    slot = find_slot(m, gfn)
    if host_state.level_of(m, gfn, slot) > 1 or not host_state.fits(m, gfn, slot, 2):
        return False
    regions.mark(m, gfn, 2, regions.COLLAPSED)
    first = gfn & ~(REGION - 1)
    changed = False
    for page in range(first, first + REGION):
        host_state.forget(m, page)
        changed = mapping.unmap_page(m, page, trail) or changed
    return changed


@kernel
def change_region(m, event, first, end, trail):
    """A 2-MByte region's part in an event, for its pages from ``first`` to ``end``; returns how many leaves changed."""
    if event <= AGE and mapping.nothing_mapped(m, first, trail):
        return 0
    if event == SPLIT:
        return 1 if make_small(m, first, trail) else 0
    if event == COLLAPSE:
        return 1 if make_large(m, first, trail) else 0
    if event == SHRINK:
        first &= ~(REGION - 1)
        end = first + REGION
    changed = 0
    for page in range(first, end):
        changed += 1 if change_page(m, event, page, trail) else 0
    if event in (ZAP, SHRINK):
        ept_tables.release(m, first)
    if event == SHRINK:
        sppt_tables.free_region(m, first)
        mapping.flush(m)
    return changed


@kernel
def change_range(m, event, gfn, pages, start, changed, trail):
    """An event on a range of pages, from page ``start`` on; all of them have slots.

    Adds the leaves that changed to ``changed`` (int64[1]); returns how many pages are done, less than all when frames
    ran out.
    """
    at = gfn + start
    end = gfn + pages
    while at < end:
        if not ample(m):
            return at - gfn
        stop = min(end, (at | (REGION - 1)) + 1)
        changed[0] += change_region(m, event, at, stop, trail)
        at = stop
    return pages


@kernel
def change_everything(m, event):
    """Drop all of KVM's EPT, and for ``shrink`` its SPPTs; the roots stay."""
    ept_tables.free_all(m)
    if event == SHRINK:
        sppt_tables.free_all(m)
    fastpath.forget_all(m)
    mapping.flush(m)


@dataclass(frozen=True, slots=True)
class HostEvent:
    """What an event did: ``leaves`` is how many leaf entries changed, None where all went; ``frames`` were freed."""

    event: str
    gfn: int | None
    npages: int | None
    leaves: int | None
    frames: int


class HostMemoryOperations:
    """Host memory events of one machine; ``change`` begins a change of it."""

    def __init__(self, config: VmConfig, change: Callable[[], AbstractContextManager[Draft]]) -> None:
        self._config = config
        self._change = change

    def event(self, name: str, gfn: int | None = None, npages: int | None = None) -> HostEvent:
        """Let an event of ``EVENTS`` happen to ``npages`` pages from ``gfn``, one page unless told.

        ``zap`` and ``shrink`` without a GFN are about everything. ``split``, ``collapse`` and ``shrink`` work on the
        whole 2-MByte regions that the range touches. Raises InvalidValue for an unknown event, a missing GFN, and pages
        without a memory slot.
        """
        choices(name, EVENTS, "event")
        if gfn is None and (name not in WHOLE or npages is not None):
            raise InvalidValue("must be given: the event is about pages, and gfn is the first", field="gfn", value=None)
        with self._change() as draft:
            before = _tables(draft.machine)
            leaves = None
            if gfn is None:
                change_everything(draft.machine, EVENTS.index(name))
            else:
                npages = 1 if npages is None else npages
                self._check(draft.machine, gfn, npages)
                leaves = _run(draft, EVENTS.index(name), gfn, npages)
            return HostEvent(name, gfn, npages, leaves, before - _tables(draft.machine))

    def _check(self, machine: Machine, gfn: int, npages: int) -> None:
        if not 1 <= npages <= MAX_PAGES:
            raise InvalidValue(f"npages is 1 to {MAX_PAGES}", field="npages", value=npages)
        check_pages(machine, self._config.maxphyaddr, gfn, npages, "gfn")


def _run(draft: Draft, event: int, gfn: int, npages: int) -> int:
    trail = np.zeros((TRAIL_ROWS, 4), dtype=np.int64)
    changed = np.zeros(1, dtype=np.int64)
    done = 0
    while done < npages:
        draft.ensure()
        done = int(change_range(draft.machine, np.int64(event), gfn, npages, done, changed, trail))
    return int(changed[0])


def _tables(machine: Machine) -> int:
    """Frames of EPT and SPPT tables."""
    return int(np.count_nonzero(machine.kind == EPT) + np.count_nonzero(machine.kind == SPPT))
