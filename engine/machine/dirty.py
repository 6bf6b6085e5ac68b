"""Dirty tracking of a machine: switching it on, looking, harvesting in two steps, and KVM_GET_DIRTY_LOG."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from engine.cpu import frames
from engine.errors import Conflict, InvalidValue, NotEnabled, NotFound
from engine.kvm import dirty_harvest, dirty_marking
from engine.kvm import state_frame as reg
from engine.kvm.slot_map import SlotMap
from engine.kvm.slots import key_of
from engine.machine.page_logs import buffered_pages, empty_buffers, store_register, use_buffers, watch_slot
from engine.machine.state import Operations, register
from engine.state.config import choices
from engine.state.frame_store import Draft
from engine.state.retry import new_trail, run_all

TRACKING = ("off", "page", "subpage")
METHODS = ("write-protect", "pml")
SUBPAGE_BYTES = 128
PAGE_BYTES = 4096

_LEVELS = {"off": 0, "page": dirty_marking.TRACK_PAGES, "subpage": dirty_marking.TRACK_SUBPAGES}
_HARVESTS = reg.COUNTERS_AT + reg.DIRTY_HARVESTS
_LOWER = np.int64(0xFFFF_FFFF)
_UPPER = ~_LOWER


@dataclass(frozen=True, slots=True)
class Tracking:
    """What is tracked: ``tracking`` is one of TRACKING, ``method`` one of METHODS."""

    tracking: str
    method: str


@dataclass(frozen=True)
class WrittenPages:
    """Pages and what was written of them: ``gfns`` int64[n] ascending, ``maps`` uint32[n], bit s = sub-page s."""

    gfns: NDArray[np.int64]
    maps: NDArray[np.uint32]

    @property
    def page_bytes(self) -> int:
        """What a copy of whole pages would take."""
        return int(np.count_nonzero(self.maps)) * PAGE_BYTES

    @property
    def subpage_bytes(self) -> int:
        """What a copy of the written sub-pages takes."""
        return int(np.bitwise_count(self.maps).sum()) * SUBPAGE_BYTES

    def __len__(self) -> int:
        return len(self.gfns)


@dataclass(frozen=True)
class DirtyPages(WrittenPages):
    """What is dirty now; ``logged`` bool[n] is KVM's log. A page is listed when either log has it."""

    logged: NDArray[np.bool_]


@dataclass(frozen=True)
class Harvest(WrittenPages):
    """A harvest that waits to be acknowledged."""

    harvest: int


