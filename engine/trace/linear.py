"""One guest access by linear address: the processor runs it, KVM handles its exits, until it ends.

The exits may be about the guest's paging structures as well as the page itself; each is listed at its own GPA. What
is decided about an exit is decided by the same functions as for an access by GPA.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from engine.arch import access as acc
from engine.arch import exceptions, exits
from engine.arch.words import signed
from engine.cpu import access_over_pages, ept, guest_paging, instruction, tlb
from engine.cpu.frames import Machine
from engine.cpu.memory_slots import space_of_record
from engine.kvm import bitmaps, page_tracking, shadow_paging, vcpu_run
from engine.kvm import resolutions as res
from engine.kvm import state_frame as reg
from engine.kvm.exit_handling import block_nmis, count_exit, handle_exit
from engine.kvm.granted_subpages import grant_touched
from engine.state.frame_store import Draft
from engine.trace.replay import in_protected_page

# What the processor reads and writes of a guest paging structure at a time.
STRUCTURE_BYTES = 8

Places = tuple[tuple[int, int], ...]


class Ending(NamedTuple):
    """How the access ended: ``resolution``, and the event that ended it.

    ``reason``, ``value``, ``gpa`` and ``gla`` are those of ``instruction.attempt``. ``places`` is where the bytes are,
    (place, bytes) a page (see ``cpu.memory_slots``), where they were translated and take effect; ``log`` the exits on
    the way.
    """

    resolution: int
    reason: int
    value: int
    gpa: int
    gla: int
    stale: bool
    granted: bool
    places: Places
    log: NDArray[np.int64]


def run_linear(
    draft: Draft,
    position: int,
    linear: int,
    size: int,
    how: int,
    vcpu: int,
    on_violation: str,
    insn_len: int,
    tally: NDArray[np.int64],
) -> Ending:
    """Run an access of ``size`` bytes at ``linear`` on the vCPU at a position, whose id is ``vcpu``."""
    trail, steps, pages = instruction.scratch()
    log = np.zeros((2 * vcpu_run.MAX_EXITS + 2, vcpu_run.EXIT_WORDS), dtype=np.int64)
    used = np.zeros(1, dtype=np.int64)
    start, length, access = np.int64(signed(linear)), np.int64(size), how & acc.ACCESS_MASK
    stale = granted = guarded = False
    resolution = res.COMPLETED
    space = space_of_record(draft.machine, position)
    while True:
        draft.ensure()
        m = draft.machine
        event = instruction.attempt(m, position, start, length, np.int64(how), trail, steps, pages)
        reason, value, gpa, gla, denied, misled, count = (int(x) for x in event)
        stale = stale or bool(misled)
        if reason < exits.NONE:
            resolution = res.EXCEPTION
            break
        if reason == exits.NONE:
            refusal = _refusal_without_ept(m, position, pages[:count], access)
            if refusal is None:
                resolution = res.COMPLETED
                break
            resolution, value = res.VIOLATION, 0
            gpa, part, denied, done = refusal
            gla = linear + done
        else:
            structure = reason != exits.PML_FULL and pages[count, instruction.P_FACTS] == 0
            done = 0 if reason == exits.PML_FULL else int(pages[:count, instruction.P_SIZE].sum())
            part = STRUCTURE_BYTES if structure else int(access_over_pages.page_part(gpa, gpa + size - done))
            count_exit(tally, reason, value)
            block_nmis(m, position, how, value)
            resolution = int(handle_exit(m, position, gpa, how, reason, value, denied, trail, tally))
            tlb.transition(m, position)
            if resolution <= res.LAST_INTERNAL and used[0] >= vcpu_run.MAX_EXITS:
                resolution = res.INTERNAL_ERROR
            if resolution == res.VIOLATION and denied == 0:
                denied = int(page_tracking.refused(m, gpa | space, gpa + part | space, value))
        guarded = guarded or bool(in_protected_page(m, gpa | space, part))
        word = part | access << 16 | vcpu << 32 | insn_len << acc.RECORD_LENGTH_SHIFT
        marked = resolution | (res.STALE if misled else 0)
        vcpu_run.log_exit(log, used, 0, gpa, word, signed(gla), reason, value, marked, denied, gpa)
        if resolution <= res.LAST_INTERNAL:
            continue
        tally[reg.VIOLATIONS] += resolution == res.VIOLATION and not granted
        if resolution != res.VIOLATION or on_violation != "grant" or not grant_touched(m, gpa, part, trail):
            break
        granted = True
        tally[reg.GRANTS] += 1
    if resolution == res.COMPLETED and _is_mmio_without_ept(draft.machine, position, pages[:count], access):
        resolution = res.MMIO
        word = size | access << 16 | vcpu << 32
        vcpu_run.log_exit(log, used, 0, gpa, word, signed(gla), reason, 0, resolution, 0, gpa)
    if reason == -exceptions.VIRTUALIZATION:
        # No VM exit, but what the guest is told: listed as an access by GPA lists it.
        word = size | access << 16 | vcpu << 32
        vcpu_run.log_exit(log, used, 0, gpa, word, signed(gla), exits.EPT_VIOLATION, value, resolution, denied, gpa)
    places: Places = ()
    if resolution == res.COMPLETED:
        places = tuple((int(row[instruction.P_GPA]) | space, int(row[instruction.P_SIZE])) for row in pages[:count])
    elif resolution == res.VIOLATION and on_violation == "allow":
        places = _translate(draft.machine, position, int(start), size, how)
    if access == acc.WRITE:
        guarded = guarded or any(bool(in_protected_page(draft.machine, at, part)) for at, part in places)
        tally[reg.WRITES] += 1
        tally[reg.PAGE_GRANULAR] += guarded
        if resolution == res.COMPLETED:
            tally[reg.UNENFORCED] += any(bool(bitmaps.refuses(draft.machine, at, part)) for at, part in places)
    tally[reg.RECORDS] += 1
    tally[reg.MMIO] += resolution == res.MMIO
    tally[reg.EXCEPTIONS] += resolution == res.EXCEPTION
    tally[reg.STALE_ACCESSES] += stale
    return Ending(resolution, reason, value, gpa, gla, stale, granted, places, log[: int(used[0])])


def _refusal_without_ept(
    m: Machine, position: int, pages: NDArray[np.int64], access: int
) -> tuple[int, int, int, int] | None:
    """(GPA, bytes in its page, sub-pages, bytes before it) of the first part that KVM's shadow tables refuse."""
    if ept.mode_of(m, position) & ept.MODE_EPT or not page_tracking.active(m):
        return None
    done = 0
    for row in pages:
        gpa, size = int(row[instruction.P_GPA]), row[instruction.P_SIZE]
        place = np.int64(gpa | space_of_record(m, position))
        ending, denied, _ = shadow_paging.decide(m, place, size, np.int64(access))
        if ending != res.COMPLETED:
            return (gpa, int(size), int(denied), done) if ending == res.VIOLATION else None
        done += int(size)
    return None


