"""One guest access by linear address: the processor runs it, KVM handles its exits, until it ends.

The exits may be about the guest's paging structures as well as the page itself; each is listed at its own GPA.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from engine.arch import access as acc
from engine.arch import exceptions, exits
from engine.arch.words import signed, unsigned
from engine.cpu import decision, guest_paging, instruction, tlb
from engine.kvm import registers as reg
from engine.kvm import resolutions as res
from engine.kvm import run
from engine.kvm.fault import count_exit, handle_exit
from engine.kvm.protections import ProtectedObject
from engine.kvm.user_exits import user_exit
from engine.store import Draft
from engine.trace import objects
from engine.trace.replay import grant_touched, in_protected_page
from engine.trace.results import ExitColumns, columns_of_log
from engine.trace.single import AccessRequest, AccessResult


@dataclass(frozen=True, slots=True)
class LinearOutcome:
    """How the access ended, and where its bytes are: (GPA, bytes) of each page, if it was translated to its end."""

    result: AccessResult
    pages: tuple[tuple[int, int], ...]


def run_linear(
    draft: Draft,
    position: int,
    request: AccessRequest,
    profile: str,
    protected: Sequence[ProtectedObject],
    tally: NDArray[np.int64],
) -> LinearOutcome:
    """Run ``request``, which has a ``gva`` and no ``gpa``, on the vCPU at a position."""
    trail, steps, pages = instruction.scratch()
    log = np.zeros((run.MAX_EXITS + 1, run.EXIT_WORDS), dtype=np.int64)
    used = np.zeros(1, dtype=np.int64)
    linear = np.int64(signed(request.gva or 0))
    size, how = np.int64(request.size), np.int64(request.how)
    word = request.access << 16 | request.vcpu << 32
    stale = False
    guarded = False
    while True:
        draft.ensure()
        m = draft.machine
        reason, value, gpa, gla, denied, misled, count = instruction.attempt(
            m, position, linear, size, how, trail, steps, pages
        )
        reason, value, gpa, gla = int(reason), int(value), int(gpa), int(gla)
        stale = stale or bool(misled)
        if reason <= exits.NONE:
            break
        part = int(decision.page_part(gpa, gpa + request.size - (gla - int(linear))))
        guarded = guarded or bool(in_protected_page(m, gpa, part))
        count_exit(tally, reason, value)
        resolution = int(handle_exit(m, position, gpa, reason, value, trail, tally))
        tlb.transition(m, position)
        if resolution <= res.LAST_INTERNAL and used[0] == run.MAX_EXITS:
            resolution = res.INTERNAL_ERROR
        marked = resolution | (res.STALE if misled else 0)
        run.log_exit(log, used, 0, gpa, word | part, signed(gla), reason, value, marked, denied, gpa)
        if resolution <= res.LAST_INTERNAL:
            continue
        if resolution != res.VIOLATION or request.on_violation != "grant" or used[0] > run.MAX_EXITS:
            break
        if not grant_touched(m, gpa, part, trail):
            break
        tally[reg.VIOLATIONS] += 1
        tally[reg.GRANTS] += 1
    ending = res.COMPLETED if reason == exits.NONE else res.EXCEPTION if reason < 0 else resolution
    places = _places(pages, int(count)) if ending == res.COMPLETED else ()
    if ending == res.VIOLATION and request.on_violation == "allow":
        places = _translate(draft, position, request)
    if request.access == acc.WRITE and ending == res.COMPLETED:
        guarded = guarded or any(bool(in_protected_page(draft.machine, at, length)) for at, length in places)
    _tally(tally, request, ending, guarded, stale)
    columns, record_gpa = columns_of_log(log[: int(used[0])])
    found = ExitColumns(columns, record_gpa, True, {}, objects.build_index(protected), objects.names_of(protected))
    fault = reason < 0
    result = AccessResult(
        allowed=ending == res.COMPLETED,
        lands=ending == res.COMPLETED or bool(places),
        resolution=res.RESOLUTION_NAMES[ending],
        exits=found,
        run=None if fault or not reason else user_exit(ending, reason, gpa, profile),
        gpa=gpa if not fault else None,
        exception=exceptions.NAMES[-reason] if fault else None,
        error_code=value if reason == -exceptions.PAGE_FAULT else None,
        fault_address=unsigned(gla) if fault else None,
        stale=stale,
    )
    return LinearOutcome(result, places)


def _places(pages: NDArray[np.int64], count: int) -> tuple[tuple[int, int], ...]:
    return tuple((int(row[instruction.P_GPA]), int(row[instruction.P_SIZE])) for row in pages[:count])


def _translate(draft: Draft, position: int, request: AccessRequest) -> tuple[tuple[int, int], ...]:
    """Where the bytes of an access are by the guest's paging alone; nothing if a page has no translation."""
    trail, steps, _ = instruction.scratch()
    places: list[tuple[int, int]] = []
    done = 0
    while done < request.size:
        at = np.int64(signed((request.gva or 0) + done))
        part = int(decision.page_part(at, at + request.size - done))
        doing = guest_paging.LOOK | guest_paging.FRESH
        reason, _, gpa, _, _ = guest_paging.walk(
            draft.machine, position, at, np.int64(request.how), doing, trail, steps
        )
        if reason != exits.NONE:
            return ()
        places.append((int(gpa), part))
        done += part
    return tuple(places)


def _tally(tally: NDArray[np.int64], request: AccessRequest, ending: int, guarded: bool, stale: bool) -> None:
    write = request.access == acc.WRITE
    tally[reg.RECORDS] += 1
    tally[reg.WRITES] += write
    tally[reg.PAGE_GRANULAR] += write and guarded
    tally[reg.VIOLATIONS] += ending == res.VIOLATION
    tally[reg.MMIO] += ending == res.MMIO
    tally[reg.EXCEPTIONS] += ending == res.EXCEPTION
    tally[reg.STALE_ACCESSES] += stale
