"""One guest access, executed on a change under way: by GPA as a trace of one record, by linear address on its own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from engine.arch import access as acc
from engine.arch import exceptions
from engine.arch.words import unsigned
from engine.cpu import ept
from engine.cpu.frames import FRAME_SIZE, Machine
from engine.cpu.memory_slots import space_of_record
from engine.errors import InvalidValue, TraceError
from engine.kvm import dirty_marking, page_tracking
from engine.kvm import resolutions as res
from engine.kvm import state_frame as reg
from engine.kvm.slots import first_page_without_slot, writable_bytes
from engine.kvm.user_exits import UserExit, user_exit
from engine.state.config import VmConfig
from engine.state.frame_store import Draft
from engine.trace.columns import TraceChunk
from engine.trace.linear import Ending, Places, run_linear
from engine.trace.object_hits import Targets
from engine.trace.results import ExitColumns, TraceResult, columns_of_log
from engine.trace.session import Replay, ReplayOptions
from engine.trace.single import AccessRequest, AccessResult


class Execution(NamedTuple):
    """What an access came to, where its bytes are ((place, bytes) a page or run of pages), and what it counts for."""

    result: AccessResult
    places: Places
    tally: NDArray[np.int64]


Execute = Callable[[Draft, AccessRequest, VmConfig, Targets], Execution]


def execute(draft: Draft, request: AccessRequest, config: VmConfig, targets: Targets) -> Execution:
    """Run a validated request. Nothing of ``request.data`` is stored.

    ``places`` is empty where nothing takes effect.
    """
    if request.gpa is None:
        found = by_linear_address(draft, request, config, targets)
    else:
        found = _by_gpa(draft, request, request.gpa, config, targets)
    return settled(draft, request, config, found)


def settled(draft: Draft, request: AccessRequest, config: VmConfig, found: Execution) -> Execution:
    """``found`` with the memory that is there: what lands nowhere has no effect; dirty logs are told of the rest."""
    result = found.result
    if result.lands and not all(_is_memory(draft.machine, *place, allowed=result.allowed) for place in found.places):
        result = result.without_effect()
    if result.lands and request.gpa is None and request.access == acc.WRITE:
        _note_written(draft, found, config.vcpu_position(request.vcpu))
    return found._replace(result=result, places=found.places if result.lands else ())


def _note_written(draft: Draft, found: Execution, position: int) -> None:
    """Tell the dirty logs of a write by linear address that no EPT let through, or that one of a vCPU in SMM did, as a
    replay tells them of others."""
    told = not space_of_record(draft.machine, position) and int(ept.mode_of(draft.machine, position)) & ept.MODE_EPT
    if found.result.allowed and told:
        return
    for gpa, size in found.places:
        draft.ensure()
        dirty_marking.note_host_write(draft.machine, gpa, size)


def _is_memory(m: Machine, gpa: int, size: int, *, allowed: bool) -> bool:
    """Whether there is guest memory to hold the bytes; what is not allowed does not land in a read-only slot."""
    if not allowed:
        return bool(writable_bytes(m, gpa, size))
    first = gpa // FRAME_SIZE
    return int(first_page_without_slot(m, first, (gpa + size - 1) // FRAME_SIZE - first + 1)) < 0


def _by_gpa(draft: Draft, request: AccessRequest, gpa: int, config: VmConfig, targets: Targets) -> Execution:
    replay = Replay(draft, options_of(request), targets)
    feed(replay, request)
    granted, spp = bool(replay.tally[reg.GRANTS]), not page_tracking.active(draft.machine)
    result = result_of_replay(request, replay.result(), config.profile, granted=granted, spp=spp)
    return Execution(result, ((place_of(draft.machine, request, config, gpa), request.size),), replay.tally)


def place_of(m: Machine, request: AccessRequest, config: VmConfig, gpa: int) -> int:
    """Where an access by GPA has its bytes (see ``cpu.memory_slots``)."""
    return gpa if request.source == acc.HOST else gpa | space_of_record(m, config.vcpu_position(request.vcpu))


def options_of(request: AccessRequest) -> ReplayOptions:
    """How the one record of an access by GPA is replayed."""
    return ReplayOptions(on_violation=request.on_violation, include="all", circumstances=request.circumstances)


def feed(replay: Replay, request: AccessRequest) -> None:
    """Replay the one record of an access by GPA. Raises InvalidValue for what is no access."""
    try:
        replay.feed(TraceChunk(request.record(), request.gvas(), {}, kinds=True))
    except TraceError as error:
        raise InvalidValue(error.rule, field=error.field, value=error.value) from None


def last_visible(exits: ExitColumns) -> int:
    """Position of the last exit that KVM did not handle itself, -1 if there is none."""
    resolution = exits.column("resolution")
    seen = np.flatnonzero((resolution > res.LAST_INTERNAL) & (resolution != res.COMPLETED))
    return int(seen[-1]) if len(seen) else -1


def _user_exit(exits: ExitColumns, profile: str, *, spp: bool) -> UserExit | None:
    """What user space saw last; nothing of an exception, which is the guest's own."""
    at = last_visible(exits)
    resolution = int(exits.column("resolution")[at]) if at >= 0 else res.EXCEPTION
    if resolution == res.EXCEPTION:
        return None
    names = ("reason", "gpa", "insn_len", "qualification")
    reason, gpa, insn_len, qualification = (int(exits.column(name)[at]) for name in names)
    return user_exit(resolution, reason, gpa, profile, insn_len, qualification, spp=spp)


