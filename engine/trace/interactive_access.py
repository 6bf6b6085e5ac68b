"""One guest access that pauses where it is refused, and goes on when somebody has said how.

By GPA it is an interactive replay of one record. By linear address it runs again after ``allow``, ``grant`` and
``retry``, through the guest's page tables as they are by then.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from engine.cpu.ept import TRAIL_ROWS
from engine.kvm import page_tracking
from engine.kvm import resolutions as res
from engine.kvm import state_frame as reg
from engine.kvm.granted_subpages import grant_touched
from engine.state.config import VmConfig, choices
from engine.state.frame_store import Draft
from engine.trace.access_execution import (
    Execution,
    by_linear_address,
    feed,
    last_visible,
    options_of,
    place_of,
    result_of_replay,
    settled,
)
from engine.trace.interactive import InteractiveReplay
from engine.trace.object_hits import Targets
from engine.trace.option_names import ANSWERS
from engine.trace.results import ExitColumns, join
from engine.trace.single import AccessRequest, AccessResult

# What is asked about: an exit that user space sees because the access was refused.
_ASKED = tuple(res.RESOLUTION_NAMES[ending] for ending in (res.VIOLATION, res.INTERNAL_ERROR, res.RUN_FAILED))

# Of one access, not of each of its attempts; and what only an attempt after ``retry`` adds to.
_OF_THE_ACCESS = (reg.RECORDS, reg.WRITES)
_OF_AN_ATTEMPT = (reg.VIOLATIONS, reg.PAGE_GRANULAR, reg.STALE_ACCESSES)


class InteractiveAccess:
    """Runs an access as ``VirtualMachine.access`` wants it, stretch by stretch.

    After a stretch ``asked`` is the exit that is asked about, or None: the access has ended. With an answer in
    ``answer``, ``VirtualMachine.access`` is called again.
    """

    def __init__(self) -> None:
        self.asked: ExitColumns | None = None
        self._action: str | None = None
        self._replay: InteractiveReplay | None = None
        self._draft: Draft | None = None
        self._before = 0
        self._last: AccessResult | None = None

    def answer(self, action: str) -> None:
        """Take what was answered. Raises InvalidValue for what is no answer."""
        choices(action, ANSWERS, "action")
        assert self.asked is not None
        self._action = action

    def __call__(self, draft: Draft, request: AccessRequest, config: VmConfig, targets: Targets) -> Execution:
        """The next stretch: up to the end of the access or up to a question."""
        self.asked = None
        if request.gpa is None:
            found = self._by_linear_address(draft, request, config, targets)
        else:
            found = self._by_gpa(draft, request, config, targets)
        self._draft = draft
        return settled(draft, request, config, found)

    def _by_gpa(self, draft: Draft, request: AccessRequest, config: VmConfig, targets: Targets) -> Execution:
        assert request.gpa is not None
        if self._replay is None:
            self._replay = InteractiveReplay(draft, options_of(request), targets)
            feed(self._replay, request)
        else:
            assert self._action is not None
            if self._action == "retry":
                self._before = len(self._replay.result().exit_columns)
            self._replay.go_on(draft, targets)
            self._replay.answer(self._action)
        if self._replay.paused_at is not None:
            self.asked = self._replay.asked
        whole = self._replay.result()
        granted = self._action == "grant" and self._replay.attempted
        attempt = replace(whole, exit_columns=whole.exit_columns[self._before :])
        acted = replace(request, on_violation=self._action or "stop")
        spp = not page_tracking.active(draft.machine)
        result = result_of_replay(acted, attempt, config.profile, granted=granted, spp=spp)
        result = replace(result, exits=whole.exit_columns)
        place = place_of(draft.machine, request, config, request.gpa)
        return Execution(result, ((place, request.size),), self._replay.uncounted())

    def _by_linear_address(self, draft: Draft, request: AccessRequest, config: VmConfig, targets: Targets) -> Execution:
        action, before = self._action, self._last
        if before is None:
            found = by_linear_address(draft, replace(request, on_violation="stop"), config, targets)
        elif action in ("skip", "stop"):
            return Execution(before, (), np.zeros(len(reg.COUNTERS), dtype=np.int64))
        else:
            found = self._again(draft, request, config, targets, before)
        self._last = found.result
        if found.result.resolution in _ASKED and action in (None, "retry"):
            at = last_visible(found.result.exits)
            self.asked = found.result.exits[at : at + 1]
        return found

    def _again(
        self, draft: Draft, request: AccessRequest, config: VmConfig, targets: Targets, before: AccessResult
    ) -> Execution:
        """Run it once more after ``allow``, ``grant`` or ``retry``."""
        action = str(self._action)
        opened = action == "grant" and self._grants(draft, before.exits)
        if action == "grant" and not opened and not self._changed(draft):
            return Execution(before, (), np.zeros(len(reg.COUNTERS), dtype=np.int64))
        how = {"retry": "stop"}.get(action, action)
        result, places, tally = by_linear_address(draft, replace(request, on_violation=how), config, targets)
        if action == "allow" and not result.allowed:
            # The exit that was asked about, met again on the way to where the bytes go.
            return Execution(replace(result, exits=before.exits), places, np.zeros_like(tally))
        for counter in _OF_THE_ACCESS if action == "retry" else _OF_THE_ACCESS + _OF_AN_ATTEMPT:
            tally[counter] = 0
        tally[reg.GRANTS] += opened
        if action == "grant" and result.allowed:
            # As in a replay: the violation that was granted is how it ended.
            result = replace(result, resolution=res.RESOLUTION_NAMES[res.VIOLATION], run=result.run or before.run)
        exits = join([_known(before.exits, result.exits), result.exits], result.exits)
        return Execution(replace(result, exits=exits), places, tally)

    def _grants(self, draft: Draft, exits: ExitColumns) -> bool:
        at = last_visible(exits)
        if int(exits.column("resolution")[at]) != res.VIOLATION:
            return False
        draft.ensure()
        trail: NDArray[np.int64] = np.zeros((TRAIL_ROWS, 4), dtype=np.int64)
        size = int(exits.column("size")[at])
        return bool(grant_touched(draft.machine, int(exits.record_gpa[at]), size, trail))

    def _changed(self, draft: Draft) -> bool:
        return self._draft is not None and draft.base is not self._draft.machine


def _known(earlier: ExitColumns, later: ExitColumns) -> ExitColumns:
    """Earlier exits, their objects named as they are now: one access is told as of its end."""
    return replace(earlier, object_index=later.object_index, object_names=later.object_names)
