"""Reading the dirty logs: what was written is taken, and the pages are watched again (KVM_GET_DIRTY_LOG; kvm-spp 5).

Each kernel goes on from a page and returns the page it has not reached, less than the end when frames ran out.
"""

import numpy as np

from engine.arch import controls as ctl
from engine.arch import ept as bits
from engine.arch.sppt import FULL_ACCESS
from engine.cpu import radix
from engine.cpu.frames import FIRST_VCPU_FRAME, TOP_FREE, TOP_SPARE, ample, read_word, write_word
from engine.cpu.host_physical_memory import read_entry, write_entry
from engine.cpu.memory_slots import find_slot, space_of
from engine.cpu.page_log import INDEX_MASK, LOG_ENTRIES
from engine.jit import kernel
from engine.kvm import dirty_marking, mapping
from engine.kvm import state_frame as reg

LAST_LOG_ENTRY = np.int64(LOG_ENTRIES - 1)
NOTHING = np.int64(0)
LEAF_PAGES = 512

# Which half of a word of the written map ``collect`` reads.
SINCE_HARVEST = np.int64(0)
OUTSTANDING = np.int64(dirty_marking.HARVESTED_SHIFT)


@kernel
def empty_buffer(m, vcpu, kept):
    """Note what the processor logged for a vCPU, and let its log begin anew (vmx_flush_pml_buffer).

    Pages far apart take frames for each of them. Once no more than ``kept`` are left, the entries that were not reached
    stay in the log, which has room for others then; one at least is noted.
    """
    frame = FIRST_VCPU_FRAME + vcpu
    if not dirty_marking.mode(m) & dirty_marking.BY_PML:
        write_word(m, frame, ctl.V_PML_INDEX, LAST_LOG_ENTRY)
        return
    table = read_word(m, frame, ctl.V_PML_ADDRESS) & bits.ADDRESS
    position = (read_word(m, frame, ctl.V_PML_INDEX) + 1) & INDEX_MASK
    while position < LOG_ENTRIES:
        gfn = (read_entry(m, table, position) & bits.ADDRESS | space_of(m, vcpu)) >> 12
        slot = find_slot(m, gfn)
        if slot >= 0:
            dirty_marking.note_page(m, gfn, slot)
        position += 1
        if min(m.top[TOP_FREE], m.top[TOP_SPARE]) <= kept:
            break
    write_word(m, frame, ctl.V_PML_INDEX, np.int64(position - 1))


@kernel
def watch_again(m, gfn, trail):
    """Bring a page's entries in line with what is now left to note about it."""
    slot = find_slot(m, gfn)
    if slot >= 0:
        mapping.watch_page(m, gfn, slot, trail)


@kernel
def take_harvest(m, start, end, trail):
    """Move what was written since the last harvest to the outstanding one; the pages are clean again."""
    at = start
    while True:
        at = radix.next_leaf(m, reg.ROOT_WRITTEN, at, end)
        if at >= end:
            return end
        stop = min(end, (at | (LEAF_PAGES - 1)) + 1)
        while at < stop:
            if not ample(m):
                return at
            mask = dirty_marking.written(m, at)
            if mask:
                radix.write(m, reg.ROOT_WRITTEN, at, mask << dirty_marking.HARVESTED_SHIFT)
                watch_again(m, at, trail)
            at += 1


@kernel
def clear_written(m, start, end, kept):
    """Forget one half of the written map: what ``kept`` masks out."""
    at = start
    while True:
        at = radix.next_leaf(m, reg.ROOT_WRITTEN, at, end)
        if at >= end:
            return end
        stop = min(end, (at | (LEAF_PAGES - 1)) + 1)
        if not ample(m):
            return at
        while at < stop:
            radix.write(m, reg.ROOT_WRITTEN, at, radix.read(m, reg.ROOT_WRITTEN, at) & kept)
            at += 1


