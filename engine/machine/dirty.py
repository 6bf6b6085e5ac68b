"""Dirty tracking of a machine: switching it on, looking, harvesting in two steps, and KVM_GET_DIRTY_LOG."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from engine.arch import controls as ctl
from engine.arch import ept
from engine.cpu import frames
from engine.cpu.page_log import INDEX_MASK, LOG_ENTRIES
from engine.errors import Conflict, InvalidValue, NotEnabled, NotFound, Unsupported
from engine.kvm import dirty_log, tracking
from engine.kvm import registers as reg
from engine.kvm.slot_map import SlotMap
from engine.kvm.slots import SlotSpec, key_of
from engine.state.config import VmConfig, choices
from engine.state.frame_store import Draft, Snapshot
from engine.state.retry import new_trail, run_all

TRACKING = ("off", "page", "subpage")
METHODS = ("write-protect", "pml")
SUBPAGE_BYTES = 128
PAGE_BYTES = 4096

_LEVELS = {"off": 0, "page": tracking.TRACK_PAGES, "subpage": tracking.TRACK_SUBPAGES}
_LOWER = np.int64(0xFFFF_FFFF)
_UPPER = ~_LOWER

Change = Callable[[], AbstractContextManager[Draft]]


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


class DirtyOperations:
    """The dirty logs of one machine; ``kvm.tracking`` tells what they are."""

    def __init__(
        self,
        config: VmConfig,
        slots: Callable[[], SlotMap],
        published: Callable[[], Snapshot],
        change: Change,
    ) -> None:
        self._config = config
        self._slots = slots
        self._published = published
        self._change = change

    @property
    def _end(self) -> int:
        return 1 << (self._config.maxphyaddr - 12)

    # Reads

    def tracking(self) -> Tracking:
        """What is tracked, and how."""
        snapshot = self._published()
        mode = _register(snapshot.machine, reg.DIRTY_MODE)
        level = next(name for name, bit in _LEVELS.items() if mode & tracking.TRACKED == bit)
        return Tracking(level, METHODS[bool(mode & tracking.BY_PML)])

    def pages(self, gfn: int = 0, npages: int | None = None) -> DirtyPages:
        """What is dirty in a range, or everywhere; changes nothing. Pages without a slot are never dirty."""
        end = self._end if npages is None else gfn + npages
        if gfn < 0 or end > self._end or end <= gfn:
            raise InvalidValue(
                f"must lie within the guest-physical address width of {self._config.maxphyaddr} bits",
                field="gfn",
                value=gfn,
            )
        snapshot = self._published()
        machine = snapshot.machine
        gfns, masks = _collect(machine, gfn, end, dirty_log.SINCE_HARVEST)
        logged = _collect_logged(machine, gfn, end)
        buffered = np.unique(self._buffered(machine))
        buffered = buffered[(buffered >= gfn) & (buffered < end)]
        mode = _register(machine, reg.DIRTY_MODE)
        logged = np.union1d(logged, buffered[self._in_logged_slot(buffered)])
        whole = buffered if mode & tracking.TRACK_PAGES else buffered[:0]
        every = np.union1d(np.union1d(gfns, whole), logged)
        maps = np.zeros(len(every), dtype=np.uint32)
        maps[np.searchsorted(every, gfns)] = masks
        maps[np.searchsorted(every, whole)] = 0xFFFF_FFFF
        return DirtyPages(every, maps, np.isin(every, logged))

    def outstanding(self) -> Harvest | None:
        """The harvest that was not acknowledged yet, if there is one."""
        snapshot = self._published()
        return self._outstanding(snapshot.machine)

    def outstanding_number(self) -> int | None:
        """Its number alone."""
        snapshot = self._published()
        number = _register(snapshot.machine, reg.HARVESTS)
        return None if number == _register(snapshot.machine, reg.ACKNOWLEDGED) else number

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
        with self._change() as draft:
            machine = draft.machine
            if level == "subpage" and not _register(machine, reg.SPP_ACTIVE):
                raise NotEnabled(
                    "must be off or page while sub-page protection is off: switch it on first, with PUT …/spp",
                    field="tracking",
                    value=level,
                )
            empty_buffers(draft, self._config)
            self._use_buffers(draft, method)
            mode = _register(draft.machine, reg.DIRTY_MODE) & tracking.SLOT_LOGS
            mode |= _LEVELS[level] | (tracking.BY_PML if method == "pml" else 0)
            _store(draft.machine, reg.DIRTY_MODE, mode)
            if level == "off":
                self._clear(draft, _UPPER)
            if level == "page":
                run_all(draft, self._end, lambda at: dirty_log.widen_written(draft.machine, at, self._end))
            for spec in self._slots().values():
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
        with self._change() as draft:
            empty_buffers(draft, self._config)
            trail = new_trail()
            run_all(draft, self._end, lambda at: dirty_log.take_harvest(draft.machine, at, self._end, trail))
            _store(draft.machine, reg.HARVESTS, _register(draft.machine, reg.HARVESTS) + 1)
            _count(draft.machine, reg.DIRTY_HARVESTS)
            taken = self._outstanding(draft.machine)
        assert taken is not None
        return taken

    def acknowledge(self, harvest: int) -> bool:
        """Let go of a harvest; False if it had been acknowledged before. Raises NotFound for one that never was."""
        snapshot = self._published()
        if harvest < 1 or harvest > _register(snapshot.machine, reg.HARVESTS):
            raise NotFound("must be the number of a harvest that waits", field="harvest", value=harvest)
        if harvest <= _register(snapshot.machine, reg.ACKNOWLEDGED):
            return False
        with self._change() as draft:
            self._clear(draft, _LOWER)
            _store(draft.machine, reg.ACKNOWLEDGED, harvest)
        return True

    def take_log(self, slot: int, address_space: int = 0) -> bytes:
        """KVM_GET_DIRTY_LOG: the bitmap of a slot, page n in bit n % 8 of byte n // 8, in whole 64-bit words.

        The log is empty afterwards and the pages are watched again. Raises NotFound (ENOENT) for a slot that is not
        there or has no log.
        """
        spec = self._slots().get(key_of(slot, address_space))
        if spec is None or not spec.log_dirty:
            raise NotFound("must be a slot with log_dirty", field="slot", value=slot)
        out = np.zeros((spec.pages + tracking.LOG_MASK) >> tracking.LOG_SHIFT, dtype=np.int64)
        if spec.address_space:
            return out.tobytes()
        with self._change() as draft:
            empty_buffers(draft, self._config)
            trail = new_trail()
            run_all(
                draft,
                spec.pages,
                lambda at: dirty_log.take_log(draft.machine, spec.gfn, at, spec.pages, out, trail),
            )
        return out.tobytes()

    # Inside

    def _outstanding(self, machine: frames.Machine) -> Harvest | None:
        number = _register(machine, reg.HARVESTS)
        if number == _register(machine, reg.ACKNOWLEDGED):
            return None
        gfns, masks = _collect(machine, 0, self._end, dirty_log.OUTSTANDING)
        return Harvest(gfns, masks.astype(np.uint32), number)

    def _clear(self, draft: Draft, kept: np.int64) -> None:
        run_all(draft, self._end, lambda at: dirty_log.clear_written(draft.machine, at, self._end, kept))

    def _use_buffers(self, draft: Draft, method: str) -> None:
        """Give every vCPU a page-modification log, or take it away."""
        uses = bool(_register(draft.machine, reg.DIRTY_MODE) & tracking.BY_PML)
        if uses == (method == "pml"):
            return
        if not uses:
            self._check_page_log(draft.machine)
        draft.ensure(self._config.vcpu_records)
        machine = draft.machine
        for frame in self._vcpu_frames():
            secondary = int(frames.read_word(machine, frame, ctl.V_SECONDARY))
            if uses:
                buffer = int(frames.frame_at(machine, frames.read_word(machine, frame, ctl.V_PML_ADDRESS)))
                if buffer >= 0:
                    frames.free_frame(machine, buffer)
                address, secondary = 0, secondary & ~ctl.SECONDARY_PML
            else:
                address = int(frames.address_of(machine, frames.new_frame(machine, frames.CLIENT)))
                secondary |= ctl.SECONDARY_PML
            frames.write_word(machine, frame, ctl.V_PML_ADDRESS, address)
            frames.write_word(machine, frame, ctl.V_PML_INDEX, LOG_ENTRIES - 1)
            frames.write_word(machine, frame, ctl.V_SECONDARY, secondary)

    def _check_page_log(self, machine: frames.Machine) -> None:
        host = self._config.host
        flags = host.capability("ept_vpid_cap") & ept.CAP_ACCESSED_DIRTY
        if not flags or not host.secondary_allowed & ctl.SECONDARY_PML or host.vendor != "intel":
            raise Unsupported(
                "must be write-protect: this host lacks a page-modification log or EPT dirty flags",
                field="method",
                value="pml",
            )
        for frame in self._vcpu_frames():
            if int(frames.read_word(machine, frame, ctl.V_SECONDARY)) & ctl.SECONDARY_PML:
                raise Conflict(
                    "must be write-protect: the page-modification log of a vCPU is in use, its VMCS was written",
                    field="method",
                    value="pml",
                )

    def _vcpu_frames(self) -> range:
        first = int(frames.FIRST_VCPU_FRAME)
        return range(first, first + self._config.vcpu_records)

    def _buffered(self, machine: frames.Machine) -> NDArray[np.int64]:
        """GFNs in the page-modification logs that no log has taken note of yet, in slots."""
        found: list[int] = []
        if _register(machine, reg.DIRTY_MODE) & tracking.BY_PML:
            for frame in self._vcpu_frames():
                table = int(frames.read_word(machine, frame, ctl.V_PML_ADDRESS))
                first = (int(frames.read_word(machine, frame, ctl.V_PML_INDEX)) + 1) & INDEX_MASK
                entries = (int(frames.read_entry(machine, table, n)) for n in range(first, LOG_ENTRIES))
                found += ((entry & ept.ADDRESS) >> 12 for entry in entries)
        gfns = np.array(found, dtype=np.int64)
        held: NDArray[np.int64] = gfns[np.array([self._slot_of(gfn) is not None for gfn in found], dtype=bool)]
        return held

    def _in_logged_slot(self, gfns: NDArray[np.int64]) -> NDArray[np.bool_]:
        slots = [self._slot_of(int(gfn)) for gfn in gfns]
        return np.array([spec is not None and spec.log_dirty for spec in slots], dtype=bool)

    def _slot_of(self, gfn: int) -> SlotSpec | None:
        return self._slots().holding(gfn)


def empty_buffers(draft: Draft, config: VmConfig, slots: SlotMap | None = None) -> None:
    """Take note of what the processors logged; ``slots`` are those it was logged under, if they are about to change."""
    if not _register(draft.machine, reg.DIRTY_MODE) & tracking.BY_PML:
        return
    after = draft.machine.slots
    if slots is not None:
        draft.machine = draft.machine._replace(slots=slots.table)
    for position in range(config.vcpu_records):
        draft.ensure(20 * LOG_ENTRIES)
        dirty_log.empty_buffer(draft.machine, position, np.int64(0))
    draft.machine = draft.machine._replace(slots=after)


def slot_changed(draft: Draft, slots: SlotMap, old: SlotSpec | None, new: SlotSpec) -> None:
    """After a slot came or changed: its log begins empty, ends with the flag, and its pages are watched or no longer.

    ``slots`` are the slots from now on.
    """
    note_slots(draft, slots)
    had = old is not None and old.log_dirty
    if had == new.log_dirty or new.address_space:
        return
    if had:
        out = np.zeros((new.pages + tracking.LOG_MASK) >> tracking.LOG_SHIFT, dtype=np.int64)
        trail = new_trail()
        run_all(draft, new.pages, lambda at: dirty_log.take_log(draft.machine, new.gfn, at, new.pages, out, trail))
    watch_slot(draft, new)


def note_slots(draft: Draft, slots: SlotMap) -> None:
    """Note whether a slot has KVM's log."""
    mode = _register(draft.machine, reg.DIRTY_MODE) & ~tracking.SLOT_LOGS
    if slots.logged:
        mode |= tracking.SLOT_LOGS
    _store(draft.machine, reg.DIRTY_MODE, mode)


