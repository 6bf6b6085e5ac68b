"""Sub-page bitmaps of a machine: read, and set over any number of ranges, all or nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from engine.cpu import frames
from engine.errors import InvalidValue
from engine.kvm import bitmaps, enabling_checks, mapping, spp_control, spp_set, sppt_roots
from engine.kvm import state_frame as reg
from engine.kvm.slots import PAGE_SHIFT, check_pages
from engine.machine.fault_injection import Allocations
from engine.machine.nested import nested_in_use
from engine.machine.state import Operations, State, register
from engine.state.frame_store import Draft
from engine.state.retry import new_trail, run_all

MAX_WINDOW = 1 << 20
SET_BATCH = 1 << 16


@dataclass(frozen=True, slots=True)
class SubpageRange:
    """Maps for ``npages`` pages from ``gfn``: one value for all, or uint32[npages]. Bit s = sub-page s writable.

    ``where`` goes before the names of fields in errors.
    """

    gfn: int
    npages: int
    access: NDArray[np.uint32] | int
    where: str = ""


class Subpages(Operations):
    """Sub-page protection of one machine: switched on, its bitmaps read and set."""

    @property
    def active(self) -> bool:
        """Whether sub-page protection is on."""
        return self._state.current.spp_active

    def read(self, gfn: int, npages: int, layer: str = "effective") -> NDArray[np.uint32]:
        """Maps of consecutive pages, uint32[npages] (KVM_SUBPAGES_GET_ACCESS); ``layer`` is one of LAYER_NAMES."""
        if layer not in bitmaps.LAYER_NAMES:
            raise InvalidValue(f"layer is one of {', '.join(bitmaps.LAYER_NAMES)}", field="layer", value=layer)
        now = self._state.current
        machine = now.snapshot.machine
        _check_active(now)
        if not 1 <= npages <= MAX_WINDOW:
            raise InvalidValue(f"npages is 1 to {MAX_WINDOW}", field="npages", value=npages)
        check_pages(machine, now.config.maxphyaddr, gfn, npages, "gfn")
        maps = np.empty(npages, dtype=np.uint32)
        bitmaps.read_maps(machine, gfn, bitmaps.LAYER_NAMES.index(layer), maps)
        return maps

    def enable(self) -> None:
        """KVM_INIT_SPP: switch sub-page protection on; a second time does nothing.

        Whole pages that were protected before are protected by all their sub-pages from now on.
        """
        now = self._state.current
        enabling_checks.check(now.config, nested_in_use(now.nested))
        if not now.spp_active:
            Allocations(self._state).make_bitmaps(len(now.slots))
            with self._state.change() as change:
                records = frames.records(change.machine)
                change.ensure(2 * records)
                sppt_roots.enable(change.machine)
                for position in range(records):
                    spp_control.enable(change.machine, position)
                if register(change.machine, reg.ROOT_POLICY):
                    _end_tracking(change, 1 << now.config.maxphyaddr - PAGE_SHIFT)

    def set(self, ranges: Sequence[SubpageRange]) -> None:
        """KVM_SUBPAGES_SET_ACCESS over any number of ranges, in order, all or nothing."""
        now = self._state.current
        _check_active(now)
        for item in ranges:
            _check_range(now.snapshot.machine, now.config.maxphyaddr, item)
        with self._state.change(since=now, executes=False) as change:
            for item in ranges:
                _set_range(change, item)


def _end_tracking(draft: Draft, end: int) -> None:
    trail = new_trail()
    run_all(draft, end, lambda at: mapping.end_tracking(draft.machine, at, end, trail))


def _check_active(now: State) -> None:
    if not now.spp_active:
        raise enabling_checks.not_enabled()


def _check_range(machine: frames.Machine, width: int, item: SubpageRange) -> None:
    if item.npages < 1:
        raise InvalidValue("npages is at least 1", field=f"{item.where}npages", value=item.npages)
    check_pages(machine, width, item.gfn, item.npages, f"{item.where}gfn")
    if isinstance(item.access, int):
        if not 0 <= item.access < 1 << 32:
            raise InvalidValue("a map has 32 bits", field=f"{item.where}access", value=item.access)
    elif len(item.access) != item.npages:
        raise InvalidValue("there is one map for each page", field=f"{item.where}access", value=len(item.access))


def _set_range(draft: Draft, item: SubpageRange) -> None:
    trail = new_trail()
    for begin in range(0, item.npages, SET_BATCH):
        count = min(SET_BATCH, item.npages - begin)
        if isinstance(item.access, int):
            maps = np.full(count, item.access, dtype=np.uint32)
        else:
            # A copy: an array over bytes that may not be written would be another signature, compiled at that moment.
            maps = np.array(item.access[begin : begin + count], dtype=np.uint32)
        first = item.gfn + begin
        run_all(draft, count, lambda start: spp_set.set_maps(draft.machine, first, maps, start, trail))  # noqa: B023