@kernel
def widen_written(m, start, end):
    """Take a page of which any part was written for written whole, as one is while whole pages are tracked."""
    at = start
    while True:
        at = radix.next_leaf(m, reg.ROOT_WRITTEN, at, end)
        if at >= end:
            return end
        if not ample(m):
            return at
        stop = min(end, (at | (LEAF_PAGES - 1)) + 1)
        while at < stop:
            if dirty_marking.written(m, at):
                dirty_marking.store_written(m, at, dirty_marking.EVERYTHING)
            at += 1


@kernel
def take_log(m, gfn, start, pages, out, trail):
    """Move KVM's log of a slot's pages into the bitmap ``out`` (int64 words, bit n = page n of the slot) and clear it.

    ``start`` and the result count pages from ``gfn``.
    """
    at = gfn + start
    end = gfn + pages
    while at < end:
        group = radix.next_leaf(
            m, reg.ROOT_LOG, at >> dirty_marking.LOG_SHIFT, (end + dirty_marking.LOG_MASK) >> dirty_marking.LOG_SHIFT
        )
        at = max(at, group << dirty_marking.LOG_SHIFT)
        stop = min(end, (group + 1) << dirty_marking.LOG_SHIFT)
        if at >= end:
            break
        if not ample(m):
            return at - gfn
        if radix.read(m, reg.ROOT_LOG, group) == 0:
            at = stop
            continue
        while at < stop:
            if dirty_marking.logged(m, at):
                number = at - gfn
                out[number >> dirty_marking.LOG_SHIFT] |= dirty_marking.ONE << (number & dirty_marking.LOG_MASK)
                dirty_marking.store_logged(m, at, NOTHING)
                watch_again(m, at, trail)
            at += 1
    return pages


@kernel
def collect(m, gfn, end, half, gfns, masks):
    """Pages with something in one half of the written map: fills ``gfns`` and ``masks``, int64, and counts them all."""
    found = 0
    at = gfn
    while True:
        at = radix.next_leaf(m, reg.ROOT_WRITTEN, at, end)
        if at >= end:
            return found
        stop = min(end, (at | (LEAF_PAGES - 1)) + 1)
        while at < stop:
            mask = (radix.read(m, reg.ROOT_WRITTEN, at) >> half) & FULL_ACCESS
            if mask:
                if found < gfns.shape[0]:
                    gfns[found] = at
                    masks[found] = mask
                found += 1
            at += 1


@kernel
def collect_logged(m, gfn, end, gfns):
    """Pages that KVM's log has: fills ``gfns``, int64, and counts them all."""
    found = 0
    group = gfn >> dirty_marking.LOG_SHIFT
    last = (end + dirty_marking.LOG_MASK) >> dirty_marking.LOG_SHIFT
    while True:
        group = radix.next_leaf(m, reg.ROOT_LOG, group, last)
        if group >= last:
            return found
        if radix.read(m, reg.ROOT_LOG, group) != 0:
            for at in range(
                max(gfn, group << dirty_marking.LOG_SHIFT), min(end, (group + 1) << dirty_marking.LOG_SHIFT)
            ):
                if dirty_marking.logged(m, at):
                    if found < gfns.shape[0]:
                        gfns[found] = at
                    found += 1
        group += 1


@kernel
def watch_mapped(m, gfn, start, pages, trail):
    """Bring every mapped page of a range in line with what is tracked now; counts pages from ``gfn``.

    A larger page is dropped where its slot is watched: the next touch maps 4 KBytes.
    """
    at = gfn + start
    end = gfn + pages
    while at < end:
        if not ample(m):
            return at - gfn
        found, level, table, index, _ = mapping.find_leaf(m, at, trail)
        if not found:
            level = max(level, 1)
            at = ((at >> (9 * (level - 1))) + 1) << (9 * (level - 1))
            continue
        if level > 1:
            slot = find_slot(m, at)
            if slot >= 0 and dirty_marking.watched(m, slot):
                write_entry(m, table, index, NOTHING)
                mapping.forget(m, at, level)
            at = ((at >> (9 * (level - 1))) + 1) << (9 * (level - 1))
            continue
        watch_again(m, at, trail)
        at += 1
    return pages