def _is_mmio_without_ept(m: Machine, position: int, pages: NDArray[np.int64], access: int) -> bool:
    """Whether the slots alone, which decide where there is no EPT, have no memory for the access."""
    if ept.mode_of(m, position) & ept.MODE_EPT:
        return False
    space = space_of_record(m, position)
    places = ((np.int64(row[instruction.P_GPA] | space), np.int64(row[instruction.P_SIZE])) for row in pages)
    return any(bool(shadow_paging.is_mmio(m, gpa, size, access == acc.WRITE)) for gpa, size in places)


def _translate(m: Machine, position: int, linear: int, size: int, how: int) -> Places:
    """Where the bytes of an access are by the guest's paging alone; nothing if a page has no translation."""
    trail, steps, _ = instruction.scratch()
    places: list[tuple[int, int]] = []
    space = space_of_record(m, position)
    done = 0
    while done < size:
        at = np.int64(instruction.effective(m, position, np.int64(signed(linear + done))))
        part = int(access_over_pages.page_part(at, at + size - done))
        doing = guest_paging.LOOK | guest_paging.FRESH
        reason, _, gpa, _, _ = guest_paging.walk(
            m, position, guest_paging.OWN_SPACE, at, np.int64(how), doing, trail, steps
        )
        if reason != exits.NONE:
            return ()
        places.append((int(gpa) | space, part))
        done += part
    return tuple(places)
