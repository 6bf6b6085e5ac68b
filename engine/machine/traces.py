"""What a machine's guest does: one access, or a trace of them as one transaction; and an access explained."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from engine.arch import access as acc
from engine.cpu import explain, frames
from engine.cpu.memory_slots import space_of_record
from engine.errors import LimitExceeded
from engine.kvm import page_contents
from engine.kvm import state_frame as reg
from engine.kvm.memory_views import store_bytes
from engine.machine import walks
from engine.machine.hyperv_vps import Runs, enter, leave
from engine.machine.state import Change, Operations
from engine.machine.trace_operations import TraceOperations
from engine.trace.access_execution import Execute
from engine.trace.interactive import InteractiveReplay
from engine.trace.interactive_timed import InteractiveTimedReplay, Watched, nobody_watches
from engine.trace.option_names import ASK
from engine.trace.published import PublishedReplay
from engine.trace.session import Replay, ReplayOptions, ReplayTransaction
from engine.trace.single import AccessRequest, AccessResult
from engine.trace.timed import TimedReplay


class Traces(Operations):
    """Accesses of one machine's vCPUs."""

    def access(self, request: AccessRequest, run: Execute) -> AccessResult:
        """One guest access, executed by ``run``: on its own, or as one that asks (see ``trace.interactive_access``)."""
        request.validate(self._config)
        with self._state.change() as change:
            enter(change, request.vcpu)
            result, places, tally = run(change, request, change.config, self._state.current.targets)
            data = request.data or b""
            for gpa, size in places if data else ():
                store_bytes(change, gpa, data[:size])
                data = data[size:]
            _count(change, tally)
            leave(change, request.vcpu)
            if result.allowed and places and request.access == acc.READ:
                return result.with_data(b"".join(page_contents.read_bytes(change.machine, *place) for place in places))
        return result

    def replay(
        self, options: ReplayOptions, earlier: InteractiveReplay | None = None, watched: Watched = nobody_watches
    ) -> ReplayTransaction:
        """A replay, one transaction: ``with traces.replay(options) as r: r.feed(chunk) …; r.finish()``.

        With ``on_violation`` ask, or ``published``, it may pause; given as ``earlier``, it goes on in the next
        transaction. One that asks pauses before the loads of CR3 that are ``watched``, too.
        """
        if earlier is None:
            options.validate()
        change = self._state.open()
        try:
            runs = Runs(change)
            replay = self._begin(change, options, runs, earlier, watched)
        except BaseException:
            self._state.abandon(change)
            raise

        def publish(done: Replay) -> None:
            try:
                _count(change, done.uncounted(), done.stop)
                runs.finish()
            except BaseException:
                self._state.abandon(change)
                raise
            self._state.publish(change)

        return ReplayTransaction(replay, publish, lambda: self._state.abandon(change))

    def _begin(
        self,
        change: Change,
        options: ReplayOptions,
        runs: Runs,
        earlier: InteractiveReplay | None,
        watched: Watched,
    ) -> Replay:
        targets = self._state.current.targets
        if earlier is not None:
            earlier.go_on(change, targets, runs)
            return earlier
        if options.published:
            return PublishedReplay(change, options, targets, runs)
        if options.on_violation == ASK:
            return InteractiveTimedReplay(change, options, targets, runs, TraceOperations(change), watched)
        return TimedReplay(change, options, targets, runs, TraceOperations(change))

    def walk(self, request: AccessRequest, run: Execute) -> walks.Walk:
        """What the processor finds of an access, entry by entry, and how it ends once KVM has done its part.

        Changes nothing: the access is executed on a twin of the machine, which costs a copy of its frames.
        """
        request.validate(self._config)
        with self._state.store.twinning:
            twin = Traces(self._state.twin())
            now = twin._explained(request)
            try:
                result = twin.access(request, run)
            except LimitExceeded as limit:
                return walks.cut_short(now, limit)
            machine = twin._published.machine
            space = space_of_record(machine, self._config.vcpu_position(request.vcpu))
            return walks.walk_of(machine, now, result, twin._explained(request), space)

    def _explained(self, request: AccessRequest) -> explain.Explanation:
        position = self._config.vcpu_position(request.vcpu)
        assert request.gpa is not None, "what is explained is an access by GPA"
        return explain.explain(self._published.machine, position, request.gpa, request.size, request.how)


def _count(change: Change, tally: NDArray[np.int64], stop: tuple[int, int, int] | None = None) -> None:
    """Add to the totals; of a replay, keep the record at which it has stopped, for the one that goes on there."""
    machine = change.machine
    words = machine.rows[frames.own(machine, frames.STATE_FRAME)]
    words[reg.COUNTERS_AT : reg.COUNTERS_AT + len(tally)] += tally
    if stop is not None:
        words[reg.STOPPED_AT : reg.STOPPED_WORD + 1] = stop
