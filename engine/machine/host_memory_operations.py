"""Host memory events of a machine: what the host does to the memory behind its guest."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from engine.cpu.frames import EPT, SPPT, Machine
from engine.errors import InvalidValue
from engine.kvm.host_memory_events import EVENTS, WHOLE, change_everything, change_range
from engine.kvm.slots import check_pages
from engine.machine.state import Operations
from engine.state.config import choices
from engine.state.frame_store import Draft
from engine.state.retry import new_trail, run_all

MAX_PAGES = 1 << 20


@dataclass(frozen=True, slots=True)
class HostEvent:
    """What an event did: ``leaves`` is how many leaf entries changed, None where all went; ``frames`` were freed."""

    event: str
    gfn: int | None
    npages: int | None
    leaves: int | None
    frames: int


class HostMemoryOperations(Operations):
    """Host memory events of one machine."""

    def event(self, name: str, gfn: int | None = None, npages: int | None = None) -> HostEvent:
        """Let an event of ``EVENTS`` happen to ``npages`` pages from ``gfn``, one page unless told.

        ``zap`` and ``shrink`` without a GFN are about everything. ``split``, ``collapse`` and ``shrink`` work on the
        whole 2-MByte regions that the range touches. Raises InvalidValue for an unknown event, a missing GFN, and pages
        without a memory slot.
        """
        choices(name, EVENTS, "event")
        if gfn is None and (name not in WHOLE or npages is not None):
            raise InvalidValue("must be given: the event is about pages, and gfn is the first", field="gfn", value=None)
        with self._state.change() as draft:
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
    trail = new_trail()
    changed = np.zeros(1, dtype=np.int64)
    number = np.int64(event)
    run_all(draft, npages, lambda done: change_range(draft.machine, number, gfn, npages, done, changed, trail))
    return int(changed[0])


def _tables(machine: Machine) -> int:
    """Frames of EPT and SPPT tables."""
    return int(np.count_nonzero(machine.kind == EPT) + np.count_nonzero(machine.kind == SPPT))