def result_of_replay(
    request: AccessRequest, result: TraceResult, profile: str, *, granted: bool, spp: bool
) -> AccessResult:
    """The outcome of a one-record replay that listed every exit; ``spp`` says whether sub-page protection is on.

    A violation that was granted ended well, unless the second run lists another.
    """
    exits = result.exit_columns
    at = last_visible(exits)
    last = int(exits.column("resolution")[at]) if at >= 0 else res.COMPLETED
    retried = granted and last == res.VIOLATION and int((exits.column("resolution") == last).sum()) == 1
    allowed = last == res.COMPLETED or retried
    exception = last == res.EXCEPTION
    return AccessResult(
        allowed,
        allowed or (last == res.VIOLATION and request.on_violation == "allow"),
        res.RESOLUTION_NAMES[last],
        exits,
        _user_exit(exits, profile, spp=spp),
        gpa=request.gpa,
        exception=exceptions.NAMES[exceptions.VIRTUALIZATION] if exception else None,
        fault_address=request.gva if exception else None,
        stale=bool(exits.column("stale").any()),
        unenforced=result.unenforced_writes != 0,
    )


def by_linear_address(draft: Draft, request: AccessRequest, config: VmConfig, targets: Targets) -> Execution:
    tally = np.zeros(len(reg.COUNTERS), dtype=np.int64)
    linear = 0 if request.gva is None else request.gva
    position = config.vcpu_position(request.vcpu)
    how, on_violation = request.how, request.on_violation
    ending = run_linear(draft, position, linear, request.size, how, request.vcpu, on_violation, request.insn_len, tally)
    columns, record_gpa = columns_of_log(ending.log)
    exits = ExitColumns(columns, record_gpa, True, {}, targets.index, targets.names)
    spp = not page_tracking.active(draft.machine)
    result = replace(_result_of_ending(ending, exits, config.profile, spp=spp), unenforced=bool(tally[reg.UNENFORCED]))
    return Execution(result, ending.places, tally)


def _result_of_ending(ending: Ending, exits: ExitColumns, profile: str, *, spp: bool) -> AccessResult:
    exception = ending.resolution == res.EXCEPTION
    completed = ending.resolution == res.COMPLETED
    return AccessResult(
        allowed=completed,
        lands=bool(ending.places),
        # A grant leaves a record that says violation, as in a replay.
        resolution=res.RESOLUTION_NAMES[res.VIOLATION if completed and ending.granted else ending.resolution],
        exits=exits,
        run=None if exception else _user_exit(exits, profile, spp=spp),
        gpa=None if exception and -ending.reason != exceptions.VIRTUALIZATION else ending.gpa,
        exception=exceptions.NAMES[-ending.reason] if exception else None,
        error_code=_error_code(ending),
        fault_address=unsigned(ending.gla) if exception else None,
        stale=ending.stale,
    )


def _error_code(ending: Ending) -> int | None:
    """Of a #PF what the processor says of it, of a #GP 0; a #VE has none."""
    if ending.reason == -exceptions.PAGE_FAULT:
        return ending.value
    return 0 if ending.reason == -exceptions.GENERAL_PROTECTION else None