class DirtyOperations(Operations):
    """The dirty logs of one machine; ``kvm.dirty_marking`` tells what they are."""

    @property
    def _end(self) -> int:
        return 1 << (self._config.maxphyaddr - 12)

    # Reads

    def tracking(self) -> Tracking:
        """What is tracked, and how."""
        snapshot = self._published
        mode = register(snapshot.machine, reg.DIRTY_MODE)
        level = next(name for name, bit in _LEVELS.items() if mode & dirty_marking.TRACKED == bit)
        return Tracking(level, METHODS[bool(mode & dirty_marking.BY_PML)])

    def pages(self, gfn: int = 0, npages: int | None = None) -> DirtyPages:
        """What is dirty in a range, or everywhere; changes nothing. Pages without a slot are never dirty."""
        end = self._end if npages is None else gfn + npages
        if gfn < 0 or end > self._end or end <= gfn:
            raise InvalidValue(
                f"must lie within the guest-physical address width of {self._config.maxphyaddr} bits",
                field="gfn",
                value=gfn,
            )
        now = self._state.current
        machine, slots = now.snapshot.machine, now.slots
        gfns, masks = _collect(machine, gfn, end, dirty_harvest.SINCE_HARVEST)
        logged = _collect_logged(machine, gfn, end)
        buffered = np.unique(buffered_pages(machine, slots))
        buffered = buffered[(buffered >= gfn) & (buffered < end)]
        mode = register(machine, reg.DIRTY_MODE)
        logged = np.union1d(logged, buffered[_in_logged_slot(slots, buffered)])
        whole = buffered if mode & dirty_marking.TRACK_PAGES else buffered[:0]
        every = np.union1d(np.union1d(gfns, whole), logged)
        maps = np.zeros(len(every), dtype=np.uint32)
        maps[np.searchsorted(every, gfns)] = masks
        maps[np.searchsorted(every, whole)] = 0xFFFF_FFFF
        return DirtyPages(every, maps, np.isin(every, logged))

    def outstanding(self) -> Harvest | None:
        """The harvest that was not acknowledged yet, if there is one."""
        snapshot = self._published
        return self._outstanding(snapshot.machine)

    def outstanding_number(self) -> int | None:
        """Its number alone."""
        snapshot = self._published
        number = register(snapshot.machine, reg.HARVESTS)
        return None if number == register(snapshot.machine, reg.ACKNOWLEDGED) else number

    # Changes

    def track(self, level: str, method: str = "write-protect") -> Tracking:
        """Switch tracking on, over or off.

        ``level`` off, page or subpage: what is noted of a write to any slot until the next harvest. ``method`` is how
        writes to whole pages are noticed, for KVM's log as well. What was noted and not harvested is forgotten when
        tracking is switched off, and taken for whole pages when it goes from sub-pages to pages; an outstanding
        harvest stays. Raises NotEnabled for sub-pages without SPP, and
        Unsupported for a page-modification log that the host has not.
        """
        choices(level, TRACKING, "tracking")
        choices(method, METHODS, "method")
        if self.tracking() == Tracking(level, method):
            return Tracking(level, method)
        with self._state.change() as draft:
            machine = draft.machine
            if level == "subpage" and not register(machine, reg.SPP_ACTIVE):
                raise NotEnabled(
                    "must be off or page while sub-page protection is off: switch it on first, with PUT …/spp",
                    field="tracking",
                    value=level,
                )
            empty_buffers(draft)
            use_buffers(draft, self._config, method)
            mode = register(draft.machine, reg.DIRTY_MODE) & dirty_marking.SLOT_LOGS
            mode |= _LEVELS[level] | (dirty_marking.BY_PML if method == "pml" else 0)
            store_register(draft.machine, reg.DIRTY_MODE, mode)
            if level == "off":
                self._clear(draft, _UPPER)
            if level == "page":
                run_all(draft, self._end, lambda at: dirty_harvest.widen_written(draft.machine, at, self._end))
            for spec in self._state.current.slots.values():
                watch_slot(draft, spec)
        return Tracking(level, method)

    def harvest(self) -> Harvest:
        """Take what was written since the last harvest, or get the outstanding one again, the same as it was.

        Pages that are taken are clean from then on: what is written later is in the next harvest. Raises Conflict
        when nothing is tracked and nothing outstanding.
        """
        waiting = self.outstanding()
        if waiting is not None:
            return waiting
        if self.tracking().tracking == "off":
            raise Conflict(
                "must not be off: switch dirty tracking on first, with PUT …/dirty",
                field="tracking",
                value="off",
                errno="ENOENT",
            )
        with self._state.change() as draft:
            empty_buffers(draft)
            trail = new_trail()
            run_all(draft, self._end, lambda at: dirty_harvest.take_harvest(draft.machine, at, self._end, trail))
            store_register(draft.machine, reg.HARVESTS, register(draft.machine, reg.HARVESTS) + 1)
            store_register(draft.machine, np.int64(_HARVESTS), register(draft.machine, np.int64(_HARVESTS)) + 1)
            taken = self._outstanding(draft.machine)
        assert taken is not None
        return taken

    def acknowledge(self, harvest: int) -> bool:
        """Let go of a harvest; False if it had been acknowledged before. Raises NotFound for one that never was."""
        snapshot = self._published
        if harvest < 1 or harvest > register(snapshot.machine, reg.HARVESTS):
            raise NotFound("must be the number of a harvest that waits", field="harvest", value=harvest)
        if harvest <= register(snapshot.machine, reg.ACKNOWLEDGED):
            return False
        with self._state.change() as draft:
            self._clear(draft, _LOWER)
            store_register(draft.machine, reg.ACKNOWLEDGED, harvest)
        return True

    def take_log(self, slot: int, address_space: int = 0) -> bytes:
        """KVM_GET_DIRTY_LOG: the bitmap of a slot, page n in bit n % 8 of byte n // 8, in whole 64-bit words.

        The log is empty afterwards and the pages are watched again. Raises NotFound (ENOENT) for a slot that is not
        there or has no log.
        """
        spec = self._state.current.slots.get(key_of(slot, address_space))
        if spec is None or not spec.log_dirty:
            raise NotFound("must be a slot with log_dirty", field="slot", value=slot)
        out = np.zeros((spec.pages + dirty_marking.LOG_MASK) >> dirty_marking.LOG_SHIFT, dtype=np.int64)
        with self._state.change() as draft:
            empty_buffers(draft)
            trail = new_trail()
            run_all(
                draft,
                spec.pages,
                lambda at: dirty_harvest.take_log(draft.machine, spec.first_page, at, spec.pages, out, trail),
            )
        return out.tobytes()

    # Inside

    def _outstanding(self, machine: frames.Machine) -> Harvest | None:
        number = register(machine, reg.HARVESTS)
        if number == register(machine, reg.ACKNOWLEDGED):
            return None
        gfns, masks = _collect(machine, 0, self._end, dirty_harvest.OUTSTANDING)
        return Harvest(gfns, masks.astype(np.uint32), number)

    def _clear(self, draft: Draft, kept: np.int64) -> None:
        run_all(draft, self._end, lambda at: dirty_harvest.clear_written(draft.machine, at, self._end, kept))


def _in_logged_slot(slots: SlotMap, gfns: NDArray[np.int64]) -> NDArray[np.bool_]:
    found = [slots.holding(int(gfn)) for gfn in gfns]
    return np.array([spec is not None and spec.log_dirty for spec in found], dtype=bool)


def _collect(
    machine: frames.Machine, gfn: int, end: int, half: np.int64
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    gfns, masks = np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64)
    while (found := int(dirty_harvest.collect(machine, gfn, end, half, gfns, masks))) > len(gfns):
        gfns, masks = np.zeros(found, dtype=np.int64), np.zeros(found, dtype=np.int64)
    return gfns, masks


def _collect_logged(machine: frames.Machine, gfn: int, end: int) -> NDArray[np.int64]:
    gfns = np.zeros(0, dtype=np.int64)
    while (found := int(dirty_harvest.collect_logged(machine, gfn, end, gfns))) > len(gfns):
        gfns = np.zeros(found, dtype=np.int64)
    return gfns