def watch_slot(draft: Draft, spec: SlotSpec) -> None:
    """Bring the mapped pages of a slot in line with what is tracked."""
    trail = new_trail()
    if not spec.address_space:
        run_all(draft, spec.pages, lambda at: dirty_log.watch_mapped(draft.machine, spec.gfn, at, spec.pages, trail))


def _register(machine: frames.Machine, position: np.int64) -> int:
    return int(machine.rows[machine.row_of[frames.STATE_FRAME], position])


def _store(machine: frames.Machine, position: np.int64, word: int) -> None:
    frames.write_word(machine, frames.STATE_FRAME, position, np.int64(word))


def _count(machine: frames.Machine, counter: int) -> None:
    position = reg.COUNTERS_AT + counter
    _store(machine, np.int64(position), _register(machine, np.int64(position)) + 1)


def _collect(
    machine: frames.Machine, gfn: int, end: int, half: np.int64
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    gfns, masks = np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64)
    while (found := int(dirty_log.collect(machine, gfn, end, half, gfns, masks))) > len(gfns):
        gfns, masks = np.zeros(found, dtype=np.int64), np.zeros(found, dtype=np.int64)
    return gfns, masks


def _collect_logged(machine: frames.Machine, gfn: int, end: int) -> NDArray[np.int64]:
    gfns = np.zeros(0, dtype=np.int64)
    while (found := int(dirty_log.collect_logged(machine, gfn, end, gfns))) > len(gfns):
        gfns = np.zeros(found, dtype=np.int64)
    return gfns
